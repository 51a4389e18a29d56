"""Lower rows to the vectors that are quantised. Both encoders look at one row at a time."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class AdaptiveResidual(nn.Module):
    """The published encoder: z = (1 − mix)·x + mix·LayerNorm(W x + b), mix = 0.5·sigmoid(a).

    W starts as the identity and b as 0, as in the authors' code at 9e9b9aa (model.py, `_ContinuousEmbedding`).
    """

    def __init__(self, width: int, *, mix_start: float) -> None:
        super().__init__()
        self.adapt = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Parameter(torch.tensor(mix_start))
        nn.init.eye_(self.adapt.weight)
        nn.init.zeros_(self.adapt.bias)

    def forward(self, rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
        """The mixture of each row and its adapted self."""
        mix = 0.5 * torch.sigmoid(self.mix)
        mixed: Tensor = (1 - mix) * rows + mix * self.norm(self.adapt(rows))
        return mixed


class ResidualPredictor(nn.Module):
    """A linear map plus residual MLPs whose output starts at 0, so that training begins at a linear map.

    Parameters
    ----------
    expansion
        Hidden units of each MLP per channel of the lower site.
    blocks
        MLPs, one after the other; all but the last add to the row, the last one to the map's output.
    dropout
        Share of the hidden units that a training step leaves out.
    """

    def __init__(self, d_lower: int, d_upper: int, *, expansion: int, blocks: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(d_lower, d_upper)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(d_lower),
                nn.Linear(d_lower, expansion * d_lower),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(expansion * d_lower, d_lower if block < blocks - 1 else d_upper),
            )
            for block in range(blocks)
        )
        last = self.blocks[-1][-1]  # type: ignore[index]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, rows: Float[Tensor, "row d_lower"]) -> Float[Tensor, "row d_upper"]:
        """A prediction of each row's upper row."""
        hidden = rows
        for block in self.blocks[:-1]:
            hidden = hidden + block(hidden)
        predicted: Tensor = self.linear(rows) + self.blocks[-1](hidden)
        return predicted
