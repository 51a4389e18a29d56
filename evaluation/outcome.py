"""What a condition did to each text."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from .controls import Subject
from .removal import Removal


class Condition(NamedTuple):
    """One way of removing something from all texts."""

    run: str
    """Empty where it is the same for all runs: `nothing`, and the removal `mean` of runs with one mean."""
    removal: Removal | None
    """`None` where nothing is removed."""
    subject: Subject
    strength: float


NOTHING = Condition("", None, "nothing", 1.0)


@dataclass(frozen=True)
class Outcome:
    """What one condition did to each text; NaN where a text takes no part."""

    probability_lost: Float64[np.ndarray, " text"]
    """Of the class predicted before the removal."""
    flipped: Float64[np.ndarray, " text"]
    """1 where another class is predicted."""
    correct: Float64[np.ndarray, " text"]
    """1 where the label is predicted."""
    norm_removed: Float64[np.ndarray, " text"]
    """‖h − h′‖ / ‖h‖ over the vectors changed."""
    prediction: Float64[np.ndarray, " text"]
    """The class predicted before the removal."""

    def only(self, texts: Bool[np.ndarray, " text"]) -> "Outcome":
        """The chosen texts."""
        return Outcome(*(getattr(self, name)[texts] for name in self.__dataclass_fields__))

    @classmethod
    def empty(cls, texts: int) -> "Outcome":
        """No text takes part yet."""
        return cls(*(np.full(texts, np.nan) for _ in cls.__dataclass_fields__))

    def note(
        self,
        numbers: Int64[np.ndarray, " noted"],
        before: Float64[np.ndarray, "noted class"],
        after: Float64[np.ndarray, "noted class"],
        labels: Float64[np.ndarray, " noted"],
        norm_removed: Float64[np.ndarray, " noted"],
    ) -> None:
        """Record some texts; a label that is not known is NaN."""
        predicted, rows = before.argmax(axis=1), np.arange(len(numbers))
        self.probability_lost[numbers] = before[rows, predicted] - after[rows, predicted]
        self.flipped[numbers] = after.argmax(axis=1) != predicted
        self.correct[numbers] = np.where(np.isnan(labels), np.nan, after.argmax(axis=1) == labels)
        self.norm_removed[numbers] = norm_removed
        self.prediction[numbers] = predicted
