"""What a folder of judgements holds: judges, and their replies as ratings, comparisons or guesses."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import ValidationError

from ...cache.frozen import SOON_REFUSED, Frozen
from ...errors import ConfigError, DataError, DataNotFound
from ..study.answers import Answer
from ..study.items import Items
from .asking import Judge, Outcome, from_disk, outcome_of
from .calls import Calls
from .config import JudgeConfig
from .outcomes import Replies
from .questions import questions
from .ratings import Comparison, Rating

JUDGEMENT_VERSION = 1
SETTINGS, JUDGES, CALLS, RESULT = "settings.json", "judges.json", "calls.jsonl", "judgement.json"


class Judges(Frozen):
    """The file of judges."""

    judges: Annotated[list[Judge], SOON_REFUSED]


def known_judges(out: Path) -> list[Judge]:
    """The judges that a folder has met.

    Raises
    ------
    DataError
    """
    file = out / JUDGES
    if not file.is_file():
        return []
    try:
        return Judges.model_validate(json.loads(file.read_bytes())).judges
    except (ValueError, ValidationError) as error:
        raise DataError(
            f"{file} is damaged: take it away, and run the command of each judge again; no reply is asked for twice"
        ) from error


def read_replies(out: Path, items: Items, digest: str) -> Replies:
    """The ratings or comparisons that a folder holds of an item file.

    Raises
    ------
    DataNotFound
        Where the folder holds no judgements.
    DataError
        Where they are of another item file, or damaged.
    ConfigError
        Where judges guessed instead.
    """
    file = out / SETTINGS
    if not file.is_file():
        raise DataNotFound(f"{out} holds no judgements: give the folder that `clvq judge` wrote with --out")
    try:
        settings = json.loads(file.read_bytes())
        config, of = JudgeConfig.model_validate(settings["config"]), str(settings["items"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged: give the folder that `clvq judge` wrote with --out") from error
    if of != digest:
        raise DataError(
            f"{out} holds judgements of the item file {of[:12]}…, and this one is {digest[:12]}…: give those of the "
            "same items"
        )
    if config.protocol == "guess":
        raise ConfigError(f"the judges of {out} guessed, as people do: give a folder of the protocol rate or pairs")
    calls = Calls(out / CALLS)
    try:
        asked = questions(items, config)
        outcomes = {
            one.name: [outcome_of(ask, one, config, from_disk(one, calls)) for ask in asked]
            for one in known_judges(out)
        }
    finally:
        calls.close()
    return comparisons_of(outcomes) if config.protocol == "pairs" else ratings_of(outcomes)


def ratings_of(outcomes: Mapping[str, Sequence[Outcome]]) -> list[Rating]:
    """The ratings of `rate`; a question without a valid reply gives ratings of `None`."""
    return [
        Rating(
            judge=name,
            item=outcome.question.item,
            method=method,
            presentation=outcome.question.presentation,
            position=place,
            shown=len(outcome.question.methods),
            rating=None if outcome.value is None else float(outcome.value[_letter(place)]),
            length=outcome.question.lengths[place],
        )
        for name, several in outcomes.items()
        for outcome in several
        if outcome.status != "unanswered"
        for place, method in enumerate(outcome.question.methods)
    ]


def comparisons_of(outcomes: Mapping[str, Sequence[Outcome]]) -> list[Comparison]:
    """The comparisons of `pairs`; a question without a valid reply gives one of `None`."""
    winners: Mapping[Any, Any] = {"A": "first", "B": "second", "tie": "tie"}
    return [
        Comparison(
            judge=name,
            item=outcome.question.item,
            presentation=outcome.question.presentation,
            first=outcome.question.methods[0],
            second=outcome.question.methods[1],
            winner=None if outcome.value is None else winners[outcome.value["better"]],
            first_length=outcome.question.lengths[0],
            second_length=outcome.question.lengths[1],
        )
        for name, several in outcomes.items()
        for outcome in several
        if outcome.status != "unanswered"
    ]


def guesses_of(items: Items, outcomes: Mapping[str, Sequence[Outcome]]) -> list[Answer]:
    """Guesses as people give them; questions without a valid reply are no answers, as people's unanswered ones."""
    return [
        Answer(
            annotator=name,
            place=place,
            item=outcome.question.item,
            method=outcome.question.methods[0],
            kind=outcome.question.kind,
            answer=items.classes.index(outcome.value["class"]),
            confidence=int(outcome.value["confidence"]),
            milliseconds=0,
            answered_at="",
        )
        for name, several in outcomes.items()
        for place, outcome in enumerate(several)
        if outcome.value is not None
    ]


def _letter(place: int) -> str:
    return chr(ord("A") + place)
