"""Write the explorer's site: pages that open from a folder, and their data in scripts that load when they are needed.

Held at once are a few numbers for each row, the directions of one run, and one file's worth of text: a million rows in
thousands of concepts take no more than that.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from ..cache.files import only_writer, sha256_of
from ..cache.reader import Cache
from ..progress import SILENT, Progress
from ..trainer.folder import MODEL
from ..trainer.run import Run
from .describe import CANDIDATES, Concepts, concepts_of, details, overview
from .effects import Effect, read_effects
from .flow import Assigned, flows
from .folder import Site, Writer, take_over
from .health import health
from .members import Members, read_members
from .rows import Rows, read_rows
from .settings import ExploreConfig as ExploreConfig
from .texts import check_rationale, choose_texts, facts_of, listed, told

VERSION = 1
CONCEPTS_PER_FILE = 25
TEXTS_PER_FILE = 50


@dataclass(frozen=True)
class RunShown:
    """A run on the site."""

    id: str
    name: str
    concepts: int
    """With training rows: these are shown."""
    effects: int
    """Of these, how many the ablation measured."""


@dataclass(frozen=True)
class ExploreResult:
    """What was built."""

    path: Path
    runs: list[RunShown]
    texts: int
    """That can be opened."""
    texts_in_cache: int
    files: int
    bytes: int
    unchanged: bool
    """Whether the same site stood there before."""


def explore(
    cache: Cache,
    runs: Mapping[str, Path],
    out: Path,
    config: ExploreConfig,
    *,
    ablation: Path | None = None,
    progress: Progress = SILENT,
    force: bool = False,
) -> ExploreResult:
    """Build the site in `out`. Equal settings give equal bytes.

    Where the same site stands there already, its data is left as it is.

    Parameters
    ----------
    runs
        Name → folder of each run; the first is what is seen first. They may have different sites.
    ablation
        A folder that `clvq ablate` wrote; what it says of these runs' concepts is shown.

    Raises
    ------
    ConfigError
        Where the cache was shared without its texts, lacks the rationale's field, or `out` holds something else.
    RunMismatch
        Where a run was trained on another cache.
    ResumeMismatch
        Where `out` holds a site of other settings.
    RunNotFound, DataNotFound, DataError, FormatVersion, CacheCorrupt, FolderInUse, DiskFull
    """
    loaded = {name: Run.from_pretrained(path) for name, path in runs.items()}
    for run in loaded.values():
        run.check_cache(cache)
    check_rationale(cache, config.rationale)
    weights = {name: sha256_of(path / MODEL) for name, path in runs.items()}
    effects = None if ablation is None else read_effects(ablation, weights)
    settings = {
        "version": VERSION,
        "cache_id": cache.id,
        "runs": [[name, weights[name]] for name in runs],
        "ablation": None if effects is None else effects.sha256,
        "config": config.model_dump(mode="json"),
    }
    by_run: Mapping[str, Mapping[int, Effect]] = {name: {} for name in runs} if effects is None else effects.by_run
    with only_writer(out):
        writer = take_over(out, settings, force=force)
        if writer is None:
            return _result(out, loaded, by_run, len(cache.texts), unchanged=True)
        building = _Building(cache, loaded, runs, by_run, config, writer, progress)
        writer.finish(building.run())
    return _result(out, loaded, by_run, len(cache.texts), unchanged=False)


class _Building:
    """The site on its way."""

    def __init__(
        self,
        cache: Cache,
        runs: Mapping[str, Run],
        paths: Mapping[str, Path],
        effects: Mapping[str, Mapping[int, Effect]],
        config: ExploreConfig,
        writer: Writer,
        progress: Progress,
    ) -> None:
        self._cache, self._runs, self._paths, self._effects = cache, runs, paths, effects
        self._config, self._writer, self._progress = config, writer, progress
        self._facts, self._classes, self._probabilities = facts_of(cache)

    def run(self) -> list[int]:
        """Write all data; gives the ids of the texts that can be opened, in the order of their numbers."""
        cache, config, progress = self._cache, self._config, self._progress
        rows = read_rows(cache, progress=progress)
        members: dict[str, Members] = {}
        concepts: dict[str, Concepts] = {}
        for name, run in self._runs.items():
            members[name] = read_members(
                cache, run, rows, self._facts.labels,
                classes=self._facts.classes, kept=CANDIDATES * config.sentences, seed=config.seed, progress=progress,
            )  # fmt: skip
            concepts[name] = concepts_of(
                run, rows, members[name], self._facts, words=config.words, sentences=config.sentences
            )
        chosen = choose_texts(rows, self._held_out(), list(concepts.values()), most=config.max_texts, seed=config.seed)
        numbers = {text: number for number, text in enumerate(chosen.tolist())}
        for place, (name, run) in enumerate(self._runs.items()):
            self._write_run(f"r{place}", name, run, rows, members[name], concepts[name], numbers)
        ids = {name: f"r{place}" for place, name in enumerate(self._runs)}
        self._write_texts(rows, chosen, {ids[name]: found.codes for name, found in members.items()})
        assigned = [Assigned(ids[name], self._runs[name].config.lower, members[name].codes) for name in self._runs]
        flow = flows(assigned, by_depth(one.lower for one in assigned))
        self._writer.write("flow", flow)
        self._writer.write("site", self._site(len(chosen), concepts, flow=bool(flow)))
        return [int(one) for one in np.asarray(cache.texts["text_id"])[chosen]]

    def _held_out(self) -> Bool[np.ndarray, " text"]:
        held_out = [run.held_out_texts for run in self._runs.values()]
        return np.isin(np.asarray(self._cache.texts["text_id"]), np.concatenate(held_out))

    def _write_run(
        self, id: str, name: str, run: Run, rows: Rows, members: Members, concepts: Concepts, numbers: Mapping[int, int]
    ) -> None:
        effects = self._effects[name]
        self._progress.begin(f"concepts of {name}", len(concepts.code), "concepts")
        self._writer.write(f"{id}/overview", overview(run, members, concepts, effects, seed=self._config.seed))
        told_of = details(self._cache, run, rows, members, concepts, effects, self._facts, numbers)
        codes = concepts.code.tolist()
        for start in range(0, len(codes), CONCEPTS_PER_FILE):
            part = codes[start : start + CONCEPTS_PER_FILE]
            self._writer.write(
                f"{id}/concepts/{start // CONCEPTS_PER_FILE:02d}", {str(code): next(told_of) for code in part}
            )
            self._progress.advance(len(part))

    def _write_texts(self, rows: Rows, chosen: Any, codes: Mapping[str, Any]) -> None:
        self._progress.begin("texts", len(chosen), "texts")
        self._writer.write("texts/list", listed(self._cache, chosen, self._facts))
        texts = told(
            self._cache, rows, chosen, codes, self._facts, self._probabilities, rationale=self._config.rationale
        )
        for number, part in enumerate(portions(texts, TEXTS_PER_FILE)):
            self._writer.write(f"texts/{number:03d}", part)
            self._progress.advance(len(part))

    def _site(self, texts: int, concepts: Mapping[str, Concepts], *, flow: bool) -> dict[str, Any]:
        identity: Any = self._cache.manifest.identity
        model = str(identity["model"]["name"])
        return {
            "title": self._config.title or f"Concepts of {model}",
            "made": {
                "clvq": version("clvq"),
                "cache": self._cache.id,
                "model": model,
                "lowers": by_depth(run.config.lower for run in self._runs.values()),
            },
            "classes": self._classes,
            "texts": {
                "count": texts,
                "per_shard": TEXTS_PER_FILE,
                "rationale": self._config.rationale is not None,
                "saliency": self._cache.manifest.saliency,
                "predictions": self._cache.manifest.predictions,
            },
            "live": False,
            "flow": flow,
            "runs": [
                {
                    "id": f"r{place}",
                    "name": name,
                    "method": run.config.method,
                    "lower": run.config.lower,
                    "upper": run.config.upper,
                    "seed": run.config.seed,
                    "codes": run.concepts,
                    "per_shard": CONCEPTS_PER_FILE,
                    "effects": bool(self._effects[name]),
                    "health": health(run, self._paths[name]),
                }
                for place, (name, run) in enumerate(self._runs.items())
            ],
        }


def by_depth(sites: Iterable[str]) -> list[str]:
    """Different sites from low to high."""

    def depth(site: str) -> tuple[int, str]:
        number = site.rpartition(".")[2]
        return int(number) if number.isdecimal() else 0, site

    return sorted(set(sites), key=depth)


def portions(values: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """So many at a time."""
    part: list[Any] = []
    for value in values:
        part.append(value)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _result(
    out: Path,
    runs: Mapping[str, Run],
    effects: Mapping[str, Mapping[int, Effect]],
    texts_in_cache: int,
    *,
    unchanged: bool,
) -> ExploreResult:
    site = Site.read(out)
    files = site.files()
    shown = [
        RunShown(
            id=f"r{place}",
            name=name,
            concepts=int((run.counts > 0).sum()),
            effects=sum(bool(run.counts[code]) for code in effects[name] if code < run.concepts),
        )
        for place, (name, run) in enumerate(runs.items())
    ]
    return ExploreResult(
        path=out,
        runs=shown,
        texts=len(site.text_ids),
        texts_in_cache=texts_in_cache,
        files=len(files),
        bytes=sum((out / name).stat().st_size for name in files),
        unchanged=unchanged,
    )
