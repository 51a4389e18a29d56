"""A study's folder on disk: what stands in it, and how it is read.

```
my-study/
  study.json       settings, digest of the items, booklets; written last
  items.json       the item file; has the predictions, so it is for its owner's eyes only
  pages/           all that a browser may see; index.html opened from here works without the server
  answers.sqlite   appears when the study is served
```
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError

from ...cache.frozen import SOON_REFUSED, Frozen
from ...errors import DataError, DataNotFound, FormatVersion
from .deal import Pool, Question, make_pool
from .items import Item, Items, Kind, read_items
from .settings import StudySettings

STUDY, ITEMS, PAGES, ANSWERS = "study.json", "items.json", "pages", "answers.sqlite"
INDEX, STYLE, DATA = "index.html", "study.css", "study-data.js"
SCRIPTS = ("study-text.js", "study-store.js", "study.js")
FORMAT: Final = "clvq-study"
VERSION: Final = 1


class Asked(Frozen):
    """A question of a booklet."""

    item: str
    method: str
    kind: Kind

    @property
    def question(self) -> Question:
        """The same, as it is dealt."""
        return Question(self.item, self.method, self.kind)


class StudyFile(Frozen):
    """`study.json`."""

    format: Literal["clvq-study"] = FORMAT
    version: Literal[1] = VERSION
    items_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    settings: StudySettings
    booklets: Annotated[tuple[Annotated[tuple[Asked, ...], SOON_REFUSED], ...], SOON_REFUSED]
    """For the form without a server: the questions of each booklet."""


@dataclass(frozen=True)
class Study:
    """A study as it was built."""

    folder: Path
    settings: StudySettings
    items: Items
    items_sha256: str
    """Digest of the item file that it was built from."""
    booklets: tuple[tuple[Question, ...], ...]
    digest: str
    """SHA-256 of `study.json`; answers are bound to it."""

    def item(self, name: str) -> Item:
        """The item of that id."""
        return self._by_id[name]

    @cached_property
    def _by_id(self) -> dict[str, Item]:
        return {item.id: item for item in self.items.items}

    @property
    def pool(self) -> Pool:
        """What its questions are dealt from."""
        return make_pool(self.items, self.settings)


def read_study(folder: Path) -> Study:
    """The study in a folder.

    Raises
    ------
    DataNotFound, DataError, FormatVersion
    """
    path = folder / STUDY
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataNotFound(f"{folder} is no study: it has no {STUDY}; make one with `clvq study build`") from error
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}; build the study again") from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise DataError(f"{path} is not the {STUDY} of a study: it lacks the format {FORMAT!r}")
    if plain.get("version") != VERSION:
        raise FormatVersion(f"{path} has version {plain.get('version')!r}, and this clvq reads {VERSION}")
    try:
        found = StudyFile.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    items, digest = read_items(folder / ITEMS)
    if digest != found.items_sha256:
        raise DataError(f"{folder / ITEMS} is not the item file that the study was built from: build the study again")
    booklets = tuple(tuple(asked.question for asked in one) for one in found.booklets)
    return Study(folder, found.settings, items, digest, booklets, hashlib.sha256(data).hexdigest())
