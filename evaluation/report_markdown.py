"""A report as Markdown (GitHub's)."""

import re
from collections.abc import Iterable, Sequence

from .report_document import INTRODUCTION, Cell, Document, Entry, Table, shown, table_numbers

_SIGNS = re.compile(r"([\\`*_\[\]<>|~&$])")


def markdown(document: Document, *, figures: str) -> str:
    """The whole report.

    Parameters
    ----------
    figures
        Folder of the figures, relative to the file.
    """
    lines = [f"# {escaped(document.title)}", ""]
    table_number = figure_number = 0
    for section in document.sections:
        lines += [f"## {escaped(section.title)}", ""]
        for cell in section.text:
            lines += [_prose(document, cell), ""]
        for chart in section.charts:
            figure_number += 1
            lines += [f"![Figure {figure_number}]({figures}/{chart.name}.svg)", ""]
            sources = references(document.entries_of(chart.numbers))
            lines += [f"**Figure {figure_number}.** {escaped(chart.caption)}. {sources}", ""]
        for table in section.tables:
            table_number += 1
            lines += [*_table(document, table, table_number), ""]
    lines += ["## Provenance", "", escaped(INTRODUCTION), ""]
    for entry in document.entries:
        lines += [*_entry(entry), ""]
    if document.left_out:
        lines += ["## Left out", ""]
        lines += [f"* {escaped(left.path)}: {escaped(left.why)}" for left in document.left_out]
        lines.append("")
    lines.append(f"Made by clvq {escaped(document.clvq)}. `report.json` has every number with its file and place.")
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown and HTML leave as it is."""
    return _SIGNS.sub(r"\\\1", text)


def _cell(cell: Cell) -> str:
    """Numbers have no signs that Markdown knows in a table, but for brackets, which begin no link there."""
    return "".join(
        escaped(part) if isinstance(part, str) and part not in (" [", "]") else _of(part) for part in cell.parts
    )


def _of(part: object) -> str:
    return part if isinstance(part, str) else str(getattr(part, "text", ""))


def _prose(document: Document, cell: Cell) -> str:
    found = references(document.entries_of(cell.numbers))
    return f"{_cell(cell)} {found}".rstrip()


def references(numbers: Sequence[int]) -> str:
    """Numbers of entries in brackets, those that follow each other as a range."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"[{first}]" if first == last else f"[{first}]–[{last}]" for first, last in ranges)


def _table(document: Document, table: Table, number: int) -> list[str]:
    caption = f"**Table {number}.** {escaped(table.caption)}. {references(document.entries_of(table_numbers(table)))}"
    rows = [f"| {' | '.join(map(escaped, table.columns))} |", f"|{'---|' * len(table.columns)}"]
    rows += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in table.rows]
    notes = [line for note in table.notes for line in ("", _cell(note))]
    return [caption.rstrip(), "", *rows, *notes]


def _entry(entry: Entry) -> list[str]:
    lines = [f"**[{entry.number}]** {entry.kind} {escaped(entry.name)}", ""]
    lines += [f"* {line}" for line in _facts(entry)]
    if entry.command is not None:
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", entry.command)), default=0))
        lines += ["", f"{fence}sh", entry.command, fence]
    return lines


def _facts(entry: Entry) -> Iterable[str]:
    yield "files: " + ", ".join(f"{escaped(shown(file.file))} (sha256 {file.sha256[:12]})" for file in entry.files)
    if entry.cache_id is not None:
        yield f"cache: {escaped(entry.cache_id)}"
    if entry.runs:
        yield "runs: " + ", ".join(f"{escaped(name)} {escaped(run)}" for name, run in entry.runs)
    if entry.clvq is not None:
        yield f"clvq {escaped(entry.clvq)}"
    if entry.settings:
        yield "settings: " + ", ".join(f"{escaped(name)} = {escaped(value)}" for name, value in entry.settings)
