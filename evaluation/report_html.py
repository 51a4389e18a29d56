"""A report as one HTML page that needs nothing else."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from .report_document import INTRODUCTION, Cell, Document, Number, shown, table_numbers

TEMPLATE = "report.html.jinja"


def html(document: Document, images: Mapping[str, bytes]) -> str:
    """The whole report; text from results is escaped wherever it stands.

    Parameters
    ----------
    images
        Name of each chart → its SVG. They stand in the page as data, so that no sign of theirs mixes with it.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE).render(
        document=document,
        introduction=INTRODUCTION,
        table_number=lambda table: 1 + _place(document.tables, table),
        chart_number=lambda chart: 1 + _place(document.charts, chart),
        entries_of_table=lambda table: document.entries_of(table_numbers(table)),
        entries_of_chart=lambda chart: document.entries_of(chart.numbers),
        shown=shown,
        pieces=lambda cell: pieces(document, cell),
        images={name: base64.b64encode(data).decode("ascii") for name, data in images.items()},
    )


def _place(these: Sequence[object], one: object) -> int:
    return next(number for number, other in enumerate(these) if other is one)


def pieces(document: Document, cell: Cell) -> list[tuple[str, int | None, str]]:
    """Text, the entry that it links to, and where it comes from; a number with its interval is one piece."""
    found: list[tuple[str, int | None, str]] = []
    parts = list(cell.parts)
    while parts:
        part = parts.pop(0)
        if isinstance(part, str):
            found.append((part, None, ""))
            continue
        numbers, text = [part], part.text
        if len(parts) >= 5 and parts[0] == " [" and parts[2] == ", ":
            interval, parts = parts[:5], parts[5:]
            text += "".join(one if isinstance(one, str) else one.text for one in interval)
            numbers += [one for one in interval if isinstance(one, Number)]
        found.append((text, document.entry_of(part.sources[0]), where(numbers)))
    return found


def where(numbers: list[Number]) -> str:
    """File and place of numbers, the ends of an interval left out, and how they follow from there."""
    places = list(
        dict.fromkeys(f"{source.file} {source.pointer}" for number in numbers[:1] for source in number.sources)
    )
    rule = f"{numbers[0].rule}: " if numbers[0].rule else ""
    return shown(rule + "; ".join(places))
