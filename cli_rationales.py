"""`clvq rationales`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Json, Seed, names
from .terminal import interval, print_json, printable, put, titled

if TYPE_CHECKING:
    from .evaluation.rationales import RationaleResult

_SHOWN = {"f1": "token F1", "top1": "top row inside", "average_precision": "average precision"}


def rationales(
    caches: Annotated[list[str], typer.Argument(help="Caches of the same texts, extracted with --saliency.")],
    field: Annotated[str, typer.Option(help="Kept field with the rationale, a part of the text.")] = "evidence",
    split: Annotated[str, typer.Option(help="Splits to compare, such as dev; all where not given.")] = "",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare the saliency of words with the words that people say the label rests on."""
    from .cache.sharing.remote import open_cache
    from .evaluation.rationales import compare_rationales

    short = [Path(name).name for name in caches]
    called = short if len(set(short)) == len(short) else caches
    opened = {name: open_cache(path) for name, path in zip(called, caches, strict=True)}
    result = compare_rationales(opened, field, splits=names(split), seed=seed)
    if as_json:
        print_json(asdict(result))
    else:
        _print(result)


def _print(result: "RationaleResult") -> None:
    several = any(line.over_first_cache for line in result.lines)
    columns = ["cache", "score", *_SHOWN.values(), "precision − random"]
    columns += ["precision − first cache"] if several else []
    title = f"{result.texts:,} texts, means with 95 % bootstrap intervals, paired by text"
    table = titled(columns, title)
    before = ""
    for line in result.lines:
        if before not in ("", line.cache):
            table.add_section()
        before = line.cache
        cells = [printable(line.cache), line.score, *(interval(line.found[metric]) for metric in _SHOWN)]
        differences = [line.over_random, *([line.over_first_cache] if several else [])]
        cells += ["–" if values is None else interval(values["average_precision"], "+.3f") for values in differences]
        table.add_row(*cells)
    put(table, whole=True)
    out = ", ".join(f"{count:,} {reason}" for reason, count in result.left_out.items())
    put(f"texts left out: {out}")
