"""Codes of a text to its upper rows."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from .config import DecoderConfig


class MemoryDecoder(nn.Module):
    """The published decoder: attends to the codes and, across, to a memory; no positions, no causal mask.

    The authors' first code (9e9b9aa) passed a causal mask, transposed by mistake; from 1c94cd1 on there is none.
    """

    def __init__(self, config: DecoderConfig, *, width: int, d_upper: int) -> None:
        super().__init__()
        # Each layer is drawn anew: nn.TransformerDecoder would start all of them as copies of one.
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width, config.heads, dim_feedforward=config.hidden, dropout=config.dropout, batch_first=True
            )
            for _ in range(config.layers)
        )
        self.out = nn.Linear(width, d_upper)

    def forward(
        self,
        codes: Float[Tensor, "batch seq d"],
        memory: Float[Tensor, "batch seq d"],
        mask: Bool[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq d_upper"]:
        """Upper rows; what stands outside `mask` is neither looked at nor meant."""
        hidden, padding = codes, ~mask
        # Where processes share a batch of few texts, one may have none; torch's attention cannot do nothing.
        for layer in self.layers if len(codes) else ():
            hidden = layer(hidden, memory, tgt_key_padding_mask=padding, memory_key_padding_mask=padding)
        upper: Tensor = self.out(hidden)
        return upper


class CodesDecoder(nn.Module):
    """What a text's codes and their positions say about each upper row beyond the row's own code."""

    def __init__(self, config: DecoderConfig, *, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                config.heads,
                dim_feedforward=config.hidden,
                dropout=config.dropout,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)
        # The context adds nothing at first.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        codes: Float[Tensor, "batch seq d"],
        mask: Bool[Tensor, "batch seq"],
        position: Int64[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq d"]:
        """What to add to each row's own code; what stands outside `mask` is neither looked at nor meant."""
        hidden = codes + sinusoids(position, codes.shape[2])
        # As above.
        for layer in self.layers if len(codes) else ():
            hidden = layer(hidden, src_key_padding_mask=~mask)
        added: Tensor = self.out(self.norm(hidden))
        return added


def sinusoids(position: Int64[Tensor, "batch seq"], width: int) -> Float[Tensor, "batch seq d"]:
    """Sines and cosines of the position, wavelengths 2π to 20,000π (Vaswani et al. 2017, section 3.5)."""
    half = (width + 1) // 2
    rates = torch.exp(torch.arange(half, device=position.device) * (-math.log(10_000) / half))
    angles = position[..., None] * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, width - 2 * half))
