"""Sparse autoencoders: rows as sums of a few of many latents. Of one site, or from the lower to the upper one.

TopK after Gao et al. (2024, arXiv 2406.04093), BatchTopK after Bussmann et al. (2024, arXiv 2412.06410): a bias taken
off before the encoder, decoder vectors of unit length, and a loss by which dead latents predict what the living ones
leave over.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor, nn

from ..errors import ConfigError
from . import ranks
from .concepts import Batch, ConceptModel, Measured, RowTrained
from .methods import SaeConfig
from .quantizer import mean_square

# Length of the encoder's vectors before the first step: fewer steps turn short ones (docs/rivals.md).
_ENCODER_START = 0.1
# Weight of the past in the running threshold of BatchTopK.
_THRESHOLD_DECAY = 0.95
# Activations that are held at once where rows are only looked at.
_ACTIVATIONS = 1 << 24


@dataclass(frozen=True)
class SparseWeights:
    """An autoencoder in raw coordinates: rows · encoder + encoder_bias, the active of them · decoder + decoder_bias.

    Where rows are normalised one by one, they are so before the encoder, and it is undone after the decoder.
    """

    encoder: Float64[Tensor, "d_lower latent"]
    encoder_bias: Float64[Tensor, " latent"]
    decoder: Float64[Tensor, "latent d_target"]
    decoder_bias: Float64[Tensor, " d_target"]
    threshold: Float64[Tensor, " latent"]
    """What an activation has to exceed."""


class _Active(NamedTuple):
    """The latents of rows that may be active, row after row; all others are not."""

    value: Float[Tensor, " entry"]
    """Activations, 0 at least."""
    latent: Int64[Tensor, " entry"]
    first: Int64[Tensor, " row"]
    """Where each row's entries begin."""


class SparseAutoencoder(ConceptModel, RowTrained):
    """A dictionary of latents; a row's concept is its strongest one.

    Rows are centred and scaled by one number at either site, or normalised one by one; `encoder_bias`, `decoder_bias`,
    `threshold` and the weights are in those coordinates. Weights are drawn from torch's own generator.
    """

    idle: Int64[Tensor, " latent"]
    """Training rows since a latent was last active."""
    threshold: Float[Tensor, " latent"]
    """What an activation has to exceed outside training; of BatchTopK the running least one that was kept."""

    def __init__(self, config: SaeConfig, *, d_lower: int, d_upper: int) -> None:
        super().__init__(d_lower, d_upper)
        self.config = config.encoder
        if config.source is None and self.config.activation in ("relu", "jumprelu"):
            raise ConfigError(
                f"an autoencoder with {self.config.activation} is not trained here: set encoder.activation to topk or "
                "batchtopk, or give one from elsewhere with --from"
            )
        self.crosses, self.trained_here = config.method == "cross-sae", config.source is None
        latents, d_target = self.config.latents, d_upper if self.crosses else d_lower
        directions = F.normalize(torch.randn(latents, d_target), dim=1)
        self.decoder = nn.Parameter(directions)
        listens = F.normalize(torch.randn(latents, d_lower), dim=1) if self.crosses else directions
        # Laid out as a checkpoint gives it back: the fused optimiser goes through memory, whatever the strides.
        self.encoder = nn.Parameter(_ENCODER_START * listens.T.contiguous())
        self.encoder_bias = nn.Parameter(torch.zeros(latents))
        self.decoder_bias = nn.Parameter(torch.zeros(d_target))
        # Of one site the bias before the encoder is the one after the decoder.
        self.before = nn.Parameter(torch.zeros(d_lower)) if self.crosses else None
        self.register_buffer("idle", torch.zeros(latents, dtype=torch.int64))
        self.register_buffer("threshold", torch.zeros(latents))

    @property
    def _bias_before(self) -> Float[Tensor, " d_lower"]:
        return self.decoder_bias if self.before is None else self.before

    def _given(self, lower: Float[Tensor, "row d_lower"]) -> Float[Tensor, "row d_lower"]:
        match self.config.normalization:
            case "site":
                return (lower - self.lower_mean) / self.lower_rms
            case "constant_norm_rescale":
                return lower / _root_mean_square(lower)
            case "layer_norm":
                centred = lower - lower.mean(dim=1, keepdim=True)
                return centred / (centred.std(dim=1, keepdim=True) + 1e-5)

    def _wanted(self, target: Float[Tensor, "row d_target"]) -> Float[Tensor, "row d_target"]:
        if self.crosses:
            return (target - self.upper_mean) / self.upper_scale
        return self._given(target)

    def _raw(
        self, scaled: Float[Tensor, "row d_target"], lower: Float[Tensor, "row d_lower"]
    ) -> Float[Tensor, "row d_target"]:
        """The inverse of `_wanted`; where each row has its own scale, that of its lower row."""
        if self.crosses:
            return scaled * self.upper_scale + self.upper_mean
        match self.config.normalization:
            case "site":
                return scaled * self.lower_rms + self.lower_mean
            case "constant_norm_rescale":
                return scaled * _root_mean_square(lower)
            case "layer_norm":
                return scaled * lower.std(dim=1, keepdim=True) + lower.mean(dim=1, keepdim=True)

    def pre_activations(self, lower: Float[Tensor, "row d_lower"]) -> Float[Tensor, "row latent"]:
        """What the latents see of raw lower rows; an active latent has as much of it as it is active, 0 at least."""
        # (x − b)·W as x·W − b·W, so that no gradient of all the rows is needed for that of b.
        with torch.autocast(lower.device.type, enabled=False):
            bias = self.encoder_bias - self._bias_before @ self.encoder
        seen: Tensor = self._given(lower) @ self.encoder
        return seen.float() + bias

    def activations(self, lower: Float[Tensor, "row d_lower"]) -> Float[Tensor, "row latent"]:
        """How active the latents are on raw lower rows, outside training."""
        seen = self.pre_activations(lower)
        active, dense = self._active(seen), torch.zeros_like(seen)
        return dense.index_put((_row_of(active), active.latent), active.value)

    def _active(self, seen: Float[Tensor, "row latent"]) -> _Active:
        if self.config.activation == "topk":
            return _largest_of_each(seen, self.config.k)
        row, latent = torch.nonzero(seen > self.threshold.clamp_min(0), as_tuple=True)
        return _Active(seen[row, latent], latent, _firsts(row, len(seen)))

    def _decoded(self, active: _Active) -> Float[Tensor, "row d_target"]:
        """Target rows in scaled coordinates."""
        return _sums(active, self.decoder) + self.decoder_bias

    def row_losses(
        self, lower: Float[Tensor, "row d_lower"], target: Float[Tensor, "row d_target"], *, total: int
    ) -> dict[str, Float[Tensor, ""]]:
        seen = self.pre_activations(lower)
        if self.config.activation == "batchtopk":
            active = self._largest_of_all(seen, total)
        else:
            active = _largest_of_each(seen, self.config.k)
        self._note_active(active, total)
        error = self._wanted(target) - self._decoded(active)
        losses = {"reconstruction": mean_square(error)}
        if self.config.aux_k:
            losses["dead"] = self.config.aux_weight * self._left_over(seen, error.detach(), total)
        return losses

    def _largest_of_all(self, seen: Float[Tensor, "row latent"], total: int) -> _Active:
        """The k·rows largest of the batch, over all processes; fewer where fewer are above 0."""
        with torch.no_grad():
            wanted = self.config.k * total
            largest, place = seen.flatten().topk(min(wanted, seen.numel()))
            everywhere = ranks.joined(largest)
            cutoff = everywhere.topk(min(wanted, len(everywhere))).values[-1]
            # Of those equal to the last that is kept, the first ones.
            equal = largest == cutoff
            room = wanted - int((everywhere > cutoff).sum())
            earlier = ranks.joined(equal.sum()[None])[: ranks.number()].sum()
            kept = (largest > cutoff) | (equal & (equal.cumsum(dim=0) + earlier <= room))
            place = place[kept & (largest > 0)].sort().values
            self._follow(cutoff.clamp_min(0))
        row = place // self.config.latents
        return _Active(seen.flatten()[place], place % self.config.latents, _firsts(row, len(seen)))

    def _follow(self, cutoff: Float[Tensor, ""]) -> None:
        """Let the threshold follow the least activation that was kept."""
        begins = self.threshold == 0
        self.threshold.copy_(torch.where(begins, cutoff, torch.lerp(cutoff, self.threshold, _THRESHOLD_DECAY)))

    @torch.no_grad()
    def _note_active(self, active: _Active, total: int) -> None:
        used = torch.bincount(active.latent[active.value > 0], minlength=self.config.latents)
        ranks.add_up(used)
        self.idle.add_(total).mul_(used == 0)

    def _left_over(
        self, seen: Float[Tensor, "row latent"], error: Float[Tensor, "row d_target"], total: int
    ) -> Float[Tensor, ""]:
        """How badly the strongest dead latents predict the error, as a share of its variance (AuxK)."""
        dead = torch.nonzero(self.idle >= self.config.dead_after)[:, 0]
        if len(dead) == 0:
            return error.new_zeros(())
        active = _largest_of_each(seen[:, dead], min(self.config.aux_k, len(dead)))
        predicted = _sums(active, self.decoder[dead])
        wide = error.double()
        sums = torch.cat([wide.sum(dim=0), wide.square().sum()[None]])
        ranks.add_up(sums)
        variance = (sums[-1] / total - (sums[:-1] / total).square().sum()) / error.shape[1]
        return mean_square(error - predicted) / variance.clamp_min(1e-12).float()

    def trained_by_rows(self) -> list[Tensor]:
        return list(self.parameters())

    @torch.no_grad()
    def before_step(self) -> None:
        """Take off the decoder's gradient what would only change lengths."""
        gradient = self.decoder.grad
        if gradient is not None:
            gradient -= (gradient * self.decoder).sum(dim=1, keepdim=True) * self.decoder

    @torch.no_grad()
    def after_step(self) -> None:
        self.decoder.copy_(F.normalize(self.decoder, dim=1))

    def measure_rows(
        self, lower: Float[Tensor, "row d_lower"], target: Float[Tensor, "row d_target"]
    ) -> tuple[dict[str, Float[Tensor, ""]], dict[str, Float[Tensor, "row d_target"]]]:
        predicted = self._decoded(self._active(self.pre_activations(lower)))
        losses = {"reconstruction": mean_square(predicted - self._wanted(target))}
        return losses, {"sae_fvu": self._raw(predicted, lower)}

    @torch.no_grad()
    def concept(self, lower: Float[Tensor, "row d_lower"]) -> Int64[Tensor, " row"]:
        return self.active(lower)[:, 0]

    @torch.no_grad()
    def active(self, lower: Float[Tensor, "row d_lower"]) -> Int64[Tensor, "row k"]:
        """The k strongest of the latents active on each raw lower row, strongest first; −1 where fewer are active.

        The first is the latent that comes nearest to being active where none is.
        """
        size = max(1, _ACTIVATIONS // self.config.latents)
        parts = [self._listed(self.pre_activations(rows)) for rows in lower.split(size)]
        return torch.cat(parts)

    def _listed(self, seen: Float[Tensor, "row latent"]) -> Int64[Tensor, "row k"]:
        passing = seen > self.threshold.clamp_min(0)
        index = torch.where(passing, seen, 0).topk(min(self.config.k, self.config.latents), dim=1).indices
        listed = torch.where(passing.gather(1, index), index, -1)
        nearest = (seen - self.threshold).argmax(dim=1)
        listed[:, 0] = torch.where(listed[:, 0] < 0, nearest, listed[:, 0])
        return listed

    def measure(self, batch: Batch) -> Measured:
        lower = batch.lower[batch.mask]
        seen = self.pre_activations(lower)
        active = self._active(seen)
        return Measured(
            index=self._listed(seen)[:, 0],
            predicted={"sae_fvu": self._raw(self._decoded(active), lower)},
            active=torch.bincount(active.latent[active.value > 0], minlength=self.config.latents),
        )

    def vectors(self) -> Float[Tensor, "concept d"]:
        return self.decoder.detach()

    def published(self) -> Float[Tensor, "concept d_lower"]:
        """The decoder's vectors, as the authors removed them, where those live at the lower site."""
        return self.encoder_directions() if self.crosses else self.decoder.detach()

    def encoder_directions(self) -> Float[Tensor, "concept d_lower"]:
        """What each latent listens to, in raw coordinates; of rows that are normalised one by one, in those."""
        scale = self.lower_rms if self.config.normalization == "site" else 1
        return self.encoder.detach().T / scale

    def _places(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Shift and scale of the lower rows, then those of the target rows; in float64."""
        shift, scale = self.lower_mean.double(), self.lower_rms.double()
        if self.config.normalization != "site":
            shift, scale = torch.zeros_like(shift), torch.ones_like(scale)
        if self.crosses:
            return shift, scale, self.upper_mean.double(), self.upper_scale.double()
        return shift, scale, shift, scale

    @torch.no_grad()
    def weights(self) -> SparseWeights:
        """The autoencoder in raw coordinates.

        Its activations are those of `activations` times the scale of the target rows, so that the decoder is the same.
        """
        shift, scale, target_shift, target_scale = self._places()
        encoder, before = self.encoder.double(), self._bias_before.double()
        bias = self.encoder_bias.double() - (before + shift / scale) @ encoder
        return SparseWeights(
            encoder=encoder * target_scale / scale,
            encoder_bias=bias * target_scale,
            decoder=self.decoder.double(),
            decoder_bias=self.decoder_bias.double() * target_scale + target_shift,
            threshold=self.threshold.double() * target_scale,
        )

    @torch.no_grad()
    def adopt(self, weights: SparseWeights) -> None:
        """Become the autoencoder given in raw coordinates; after `place`."""
        shift, scale, target_shift, target_scale = self._places()
        encoder = weights.encoder * scale / target_scale
        decoder_bias = (weights.decoder_bias - target_shift) / target_scale
        before = decoder_bias if self.before is None else torch.zeros_like(shift)
        self.encoder.copy_(encoder)
        self.encoder_bias.copy_(weights.encoder_bias / target_scale + (before + shift / scale) @ encoder)
        self.decoder.copy_(weights.decoder)
        self.decoder_bias.copy_(decoder_bias)
        if self.before is not None:
            self.before.copy_(before)
        self.threshold.copy_(weights.threshold / target_scale)


def _largest_of_each(seen: Float[Tensor, "row latent"], k: int) -> _Active:
    """The k largest of each row."""
    k = min(k, seen.shape[1])
    values, index = seen.topk(k, dim=1)
    return _Active(values.relu().flatten(), index.flatten(), k * torch.arange(len(seen), device=seen.device))


def _sums(active: _Active, decoder: Float[Tensor, "latent d"]) -> Float[Tensor, "row d"]:
    """Each row's sum of the decoder's vectors, weighted by the activations."""
    if len(active.first) == 0:
        return decoder[:0] * active.value.sum()
    return F.embedding_bag(active.latent, decoder, active.first, mode="sum", per_sample_weights=active.value)


def _firsts(row: Int64[Tensor, " entry"], rows: int) -> Int64[Tensor, " row"]:
    """Where each row's entries begin; `row` rises."""
    return torch.searchsorted(row, torch.arange(rows, device=row.device))


def _row_of(active: _Active) -> Int64[Tensor, " entry"]:
    place = torch.arange(len(active.latent), device=active.latent.device)
    return torch.searchsorted(active.first, place, right=True) - 1


def _root_mean_square(rows: Shaped[Tensor, "row d"]) -> Float[Tensor, "row one"]:
    return rows.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
