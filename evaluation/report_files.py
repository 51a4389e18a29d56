"""Finding and reading the results in a folder: every value with the place where it stands."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ..cache.layout import MANIFEST
from ..errors import DataError
from ..trainer.folder import CONFIG, MODEL, REPORT
from .report_document import LeftOut, Measured, Number, Source

ABLATION, QUALITY, SWEEP = "ablation.json", "quality.json", "sweep.json"
_DEPTH = 8
_MOST_ENTRIES = 200_000
_LARGEST = 256 << 20


@dataclass(frozen=True)
class Node:
    """A value of a JSON file, and where it stands."""

    source: Source
    value: Any

    def at(self, *keys: str | int) -> "Node":
        """The value under a key, of a list under a number.

        Raises
        ------
        DataError
            Where there is none.
        """
        node = self
        for key in keys:
            found = node.find(key)
            if found is None:
                node.fail(f"it has no {key!r}")
            node = found
        return node

    def find(self, key: str | int) -> "Node | None":
        """The value under a key; `None` where there is none or it is null."""
        inner: Any = None
        if isinstance(self.value, dict) and isinstance(key, str):
            inner = self.value.get(key)
        elif isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            inner = self.value[key]
        elif not isinstance(self.value, dict | list):
            self.fail(f"it is {_kind(self.value)} and should hold {key!r}")
        return None if inner is None else self._inner(key, inner)

    def each(self) -> list["Node"]:
        """The values of a list."""
        if not isinstance(self.value, list):
            self.fail(f"it is {_kind(self.value)} and should be a list")
        return [self._inner(number, inner) for number, inner in enumerate(self.value)]

    def members(self) -> dict[str, "Node"]:
        """The values of an object by key."""
        if not isinstance(self.value, dict):
            self.fail(f"it is {_kind(self.value)} and should be an object")
        return {key: self._inner(key, inner) for key, inner in self.value.items()}

    def text(self) -> str:
        """The value of a string."""
        if not isinstance(self.value, str):
            self.fail(f"it is {_kind(self.value)} and should be a string")
        return self.value

    def number(self, form: str) -> Number:
        """The value of a number, printed in the form of a format string."""
        if not isinstance(self.value, int | float) or isinstance(self.value, bool) or abs(self.value) > 1e300:
            self.fail(f"it is {_kind(self.value)} and should be a number")
        whole = form.endswith(("d", ","))
        if whole and self.value != int(self.value):
            self.fail(f"it is {self.value} and should be a whole number")
        return Number(self.value, format(int(self.value) if whole else self.value, form), (self.source,))

    def count(self) -> int:
        """The value of a whole number that is not printed."""
        return int(self.number("d").value)

    def estimate(self, form: str, *, middle: str = "value") -> Measured | None:
        """An estimate with its ends, under `low` and `high`; `None` where it is not known."""
        value, low, high = (self.find(name) for name in (middle, "low", "high"))
        if value is None:
            return None
        ends = None if low is None or high is None else (low.number(form), high.number(form))
        return Measured(value.number(form), *(ends or ()))

    def measured(self, key: str, form: str) -> Measured | None:
        """The estimate under a key; `None` where it is not known."""
        node = self.find(key)
        return None if node is None else node.estimate(form)

    def maybe(self, key: str, form: str) -> Number | None:
        """The number under a key; `None` where it is not known."""
        node = self.find(key)
        return None if node is None else node.number(form)

    def _inner(self, key: str | int, value: Any) -> "Node":
        escaped = str(key).replace("~", "~0").replace("/", "~1")
        return Node(Source(self.source.file, f"{self.source.pointer}/{escaped}"), value)

    def fail(self, why: str) -> NoReturn:
        """Say what is wrong here.

        Raises
        ------
        DataError
        """
        raise DataError(f"at {self.source.pointer or 'its top'} {why}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number out of range" if isinstance(value, int | float) else "something else")


@dataclass(frozen=True)
class Found:
    """What a folder holds, as folders in order of their names."""

    runs: list[Path] = field(default_factory=list)
    caches: list[Path] = field(default_factory=list)
    ablations: list[Path] = field(default_factory=list)
    qualities: list[Path] = field(default_factory=list)
    sweeps: list[Path] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def search(root: Path, *, leave: Path) -> Found:
    """The results under `root`, at most eight folders deep. Symbolic links are not followed.

    Parameters
    ----------
    leave
        A folder that is not searched.

    Raises
    ------
    DataError
        Where there is so much that it cannot be a folder of results.
    """
    found = Found()
    leave = leave.resolve()
    seen = 0
    for folder, names in _folders(root, leave, found.left_out):
        seen += len(names)
        if seen > _MOST_ENTRIES:
            raise DataError(f"{root} holds more than {_MOST_ENTRIES:,} files: give the folder of the results alone")
        for name, kind in ((ABLATION, found.ablations), (QUALITY, found.qualities), (SWEEP, found.sweeps)):
            if name in names:
                kind.append(folder)
        if CONFIG in names and ({MODEL, REPORT} <= names or _says(folder / CONFIG, '"clvq-run"')):
            found.runs.append(folder)
        if MANIFEST in names:
            found.caches.append(folder)
    return found


def _folders(root: Path, leave: Path, left_out: list[LeftOut]) -> Iterator[tuple[Path, set[str]]]:
    """Every folder with the names of its files. Folders of a cache are its own affair."""
    waiting = [(root, 0)]
    while waiting:
        folder, depth = waiting.pop()
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            left_out.append(LeftOut(name_of(root, folder), f"cannot be read: {error.strerror}"))
            continue
        interesting = {ABLATION, QUALITY, SWEEP, CONFIG, MANIFEST}
        inner, names = [], set()
        for entry in entries:
            if entry.is_symlink():
                if entry.name in interesting or Path(entry.path).is_dir():
                    why = "a symbolic link, which is not followed"
                    left_out.append(LeftOut(name_of(root, Path(entry.path)), why))
            elif entry.is_dir(follow_symlinks=False):
                if not entry.name.startswith(".") and Path(entry.path).resolve() != leave:
                    inner.append(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                names.add(entry.name)
        yield folder, names
        if MANIFEST in names:
            continue
        if depth == _DEPTH and inner:
            left_out.append(LeftOut(name_of(root, folder), f"folders more than {_DEPTH} deep are not searched"))
        else:
            waiting += [(path, depth + 1) for path in reversed(inner)]


def name_of(root: Path, path: Path) -> str:
    """A path relative to the folder that is reported on, as any encoding can write it."""
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")


def _says(file: Path, what: str) -> bool:
    """Whether a file holds some text, without reading it as JSON: a damaged run is still one."""
    try:
        with open(file, "rb") as opened:
            return what.encode() in opened.read(_LARGEST)
    except OSError:
        return False


def read_json(root: Path, file: Path, *, digests: dict[str, str]) -> Node:
    """The content of a JSON file; its SHA-256 goes to `digests`.

    Raises
    ------
    DataError
        Where it is no JSON, or has numbers that are none.
    """
    return Node(Source(name_of(root, file), ""), _parsed(_bytes(root, file, digests)))


def read_lines(root: Path, file: Path, *, digests: dict[str, str]) -> list[Node]:
    """The lines of a `.jsonl` file; none where there is no such file.

    Raises
    ------
    DataError
        As of `read_json`.
    """
    if not file.is_file() or file.is_symlink():
        return []
    name = name_of(root, file)
    lines = _bytes(root, file, digests).splitlines()
    return [Node(Source(name, f"/{number}"), _parsed(line)) for number, line in enumerate(lines)]


def _bytes(root: Path, file: Path, digests: dict[str, str]) -> bytes:
    try:
        if file.is_symlink():
            raise DataError("it is a symbolic link, which is not followed")
        if file.stat().st_size > _LARGEST:
            raise DataError(f"it has {file.stat().st_size:,} bytes, more than any result")
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"it cannot be read: {error.strerror}") from error
    digests[name_of(root, file)] = hashlib.sha256(data).hexdigest()
    return data


def _parsed(data: bytes) -> Any:
    def no_number(text: str) -> NoReturn:
        raise ValueError(f"{text} is no number of JSON")

    def real(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else no_number(text)

    try:
        value = json.loads(data, parse_constant=no_number, parse_float=real)
        if b"\\ud" in data.lower():
            # JSON can name half a character, and nothing can write it.
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is damaged: {error}") from error
