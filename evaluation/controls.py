"""What is removed from a text: the concept of its own rows, or one of the controls.

Everything drawn at random depends on the seed and the text alone, not on the batch it stands in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from ..errors import ConfigError
from .removal import Directions, along, match

Control = Literal[
    "random code", "matched code", "matched random", "same label", "other label", "mean direction", "gaussian"
]
CONTROLS: tuple[Control, ...] = (
    "random code", "matched code", "matched random", "same label", "other label", "mean direction", "gaussian"
)  # fmt: skip
Subject = Literal[
    "nothing", "whole row", "own code",
    "random code", "matched code", "matched random", "same label", "other label", "mean direction", "gaussian",
]  # fmt: skip
"""`whole row` is what the removal `mean` removes; it knows no concepts and no controls."""
OWN: Subject = "own code"
MATCHED: Subject = "matched code"
PARTNERED: tuple[Subject, ...] = ("same label", "other label")
"""Controls that need another text, which not every text has."""

# Streams of random numbers of one text.
_ACROSS, _OTHER_CODE, _SAME, _OTHER_LABEL, _GAUSSIAN = 2, 3, 4, 5, 6


class Taken:
    """Which concepts each subject takes out of each text's changed rows.

    Parameters
    ----------
    concepts
        Concepts of all rows of each text, −1 where there are fewer than k.
    changed
        Numbers of each text's changed rows.
    alive
        Concepts in use.
    ids
        What tells each text from others, whichever are evaluated.
    classes
        Label of each text, or its prediction; `None` where neither is known.
    """

    def __init__(
        self,
        concepts: Sequence[Int64[np.ndarray, "_row k"]],
        changed: Sequence[Int64[np.ndarray, " _changed"]],
        alive: Int64[np.ndarray, " alive"],
        *,
        ids: Sequence[int],
        classes: Sequence[int | None],
        seed: int,
    ) -> None:
        self._concepts, self._changed, self._alive = concepts, changed, alive
        self._ids, self._seed = ids, seed
        self.partners = partners(ids, [len(rows) > 0 for rows in changed], classes, seed=seed)

    def take(self, subject: Subject, number: int) -> Int64[np.ndarray, "changed k"] | None:
        """The concepts to remove from a text's changed rows; `None` where the text has no partner."""
        own: Int64[np.ndarray, "changed k"] = self._concepts[number][self._changed[number]]
        if subject == "random code":
            return self._others(own, number)
        if subject in PARTNERED:
            partner = self.partners[subject][number]
            if partner is None:
                return None
            theirs = self._concepts[partner][self._changed[partner]]
            own = theirs[np.arange(len(own)) % len(theirs)]
        return own

    def filled(self, subject: Subject, numbers: Sequence[int]) -> Int64[np.ndarray, "changed k"]:
        """The concepts of several texts' rows, one text after the other; −1 where a text has no partner."""
        parts = []
        for number in numbers:
            found = self.take(subject, number)
            own = self._concepts[number][self._changed[number]]
            parts.append(np.full_like(own, -1) if found is None else found)
        return np.concatenate(parts)

    def takes_part(self, subject: Subject, number: int) -> bool:
        """Whether the text has a row to change and, where it needs one, a partner."""
        found = self.partners.get(subject)
        return len(self._changed[number]) > 0 and (found is None or found[number] is not None)

    def _others(self, own: Int64[np.ndarray, "changed k"], number: int) -> Int64[np.ndarray, "changed k"]:
        """As many other concepts in use for each row: the same ones for equal rows of a text."""
        generator = np.random.default_rng([self._seed, _OTHER_CODE, self._ids[number]])
        if own.shape[1] == 1:
            return other_codes(own[:, 0], self._alive, int(generator.integers(1 << 30)))[:, None]
        width = own.shape[1]
        candidates = generator.permutation(self._alive)[: 2 * width]
        taken = (candidates[None, :, None] == own[:, None, :]).any(axis=2)
        order = np.argsort(taken, axis=1, kind="stable")[:, :width]
        chosen = np.full_like(own, -1)
        chosen[:, : order.shape[1]] = np.where(np.take_along_axis(taken, order, axis=1), -1, candidates[order])
        # Own concepts fill each row from the left.
        return np.where(own >= 0, chosen, -1)


def other_codes(
    codes: Int64[np.ndarray, " row"], alive: Int64[np.ndarray, " alive"], shift: int
) -> Int64[np.ndarray, " row"]:
    """Another code in use for each code: `shift` places further among them, never the code itself.

    Raises
    ------
    ConfigError
        Where fewer than two codes are in use.
    """
    if len(alive) < 2:
        raise ConfigError("the run has fewer than two concepts in use: there is no other code to compare with")
    place = np.searchsorted(alive, codes)
    known = alive[np.minimum(place, len(alive) - 1)] == codes
    # From a code that is not in use every code is another one.
    steps = np.where(known, 1 + shift % (len(alive) - 1), shift % len(alive))
    others: Int64[np.ndarray, " row"] = alive[(np.where(known, place, 0) + steps) % len(alive)]
    return others


def partners(
    ids: Sequence[int], takes_part: Sequence[bool], classes: Sequence[int | None], *, seed: int
) -> dict[Subject, list[int | None]]:
    """Another text for each text, within its class and in another class; `None` where there is none."""
    there = [
        number for number, (part, kind) in enumerate(zip(takes_part, classes, strict=True)) if part and kind is not None
    ]
    kinds = np.array([classes[number] for number in there], dtype=np.int64)
    numbers = np.array(there, dtype=np.int64)
    order = np.argsort(np.array([ids[number] for number in there], dtype=np.int64), kind="stable")
    kinds, numbers = kinds[order], numbers[order]
    found: dict[Subject, list[int | None]] = {subject: [None] * len(ids) for subject in PARTNERED}
    for kind in np.unique(kinds).tolist():
        mine, others = numbers[kinds == kind], numbers[kinds != kind]
        for place, number in enumerate(mine.tolist()):
            if len(mine) > 1:
                step = 1 + _drawn(seed, _SAME, ids[number]) % (len(mine) - 1)
                found["same label"][number] = int(mine[(place + step) % len(mine)])
            if len(others):
                found["other label"][number] = int(others[_drawn(seed, _OTHER_LABEL, ids[number]) % len(others)])
    return found


def _drawn(seed: int, stream: int, text: int) -> int:
    return int(np.random.default_rng([seed, stream, text]).integers(1 << 30))


@dataclass(frozen=True)
class Vectors:
    """Rows about to be changed, those of a text together, and the random directions of their controls."""

    hidden: Float32[Tensor, "row d"]
    across: Float32[Tensor, "row d"]
    """Standard normal values for `matched random`."""
    gaussian: Float32[Tensor, "row d"]
    """Standard normal values for `gaussian`."""

    @classmethod
    def drawn(
        cls, hidden: Float32[Tensor, "row d"], ids: Sequence[int], counts: Sequence[int], *, seed: int
    ) -> "Vectors":
        """With random directions for texts `ids` that have so many rows each."""
        normal = {}
        for stream in (_ACROSS, _GAUSSIAN):
            parts = [np.zeros((0, hidden.shape[1]), dtype=np.float32)]
            for text, count in zip(ids, counts, strict=True):
                generator = np.random.default_rng([seed, stream, text])
                parts.append(generator.standard_normal((count, hidden.shape[1]), dtype=np.float32))
            normal[stream] = torch.from_numpy(np.concatenate(parts)).to(hidden.device)
        return cls(hidden, normal[_ACROSS], normal[_GAUSSIAN])


class Displacements:
    """Δ of one removal for every subject, over the same rows.

    Parameters
    ----------
    centre
        m of the removal.
    concepts
        What `own code`, `random code`, `same label` and `other label` take; asked once each.
    """

    def __init__(
        self,
        directions: Directions,
        vectors: Vectors,
        centre: Float32[Tensor, " d"],
        concepts: Callable[[Subject], Int64[Tensor, "row k"]],
    ) -> None:
        self._directions, self._vectors, self._centre, self._concepts = directions, vectors, centre, concepts
        self._offset = vectors.hidden - centre
        self._found: dict[Subject, Float32[Tensor, "row d"]] = {}

    def of(self, subject: Subject) -> Float32[Tensor, "row d"]:
        """Δ of each row."""
        offset, across, gaussian = self._offset, self._vectors.across, self._vectors.gaussian
        if subject == "whole row":
            return offset
        if subject == "mean direction":
            return along(offset, self._directions.mean_direction[None])
        if subject == "gaussian":
            return along(offset, gaussian / gaussian.norm(dim=-1, keepdim=True).clamp_min(1e-12))
        if subject == "matched random":
            return match(self._taken(OWN), offset, across, across)
        if subject == "matched code":
            return match(self._taken(OWN), offset, self._taken("random code"), across)
        return self._taken(subject)

    def _taken(self, subject: Subject) -> Float32[Tensor, "row d"]:
        if subject not in self._found:
            concepts = self._concepts(subject)
            self._found[subject] = self._directions.displacement(self._vectors.hidden, concepts, self._centre)
        return self._found[subject]


def subjects_of(removal: str, controls: Sequence[Control]) -> tuple[Subject, ...]:
    """What is removed, own code first."""
    return ("whole row",) if removal == "mean" else (OWN, *controls)
