"""The folder of a run: its files, and which of them say what it is.

`config.json` is written first and `model.safetensors` last: a folder with both is a finished run, one with the first
alone an unfinished one.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..cache.files import write_file
from ..cache.layout import differences, to_json
from ..errors import ConfigError, FormatVersion, ResumeMismatch, RunNotFound
from .methods import AnyConfig, PlainConfig, TrainedConfig

FORMAT = "clvq-run"
VERSION = 1

CONFIG = "config.json"
MODEL = "model.safetensors"
METRICS = "metrics.jsonl"
REPORT = "report.json"
CHECKPOINT = "checkpoint.safetensors"
LEARNING_CURVES = "learning-curves"
CODEBOOK = "codebook"
# What `figures.write_figures` leaves.
FIGURES = tuple(f"{name}.{kind}" for name in (LEARNING_CURVES, CODEBOOK) for kind in ("svg", "png"))
TENSORBOARD = "tensorboard"

# What the names of TensorBoard's files begin with.
_TENSORBOARD_FILES = "events.out.tfevents."

# What the names of the model's tensors begin with.
NETWORK = "network."
TABLES = "tables."

# In the order in which they may be deleted: without the model the folder never claims to be finished.
_OWN_NAMES = (MODEL, *FIGURES, CHECKPOINT, METRICS, REPORT, CONFIG)


class RunConfig(BaseModel):
    """`config.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["clvq-run"]
    version: Literal[1]
    clvq: str
    """The version of clvq that began the run."""
    cache_id: str
    vectors_id: str
    """Of the cache; copies of it without texts have the same."""
    config: AnyConfig
    d_lower: int
    d_upper: int
    held_out_texts: tuple[int, ...]
    """`text_id`s of the texts that measure."""

    @classmethod
    def begun(
        cls,
        *,
        cache_id: str,
        vectors_id: str,
        config: TrainedConfig | PlainConfig,
        d_lower: int,
        d_upper: int,
        held_out_texts: tuple[int, ...],
    ) -> "RunConfig":
        """The description of a run that this version of clvq begins."""
        return cls(
            format="clvq-run",
            version=1,
            clvq=version("clvq"),
            cache_id=cache_id,
            vectors_id=vectors_id,
            config=config,
            d_lower=d_lower,
            d_upper=d_upper,
            held_out_texts=held_out_texts,
        )


def read_config(path: Path) -> RunConfig:
    """`config.json` of the run at `path`, finished or not.

    Raises
    ------
    RunNotFound, FormatVersion
    """
    file = path / CONFIG
    if not file.is_file():
        what = f"has no {CONFIG}" if path.is_dir() else "does not exist"
        raise RunNotFound(f"{path} is not a clvq run: it {what}; make one with `clvq train CACHE … --out {path}`")
    try:
        plain = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RunNotFound(f"{file} is not JSON ({error}); get a whole copy of the run") from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise RunNotFound(f'{path} is not a clvq run: its {CONFIG} has no "format": "{FORMAT}"')
    if plain.get("version") != VERSION:
        raise FormatVersion(
            f"{path} is a run of format version {plain.get('version')!r}; this clvq reads version {VERSION}: "
            "use the clvq that wrote it, or train again"
        )
    try:
        return RunConfig.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RunNotFound(f"{file} is damaged at {where!r}: {first['msg']}; get a whole copy of the run") from error


def take_over(out: Path, wanted: RunConfig, *, force: bool) -> None:
    """Make `out` the folder of the run: begun there, or continued where it was begun with the same settings.

    Raises
    ------
    ResumeMismatch
        Where another run stands there and `force` is not given; the message names each difference.
    ConfigError
        Where the folder holds something that is not a run.
    FormatVersion
    """
    for left_by_a_kill in out.glob(".*.aside"):
        if left_by_a_kill.name.startswith(tuple(f".{name}." for name in _OWN_NAMES)):
            left_by_a_kill.unlink()
    names = sorted(entry.name for entry in out.iterdir())
    if names:
        lines = _differences(out, names, wanted, force=force)
        if not lines:
            return
        if not force:
            raise ResumeMismatch(
                f"{out} holds a run with other settings ({'; '.join(lines[:8])}{'; …' if len(lines) > 8 else ''}): "
                "give another --out, or --force to delete it"
            )
        for name in _OWN_NAMES:
            (out / name).unlink(missing_ok=True)
        for file in (out / TENSORBOARD).glob(f"{_TENSORBOARD_FILES}*"):
            file.unlink()
    write_file(out / CONFIG, to_json(wanted))


def _differences(out: Path, names: list[str], wanted: RunConfig, *, force: bool) -> list[str]:
    try:
        found = read_config(out)
    except RunNotFound as error:
        raise ConfigError(
            f"{out} is not empty and is not a clvq run (it holds {names[0]!r}): give another --out"
        ) from error
    except FormatVersion:
        if not force:
            raise
        return ["version"]
    # Widths and held-out texts follow from the cache and the settings; another clvq may continue a run.
    here, now = (run.model_dump(mode="json", include={"cache_id", "config"}) for run in (found, wanted))
    return differences(here, now)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; none where there is no such file."""
    file = out / METRICS
    return [json.loads(line) for line in file.read_bytes().splitlines()] if file.is_file() else []


def append_metrics(out: Path, figures: dict[str, float | int | str | None], *, epoch: int) -> None:
    """Make `figures` line `epoch` of `metrics.jsonl`; what a kill left behind from there on is dropped."""
    file = out / METRICS
    lines = file.read_bytes().splitlines(keepends=True)[:epoch] if file.is_file() else []
    write_file(file, b"".join([*lines, json.dumps(figures, allow_nan=False).encode() + b"\n"]))
