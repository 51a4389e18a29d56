"""The two networks: encoder, quantiser, decoder and losses put together."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ..cache.statistics import SiteStatistics
from ..cache.stream import TextBatch
from ..errors import ConfigError
from .config import AdaptiveEncoder, PredictorEncoder, TrainConfig
from .decoders import CodesDecoder, MemoryDecoder
from .encoders import AdaptiveResidual, ResidualPredictor
from .quantizer import Quantizer


@dataclass(frozen=True)
class Batch:
    """A batch of whole texts on the device."""

    lower: Float[Tensor, "batch seq d_lower"]
    upper: Float[Tensor, "batch seq d_upper"]
    mask: Bool[Tensor, "batch seq"]
    position: Int64[Tensor, "batch seq"]

    @classmethod
    def of(cls, batch: TextBatch, config: TrainConfig, device: torch.device) -> "Batch":
        """The batch's two sites as tensors."""

        # Copied even on a CPU: numpy's memory may lie at any address, and sums in float32 depend on the alignment.
        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(device, copy=True)

        return cls(
            lower=tensor(batch.values[config.lower]),
            upper=tensor(batch.values[config.upper]),
            mask=tensor(batch.mask),
            position=tensor(batch.position),
        )


@dataclass(frozen=True)
class Output:
    """What a network makes of a batch; rows are the real ones, text after text."""

    losses: dict[str, Float[Tensor, ""]]
    """Weighted parts of the loss."""
    index: Int64[Tensor, " coded"]
    """Each row's code; empty in the warm-up."""
    predicted: Float[Tensor, "row d_upper"]
    """Upper rows as predicted, in raw coordinates."""


class Network(nn.Module):
    """What both networks share: the quantiser, and where the sites lie.

    `lower_mean`, `lower_scale`, `upper_mean`, `upper_scale` are the training rows' mean and the root mean square of
    the entries of the centred rows.
    """

    quantizer: Quantizer
    lower_mean: Float[Tensor, " d_lower"]
    lower_scale: Float[Tensor, ""]
    upper_mean: Float[Tensor, " d_upper"]
    upper_scale: Float[Tensor, ""]
    selected_by: str
    """The part of the held-out loss that decides which epoch is best: one of `losses`, or their sum `total`."""

    def __init__(self, d_lower: int, d_upper: int) -> None:
        super().__init__()
        self.register_buffer("lower_mean", torch.zeros(d_lower))
        self.register_buffer("lower_scale", torch.ones(()))
        self.register_buffer("upper_mean", torch.zeros(d_upper))
        self.register_buffer("upper_scale", torch.ones(()))

    def place(self, lower: SiteStatistics, upper: SiteStatistics) -> None:
        """Take over the statistics of the training rows."""
        for mean, scale, site in (
            (self.lower_mean, self.lower_scale, lower),
            (self.upper_mean, self.upper_scale, upper),
        ):
            mean.copy_(torch.tensor(site.mean))
            # A site without any variance is left as it is.
            scale.fill_(float(np.sqrt(site.variance().mean())) or 1.0)

    def encode(self, lower: Float[Tensor, "row d_lower"]) -> Float[Tensor, "row d"]:
        """What the quantiser sees of raw lower rows."""
        raise NotImplementedError

    def forward(self, batch: Batch, *, generator: torch.Generator | None = None) -> Output:
        """Losses and predictions; in training mode the codebook moves."""
        raise NotImplementedError

    def warm_up(self, batch: Batch) -> Output:
        """Losses, at weight 1, and predictions of the encoder alone."""
        raise NotImplementedError

    def from_codes(
        self,
        index: Int64[Tensor, " row"],
        mask: Bool[Tensor, "batch seq"],
        position: Int64[Tensor, "batch seq"],
    ) -> Float[Tensor, "row d_upper"]:
        """Upper rows, in raw coordinates, from nothing but the texts' codes."""
        raise NotImplementedError


class PaperNetwork(Network):
    """The published network, in raw coordinates; its decoder attends to the unquantised rows too."""

    selected_by = "total"

    def __init__(self, config: TrainConfig, encoder: AdaptiveEncoder, *, d_lower: int, d_upper: int) -> None:
        super().__init__(d_lower, d_upper)
        self.encoder = AdaptiveResidual(d_lower, mix_start=encoder.mix_start)
        self.quantizer = Quantizer(config.quantizer, width=d_lower)
        self.decoder = MemoryDecoder(config.decoder, width=d_lower, d_upper=d_upper)

    def encode(self, lower: Float[Tensor, "row d_lower"]) -> Float[Tensor, "row d"]:
        encoded: Tensor = self.encoder(lower)
        return encoded

    def forward(self, batch: Batch, *, generator: torch.Generator | None = None) -> Output:
        encoded = self.encode(batch.lower[batch.mask])
        quantized = self.quantizer.forward(encoded, generator=generator)
        codes, memory = (_laid_out(rows, batch.mask) for rows in (quantized.straight, encoded))
        predicted = self.decoder(codes, memory, batch.mask)[batch.mask]
        losses = {
            "reconstruction": F.mse_loss(predicted, batch.upper[batch.mask]),
            "commitment": quantized.commitment,
        }
        return Output(losses=losses, index=quantized.index, predicted=predicted)

    def from_codes(
        self,
        index: Int64[Tensor, " row"],
        mask: Bool[Tensor, "batch seq"],
        position: Int64[Tensor, "batch seq"],
    ) -> Float[Tensor, "row d_upper"]:
        codes = _laid_out(self.quantizer.codebook[index], mask)
        upper: Tensor = self.decoder(codes, codes, mask)[mask]
        return upper


class DefaultNetwork(Network):
    """Centred, scaled sites; codes in the upper site's space; a decoder that sees codes only."""

    selected_by = "own"

    def __init__(self, config: TrainConfig, encoder: PredictorEncoder, *, d_lower: int, d_upper: int) -> None:
        super().__init__(d_lower, d_upper)
        self.predictor_weight = encoder.weight
        self.encoder = ResidualPredictor(d_lower, d_upper, expansion=encoder.expansion)
        self.quantizer = Quantizer(config.quantizer, width=d_upper)
        self.decoder = CodesDecoder(config.decoder, width=d_upper)

    def encode(self, lower: Float[Tensor, "row d_lower"]) -> Float[Tensor, "row d"]:
        encoded: Tensor = self.encoder((lower - self.lower_mean) / self.lower_scale)
        return encoded

    def _target(self, batch: Batch) -> Float[Tensor, "row d_upper"]:
        return (batch.upper[batch.mask] - self.upper_mean) / self.upper_scale

    def _raw(self, upper: Float[Tensor, "row d_upper"]) -> Float[Tensor, "row d_upper"]:
        return upper * self.upper_scale + self.upper_mean

    def warm_up(self, batch: Batch) -> Output:
        encoded = self.encode(batch.lower[batch.mask])
        nothing = torch.empty(0, dtype=torch.int64, device=encoded.device)
        losses = {"predictor": F.mse_loss(encoded, self._target(batch))}
        return Output(losses=losses, index=nothing, predicted=self._raw(encoded))

    def forward(self, batch: Batch, *, generator: torch.Generator | None = None) -> Output:
        target = self._target(batch)
        encoded = self.encode(batch.lower[batch.mask])
        quantized = self.quantizer.forward(encoded, generator=generator)
        alone = self.decoder.alone(quantized.straight)
        added = self.decoder.context(_laid_out(quantized.straight, batch.mask), batch.mask, batch.position)
        predicted = alone + added[batch.mask]
        losses = {
            "own": F.mse_loss(alone, target),
            "context": F.mse_loss(predicted, target),
            "commitment": quantized.commitment,
            "predictor": self.predictor_weight * F.mse_loss(encoded, target),
        }
        return Output(losses=losses, index=quantized.index, predicted=self._raw(predicted))

    def from_codes(
        self,
        index: Int64[Tensor, " row"],
        mask: Bool[Tensor, "batch seq"],
        position: Int64[Tensor, "batch seq"],
    ) -> Float[Tensor, "row d_upper"]:
        codes = self.quantizer.codebook[index]
        added = self.decoder.context(_laid_out(codes, mask), mask, position)[mask]
        return self._raw(self.decoder.alone(codes) + added)


def build(config: TrainConfig, *, d_lower: int, d_upper: int) -> Network:
    """The network of the settings, its weights drawn from torch's own generator.

    Raises
    ------
    ConfigError
        Where the settings do not go together.
    """
    quantizer, width = config.quantizer, d_lower if config.preset == "paper" else d_upper
    if width % config.decoder.heads:
        fitting = ", ".join(str(heads) for heads in range(1, 17) if width % heads == 0)
        raise ConfigError(
            f"decoder.heads = {config.decoder.heads} does not divide the codes' {width} channels: "
            f"set decoder.heads to one of {fitting}"
        )
    if quantizer.top_k > quantizer.codes:
        raise ConfigError(f"quantizer.top_k = {quantizer.top_k} is more than the {quantizer.codes} codes: set it lower")
    if config.preset == "paper" and isinstance(config.encoder, AdaptiveEncoder) and config.fit.warmup_epochs == 0:
        return PaperNetwork(config, config.encoder, d_lower=d_lower, d_upper=d_upper)
    if config.preset == "default" and isinstance(config.encoder, PredictorEncoder):
        return DefaultNetwork(config, config.encoder, d_lower=d_lower, d_upper=d_upper)
    raise ConfigError(
        f"preset {config.preset!r} has no encoder {config.encoder.kind!r} with {config.fit.warmup_epochs} warm-up "
        "epochs: 'paper' has 'adaptive' and no warm-up, 'default' has 'predictor'"
    )


def _laid_out(rows: Float[Tensor, "row d"], mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d"]:
    """Rows put back into their texts; zero where there is none."""
    # Out of place, so that the gradient finds its way back to the rows.
    return rows.new_zeros(*mask.shape, rows.shape[1]).masked_scatter(mask[..., None], rows)
