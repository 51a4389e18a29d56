"""Small synthetic caches. A script may use this file too: it needs nothing of pytest."""

import hashlib
from pathlib import Path

import clvq
import numpy as np
import pyarrow as pa
from clvq.cache.extraction import Extraction, Shard
from clvq.cache.layout import ROW_COLUMNS, SiteLayout
from clvq.cache.placement import place
from clvq.cache.writer import CacheWriter

LOWER, UPPER = "hidden.1", "hidden.2"


def make_cache(
    folder: Path,
    *,
    texts: int = 60,
    d: int = 16,
    d_upper: int | None = None,
    seed: int = 0,
    kinds: int = 12,
    splits: tuple[str, ...] = ("train", "dev"),
    copies: int = 0,
) -> clvq.Cache:
    """Texts of 3 to 14 rows of `kinds` kinds, with logits, labels, special rows and a nonlinear upper site.

    Every fourth text is of the last split. The first row of a text is special 1, the last is special 2. The last
    `copies` texts have the contents of the first ones, but not their rows.
    """
    generator = np.random.default_rng(seed)
    d_upper = d if d_upper is None else d_upper
    counts = generator.integers(3, 15, texts)
    placement = place(counts, row_bytes=4 * max(d, d_upper))
    geometry = placement.geometry
    centres = 3 * generator.normal(size=(kinds, d)) + 5
    mix = generator.normal(size=(d, d_upper)) / np.sqrt(d)

    contents = [f"text {number if number < texts - copies else number - (texts - copies)}" for number in range(texts)]
    split = [splits[-1] if number % 4 == 3 else splits[0] for number in range(texts)]
    label = generator.integers(0, 2, texts).astype(np.int32)
    sites = {LOWER: SiteLayout(width=d, encoding="fp32"), UPPER: SiteLayout(width=d_upper, encoding="fp32")}
    identity = {"model": {"name": "synthetic"}, "seed": seed}
    with CacheWriter(folder, Extraction(identity, geometry, sites, 2)) as writer:
        for shard in range(geometry.shards):
            first, end = placement.shard_starts[shard : shard + 2]
            own = counts[first:end]
            rows = int(own.sum())
            kind = generator.integers(0, kinds, rows)
            lower = (centres[kind] + generator.normal(size=(rows, d))).astype(np.float32)
            noise = 0.1 * generator.normal(size=(rows, d_upper))
            upper = (np.tanh((lower - 5) @ mix) * 4 + 2 + noise).astype(np.float32)
            columns = {name: np.zeros(rows, dtype) for name, (dtype, _) in ROW_COLUMNS.items()}
            starts = np.r_[0, np.cumsum(own)[:-1]]
            columns["text"][:] = np.repeat(placement.text_id[first:end], own)
            columns["position"][:] = np.arange(rows) - np.repeat(starts, own)
            columns["subwords"][:] = 1
            columns["token"][:] = kind
            columns["word"][:] = columns["position"] - 1
            columns["special"][starts] = 1
            columns["special"][starts + own - 1] = 2
            columns["word"][columns["special"] > 0] = -1
            logits = generator.normal(size=(end - first, 2)).astype(np.float32)
            writer.commit(Shard(shard, {LOWER: lower, UPPER: upper}, columns, int(end - first), logits))
        writer.finish(
            pa.table(
                {
                    "text_id": pa.array(placement.text_id, pa.int64()),
                    "source_row": pa.array(range(texts), pa.int64()),
                    "split": split,
                    "text": contents,
                    "text_sha256": [hashlib.sha256(content.encode()).hexdigest() for content in contents],
                    "label": pa.array(label, pa.int32()),
                    "truncated_tokens": pa.array([0] * texts, pa.int32()),
                    "first_row": placement.first_row,
                    "row_count": counts,
                }
            ),
            class_names=["no", "yes"],
            counts={"texts": texts},
        )
    return clvq.Cache(folder)
