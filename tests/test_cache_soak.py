"""Faults at random: processes killed, several writers at once, disks that are full, bits that flip.

`make soak` runs the long forms. Whatever happens, no row is lost, doubled or silently wrong.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from clvq import Cache
from clvq.cache.layout import MANIFEST
from clvq.cache.row_stream import RowStream
from clvq.cache.stream import TextStream
from clvq.cache.verify import Problem, verify
from clvq.errors import CacheCorrupt, FormatVersion

from .cache_maker import EVERY_ENCODING, check_what_is_named_is_whole, contents, known, without_waiting

pytestmark = pytest.mark.soak
Tell = Callable[[str], None]

SCRIPT = Path(__file__).with_name("fault_processes.py")


class Writers:
    """A process that forks writers of one cache; see `fault_processes.py`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, SCRIPT, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def begin(self, folder: Path) -> int:
        """Start a writer of the folder; its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{folder}\n")
        self._process.stdin.flush()
        return int(self._line())

    def end(self) -> str:
        """How the writer ended."""
        return self._line()

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def writers() -> Iterator[list[Writers]]:
    """Three that work side by side."""
    several = [Writers() for _ in range(3)]
    yield several
    for each in several:
        each.close()


@pytest.fixture(scope="module")
def whole(writers: list[Writers], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """The files that each writer is to leave in the end, and the seconds that writing them takes."""
    folder = tmp_path_factory.mktemp("soak") / "whole"
    begin = time.monotonic()
    writers[0].begin(folder)
    assert writers[0].end() == "done"
    assert verify(folder).problems == []
    return contents(folder), time.monotonic() - begin


def killed_after(process: int, seconds: float) -> None:
    time.sleep(seconds)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def test_killed_again_and_again_the_cache_comes_out_the_same(
    writers: list[Writers], whole: tuple[dict[str, bytes], float], tmp_path: Path, soak: bool, tell: Tell
) -> None:
    files, takes = whole
    draw, kills, finished, wanted = random.Random(0), 0, 0, 400 if soak else 8
    while kills < wanted:
        folder = tmp_path / f"cache-{finished}"
        ended = ""
        while ended != "done":
            process = writers[0].begin(folder)
            if kills < wanted:
                killed_after(process, draw.uniform(0, takes))
            ended = writers[0].end()
            assert ended in ("done", "killed")
            kills += ended == "killed"
            check_what_is_named_is_whole(folder)
        assert contents(folder) == files
        assert verify(folder).problems == []
        shutil.rmtree(folder)
        finished += 1
    tell(f"{kills} writers killed while they wrote {finished} caches: each came out byte for byte the same")


def test_three_writers_at_once_leave_one_whole_cache(
    writers: list[Writers], whole: tuple[dict[str, bytes], float], tmp_path: Path, soak: bool, tell: Tell
) -> None:
    files, takes = whole
    draw, outcomes, rounds = random.Random(1), Counter[str](), 100 if soak else 3
    for number in range(rounds):
        folder = tmp_path / f"cache-{number}"
        processes = [writer.begin(folder) for writer in writers]
        if number % 2:
            # Whoever waits outside must not mistake what a killed one left for a finished cache.
            killed_after(draw.choice(processes), draw.uniform(0, takes))
        ends = Counter(writer.end() for writer in writers)
        assert ends.keys() <= {"done", "in use", "killed"}
        assert number % 2 or ends["done"]
        outcomes += ends
        check_what_is_named_is_whole(folder)
        writers[0].begin(folder)
        assert writers[0].end() == "done"
        assert contents(folder) == files
        shutil.rmtree(folder)
    assert outcomes["in use"]
    tell(
        f"{rounds} folders given to 3 writers at once: {outcomes['done']} wrote, {outcomes['in use']} were refused, "
        f"{outcomes['killed']} were killed; each folder came out byte for byte the same"
    )


def test_a_disk_that_is_really_full_keeps_finished_shards_and_ends_whole_with_more_room(
    tmp_path: Path, soak: bool, tell: Tell
) -> None:
    mount = ["unshare", "--map-root-user", "--mount"]
    try:
        subprocess.run([*mount, "mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets no user mount a disk in a namespace of their own")
    rounds = 300 if soak else 8
    ended = subprocess.run(
        [*mount, sys.executable, SCRIPT, "fill", tmp_path, str(rounds)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["full"] > rounds / 2
    assert found["full"] + found["whole at once"] == rounds
    tell(
        f"{found['full']} times out of room on real disks of a few pages, with {found['kept shards']} finished shards "
        "kept: each cache came out byte for byte the same when there was more"
    )


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Path]:
    """A cache to be damaged; nothing waits for the disk."""
    for _ in without_waiting():
        known(texts=12, widths=EVERY_ENCODING).write(tmp_path / "cache")
        yield tmp_path / "cache"


def everything(path: Path) -> Iterator[tuple[str, Any]]:
    """All that can be read from a cache, piece by piece; each is a pair of its name and a function that reads it."""
    cache = Cache(path)
    places = np.arange(cache.manifest.geometry.row_places)
    yield "texts", lambda: cache.texts.to_pylist()
    yield "train", lambda: cache.rows_of(cache.splits(["train"])).tolist()
    yield "leading", lambda: cache.rows_of(cache.splits(["train", "dev"]), special="leading").tolist()
    yield "logits", lambda: cache.logits().tobytes()
    for name in cache.manifest.columns:
        yield name, lambda name=name: cache.column(name).tobytes()
    for name in cache.manifest.sites:
        yield name, lambda name=name: cache.vectors(name, places).tobytes()
    sites, all_texts = list(cache.manifest.sites), np.ones(cache.manifest.geometry.texts, dtype=bool)

    def streamed(kind: type[RowStream] | type[TextStream], **settings: Any) -> list[bytes]:
        batches = kind(cache, sites, all_texts, special="all", seed=0, pool_bytes=2000, **settings).epoch(0)
        return [batch.row.tobytes() + batch.values[site].tobytes() for batch in batches for site in sites]

    yield "rows in shuffled batches", lambda: streamed(RowStream, batch_rows=20)
    yield "texts in shuffled batches", lambda: streamed(TextStream, texts_per_batch=3)


def outcome(read: Callable[[], Any]) -> tuple[Any, str]:
    """What was read, or with which words reading was refused."""
    try:
        return read(), ""
    except CacheCorrupt as error:
        return None, str(error)


def read_by_zarr(path: Path, name: str) -> bytes:
    array = zarr.open_group(path / "activations.zarr", mode="r")[name]
    return np.asarray(array[:]).tobytes()


def kind_of(name: str) -> str:
    parts = name.split("/")
    return "/".join(parts[1:3]) if "/c/" in name else parts[-1] if "zarr.json" in name else parts[0]


def test_no_flipped_bit_passes_for_data(damaged: Path, soak: bool, tell: Tell) -> None:
    files, true = contents(damaged), {name: read() for name, read in everything(damaged)}
    kinds: dict[str, list[str]] = {}
    for name in sorted(files):
        kinds.setdefault(kind_of(name), []).append(name)
    assert len(kinds) == 4 + 2 + 8 + 1 + 5, (
        "4 sites, 2 scales, 8 columns, logits; metadata, records, card, texts, manifest"
    )
    draw, flips, refused = random.Random(2), 0, Counter[str]()
    for _ in range(50 if soak else 1):
        for names in kinds.values():
            name = draw.choice(names)
            bit = draw.randrange(8 * len(files[name]))
            data = bytearray(files[name])
            data[bit // 8] ^= 1 << bit % 8
            (damaged / name).write_bytes(data)
            flips += 1
            if name == MANIFEST:
                with pytest.raises((CacheCorrupt, FormatVersion)):
                    verify(damaged)
                with pytest.raises((CacheCorrupt, FormatVersion)):
                    Cache(damaged)
                refused["opening"] += 1
            else:
                assert verify(damaged).problems == [
                    Problem(name, "has other bytes than were written (SHA-256 differs)")
                ]
                for piece, read in everything(damaged):
                    found, refusal = outcome(read)
                    assert str(damaged / name) in refusal or found == true[piece], f"bit {bit} of {name}: {piece}"
                    refused["reading"] += bool(refusal)
                if "/c/" in name:
                    array = name.removeprefix("activations.zarr/").split("/c/")[0]
                    with pytest.raises((ValueError, RuntimeError)):
                        read_by_zarr(damaged, array)
            (damaged / name).write_bytes(files[name])
    assert verify(damaged).problems == []
    tell(
        f"{flips} single bits flipped in {len(kinds)} kinds of files: each named by verify (or the manifest refused), "
        f"0 rows silently wrong; {refused['reading']} readings refused"
    )
