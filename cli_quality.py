"""`clvq quality`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .errors import MissingExtra
from .options import Force, Json, Seed, named, names, settings_of
from .terminal import print_json, printable, progress_bars, put, say

if TYPE_CHECKING:
    from .evaluation.bootstrap import Estimate
    from .evaluation.compare import OverSeeds
    from .evaluation.overlap import OverlapResult
    from .evaluation.quality import QualityResult, SeedGroup
    from .evaluation.tagging import Tagger

# Columns and the figures in them; one without a figure is left out.
_CONTENT = {
    "word purity": "word purity",
    "words per concept": "words per concept",
    "POS purity": "pos purity",
    "POS AMI": "pos ami",
    "label purity": "label purity",
    "label AMI": "label ami",
    "label beyond word, bits": "label beyond word",
}
_OVERLAP = {
    "token F1": "f1",
    "top row inside": "top1",
    "average precision": "average_precision",
    "concept's rows: precision": "set_precision",
    "recall": "set_recall",
    "F1": "set_f1",
}


def quality(
    cache: Annotated[str, typer.Argument(help="The cache that the runs were trained on: a folder, s3://… or hf://….")],
    runs: Annotated[list[Path], typer.Argument(help="One or more runs.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    split: Annotated[str, typer.Option(help="Splits to evaluate; else the texts that the runs held out.")] = "",
    rationale: Annotated[
        str | None, typer.Option(help="Kept field with the rationale of each text, such as evidence.")
    ] = None,
    pos: Annotated[
        bool | None, typer.Option(help="Parts of speech, for English texts; where the extra `pos` is installed.")
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure concepts against words, parts of speech, labels, the upper layer and human rationales."""
    from .cache.sharing.remote import open_cache
    from .evaluation.quality import QualityConfig
    from .evaluation.quality import quality as measure

    opened = open_cache(cache)
    config = settings_of(QualityConfig, split=tuple(names(split)), rationale=rationale, seed=seed)
    tagger = None if pos is False else _tagger(asked=pos is True)
    labelled = named(runs)
    with progress_bars() as progress:
        result = measure(opened, labelled, out, config, tagger=tagger, progress=progress, force=force)
    if as_json:
        print_json(asdict(result))
    else:
        _print(result)


def _tagger(*, asked: bool) -> "Tagger | None":
    from .evaluation.tagging import load_tagger

    try:
        return load_tagger()
    except MissingExtra as error:
        if asked:
            raise
        say(f"without parts of speech: {error}")
        return None


def _print(result: "QualityResult") -> None:
    title = f"{result.texts:,} texts, {result.rows:,} rows; 95 % intervals over texts"
    content = {name: figure for name, figure in _CONTENT.items() if figure in result.lines[0].figures}
    sites = {f"{kind} {site}": f"{figure} {site}" for kind, figure in (("R²", "r2"), ("closeness", "closeness"))
             for site in result.sites}  # fmt: skip
    for columns in (content, sites):
        table = Table("concepts", "used", *columns, title=title, box=SIMPLE_HEAD, title_justify="left")
        baselines = False
        for line in result.lines:
            if line.method is None and not baselines:
                table.add_section()
                baselines = True
            cells = [_cell(line.figures[figure], figure) for figure in columns.values()]
            table.add_row(printable(line.name), f"{line.used:,}", *cells)
        put(table, whole=True)
    for group in result.seeds:
        _print_seeds(group, content | sites)
    if result.overlap is not None:
        _print_overlap(result.overlap)
    put(f"{result.path} holds every figure as JSON, and a table of the concepts")
    put(
        f"{result.unseen_words:.1%} of the rows say a word that no training row has: it is the main word of no concept."
    )
    if result.trained_texts:
        put(f"{result.trained_texts:,} of these texts were trained on: the figures flatter the runs.")


def _print_seeds(group: "SeedGroup", columns: Mapping[str, str]) -> None:
    title = f"mean over {len(group.runs)} seeds ({', '.join(map(printable, group.runs))}), 95 % by Student's t"
    table = Table("figure", "mean", title=title, box=SIMPLE_HEAD, title_justify="left")
    for name, figure in columns.items():
        if figure in group.figures:
            table.add_row(name, _seed_cell(group.figures[figure], figure))
    put(table, whole=True)


def _print_overlap(result: "OverlapResult") -> None:
    title = f"rationales of {result.texts:,} texts; 95 % intervals, paired by text"
    table = Table(
        "rows by", *_OVERLAP, "average precision − word", "first run − this",
        title=title, box=SIMPLE_HEAD, title_justify="left",
    )  # fmt: skip
    runs = [line for line in result.lines if line.over_word is not None]
    baselines = [line for line in result.lines if line.over_word is None]
    for part in (runs, baselines):
        table.add_section()
        for line in part:
            cells = [_interval(line.found[name]) if name in line.found else "–" for name in _OVERLAP.values()]
            for less in (line.over_word, line.first_run_over_this):
                cells.append("–" if less is None else _interval(less["average_precision"], "+.3f"))
            table.add_row(printable(line.name), *cells)
    put(table, whole=True)
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in result.left_out.items())
    put(f"texts left out: {left_out or 'none'}")


def _form(figure: str) -> str:
    return {"label beyond word": "+.3f", "words per concept": ".1f"}.get(figure, ".3f")


def _cell(value: "Estimate", figure: str) -> str:
    return _interval(value, _form(figure))


def _seed_cell(value: "OverSeeds", figure: str) -> str:
    bounds = () if value.low is None or value.high is None else (value.low, value.high)
    return _bounds(value.mean, bounds, _form(figure))


def _interval(value: "Estimate", form: str = ".3f") -> str:
    return _bounds(value.value, (value.low, value.high), form)


def _bounds(value: float, bounds: Sequence[float], form: str) -> str:
    if math.isnan(value):
        return "–"
    if not bounds or any(map(math.isnan, bounds)):
        return f"{value:{form}}"
    return f"{value:{form}} [{', '.join(f'{bound:{form}}' for bound in bounds)}]"
