"""Does with hostile caches what it is told to, and tells what came of it. To be run as a script.

Each line of its input is JSON: a folder, and what to do with it. Each answer says how that ended, by how many MiB the
process grew at most, and how many seconds it took.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from clvq import Cache, ClvqError
from clvq.cache.verify import verify

# Whoever errs here shall not take the machine along.
_MOST = 8 << 30


def _first_rows(path: Path) -> object:
    cache = Cache(path)
    return [cache.vectors(site, np.arange(3)).shape for site in cache.manifest.sites]


def _everything(path: Path) -> object:
    cache = Cache(path)
    rows = cache.rows_of(cache.splits(list(cache.manifest.splits)))
    for site in cache.manifest.sites:
        cache.vectors(site, rows)
    return [cache.column(name).shape for name in cache.manifest.columns] + [cache.logits().shape]


ACTIONS: dict[str, Callable[[Path], object]] = {
    "open": lambda path: Cache(path).id,
    "verify": lambda path: [f"{problem.file} {problem.found}" for problem in verify(path).problems],
    "texts": lambda path: len(Cache(path).texts),
    "index": lambda path: len(Cache(path).text_index),
    "column": lambda path: Cache(path).column("text").shape,
    "logits": lambda path: Cache(path).logits().shape,
    "rows": _first_rows,
    "everything": _everything,
}


def _mebibytes(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise AssertionError(name)


def _answer(path: Path, action: str) -> dict[str, object]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
    before, begin = _mebibytes("VmRSS"), time.perf_counter()
    try:
        found, kind = ACTIONS[action](path), "done"
    except ClvqError as error:
        found, kind = str(error), type(error).__name__
    except Exception as error:
        found, kind = repr(error)[:1000], "an error that is not ours"
    return {
        "kind": kind,
        "found": found,
        "grew": _mebibytes("VmHWM") - before,
        "seconds": time.perf_counter() - begin,
    }


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (_MOST, _MOST))
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(_answer(Path(order["path"]), order["do"])), flush=True)  # noqa: T201
