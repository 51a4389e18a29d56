"""The quality measurements and sweeps of a folder."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError, FormatVersion
from .report_document import Chart, Measured, Number, Panel, Section, Series, Table, cell, distinct, listed, say, shown
from .report_files import Node
from .results import QUALITY_VERSION

_ATTRIBUTES = {"word": "word", "pos": "part of speech", "label": "label"}
_AGREEMENT = ("purity", "coverage", "ami")
_INFORMATION = {
    "words per concept": ("words per concept", ".1f"),
    "label beyond word": ("label beyond word, bits", "+.3f"),
    "label beyond word by chance": ("by chance, bits", "+.3f"),
}
_OVERLAP = {
    "f1": "token F1", "top1": "top row inside", "average_precision": "average precision",
    "set_precision": "concept's rows: precision", "set_recall": "concept's rows: recall",
    "set_f1": "concept's rows: F1",
}  # fmt: skip
_SWEEP = {
    "own_code_fvu": ("own-code FVU", ".4f"), "decoder_fvu_codes_only": ("decoder FVU", ".4f"),
    "perplexity": ("perplexity", ".1f"), "used_codes": ("used codes", ".1f"), "train_seconds": ("seconds", ",.1f"),
}  # fmt: skip
_DRAWN = {"word purity": "word purity", "label purity": "label purity", "label beyond word": "label beyond word, bits"}
_MOST_CONCEPTS = 10_000_000


@dataclass(frozen=True)
class Line:
    """A run or a baseline."""

    name: str
    method: str | None
    concepts: Number
    used: Number
    figures: Mapping[str, Measured | None]


@dataclass(frozen=True)
class OverlapLine:
    """A way of ordering rows."""

    name: str
    found: Mapping[str, Measured | None]
    over_word: Measured | None
    first_over: Measured | None


@dataclass(frozen=True)
class Seeds:
    """Runs that differ in their seed alone."""

    runs: tuple[str, ...]
    figures: Mapping[str, Measured | None]


@dataclass(frozen=True)
class Quality:
    """A `quality.json`."""

    folder: str
    file: str
    cache_id: str
    clvq: str
    settings: Node
    runs: Mapping[str, str]
    """Name → SHA-256 of the model, in the order in which they were given."""
    tagged: bool
    texts: Number
    rows: Number
    trained_texts: Number
    unseen: Number
    sites: tuple[str, ...]
    lines: tuple[Line, ...]
    seeds: tuple[Seeds, ...]
    overlap_texts: Number | None
    overlap: tuple[OverlapLine, ...]


def read_quality(folder: str, root: Node) -> Quality:
    """A `quality.json`.

    Raises
    ------
    DataError
        Where it is damaged.
    FormatVersion
        Where another version of clvq wrote it.
    """
    settings = root.at("settings")
    version = settings.find("version")
    if version is None or version.value != QUALITY_VERSION:
        raise FormatVersion(
            f"it is of format version {None if version is None else version.value!r}, and {QUALITY_VERSION} is read: "
            "run `clvq quality` again"
        )
    runs = settings.at("runs").members()
    overlap = root.find("overlap")
    return Quality(
        folder=folder,
        file=root.source.file,
        cache_id=settings.at("cache_id").text(),
        clvq=root.at("clvq").text(),
        settings=settings,
        runs={name.text(): runs[name.text()].at("sha256").text() for name in settings.at("order").each()},
        tagged=settings.find("tagger") is not None,
        texts=root.at("texts").number(","),
        rows=root.at("rows").number(","),
        trained_texts=root.at("trained_texts").number(","),
        unseen=root.at("unseen_words").number(".3f"),
        sites=tuple(site.text() for site in root.at("sites").each()),
        lines=tuple(_line(node) for node in root.at("lines").each()),
        seeds=tuple(
            Seeds(
                tuple(name.text() for name in node.at("runs").each()),
                {
                    name: value.estimate(_form(name), middle="mean")
                    for name, value in node.at("figures").members().items()
                },
            )
            for node in root.at("seeds").each()
        ),
        overlap_texts=None if overlap is None else overlap.at("texts").number(","),
        overlap=() if overlap is None else tuple(_overlap_line(node) for node in overlap.at("lines").each()),
    )


def _form(figure: str) -> str:
    return _INFORMATION.get(figure, ("", ".3f"))[1]


def _line(node: Node) -> Line:
    method = node.find("method")
    return Line(
        name=node.at("name").text(),
        method=None if method is None else method.text(),
        concepts=node.at("concepts").number(","),
        used=node.at("used").number(","),
        figures={name: value.estimate(_form(name)) for name, value in node.at("figures").members().items()},
    )


def _overlap_line(node: Node) -> OverlapLine:
    def less(key: str) -> Measured | None:
        found = node.find(key)
        return None if found is None else found.measured("average_precision", "+.3f")

    found = {name: value.estimate(".3f") for name, value in node.at("found").members().items()}
    return OverlapLine(node.at("name").text(), found, less("over_word"), less("first_run_over_this"))


def main_words(file: Path, quality: Quality) -> dict[tuple[str, int], str]:
    """The main word of each concept, by the run's SHA-256 and the concept's number, from `concepts.parquet`.

    Raises
    ------
    DataError
        Where the table is damaged or another one.
    """
    try:
        # The file is a stranger's: its own count of rows is asked before they are read.
        if pq.read_metadata(file).num_rows > _MOST_CONCEPTS:
            raise DataError(f"it has more than {_MOST_CONCEPTS:,} rows, more than any runs have concepts")
        table = pq.read_table(file, columns=["run", "concept", "main_word"])
        rows = table.to_pylist()
        return {
            (quality.runs[row["run"]], int(row["concept"])): str(row["main_word"])
            for row in rows
            if row["run"] in quality.runs and row["main_word"] is not None
        }
    except (pa.ArrowException, OSError, TypeError, KeyError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"it is damaged: {error}") from error


def together(qualities: Sequence[Quality]) -> list[list[Quality]]:
    """The measurements of one cache with the same settings, whatever runs they are of."""
    groups: dict[tuple[str, str], list[Quality]] = {}
    for quality in qualities:
        settings = repr((quality.settings.at("config").value, quality.tagged))
        groups.setdefault((quality.cache_id, settings), []).append(quality)
    return list(groups.values())


def quality_section(number: int, qualities: Sequence[Quality]) -> Section:
    """All tables of measurements that belong together, and a figure."""
    text = [say(f"Cache {shown(qualities[0].cache_id[:12])}. Intervals of 95 % over texts.")]
    for quality in qualities:
        text.append(
            say(
                f"In {shown(quality.folder)}: ", quality.texts, " texts, ", quality.rows, " rows; a share of ",
                quality.unseen, " of the rows says a word that no training row has.",
            )
        )  # fmt: skip
        if quality.trained_texts.value:
            text.append(say("Trained on: ", quality.trained_texts, " of these texts. The figures flatter the runs."))
    agreement = {
        f"{attribute} {figure}": f"{name}: {'AMI' if figure == 'ami' else figure}"
        for attribute, name in _ATTRIBUTES.items()
        for figure in _AGREEMENT
    }
    layers = {
        f"{kind} {site}": f"{heading} {shown(site)}"
        for kind, heading in (("r2", "R²"), ("closeness", "closeness"))
        for site in dict.fromkeys(site for quality in qualities for site in quality.sites)
    }
    lines = _named_lines(qualities)
    tables = [
        _figures_table(lines, agreement, "Concepts against words, parts of speech and labels"),
        _figures_table(
            lines, {name: heading for name, (heading, _) in _INFORMATION.items()},
            "What concepts say beyond words: information about the label, less what it is by chance",
        ),
        _figures_table(lines, layers, "Coherence: what concepts tell of the layers"),
        _overlap_table(qualities),
        *_seed_tables(qualities),
    ]  # fmt: skip
    return Section(
        f"Quality {number}",
        tuple(text),
        tuple(table for table in tables if table is not None),
        _chart(number, lines),
    )


def _named_lines(qualities: Sequence[Quality]) -> dict[str, Line]:
    """Lines by name; where measurements mean different things by a name, with their folders."""
    printed: dict[str, set[tuple[str, ...]]] = {}
    for quality in qualities:
        for line in quality.lines:
            printed.setdefault(line.name, set()).add(_printed(line))
    return {
        shown(line.name) if len(printed[line.name]) == 1 else f"{shown(line.name)} ({shown(quality.folder)})": line
        for baseline in (False, True)
        for quality in qualities
        for line in quality.lines
        if (line.method is None) == baseline
    }


def _printed(line: Line) -> tuple[str, ...]:
    return (*(f"{name} {cell(found).text}" for name, found in sorted(line.figures.items())), str(line.method))


def _figures_table(lines: Mapping[str, Line], columns: Mapping[str, str], caption: str) -> Table | None:
    there = [name for name in columns if any(line.figures.get(name) is not None for line in lines.values())]
    if not there:
        return None
    rows = tuple(
        (
            cell(name),
            cell("baseline" if line.method is None else shown(line.method)),
            cell(line.concepts),
            cell(line.used),
            *(cell(line.figures.get(figure)) for figure in there),
        )
        for name, line in lines.items()
    )
    return Table(caption, ("concepts of", "method", "concepts", "used", *(columns[name] for name in there)), rows)


def _overlap_table(qualities: Sequence[Quality]) -> Table | None:
    found = [(quality, line) for quality in qualities for line in quality.overlap]
    if not found:
        return None
    rows = [
        (
            cell(shown(line.name)),
            *(cell(line.found.get(name)) for name in _OVERLAP),
            cell(line.over_word),
            *((cell(line.first_over),) if len(qualities) == 1 else ()),
        )
        for _, line in found
    ]
    columns = (
        "rows by", *_OVERLAP.values(), "average precision − word's",
        *(("first run's − this",) if len(qualities) == 1 else ()),
    )  # fmt: skip
    notes = tuple(
        say(f"In {shown(quality.folder)}: ", quality.overlap_texts, " texts with a rationale and a prediction.")
        for quality in qualities
        if quality.overlap_texts is not None
    )
    caption = "Overlap of concepts that speak for the prediction with human rationales"
    return Table(caption, columns, distinct(rows), notes=notes)


def _seed_tables(qualities: Sequence[Quality]) -> Iterator[Table]:
    groups = [group for quality in qualities for group in quality.seeds]
    names = list(dict.fromkeys(name for group in groups for name in group.figures))
    if not names:
        return
    rows = tuple((cell(shown(name)), *(cell(group.figures.get(name)) for group in groups)) for name in names)
    columns = ("figure", *(listed(map(shown, group.runs)) for group in groups))
    yield Table("Means over seeds, with 95 % intervals by Student's t", columns, rows)


def _chart(number: int, lines: Mapping[str, Line]) -> tuple[Chart, ...]:
    panels = []
    for figure, heading in _DRAWN.items():
        series = []
        for baseline in (False, True):
            known = [
                (name, found)
                for name, line in lines.items()
                if (line.method is None) == baseline and (found := line.figures.get(figure)) is not None
            ]
            if known:
                names, points = tuple(name for name, _ in known), tuple(found for _, found in known)
                series.append(Series("baseline" if baseline else "run", baseline, names, points, ()))
        if series:
            panels.append(Panel(heading, "", "", tuple(series)))
    if not panels:
        return ()
    caption = (
        "Agreement of concepts with words and labels, and information about the label beyond the word; 95 % intervals"
    )
    return (Chart(f"quality-{number}", "Quality of concepts", caption, tuple(panels)),)


@dataclass(frozen=True)
class Sweep:
    """A `sweep.json`."""

    folder: str
    file: str
    cache_id: str
    settings: tuple[Mapping[str, Node], ...]
    """What is swept, of each row."""
    runs: tuple[tuple[str, ...], ...]
    failed: int
    table: Table


def read_sweep(folder: str, root: Node) -> Sweep:
    """A `sweep.json`.

    Raises
    ------
    DataError
        Where it is damaged.
    """
    rows = root.at("rows").each()
    settings = tuple(row.at("settings").members() for row in rows)
    swept = list(dict.fromkeys(name for row in settings for name in row))
    cells = []
    for row, own in zip(rows, settings, strict=True):
        figures = row.at("figures")
        known = [figures.find(name) for name in _SWEEP]
        agreed = [row.find(name) for name in ("directions", "assignments")]
        cells.append(
            (
                *(cell(_setting(own.get(name))) for name in swept),
                cell(listed(shown(run.text()) for run in row.at("runs").each())),
                *(
                    cell(None if node is None else node.estimate(form, middle="mean"))
                    for node, (_, form) in zip(known, _SWEEP.values(), strict=True)
                ),
                *(cell(None if node is None else node.at("mean").number(".3f")) for node in agreed),
            )
        )
    headings = tuple(heading for heading, _ in _SWEEP.values())
    columns = (*(shown(name) for name in swept), "runs", *headings, "matched cosine", "AMI of assignments")
    failed = root.at("failed").members()
    notes = tuple(say(f"The run {shown(name)} failed: {shown(why.text())}") for name, why in failed.items())
    caption = f"Sweep {shown(folder)}: means over seeds with 95 % intervals by Student's t; agreement of pairs of seeds"
    return Sweep(
        folder=folder,
        file=root.source.file,
        cache_id=root.at("cache_id").text(),
        settings=settings,
        runs=tuple(tuple(run.text() for run in row.at("runs").each()) for row in rows),
        failed=len(failed),
        table=Table(caption, columns, tuple(cells), heads=len(swept) + 1, notes=notes),
    )


def _setting(node: Node | None) -> "str | Number | None":
    if node is None:
        return None
    return (
        node.number("g")
        if isinstance(node.value, int | float) and not isinstance(node.value, bool)
        else shown(str(node.value))
    )


def sweep_section(sweeps: Sequence[Sweep]) -> Section:
    """All sweeps."""
    return Section("Sweeps", tables=tuple(sweep.table for sweep in sweeps))
