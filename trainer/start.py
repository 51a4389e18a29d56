"""Where the codes stand before the first step: k-means, plain or on the unit sphere."""

import torch
from jaxtyping import Float32
from torch import Tensor

from ..progress import SILENT, Progress
from .config import StartConfig
from .kmeans import Blocks, kmeans


def starting_codes(
    blocks: Blocks,
    config: StartConfig,
    *,
    codes: int,
    seed: int,
    device: torch.device,
    progress: Progress = SILENT,
) -> Float32[Tensor, "code d"]:
    """Centroids of the rows; where `spherical`, by the published scaled-spherical k-means.

    Raises
    ------
    DataError
        Where there are no rows, or some are not finite.
    Interrupted
    """
    found = kmeans(
        blocks,
        codes=codes,
        iterations=config.iterations,
        seed=seed,
        device=device,
        spherical=config.spherical,
        tolerance=config.tolerance,
        progress=progress,
    )
    return found.centroids
