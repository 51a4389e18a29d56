"""Runs next to each other: figures over seeds, and how far seeds agree on the codes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy.stats import t  # type: ignore[import-untyped]

from ..cache.reader import Cache
from ..progress import Progress
from ..trainer.data import blocks
from ..trainer.folder import REPORT
from ..trainer.run import Run
from .agreement import Stability, assignment_stability, direction_stability

FIGURES = ("own_code_fvu", "decoder_fvu_codes_only", "perplexity", "used_codes", "train_seconds")
"""Those of `report.json` that are compared."""

# Rows whose codes are compared: the adjustment for chance takes time with each row more.
_ROWS = 20_000


@dataclass(frozen=True)
class OverSeeds:
    """A mean over seeds with its 95 % interval by Student's t; of one seed there is no interval."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


@dataclass(frozen=True)
class Compared:
    """Runs that differ in their seed alone."""

    figures: dict[str, OverSeeds]
    """By their names in `report.json`; one that not every run has is left out."""
    directions: Stability | None
    """Mean matched cosine of the used concepts' centred means at the lower site; `None` for fewer than two seeds."""
    assignments: Stability | None
    """Adjusted mutual information of the codes of the same rows: of texts that one seed or more held out."""


def over_seeds(values: Float64[np.ndarray, " seed"]) -> OverSeeds:
    """The mean of one value of each seed."""
    count, mean = len(values), float(values.mean())
    if count < 2:
        return OverSeeds(mean, None, None, count)
    half = float(t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count))
    return OverSeeds(mean, mean - half, mean + half, count)


def compare(cache: Cache, groups: Mapping[str, Sequence[Path]], *, progress: Progress) -> dict[str, Compared]:
    """Compare the finished runs of each group: those that differ in their seed alone.

    Raises
    ------
    RunNotFound, RunMismatch, Interrupted
    """
    progress.begin("agreement of seeds", sum(map(len, groups.values())), "run")
    return {name: _compared(cache, paths, progress) for name, paths in groups.items()}


def _compared(cache: Cache, paths: Sequence[Path], progress: Progress) -> Compared:
    reports = [json.loads((path / REPORT).read_bytes()) for path in paths]
    # A report has null for what is undefined, which becomes NaN.
    values = {name: np.array([report.get(name) for report in reports], dtype=np.float64) for name in FIGURES}
    figures = {name: over_seeds(found) for name, found in values.items() if len(found) and np.isfinite(found).all()}
    if len(paths) < 2:
        progress.advance(len(paths))
        return Compared(figures, None, None)
    runs = [Run.from_pretrained(path) for path in paths]
    for run in runs:
        run.check_cache(cache)
    held_out = np.unique(np.concatenate([run.held_out_texts for run in runs]))
    texts = np.isin(np.asarray(cache.texts["text_id"]), held_out)
    codes = []
    for run in runs:
        codes.append(_codes(cache, run, texts))
        progress.advance()
    return Compared(
        figures,
        direction_stability([(run.concept_means - run.lower_mean)[run.counts > 0] for run in runs]),
        assignment_stability(codes),
    )


def _codes(cache: Cache, run: Run, texts: Bool[np.ndarray, " text"]) -> Int64[np.ndarray, " row"]:
    """The codes of a sample of the texts' rows, the same for all runs of a group."""
    site = run.config.lower
    rows = cache.chosen(texts, special=run.config.special)
    codes = np.concatenate([run.assign(block[site]) for block in blocks(cache, rows, [site])])
    return codes[np.random.default_rng(0).permutation(len(codes))[:_ROWS]]
