"""Vectors to codes: nearest or drawn; a codebook that stays, and one that follows its members by running means."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from . import ranks
from .config import EmaQuantizer
from .noise import RowNoise

# Distances that are held at once.
_DISTANCES = 1 << 24


@dataclass(frozen=True)
class Quantized:
    """What the quantiser makes of a batch of rows."""

    index: Int64[Tensor, " row"]
    """Each row's code."""
    straight: Float[Tensor, "row d"]
    """The codes' vectors; the gradient goes to the rows as if nothing had happened to them."""
    commitment: Float[Tensor, ""]
    """Weighted mean squared distance per entry from the rows to their codes."""


class Codebook(nn.Module):
    """Codes that stay where they are put.

    Parameters
    ----------
    width
        Channels of a code.
    """

    codebook: Float[Tensor, "code d"]
    """The codes."""

    def __init__(self, codes: int, *, width: int) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.zeros(codes, width))

    def start(self, codes: Float[Tensor, "code d"]) -> None:
        """Put the codes where training begins."""
        self.codebook.copy_(codes)

    def distances(self, rows: Float[Tensor, "row d"]) -> Float[Tensor, "row code"]:
        """Squared Euclidean distance from each row to each code."""
        with torch.autocast(rows.device.type, enabled=False):
            # The same shift on both sides changes no distance, and keeps float32 exact under a large common mean.
            centre = self.codebook.mean(dim=0)
            rows, codes = rows - centre, self.codebook - centre
            squares = rows.square().sum(dim=1, keepdim=True) + codes.square().sum(dim=1)
            return torch.addmm(squares, rows, codes.T, alpha=-2).clamp_min_(0)

    @torch.no_grad()
    def nearest(self, rows: Float[Tensor, "row d"]) -> Int64[Tensor, " row"]:
        """The code of each row, as used everywhere but in training."""
        # In portions, so that no matrix of all rows × all codes is needed.
        size = max(1, _DISTANCES // len(self.codebook))
        return torch.cat(
            [self.distances(part).argmin(dim=1) for part in rows.split(size)] or [rows.new_empty(0).long()]
        )


class EmaCodebook(Codebook):
    """A codebook with exponential moving averages, after van den Oord et al. (2017), appendix A.1.

    Parameters
    ----------
    width
        Channels of a code.
    """

    count: Float[Tensor, " code"]
    """Running number of members per batch, N."""
    total: Float[Tensor, "code d"]
    """Running sum of members per batch, M."""
    idle: Int64[Tensor, " code"]
    """Steps since a code was last used."""

    def __init__(self, config: EmaQuantizer, *, width: int) -> None:
        super().__init__(config.codes, width=width)
        self.config = config
        self.register_buffer("count", torch.ones(config.codes))
        self.register_buffer("total", torch.zeros(config.codes, width))
        self.register_buffer("idle", torch.zeros(config.codes, dtype=torch.int64))

    def start(self, codes: Float[Tensor, "code d"]) -> None:
        """Put the codes where training begins: M = codes, N = 1, as published."""
        super().start(codes)
        self.total.copy_(codes)
        self.count.fill_(1)
        self.idle.zero_()

    def forward(self, rows: Float[Tensor, "row d"], *, noise: RowNoise | None = None) -> Quantized:
        """Codes of the rows; in training mode they are drawn and the codebook then follows them.

        In training, all processes of `torch.distributed`'s group take part, each with its rows of the batch: the
        codebook becomes what one process would have made of all of them. The vectors are looked up in the codebook
        after it has moved, as published.

        Parameters
        ----------
        noise
            What is drawn from in training; without it each row takes its nearest code and none is revived.
        """
        fixed = rows.detach().float()
        distances = self.distances(fixed)
        if self.training:
            index = self.draw(distances, noise)
            self._follow(fixed, index)
            self._revive(fixed, distances, noise)
        else:
            index = distances.argmin(dim=1)
        vectors = self.codebook[index]
        commitment = self.config.commitment * mean_square(rows - vectors)
        # rows − rows is exactly 0: what comes after sees the code and nothing else of the row.
        return Quantized(index=index, straight=vectors + (rows - rows.detach()), commitment=commitment)

    def draw(self, distances: Float[Tensor, "row code"], noise: RowNoise | None) -> Int64[Tensor, " row"]:
        """One of each row's `top_k` nearest codes, with probability softmax(−distance / temperature)."""
        if self.config.top_k == 1 or noise is None:
            return distances.argmin(dim=1)
        near, codes = distances.topk(self.config.top_k, dim=1, largest=False)
        # The largest of logits with Gumbel noise is a draw from their softmax (Gumbel 1954; Maddison et al. 2014).
        drawn = (noise.gumbel(self.config.top_k) - near / self.config.temperature).argmax(dim=1)
        return codes.gather(1, drawn[:, None])[:, 0]

    @torch.no_grad()
    def _follow(self, rows: Float[Tensor, "row d"], index: Int64[Tensor, " row"]) -> None:
        settings = self.config
        used, sums = torch.bincount(index, minlength=settings.codes).to(rows.dtype), torch.zeros_like(self.total)
        if rows.is_cuda:
            # index_add_ adds in any order there; this one sorts first.
            sums.index_put_((index,), rows, accumulate=True)
        else:
            sums.index_add_(0, index, rows)
        ranks.add_up(used, sums)
        self.count.mul_(settings.decay).add_(used, alpha=1 - settings.decay)
        self.total.mul_(settings.decay).add_(sums, alpha=1 - settings.decay)
        everything = self.count.sum()
        smoothed = (self.count + settings.epsilon) / (everything + settings.codes * settings.epsilon) * everything
        if settings.smoothed_counts:
            self.count.copy_(smoothed)
        self.codebook.copy_(self.total / smoothed[:, None])
        self.idle.add_(1).mul_(used == 0)

    @torch.no_grad()
    def _revive(
        self, rows: Float[Tensor, "row d"], distances: Float[Tensor, "row code"], noise: RowNoise | None
    ) -> None:
        if self.config.revive_after == 0 or noise is None:
            return
        dead = torch.nonzero(self.idle >= self.config.revive_after)[:, 0]
        if len(dead) == 0:
            return
        # Rows far from every code are taken more often, as in k-means++: those with the largest Gumbel-noised
        # logarithms are a draw without replacement. Each process offers its best, and all take the best of all.
        far = distances.amin(dim=1).nan_to_num(nan=0.0, posinf=0.0)
        chances = far.log() + noise.gumbel(1, first=self.config.top_k)[:, 0]
        offers = torch.nonzero(far > 0)[:, 0]
        offers = offers[chances[offers].argsort(descending=True, stable=True)[: len(dead)]]
        offered = ranks.joined(torch.cat([rows[offers], chances[offers, None]], dim=1))
        best = offered[:, -1].argsort(descending=True, stable=True)[: len(dead)]
        vectors, dead = offered[best, :-1], dead[: len(best)]
        self.codebook[dead] = vectors
        self.total[dead] = vectors
        self.count[dead] = 1
        self.idle[dead] = 0


def mean_square(values: Float[Tensor, "row d"]) -> Float[Tensor, ""]:
    """Mean of the squared entries; 0 where there are none."""
    return values.square().sum() / max(values.numel(), 1)
