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
    """Put all results below a folder into one report with tables and figures, as Markdown, HTML and JSON.

    Of a site that `clvq explore` wrote, the charts alone, as SVG and PNG.
    """
    from .evaluation.report import report as make_report
    from .explorer.folder import SITE

    if (folder / SITE).is_file():
        _charts(folder, out or folder.with_name(f"{folder.resolve().name}-charts"), as_json=as_json)
        return
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


def _charts(site: Path, out: Path, *, as_json: bool) -> None:
    from .explorer.figures import write_figures

    drawn = write_figures(site, out)
    if as_json:
        print_json({"path": out, "figures": drawn})
        return
    put(f"{out}: {len(drawn)} charts of {site}, as SVG and PNG")
