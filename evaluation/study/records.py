"""Answers of a study as arrays, once it is known that they fit the item file."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from ...errors import DataError
from .answers import Answer
from .items import Item, Items

CONFIDENCES = 4


@dataclass(frozen=True)
class Records:
    """Answers to main items."""

    people: tuple[str, ...]
    """Annotators with such an answer, ascending."""
    things: tuple[str, ...]
    """Items with such an answer, in the file's order."""
    annotator: Int64[np.ndarray, " record"]
    """Place in `people`."""
    item: Int64[np.ndarray, " record"]
    """Place in `things`."""
    method: Int64[np.ndarray, " record"]
    """Place in `Items.methods`."""
    answer: Int64[np.ndarray, " record"]
    prediction: Int64[np.ndarray, " record"]
    weight: Float64[np.ndarray, " record"]
    confidence: Int64[np.ndarray, " record"]
    seconds: Float64[np.ndarray, " record"]

    @property
    def right(self) -> Bool[np.ndarray, " record"]:
        """Whether the answer is the model's prediction."""
        right: Bool[np.ndarray, " record"] = self.answer == self.prediction
        return right


def check_answers(items: Items, answers: Sequence[Answer]) -> None:
    """See to it that answers belong to the item file.

    Raises
    ------
    DataError
        For an unknown item or method, an answer or confidence out of range, or a question that one annotator answered
        twice.
    """
    known = {item.id: item for item in items.items}
    seen: set[tuple[str, str, str]] = set()
    for answer in answers:
        who = f"annotator {answer.annotator}'s answer to item {answer.item}"
        item = known.get(answer.item)
        if item is None:
            raise DataError(f"{who}: the item file has no such item; give the item file that the study was built from")
        if item.kind != answer.kind:
            raise DataError(f"{who} is of kind {answer.kind}, and the item is of kind {item.kind} in the item file")
        if answer.method not in items.methods and (answer.method or item.kind != "attention"):
            raise DataError(f"{who}: no method {answer.method!r}, only {', '.join(items.methods)}")
        if not 0 <= answer.answer < len(items.classes):
            raise DataError(f"{who} is class {answer.answer}, and there are the classes 0 to {len(items.classes) - 1}")
        if not 1 <= answer.confidence <= CONFIDENCES:
            raise DataError(f"{who} has the confidence {answer.confidence} instead of one from 1 to {CONFIDENCES}")
        if answer.milliseconds < 0:
            raise DataError(f"{who} took {answer.milliseconds} ms: a time is 0 or more")
        question = (answer.annotator, answer.item, answer.method)
        if question in seen:
            raise DataError(f"{who} with method {answer.method!r} stands there twice: keep one of the two")
        seen.add(question)


def records(items: Items, answers: Sequence[Answer]) -> Records:
    """The answers to main items, which `check_answers` has passed."""
    kept = [answer for answer in answers if answer.kind == "main"]
    known: dict[str, Item] = {item.id: item for item in items.items}
    answered = {answer.item for answer in kept}
    people = tuple(sorted({answer.annotator for answer in kept}))
    things = tuple(item.id for item in items.items if item.id in answered)

    def column(values: list[int]) -> Int64[np.ndarray, " record"]:
        made: Int64[np.ndarray, " record"] = np.array(values, dtype=np.int64)
        return made

    person = {name: place for place, name in enumerate(people)}
    thing = {name: place for place, name in enumerate(things)}
    method = {name: place for place, name in enumerate(items.methods)}
    return Records(
        people=people,
        things=things,
        annotator=column([person[answer.annotator] for answer in kept]),
        item=column([thing[answer.item] for answer in kept]),
        method=column([method[answer.method] for answer in kept]),
        answer=column([answer.answer for answer in kept]),
        prediction=column([known[answer.item].prediction for answer in kept]),
        weight=np.array([known[answer.item].weight for answer in kept], dtype=np.float64),
        confidence=column([answer.confidence for answer in kept]),
        seconds=np.array([answer.milliseconds / 1000 for answer in kept], dtype=np.float64),
    )
