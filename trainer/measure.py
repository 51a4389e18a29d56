"""Figures of a network on texts that it was not trained on."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..cache.stream import TextBatch, TextStream
from ..progress import Progress
from .config import TrainConfig
from .network import Batch, Network


class Unexplained:
    """FVU, the fraction of variance unexplained: Σ‖y − ŷ‖² / Σ‖y − ȳ‖², ȳ the mean of the rows measured; in float64.

    Parameters
    ----------
    near
        Any vector near the mean, from which deviations are counted so that no digits are lost.
    """

    def __init__(self, near: Float[Tensor, " d"]) -> None:
        self._near = near.double()
        self._sum = torch.zeros_like(self._near)
        self._squares = self._near.new_zeros(())
        self._errors: dict[str, Tensor] = {}
        self._rows = 0

    def add(self, upper: Float[Tensor, "row d"], **predicted: Float[Tensor, "row d"]) -> None:
        """Count rows with each way of predicting them."""
        shifted = upper.double() - self._near
        self._sum += shifted.sum(dim=0)
        self._squares += shifted.square().sum()
        self._rows += len(upper)
        for name, values in predicted.items():
            error = (upper.double() - values.double()).square().sum()
            self._errors[name] = self._errors[name] + error if name in self._errors else error

    def values(self) -> dict[str, float | None]:
        """FVU of each way; `None` where the rows do not vary."""
        variance = float(self._squares - self._sum.square().sum() / self._rows)
        return {name: float(error) / variance if variance > 0 else None for name, error in self._errors.items()}


def perplexity(counts: Int64[np.ndarray, " code"]) -> float:
    """exp of the entropy of the codes' frequencies; 0 where there are no rows."""
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def batches(
    stream: TextStream, config: TrainConfig, device: torch.device, *, progress: Progress
) -> Iterator[tuple[TextBatch, Batch]]:
    """All batches of the stream, with a safe point before each."""
    for batch in stream.epoch(0):
        progress.check()
        yield batch, Batch.of(batch, config, device)


@torch.no_grad()
def held_out_figures(
    network: Network,
    stream: TextStream,
    config: TrainConfig,
    *,
    warm_up: bool,
    own_table: Float[Tensor, "code d_upper"],
    device: torch.device,
    progress: Progress,
) -> dict[str, float | int | None]:
    """Losses (`loss_…`), FVU, perplexity and used codes on the held-out texts, codes taken by argmin.

    Parameters
    ----------
    own_table
        An upper row for each code, by which `own_code_fvu` predicts.
    """
    network.eval()
    losses: dict[str, float] = {}
    rows, counts = 0, np.zeros(config.quantizer.codes, dtype=np.int64)
    fvu = Unexplained(network.upper_mean)
    for _, batch in batches(stream, config, device, progress=progress):
        output = network.warm_up(batch) if warm_up else network(batch)
        upper = batch.upper[batch.mask]
        rows += len(upper)
        for name, value in output.losses.items():
            losses[name] = losses.get(name, 0.0) + float(value) * len(upper)
        if warm_up:
            fvu.add(upper, predictor_fvu=output.predicted)
        else:
            fvu.add(upper, decoder_fvu=output.predicted, own_code_fvu=own_table[output.index])
            counts += np.bincount(output.index.cpu().numpy(), minlength=len(counts))
    figures: dict[str, float | int | None] = {f"loss_{name}": value / rows for name, value in losses.items()}
    figures["loss_total"] = sum(losses.values()) / rows
    figures |= fvu.values()
    if not warm_up:
        figures |= {"perplexity": perplexity(counts), "used_codes": int((counts > 0).sum())}
    return figures
