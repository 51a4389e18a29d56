"""`clvq explore`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Device, Force, Json, Seed, device_of, load_model, model_of, named, settings_of
from .terminal import print_json, progress_bars, put, say

if TYPE_CHECKING:
    from .cache.reader import Cache
    from .explorer.live import Live


def explore(
    cache: Annotated[str, typer.Argument(help="The cache that the runs were trained on: a folder, s3://… or hf://….")],
    runs: Annotated[list[Path], typer.Argument(help="One or more runs, of any sites; the first is shown first.")],
    out: Annotated[Path, typer.Option(help="Folder of the site; open its index.html.")],
    ablation: Annotated[
        Path | None, typer.Option(help="A folder that `clvq ablate` wrote: adds what happens without a concept.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the pages; else the model's name.")] = None,
    max_texts: Annotated[int, typer.Option(help="Texts that can be opened.")] = 5_000,
    rationale: Annotated[
        str | None, typer.Option(help="Kept field with what people marked as the reason, a part of the text.")
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for the charts as SVG and PNG.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the site, and remove concepts live.")] = False,
    model: Annotated[
        str | None, typer.Option(help="With --serve: the model's folder, where it is not from the Hub.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --serve: 0 takes a port that is free.")] = 8766,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Build pages that show the concepts: what they mean, where they act, what happens without them."""
    from .cache.sharing.remote import open_cache
    from .explorer.build import ExploreConfig
    from .explorer.build import explore as build

    opened = open_cache(cache)
    config = settings_of(ExploreConfig, title=title, max_texts=max_texts, rationale=rationale, seed=seed)
    labelled = named(runs)
    with progress_bars() as progress:
        result = build(opened, labelled, out, config, ablation=ablation, progress=progress, force=force)
    drawn = _draw(out, figures)
    if as_json:
        print_json(asdict(result) | ({} if figures is None else {"figures": drawn}))
    else:
        shown = ", ".join(f"{run.concepts:,} concepts of {run.name}" for run in result.runs)
        put(f"{result.path}: {shown}; {result.texts:,} of {result.texts_in_cache:,} texts; {result.bytes / 1e6:.1f} MB")
        if figures is not None:
            put(f"{figures}: {len(drawn)} files")
        put(f"open it: {result.path / 'index.html'}")
    if serve:
        _serve(opened, cache, labelled, out, model, port, device)


def _draw(site: Path, figures: Path | None) -> list[Path]:
    from .explorer.figures import write_figures

    return [] if figures is None else write_figures(site, figures)


def _serve(
    opened: "Cache", cache: str, runs: dict[str, Path], out: Path, model: str | None, port: int, device: str
) -> None:
    from .explorer.server import serve

    def ready(address: str) -> None:
        put(f"serving until Ctrl-C: {address}")
        sys.stdout.flush()

    serve(out, _live(opened, cache, runs, out, model, device), port=port, ready=ready)


def _live(
    opened: "Cache", cache: str, runs: dict[str, Path], out: Path, model: str | None, device: str
) -> "Live | None":
    """What answers about the model; `None` where no model is at hand."""
    from .explorer.folder import Site
    from .explorer.server import make_live
    from .pipeline.config import ExtractConfig
    from .pipeline.typed import read_typed

    identity: dict[str, Any] = opened.manifest.identity
    if model is None and identity["model"].get("commit") is None:
        say(
            f"the pages are served without the model, so that nothing can be removed: {cache} was made with the local "
            f"model {identity['model']['name']!r}; say where it is with --model FOLDER"
        )
        return None
    source = model_of(identity["model"], model, what=cache)
    loaded = load_model(source, identity["settings"], device=device_of(device))
    config = ExtractConfig.model_validate(identity["settings"])
    return make_live(
        Site.read(out), opened, runs, loaded, lambda owner, text, sites: read_typed(owner, config, text, sites)
    )
