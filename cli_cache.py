"""The commands `clvq cache …`: parse, call one function, print."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from .errors import ConfigError
from .options import Device, Force, Json, device_of, load_model, model_of, names
from .terminal import progress_bars, say, show

if TYPE_CHECKING:
    from .cache.statistics import EncodingLoss
    from .cache.verify import Problem

cache_app = typer.Typer(
    help="Look at caches, check and mend them, share them.", no_args_is_help=True, rich_markup_mode=None
)


@cache_app.command()
def info(
    path: Annotated[str, typer.Argument(help="The cache: a folder, s3://… or hf://….")], as_json: Json = False
) -> None:
    """What a cache holds and how it was made."""
    from .cache.sharing.remote import manifest_of

    manifest, cache_id = manifest_of(path)
    plain = manifest.model_dump(mode="json")
    sites = {
        name: f"{site.width} × {site.encoding}, error {site.loss.relative_l2:.2g}, "
        f"median norm {site.statistics.norm_quantile(0.5):.3g}"
        for name, site in manifest.sites.items()
    }
    figures = {
        "cache_id": cache_id,
        "parent": manifest.parent,
        **{key: plain["geometry"][key] for key in ("rows", "texts", "shards")},
        "bytes": sum(entry.bytes for entry in manifest.entries.values()),
        "splits": {name: f"{part.texts:,} texts, {part.rows:,} rows" for name, part in manifest.splits.items()},
        "sites": sites,
        **({"convergence_delta": plain["convergence"]} if manifest.convergence else {}),
        "class_names": manifest.class_names,
        "counts": manifest.counts,
        **manifest.identity,
    }
    show(figures, as_json=as_json, title=str(path))


@cache_app.command()
def verify(path: Annotated[Path, typer.Argument(help="The cache.")], as_json: Json = False) -> None:
    """Check every byte of a cache against its manifest; exit 1 where one differs."""
    from .cache.verify import verify as run_verify

    with progress_bars() as progress:
        result = run_verify(path, progress=progress)
    figures = asdict(result)
    if not as_json:
        figures["problems"] = _lines(result.problems)
    show(figures, as_json=as_json, title=str(path))
    if result.problems:
        say(f"error: {path} has {_count(result.problems)}; `clvq cache repair` makes damaged files anew")
        raise typer.Exit(1)


@cache_app.command()
def repair(
    path: Annotated[Path, typer.Argument(help="The cache.")],
    url: Annotated[str | None, typer.Argument(help="Where a whole copy is: a folder, s3://… or hf://….")] = None,
    model: Annotated[str | None, typer.Option(help="The model's folder; needed where it is not from the Hub.")] = None,
    data: Annotated[str | None, typer.Option(help="The texts that it was made from, as given to extract.")] = None,
    accept_new_bytes: Annotated[
        bool,
        typer.Option("--accept-new-bytes", help="Where a shard comes out otherwise, give the cache a new id."),
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Make the damaged and missing files of a cache anew, and no others.

    They are fetched from a whole copy where URL is given, else computed again from --model and --data.
    """
    from .cache.layout import read_manifest
    from .cache.repair import refetch
    from .cache.repair import repair as run_repair
    from .pipeline.remake import Extractor

    if url is not None and (data is not None or accept_new_bytes):
        raise ConfigError("a copy to fetch from was given, and --data or --accept-new-bytes too: give one or the other")
    where = device_of(device)
    with progress_bars() as progress:
        if url is not None:
            result = refetch(path, url, progress=progress)
        else:
            remake = None
            if data is not None:
                manifest, _ = read_manifest(path)
                identity: dict[str, Any] = manifest.identity
                source = model_of(identity["model"], model, what=str(path))
                remake = Extractor(
                    manifest,
                    source,
                    data,
                    lambda: load_model(source, identity["settings"], device=where),
                    progress=progress,
                )
            result = run_repair(path, remake, accept_new_bytes=accept_new_bytes, progress=progress)
    figures = asdict(result)
    if not as_json:
        figures["problems"] = _lines(result.problems)
    show(figures, as_json=as_json, title=str(path))
    if result.problems:
        say(f"error: {path} still has {_count(result.problems)}: what does not belong to the cache is not touched")
        raise typer.Exit(1)


@cache_app.command()
def recode(
    path: Annotated[Path, typer.Argument(help="The cache.")],
    out: Annotated[Path, typer.Option(help="The cache to write.")],
    encoding: Annotated[str, typer.Option(help="bf16, fp16, fp32 or int8.")],
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a cache again with another encoding, without the model. Run again to resume."""
    from .cache.layout import Encoding
    from .cache.reader import Cache
    from .cache.recode import recode as run_recode

    if encoding not in get_args(Encoding):
        raise ConfigError(f"--encoding {encoding}: give {', '.join(get_args(Encoding))}")
    with progress_bars() as progress:
        result = run_recode(Cache(path), out, cast(Encoding, encoding), progress=progress, force=force)
    figures = {name: value for name, value in vars(result).items() if name != "losses"}
    figures["losses"] = {name: _loss(loss) for name, loss in result.losses.items()}
    show(figures, as_json=as_json, title=str(out))


@cache_app.command()
def push(
    path: Annotated[Path, typer.Argument(help="The cache.")],
    url: Annotated[str, typer.Argument(help="A folder, s3://bucket/prefix, or hf://user/name.")],
    without_texts: Annotated[
        bool, typer.Option("--without-texts", help="Leave out texts, words and tokens; the copy gets its own id.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see a Hub repository made by this.")] = False,
    as_json: Json = False,
) -> None:
    """Send a cache to where others can pull it from. Run again to resume."""
    from .cache.sharing.push import push as run_push

    with progress_bars() as progress:
        result = run_push(path, url, without_texts=without_texts, public=public, progress=progress)
    show(asdict(result), as_json=as_json, title=result.url)


@cache_app.command()
def pull(
    url: Annotated[str, typer.Argument(help="A folder, s3://bucket/prefix, or hf://user/name[@revision].")],
    path: Annotated[Path, typer.Argument(help="Folder of the copy.")],
    sites: Annotated[str, typer.Option(help="Only these sites, such as 8,12.")] = "",
    split: Annotated[str, typer.Option(help="Only these splits, such as train,dev.")] = "",
    manifest_only: Annotated[bool, typer.Option("--manifest-only", help="No texts and no vectors.")] = False,
    as_json: Json = False,
) -> None:
    """Fetch a cache, or a part of it, every byte checked. Run again to resume, to mend, or to fetch more."""
    from .cache.sharing.pull import pull as run_pull

    with progress_bars() as progress:
        result = run_pull(
            url,
            path,
            sites=names(sites) or None,
            splits=names(split) or None,
            manifest_only=manifest_only,
            progress=progress,
        )
    figures = dict(vars(result))
    held = figures.pop("selection")
    figures["holds"] = {"sites": held.sites, "splits": held.splits} if held else "everything"
    show(figures, as_json=as_json, title=str(path))


def _loss(loss: "EncodingLoss") -> dict[str, float]:
    return {
        "relative_error": loss.relative_l2,
        "median_row": loss.median_row,
        "worst_row": loss.worst_row,
        "one_minus_cosine": 1 - loss.mean_cosine,
        "values_lost": loss.lost_share,
    }


def _lines(problems: "list[Problem]") -> list[str]:
    return [f"{problem.file} {problem.found}" for problem in problems]


def _count(problems: "list[Problem]") -> str:
    return f"{len(problems)} problem{'s' * (len(problems) > 1)}"
