"""Taking concepts out of vectors: h′ = h − s·Δ with a strength s in (0, 1] and a displacement Δ.

| removal | Δ | m |
|---|---|---|
| projection | ((h − m)·u) u with the published direction u | 0 |
| centred | ((h − m)·u) u with the concept's own direction u | the site's mean |
| subspace | h − m projected on the span of the encoder directions of the row's active latents | the site's mean |
| offset | the concept's mean less m | the site's mean |
| mean | h − m: the row becomes the mean | the site's mean |

Codes share a large common mean, so the uncentred projection moves h along that mean as well, which can turn a class
round instead of removing it.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from ..errors import ConfigError
from ..trainer.run import Run

Removal = Literal["projection", "centred", "subspace", "offset", "mean"]
REMOVALS: tuple[Removal, ...] = ("projection", "centred", "subspace", "offset", "mean")

_BLOCK_VALUES = 1 << 24
# Singular values below this share of the largest are rounding of float32 weights.
_RANK_TOLERANCE = 1e-5


class Directions:
    """What a run offers for one removal at its lower site.

    Parameters
    ----------
    run
        The concept model. For `subspace` it must have latents.
    device
        Where vectors are displaced.
    """

    def __init__(self, run: Run, removal: Removal, *, device: torch.device) -> None:
        self.removal = removal
        mean = torch.from_numpy(run.lower_mean).to(device)
        self.centre = torch.zeros_like(mean) if removal == "projection" else mean
        self.mean_direction = mean / mean.norm().clamp_min(1e-12)
        self._table = torch.from_numpy(_table(run, removal)).to(device)

    def displacement(
        self,
        hidden: Float32[Tensor, "row d"],
        concepts: Int64[Tensor, "row k"],
        centre: Float32[Tensor, " d"],
    ) -> Float32[Tensor, "row d"]:
        """Δ of each row for its concepts: the first one, or for `subspace` all of them.

        Parameters
        ----------
        concepts
            −1 where there is none; a row without any is not displaced.
        centre
            m; read by all removals but `offset`.
        """
        offset = hidden - centre
        if self.removal == "mean":
            return offset
        if self.removal == "subspace":
            return self._onto_spans(offset, concepts)
        first = concepts[:, 0]
        chosen = self._table[first.clamp_min(0)] * (first >= 0)[:, None]
        return chosen if self.removal == "offset" else along(offset, chosen)

    def _onto_spans(
        self, offset: Float32[Tensor, "row d"], concepts: Int64[Tensor, "row k"]
    ) -> Float32[Tensor, "row d"]:
        result = torch.zeros_like(offset)
        block = max(1, _BLOCK_VALUES // max(1, concepts.shape[1] * offset.shape[1]))
        for start in range(0, len(offset), block):
            part = slice(start, start + block)
            there = (concepts[part] >= 0)[..., None]
            spanning = self._table[concepts[part].clamp_min(0)].double() * there
            result[part] = onto_span(offset[part].double(), spanning).float()
        return result


def _table(run: Run, removal: Removal) -> Float32[np.ndarray, "concept d"]:
    """A vector for each concept: a unit vector, or for `offset` the displacement; zero for one without rows."""
    table = np.zeros((run.concepts, len(run.lower_mean)), dtype=np.float32)
    if removal == "mean":
        return table
    if removal == "subspace":
        directions = run.encoder_directions.astype(np.float64)
        lengths = np.linalg.norm(directions, axis=1, keepdims=True)
        lengths[lengths == 0] = 1
        table[:] = directions / lengths
        return table
    for concept in np.flatnonzero(run.counts > 0).tolist():
        if removal == "projection":
            table[concept] = run.published_direction(concept)
        elif removal == "offset":
            table[concept] = run.concept_means[concept] - run.lower_mean
        else:
            basis = run.direction(concept, run.config.lower)
            if len(basis) > 1:
                raise ConfigError("the run's concepts have subspaces; this removal takes single directions")
            if len(basis) == 1:
                table[concept] = basis[0]
    return table


def along(offset: Float32[Tensor, "row d"], unit: Float32[Tensor, "#row d"]) -> Float32[Tensor, "row d"]:
    """(offset·u) u, row by row."""
    part: Tensor = (offset * unit).sum(dim=-1, keepdim=True) * unit
    return part


def onto_span(offset: Float64[Tensor, "row d"], spanning: Float64[Tensor, "row k d"]) -> Float64[Tensor, "row d"]:
    """Each offset projected orthogonally on the span of its unit vectors, which may depend on each other or be zero."""
    # Eigenvectors of the k × k products are the singular vectors on that side, at a fraction of the price.
    values, vectors = torch.linalg.eigh(spanning @ spanning.mT)
    kept = values > _RANK_TOLERANCE**2 * values[:, -1:].clamp_min(1e-300)
    scale = torch.where(kept, values.clamp_min(1e-300).rsqrt(), torch.zeros_like(values))
    basis = scale[..., None] * (vectors.mT @ spanning)
    projected: Tensor = (basis.mT @ (basis @ offset[..., None])).squeeze(-1)
    return projected


def match(
    own: Float32[Tensor, "row d"],
    offset: Float32[Tensor, "row d"],
    towards: Float32[Tensor, "row d"],
    otherwise: Float32[Tensor, "row d"],
) -> Float32[Tensor, "row d"]:
    """A displacement with the norm of `own` and its cosine to `offset`, that goes `towards` something else.

    Of `towards` only the direction across `offset` counts; where there is none, that of `otherwise` does.
    """
    along_it = offset / offset.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    length = own.norm(dim=-1, keepdim=True)
    cosine = ((own * along_it).sum(dim=-1, keepdim=True) / length.clamp_min(1e-12)).clamp(-1, 1)
    across, whole = _across(towards, along_it), towards.norm(dim=-1, keepdim=True)
    # What is left of a parallel vector is rounding.
    seen = across.norm(dim=-1, keepdim=True) > 1e-5 * whole
    across = torch.where(seen, across, _across(otherwise, along_it))
    across = _across(across / across.norm(dim=-1, keepdim=True).clamp_min(1e-12), along_it)
    across = across / across.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    matched: Tensor = length * (cosine * along_it + (1 - cosine**2).sqrt() * across)
    return matched


def _across(vectors: Float32[Tensor, "row d"], unit: Float32[Tensor, "row d"]) -> Float32[Tensor, "row d"]:
    return vectors - along(vectors, unit)
