"""What a Parquet file will take in memory when it is read, found without decompressing any of it.

A few kilobytes of zstd, one long string in a dictionary or a prefix to be repeated can stand for terabytes, and what
the file's footer says of sizes is believed by nobody who decodes: only the header of each page counts. Pages have
headers in Thrift's compact protocol, and so has the footer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_FOOTER_BYTES = 1 << 20
_SCHEMA_ELEMENTS = 1_000
_MAGIC = b"PAR1"
_DATA, _INDEX, _DICTIONARY, _DATA_V2 = range(4)
_PLAIN, _RLE, _BY_DICTIONARY = 0, 3, (2, 8)


def memory(data: bytes) -> int:
    """Bytes that all columns take at most, each of their pages and all of their values.

    Raises
    ------
    ValueError
        Where the file uses what `texts.parquet` does not.
    pyarrow.ArrowException
        Where it is not Parquet.
    """
    _check_footer(data)
    metadata = pq.read_metadata(pa.BufferReader(data))
    if not (metadata.created_by or "").startswith("parquet-cpp-arrow ") or metadata.metadata:
        raise ValueError("it was not written by clvq")
    total = 0
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column, levels = metadata.row_group(group).column(number), metadata.schema.column(number)
            if column.num_values == 0:
                continue
            if column.file_path:
                raise ValueError("it refers to another file")
            start = column.data_page_offset
            if column.has_dictionary_page:
                start = min(start, column.dictionary_page_offset or start)
            pages = list(_pages(data, start, column.total_compressed_size))
            strings = column.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
            longest = sum(page.bytes for page in pages if page.kind == _DICTIONARY) if strings else 0
            of_value = 8 * (1 + levels.max_definition_level + levels.max_repetition_level)
            for page in pages:
                total += page.bytes + page.values * (of_value + longest * (page.encoding in _BY_DICTIONARY))
    return total


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
        kind, unpacked, packed = (header.get(field, -1) for field in (1, 2, 3))
        place = thrift.place + packed
        if min(unpacked, packed) < 0 or place > end:
            raise ValueError("a page lies outside its column")
        own = {_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}.get(kind)
        if own is None:
            raise ValueError(f"a page is of the kind {kind}")
        inner = header.get(own, {})
        values, encoding = inner.get(1, -1), inner.get(4 if kind == _DATA_V2 else 2, -1)
        if values < 0 or encoding not in (_PLAIN, _RLE, *_BY_DICTIONARY):
            raise ValueError(f"a page has {values} values in the encoding {encoding}")
        if kind == _DICTIONARY:
            encoding = _PLAIN
        yield _Page(kind, unpacked, values, encoding)


def _check_footer(data: bytes) -> None:
    """A schema nested a thousand times deep would take the stack of whoever reads it."""
    if len(data) < 12 or data[:4] != _MAGIC or data[-4:] != _MAGIC:
        raise ValueError("it is not Parquet")
    size = int.from_bytes(data[-8:-4], "little")
    if size > min(_FOOTER_BYTES, len(data) - 12):
        raise ValueError(f"its footer has {size} bytes")
    elements = _Thrift(data, len(data) - 8 - size).struct().get(2)
    if not isinstance(elements, list) or len(elements) > _SCHEMA_ELEMENTS:
        raise ValueError("it has too many columns")


class _Thrift:
    """Reads Thrift's compact protocol: numbers, lists and structs; the contents of strings are passed over."""

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
            return None
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._unsigned()
            if count > len(self._data) - self.place:
                raise ValueError("a list is longer than the file")
            return [self._value(head & 15, depth + 1, in_list=True) for _ in range(count)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"it holds a value of the type {kind}")
