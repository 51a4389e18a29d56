"""The `clvq` command: parse, call one function, print."""

import io
import logging
import math
import os
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from . import __version__
from .cli_cache import cache_app
from .cli_extract import extract
from .cli_rationales import rationales
from .cli_train import train
from .errors import ClvqError, Interrupted
from .options import (
    Device,
    Force,
    Json,
    Seed,
    device_of,
    load_model,
    model_of,
    names,
    settings_of,
)
from .terminal import print_json, progress_bars, put, say

if TYPE_CHECKING:
    from .evaluation.ablate import AblateResult, Line
    from .pipeline.language_model import LanguageModel

app = typer.Typer(
    name="clvq",
    help="Discrete concepts between the layers of a language model: extract once, train many, test honestly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(extract)
app.command()(train)
app.command()(rationales)
app.add_typer(cache_app, name="cache")


def main() -> None:
    """Run the command; a user's mistake becomes one line and exit 1, a stop 128 + its signal."""
    _quieten_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        app()
    except Interrupted as error:
        say(str(error))
        sys.exit(128 + error.signal_number)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ClvqError, OSError) as error:
        say(f"error: {error}")
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        put(__version__)
        raise typer.Exit


@app.command()
def ablate(
    cache: Annotated[str, typer.Argument(help="The cache that the runs were trained on: a folder, s3://… or hf://….")],
    runs: Annotated[list[Path], typer.Argument(help="One or more runs.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    model: Annotated[str | None, typer.Option(help="The model's folder; needed where it is not from the Hub.")] = None,
    read_out: Annotated[str, typer.Option(help="model, probe or both: model,probe.")] = "model,probe",
    removal: Annotated[str, typer.Option(help="projection (as published), centred, or both.")] = "projection,centred",
    rows_changed: Annotated[str, typer.Option(help="Rows that lose their concept: salient, cls or all.")] = "salient",
    saliency: Annotated[str, typer.Option(help="The salient row by gradient, or as stored in the cache.")] = "gradient",
    split: Annotated[str, typer.Option(help="Splits to evaluate; else the texts that the runs held out.")] = "",
    max_texts: Annotated[int | None, typer.Option(min=1, help="Evaluate a seeded sample of so many texts.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Remove each text's concept and measure what becomes of the prediction, next to matched controls."""
    from .cache.sharing.remote import open_cache
    from .evaluation.ablate import AblateConfig
    from .evaluation.ablate import ablate as run_ablate

    opened = open_cache(cache)
    where = device_of(device)
    config = settings_of(
        AblateConfig,
        read_outs=tuple(names(read_out)),
        removals=tuple(names(removal)),
        rows_changed=rows_changed,
        saliency=saliency,
        split=tuple(names(split)),
        max_texts=max_texts,
        seed=seed,
    )
    identity: dict[str, Any] = opened.manifest.identity

    def load() -> "LanguageModel":
        source = model_of(identity["model"], model, what=str(cache))
        return load_model(source, identity["settings"], device=where)

    called = [path.resolve().name for path in runs]
    labelled = {name if called.count(name) == 1 else str(path): path for name, path in zip(called, runs, strict=True)}
    with progress_bars() as progress:
        result = run_ablate(
            opened,
            labelled,
            out,
            load,
            config,
            progress=progress,
            force=force,
        )
    if as_json:
        print_json(asdict(result))
    else:
        _print_ablation(result)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo"),
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """The whole way on a real model and real texts from PyPI, in a few minutes; needs the extra `demo`."""
    from .demo import run_demo

    with progress_bars() as progress:
        result = run_demo(out, device=device_of(device), progress=progress)
    if as_json:
        print_json(asdict(result))
        return
    table = Table("step", "what it made", "seconds", box=SIMPLE_HEAD)
    for step in result.steps:
        table.add_row(step.name, step.made, f"{step.seconds:.1f}")
    put(table)
    _print_ablation(result.ablation)
    put(f"\nThe {len(result.concepts)} concepts that matter most (largest effect on predictions when removed):\n")
    for number, (effect, concept) in enumerate(zip(result.effects, result.concepts, strict=True), start=1):
        words = ", ".join(f"{word} ({count})" for word, count in concept.words)
        labels = ", ".join(f"{name} {share:.0%}" for name, share in concept.labels.items())
        put(
            f"{number:2}. concept {concept.concept}: removed from {effect.texts} texts, "
            f"{effect.probability_lost:+.3f} probability lost, {effect.flipped:.0%} flipped; "
            f"{concept.rows} training rows, {labels}"
        )
        put(f"    words: {words}")
        for before, word, after in concept.examples:
            put(f"    · {before}[{word}]{after}")
    put("\nGo on with it:")
    program = "clvq" if shutil.which("clvq") else shlex.quote(sys.argv[0])
    for command in result.commands:
        put(f"  {program} {command}")


def _print_ablation(result: "AblateResult") -> None:
    runs = {line.run for line in result.lines if line.run}
    columns = "run,read-out,removal,removed,accuracy,flipped,probability lost,norm removed,own code − this"
    title = "means over texts with 95 % bootstrap intervals"
    table = Table(*columns.split(",")[len(runs) < 2 :], title=title, box=SIMPLE_HEAD, title_justify="left")
    for line in result.lines:
        if line.removed in ("nothing", "own code"):
            table.add_section()
        table.add_row(*_cells(line)[len(runs) < 2 :])
    put(table, whole=True)
    put(f"{result.path} holds this table as JSON, and every text")
    if result.trained_texts:
        put(f"{result.trained_texts:,} of these texts were trained on: the figures flatter the runs.")


def _cells(line: "Line") -> list[str]:
    def interval(value: Any, form: str) -> str:
        if value is None or math.isnan(value.value):
            return "–"
        return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"

    unchanged = line.removal is None
    return [
        line.run or "–",
        line.read_out,
        line.removal or "–",
        f"{line.removed} ({line.texts:,} texts)" if unchanged else line.removed,
        interval(line.accuracy, ".3f"),
        "–" if unchanged else interval(line.flipped, ".1%"),
        "–" if unchanged else interval(line.probability_lost, "+.3f"),
        "–" if unchanged else f"{line.norm_removed.value:.1%}",
        interval(line.own_minus_this, "+.3f"),
    ]


def _quieten_libraries() -> None:
    """Their progress bars and reports would mix with ours; their warnings still come through `logging`."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Dask tells of every worker that it ends and starts; what matters of it, the extraction's own errors say.
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "critical")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


if __name__ == "__main__":
    main()
