"""The two networks: encoder, quantiser, decoder and losses put together."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ..cache.statistics import SiteStatistics
from ..cache.stream import TextBatch
from ..errors import ConfigError
from .config import AdaptiveEncoder, EmaQuantizer, FixedQuantizer, PredictorEncoder, TrainConfig
from .decoders import CodesDecoder, MemoryDecoder
from .encoders import AdaptiveResidual, ResidualPredictor
from .noise import RowNoise
from .quantizer import Codebook, EmaCodebook, mean_square


@dataclass(frozen=True)
class Batch:
    """A batch of whole texts on the device."""

    lower: Float[Tensor, "batch seq d_lower"]
    upper: Float[Tensor, "batch seq d_upper"]
    mask: Bool[Tensor, "batch seq"]
    position: Int64[Tensor, "batch seq"]
    row: Int64[Tensor, "batch seq"]
    """Each row's place in the cache; −1 where there is none."""

    @classmethod
    def of(cls, batch: TextBatch, config: TrainConfig, device: torch.device) -> "Batch":
        """The batch's two sites as tensors."""
        return cls(
            lower=on_device(batch.values[config.lower], device),
            upper=on_device(batch.values[config.upper], device),
            mask=on_device(batch.mask, device),
            position=on_device(batch.position, device),
            row=on_device(batch.row, device),
        )


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy as a tensor."""
    # Copied even on a CPU: numpy's memory may lie at any address, and sums in float32 depend on the alignment.
    return torch.from_numpy(values).to(device, copy=True)


@dataclass(frozen=True)
class Output:
    """What a network makes of a batch; rows are the real ones, text after text."""

    losses: dict[str, Float[Tensor, ""]]
    """Weighted parts of the loss, means over the batch's rows."""
    index: Int64[Tensor, " row"]
    """Each row's code."""
    predicted: Float[Tensor, "row d_upper"]
    """Upper rows as predicted, in raw coordinates."""


class Network(nn.Module):
    """What both networks share: the codebook, and where the sites lie.

    `lower_mean`, `upper_mean` are the training rows' means; `lower_scale` the standard deviation of each channel,
    `upper_scale` the root mean square of the entries of the centred rows.
    """

    quantizer: Codebook
    lower_mean: Float[Tensor, " d_lower"]
    lower_scale: Float[Tensor, " d_lower"]
    upper_mean: Float[Tensor, " d_upper"]
    upper_scale: Float[Tensor, ""]
    codes_space: Literal["lower", "upper"]
    """Which site's vectors codes are like."""

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

    def encode(self, lower: Float[Tensor, "row d_lower"]) -> Float[Tensor, "row d"]:
        """What the quantiser sees of raw lower rows."""
        raise NotImplementedError

    def forward(self, batch: Batch, *, noise: RowNoise | None = None) -> Output:
        """Losses and predictions; in training mode a codebook that follows its rows moves."""
        raise NotImplementedError

    def from_codes(
        self,
        index: Int64[Tensor, " row"],
        mask: Bool[Tensor, "batch seq"],
        position: Int64[Tensor, "batch seq"],
    ) -> Float[Tensor, "row d_upper"]:
        """Upper rows, in raw coordinates, from nothing but the texts' codes."""
        raise NotImplementedError

    def trained_with_codes(self) -> list[Tensor]:
        """The parameters that learn from `forward`."""
        return list(self.parameters())


class PaperNetwork(Network):
    """The published network, in raw coordinates; its decoder attends to the unquantised rows too."""

    codes_space = "lower"
    quantizer: EmaCodebook

    def __init__(
        self, config: TrainConfig, encoder: AdaptiveEncoder, quantizer: EmaQuantizer, *, d_lower: int, d_upper: int
    ) -> None:
        super().__init__(d_lower, d_upper)
        self.encoder = AdaptiveResidual(d_lower, mix_start=encoder.mix_start)
        self.quantizer = EmaCodebook(quantizer, width=d_lower)
        self.decoder = MemoryDecoder(config.decoder, width=d_lower, d_upper=d_upper)

    def encode(self, lower: Float[Tensor, "row d_lower"]) -> Float[Tensor, "row d"]:
        encoded: Tensor = self.encoder(lower).float()
        return encoded

    def forward(self, batch: Batch, *, noise: RowNoise | None = None) -> Output:
        encoded = self.encode(batch.lower[batch.mask])
        quantized = self.quantizer.forward(encoded, noise=noise)
        codes, memory = (_laid_out(rows, batch.mask) for rows in (quantized.straight, encoded))
        predicted = self.decoder(codes, memory, batch.mask)[batch.mask].float()
        losses = {
            "reconstruction": mean_square(predicted - batch.upper[batch.mask]),
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
        upper: Tensor = self.decoder(codes, codes, mask)[mask].float()
        return upper


class DefaultNetwork(Network):
    """Centred, scaled sites; codes are predictions of the upper row; a decoder that sees codes only."""

    codes_space = "upper"
    own: Float[Tensor, "code d_upper"]
    """What a code says about its upper row by itself: the mean of its training rows there, centred and scaled."""

    def __init__(
        self, config: TrainConfig, encoder: PredictorEncoder, quantizer: FixedQuantizer, *, d_lower: int, d_upper: int
    ) -> None:
        super().__init__(d_lower, d_upper)
        self.encoder = ResidualPredictor(
            d_lower, d_upper, expansion=encoder.expansion, blocks=encoder.blocks, dropout=encoder.dropout
        )
        self.quantizer = Codebook(quantizer.codes, width=d_upper)
        self.register_buffer("own", torch.zeros(quantizer.codes, d_upper))
        self.decoder = CodesDecoder(config.decoder, width=d_upper)

    def encode(self, lower: Float[Tensor, "row d_lower"]) -> Float[Tensor, "row d"]:
        encoded: Tensor = self.encoder((lower - self.lower_mean) / self.lower_scale).float()
        return encoded

    def trained_with_codes(self) -> list[Tensor]:
        return list(self.decoder.parameters())

    def scaled(self, upper: Float[Tensor, "row d_upper"]) -> Float[Tensor, "row d_upper"]:
        """Raw upper rows, centred and scaled."""
        return (upper - self.upper_mean) / self.upper_scale

    def raw(self, upper: Float[Tensor, "row d_upper"]) -> Float[Tensor, "row d_upper"]:
        """The inverse of `scaled`."""
        return upper * self.upper_scale + self.upper_mean

    def prediction_loss(
        self, lower: Float[Tensor, "row d_lower"], upper: Float[Tensor, "row d_upper"]
    ) -> Float[Tensor, ""]:
        """Mean squared error per entry of the encoder as a predictor, in scaled coordinates."""
        return mean_square(self.encode(lower) - self.scaled(upper))

    def forward(self, batch: Batch, *, noise: RowNoise | None = None) -> Output:
        # Neither encoder nor codes learn from the decoder, which is given the codes that rows will have: no dropout.
        self.encoder.eval()
        with torch.no_grad():
            index = self.quantizer.nearest(self.encode(batch.lower[batch.mask]))
        predicted = self._decoded(index, batch.mask, batch.position)
        losses = {"decoder": mean_square(predicted - self.scaled(batch.upper[batch.mask]))}
        return Output(losses=losses, index=index, predicted=self.raw(predicted))

    def from_codes(
        self,
        index: Int64[Tensor, " row"],
        mask: Bool[Tensor, "batch seq"],
        position: Int64[Tensor, "batch seq"],
    ) -> Float[Tensor, "row d_upper"]:
        return self.raw(self._decoded(index, mask, position))

    def _decoded(
        self,
        index: Int64[Tensor, " row"],
        mask: Bool[Tensor, "batch seq"],
        position: Int64[Tensor, "batch seq"],
    ) -> Float[Tensor, "row d_upper"]:
        codes = self.own[index]
        added: Tensor = self.decoder(_laid_out(codes, mask), mask, position)
        return codes + added[mask].float()


def build(config: TrainConfig, *, d_lower: int, d_upper: int) -> Network:
    """The network of the settings, its weights drawn from torch's own generator.

    Raises
    ------
    ConfigError
        Where the settings do not go together.
    """
    quantizer, encoder, width = config.quantizer, config.encoder, d_lower if config.preset == "paper" else d_upper
    if width % config.decoder.heads:
        fitting = ", ".join(str(heads) for heads in range(1, 17) if width % heads == 0)
        raise ConfigError(
            f"decoder.heads = {config.decoder.heads} does not divide the codes' {width} channels: "
            f"set decoder.heads to one of {fitting}"
        )
    if config.preset == "paper" and isinstance(encoder, AdaptiveEncoder) and isinstance(quantizer, EmaQuantizer):
        if quantizer.top_k > quantizer.codes:
            raise ConfigError(
                f"quantizer.top_k = {quantizer.top_k} is more than the {quantizer.codes} codes: set it lower"
            )
        return PaperNetwork(config, encoder, quantizer, d_lower=d_lower, d_upper=d_upper)
    if config.preset == "default" and isinstance(encoder, PredictorEncoder) and isinstance(quantizer, FixedQuantizer):
        return DefaultNetwork(config, encoder, quantizer, d_lower=d_lower, d_upper=d_upper)
    raise ConfigError(
        f"preset {config.preset!r} has no encoder {encoder.kind!r} with a quantizer {quantizer.kind!r}: "
        "'paper' has 'adaptive' with 'ema', 'default' has 'predictor' with 'fixed'"
    )


def _laid_out(rows: Float[Tensor, "row d"], mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d"]:
    """Rows put back into their texts; zero where there is none."""
    # Out of place, so that the gradient finds its way back to the rows.
    return rows.new_zeros(*mask.shape, rows.shape[1]).masked_scatter(mask[..., None], rows)
