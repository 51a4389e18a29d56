"""The course of a training: statistics, the encoder's own epochs, the codebook's start, all other epochs, results."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32
from pydantic import JsonValue
from torch import Tensor

from ..attention import without_cudnn_attention
from ..cache.reader import Cache
from ..cache.row_stream import RowBatch, RowStream
from ..cache.stream import TextBatch
from ..errors import ClvqError, Interrupted
from ..progress import Progress
from . import ranks
from .checkpoint import Fitting
from .concepts import Batch, ConceptModel, RowTrained, on_device
from .config import AdaptiveEncoder, EmaQuantizer, PredictorEncoder, TrainConfig
from .data import Texts, blocks, statistics, text_stream
from .folder import CHECKPOINT, TENSORBOARD, append_metrics, read_metrics
from .kmeans import kmeans
from .measure import held_out_figures, row_figures
from .methods import SparseEncoder, TrainedConfig
from .network import DefaultNetwork, Network, Output
from .noise import RowNoise
from .quantizer import EmaCodebook
from .report import training_tables, write_results
from .tensorboard import TensorBoard

# Steps from one comparison of the processes' codebooks to the next: a few ms each, so that it costs nothing.
_COMPARED_EVERY = 100
# Share of a linear schedule in which the rate rises.
_RISE = 0.05
# Held-out figures that are shown while training goes on.
_SHOWN = {
    "own_code_fvu": "FVU",
    "predictor_fvu": "FVU",
    "sae_fvu": "FVU",
    "perplexity": "perplexity",
    "used_codes": "used",
}

Batches = TypeVar("Batches", RowBatch, TextBatch)


class Training:
    """Trains a model into a run's folder; see `fit`."""

    def __init__(
        self,
        cache: Cache,
        config: TrainedConfig,
        texts: Texts,
        network: ConceptModel,
        out: Path,
        *,
        device: torch.device,
        progress: Progress,
        tensorboard: bool,
        shared: Path | None = None,
    ) -> None:
        self.cache, self.config, self.texts, self.out = cache, config, texts, out
        self.device, self.progress, self.tensorboard = device, ranks.Together(progress), tensorboard
        # Of several processes some might find it and others not.
        self.shared = shared if ranks.count() == 1 else None
        self.sites = tuple(dict.fromkeys([config.lower, config.upper]))
        self.row_epochs = 0 if isinstance(config.encoder, AdaptiveEncoder) else config.encoder.epochs
        self.train_texts, self.train_rows = int(texts.train.sum()), texts.train_rows(cache, config)
        self.train_stream, self.held_out_stream = (
            text_stream(cache, config, side, portions=config.fit) for side in (texts.train, texts.held_out)
        )
        optimizer_class = torch.optim.Adam if config.optimizer.name == "adam" else torch.optim.AdamW
        optimizer = optimizer_class(
            network.parameters(), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay, fused=True
        )
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=config.optimizer.plateau_factor, patience=config.optimizer.plateau_patience
        )
        follows = isinstance(config, TrainConfig) and isinstance(config.quantizer, EmaQuantizer)
        self.fitting = Fitting(
            network, optimizer, plateau, codes=config.concepts if follows else 0, d_upper=cache.width(config.upper)
        )
        self.shown: dict[str, float] = {}
        self.saved_at = time.monotonic()

    def run(self) -> None:
        """Train to the end and write the results."""
        checkpoint = self.out / CHECKPOINT
        if ranks.decided(checkpoint.is_file()):
            self.fitting.load(checkpoint)
        elif self.shared is not None and self.shared.is_file():
            for figures in self.fitting.take_over(self.shared):
                self._publish(figures)
        else:
            with ranks.led() as leads:
                if leads:
                    found = statistics(self.cache, self.train_rows, self.sites, progress=self.progress)
                    self.fitting.network.place(found[self.config.lower], found[self.config.upper])
            ranks.spread(*self.fitting.network.buffers())
        try:
            while self.fitting.state.stop_reason is None:
                self._next_phase()
            self._finish()
        except Interrupted:
            self._save()
            raise

    def _finish(self) -> None:
        """Write the results of the best epoch's weights."""
        fitting = self.fitting
        # The present weights return to the network if this is interrupted: a checkpoint then holds them, not the best.
        present = {name: tensor.clone() for name, tensor in fitting.network.state_dict().items()}
        fitting.network.load_state_dict(fitting.best_tensors)
        try:
            write_results(
                fitting.network,
                self.cache,
                self.config,
                self.texts,
                self.held_out_stream,
                self.out,
                course=self._course(),
                device=self.device,
                progress=self.progress,
            )
        finally:
            fitting.network.load_state_dict(present)

    def _course(self) -> dict[str, JsonValue]:
        state, config = self.fitting.state, self.config
        done = limit = state.epoch
        if isinstance(config, TrainConfig):
            done, limit = state.epoch - self.row_epochs, config.fit.epochs
        return {
            "epochs": done,
            "best_epoch": state.best_epoch or 0,
            "stopped_early": done < limit,
            "stop_reason": state.stop_reason,
            "loader_wait_share": state.total_waited / state.total_seconds,
            "train_seconds": state.total_seconds,
        }

    def _save(self) -> None:
        self.fitting.save(self.out / CHECKPOINT)
        self.saved_at = time.monotonic()

    def _next_phase(self) -> None:
        """What is learned from rows; or the start of the codebook and all that follows."""
        state, network, encoder = self.fitting.state, self.fitting.network, self.config.encoder
        by_rows = state.epoch < self.row_epochs
        if by_rows and isinstance(network, RowTrained) and not isinstance(encoder, AdaptiveEncoder):
            self._train_on_rows(network, encoder)
            return
        if isinstance(network, Network) and isinstance(self.config, TrainConfig):
            self._train_on_texts(network, self.config)
            return
        state.stop_reason = f"all {self.row_epochs} epochs done"

    def _train_on_texts(self, network: Network, config: TrainConfig) -> None:
        settings, state = config.fit, self.fitting.state
        if not state.codebook_started:
            if self.shared is not None and not self.shared.is_file():
                self.fitting.hand_over(self.shared, metrics=read_metrics(self.out))
            self._start_codebook(network, config)
            state.codebook_started = True
            self._save()
        first, end = self.row_epochs, self.row_epochs + settings.epochs
        self.progress.begin("train", settings.epochs * self.train_texts, "text")
        self.progress.advance((state.epoch - first) * self.train_texts + state.sums.done)
        while state.epoch < end and state.stop_reason is None:
            network.train()
            for batch in _timed(self.train_stream.epoch(state.epoch, start_step=state.step), self.fitting):
                self._text_step(network, config, batch)
            self._end_epoch(network, config)
            if state.stop_reason is None and state.epoch == end:
                state.stop_reason = f"all {settings.epochs} epochs done"
            self._save()

    def _train_on_rows(self, network: RowTrained, encoder: PredictorEncoder | SparseEncoder) -> None:
        state, total = self.fitting.state, self.train_rows.rows
        stream = RowStream(
            self.cache,
            tuple(dict.fromkeys([self.config.lower, self.config.target])),
            self.texts.train,
            special=self.config.special,
            seed=self.config.seed,
            batch_rows=encoder.rows_per_batch,
            pool_bytes=self.config.fit.pool_bytes,
            rank=ranks.number(),
            ranks=ranks.count(),
        )
        model, alone = self.fitting.network, isinstance(encoder, SparseEncoder)
        self.progress.begin("train" if alone else "encoder", encoder.epochs * total, "row")
        self.progress.advance(state.epoch * total + state.sums.done)
        while state.epoch < encoder.epochs:
            model.train()
            for batch in _timed(stream.epoch(state.epoch, start_step=state.step), self.fitting):
                self._row_step(network, batch)
            figures = row_figures(model, self.held_out_stream, self.config, device=self.device, progress=self.progress)
            if alone:
                self._keep_better(float(figures["loss_total"] or 0.0))
            self._note("train" if alone else "encoder", figures)
            self._save()

    @torch.no_grad()
    def _start_codebook(self, network: Network, config: TrainConfig) -> None:
        start = config.start
        network.eval()

        def encoded() -> Iterator[Float32[Tensor, "block d"]]:
            for block in blocks(self.cache, self.train_rows, [config.lower]):
                lower = on_device(block[config.lower], self.device)
                yield network.encode(lower) if start.space == "encoded" else lower

        with ranks.led() as leads:
            if leads:
                found = kmeans(
                    encoded,
                    codes=config.concepts,
                    iterations=start.iterations,
                    seed=config.seed,
                    device=self.device,
                    spherical=start.spherical,
                    tolerance=start.tolerance,
                    progress=self.progress,
                )
                network.quantizer.start(found.centroids)
        ranks.spread(*network.quantizer.buffers())
        if isinstance(network, DefaultNetwork):
            tables = training_tables(network, self.cache, config, self.texts, self.device, progress=self.progress)
            network.own.copy_(network.scaled(tables.upper_table))

    def _row_step(self, network: RowTrained, rows: RowBatch) -> None:
        (total,) = self._agree(len(rows.row))
        lower, target = (on_device(rows.values[site], self.device) for site in (self.config.lower, self.config.target))
        done = self.fitting.state.epoch + self.fitting.state.sums.done / self.train_rows.rows
        self._rate(done / self.row_epochs)
        with self._step_conditions():
            losses = network.row_losses(lower, target, total=total)
        values = self._descend(losses, network.trained_by_rows(), len(lower), total, network)
        self._end_step(values, rows=total, slots=total, done=total)

    def _text_step(self, network: Network, config: TrainConfig, texts: TextBatch) -> None:
        state = self.fitting.state
        total, count, slots = self._agree(int(texts.mask.sum()), len(texts.text), texts.mask.size)
        batch = Batch.of(texts, config, self.device)
        done = state.epoch - self.row_epochs + state.sums.done / self.train_texts
        self._rate(done / config.fit.epochs)
        key = int(np.random.SeedSequence([config.seed, state.epoch, state.step]).generate_state(1, np.uint64)[0])
        with self._step_conditions():
            output: Output = network(batch, noise=RowNoise(key - 2**63, batch.row[batch.mask]))
        values = self._descend(output.losses, network.trained_with_codes(), len(output.index), total)
        if isinstance(network.quantizer, EmaCodebook):
            self.fitting.code_counts += torch.bincount(output.index, minlength=config.concepts)
            self.fitting.code_sums.index_add_(0, output.index, batch.upper[batch.mask].double())
        if state.step % _COMPARED_EVERY == 0:
            ranks.require_equal("codebook", network.quantizer.codebook)
        self._end_step(values, rows=total, slots=slots, done=count)

    def _agree(self, *mine: int) -> list[int]:
        """A safe point, at which a checkpoint is saved where it is time; gives the sums over all processes."""
        # Clocks differ: it is time when it is for the first process.
        due = ranks.number() == 0 and time.monotonic() - self.saved_at > 60 * self.config.fit.checkpoint_minutes
        *sums, save = self.progress.agree(*mine, int(due))
        if save:
            self._save()
        return sums

    def _rate(self, done: float) -> None:
        """Set the rate of a linear schedule, `done` of 1 being over."""
        if self.config.optimizer.schedule == "linear":
            for group in self.fitting.optimizer.param_groups:
                group["lr"] = self.config.optimizer.lr * min(1.0, (done + 1e-3) / _RISE) * (1 - done)

    @contextmanager
    def _step_conditions(self) -> Iterator[None]:
        """How a step computes its losses.

        What dropout draws follows from the step's name, so that a checkpoint needs no generator's state.
        """
        state = self.fitting.state
        entropy = np.random.SeedSequence([self.config.seed, state.epoch, state.step, ranks.number()])
        low = self.config.fit.precision == "bfloat16"
        with (
            torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
            torch.autocast(self.device.type, torch.bfloat16, enabled=low),
            without_cudnn_attention(),
        ):
            torch.manual_seed(int(entropy.generate_state(1)[0]))
            yield

    def _descend(
        self,
        losses: dict[str, Tensor],
        trained: list[Tensor],
        rows: int,
        total: int,
        learner: RowTrained | None = None,
    ) -> dict[str, float]:
        """One step of the optimiser on `rows` of the batch's `total`; gives the parts of the whole batch's loss."""
        parts = torch.stack(list(losses.values())) * (rows / total)
        self.fitting.optimizer.zero_grad()
        parts.sum().backward()
        values = parts.detach().clone()
        for tensor in trained:
            # There is none where this process has no row of the batch.
            tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        ranks.add_up(*(tensor.grad for tensor in trained if tensor.grad is not None), values)
        plain = dict(zip(losses, values.tolist(), strict=True))
        if not all(math.isfinite(value) for value in plain.values()):
            state = self.fitting.state
            raise ClvqError(
                f"the loss is {sum(plain.values())} at step {state.step} of epoch {state.epoch} of {self.out}: "
                "begin again with a lower optimizer.lr, or another seed; the last checkpoint is kept"
            )
        if learner is not None:
            learner.before_step()
        self.fitting.optimizer.step()
        if learner is not None:
            learner.after_step()
        return plain

    def _end_step(self, losses: dict[str, float], *, rows: int, slots: int, done: int) -> None:
        state = self.fitting.state
        for name, value in losses.items():
            state.sums.losses[name] = state.sums.losses.get(name, 0.0) + value * rows
        state.sums.rows += rows
        state.sums.slots += slots
        state.sums.done += done
        state.step += 1
        wait = round(state.sums.waited / state.sums.seconds, 2) if state.sums.seconds else 0.0
        self.progress.advance(done, loss=sum(losses.values()), **self.shown, wait=wait)

    def _end_epoch(self, network: Network, config: TrainConfig) -> None:
        """Measure, note, and decide how to go on."""
        figures = held_out_figures(
            network,
            self.held_out_stream,
            config,
            own_table=self._own_table(network),
            device=self.device,
            progress=self.progress,
        )
        self._judge(float(figures["loss_total"] or 0.0), config)
        self._note("train", figures)

    def _note(self, phase: str, held_out: dict[str, float | int | None]) -> None:
        """Write the epoch's figures down and begin the next one."""
        fitting, state = self.fitting, self.fitting.state
        lost = [name for name, value in held_out.items() if value is not None and not math.isfinite(value)]
        if lost:
            raise ClvqError(
                f"the held-out {lost[0]} is not finite after epoch {state.epoch} of {self.out}: "
                "begin again with a lower optimizer.lr, or another seed; the last checkpoint is kept"
            )
        for name, tensor in fitting.network.state_dict().items():
            ranks.require_equal(name, tensor)
        sums = state.sums
        figures = {
            "epoch": state.epoch,
            "phase": phase,
            **{f"train_loss_{name}": value / sums.rows for name, value in sums.losses.items()},
            "train_loss_total": sum(sums.losses.values()) / sums.rows,
            **{f"held_out_{name}": value for name, value in held_out.items()},
            "lr": float(fitting.optimizer.param_groups[0]["lr"]),
            "seconds": sums.seconds,
            "rows_per_second": sums.rows / sums.seconds,
            "loader_wait_share": sums.waited / sums.seconds,
            "real_slots_share": sums.rows / sums.slots,
        }
        with ranks.led() as leads:
            if leads:
                self._publish(figures)
        self.shown = {
            shown: float(held_out[name] or 0.0) for name, shown in _SHOWN.items() if held_out.get(name) is not None
        }
        state.total_seconds += sums.seconds
        state.total_waited += sums.waited
        fitting.begin_epoch(state.epoch + 1)

    def _publish(self, figures: dict[str, Any]) -> None:
        append_metrics(self.out, figures, epoch=figures["epoch"])
        if self.tensorboard:
            with TensorBoard(self.out / TENSORBOARD, first_epoch=figures["epoch"]) as board:
                board.epoch(figures)

    def _judge(self, value: float, config: TrainConfig) -> None:
        """Keep the best weights, lower the rate on a plateau, stop when patience is over."""
        if config.optimizer.schedule == "plateau":
            self.fitting.plateau.step(value)
        self._keep_better(value)
        if self.fitting.state.epochs_without_better >= config.fit.patience:
            self.fitting.state.stop_reason = f"no better held-out loss for {config.fit.patience} epochs"

    def _keep_better(self, value: float) -> None:
        fitting, state = self.fitting, self.fitting.state
        if state.best is None or value < state.best:
            state.best, state.best_epoch, state.epochs_without_better = value, state.epoch, 0
            fitting.keep_best()
        else:
            state.epochs_without_better += 1

    def _own_table(self, network: Network) -> Float[Tensor, "code d_upper"]:
        """The mean upper row of each code's rows; of all rows for a code without any."""
        if isinstance(network, DefaultNetwork):
            return network.raw(network.own)
        counts, sums = self.fitting.code_counts.clone(), self.fitting.code_sums.clone()
        ranks.add_up(counts, sums)
        means = sums / counts.clamp_min(1)[:, None]
        return torch.where(counts[:, None] > 0, means, network.upper_mean.double())


def _timed(batches: Iterator[Batches], fitting: Fitting) -> Iterator[Batches]:
    """The batches; what is waited for them, and what is done with them, goes into the epoch's sums."""
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        fitting.state.sums.waited += time.perf_counter() - asked
        if batch is None:
            return
        yield batch
        fitting.state.sums.seconds += time.perf_counter() - asked
