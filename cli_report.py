"""`clvq report`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import Json
from .terminal import print_json, put, say


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with runs, ablations and other results.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the report; else `report` in DIR.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the report.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what --out holds of another report.")] = False,
    as_json: Json = False,
) -> None:
    """Put all results below a folder into one report with tables and figures, as Markdown, HTML and JSON."""
    from .evaluation.report import report as make_report

    result = make_report(folder, out, title=title, force=force)
    for left in result.left_out:
        say(f"left out: {left.path}: {left.why}")
    if as_json:
        print_json(asdict(result))
        return
    put(
        f"{result.path} holds a report of {result.runs:,} runs, {result.ablations:,} ablations, {result.qualities:,} "
        f"quality measurements and {result.sweeps:,} sweeps: {result.tables:,} tables with {result.numbers:,} numbers, "
        f"{result.figures:,} figures"
    )
    put("report.html and report.md are for people; report.json has every number with its file and place")
