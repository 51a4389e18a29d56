"""`clvq quality`: what concepts are worth without a judge, and without running the model."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from ..cache.files import only_writer, sha256_of, write_file
from ..cache.layout import to_json
from ..cache.reader import Cache
from ..errors import ConfigError
from ..progress import SILENT, Progress
from ..trainer.run import Run
from .attributes import agreement_figures, main_values
from .bootstrap import RESAMPLES, Estimate
from .coherence import coherence
from .coherence import figures as coherence_figures
from .compare import OverSeeds, over_seeds
from .information import effective_numbers, pairs_of
from .overlap import FIRST, RANDOM, WORDS, OverlapResult, overlap
from .partitions import LABEL, TAG, WORD, Partition, Sides, choose_texts, partitions_of, read_sides
from .rationales import marked_rows
from .results import QUALITY_VERSION, plain, stored_result
from .tagging import Tagger

RESULT = "quality.json"
PER_CONCEPT = "concepts.parquet"


class QualityConfig(BaseModel):
    """Settings of a measurement."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: tuple[str, ...] = ()
    """Splits to evaluate; empty: the texts that the runs held out."""
    rationale: str | None = None
    """Kept field with the rationale of each text, where concepts are to be compared with people."""
    seed: int = 0
    """Baselines, pairs, ties, bootstrap and jackknife."""


@dataclass(frozen=True)
class QualityLine:
    """One run or baseline; figures by name, over the evaluated rows."""

    name: str
    method: str | None
    """`None` for a baseline."""
    seed: int | None
    concepts: int
    used: int
    """Concepts with an evaluated row."""
    figures: dict[str, Estimate]


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in their seed alone."""

    runs: list[str]
    figures: dict[str, OverSeeds]


@dataclass(frozen=True)
class QualityResult:
    """What was measured."""

    path: Path
    texts: int
    rows: int
    """Evaluated ordinary rows."""
    unseen_words: float
    """Share of them whose word no training row has: their word is the main one of no concept."""
    trained_texts: int
    """Evaluated texts that a run was trained on; should be 0."""
    sites: list[str]
    lines: list[QualityLine]
    seeds: list[SeedGroup]
    overlap: OverlapResult | None


def quality(
    cache: Cache,
    runs: Mapping[str, Path],
    out: Path,
    config: QualityConfig,
    *,
    tagger: Tagger | None = None,
    progress: Progress = SILENT,
    force: bool = False,
) -> QualityResult:
    """Measure concepts against words, parts of speech, labels, the vectors themselves and human rationales.

    Writes `quality.json` and `concepts.parquet` into `out`.

    Parameters
    ----------
    runs
        Name → folder of each run.
    tagger
        Of parts of speech, which are left out without it.

    Raises
    ------
    ConfigError
        Where the settings do not fit the cache or the runs.
    RunMismatch
        Where a run was trained on another cache.
    ResumeMismatch
        Where `out` holds results of other settings.
    """
    taken = {WORDS, FIRST, RANDOM}.intersection(runs)
    if taken:
        raise ConfigError(f"a run is called {min(taken)!r}, as a baseline is: rename its folder")
    loaded = {name: Run.from_pretrained(path) for name, path in runs.items()}
    for run in loaded.values():
        run.check_cache(cache)
    settings = {
        "version": QUALITY_VERSION,
        "cache_id": cache.id,
        # The first is compared with the others.
        "order": list(runs),
        "runs": {
            name: {
                "method": loaded[name].config.method,
                "seed": loaded[name].config.seed,
                "sha256": sha256_of(path / "model.safetensors"),
            }
            for name, path in runs.items()
        },
        "config": config.model_dump(mode="json"),
        "tagger": None if tagger is None else tagger.name,
    }
    with only_writer(out):
        before = stored_result(QualityResult, out / RESULT, settings, what="quality", beside=[PER_CONCEPT], force=force)
        if before is not None:
            return before
        chosen = choose_texts(cache, loaded, config.split)
        marked = None if config.rationale is None else marked_rows(cache, chosen, config.rationale)
        sides = read_sides(cache, loaded, chosen, tagger)
        of_runs, baselines = partitions_of(cache, loaded, sides, seed=config.seed, progress=progress)
        parts = [*of_runs, *baselines]
        people = None if marked is None else overlap(cache, chosen, sides, of_runs, *marked, seed=config.seed)
        configs = [run.config for run in loaded.values()]
        sites = list(dict.fromkeys([*(one.lower for one in configs), *(one.upper for one in configs)]))
        close = coherence(cache, sides, parts, sites, seed=config.seed, progress=progress)
        progress.begin("words, labels and tags", len(parts), "partition")
        lines = []
        for number, part in enumerate(parts):
            figures = agreement_figures(sides, part, seed=config.seed) | coherence_figures(close, number)
            lines.append(_line(part, loaded[part.name] if number < len(of_runs) else None, figures))
            progress.advance()
        result = QualityResult(
            path=out,
            texts=len(np.unique(sides.evaluated.text)),
            rows=len(sides.evaluated.place),
            unseen_words=_unseen(sides),
            trained_texts=sides.trained_texts,
            sites=sites,
            lines=lines,
            seeds=_seed_groups(loaded, lines),
            overlap=people,
        )
        _write(out, settings, result, sides, of_runs)
    return result


def _line(part: Partition, run: Run | None, figures: dict[str, Estimate]) -> QualityLine:
    return QualityLine(
        name=part.name,
        method=None if run is None else run.config.method,
        seed=None if run is None else run.config.seed,
        concepts=part.concepts,
        used=len(np.unique(part.evaluated)),
        figures=figures,
    )


def _unseen(sides: Sides) -> float:
    words = [rows.attributes[WORD] for rows in (sides.reference, sides.evaluated)]
    return float((~np.isin(words[1], words[0])).mean())


def _seed_groups(runs: Mapping[str, Run], lines: Sequence[QualityLine]) -> list[SeedGroup]:
    groups: dict[str, list[str]] = {}
    for name, run in runs.items():
        groups.setdefault(run.config.model_copy(update={"seed": 0}).model_dump_json(), []).append(name)
    found = {line.name: line.figures for line in lines}
    return [
        SeedGroup(
            names,
            {
                figure: over_seeds(np.array([found[name][figure].value for name in names]))
                for figure in found[names[0]]
                if np.isfinite([found[name][figure].value for name in names]).all()
            },
        )
        for names in groups.values()
        if len({runs[name].config.seed for name in names}) > 1
    ]


def _write(
    out: Path, settings: Mapping[str, Any], result: QualityResult, sides: Sides, parts: Sequence[Partition]
) -> None:
    tables = [_per_concept(sides, part) for part in parts]
    # The old result first: killed in between, it would stand beside the new concepts.
    (out / RESULT).unlink(missing_ok=True)
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables(tables), sink, compression="zstd")
    write_file(out / PER_CONCEPT, sink.getvalue())
    whole = {"settings": settings, "clvq": version("clvq"), "bootstrap_resamples": RESAMPLES, **plain(asdict(result))}
    del whole["path"]
    write_file(out / RESULT, to_json(whole))


def _per_concept(sides: Sides, part: Partition) -> pa.Table:
    """One row per concept: its rows on both sides, and of each attribute the main value and the share that has it."""
    counts = [np.bincount(codes, minlength=part.concepts) for codes in (part.reference, part.evaluated)]
    columns: dict[str, Any] = {
        "run": pa.array([part.name] * part.concepts, pa.string()),
        "concept": pa.array(range(part.concepts), pa.int32()),
        "training_rows": pa.array(counts[0], pa.int64()),
        "rows": pa.array(counts[1], pa.int64()),
    }
    for attribute in (WORD, LABEL, *([TAG] if TAG in sides.names else [])):
        main = main_values(sides.reference, part.reference, attribute, part.concepts)
        values = sides.evaluated.attributes[attribute]
        known = np.bincount(part.evaluated[values >= 0], minlength=part.concepts)
        hits = np.bincount(part.evaluated[(values >= 0) & (main[part.evaluated] == values)], minlength=part.concepts)
        shares = [hit / all_ if all_ else None for hit, all_ in zip(hits.tolist(), known.tolist(), strict=True)]
        names = [None if value < 0 else sides.names[attribute][value] for value in main.tolist()]
        columns[f"main_{attribute}"] = pa.array(names, pa.string())
        columns[f"{attribute}_purity"] = pa.array(shares, pa.float64())
    effective = effective_numbers(pairs_of(part.evaluated, sides.evaluated.attributes[WORD]), part.concepts)
    columns["effective_words"] = pa.array(effective, pa.float64(), from_pandas=True)
    return pa.table(columns)
