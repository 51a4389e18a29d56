"""Writing shards: the cache against `np.save` of the same raw bf16 bits with fsync, and against zarr-python.

Two ways of ours: `bits` packs bits that are there already into fsynced shard files, which is what the others do;
`commit` does all that an extraction does with float32 values: rounding, statistics, error of encoding, SHA-256,
records, manifest.
"""

import argparse
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import zarr
from clvq.cache.encoding import array_layouts, pack, to_bits, write_chunks
from clvq.cache.extraction import Extraction, Shard
from clvq.cache.layout import ROW_COLUMNS, SiteLayout
from clvq.cache.placement import place
from clvq.cache.writer import CacheWriter
from common import alternated, header, report
from tiled import SITES, hidden_states
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vectors, _ = hidden_states(folder)
        picked = np.random.default_rng(0).integers(0, len(vectors[SITES[0]]), given.rows)
        values = {site: vectors[site][picked] for site in SITES}
        bits = {site: to_bits(part, "bf16", site=site) for site, part in values.items()}
        width = values[SITES[0]].shape[1]
        counts = np.full(given.rows // 32, 32)
        placement = place(counts, row_bytes=2 * width)
        geometry = placement.geometry
        sites = {site: SiteLayout(width=width, encoding="bf16") for site in SITES}
        layouts = array_layouts(geometry, sites, classes=None)
        out = folder / "out"

        def fresh() -> Path:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            return out

        def np_save() -> None:
            for site, part in bits.items():
                with open(fresh() / site, "wb") as file:
                    np.save(file, part)
                    file.flush()
                    os.fsync(file.fileno())

        def our_bits() -> None:
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                for site, part in bits.items():
                    layout = layouts[f"sites/{site}"]
                    target = fresh()
                    for shard in range(geometry.shards):
                        own = part[shard * layout.shard : (shard + 1) * layout.shard]
                        chunks = [own[start : start + layout.chunk] for start in range(0, layout.shard, layout.chunk)]
                        with open(target / str(shard), "wb") as file:
                            write_chunks(file, threads.map(lambda chunk: pack(chunk, layout), chunks))  # noqa: B023
                            file.flush()
                            os.fsync(file.fileno())

        def our_commit() -> None:
            with CacheWriter(fresh() / "cache", Extraction({"model": {}}, geometry, sites, None)) as writer:
                for shard in range(geometry.shards):
                    first, end = placement.shard_starts[shard : shard + 2] * 32
                    columns = {name: np.zeros(end - first, dtype) for name, (dtype, _) in ROW_COLUMNS.items()}
                    part = {site: v[first:end] for site, v in values.items()}
                    writer.commit(Shard(shard, part, columns, int(end - first) // 32))
                writer.finish(
                    pa.table(
                        {
                            "text_id": placement.text_id,
                            "split": ["train"] * len(counts),
                            "label": pa.nulls(len(counts), pa.int32()),
                            "first_row": placement.first_row,
                            "row_count": counts,
                        }
                    ),
                    class_names=None,
                    counts={},
                )

        def zarr_python() -> None:
            for site, part in bits.items():
                layout = layouts[f"sites/{site}"]
                array = zarr.create_array(
                    fresh() / site,
                    shape=layout.shape,
                    dtype="uint16",
                    chunks=(layout.chunk, width),
                    shards=(layout.shard, width),
                    serializer=BytesCodec(),
                    compressors=[
                        BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=2, blocksize=layout.chunk_bytes),
                        Crc32cCodec(),
                    ],
                )
                for shard in range(geometry.shards):
                    own = part[shard * layout.shard : (shard + 1) * layout.shard]
                    array[shard * layout.shard : shard * layout.shard + len(own)] = own
                for file in (out / site).rglob("c/*/*"):
                    with open(file, "rb") as written:
                        os.fsync(written.fileno())

        ways = {
            "clvq, bits": our_bits,
            "clvq, whole commit from float32": our_commit,
            "np.save of raw bf16 + fsync": np_save,
            "zarr-python, same codecs, + fsync": zarr_python,
        }
        for way in ways.values():
            way()
        seconds = alternated(ways, repeats=given.repeats)
        print(header("clvq", "numpy", "numcodecs", "zarr"))
        amount = given.rows * len(SITES) * width * 2
        for ours in list(ways)[:2]:
            report(
                f"writing {given.rows:,} rows × {len(SITES)} sites, {geometry.shards} shards",
                seconds,
                ours=ours,
                amount=amount // 1_000_000,
                unit="MB of bf16",
            )


if __name__ == "__main__":
    main()
