"""The item file that judges and people share, and the key that is kept apart from it.

An item is a text, what the model predicts for it, and by each method's blind id the concept of its salient word. The
file does not say which method is which, what the text's label is, or which method is a control: that stands in the key.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator

from ...cache.files import write_file
from ...cache.frozen import SOON_REFUSED, Count, Frozen, Positive, Text
from ...cache.layout import to_json
from ...errors import DataError, DataNotFound, FormatVersion

FORMAT: Literal["clvq-items"] = "clvq-items"
KEY_FORMAT: Literal["clvq-items-key"] = "clvq-items-key"
VERSION: Literal[1] = 1

# What is looked at in parts comes back as a list.
_TUPLE = AfterValidator(tuple)

Kind = Literal["main", "training", "attention"]
Role = Literal["run", "duplicate", "random"]
Share = Annotated[float, Field(ge=0, le=1)]
BlindId = Annotated[str, Field(pattern="^[a-z0-9]{1,16}$")]
ItemId = Annotated[str, Field(pattern="^[a-z0-9-]{1,32}$")]


class Word(Frozen):
    """A word of a concept."""

    word: Text
    share: Share
    """Of the concept's rows."""


class Sentence(Frozen):
    """A sentence in which a word belongs to the concept."""

    before: Text
    word: Text
    after: Text


class ConceptView(Frozen):
    """A concept as it is shown. All concepts of an item have equally many words and sentences, but for empty ones."""

    words: Annotated[tuple[Word, ...], SOON_REFUSED, _TUPLE]
    sentences: Annotated[tuple[Sentence, ...], SOON_REFUSED, _TUPLE]
    labels: Annotated[tuple[Share, ...], SOON_REFUSED, _TUPLE]
    """Share of each class among the labels of its rows' texts; empty where no text has a label."""

    @property
    def empty(self) -> bool:
        """Whether the concept has no training rows, so that there is nothing to show."""
        return not self.words and not self.sentences


class Item(Frozen):
    """A text with one concept per method."""

    id: ItemId
    kind: Kind
    """`main` items count; `training` ones are practised on; `attention` ones say how they want to be answered."""
    text: Text
    """Empty for `attention`."""
    salient: tuple[Count, Count] | None
    """Characters of the salient word in the text."""
    prediction: Count
    """The class that the model predicts; for `attention` the class to be answered."""
    weight: Annotated[float, Field(gt=0)]
    """How many texts of the population the item stands for, at a mean of 1."""
    concepts: Annotated[dict[BlindId, ConceptView], SOON_REFUSED]
    """By blind id; empty for `attention`."""
    best: BlindId | None = None
    """For `attention`: the method whose place is to be rated highest."""


class Stratum(Frozen):
    """Texts of like prediction, right or wrong alike."""

    prediction: Count
    right: bool | None
    """Whether the prediction is the label; `None` without labels."""
    texts: Positive
    """In the population."""
    items: Count


class Sampling(Frozen):
    """How the main items were drawn."""

    seed: int
    allocation: Literal["proportional", "equal"]
    population: Count
    """Texts that could be drawn."""
    left_out: Annotated[dict[str, Count], SOON_REFUSED]
    """Texts that could not, by why."""
    strata: Annotated[tuple[Stratum, ...], SOON_REFUSED, _TUPLE]


class Items(Frozen):
    """The item file."""

    format: Literal["clvq-items"] = FORMAT
    version: Literal[1] = VERSION
    classes: Annotated[tuple[Text, ...], Field(min_length=2), SOON_REFUSED, _TUPLE]
    """Names of the classes, as shown."""
    methods: Annotated[tuple[BlindId, ...], Field(min_length=2), SOON_REFUSED, _TUPLE]
    """Blind ids, in an order that says nothing."""
    sampling: Sampling
    items: Annotated[tuple[Item, ...], SOON_REFUSED, _TUPLE]

    @model_validator(mode="after")
    def _fits(self) -> "Items":
        if len(set(self.methods)) != len(self.methods):
            raise ValueError("a blind id stands for two methods")
        if len({item.id for item in self.items}) != len(self.items):
            raise ValueError("two items have the same id")
        for item in self.items:
            wanted = set() if item.kind == "attention" else set(self.methods)
            if set(item.concepts) != wanted:
                raise ValueError(f"item {item.id} has concepts of {sorted(item.concepts)} instead of {sorted(wanted)}")
            if item.prediction >= len(self.classes):
                raise ValueError(f"item {item.id} has class {item.prediction} of {len(self.classes)}")
            if (item.best is not None) != (item.kind == "attention") or item.best not in (None, *self.methods):
                raise ValueError(f"item {item.id} of kind {item.kind} has the best method {item.best}")
        return self

    def of_kind(self, kind: Kind) -> tuple[Item, ...]:
        """The items of a kind, in order."""
        return tuple(item for item in self.items if item.kind == kind)


class KeyedMethod(Frozen):
    """What stands behind a blind id."""

    role: Role
    name: Text
    """The run's name; of a control what it is made of."""
    of: BlindId | None = None
    """The method that a duplicate repeats."""
    method: Text | None = None
    run_seed: int | None = None
    run_sha256: Text | None = None


class KeyedItem(Frozen):
    """What stands behind an item."""

    text_id: Count
    label: Count | None
    concepts: Annotated[dict[BlindId, Count], SOON_REFUSED]
    """Number of the concept in its run."""
    drawn_from: Text | None = None
    """The run whose concept the random control shows."""


class Key(Frozen):
    """The key to an item file."""

    format: Literal["clvq-items-key"] = KEY_FORMAT
    version: Literal[1] = VERSION
    items_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    cache_id: Text
    site: Text
    saliency: Text
    methods: Annotated[dict[BlindId, KeyedMethod], SOON_REFUSED]
    items: Annotated[dict[ItemId, KeyedItem], SOON_REFUSED]


def key_path(items: Path) -> Path:
    """Where the key of an item file stands unless told otherwise: `movies.json` → `movies.key.json`."""
    return items.with_name(f"{items.stem}.key.json")


def items_digest(data: bytes) -> str:
    """What names an item file in everything made of it."""
    return hashlib.sha256(data).hexdigest()


def write_items(path: Path, items: Items, key_of: Mapping[str, object]) -> Key:
    """Write the item file, and the key beside it, for its owner's eyes only.

    Parameters
    ----------
    key_of
        The fields of the key, but for `items_sha256`.
    """
    data = to_json(items)
    key = Key.model_validate({**key_of, "items_sha256": items_digest(data)})
    place = key_path(path)
    write_file(place, to_json(key))
    place.chmod(0o600)
    write_file(path, data)
    return key


def read_items(path: Path) -> tuple[Items, str]:
    """The item file and its digest.

    Raises
    ------
    DataNotFound, DataError, FormatVersion
    """
    data = _read(path, "an item file: make one with `clvq study items`")
    return _parse(Items, data, path, FORMAT), items_digest(data)


def read_key(path: Path, digest: str) -> Key:
    """The key of the item file with that digest.

    Raises
    ------
    DataNotFound, DataError, FormatVersion
    """
    key = _parse(Key, _read(path, "the key of an item file: give it with --key"), path, KEY_FORMAT)
    if key.items_sha256 != digest:
        raise DataError(
            f"{path} is the key of the item file {key.items_sha256[:12]}…, and this one is {digest[:12]}…: "
            "give the key that was written with it, with --key"
        )
    return key


_Parsed = TypeVar("_Parsed", Items, Key)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DataNotFound(f"{path} is not there, or is a folder, and is to be {what}") from error


def _parse(kind: type[_Parsed], data: bytes, path: Path, form: str) -> _Parsed:
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    found = plain.get("format") if isinstance(plain, dict) else None
    if found != form:
        raise DataError(f"{path} has the format {found!r} instead of {form!r}")
    if plain.get("version") != VERSION:
        raise FormatVersion(f"{path} has version {plain.get('version')!r}, and this clvq reads {VERSION}")
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise DataError(f"{path} is no {form} file: {place}: {first['msg']}") from error
