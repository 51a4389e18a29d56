"""Asking the model's own upper layers and head what a removal did."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from ..cache.reader import Cache
from ..errors import ModelError
from ..pipeline.language_model import LanguageModel
from ..progress import Progress
from ..trainer.run import Run
from .controls import CONTROLS, Control, Displacements, Subject, Taken, Vectors, subjects_of
from .outcome import NOTHING, Condition, Outcome
from .patched import CleanBatch, CleanTexts, Forwards, Key, Patched, Spots, spots_of
from .removal import Directions, Removal
from .rows import TextRows

# Another batch rounds otherwise; with fewer bits by more.
_SELF_CHECK = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Asked:
    """A run whose concepts are removed, and the concepts of each evaluated row."""

    name: str
    run: Run
    codes: list[Int64[np.ndarray, " _row"]]
    """One array per text."""
    active: list[Int64[np.ndarray, "_row k"]] | None = None
    """Latents active on each row, for the removal `subspace`; `None` where that is not done."""

    def concepts(self, removal: Removal) -> list[Int64[np.ndarray, "_row k"]]:
        """What a removal takes from each row; −1 where there are fewer than k."""
        if removal == "subspace" and self.active is not None:
            return self.active
        return [codes[:, None] for codes in self.codes]


@dataclass(frozen=True, kw_only=True)
class Removals:
    """What is to be removed from whom, and how strongly."""

    removals: Mapping[str, tuple[Removal, ...]]
    """Removals of each run, by its name; see `removals_of`."""
    controls: tuple[Control, ...] = CONTROLS
    strengths: tuple[float, ...] = (1.0,)
    curves: Literal["all", "own"] = "all"
    """Whose weaker removals are done too: of all subjects, or of all but controls."""
    seed: int = 0

    def strengths_of(self, subject: Subject) -> tuple[float, ...]:
        """How strongly a subject is removed; weakest first."""
        return self.strengths[-1:] if self.curves == "own" and subject in CONTROLS else self.strengths

    def conditions(self) -> Iterator[Condition]:
        """All conditions but `nothing`, in the order of the table."""
        for run, removals in self.removals.items():
            for removal in removals:
                for subject in subjects_of(removal, self.controls):
                    for strength in self.strengths_of(subject):
                        yield Condition(run, removal, subject, strength)


Changed = Mapping[str, Sequence[Int64[np.ndarray, " _changed"]]]
"""By run: numbers of the rows of each text that lose their concept."""


def taken_of(
    one: Asked,
    removal: Removal,
    changed: Sequence[Int64[np.ndarray, " _changed"]],
    texts: Sequence[TextRows],
    classes: Sequence[int | None],
    seed: int,
) -> Taken:
    """Which concepts one removal takes out of each text."""
    return Taken(
        one.concepts(removal),
        changed,
        np.flatnonzero(one.run.counts > 0),
        ids=[rows.text for rows in texts],
        classes=classes,
        seed=seed,
    )


def read_out_model(
    cache: Cache,
    model: LanguageModel,
    clean: CleanTexts,
    asked: Sequence[Asked],
    texts: Sequence[TextRows],
    changed: Changed,
    plan: Removals,
    *,
    site: str,
    forwards: Forwards,
    progress: Progress,
) -> tuple[Outcome, dict[Condition, Outcome], float]:
    """Run the model's blocks above the site with concepts removed at it.

    Returns
    -------
    clean, outcomes, deviation
        The model unchanged; each condition; the largest difference in probability between the two runs of the model
        with nothing removed.

    Raises
    ------
    ModelError
        Where the model with nothing removed answers otherwise than before.
    """
    labels = labels_of(cache, texts)
    known = [None if np.isnan(label) else int(label) for label in labels.tolist()]
    predictions = clean.probabilities.argmax(axis=1).tolist()
    classes = [predicted if label is None else label for label, predicted in zip(known, predictions, strict=True)]
    outcomes = {condition: Outcome.empty(len(texts)) for condition in (NOTHING, *plan.conditions())}
    unchanged = Outcome.empty(len(texts))
    everything = np.arange(len(texts))
    unchanged.note(everything, clean.probabilities, clean.probabilities, labels, np.zeros(len(texts)))
    by_name = {one.name: one for one in asked}
    made = {
        (name, removal): (
            Directions(by_name[name].run, removal, device=model.device),
            taken_of(by_name[name], removal, changed[name], texts, classes, plan.seed),
        )
        for name, removals in plan.removals.items()
        for removal in removals
    }
    deviation = 0.0
    progress.begin("ablate", len(texts), "texts")
    for batch in clean.batches:
        progress.check()
        numbers = np.array(batch.numbers)
        before = clean.probabilities[numbers]
        patched = Patched(model, site, batch, before, forwards)
        tickets = patched.ask_unchanged()
        notes: list[
            tuple[Condition, Int64[np.ndarray, " segment"], list[Key | None], Float64[np.ndarray, " segment"]]
        ] = []
        rows = _RowsOfBatch(patched, batch, texts, changed, plan.seed)
        for (name, removal), (directions, taken) in made.items():
            spots, vectors = rows.of(name)
            concepts = partial(_concepts, taken, batch.numbers, spots, model.device)
            displacements = Displacements(directions, vectors, directions.centre, concepts)
            for subject in subjects_of(removal, plan.controls):
                progress.check()
                delta = displacements.of(subject)
                there = [taken.takes_part(subject, number) for number in batch.numbers]
                part = np.flatnonzero(there)
                share = _shares(vectors.hidden, delta, spots)
                for strength in plan.strengths_of(subject):
                    asked_for = patched.ask(spots, delta, strength)
                    notes.append((Condition(name, removal, subject, strength), part, asked_for, strength * share))
        after = patched.answers(tickets, np.arange(len(numbers)))
        outcomes[NOTHING].note(numbers, before, after, labels[numbers], np.zeros(len(numbers)))
        deviation = max(deviation, float(np.abs(after - before).max()))
        _check(model, batch, deviation)
        for condition, part, asked_for, share in notes:
            found = patched.answers(asked_for, np.arange(len(numbers)))
            whom = numbers[part]
            outcomes[condition].note(whom, before[part], found[part], labels[whom], share[part])
        progress.advance(len(numbers))
    return unchanged, outcomes, deviation


def labels_of(cache: Cache, texts: Sequence[TextRows]) -> Float64[np.ndarray, " text"]:
    """The label of each text; NaN where it has none."""
    column = cache.texts["label"]
    found = [column[rows.text].as_py() for rows in texts]
    return np.array([np.nan if label is None else label for label in found], dtype=np.float64)


def _check(model: LanguageModel, batch: CleanBatch, deviation: float) -> None:
    allowed = _SELF_CHECK.get(batch.dtype, _SELF_CHECK[torch.float32])
    if not deviation <= allowed:
        raise ModelError(
            f"{model.source.name} answers otherwise when it is run again from the site with nothing removed: "
            f"probabilities differ by {deviation:.2g}, expected at most {allowed:g}; its figures would mean nothing"
        )


def _concepts(
    taken: Taken, numbers: Sequence[int], spots: Spots, device: torch.device, subject: Subject
) -> Int64[Tensor, "row k"]:
    return torch.from_numpy(taken.filled(subject, numbers)[spots.row]).to(device)


class _RowsOfBatch:
    """Positions and states that change in a batch; runs that change the same rows share them."""

    def __init__(
        self, patched: Patched, batch: CleanBatch, texts: Sequence[TextRows], changed: Changed, seed: int
    ) -> None:
        self._patched, self._batch, self._texts, self._changed, self._seed = patched, batch, texts, changed, seed
        self._made: dict[bytes, tuple[Spots, Vectors]] = {}

    def of(self, run: str) -> tuple[Spots, Vectors]:
        numbers = self._batch.numbers
        spots = spots_of(
            [self._texts[number] for number in numbers], [self._changed[run][number] for number in numbers]
        )
        key = spots.bounds.tobytes() + spots.position.tobytes()
        if key not in self._made:
            ids = [self._texts[number].text for number in numbers]
            hidden = spots.vectors(self._patched.hidden)
            self._made[key] = (spots, Vectors.drawn(hidden, ids, np.diff(spots.bounds).tolist(), seed=self._seed))
        return spots, self._made[key][1]


def _shares(
    hidden: Float32[Tensor, "row d"], delta: Float32[Tensor, "row d"], spots: Spots
) -> Float64[np.ndarray, " segment"]:
    """‖Δ‖ / ‖h‖ over the positions of each segment; 0 where there are none."""
    squares = torch.stack([hidden.double().square().sum(dim=1), delta.double().square().sum(dim=1)])
    owner = np.repeat(np.arange(len(spots.place)), np.diff(spots.bounds))
    whole, gone = (np.bincount(owner, row, minlength=len(spots.place)) for row in squares.cpu().numpy())
    share: Float64[np.ndarray, " segment"] = np.sqrt(np.divide(gone, whole, out=np.zeros_like(whole), where=whole > 0))
    return share
