"""What the removal of concepts did to predictions, as `clvq ablate` wrote it down."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache.files import sha256_of
from ..errors import DataError, DataNotFound, FormatVersion
from ..evaluation.ablation_folder import RESULT
from ..evaluation.report_files import Node, read_json
from ..evaluation.results import ABLATION_VERSION


@dataclass(frozen=True)
class Effect:
    """What became of texts when one concept was removed from them."""

    texts: int
    lost: float
    """Mean probability lost by the class that was predicted before."""
    low: float | None
    high: float | None
    """Ends of its 95 % interval; `None` where too few texts have the concept, or intervals were not asked for."""
    flipped: float
    """Share of texts with another prediction afterwards."""
    by_class: list[float] | None
    """Mean change of each class's probability."""
    removal: str | None

    def told(self) -> dict[str, Any]:
        """As the site's data has it."""
        return {
            "texts": self.texts,
            "lost": [self.lost, self.low, self.high],
            "flipped": self.flipped,
            "by_class": self.by_class,
            "removal": self.removal,
        }


@dataclass(frozen=True)
class Effects:
    """What an ablation says of runs."""

    sha256: str
    """Of its result file."""
    by_run: Mapping[str, Mapping[int, Effect]]
    """Name of the run → concept → effect; empty for a run that the ablation says nothing of."""


def read_effects(folder: Path, runs: Mapping[str, str]) -> Effects:
    """The effects of the runs' concepts, as far as the ablation measured them.

    Parameters
    ----------
    runs
        Name → SHA-256 of the run's weights. A run goes by its weights, whatever the ablation calls it.

    Raises
    ------
    DataNotFound
        Where the folder holds no ablation.
    DataError
        Where its file is damaged.
    FormatVersion
    """
    file = folder / RESULT
    if not file.is_file():
        raise DataNotFound(f"{folder} holds no {RESULT}: give the folder that `clvq ablate --out` wrote")
    try:
        found = read_json(folder, file, digests={})
        settings = found.at("settings")
        if settings.at("version").value != ABLATION_VERSION:
            raise FormatVersion(
                f"{file} has version {settings.at('version').value!r}, and this clvq reads {ABLATION_VERSION}: "
                "run `clvq ablate` again"
            )
        measured = {name: weights.text() for name, weights in settings.at("runs").members().items()}
        removals = [one.text() for one in settings.at("config", "removals").each() if one.text() != "mean"]
        by_name: dict[str, dict[int, Effect]] = {}
        for line in found.at("concepts").each():
            effect = _effect(line, removals[-1] if removals else None)
            by_name.setdefault(line.at("run").text(), {})[line.at("concept").count()] = effect
    except DataError as error:
        raise DataError(f"{file} is damaged: {error}; run `clvq ablate` again") from error
    return Effects(sha256_of(file), {name: by_name.get(_called(name, runs[name], measured), {}) for name in runs})


def _called(run: str, weights: str, measured: Mapping[str, str]) -> str:
    """What the ablation calls a run: of several with its weights, the one of its name."""
    same = [name for name, others in measured.items() if others == weights]
    return run if run in same else next(iter(same), "")


def _effect(line: Node, removal: str | None) -> Effect:
    lost = line.find("lost")
    ends = [
        None if lost is None or (end := lost.find(name)) is None else float(end.number("g").value)
        for name in ("low", "high")
    ]
    changes, removed = line.find("class_changes"), line.find("removal")
    return Effect(
        texts=line.at("texts").count(),
        lost=float(line.at("probability_lost").number("g").value),
        low=ends[0],
        high=ends[1],
        flipped=float(line.at("flipped").number("g").value),
        by_class=None if changes is None else [float(one.number("g").value) for one in changes.each()],
        removal=removal if removed is None else removed.text(),
    )
