"""Answers as files: those that the form without a server saves, and those that are handed on."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from ...cache.files import write_file
from ...cache.frozen import SOON_REFUSED, Frozen
from ...errors import ConfigError, DataError, DataNotFound, FormatVersion
from .answers import Answer
from .database_file import read_answers
from .folder import ANSWERS, Study, read_study

FORMAT = "clvq-answers"
VERSION = 1
# A thousand questions take a fifth of a megabyte.
_LARGEST = 16 << 20
_TIME = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|\+00:00)$"


class _FileAnswer(Frozen):
    place: Annotated[int, Field(ge=0, le=1_000_000)]
    item: Annotated[str, Field(max_length=32)]
    method: Annotated[str, Field(max_length=16)]
    answer: Annotated[int, Field(ge=0, le=1_000_000)]
    confidence: Annotated[int, Field(ge=1, le=4)]
    milliseconds: Annotated[int, Field(ge=0, le=86_400_000)]
    answered_at: Annotated[str, Field(pattern=_TIME)]


class _AnswerFile(Frozen):
    format: Literal["clvq-answers"]
    version: Literal[1]
    study: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    booklet: Annotated[int, Field(ge=1, le=10_000)]
    id: Annotated[str, Field(pattern="^[0-9a-f]{24}$")]
    """Drawn by the page when a person began."""
    answers: Annotated[tuple[_FileAnswer, ...], SOON_REFUSED]


def read_answer_files(paths: Sequence[Path], study: Study) -> list[Answer]:
    """The answers of people who used the form without a server; files may come from anyone.

    An annotator is called by the booklet and the id that the page drew, `3-09f4…`, so that two people who had the same
    booklet are two.

    Raises
    ------
    DataNotFound, FormatVersion
    DataError
        A file is damaged, was saved by another study's page, or holds the answers of a person that another one holds.
    """
    found: dict[str, Path] = {}
    answers: list[Answer] = []
    for path in paths:
        annotator, theirs = _read(path, study)
        if annotator in found:
            raise DataError(
                f"{path} and {found[annotator]} hold the answers of the same person ({annotator}): give one of "
                "them, the one that was saved last"
            )
        found[annotator] = path
        answers += theirs
    return answers


def _read(path: Path, study: Study) -> tuple[str, list[Answer]]:
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes, and a file of answers at most {_LARGEST:,}")
        plain = json.loads(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DataNotFound(
            f"{path} is not there, or is a folder, and is to be a file that a study's page saved"
        ) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise DataError(f"{path} was not saved by a study's page: it lacks the format {FORMAT!r}")
    if plain.get("version") != VERSION:
        raise FormatVersion(f"{path} has version {plain.get('version')!r}, and this clvq reads {VERSION}")
    try:
        file = _AnswerFile.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{path} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if file.study != study.digest:
        raise DataError(
            f"{path} holds answers to the study {file.study[:12]}…, and {study.folder} is {study.digest[:12]}…"
        )
    if file.booklet > len(study.booklets):
        raise DataError(f"{path} is of booklet {file.booklet}, and {study.folder} has {len(study.booklets)}")
    annotator = f"{file.booklet}-{file.id}"
    booklet = study.booklets[file.booklet - 1]
    answers = []
    for place, one in enumerate(file.answers):
        asked = booklet[place] if place < len(booklet) else None
        if one.place != place or asked is None or (one.item, one.method) != (asked.item, asked.method):
            raise DataError(f"{path} is damaged: its answer {place} is not to what booklet {file.booklet} asks there")
        if one.answer >= len(study.items.classes):
            raise DataError(
                f"{path} is damaged: its answer {place} is class {one.answer} of {len(study.items.classes)}"
            )
        answers.append(
            Answer(
                annotator=annotator,
                place=place,
                item=one.item,
                method=one.method,
                kind=asked.kind,
                answer=one.answer,
                confidence=one.confidence,
                milliseconds=one.milliseconds,
                answered_at=one.answered_at,
            )
        )
    return annotator, answers


def export(folder: Path, out: Path, *, force: bool = False) -> int:
    """Write all answers of a study so far as CSV or as JSON lines, by the suffix of `out`; also while it is served.

    Returns
    -------
    The number of answers.

    Raises
    ------
    DataNotFound, DataError, FormatVersion, DiskFull
    ConfigError
        The suffix is another one, or `out` is there and `force` is not given.
    """
    suffix = out.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"{out} ends in neither .csv nor .jsonl: give one of them, and the answers are written so")
    if out.exists() and not force:
        raise ConfigError(f"{out} is there already: give another --out, or --force to replace it")
    answers = read_answers(read_study(folder).folder / ANSWERS)
    if suffix == ".csv":
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow([field.name for field in fields(Answer)])
        writer.writerows(asdict(answer).values() for answer in answers)
        write_file(out, table.getvalue().encode())
    else:
        write_file(out, "".join(json.dumps(asdict(answer)) + "\n" for answer in answers).encode())
    return len(answers)
