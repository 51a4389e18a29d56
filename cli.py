"""The `clvq` command: parse, call one function, print."""

import io
import json
import logging
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from . import __version__
from .errors import ClvqError, ConfigError, Interrupted

if TYPE_CHECKING:
    import torch

    from .evaluation.ablate import AblateResult, Line
    from .pipeline.language_model import LanguageModel
    from .pipeline.plan import Plan
    from .pipeline.source import ModelSource

app = typer.Typer(
    name="clvq",
    help="Discrete concepts between the layers of a language model: extract once, train many, test honestly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(help="Look at and check caches.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cache_app, name="cache")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Delete what --out holds from other settings.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(help="Seed of everything drawn at random.")]


def main() -> None:
    """Run the command; a user's mistake becomes one line and exit 1, a stop 128 + its signal."""
    _quieten_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        app()
    except Interrupted as error:
        _say(str(error))
        sys.exit(128 + error.signal_number)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ClvqError, OSError) as error:
        _say(f"error: {error}")
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        _print(__version__)
        raise typer.Exit


@app.command()
def extract(
    model: Annotated[str, typer.Argument(help="A Hugging Face model: a local folder, or a name on the Hub.")],
    data: Annotated[
        str, typer.Argument(help="A .jsonl, .csv, .parquet or .txt file, a folder of them, or a Hub name.")
    ],
    sites: Annotated[str, typer.Option(help="Layers to read, such as 8,12; 0 is the embeddings.")],
    out: Annotated[Path, typer.Option(help="The cache to write.")],
    rows: Annotated[str, typer.Option(help="What a row is: token or word.")] = "token",
    pool: Annotated[str, typer.Option(help="A word's vector: its last sub-word's (last) or their mean.")] = "last",
    split: Annotated[str, typer.Option(help="Splits to read, such as train,dev; all where not given.")] = "",
    train_split: Annotated[str, typer.Option(help="The split that the word filters apply to.")] = "train",
    text_field: Annotated[str, typer.Option(help="Field with the text.")] = "text",
    label_field: Annotated[str | None, typer.Option(help="Field with the label; 'label' where there is one.")] = None,
    keep_fields: Annotated[str, typer.Option(help="Other fields to keep, such as evidence,doc.")] = "",
    subset: Annotated[str | None, typer.Option(help="Configuration of a Hub data set.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    max_texts: Annotated[int | None, typer.Option(min=1, help="A seeded sample of so many texts per split.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens at which texts are cut; the window.")] = None,
    min_count: Annotated[int, typer.Option(min=1, help="Keep words seen so often in the training split.")] = 1,
    max_occurrences: Annotated[int | None, typer.Option(min=1, help="Keep so many occurrences of a word.")] = None,
    occurrences: Annotated[str, typer.Option(help="Which occurrences: random, or first (as published).")] = "random",
    encoding: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    task: Annotated[str, typer.Option(help="none, or classify to store the model's predictions.")] = "none",
    dtype: Annotated[str, typer.Option(help="Type to compute in: auto, float32, bfloat16, float16.")] = "auto",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Token slots in a batch.")] = 4096,
    seed: Seed = 0,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the plan: rows, bytes, free disk.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Run a model once and write its activations into a cache. Run again to resume."""
    from .pipeline.data import read_texts
    from .pipeline.extract import check_disk
    from .pipeline.extract import extract as run_extract
    from .pipeline.plan import ExtractConfig, make_plan
    from .pipeline.source import find_model

    where = _device(device)
    source = find_model(model, revision=revision)
    config = _settings(
        ExtractConfig,
        sites=tuple(source.sites(_names(sites))),
        rows=rows,
        pool=pool,
        min_count=min_count,
        max_occurrences=max_occurrences,
        occurrences=occurrences,
        train_split=train_split,
        max_length=max_length or source.window,
        encoding=encoding,
        task=task,
        dtype=("float32" if where.type == "cpu" else "bfloat16") if dtype == "auto" else dtype,
        batch_tokens=batch_tokens,
        seed=seed,
    )
    texts = read_texts(
        data,
        splits=_names(split),
        text_field=text_field,
        label_field=label_field,
        keep_fields=_names(keep_fields),
        max_texts=max_texts,
        subset=subset,
        seed=seed,
    )
    with _progress() as progress:
        plan = make_plan(source, texts, config, progress=progress)
        if dry_run:
            figures = _plan_figures(plan, out)
        else:
            result = run_extract(
                plan,
                out,
                lambda: _load(source, task=config.task, dtype=config.dtype, device=where),
                progress=progress,
                force=force,
            )
            figures = asdict(result)
            figures |= figures.pop("counts")
            figures["rows_per_second"] = result.rows / result.seconds if result.shards_done_before == 0 else None
    _show(figures, as_json=as_json, title="plan" if dry_run else "cache")
    if dry_run:
        check_disk(plan, out)


@cache_app.command()
def info(path: Annotated[Path, typer.Argument(help="The cache.")], as_json: Json = False) -> None:
    """What a cache holds and how it was made."""
    from .cache.layout import read_manifest

    manifest, cache_id = read_manifest(path)
    plain = manifest.model_dump(mode="json")
    sites = {
        name: f"{site.width} × {site.encoding}, median norm {site.statistics.norm_quantile(0.5):.3g}"
        for name, site in manifest.sites.items()
    }
    figures = {
        "cache_id": cache_id,
        **{key: plain["geometry"][key] for key in ("rows", "texts", "shards")},
        "bytes": sum(entry.bytes for entry in manifest.files.values())
        + sum(entry.bytes for shard in manifest.shards for entry in shard.files.values()),
        "splits": {name: f"{part.texts:,} texts, {part.rows:,} rows" for name, part in manifest.splits.items()},
        "sites": sites,
        "class_names": manifest.class_names,
        "counts": manifest.counts,
        **manifest.identity,
    }
    _show(figures, as_json=as_json, title=str(path))


@cache_app.command()
def verify(path: Annotated[Path, typer.Argument(help="The cache.")], as_json: Json = False) -> None:
    """Check every byte of a cache against its manifest; exit 1 where one differs."""
    from .cache.verify import verify as run_verify

    with _progress() as progress:
        result = run_verify(path, progress=progress)
    figures = asdict(result)
    if not as_json:
        figures["problems"] = [f"{problem.file} {problem.found}" for problem in result.problems]
    _show(figures, as_json=as_json, title=str(path))
    if result.problems:
        _say(f"error: {path} has {len(result.problems)} problems; get those files anew, or extract again")
        raise typer.Exit(1)


@app.command()
def train(
    cache: Annotated[Path, typer.Argument(help="The cache to train from.")],
    lower: Annotated[str, typer.Option(help="Site that is mapped, such as 8.")],
    upper: Annotated[str, typer.Option(help="Site that it is mapped to, such as 12.")],
    out: Annotated[Path, typer.Option(help="The run to write.")],
    preset: Annotated[str, typer.Option(help="default, or paper for the published method.")] = "default",
    codes: Annotated[int, typer.Option(min=2, help="Size of the codebook.")] = 400,
    split: Annotated[str, typer.Option(help="Splits to train on; else train, or the only one there is.")] = "",
    held_out: Annotated[str | None, typer.Option(help="Split to measure on; else a seeded 10 % of the texts.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file with settings, nested as in a run's config.json.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="One setting, such as fit.epochs=20.")] = None,
    seed: Seed = 42,
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a CLVQ-VAE from a cache. Run again to resume."""
    from .cache.reader import Cache
    from .trainer.config import preset_config, with_overrides
    from .trainer.fit import fit

    opened = Cache(cache)
    resolved = preset_config(
        preset,
        lower=opened.site(lower),
        upper=opened.site(upper),
        codes=codes,
        split=tuple(_names(split) or (["train"] if len(opened.manifest.splits) > 1 else opened.manifest.splits)),
        held_out=held_out,
        seed=seed,
    )
    resolved = with_overrides(resolved, {**_settings_file(config), **_assignments(settings or [])})
    with _progress() as progress:
        result = fit(opened, resolved, out, device=_device(device), progress=progress, force=force)
    _show({"path": result.path, "seconds": result.seconds, **result.report}, as_json=as_json, title="run")


@app.command()
def ablate(
    cache: Annotated[Path, typer.Argument(help="The cache that the runs were trained on.")],
    runs: Annotated[list[Path], typer.Argument(help="One or more runs.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    model: Annotated[str | None, typer.Option(help="The model's folder; needed where it is not from the Hub.")] = None,
    read_out: Annotated[str, typer.Option(help="model, probe or both: model,probe.")] = "model,probe",
    removal: Annotated[str, typer.Option(help="projection (as published), centred, or both.")] = "projection,centred",
    rows_changed: Annotated[str, typer.Option(help="Rows that lose their concept: salient, cls or all.")] = "salient",
    split: Annotated[str, typer.Option(help="Splits to evaluate; else the texts that the runs held out.")] = "",
    max_texts: Annotated[int | None, typer.Option(min=1, help="Evaluate a seeded sample of so many texts.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Remove each text's concept and measure what becomes of the prediction, next to matched controls."""
    from .cache.reader import Cache
    from .evaluation.ablate import AblateConfig
    from .evaluation.ablate import ablate as run_ablate

    opened = Cache(cache)
    where = _device(device)
    config = _settings(
        AblateConfig,
        read_outs=tuple(_names(read_out)),
        removals=tuple(_names(removal)),
        rows_changed=rows_changed,
        split=tuple(_names(split)),
        max_texts=max_texts,
        seed=seed,
    )
    names = [path.resolve().name for path in runs]
    labelled = {name if names.count(name) == 1 else str(path): path for name, path in zip(names, runs, strict=True)}
    with _progress() as progress:
        result = run_ablate(
            opened,
            labelled,
            out,
            lambda: _load_for(opened, model, device=where),
            config,
            progress=progress,
            force=force,
        )
    if as_json:
        _print_json(asdict(result))
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

    with _progress() as progress:
        result = run_demo(out, device=_device(device), progress=progress)
    if as_json:
        _print_json(asdict(result))
        return
    table = Table("step", "what it made", "seconds", box=SIMPLE_HEAD)
    for step in result.steps:
        table.add_row(step.name, step.made, f"{step.seconds:.1f}")
    _print(table)
    _print_ablation(result.ablation)
    _print(f"\nThe {len(result.concepts)} concepts that matter most (largest effect on predictions when removed):\n")
    for number, (effect, concept) in enumerate(zip(result.effects, result.concepts, strict=True), start=1):
        words = ", ".join(f"{word} ({count})" for word, count in concept.words)
        labels = ", ".join(f"{name} {share:.0%}" for name, share in concept.labels.items())
        _print(
            f"{number:2}. concept {concept.concept}: removed from {effect.texts} texts, "
            f"{effect.probability_lost:+.3f} probability lost, {effect.flipped:.0%} flipped; "
            f"{concept.rows} training rows, {labels}"
        )
        _print(f"    words: {words}")
        for before, word, after in concept.examples:
            _print(f"    · {before}[{word}]{after}")
    _print("\nGo on with it:")
    program = "clvq" if shutil.which("clvq") else shlex.quote(sys.argv[0])
    for command in result.commands:
        _print(f"  {program} {command}")


def _load(source: "ModelSource", *, task: Any, dtype: Any, device: "torch.device") -> "LanguageModel":
    from .pipeline.language_model import LanguageModel

    return LanguageModel(source, task=task, dtype=dtype, device=device)


def _load_for(cache: Any, given: str | None, *, device: "torch.device") -> "LanguageModel":
    """The model that a cache was made with, from the folder given or from the Hub."""
    from .pipeline.source import find_model

    made_with = cache.manifest.identity["model"]
    if given is None and made_with["commit"] is None:
        raise ConfigError(
            f"{cache.path} was made with the local model {made_with['name']!r}; say where it is with --model FOLDER"
        )
    source = find_model(given or made_with["name"], revision=None if given else made_with["commit"])
    source.require_identity(made_with)
    return _load(source, task="classify", dtype=cache.manifest.identity["settings"]["dtype"], device=device)


def _plan_figures(plan: "Plan", out: Path) -> dict[str, Any]:
    from .cache.files import free_bytes

    geometry = plan.placement.geometry
    return {
        "sites": list(plan.config.sites),
        "rows": geometry.rows,
        "shards": geometry.shards,
        "rows_per_shard": geometry.shard_rows,
        **plan.counts,
        "bytes_at_most": plan.bytes_at_most(),
        "bytes_expected": plan.bytes_expected(),
        "bytes_free": free_bytes(out),
    }


def _print_ablation(result: "AblateResult") -> None:
    runs = {line.run for line in result.lines if line.run}
    names = "run,read-out,removal,removed,accuracy,flipped,probability lost,norm removed,own code − this"
    title = "means over texts with 95 % bootstrap intervals"
    table = Table(*names.split(",")[len(runs) < 2 :], title=title, box=SIMPLE_HEAD, title_justify="left")
    for line in result.lines:
        if line.removed in ("nothing", "own code"):
            table.add_section()
        table.add_row(*_cells(line)[len(runs) < 2 :])
    _print(table, whole=True)
    _print(f"{result.path} holds this table as JSON, and every text")
    if result.trained_texts:
        _print(f"{result.trained_texts:,} of these texts were trained on: the figures flatter the runs.")


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


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _settings(model: Any, **values: Any) -> Any:
    """A settings object; a wrong value becomes a `ConfigError` that names the option."""
    from pydantic import ValidationError

    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        option = {"read_outs": "read-out", "removals": "removal"}.get(name, name.replace("_", "-"))
        given = first["input"] or "''"
        raise ConfigError(f"--{option} {given}: {first['msg'][0].lower()}{first['msg'][1:]}") from error


def _settings_file(path: Path | None) -> dict[str, str]:
    """A JSON file of nested settings as `a.b` → JSON text."""
    if path is None:
        return {}
    try:
        plain = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} is not a JSON object of settings")

    def flat(value: dict[str, Any], name: str = "") -> Iterator[tuple[str, str]]:
        for key, inner in value.items():
            if isinstance(inner, dict):
                yield from flat(inner, f"{name}{key}.")
            else:
                yield f"{name}{key}", json.dumps(inner)

    return dict(flat(plain))


def _assignments(settings: list[str]) -> dict[str, str]:
    for setting in settings:
        if "=" not in setting:
            raise ConfigError(f"--set {setting}: write it as name=value, such as fit.epochs=20")
    return dict(setting.split("=", 1) for setting in settings)


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here; try --device cpu")
    return device


def _quieten_libraries() -> None:
    """Their progress bars and reports would mix with ours; their warnings still come through `logging`."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


class _Terminal:
    """Shows progress on stderr where that is a terminal, and turns SIGINT and SIGTERM into `Interrupted`."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._task: Any = None
        self._signal: int | None = None

    def stop(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            os._exit(128 + number)
        self._signal = number
        _say("stopping as soon as everything finished is saved; once more to stop at once")

    def begin(self, task: str, total: int | None, unit: str) -> None:
        if self._task is not None:
            self._bars.update(self._task, visible=False)
        self._task = self._bars.add_task(task, total=total, unit=unit, figures="")

    def advance(self, amount: int = 1, **figures: float) -> None:
        shown = "  ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in figures.items())
        self._bars.update(self._task, advance=amount)
        if shown:
            self._bars.update(self._task, figures=shown)
        self.check()

    def check(self) -> None:
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            raise Interrupted(
                f"stopped by {name}; everything finished is saved: run the same command again to go on",
                signal_number=self._signal,
            )


@contextmanager
def _progress() -> Iterator[_Terminal]:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with RichProgress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        terminal = _Terminal(bars)
        before = {number: signal.signal(number, terminal.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield terminal
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _show(figures: dict[str, Any], *, as_json: bool, title: str) -> None:
    if as_json:
        _print_json(figures)
        return
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in figures.items():
        for label, shown in _flat(name, value):
            table.add_row(label.replace("_", " "), shown)
    _print(table)


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name} {key}", inner)
    elif isinstance(value, (list, tuple)):
        yield name, "\n".join(map(str, value)) or "none"
    elif isinstance(value, bool) or value is None:
        yield name, {True: "yes", False: "no", None: "–"}[value]
    elif isinstance(value, int) and name != "seed":
        yield name, f"{value:,}"
    elif isinstance(value, float):
        yield name, f"{value:.4g}" if math.isfinite(value) else "–"
    else:
        yield name, str(value)


def _print_json(value: Any) -> None:
    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {str(key): plain(inner) for key, inner in part.items()}
        if isinstance(part, (list, tuple)):
            return [plain(inner) for inner in part]
        if isinstance(part, float) and not math.isfinite(part):
            return None
        return str(part) if isinstance(part, Path) else part

    unicode = sys.stdout.encoding.lower().startswith("utf")
    _print(json.dumps(plain(value), ensure_ascii=not unicode, indent=1))


def _print(what: Any, *, whole: bool = False) -> None:
    """To stdout. Text goes as it is; tables are wrapped, unless they must stay `whole`."""
    if isinstance(what, str):
        sys.stdout.write(what + "\n")
    else:
        console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
        if whole:
            console.width = max(console.width, console.measure(what, options=console.options.update(width=999)).maximum)
        console.print(what)


def _say(message: str) -> None:
    """One line to stderr."""
    sys.stderr.write(" ".join(message.split()) + "\n")


if __name__ == "__main__":
    main()
