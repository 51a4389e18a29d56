"""`clvq train`."""

import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .errors import ClvqError, ConfigError
from .options import Device, Force, Json, Seed, assignments, device_of, names, set_threads, settings_file
from .terminal import print_json, progress_bars, put, say, show

if TYPE_CHECKING:
    import torch

    from .cache.reader import Cache
    from .evaluation.compare import Compared, OverSeeds
    from .trainer.methods import PlainConfig, TrainedConfig
    from .trainer.sae_lens import ForeignSae
    from .trainer.sweep import Member

SWEEP = "sweep.json"
_COLUMNS = {
    "own_code_fvu": ("own-code FVU", ".4f"),
    "decoder_fvu_codes_only": ("decoder FVU", ".4f"),
    "perplexity": ("perplexity", ".1f"),
    "used_codes": ("used codes", ".1f"),
    "train_seconds": ("seconds", ".1f"),
}


def train(
    cache: Annotated[str, typer.Argument(help="The cache to train from: a folder, s3://… or hf://….")],
    lower: Annotated[str, typer.Option(help="Site that is mapped, such as 8.")],
    upper: Annotated[str, typer.Option(help="Site that it is mapped to, such as 12.")],
    out: Annotated[Path, typer.Option(help="The run to write; of a sweep, the folder for its runs.")],
    method: Annotated[
        str,
        typer.Option(help="clvq-vae, or a rival: vq-vae, kmeans, agglomerative, sae, cross-sae, pca, mean-difference."),
    ] = "clvq-vae",
    preset: Annotated[str, typer.Option(help="default, or paper for the published clvq-vae or vq-vae.")] = "default",
    codes: Annotated[int | None, typer.Option(min=2, help="Number of concepts; else 400, or 4,096 latents.")] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Folder of a sparse autoencoder that sae-lens saved, taken as it is instead of training one; with "
            "--method sae or cross-sae.",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="Splits to train on; else train, or the only one there is.")] = "",
    held_out: Annotated[str | None, typer.Option(help="Split to measure on; else a seeded 10 % of the texts.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file with settings, nested as in a run's config.json.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="One setting, such as fit.epochs=20.")] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="Runs with each of these values, such as codes=100,400; with more --sweep all combinations."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Each so many times: seed, seed + 1, …")] = 1,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at once; as many as there are cores for their threads, or 1 on a GPU."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Threads of torch; in a sweep of each run, on a CPU 1 where not given. On a CPU a run's bytes depend "
            "on it: those of a sweep are those of a lone run with the same --threads, whatever --jobs.",
        ),
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write figures for TensorBoard.")] = False,
    seed: Seed = 42,
    device: Device = "auto",
    shared: Annotated[Path | None, typer.Option(hidden=True)] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train concepts from a cache: CLVQ-VAE or a rival, or many of them (--sweep, --seeds). Run again to resume."""
    from .cache.sharing.remote import open_cache
    from .trainer.config import with_overrides
    from .trainer.methods import SaeConfig, method_config

    together = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    many = bool(sweep) or seeds > 1
    if together and many:
        raise ConfigError(
            "--sweep and --seeds train whole runs side by side: give them to one process, not to torchrun"
        )
    if jobs is not None and not many:
        raise ConfigError("--jobs is for several runs: give --sweep or --seeds too")
    if threads is not None:
        set_threads(threads)
    if source is not None and many:
        raise ConfigError("--from takes one autoencoder as it is: leave --sweep and --seeds out")
    opened = open_cache(cache)
    foreign = None
    if source is not None:
        foreign = _foreign(source, opened, method, lower, upper, codes)
        codes = foreign.latents
    resolved = method_config(
        method,
        preset=preset,
        lower=opened.site(lower),
        upper=opened.site(upper),
        codes=codes,
        classes=1 + max((label for label in opened.texts["label"].to_pylist() if label is not None), default=-1),
        split=tuple(names(split) or (["train"] if len(opened.manifest.splits) > 1 else opened.manifest.splits)),
        held_out=held_out,
        seed=seed,
    )
    if foreign is not None and isinstance(resolved, SaeConfig):
        resolved = foreign.settings(resolved)
    resolved = with_overrides(resolved, {**settings_file(config), **assignments(settings or [])})
    if not many:
        _train(opened, resolved, out, device, shared, foreign, tensorboard=tensorboard, force=force, as_json=as_json)
        return
    where = device_of(device)
    if where.type == "cpu":
        threads = threads or 1
    base = [cache, "--lower", lower, "--upper", upper, "--method", method, "--preset", preset]
    base += ["--split", split]
    base += [] if codes is None else ["--codes", str(codes)]
    base += ["--device", str(where)]
    base += [] if held_out is None else ["--held-out", held_out]
    base += [] if config is None else ["--config", str(config)]
    base += [word for setting in settings or [] for word in ("--set", setting)]
    base += [] if threads is None else ["--threads", str(threads)]
    base += [option for option, given in (("--tensorboard", tensorboard), ("--force", force)) if given]
    _sweep(opened, resolved, out, base, where, sweep or [], seeds=seeds, jobs=jobs, threads=threads, as_json=as_json)


def _foreign(folder: Path, cache: "Cache", method: str, lower: str, upper: str, codes: int | None) -> "ForeignSae":
    from .trainer.sae_lens import read

    found = read(folder, d_lower=cache.width(cache.site(lower)), d_upper=cache.width(cache.site(upper)))
    if method != found.method:
        raise ConfigError(f"--from {folder} is of --method {found.method}, and {method} is asked for")
    if codes not in (None, found.latents):
        raise ConfigError(f"--from {folder} has {found.latents} latents, and --codes {codes} is asked for")
    return found


def _train(
    cache: "Cache",
    config: "TrainedConfig | PlainConfig",
    out: Path,
    device: str,
    shared: Path | None,
    foreign: "ForeignSae | None",
    *,
    tensorboard: bool,
    force: bool,
    as_json: bool,
) -> None:
    from .trainer import ranks
    from .trainer.fit import fit

    if shared is not None:
        _stop_when_input_ends()
    with ranks.process_group(device_of(device)) as where, progress_bars(shown=ranks.number() == 0) as progress:
        result = fit(
            cache,
            config,
            out,
            device=where,
            progress=progress,
            force=force,
            tensorboard=tensorboard,
            shared=shared,
            foreign=foreign,
        )
        first = ranks.number() == 0
    if first:
        _draw(out)
        show({"path": result.path, "seconds": result.seconds, **result.report}, as_json=as_json, title="run")


def _draw(out: Path) -> None:
    """The run's figures; it is finished with or without them."""
    from .trainer.figures import write_figures

    try:
        write_figures(out)
    except (ClvqError, OSError, ValueError, ArithmeticError, RuntimeError) as error:
        say(f"the run is finished, but its figures could not be drawn: {error}")


def _stop_when_input_ends() -> None:
    """Be asked to stop when the sweep that started this process is gone, however it went."""

    def wait() -> None:
        # Not through `sys.stdin`: Python could not end while a thread waits there.
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _sweep(
    cache: "Cache",
    config: "TrainedConfig | PlainConfig",
    out: Path,
    base: list[str],
    device: "torch.device",
    sweep: list[str],
    *,
    seeds: int,
    jobs: int | None,
    threads: int | None,
    as_json: bool,
) -> None:
    from .cache.files import write_file
    from .cache.layout import to_json
    from .evaluation.compare import compare
    from .trainer.sweep import cores, members, train_all

    chosen = members(config, sweep, seeds=seeds)
    if jobs is None:
        jobs = max(1, cores() // (threads or 1)) if device.type == "cpu" else 1

    def command(member: "Member", folder: Path, shared: Path) -> list[str]:
        program = [sys.executable, "-P", "-m", "clvq.cli", "train", *base]
        own = [word for name, value in member.overrides().items() for word in ("--set", f"{name}={value}")]
        return [*program, *own, "--out", str(folder), "--shared", str(shared), "--json"]

    with progress_bars() as progress:
        failed = train_all(chosen, out, command, cache_id=cache.id, jobs=jobs, progress=progress)
        groups: dict[str, list[Member]] = {}
        for member in chosen:
            groups.setdefault(json.dumps(member.settings), []).append(member)
        finished = {
            name: [out / member.name for member in group if member.name not in failed] for name, group in groups.items()
        }
        compared = compare(cache, finished, progress=progress)
    rows = [
        {
            "settings": group[0].settings,
            "runs": [member.name for member in group if member.name not in failed],
            **asdict(compared[name]),
        }
        for name, group in groups.items()
    ]
    result = {"cache_id": cache.id, "rows": rows, "failed": failed}
    write_file(out / SWEEP, to_json(result))
    if as_json:
        print_json({"path": out, **result})
    else:
        _print_sweep(out, groups, compared, failed)
    if failed:
        name, why = next(iter(failed.items()))
        raise ClvqError(f"{len(failed)} of {len(chosen)} runs failed, the first of them {name}: {why}")


def _print_sweep(
    out: Path, groups: "dict[str, list[Member]]", compared: "dict[str, Compared]", failed: dict[str, str]
) -> None:
    swept = list(next(iter(groups.values()))[0].settings)
    headings = [heading for heading, _ in _COLUMNS.values()]
    table = Table(
        *swept, "seeds", *headings, "matched cosine", "AMI",
        title="means over seeds with 95 % t-intervals; agreement of all pairs of seeds",
        title_justify="left",
        box=SIMPLE_HEAD,
    )  # fmt: skip
    for name, group in groups.items():
        line, lost = compared[name], sum(member.name in failed for member in group)
        agreed = (line.directions, line.assignments)
        table.add_row(
            *(value if isinstance(value, str) else json.dumps(value) for value in group[0].settings.values()),
            f"{len(group) - lost}" + (f" ({lost} failed)" if lost else ""),
            *(_interval(line.figures.get(figure), form) for figure, (_, form) in _COLUMNS.items()),
            *("–" if stability is None else f"{stability.mean:.3f}" for stability in agreed),
        )
    put(table, whole=True)
    for name, why in failed.items():
        put(f"{name} failed: {why}")
    put(f"{out / SWEEP} holds this table as JSON")


def _interval(value: "OverSeeds | None", form: str) -> str:
    if value is None:
        return "–"
    interval = "" if value.low is None else f" [{value.low:{form}}, {value.high:{form}}]"
    return f"{value.mean:{form}}{interval}"
