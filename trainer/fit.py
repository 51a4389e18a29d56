"""Training: one call from a cache to a finished run, which may be killed and called again at any moment."""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cache.files import only_writer
from ..cache.reader import Cache
from ..errors import ConfigError
from ..progress import SILENT, Progress
from . import ranks
from .build import build
from .concepts import ConceptModel
from .config import TrainConfig
from .data import Texts, statistics, text_stream
from .folder import CHECKPOINT, MODEL, REPORT, RunConfig, take_over
from .methods import PlainConfig, SaeConfig, TrainedConfig
from .plain import PlainModel
from .report import write_results
from .sae import SparseAutoencoder
from .sae_lens import ForeignSae
from .training import Training


@dataclass(frozen=True)
class FitResult:
    """What `fit` leaves behind."""

    path: Path
    """The run's folder."""
    report: dict[str, Any]
    """What stands in `report.json`."""
    seconds: float
    """Of this call."""


def fit(
    cache: Cache,
    config: TrainedConfig | PlainConfig,
    out: Path,
    *,
    device: torch.device,
    progress: Progress = SILENT,
    force: bool = False,
    tensorboard: bool = False,
    shared: Path | None = None,
    foreign: ForeignSae | None = None,
) -> FitResult:
    """Train a concept model, or go on where a former call with the same settings was stopped.

    A run that was killed at any moment and is gone on with ends, on a CPU, in the same bytes as one left alone. All
    processes of `torch.distributed`'s group, where there is one, call this together; each batch is divided among them.

    Parameters
    ----------
    out
        The run's folder; created where missing.
    force
        Delete a run with other settings that stands there.
    tensorboard
        Also write the figures of each epoch for TensorBoard.
    shared
        A file through which runs that differ only in what comes after the encoder (`sweep.Member.before_codes`) share
        what comes before: taken over where it is there, else written as soon as the encoder is ready. Where several
        processes train together it plays no part.
    foreign
        An autoencoder that was trained elsewhere; `config` is what its `settings` gives.

    Raises
    ------
    ConfigError
        Where the settings do not suit the cache, or `out` holds something that is not a run.
    ResumeMismatch
        Where `out` holds a run with other settings or of another cache.
    MissingExtra
        Where TensorBoard is asked for and not installed.
    FolderInUse, CacheCorrupt, DiskFull, RanksDiffer, Interrupted
    ClvqError
        Where the loss is no longer finite.
    """
    began = time.perf_counter()
    lower, upper = cache.site(config.lower), cache.site(config.upper)
    texts = Texts.of(cache, config)
    wanted = RunConfig.begun(
        cache_id=cache.id,
        vectors_id=cache.manifest.vectors_id,
        config=config,
        d_lower=cache.width(lower),
        d_upper=cache.width(upper),
        held_out_texts=tuple(np.asarray(cache.texts["text_id"])[texts.held_out].tolist()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build(config, d_lower=wanted.d_lower, d_upper=wanted.d_upper).to(device)

    fill = _fill(model, cache, config, texts, foreign, device=device, progress=progress)
    if fill is not None and ranks.count() > 1:
        raise ConfigError(f"{config.method} is fitted by one process here: start it without torchrun")
    if isinstance(config, SaeConfig) and config.source is not None and fill is None and not (out / MODEL).is_file():
        raise ConfigError(f"source is {config.source[:12]}…, whose weights are not here: give them with --from")

    def run() -> None:
        if fill is not None:
            _at_once(model, fill, cache, config, texts, out, device=device, progress=progress)
        elif isinstance(config, TrainConfig | SaeConfig):
            Training(
                cache,
                config,
                texts,
                model,
                out,
                device=device,
                progress=progress,
                tensorboard=tensorboard,
                shared=shared,
            ).run()

    with ExitStack() as held:
        with ranks.led() as leads:
            if leads:
                held.enter_context(only_writer(out))
                take_over(out, wanted, force=force)
        if not ranks.decided((out / MODEL).is_file()):
            run()
        with ranks.led() as leads:
            if leads:
                (out / CHECKPOINT).unlink(missing_ok=True)
    report = json.loads((out / REPORT).read_bytes())
    return FitResult(path=out, report=report, seconds=time.perf_counter() - began)


def _fill(
    model: ConceptModel,
    cache: Cache,
    config: TrainedConfig | PlainConfig,
    texts: Texts,
    foreign: ForeignSae | None,
    *,
    device: torch.device,
    progress: Progress,
) -> Callable[[], None] | None:
    """What makes a model that knows the training rows' statistics a finished one; `None` where epochs do."""
    if isinstance(model, PlainModel):
        return partial(model.fit, cache, texts, device=device, progress=progress)
    if foreign is None:
        return None
    if not (isinstance(model, SparseAutoencoder) and isinstance(config, SaeConfig)):
        raise ConfigError(f"{config.method} takes no autoencoder from elsewhere: use --method {foreign.method}")
    foreign.check(config)
    return partial(foreign.fill, model, cache, config, texts, progress=progress)


def _at_once(
    model: ConceptModel,
    fill: Callable[[], None],
    cache: Cache,
    config: TrainedConfig | PlainConfig,
    texts: Texts,
    out: Path,
    *,
    device: torch.device,
    progress: Progress,
) -> None:
    began = time.perf_counter()
    sites = tuple(dict.fromkeys([config.lower, config.upper]))
    found = statistics(cache, texts.train_rows(cache, config), sites, progress=progress)
    model.place(found[config.lower], found[config.upper])
    with torch.no_grad():
        fill()
    write_results(
        model,
        cache,
        config,
        texts,
        text_stream(cache, config, texts.held_out),
        out,
        course={"train_seconds": time.perf_counter() - began},
        device=device,
        progress=progress,
    )
