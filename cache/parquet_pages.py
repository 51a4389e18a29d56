"""What a Parquet file will take in memory when it is read, found without decompressing any of it.

A few kilobytes of zstd, one long string in a dictionary or a prefix to be repeated can stand for terabytes, and what
the file's footer says of sizes is believed by nobody who decodes: only the header of each page counts. Headers and
footer are in Thrift's compact protocol. Arrow is not asked, for it ends the process over some footers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

_FOOTER_BYTES = 1 << 20
_SCHEMA_ELEMENTS = 1_000
_DEEPEST = 30
_MAGIC = b"PAR1"
_DATA, _INDEX, _DICTIONARY, _DATA_V2 = range(4)
_PLAIN, _RLE, _BY_DICTIONARY = 0, 3, (2, 8)
_BYTE_ARRAY, _FIXED_LEN_BYTE_ARRAY = 6, 7
# Of a column chunk: where it lies, its metadata and where its page indexes lie; not another file, nothing encrypted.
_OF_CHUNK = {2, 3, 4, 5, 6, 7}

_T = TypeVar("_T")


def memory(data: bytes) -> int:
    """Bytes that all columns take at most, each of their pages and all of their values.

    Raises
    ------
    ValueError
        Where it is not Parquet, or uses what `texts.parquet` does not.
    """
    footer = _footer(data)
    # Another writer's files are read in ways of their own, and may say in their metadata which types to make.
    if not _get(footer, 6, bytes).startswith(b"parquet-cpp-arrow ") or 5 in footer:
        raise ValueError("it was not written by clvq")
    depths = _depths(_get(footer, 2, list))
    total = 0
    for group in _get(footer, 4, list):
        chunks = _get(group, 1, list)
        if len(chunks) != len(depths):
            raise ValueError("a row group has not all columns")
        for chunk, depth in zip(chunks, depths, strict=True):
            total += _column(data, chunk, depth)
    return total


def _column(data: bytes, chunk: Any, depth: int) -> int:
    column = _get(chunk, 3, dict)
    if not chunk.keys() <= _OF_CHUNK:
        raise ValueError("a column lies elsewhere or is encrypted")
    if _get(column, 5, int) == 0:
        return 0
    start = _get(column, 9, int)
    if 11 in column:
        start = min(start, _get(column, 11, int) or start)
    pages = list(_pages(data, start, _get(column, 7, int)))
    longest = 0
    if _get(column, 1, int) in (_BYTE_ARRAY, _FIXED_LEN_BYTE_ARRAY):
        longest = sum(page.bytes for page in pages if page.kind == _DICTIONARY)
    # A value in a list or struct has levels too, and each may have an offset and a bit that says whether it is there.
    of_value = 8 * (1 + 2 * depth)
    return sum(page.bytes + page.values * (of_value + longest * (page.encoding in _BY_DICTIONARY)) for page in pages)


@dataclass(frozen=True)
class _Page:
    kind: int
    bytes: int
    values: int
    encoding: int


def _pages(data: bytes, start: int, size: int) -> Iterator[_Page]:
    place, end = start, start + size
    if not 0 <= start <= end <= len(data):
        raise ValueError("a column lies outside the file")
    while place < end:
        thrift = _Thrift(data, place)
        header = thrift.struct()
        kind, unpacked, packed = (_get(header, field, int) for field in (1, 2, 3))
        place = thrift.place + packed
        if min(unpacked, packed) < 0 or place > end:
            raise ValueError("a page lies outside its column")
        own = {_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}.get(kind)
        if own is None:
            raise ValueError(f"a page is of the kind {kind}")
        inner = _get(header, own, dict)
        values, encoding = (_get(inner, field, int) for field in (1, 4 if kind == _DATA_V2 else 2))
        if values < 0 or encoding not in (_PLAIN, _RLE, *_BY_DICTIONARY):
            raise ValueError(f"a page has {values} values in the encoding {encoding}")
        if kind == _DICTIONARY:
            encoding = _PLAIN
        yield _Page(kind, unpacked, values, encoding)


def _footer(data: bytes) -> dict[int, Any]:
    if len(data) < 12 or data[:4] != _MAGIC or data[-4:] != _MAGIC:
        raise ValueError("it is not Parquet")
    size = int.from_bytes(data[-8:-4], "little")
    if size > min(_FOOTER_BYTES, len(data) - 12):
        raise ValueError(f"its footer has {size} bytes")
    return _Thrift(data, len(data) - 8 - size).struct()


def _depths(schema: list[Any]) -> list[int]:
    """How deep each column lies; a schema nested a thousand times deep would take the stack of whoever reads it."""
    if len(schema) > _SCHEMA_ELEMENTS:
        raise ValueError("it has too many columns")
    depths, open_ = list[int](), [1]
    for element in schema:
        while open_ and open_[-1] == 0:
            open_.pop()
        if not open_:
            raise ValueError("its schema does not end where it should")
        open_[-1] -= 1
        children = _get(element, 5, int) if 5 in element else 0
        if children == 0:
            depths.append(len(open_) - 1)
        elif children < 0 or len(open_) > _DEEPEST:
            raise ValueError("its columns are nested too deeply")
        else:
            open_.append(children)
    if any(open_):
        raise ValueError("its schema does not end where it should")
    return depths


def _get(fields: Any, field: int, kind: type[_T]) -> _T:
    """A field of a struct, which must be there."""
    value = fields.get(field) if isinstance(fields, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"it lacks a field, {field}")
    return value


class _Thrift:
    """Reads Thrift's compact protocol."""

    _DEEPEST = 16

    def __init__(self, data: bytes, place: int) -> None:
        self._data = data
        self.place = place

    def _byte(self) -> int:
        if self.place >= len(self._data):
            raise ValueError("it is cut short")
        self.place += 1
        return self._data[self.place - 1]

    def _unsigned(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number has more than 64 bits")

    def _signed(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Field number → value. Given twice, the last one counts, as it does for every reader."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            fields[number] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int, *, in_list: bool = False) -> Any:
        if depth > self._DEEPEST:
            raise ValueError("it is nested too deeply")
        if kind in (1, 2):
            # Outside a list a truth value is its own type.
            return (self._byte() if in_list else kind) == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind in (7, 8):
            size = 8 if kind == 7 else self._unsigned()
            self.place += size
            return self._data[self.place - size : self.place]
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._unsigned()
            if count > len(self._data) - self.place:
                raise ValueError("a list is longer than the file")
            return [self._value(head & 15, depth + 1, in_list=True) for _ in range(count)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"it holds a value of the type {kind}")
