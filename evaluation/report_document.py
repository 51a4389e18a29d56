"""What a report consists of, whatever it is written as: sections of tables and charts, every number with its source."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

MISSING = "–"
_LONGEST = 160

INTRODUCTION = (
    "Each number in brackets stands for what made the numbers above it. A run's id is the first twelve hexadecimal "
    "digits of the SHA-256 of its model.safetensors. Commands are to be run in the folder that was reported on, $CACHE "
    "being a copy of the cache that the entry names, $MODEL the folder of the model that the cache was made with."
)


@dataclass(frozen=True)
class Source:
    """Where a number stands."""

    file: str
    """Relative to the folder that is reported on, with `/`."""
    pointer: str
    """JSON pointer (RFC 6901). The lines of a `.jsonl` file count as a list from 0 on."""


@dataclass(frozen=True)
class Number:
    """A printed number."""

    value: int | float
    text: str
    """As printed."""
    sources: tuple[Source, ...]
    rule: str = ""
    """How it follows from its sources; empty where it is the value that stands at the only one."""


@dataclass(frozen=True)
class Cell:
    """Text with numbers in it."""

    parts: tuple[str | Number, ...]

    @property
    def text(self) -> str:
        """As printed."""
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)

    @property
    def numbers(self) -> tuple[Number, ...]:
        """The numbers in it."""
        return tuple(part for part in self.parts if isinstance(part, Number))


@dataclass(frozen=True)
class Measured:
    """A number, with its interval where it has one."""

    value: Number
    low: Number | None = None
    high: Number | None = None

    @property
    def cell(self) -> Cell:
        """`0.123 [0.101, 0.140]`."""
        if self.low is None or self.high is None:
            return Cell((self.value,))
        return Cell((self.value, " [", self.low, ", ", self.high, "]"))


@dataclass(frozen=True)
class Table:
    """A table; every row has as many cells as there are columns."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    heads: int = 1
    """Columns, from the left, that say what a row is."""
    notes: tuple[Cell, ...] = ()


@dataclass(frozen=True)
class Series:
    """Points of one thing in a panel."""

    name: str
    control: bool
    """Drawn lighter: what something is compared with."""
    labels: tuple[str, ...]
    """Of the points, where they have names; else empty."""
    x: tuple[Measured, ...]
    y: tuple[Measured, ...]
    """Empty where the points have names: those stand on the other axis."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes: points by name (an interval for each), or y against x as lines from the origin."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    marked_x: Number | None = None
    """A vertical line, and what it is."""
    mark: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure."""

    name: str
    """Of its files, without the ending."""
    title: str
    caption: str
    panels: tuple[Panel, ...]

    @property
    def numbers(self) -> Iterator[Number]:
        """Everything that is drawn."""
        for panel in self.panels:
            if panel.marked_x is not None:
                yield panel.marked_x
            for series in panel.series:
                for point in (*series.x, *series.y):
                    yield from point.cell.numbers


@dataclass(frozen=True)
class Section:
    """A part of the report under one heading."""

    title: str
    text: tuple[Cell, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()


@dataclass(frozen=True)
class SourceFile:
    """A file that numbers come from."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Entry:
    """Provenance: what made the files that numbers come from."""

    number: int
    kind: str
    """`cache`, `run`, `ablation`, `quality` or `sweep`."""
    name: str
    """Folder, relative to the one that is reported on."""
    files: tuple[SourceFile, ...]
    cache_id: str | None
    runs: tuple[tuple[str, str], ...]
    """Name and run id of every run that takes part."""
    clvq: str | None
    """The version that made it; `None` where it is not recorded."""
    settings: tuple[tuple[str, str], ...]
    command: str | None
    """What makes it again; `None` where its settings do not say."""


@dataclass(frozen=True)
class LeftOut:
    """Something that looks like a result and is not in the report."""

    path: str
    why: str


@dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    clvq: str
    sections: tuple[Section, ...]
    entries: tuple[Entry, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def tables(self) -> list[Table]:
        """All tables, in the order in which they are numbered."""
        return [table for section in self.sections for table in section.tables]

    @property
    def charts(self) -> list[Chart]:
        """All figures, in the order in which they are numbered."""
        return [chart for section in self.sections for chart in section.charts]

    def entry_of(self, source: Source) -> int:
        """The number of the entry that a source belongs to."""
        return self._owners()[source.file]

    def entries_of(self, numbers: Iterable[Number]) -> list[int]:
        """The numbers of all entries that numbers come from, in order."""
        owners = self._owners()
        return sorted({owners[source.file] for number in numbers for source in number.sources})

    def _owners(self) -> dict[str, int]:
        return {file.file: entry.number for entry in self.entries for file in entry.files}


def table_numbers(table: Table) -> Iterator[Number]:
    """All numbers of a table and its notes."""
    for cell in (*(cell for row in table.rows for cell in row), *table.notes):
        yield from cell.numbers


def say(*parts: "str | Number | Cell | Measured") -> Cell:
    """A sentence with numbers in it."""
    flat: list[str | Number] = []
    for part in parts:
        if isinstance(part, Measured):
            flat += part.cell.parts
        elif isinstance(part, Cell):
            flat += part.parts
        else:
            flat.append(part)
    return Cell(tuple(flat))


def cell(value: "str | Number | Measured | None", mark: str = "") -> Cell:
    """A cell; what is missing is a dash."""
    if value is None or value == "":
        return Cell((MISSING,))
    found = say(value)
    return replace(found, parts=(*found.parts, mark)) if mark else found


def shown(text: str) -> str:
    """A stranger's text in one line, without signs that would steer a reader's screen, and not without end."""
    flat = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in " ".join(text.split()))
    return flat if len(flat) <= _LONGEST else f"{flat[: _LONGEST - 1]}…"


def distinct(rows: Iterable[tuple[Cell, ...]]) -> tuple[tuple[Cell, ...], ...]:
    """Rows without those that are printed like one before: two results may hold the same."""
    return tuple({tuple(cell.text for cell in row): row for row in reversed(list(rows))}.values())[::-1]


def listed(names: Iterable[str]) -> str:
    """Names with commas between them; a dash where there are none."""
    return ", ".join(names) or MISSING
