"""Training: one call from a cache to a finished run, which may be killed and called again at any moment."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from ..cache.files import only_writer
from ..cache.reader import Cache
from ..cache.stream import TextBatch, TextStream
from ..errors import ClvqError, Interrupted
from ..progress import SILENT, Progress
from .checkpoint import Fitting
from .config import TrainConfig
from .data import Texts, statistics
from .folder import CHECKPOINT, MODEL, REPORT, RunConfig, append_metrics, take_over
from .measure import held_out_figures
from .network import Batch, Network, build
from .report import write_results
from .start import starting_codes, starting_rows


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
    config: TrainConfig,
    out: Path,
    *,
    device: torch.device,
    progress: Progress = SILENT,
    force: bool = False,
) -> FitResult:
    """Train a concept model, or go on where a former call with the same settings was stopped.

    A run that was killed at any moment and is gone on with ends, on a CPU, in the same bytes as one left alone.

    Parameters
    ----------
    out
        The run's folder; created where missing.
    force
        Delete a run with other settings that stands there.

    Raises
    ------
    ConfigError
        Where the settings do not suit the cache, or `out` holds something that is not a run.
    ResumeMismatch
        Where `out` holds a run with other settings or of another cache.
    FolderInUse, CacheCorrupt, DiskFull, Interrupted
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
        network = build(config, d_lower=wanted.d_lower, d_upper=wanted.d_upper).to(device)
    training = _Training(cache, config, texts, network, out, device=device, progress=progress)
    with only_writer(out):
        take_over(out, wanted, force=force)
        if not (out / MODEL).is_file():
            training.run()
        (out / CHECKPOINT).unlink(missing_ok=True)
    report = json.loads((out / REPORT).read_bytes())
    return FitResult(path=out, report=report, seconds=time.perf_counter() - began)


class _Training:
    def __init__(
        self,
        cache: Cache,
        config: TrainConfig,
        texts: Texts,
        network: Network,
        out: Path,
        *,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.cache, self.config, self.texts, self.out = cache, config, texts, out
        self.device, self.progress = device, progress
        self.sites = tuple(dict.fromkeys([config.lower, config.upper]))
        self.train_stream, self.held_out_stream = (
            TextStream(
                cache,
                self.sites,
                side,
                special=config.special,
                seed=config.seed,
                texts_per_batch=config.fit.texts_per_batch,
                slots_per_batch=config.fit.slots_per_batch,
                pool_bytes=config.fit.pool_bytes,
            )
            for side in (texts.train, texts.held_out)
        )
        self.train_texts = int(texts.train.sum())
        optimizer_class = torch.optim.Adam if config.optimizer.name == "adam" else torch.optim.AdamW
        optimizer = optimizer_class(
            network.parameters(), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay
        )
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=config.optimizer.plateau_factor, patience=config.optimizer.plateau_patience
        )
        self.fitting = Fitting(
            network, optimizer, plateau, codes=config.quantizer.codes, d_upper=cache.width(config.upper)
        )
        self.saved_at = time.monotonic()

    def run(self) -> None:
        """Train to the end and write the results."""
        checkpoint = self.out / CHECKPOINT
        if checkpoint.is_file():
            self.fitting.load(checkpoint)
        else:
            rows = self.texts.train_rows(self.cache, self.config)
            found = statistics(self.cache, rows, self.sites, progress=self.progress)
            self.fitting.network.place(found[self.config.lower], found[self.config.upper])
        try:
            while self.fitting.state.stop_reason is None:
                self._next_phase()
            write_results(
                self.fitting,
                self.cache,
                self.config,
                self.texts,
                self.held_out_stream,
                self.out,
                device=self.device,
                progress=self.progress,
            )
        except Interrupted:
            self._save()
            raise

    def _save(self) -> None:
        self.fitting.save(self.out / CHECKPOINT)
        self.saved_at = time.monotonic()

    def _next_phase(self) -> None:
        """The warm-up, or the start of the codebook and all that follows."""
        settings, state = self.config.fit, self.fitting.state
        warm_up = state.epoch < settings.warmup_epochs
        if not warm_up and not state.codebook_started:
            self._start_codebook()
            state.codebook_started = True
            self._save()
        first = 0 if warm_up else settings.warmup_epochs
        end = settings.warmup_epochs if warm_up else settings.warmup_epochs + settings.epochs
        self.progress.begin("warm-up" if warm_up else "train", (end - first) * self.train_texts, "text")
        self.progress.advance((state.epoch - first) * self.train_texts + state.sums.texts)
        while state.epoch < end and state.stop_reason is None:
            self._steps(warm_up=warm_up)
            self._end_epoch(warm_up=warm_up)

    @torch.no_grad()
    def _start_codebook(self) -> None:
        network, start = self.fitting.network.eval(), self.config.start
        rows = starting_rows(self.texts.train_rows(self.cache, self.config), start, seed=self.config.seed)
        self.progress.begin("codebook start", len(rows), "row")
        parts = []
        for block, vectors in self.cache.blocks([self.config.lower], rows):
            lower = vectors[self.config.lower]
            if start.space == "encoded":
                lower = network.encode(torch.from_numpy(lower).to(self.device, copy=True)).cpu().numpy()
            parts.append(lower)
            self.progress.advance(len(block))
        codes = starting_codes(np.concatenate(parts), start, codes=self.config.quantizer.codes, seed=self.config.seed)
        network.quantizer.start(torch.from_numpy(codes).to(self.device))

    def _steps(self, *, warm_up: bool) -> None:
        """The steps of the present epoch that are not done yet."""
        state, sums = self.fitting.state, self.fitting.state.sums
        self.fitting.network.train()
        batches = self.train_stream.epoch(state.epoch, start_step=state.step)
        while True:
            self.progress.check()
            asked = time.perf_counter()
            batch = next(batches, None)
            sums.waited += time.perf_counter() - asked
            if batch is None:
                return
            loss = self._step(batch, warm_up=warm_up)
            state.step += 1
            sums.texts += len(batch.text)
            sums.slots += batch.mask.size
            sums.seconds += time.perf_counter() - asked
            if time.monotonic() - self.saved_at > 60 * self.config.fit.checkpoint_minutes:
                self._save()
            self.progress.advance(len(batch.text), loss=loss)

    def _step(self, texts: TextBatch, *, warm_up: bool) -> float:
        state, network = self.fitting.state, self.fitting.network
        batch = Batch.of(texts, self.config, self.device)
        # Everything random in a step follows from its name, so that a checkpoint needs no generator's state.
        entropy = np.random.SeedSequence([self.config.seed, state.epoch, state.step])
        dropout_seed, draw_seed = (int(word) for word in entropy.generate_state(2))
        generator = torch.Generator(self.device).manual_seed(draw_seed)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(dropout_seed)
            output = network.warm_up(batch) if warm_up else network(batch, generator=generator)
            parts = torch.stack(list(output.losses.values()))
            loss = parts.sum()
            self.fitting.optimizer.zero_grad()
            loss.backward()
        values = parts.tolist()
        if not all(math.isfinite(value) for value in values):
            raise ClvqError(
                f"the loss is {sum(values)} at step {state.step} of epoch {state.epoch} of {self.out}: "
                "begin again with a lower optimizer.lr, or another seed; the last checkpoint is kept"
            )
        self.fitting.optimizer.step()
        upper = batch.upper[batch.mask]
        for name, value in zip(output.losses, values, strict=True):
            state.sums.losses[name] = state.sums.losses.get(name, 0.0) + value * len(upper)
        state.sums.rows += len(upper)
        if not warm_up:
            self.fitting.code_counts += torch.bincount(output.index, minlength=self.config.quantizer.codes)
            self.fitting.code_sums.index_add_(0, output.index, upper.double())
        return float(sum(values))

    def _end_epoch(self, *, warm_up: bool) -> None:
        """Measure, note, and decide how to go on."""
        fitting, state, settings = self.fitting, self.fitting.state, self.config.fit
        held_out = held_out_figures(
            fitting.network,
            self.held_out_stream,
            self.config,
            warm_up=warm_up,
            own_table=self._own_table(),
            device=self.device,
            progress=self.progress,
        )
        lost = [name for name, value in held_out.items() if value is not None and not math.isfinite(value)]
        if lost:
            raise ClvqError(
                f"the held-out {lost[0]} is not finite after epoch {state.epoch} of {self.out}: "
                "begin again with a lower optimizer.lr, or another seed; the last checkpoint is kept"
            )
        sums = state.sums
        append_metrics(
            self.out,
            {
                "epoch": state.epoch,
                "phase": "warm-up" if warm_up else "train",
                **{f"train_loss_{name}": value / sums.rows for name, value in sums.losses.items()},
                "train_loss_total": sum(sums.losses.values()) / sums.rows,
                **{f"held_out_{name}": value for name, value in held_out.items()},
                "lr": float(fitting.optimizer.param_groups[0]["lr"]),
                "seconds": sums.seconds,
                "rows_per_second": sums.rows / sums.seconds,
                "loader_wait_share": sums.waited / sums.seconds,
                "real_slots_share": sums.rows / sums.slots,
            },
            epoch=state.epoch,
        )
        state.total_seconds += sums.seconds
        state.total_waited += sums.waited
        if not warm_up:
            self._judge(float(held_out[f"loss_{fitting.network.selected_by}"] or 0.0))
        fitting.begin_epoch(state.epoch + 1)
        if state.stop_reason is None and state.epoch == settings.warmup_epochs + settings.epochs:
            state.stop_reason = f"all {settings.epochs} epochs done"
        self._save()

    def _judge(self, value: float) -> None:
        """Keep the best weights, lower the rate on a plateau, stop when patience is over."""
        fitting, state = self.fitting, self.fitting.state
        fitting.plateau.step(value)
        if state.best is None or value < state.best:
            state.best, state.best_epoch, state.epochs_without_better = value, state.epoch, 0
            fitting.keep_best()
        else:
            state.epochs_without_better += 1
        if state.epochs_without_better >= self.config.fit.patience:
            state.stop_reason = f"no better held-out loss for {self.config.fit.patience} epochs"

    def _own_table(self) -> Float[torch.Tensor, "code d_upper"]:
        """The mean upper row of each code's rows in this epoch; of all rows for a code without any."""
        counts, sums = self.fitting.code_counts, self.fitting.code_sums
        means = sums / counts.clamp_min(1)[:, None]
        mean = self.fitting.network.upper_mean.double()
        return torch.where(counts[:, None] > 0, means, mean)
