"""Texts with labels, from local files or a Hub data set."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from ..cache.files import sha256_of
from ..errors import ConfigError, DataError, DataNotFound

SUFFIXES = (".jsonl", ".csv", ".parquet", ".txt")
# Columns of texts.parquet that a kept field may not take.
RESERVED = {
    "text_id", "source_row", "split", "text", "text_sha256", "label", "prediction",
    "truncated_tokens", "first_row", "row_count",
}  # fmt: skip

# More are no classification but a mistaken field.
_MOST_CLASSES = 10_000


@dataclass(frozen=True)
class Texts:
    """All texts, in the order of the data, split after split."""

    text: list[str]
    split: list[str]
    source_row: list[int]
    """Row in its split's file, counted from 0."""
    label: list[int | None]
    class_names: list[str] | None
    """`None` where there are no labels."""
    labels_are_names: bool
    """Whether the labels were given as names, so that their numbers follow from the alphabet alone."""
    kept: dict[str, pa.Array]
    identity: dict[str, JsonValue]

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class _Source:
    columns: dict[str, dict[str, list[Any]]]
    """Split → field → values."""
    names: dict[str, str]
    """Split → how errors call it."""
    class_names: list[str] | None
    identity: dict[str, JsonValue]


def read_texts(
    data: str,
    *,
    splits: Sequence[str] = (),
    text_field: str = "text",
    label_field: str | None = None,
    keep_fields: Sequence[str] = (),
    max_texts: int | None = None,
    subset: str | None = None,
    seed: int = 0,
) -> Texts:
    """Read the texts of some splits.

    Parameters
    ----------
    data
        A `.jsonl`, `.csv`, `.parquet` or `.txt` file (one text a line), a folder with one such file per split, or a
        Hub data set.
    splits
        The splits to read; all of them where empty. A local file's split is its name without the ending.
    text_field, label_field, keep_fields
        Names of fields; without `label_field`, `label` is used where it exists.
    max_texts
        Keep a seeded random sample of so many texts of each split.
    subset
        Configuration of a Hub data set.

    Raises
    ------
    DataNotFound
        Where there is no such file, folder, data set or split.
    DataError
        Where a file cannot be read, is empty, or lacks a field.
    ConfigError
        Where a kept field has the name of a column of the cache, or `max_texts` is below 1.
    """
    if max_texts is not None and max_texts < 1:
        raise ConfigError(f"--max-texts is {max_texts}; it must be at least 1")
    taken = sorted(RESERVED & set(keep_fields))
    if taken:
        raise ConfigError(f"--keep-fields {taken[0]}: the cache has a column of that name; rename the field")
    path = Path(data).expanduser()
    if path.exists():
        source = _local(path, splits)
    elif data.startswith((".", "/", "~")) or data.endswith(SUFFIXES) or data.count("/") > 1:
        raise DataNotFound(f"{data} does not exist: give a file or folder, or the name of a data set on the Hub")
    else:
        source = _hub(data, splits, subset, label_field or "label")
    text, split, rows, labels = [], [], [], []
    kept: dict[str, list[Any]] = {field: [] for field in keep_fields}
    has_labels = False
    for name, columns in source.columns.items():
        where = source.names[name]
        for field in (text_field, *([label_field] if label_field else []), *keep_fields):
            if field not in columns:
                raise DataError(
                    f"{where} has no field {field!r}; it has {', '.join(map(repr, columns))}: "
                    "see --text-field, --label-field and --keep-fields"
                )
        count = len(columns[text_field])
        if count == 0:
            raise DataError(f"{where} holds no texts")
        chosen = range(count)
        if max_texts is not None and max_texts < count:
            chosen = np.sort(np.random.default_rng(seed).permutation(count)[:max_texts]).tolist()
        field = label_field or "label"
        has_labels |= field in columns
        for row in chosen:
            value = columns[text_field][row]
            if value is not None and not isinstance(value, str):
                raise DataError(
                    f"row {row} of {where}: field {text_field!r} is {type(value).__name__}, not text; see --text-field"
                )
            label = columns[field][row] if field in columns else None
            for name_of, string in ((text_field, value), (field, label)):
                _check_unicode(string, f"row {row} of {where}: field {name_of!r}")
            text.append(value or "")
            split.append(name)
            rows.append(row)
            labels.append(label)
            for kept_field, values in kept.items():
                values.append(columns[kept_field][row])
    numbers, class_names, named = _labels(labels, source.class_names)
    identity: dict[str, JsonValue] = {
        **source.identity,
        "splits": list(source.columns),
        "text_field": text_field,
        "label_field": (label_field or "label") if has_labels else None,
        "keep_fields": list(keep_fields),
        "max_texts": max_texts,
    }
    return Texts(
        text=text,
        split=split,
        source_row=rows,
        label=numbers,
        class_names=class_names,
        labels_are_names=named,
        kept={name: _arrow(values) for name, values in kept.items()},
        identity=identity,
    )


def _local(path: Path, splits: Sequence[str]) -> _Source:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _is_data(file))
        if splits:
            files = [file for file in files if file.stem in splits]
            stems = [file.stem for file in files]
            for name in splits:
                if name not in stems:
                    raise DataNotFound(f"{path} has no file for the split {name!r} (such as {name}.jsonl)")
                if stems.count(name) > 1:
                    doubles = ", ".join(file.name for file in files if file.stem == name)
                    raise DataError(f"{path} has several files for the split {name!r} ({doubles}): keep one")
            files.sort(key=lambda file: list(splits).index(file.stem))
        endings = sorted({file.suffix for file in files})
        if not files:
            raise DataNotFound(f"{path} holds no {', '.join(SUFFIXES)} file")
        if len(endings) > 1 and not splits:
            raise DataError(
                f"{path} holds files of several kinds ({', '.join(file.name for file in files)}): "
                "name the splits to read with --split"
            )
    else:
        files = [path]
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path} is not one of {', '.join(SUFFIXES)}")
        if splits and list(splits) != [path.stem]:
            raise DataNotFound(f"{path} is the split {path.stem!r}; --split asks for {', '.join(splits)}")
    identity: dict[str, JsonValue] = {"files": {file.stem: sha256_of(file) for file in files}}
    return _Source(
        columns={file.stem: _READERS[file.suffix](file) for file in files},
        names={file.stem: str(file) for file in files},
        class_names=None,
        identity=identity,
    )


def _is_data(file: Path) -> bool:
    return file.suffix in SUFFIXES and not file.name.startswith(".") and file.is_file()


def _read_jsonl(path: Path) -> dict[str, list[Any]]:
    records: list[dict[str, Any]] = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number} of {path} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"line {number} of {path} is not a JSON object, but {type(record).__name__}")
        if records and record.keys() != records[0].keys():
            odd = sorted(record.keys() ^ records[0].keys())[0]
            raise DataError(
                f"line {number} of {path} differs from line 1 in the field {odd!r}: give all lines the same"
            )
        records.append(record)
    if not records:
        raise DataError(f"{path} holds no texts")
    return {field: [record[field] for record in records] for field in records[0]}


def _read_csv(path: Path) -> dict[str, list[Any]]:
    import csv

    from pyarrow import csv as arrow_csv

    if not path.read_bytes().strip():
        raise DataError(f"{path} holds no texts")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next(filter(None, csv.reader(file)))
        table = arrow_csv.read_csv(
            path,
            # One block: a text longer than a block could not be read.
            read_options=arrow_csv.ReadOptions(block_size=min(path.stat().st_size + 1, 2**31 - 1)),
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
            # Read as text: a column of digits is a text too, and labels are parsed with all other labels.
            convert_options=arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
            ),
        )
    except (pa.ArrowException, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as CSV: {_first_line(error)}") from error
    return _columns(table, path)


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    try:
        table = pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {_first_line(error)}") from error
    return _columns(table, path)


def _columns(table: pa.Table, path: Path) -> dict[str, list[Any]]:
    names = table.column_names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path} has several columns named {twice!r}: rename all but one")
    columns: dict[str, list[Any]] = table.to_pydict()
    return columns


def _read_txt(path: Path) -> dict[str, list[Any]]:
    lines = _lines(path)
    if not lines:
        raise DataError(f"{path} holds no texts")
    return {"text": lines}


_READERS: dict[str, Callable[[Path], dict[str, list[Any]]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    # Only \n ends a line: str.splitlines would also cut at characters that stand inside texts.
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _hub(name: str, splits: Sequence[str], subset: str | None, label_field: str) -> _Source:
    import datasets
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(name).sha
        loaded = datasets.load_dataset(name, subset, revision=commit)
    except Exception as error:  # the Hub's client raises some twenty kinds, of several libraries
        raise DataNotFound(
            f"{name!r} is no local file or folder, and could not be had from the Hub: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error
    for split in splits:
        if split not in loaded:
            raise DataNotFound(f"the data set {name} has no split {split!r}; it has {', '.join(loaded)}")
    chosen = list(splits) or list(loaded)
    features = loaded[chosen[0]].features.get(label_field)
    return _Source(
        columns={split: loaded[split].to_dict() for split in chosen},
        names={split: f"split {split!r} of {name}" for split in chosen},
        class_names=list(features.names) if isinstance(features, datasets.ClassLabel) else None,
        identity={"name": name, "commit": commit, "subset": subset},
    )


def _labels(values: list[Any], class_names: list[str] | None) -> tuple[list[int | None], list[str] | None, bool]:
    """Labels as numbers from 0, their names, and whether names were given instead of numbers.

    `None`, the empty string and negative numbers (the Hub's 'no label') stay unknown.
    """
    known = [value for value in values if value is not None and value != ""]
    if not known:
        return [None] * len(values), None, False
    numbers: list[int | None]
    if all(_is_whole_number(value) for value in known):
        numbers = [None if value is None or value == "" or int(value) < 0 else int(value) for value in values]
        count = max((number for number in numbers if number is not None), default=-1) + 1
        if count > _MOST_CLASSES:
            raise DataError(f"labels reach {count - 1:,}: a classification is expected; see --label-field")
        return numbers, class_names or [str(number) for number in range(count)], False
    if not all(isinstance(value, str) for value in known):
        odd = next(value for value in known if not isinstance(value, str))
        raise DataError(f"labels must be whole numbers or names; found {odd!r}; see --label-field")
    names = sorted(set(known))
    if len(names) > _MOST_CLASSES:
        raise DataError(f"there are {len(names):,} different labels: a classification is expected; see --label-field")
    place = {name: number for number, name in enumerate(names)}
    numbers = [place.get(value) for value in values]
    return numbers, names, True


def _is_whole_number(value: Any) -> bool:
    if isinstance(value, (bool, int)):
        return True
    return isinstance(value, str) and value.strip().removeprefix("-").isdecimal()


def _check_unicode(value: Any, what: str) -> None:
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds half of a surrogate pair at character {error.start}, which is no text: "
            "repair or drop the row"
        ) from error


def _arrow(values: list[Any]) -> pa.Array:
    """A kept field as a column; as JSON where Arrow or Parquet has no type for it."""
    try:
        array = pa.array(values)
        if pa.types.is_nested(array.type):
            # Found out now, and not when the extraction ends.
            pq.write_table(pa.table({"field": array}), pa.BufferOutputStream())
        return array
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return pa.array([json.dumps(value, default=str) for value in values])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]
