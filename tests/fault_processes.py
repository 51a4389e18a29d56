"""Processes that the fault tests kill, run side by side or give a full disk. To be run as a script.

`serve` reads a folder from each line of its input, forks a writer of it, and prints the writer's process id and, after
its end, `done`, `in use` or `killed`. Forked from a process that has imported everything, a writer begins at once.

`fill FOLDER` mounts small disks there, in a mount namespace of its own, and writes a cache on each until it is full;
then the disk grows. It prints one line of JSON.
"""

import json
import os
import random
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
from cache_maker import EVERY_ENCODING, Known, check_what_is_named_is_whole, contents, known, recorded
from clvq.cache.verify import verify
from clvq.errors import DiskFull, FolderInUse


def fault_cache() -> Known:
    """What the writers write: all encodings, some seventeen shards, chunks that are not full."""
    return known(texts=40, longest=20, widths=EVERY_ENCODING)


def _write(made: Known, folder: Path) -> int:
    try:
        made.write(folder)
    except FolderInUse:
        return 2
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve() -> None:
    made = fault_cache()
    made.scales  # noqa: B018 — all code and data are in memory before the first fork
    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(_write(made, Path(line.strip())))
        print(child, flush=True)  # noqa: T201
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print({0: "done", 2: "in use", -9: "killed"}.get(status, f"failed ({status})"), flush=True)  # noqa: T201


def _mount(*options: str) -> None:
    subprocess.run(["mount", *options], check=True, capture_output=True)


def fill(folder: Path, rounds: int) -> None:
    made = fault_cache()
    made.write(folder / "whole")
    whole = contents(folder / "whole")
    disk, draw = folder / "disk", random.Random(0)
    disk.mkdir()
    pages = sum(-(-len(data) // 4096) for data in whole.values()) + 40
    entries = len(whole) + 200
    told = {"full": 0, "full again": 0, "kept shards": 0, "whole at once": 0, "free": 0}
    for number in range(rounds):
        # Pages run out, or the number of files does.
        small = f"size={draw.randrange(1, pages) * 4096}" if number % 3 else f"nr_inodes={draw.randrange(3, entries)}"
        _mount("-t", "tmpfs", "-o", small, "tmpfs", str(disk))
        cache = disk / "cache"
        try:
            made.write(cache)
            told["whole at once"] += 1
        except DiskFull:
            told["full"] += 1
            told["kept shards"] += len(recorded(cache))
            assert not list(cache.rglob(".*")), "a file that was written aside is left"
            assert not list(cache.glob("staging/*")), "staged files are left"
            before = recorded(cache)
            check_what_is_named_is_whole(cache)
            # Without more room it stops again, and loses nothing.
            try:
                made.write(cache)
            except DiskFull:
                told["full again"] += 1
            assert before <= recorded(cache), "a shard was lost"
            check_what_is_named_is_whole(cache)
        _mount("-o", "remount,size=64m,nr_inodes=100000", str(disk))
        made.write(cache)
        assert contents(cache) == whole, "other bytes"
        assert verify(cache).problems == []
        subprocess.run(["umount", str(disk)], check=True)
    print(json.dumps(told))  # noqa: T201


if __name__ == "__main__":
    np.seterr(all="raise")
    if sys.argv[1] == "serve":
        serve()
    else:
        fill(Path(sys.argv[2]), int(sys.argv[3]))
