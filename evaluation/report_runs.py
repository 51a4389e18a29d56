"""Caches and runs of a folder: what there is, how training went, and means over seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..cache.files import sha256_of
from ..cache.layout import FORMAT, MANIFEST
from ..errors import DataError, RunNotFound
from ..trainer.config import TrainConfig
from ..trainer.folder import CONFIG, METRICS, MODEL, REPORT, RunConfig, read_config
from .compare import over_seeds
from .report_document import Cell, Measured, Number, Table, cell, listed, say, shown
from .report_files import Node, name_of, read_json, read_lines

FALLING = 0.005
"""A loss is still falling where the last epoch lowered it by more than this share."""

_FORMS = {
    "epochs": ",", "train_seconds": ",.1f", "own_code_fvu": ".4f", "decoder_fvu_codes_only": ".4f", "sae_fvu": ".4f",
    "l0": ".1f", "dead_latents_share": ".4f", "dead_codes": ",", "codes": ",", "perplexity": ".1f", "used_codes": ",",
}  # fmt: skip
_DEAD, _DECODER = "dead share", "decoder or SAE FVU"
_SEED_COLUMNS = {
    "own-code FVU": ".4f", _DECODER: ".4f", _DEAD: ".4f", "perplexity": ".1f", "used codes": ".1f", "seconds": ",.1f",
}  # fmt: skip


@dataclass(frozen=True)
class FoundCache:
    """A cache that lies in the folder."""

    name: str
    id: str
    manifest: Node

    @property
    def class_names(self) -> list[str] | None:
        """Names of the labels, where there are any."""
        names = self.manifest.find("class_names")
        return None if names is None else [shown(name.text()) for name in names.each()]


@dataclass(frozen=True)
class FoundRun:
    """A finished run."""

    name: str
    sha256: str
    description: RunConfig
    config: Node
    """Of the whole `config.json`."""
    figures: Mapping[str, Number]
    """By their names in `report.json`."""
    stop_reason: str | None
    metrics: tuple[Node, ...]

    @property
    def id(self) -> str:
        """The first twelve hexadecimal digits of the model's SHA-256."""
        return self.sha256[:12]

    @property
    def preset(self) -> str | None:
        """Of CLVQ-VAE and VQ-VAE."""
        config = self.description.config
        return config.preset if isinstance(config, TrainConfig) else None

    @property
    def dead_share(self) -> Number | None:
        """Share of the concepts without a training row; of latents those long unused."""
        own = self.figures.get("dead_latents_share")
        dead, codes = self.figures.get("dead_codes"), self.figures.get("codes")
        if own is not None or dead is None or codes is None or not codes.value:
            return own
        return computed(dead.value / codes.value, ".4f", "dead codes / codes", dead, codes)

    @property
    def decoder_fvu(self) -> Number | None:
        """What all codes or latents of a text, or of a row, leave unexplained."""
        return self.figures.get("decoder_fvu_codes_only", self.figures.get("sae_fvu"))

    def of_seeds(self, column: str) -> Number | None:
        """The figure that is averaged over seeds in a column."""
        special: dict[str, Number | None] = {_DEAD: self.dead_share, _DECODER: self.decoder_fvu}
        names = {"own-code FVU": "own_code_fvu", "seconds": "train_seconds", "used codes": "used_codes"}
        return special[column] if column in special else self.figures.get(names.get(column, column))


def computed(value: int | float, form: str, rule: str, *numbers: Number) -> Number:
    """A number that follows from others."""
    sources = tuple(dict.fromkeys(source for number in numbers for source in number.sources))
    return Number(value, format(value, form), sources, rule)


def read_cache(root: Path, folder: Path, *, digests: dict[str, str]) -> FoundCache:
    """The cache in a folder.

    Raises
    ------
    DataError
        Where its manifest is damaged or another program's.
    """
    manifest = read_json(root, folder / MANIFEST, digests=digests)
    if manifest.at("format").value != FORMAT:
        raise DataError(f"it is no manifest of a cache: its format is {manifest.at('format').value!r}")
    found = FoundCache(name_of(root, folder), digests[manifest.source.file], manifest)
    _ = _cache_cells(found), found.class_names
    return found


def cache_table(caches: Sequence[FoundCache], used: Mapping[str, str]) -> Table:
    """Caches in the folder, and those that results name though they lie elsewhere.

    Parameters
    ----------
    used
        Ids that results name, with the model's name where they say it.
    """
    rows = [_cache_cells(cache) for cache in caches]
    here = {cache.id for cache in caches}
    for other, name in sorted(used.items()):
        if other not in here:
            rows.append((cell(shown(other[:12])), cell("not in the folder"), cell(shown(name)), *[cell(None)] * 4))
    columns = ("cache", "folder", "model", "data", "sites", "texts", "rows")
    return Table("Caches", columns, tuple(rows))


def _cache_cells(cache: FoundCache) -> tuple[Cell, ...]:
    manifest, model = cache.manifest, cache.manifest.at("identity", "model")
    splits: list[Number | str] = []
    for name, split in manifest.at("splits").members().items():
        splits += [", " if splits else "", f"{shown(name)} ", split.at("texts").number(",")]
    return (
        cell(cache.id[:12]),
        cell(shown(cache.name)),
        cell(_named(model)),
        cell(_data(manifest.at("identity").find("data"))),
        cell(listed(shown(site) for site in manifest.at("sites").members())),
        say(manifest.at("geometry", "texts").number(","), " (", *splits, ")") if splits else cell(None),
        cell(manifest.at("geometry", "rows").number(",")),
    )


def _data(data: Node | None) -> str:
    """A data set by its name and commit, or by the hashes of its files."""
    if data is None:
        return ""
    files = data.find("files")
    if data.find("name") is not None:
        return _named(data)
    if files is None:
        return ""
    return listed(f"{shown(split)} {digest.text()[:8]}" for split, digest in files.members().items())


def _named(node: Node) -> str:
    commit = node.find("commit")
    return shown(node.at("name").text() + ("" if commit is None else f" @ {commit.text()[:12]}"))


def read_run(root: Path, folder: Path, *, digests: dict[str, str]) -> FoundRun:
    """The finished run in a folder.

    Raises
    ------
    DataError, FormatVersion
        Where a file is damaged or of another version.
    RunNotFound
        Where the run is not finished.
    """
    for part in (CONFIG, REPORT, MODEL):
        if (folder / part).is_symlink():
            raise DataError(f"{part} is a symbolic link, which is not followed")
        if not (folder / part).is_file():
            raise RunNotFound(f"it has no {part}: it is unfinished or damaged")
    config, report = (read_json(root, folder / name, digests=digests) for name in (CONFIG, REPORT))
    description = read_config(folder)
    sha256 = sha256_of(folder / MODEL)
    digests[name_of(root, folder / MODEL)] = sha256
    found = {name: number for name, form in _FORMS.items() if (number := report.maybe(name, form)) is not None}
    reason = report.find("stop_reason")
    run = FoundRun(
        name=name_of(root, folder),
        sha256=sha256,
        description=description,
        config=config,
        figures=found,
        stop_reason=None if reason is None else reason.text(),
        metrics=tuple(read_lines(root, folder / METRICS, digests=digests)),
    )
    _ = falling(run)
    return run


def falling(run: FoundRun) -> Cell:
    """Whether the held-out loss was still falling at the end of each phase of training."""
    phases: dict[str, list[Number]] = {}
    for line in run.metrics:
        phase, loss = line.find("phase"), line.maybe("held_out_loss_total", ".4f")
        if loss is not None:
            phases.setdefault("train" if phase is None else phase.text(), []).append(loss)
    said: list[str | Number] = []
    for name, losses in phases.items():
        if len(losses) > 1 and losses[-2].value > 0:
            share = 1 - losses[-1].value / losses[-2].value
            said += ["; " if said else "", "" if len(phases) == 1 else f"{shown(name)} "]
            said += ["yes (" if share > FALLING else "no (", _fall(share, losses[-2:]), ")"]
    return Cell(tuple(said)) if said else cell(None)


def _fall(share: float, losses: Sequence[Number]) -> Number:
    return computed(-share, "+.1%", "last epoch's held-out loss / that of the epoch before − 1", *losses)


def run_tables(runs: Sequence[FoundRun]) -> list[Table]:
    """A table for each cache and pair of sites."""
    tables = []
    for (cache_id, lower, upper), members in _grouped(runs, _place).items():
        columns = (
            "run", "run id", "method", "preset", "codes", "seed", "epochs", "seconds", "stopped", "own-code FVU",
            _DECODER, "L0", _DEAD, "perplexity", "used codes", "loss still falling",
        )  # fmt: skip
        rows = tuple(_run_cells(run) for run in members)
        tables.append(Table(f"Runs on cache {cache_id[:12]}, {shown(lower)} → {shown(upper)}", columns, rows))
    return tables


def _place(run: FoundRun) -> tuple[str, str, str]:
    config = run.description.config
    return run.description.cache_id, config.lower, config.upper


def _grouped(
    runs: Sequence[FoundRun], by: Callable[[FoundRun], tuple[str, ...]]
) -> dict[tuple[str, ...], list[FoundRun]]:
    groups: dict[tuple[str, ...], list[FoundRun]] = {}
    for run in runs:
        groups.setdefault(by(run), []).append(run)
    return groups


def _run_cells(run: FoundRun) -> tuple[Cell, ...]:
    found = run.figures
    return (
        cell(shown(run.name)),
        cell(run.id),
        cell(run.description.config.method),
        cell(run.preset),
        cell(found.get("codes")),
        cell(run.config.at("config", "seed").number("d")),
        cell(found.get("epochs")),
        cell(found.get("train_seconds")),
        cell(None if run.stop_reason is None else shown(run.stop_reason)),
        cell(found.get("own_code_fvu")),
        cell(run.decoder_fvu),
        cell(found.get("l0")),
        cell(run.dead_share),
        cell(found.get("perplexity")),
        cell(found.get("used_codes")),
        falling(run),
    )


def seed_table(runs: Sequence[FoundRun]) -> Table | None:
    """Means over runs that differ in their seed alone; `None` where there are none."""
    rows = []
    for members in _grouped(runs, _settings).values():
        # A copy of a run is no further seed.
        different = list({run.description.config.seed: run for run in reversed(members)}.values())[::-1]
        if len(different) < 2:
            continue
        config = different[0].description.config
        names = listed(shown(run.name) for run in different)
        figures = [_over([run.of_seeds(column) for run in different], form) for column, form in _SEED_COLUMNS.items()]
        codes = cell(different[0].figures.get("codes"))
        seeds = [run.config.at("config", "seed").number("d") for run in different]
        count = cell(computed(len(seeds), "d", "count", *seeds))
        rows.append((cell(names), cell(config.method), cell(different[0].preset), codes, count, *figures))
    if not rows:
        return None
    columns = ("runs", "method", "preset", "codes", "seeds", *_SEED_COLUMNS)
    return Table("Means over seeds, with 95 % intervals by Student's t", columns, tuple(rows))


def _settings(run: FoundRun) -> tuple[str, ...]:
    plain = run.description.config.model_copy(update={"seed": 0})
    return run.description.cache_id, plain.model_dump_json()


def _over(numbers: Sequence[Number | None], form: str) -> Cell:
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        return cell(None)
    found = over_seeds(np.array([number.value for number in known], dtype=np.float64))
    if found.low is None or found.high is None or not math.isfinite(found.low):
        return cell(None)
    of = f" of {known[0].rule}" if known[0].rule else ""
    return cell(
        Measured(
            computed(found.mean, form, f"mean over seeds{of}", *known),
            computed(found.low, form, f"lower end of Student's 95 % interval over seeds{of}", *known),
            computed(found.high, form, f"upper end of Student's 95 % interval over seeds{of}", *known),
        )
    )
