"""What a judge said: of each concept in a presentation, or of two concepts against each other."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rating:
    """A judge's rating of one method's concept in one presentation of an item."""

    judge: str
    item: str
    method: str
    """Blind id."""
    presentation: int
    """Which ordering of the item, from 0."""
    position: int
    """Place in which the concept was shown, from 0."""
    shown: int
    """How many concepts were shown together."""
    rating: float | None
    """From 1 to 5; `None` without a valid reply."""
    length: int
    """Characters of the concept as shown."""


@dataclass(frozen=True)
class Comparison:
    """A judge's choice between two methods' concepts of an item."""

    judge: str
    item: str
    presentation: int
    """0, or 1 for the other order."""
    first: str
    """Blind id of the method that was shown first."""
    second: str
    winner: Literal["first", "second", "tie"] | None
    """`None` without a valid reply."""
    first_length: int
    """Characters of the concept as shown."""
    second_length: int
