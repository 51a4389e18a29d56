"""Peak anonymous memory and time of reading and writing caches of 10⁶ and 10⁷ rows: memory flat, time linear.

Each size is read and written in a process of its own. Anonymous memory is what the process holds itself; pages of files
that the system keeps for it do not count. Rows are narrow (128 channels) so that the largest fits on a disk, and shards
have 16 MB at every size: caches of 1.6 GB and more have shards of one size, 100 MB, and so have these, made smaller.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from clvq import Cache
from clvq.cache import placement as placing
from clvq.cache.extraction import Extraction, Shard
from clvq.cache.layout import ROW_COLUMNS, SiteLayout
from clvq.cache.row_stream import RowStream
from clvq.cache.stream import TextStream
from clvq.cache.writer import CacheWriter
from common import Peak, header

WIDTH, TEXT_ROWS = 128, 250
POOL_BYTES = 64 << 20


def write(path: Path, rows: int) -> None:
    """Write a cache of random values shard by shard."""
    counts = np.full(rows // TEXT_ROWS, TEXT_ROWS)
    placing.SHARD_BYTES = 16_000_000
    placement = placing.place(counts, row_bytes=2 * WIDTH)
    geometry = placement.geometry
    generator = np.random.default_rng(0)
    sites = {"hidden.1": SiteLayout(width=WIDTH, encoding="bf16")}
    with CacheWriter(path, Extraction({"model": {"name": "random"}}, geometry, sites, None)) as writer:
        for shard in range(geometry.shards):
            first, end = placement.shard_starts[shard : shard + 2]
            own = counts[first:end]
            columns = {name: np.zeros(int(own.sum()), dtype) for name, (dtype, _) in ROW_COLUMNS.items()}
            columns["text"][:] = np.repeat(placement.text_id[first:end], own)
            values = generator.standard_normal((int(own.sum()), WIDTH), dtype=np.float32)
            writer.commit(Shard(shard, {"hidden.1": values}, columns, len(own)))
        table = {
            "text_id": pa.array(placement.text_id, pa.int64()),
            "split": ["train"] * len(counts),
            "label": pa.nulls(len(counts), pa.int32()),
            "first_row": placement.first_row,
            "row_count": counts,
        }
        writer.finish(pa.table(table), class_names=None, counts={"texts": len(counts)})


def read(path: Path, what: str) -> None:
    """Read an epoch."""
    cache = Cache(path)
    everything = np.ones(len(cache.texts), dtype=bool)
    sites = ("hidden.1",)
    if what == "rows":
        rows = RowStream(cache, sites, everything, special="all", seed=0, batch_rows=4096, pool_bytes=POOL_BYTES)
        for batch in rows.epoch(0):
            batch.values["hidden.1"][0].sum()
    else:
        texts = TextStream(
            cache, sites, everything, special="leading", seed=0, slots_per_batch=4096, pool_bytes=POOL_BYTES
        )
        for padded in texts.epoch(0):
            padded.values["hidden.1"][0].sum()


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 3_000_000, 10_000_000])
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--reading", action="store_true", help="only reading (caches are written all the same)")
    only.add_argument("--writing", action="store_true", help="only writing")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        what, folder = given.one
        began = time.perf_counter()
        with Peak() as peak:
            write(Path(folder), given.rows[0]) if what == "write" else read(Path(folder), what)
        print(json.dumps([peak.base, peak.largest, time.perf_counter() - began]))
        return
    print(header("clvq", "numpy", "numcodecs", "pyarrow"))
    print(f"{WIDTH} channels as bf16, texts of {TEXT_ROWS} rows, pools of {POOL_BYTES >> 20} MiB\n")
    shown = ["write"] if given.writing else ["rows", "texts"] if given.reading else ["write", "rows", "texts"]
    names = {"write": "writing", "rows": "reading rows", "texts": "reading texts"}
    for rows in given.rows:
        with tempfile.TemporaryDirectory() as folder:
            for what in ["write"] + [what for what in shown if what != "write"]:
                command = [sys.executable, __file__, "--rows", str(rows), "--one", what, f"{folder}/cache"]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                base, largest, seconds = json.loads(done.stdout)
                if what in shown:
                    print(
                        f"  {rows:>10,} rows, {names[what]:<14} peak {largest:6.0f} MB anonymous "
                        f"({base:.0f} before)   {seconds:7.2f} s, {seconds / rows * 1e6:6.3f} µs/row"
                    )


if __name__ == "__main__":
    main()
