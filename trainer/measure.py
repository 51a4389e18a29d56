"""Figures of a network on texts that it was not trained on."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..cache.stream import TextBatch, TextStream
from ..progress import Progress
from . import ranks
from .concepts import Batch, ConceptModel, RowTrained
from .config import MethodConfig, TrainConfig
from .network import Network


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
        """FVU of each way, over the rows of all processes; `None` where the rows do not vary."""
        if not self._errors:
            return {}
        sums = torch.cat([self._sum, self._squares[None], self._squares.new_tensor([self._rows])])
        errors = torch.stack(list(self._errors.values()))
        ranks.add_up(sums, errors)
        total, squares, rows = sums[:-2], sums[-2], sums[-1]
        variance = float(squares - total.square().sum() / rows)
        return {
            name: error / variance if variance > 0 else None
            for name, error in zip(self._errors, errors.tolist(), strict=True)
        }


def perplexity(counts: Int64[np.ndarray, " code"]) -> float:
    """exp of the entropy of the codes' frequencies; 0 where there are no rows."""
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def batches(
    stream: TextStream, config: MethodConfig, device: torch.device, *, progress: Progress
) -> Iterator[tuple[TextBatch, Batch]]:
    """All batches of the stream, with a safe point before each."""
    for batch in stream.epoch(0):
        progress.check()
        yield batch, Batch.of(batch, config, device)


@torch.no_grad()
def row_figures(
    model: ConceptModel, stream: TextStream, config: MethodConfig, *, device: torch.device, progress: Progress
) -> dict[str, float | int | None]:
    """Loss and FVU of a model that learns from rows, on the held-out texts."""
    if not isinstance(model, RowTrained):
        return {}
    model.eval()
    fvu, losses = Unexplained(model.target_mean(config)), _Losses(device)
    for _, batch in batches(stream, config, device, progress=progress):
        target = batch.target[batch.mask]
        found, predicted = model.measure_rows(batch.lower[batch.mask], target)
        losses.add(found, len(target))
        fvu.add(target, **predicted)
    return {**losses.values(), **fvu.values()}


@torch.no_grad()
def held_out_figures(
    network: Network,
    stream: TextStream,
    config: TrainConfig,
    *,
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
    own, fvu = Unexplained(network.upper_mean), Unexplained(network.target_mean(config))
    losses = _Losses(device)
    counts = torch.zeros(config.concepts, dtype=torch.int64, device=device)
    for _, batch in batches(stream, config, device, progress=progress):
        output, upper = network(batch), batch.upper[batch.mask]
        losses.add(output.losses, len(upper))
        fvu.add(batch.target[batch.mask], decoder_fvu=output.predicted)
        own.add(upper, own_code_fvu=own_table[output.index])
        counts += torch.bincount(output.index, minlength=len(counts))
    ranks.add_up(counts)
    used = counts.cpu().numpy()
    return {
        **losses.values(),
        **fvu.values(),
        **own.values(),
        "perplexity": perplexity(used),
        "used_codes": int((used > 0).sum()),
    }


class _Losses:
    """Means over rows of the parts of a loss."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, float] = {}
        self._rows = 0

    def add(self, losses: dict[str, Float[Tensor, ""]], rows: int) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value) * rows
        self._rows += rows

    def values(self) -> dict[str, float]:
        """`loss_…` of each part and `loss_total`, over the rows of all processes."""
        sums = torch.tensor([*self._sums.values(), self._rows], dtype=torch.float64, device=self._device)
        ranks.add_up(sums)
        means = (sums[:-1] / sums[-1]).tolist()
        return {f"loss_{name}": mean for name, mean in zip(self._sums, means, strict=True)} | {"loss_total": sum(means)}
