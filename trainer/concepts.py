"""What every method leaves behind: raw lower rows to concepts, and what can be said of the concepts' places."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ..cache.statistics import SiteStatistics
from ..cache.stream import TextBatch
from .config import MethodConfig


@dataclass(frozen=True)
class Batch:
    """A batch of whole texts on the device."""

    lower: Float[Tensor, "batch seq d_lower"]
    upper: Float[Tensor, "batch seq d_upper"]
    target: Float[Tensor, "batch seq d_target"]
    """What is reconstructed: one of the two."""
    mask: Bool[Tensor, "batch seq"]
    position: Int64[Tensor, "batch seq"]
    row: Int64[Tensor, "batch seq"]
    """Each row's place in the cache; −1 where there is none."""

    @classmethod
    def of(cls, batch: TextBatch, config: MethodConfig, device: torch.device) -> "Batch":
        """The batch's two sites as tensors."""
        sites = {site: on_device(batch.values[site], device) for site in dict.fromkeys([config.lower, config.upper])}
        return cls(
            lower=sites[config.lower],
            upper=sites[config.upper],
            target=sites[config.target],
            mask=on_device(batch.mask, device),
            position=on_device(batch.position, device),
            row=on_device(batch.row, device),
        )


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy as a tensor."""
    # Copied even on a CPU: numpy's memory may lie at any address, and sums in float32 depend on the alignment.
    return torch.from_numpy(values).to(device, copy=True)


@dataclass(frozen=True)
class Measured:
    """What a model says of a batch's rows, text after text."""

    index: Int64[Tensor, " row"]
    """Each row's concept."""
    predicted: dict[str, Float[Tensor, "row d_target"]] = field(default_factory=dict)
    """Name of a figure → the target rows as predicted, in raw coordinates."""
    active: Int64[Tensor, " latent"] | None = None
    """Rows on which each latent is active."""


class ConceptModel(nn.Module):
    """A model of concepts at the lower site.

    `lower_mean`, `upper_mean` are the training rows' means; `lower_scale` the standard deviation of each channel,
    `upper_scale` the root mean square of the entries of the centred rows.
    """

    lower_mean: Float[Tensor, " d_lower"]
    lower_scale: Float[Tensor, " d_lower"]
    upper_mean: Float[Tensor, " d_upper"]
    upper_scale: Float[Tensor, ""]

    def __init__(self, d_lower: int, d_upper: int) -> None:
        super().__init__()
        self.register_buffer("lower_mean", torch.zeros(d_lower))
        self.register_buffer("lower_scale", torch.ones(d_lower))
        self.register_buffer("upper_mean", torch.zeros(d_upper))
        self.register_buffer("upper_scale", torch.ones(()))

    def place(self, lower: SiteStatistics, upper: SiteStatistics) -> None:
        """Take over the statistics of the training rows."""
        self.lower_mean.copy_(torch.tensor(lower.mean))
        self.upper_mean.copy_(torch.tensor(upper.mean))
        deviation = torch.from_numpy(np.sqrt(lower.variance()))
        # What does not vary is left as it is.
        self.lower_scale.copy_(torch.where(deviation > 0, deviation, 1.0))
        self.upper_scale.fill_(float(np.sqrt(upper.variance().mean())) or 1.0)

    def target_mean(self, config: MethodConfig) -> Float[Tensor, " d_target"]:
        """The mean of the training rows at the site that is reconstructed."""
        return self.upper_mean if config.target == config.upper else self.lower_mean

    @property
    def lower_rms(self) -> Float[Tensor, ""]:
        """The root mean square of the entries of the centred lower rows."""
        return self.lower_scale.square().mean().sqrt()

    def concept(self, lower: Float[Tensor, "row d_lower"]) -> Int64[Tensor, " row"]:
        """The concept of each raw lower row."""
        raise NotImplementedError

    def measure(self, batch: Batch) -> Measured:
        """Concepts, and what the model itself predicts."""
        return Measured(index=self.concept(batch.lower[batch.mask]))

    def vectors(self) -> Float[Tensor, "concept d"] | None:
        """The concepts' vectors where the model has any, in coordinates of its own."""
        return None

    def published(self) -> Float[Tensor, "concept d_lower"] | None:
        """What the published protocol removes for each concept, where that is not the mean of its rows."""
        return None

    def directions(self) -> Float[Tensor, "concept d_lower"] | None:
        """The concepts' directions, where those are not the deviation of the mean of their rows."""
        return None


class RowTrained:
    """A model that learns from rows in random order, before anything else or alone."""

    def row_losses(
        self, lower: Float[Tensor, "row d_lower"], target: Float[Tensor, "row d_target"], *, total: int
    ) -> dict[str, Float[Tensor, ""]]:
        """Weighted parts of the loss, means over the rows given.

        Parameters
        ----------
        total
            Rows of the whole batch, over all processes.
        """
        raise NotImplementedError

    def measure_rows(
        self, lower: Float[Tensor, "row d_lower"], target: Float[Tensor, "row d_target"]
    ) -> tuple[dict[str, Float[Tensor, ""]], dict[str, Float[Tensor, "row d_target"]]]:
        """Parts of the loss, and by the name of a figure the target rows as predicted, in raw coordinates."""
        raise NotImplementedError

    def trained_by_rows(self) -> list[Tensor]:
        """The parameters that learn from `row_losses`."""
        raise NotImplementedError

    def before_step(self) -> None:
        """Change the gradients before the optimiser uses them."""

    def after_step(self) -> None:
        """Bring the weights back to where they have to be."""
