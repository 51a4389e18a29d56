"""Sparse autoencoders: rows as sums of a few of many latents. Of one site, or from the lower to the upper one.

TopK after Gao et al. (2024, arXiv 2406.04093), BatchTopK after Bussmann et al. (2024, arXiv 2412.06410): a bias taken
off before the encoder, decoder vectors of unit length, and a loss by which dead latents predict what the living ones
leave over.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from . import ranks
from .concepts import Batch, ConceptModel, Measured, RowTrained
from .methods import SaeConfig
from .quantizer import mean_square

# Weight of the past in the running threshold of BatchTopK.
_THRESHOLD_DECAY = 0.999
# Activations that are held at once where rows are only looked at.
_ACTIVATIONS = 1 << 24


class SparseAutoencoder(ConceptModel, RowTrained):
    """A dictionary of latents; a row's concept is its strongest one.

    Rows are centred and scaled by one number at either site; `encoder_bias`, `decoder_bias` and the weights are in
    those coordinates. Weights are drawn from torch's own generator.
    """

    idle: Int64[Tensor, " latent"]
    """Training rows since a latent was last active."""
    threshold: Float[Tensor, ""]
    """What an activation has to exceed after training with BatchTopK: the running least one that was kept."""

    def __init__(self, config: SaeConfig, *, d_lower: int, d_upper: int) -> None:
        super().__init__(d_lower, d_upper)
        self.config = config.encoder
        self.crosses = config.method == "cross-sae"
        latents, d_target = self.config.latents, d_upper if self.crosses else d_lower
        directions = F.normalize(torch.randn(latents, d_target), dim=1)
        self.decoder = nn.Parameter(directions)
        same = d_target == d_lower
        self.encoder = nn.Parameter(
            directions.T.clone() if same else F.normalize(torch.randn(latents, d_lower), dim=1).T.contiguous()
        )
        self.encoder_bias = nn.Parameter(torch.zeros(latents))
        self.decoder_bias = nn.Parameter(torch.zeros(d_target))
        # Of one site the bias before the encoder is the one after the decoder.
        self.before = nn.Parameter(torch.zeros(d_lower)) if self.crosses else None
        self.register_buffer("idle", torch.zeros(latents, dtype=torch.int64))
        self.register_buffer("threshold", torch.zeros(()))

    def _given(self, lower: Float[Tensor, "row d_lower"]) -> Float[Tensor, "row d_lower"]:
        return (lower - self.lower_mean) / self.lower_rms

    def _wanted(self, target: Float[Tensor, "row d_target"]) -> Float[Tensor, "row d_target"]:
        if self.crosses:
            return (target - self.upper_mean) / self.upper_scale
        return self._given(target)

    def _raw(self, scaled: Float[Tensor, "row d_target"]) -> Float[Tensor, "row d_target"]:
        if self.crosses:
            return scaled * self.upper_scale + self.upper_mean
        return scaled * self.lower_rms + self.lower_mean

    def pre_activations(self, lower: Float[Tensor, "row d_lower"]) -> Float[Tensor, "row latent"]:
        """What the latents see of raw lower rows; an active latent has as much of it as it is active, 0 at least."""
        bias = self.decoder_bias if self.before is None else self.before
        seen: Tensor = (self._given(lower) - bias) @ self.encoder + self.encoder_bias
        return seen.float()

    def activations(self, seen: Float[Tensor, "row latent"]) -> Float[Tensor, "row latent"]:
        """The activations outside training."""
        positive = seen.relu()
        if self.config.activation == "batchtopk" and self.threshold > 0:
            return positive * (positive > self.threshold)
        return _largest_of_each(positive, self.config.k)

    def reconstruct(self, active: Float[Tensor, "row latent"]) -> Float[Tensor, "row d_target"]:
        """Target rows in scaled coordinates."""
        sums: Tensor = active @ self.decoder
        return sums.float() + self.decoder_bias

    def row_losses(
        self, lower: Float[Tensor, "row d_lower"], target: Float[Tensor, "row d_target"], *, total: int
    ) -> dict[str, Float[Tensor, ""]]:
        seen = self.pre_activations(lower)
        positive = seen.relu()
        if self.config.activation == "batchtopk":
            active = positive * (positive >= self._cutoff(positive.detach(), total))
        else:
            active = _largest_of_each(positive, self.config.k)
        self._note_active(active.detach() > 0, total)
        error = self._wanted(target) - self.reconstruct(active)
        losses = {"reconstruction": mean_square(error)}
        if self.config.aux_k:
            losses["dead"] = self.config.aux_weight * self._left_over(seen, error.detach())
        return losses

    @torch.no_grad()
    def _cutoff(self, positive: Float[Tensor, "row latent"], total: int) -> Float[Tensor, ""]:
        """The activation that the batch's k·rows largest reach, over all processes."""
        wanted = self.config.k * total
        largest = ranks.joined(positive.flatten().topk(min(wanted, positive.numel())).values)
        cutoff = largest.topk(min(wanted, len(largest))).values[-1].clamp_min(torch.finfo(torch.float32).tiny)
        first = self.threshold == 0
        self.threshold.copy_(torch.where(first, cutoff, torch.lerp(cutoff, self.threshold, _THRESHOLD_DECAY)))
        return cutoff

    @torch.no_grad()
    def _note_active(self, active: Bool[Tensor, "row latent"], total: int) -> None:
        used = active.sum(dim=0)
        ranks.add_up(used)
        self.idle.add_(total).mul_(used == 0)

    def _left_over(self, seen: Float[Tensor, "row latent"], error: Float[Tensor, "row d_target"]) -> Float[Tensor, ""]:
        """How badly the strongest dead latents predict the error, as a share of its variance (AuxK)."""
        dead = torch.nonzero(self.idle >= self.config.dead_after)[:, 0]
        if len(dead) == 0 or len(error) == 0:
            return error.new_zeros(())
        active = _largest_of_each(seen[:, dead].relu(), min(self.config.aux_k, len(dead)))
        predicted = (active @ self.decoder[dead]).float()
        variance = mean_square(error - error.mean(dim=0)).clamp_min(1e-12)
        return mean_square(error - predicted) / variance

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
        predicted = self.reconstruct(self.activations(self.pre_activations(lower)))
        losses = {"reconstruction": mean_square(predicted - self._wanted(target))}
        return losses, {"sae_fvu": self._raw(predicted)}

    @torch.no_grad()
    def concept(self, lower: Float[Tensor, "row d_lower"]) -> Int64[Tensor, " row"]:
        return self.active(lower)[:, 0]

    @torch.no_grad()
    def active(self, lower: Float[Tensor, "row d_lower"]) -> Int64[Tensor, "row k"]:
        """The active latents of each raw lower row, strongest first; −1 where fewer are active.

        The first is the latent that comes nearest to being active where none is.
        """
        size = max(1, _ACTIVATIONS // self.config.latents)
        parts = []
        for rows in lower.split(size):
            seen = self.pre_activations(rows)
            values, index = self.activations(seen).topk(min(self.config.k, self.config.latents), dim=1)
            index = torch.where(values > 0, index, -1)
            index[:, 0] = torch.where(values[:, 0] > 0, index[:, 0], seen.argmax(dim=1))
            parts.append(index)
        return torch.cat(parts or [torch.zeros(0, self.config.k, dtype=torch.int64, device=lower.device)])

    def measure(self, batch: Batch) -> Measured:
        lower = batch.lower[batch.mask]
        active = self.activations(self.pre_activations(lower))
        return Measured(
            index=self.concept(lower),
            predicted={"sae_fvu": self._raw(self.reconstruct(active))},
            active=(active > 0).sum().double(),
        )

    def vectors(self) -> Float[Tensor, "concept d"]:
        return self.decoder.detach()

    def published(self) -> Float[Tensor, "concept d_lower"]:
        """The decoder's vectors, as the authors removed them, where those live at the lower site."""
        return self.encoder_directions() if self.crosses else self.decoder.detach()

    def encoder_directions(self) -> Float[Tensor, "concept d_lower"]:
        """What each latent listens to, in raw coordinates."""
        return self.encoder.detach().T


def _largest_of_each(positive: Float[Tensor, "row latent"], k: int) -> Float[Tensor, "row latent"]:
    values, index = positive.topk(min(k, positive.shape[1]), dim=1)
    return torch.zeros_like(positive).scatter(1, index, values)
