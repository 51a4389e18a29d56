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
    """A linear map plus an MLP whose output starts at 0, so that training begins at a linear map.

    Parameters
    ----------
    expansion
        Hidden units per channel of the input.
    """

    def __init__(self, d_lower: int, d_upper: int, *, expansion: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_lower, d_upper)
        self.inner = nn.Sequential(
            nn.LayerNorm(d_lower),
            nn.Linear(d_lower, expansion * d_lower),
            nn.GELU(),
            nn.Linear(expansion * d_lower, d_upper),
        )
        last = self.inner[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, rows: Float[Tensor, "row d_lower"]) -> Float[Tensor, "row d_upper"]:
        """A prediction of each row's upper row."""
        predicted: Tensor = self.linear(rows) + self.inner(rows)
        return predicted
