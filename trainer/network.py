"""The networks with a codebook: encoder, quantiser, decoder and losses put together."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ..errors import ConfigError
from .concepts import Batch, ConceptModel, Measured, RowTrained
from .config import AdaptiveEncoder, EmaQuantizer, FixedQuantizer, PredictorEncoder, TrainConfig
from .decoders import CodesDecoder, MemoryDecoder
from .encoders import AdaptiveResidual, ResidualPredictor
from .noise import RowNoise
from .quantizer import Codebook, EmaCodebook, mean_square


@dataclass(frozen=True)
class Output:
    """What a network makes of a batch; rows are the real ones, text after text."""

    losses: dict[str, Float[Tensor, ""]]
    """Weighted parts of the loss, means over the batch's rows."""
    index: Int64[Tensor, " row"]
    """Each row's code."""
    predicted: Float[Tensor, "row d_target"]
    """Target rows as predicted, in raw coordinates."""


class Network(ConceptModel):
    """What all of them share."""

    quantizer: Codebook

    def encode(self, lower: Float[Tensor, "row d_lower"]) -> Float[Tensor, "row d"]:
        """What the quantiser sees of raw lower rows."""
        raise NotImplementedError

    def concept(self, lower: Float[Tensor, "row d_lower"]) -> Int64[Tensor, " row"]:
        return self.quantizer.nearest(self.encode(lower))

    def measure(self, batch: Batch) -> Measured:
        output = self(batch)
        return Measured(index=output.index, predicted={"decoder_fvu_codes_only": output.predicted})

    def vectors(self) -> Float[Tensor, "concept d"]:
        return self.quantizer.codebook

    def forward(self, batch: Batch, *, noise: RowNoise | None = None) -> Output:
        """Losses and predictions; in training mode a codebook that follows its rows moves."""
        raise NotImplementedError

    def from_codes(
        self,
        index: Int64[Tensor, " row"],
        mask: Bool[Tensor, "batch seq"],
        position: Int64[Tensor, "batch seq"],
    ) -> Float[Tensor, "row d_target"]:
        """Target rows, in raw coordinates, from nothing but the texts' codes."""
        raise NotImplementedError

    def trained_with_codes(self) -> list[Tensor]:
        """The parameters that learn from `forward`."""
        return list(self.parameters())


class PaperNetwork(Network):
    """The published network, in raw coordinates; its decoder attends to the unquantised rows too."""

    quantizer: EmaCodebook

    def __init__(
        self, config: TrainConfig, encoder: AdaptiveEncoder, quantizer: EmaQuantizer, *, d_lower: int, d_upper: int
    ) -> None:
        super().__init__(d_lower, d_upper)
        self.encoder = AdaptiveResidual(d_lower, mix_start=encoder.mix_start)
        self.quantizer = EmaCodebook(quantizer, width=d_lower)
        d_target = d_upper if config.target == config.upper else d_lower
        self.decoder = MemoryDecoder(config.decoder, width=d_lower, d_upper=d_target)

    def measure(self, batch: Batch) -> Measured:
        output = self(batch)
        from_codes = self.from_codes(output.index, batch.mask, batch.position)
        ways = {"decoder_fvu_codes_only": from_codes, "decoder_fvu_published": output.predicted}
        return Measured(index=output.index, predicted=ways)

    def published(self) -> Float[Tensor, "concept d_lower"]:
        return self.quantizer.codebook

    def encode(self, lower: Float[Tensor, "row d_lower"]) -> Float[Tensor, "row d"]:
        encoded: Tensor = self.encoder(lower).float()
        return encoded

    def forward(self, batch: Batch, *, noise: RowNoise | None = None) -> Output:
        encoded = self.encode(batch.lower[batch.mask])
        quantized = self.quantizer.forward(encoded, noise=noise)
        codes, memory = (_laid_out(rows, batch.mask) for rows in (quantized.straight, encoded))
        predicted = self.decoder(codes, memory, batch.mask)[batch.mask].float()
        losses = {
            "reconstruction": mean_square(predicted - batch.target[batch.mask]),
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


class DefaultNetwork(Network, RowTrained):
    """Centred, scaled sites; codes are predictions of the upper row; a decoder that sees codes only."""

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

    def row_losses(
        self, lower: Float[Tensor, "row d_lower"], target: Float[Tensor, "row d_upper"], *, total: int
    ) -> dict[str, Float[Tensor, ""]]:
        """Mean squared error per entry of the encoder as a predictor, in scaled coordinates."""
        return {"predictor": mean_square(self.encode(lower) - self.scaled(target))}

    def measure_rows(
        self, lower: Float[Tensor, "row d_lower"], target: Float[Tensor, "row d_upper"]
    ) -> tuple[dict[str, Float[Tensor, ""]], dict[str, Float[Tensor, "row d_upper"]]]:
        predicted = self.encode(lower)
        losses = {"predictor": mean_square(predicted - self.scaled(target))}
        return losses, {"predictor_fvu": self.raw(predicted)}

    def trained_by_rows(self) -> list[Tensor]:
        return list(self.encoder.parameters())

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


class BottleneckNetwork(Network):
    """A VQ-VAE of the lower rows alone, trained end to end, whose decoder sees codes only."""

    quantizer: EmaCodebook

    def __init__(
        self, config: TrainConfig, encoder: AdaptiveEncoder, quantizer: EmaQuantizer, *, d_lower: int, d_upper: int
    ) -> None:
        super().__init__(d_lower, d_upper)
        self.encoder = AdaptiveResidual(d_lower, mix_start=encoder.mix_start)
        self.quantizer = EmaCodebook(quantizer, width=d_lower)
        self.decoder = CodesDecoder(config.decoder, width=d_lower)

    def encode(self, lower: Float[Tensor, "row d_lower"]) -> Float[Tensor, "row d"]:
        encoded: Tensor = self.encoder(self._scaled(lower)).float()
        return encoded

    def _scaled(self, lower: Float[Tensor, "row d_lower"]) -> Float[Tensor, "row d_lower"]:
        # By one number, so that distances are those of the raw rows.
        return (lower - self.lower_mean) / self.lower_rms

    def forward(self, batch: Batch, *, noise: RowNoise | None = None) -> Output:
        rows = batch.lower[batch.mask]
        quantized = self.quantizer.forward(self.encode(rows), noise=noise)
        predicted = self._decoded(quantized.straight, batch.mask, batch.position)
        losses = {
            "reconstruction": mean_square(predicted - self._scaled(rows)),
            "commitment": quantized.commitment,
        }
        return Output(losses=losses, index=quantized.index, predicted=self._raw(predicted))

    def from_codes(
        self,
        index: Int64[Tensor, " row"],
        mask: Bool[Tensor, "batch seq"],
        position: Int64[Tensor, "batch seq"],
    ) -> Float[Tensor, "row d_target"]:
        return self._raw(self._decoded(self.quantizer.codebook[index], mask, position))

    def _raw(self, scaled: Float[Tensor, "row d_lower"]) -> Float[Tensor, "row d_lower"]:
        return scaled * self.lower_rms + self.lower_mean

    def _decoded(
        self,
        codes: Float[Tensor, "row d"],
        mask: Bool[Tensor, "batch seq"],
        position: Int64[Tensor, "batch seq"],
    ) -> Float[Tensor, "row d"]:
        added: Tensor = self.decoder(_laid_out(codes, mask), mask, position)
        return codes + added[mask].float()


def build(config: TrainConfig, *, d_lower: int, d_upper: int) -> Network:
    """The network of the settings, its weights drawn from torch's own generator.

    Raises
    ------
    ConfigError
        Where the settings do not go together.
    """
    quantizer, encoder = config.quantizer, config.encoder
    width = d_upper if config.preset == "default" and config.target == config.upper else d_lower
    if width % config.decoder.heads:
        fitting = ", ".join(str(heads) for heads in range(1, 17) if width % heads == 0)
        raise ConfigError(
            f"decoder.heads = {config.decoder.heads} does not divide the codes' {width} channels: "
            f"set decoder.heads to one of {fitting}"
        )
    if isinstance(quantizer, EmaQuantizer) and quantizer.top_k > quantizer.codes:
        raise ConfigError(f"quantizer.top_k = {quantizer.top_k} is more than the {quantizer.codes} codes: set it lower")
    if isinstance(encoder, AdaptiveEncoder) and isinstance(quantizer, EmaQuantizer):
        if config.preset == "paper":
            return PaperNetwork(config, encoder, quantizer, d_lower=d_lower, d_upper=d_upper)
        if config.method == "vq-vae":
            return BottleneckNetwork(config, encoder, quantizer, d_lower=d_lower, d_upper=d_upper)
    crosses = config.preset == "default" and config.method == "clvq-vae"
    if crosses and isinstance(encoder, PredictorEncoder) and isinstance(quantizer, FixedQuantizer):
        return DefaultNetwork(config, encoder, quantizer, d_lower=d_lower, d_upper=d_upper)
    raise ConfigError(
        f"preset {config.preset!r} of {config.method} has no encoder {encoder.kind!r} with a quantizer "
        f"{quantizer.kind!r}: clvq-vae's 'default' has 'predictor' with 'fixed', all others have 'adaptive' with 'ema'"
    )


def _laid_out(rows: Float[Tensor, "row d"], mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d"]:
    """Rows put back into their texts; zero where there is none."""
    # Out of place, so that the gradient finds its way back to the rows.
    return rows.new_zeros(*mask.shape, rows.shape[1]).masked_scatter(mask[..., None], rows)
