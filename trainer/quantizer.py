"""Vectors to codes: nearest or drawn, with a codebook that follows its members by running means."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from .config import QuantizerConfig


@dataclass(frozen=True)
class Quantized:
    """What the quantiser makes of a batch of rows."""

    index: Int64[Tensor, " row"]
    """Each row's code."""
    straight: Float[Tensor, "row d"]
    """The codes' vectors; the gradient goes to the rows as if nothing had happened to them."""
    commitment: Float[Tensor, ""]
    """Weighted mean squared distance per entry from the rows to their codes."""


class Quantizer(nn.Module):
    """A codebook with exponential moving averages, after van den Oord et al. (2017), appendix A.1.

    Parameters
    ----------
    width
        Channels of a code.
    """

    codebook: Float[Tensor, "code d"]
    """The codes."""
    count: Float[Tensor, " code"]
    """Running number of members per batch, N."""
    total: Float[Tensor, "code d"]
    """Running sum of members per batch, M."""
    idle: Int64[Tensor, " code"]
    """Steps since a code was last used."""

    def __init__(self, config: QuantizerConfig, *, width: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("codebook", torch.zeros(config.codes, width))
        self.register_buffer("count", torch.ones(config.codes))
        self.register_buffer("total", torch.zeros(config.codes, width))
        self.register_buffer("idle", torch.zeros(config.codes, dtype=torch.int64))

    def start(self, codes: Float[Tensor, "code d"]) -> None:
        """Put the codes where training begins: M = codes, N = 1, as published."""
        self.codebook.copy_(codes)
        self.total.copy_(codes)
        self.count.fill_(1)
        self.idle.zero_()

    def distances(self, rows: Float[Tensor, "row d"]) -> Float[Tensor, "row code"]:
        """Squared Euclidean distance from each row to each code."""
        # The same shift on both sides changes no distance, and keeps float32 exact where a large mean is common to all.
        centre = self.codebook.mean(dim=0)
        rows, codes = rows - centre, self.codebook - centre
        squares = rows.square().sum(dim=1, keepdim=True) + codes.square().sum(dim=1)
        return torch.addmm(squares, rows, codes.T, alpha=-2).clamp_min(0)

    @torch.no_grad()
    def nearest(self, rows: Float[Tensor, "row d"]) -> Int64[Tensor, " row"]:
        """The code of each row, as used everywhere but in training."""
        return self.distances(rows).argmin(dim=1)

    def forward(self, rows: Float[Tensor, "row d"], *, generator: torch.Generator | None = None) -> Quantized:
        """Codes of the rows; in training mode they are drawn and the codebook then follows them.

        The vectors are looked up in the codebook after it has moved, as published.
        """
        fixed = rows.detach()
        distances = self.distances(fixed)
        if self.training:
            index = self.draw(distances, generator=generator)
            self._follow(fixed, index)
            self._revive(fixed, distances, generator=generator)
        else:
            index = distances.argmin(dim=1)
        vectors = self.codebook[index]
        commitment = self.config.commitment * F.mse_loss(rows, vectors)
        # rows − rows is exactly 0: what comes after sees the code and nothing else of the row.
        return Quantized(index=index, straight=vectors + (rows - rows.detach()), commitment=commitment)

    def draw(self, distances: Float[Tensor, "row code"], *, generator: torch.Generator | None) -> Int64[Tensor, " row"]:
        """One of each row's `top_k` nearest codes, with probability softmax(−distance / temperature)."""
        if self.config.top_k == 1:
            return distances.argmin(dim=1)
        near, codes = distances.topk(self.config.top_k, dim=1, largest=False)
        temperature = near.new_tensor(self.config.temperature)
        if self.config.relative_temperature:
            temperature = temperature * near[:, 0].mean()
        # Never 0: rows that all lie on their codes keep them.
        chances = torch.softmax(-near / temperature.clamp_min(torch.finfo(near.dtype).tiny), dim=1)
        # What is not finite shows in the loss, whose message says what to do; a draw from it would end in torch's own.
        chances = chances.nan_to_num(nan=1.0)
        return codes.gather(1, torch.multinomial(chances, 1, generator=generator))[:, 0]

    @torch.no_grad()
    def _follow(self, rows: Float[Tensor, "row d"], index: Int64[Tensor, " row"]) -> None:
        settings = self.config
        # A product with the one-hot matrix sums in the same order every time, which index_add_ on a GPU does not.
        members = F.one_hot(index, settings.codes).to(rows.dtype)
        used = members.sum(dim=0)
        self.count.mul_(settings.decay).add_(used, alpha=1 - settings.decay)
        self.total.mul_(settings.decay).add_(members.T @ rows, alpha=1 - settings.decay)
        everything = self.count.sum()
        smoothed = (self.count + settings.epsilon) / (everything + settings.codes * settings.epsilon) * everything
        if settings.smoothed_counts:
            self.count.copy_(smoothed)
        self.codebook.copy_(self.total / smoothed[:, None])
        self.idle.add_(1).mul_(used == 0)

    @torch.no_grad()
    def _revive(
        self,
        rows: Float[Tensor, "row d"],
        distances: Float[Tensor, "row code"],
        *,
        generator: torch.Generator | None,
    ) -> None:
        if self.config.revive_after == 0:
            return
        dead = torch.nonzero(self.idle >= self.config.revive_after)[:, 0]
        # Rows far from every code are taken more often, as in k-means++.
        chances = distances.amin(dim=1).nan_to_num(nan=0.0, posinf=0.0)
        dead = dead[: int(torch.count_nonzero(chances))]
        if len(dead) == 0:
            return
        vectors = rows[torch.multinomial(chances, len(dead), generator=generator)]
        self.codebook[dead] = vectors
        self.total[dead] = vectors
        self.count[dead] = 1
        self.idle[dead] = 0
