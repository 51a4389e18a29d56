"""Random numbers that belong to rows, not to their order."""

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

# Steele, Lea & Flood (2014), "Fast splittable pseudorandom number generators": SplitMix64, as two's complement.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


@dataclass(frozen=True)
class RowNoise:
    """Numbers that are a function of a key, a row's place in the cache and a column.

    A row draws the same ones in whatever batch, order or process it comes.
    """

    key: int
    """Of the step."""
    place: Int64[Tensor, " row"]
    """Each row's place in the cache."""

    def gumbel(self, columns: int, *, first: int = 0) -> Float32[Tensor, "row column"]:
        """Standard Gumbel numbers: the largest of log p + these falls on each entry with probability p.

        Parameters
        ----------
        first
            The number of the first column; columns of other numbers are independent.
        """
        column = torch.arange(first, first + columns, device=self.place.device)
        state = _mixed(self.place[:, None] * _GOLDEN + self.key) + (column + 1) * _GOLDEN
        # The middle of one of 2^24 equal parts of (0, 1), so that both logarithms are finite.
        uniform = ((_shifted(_mixed(state), 40)).double() + 0.5) * 2.0**-24
        return -(-uniform.log()).log().float()


def _mixed(state: Int64[Tensor, "*any"]) -> Int64[Tensor, "*any"]:
    state = (state ^ _shifted(state, 30)) * _MIX_1
    state = (state ^ _shifted(state, 27)) * _MIX_2
    return state ^ _shifted(state, 31)


def _shifted(state: Int64[Tensor, "*any"], bits: int) -> Int64[Tensor, "*any"]:
    """To the right, zeros following; torch's own shift repeats the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
