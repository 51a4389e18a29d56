"""One answer of one annotator."""

from dataclasses import dataclass

from .items import Kind


@dataclass(frozen=True)
class Answer:
    """What an annotator answered to one question: an item, shown with one method's concept."""

    annotator: str
    place: int
    """Where the question stood in the annotator's order, from 0."""
    item: str
    method: str
    """Blind id; empty where the item has no concepts."""
    kind: Kind
    answer: int
    """The class that was chosen."""
    confidence: int
    """From 1 to 4."""
    milliseconds: int
    """From the page's showing to the answer."""
    answered_at: str
    """UTC, ISO 8601."""
