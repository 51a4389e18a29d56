"""Taking a direction out of vectors, and the directions that serve as controls.

Every removal has the form h′ = h − ((h − m)·u) u with a unit vector u: m = 0 is the projection as published, m = the
site's training mean is the centred one. Codes share a large common mean, so the uncentred projection moves h along that
mean as well, which can turn a class round instead of removing it. A zero u removes nothing.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from ..errors import ConfigError
from ..trainer.run import Run

Removal = Literal["projection", "centred"]
Subject = Literal["own code", "random code", "matched random", "mean direction"]
"""What is removed: the row's own code, or one of three controls."""

REMOVALS: tuple[Removal, ...] = ("projection", "centred")
SUBJECTS: tuple[Subject, ...] = ("own code", "random code", "matched random", "mean direction")


def remove(
    hidden: Float[Tensor, "*rows d"], unit: Float[Tensor, "*rows d"], centre: Float[Tensor, " d"]
) -> Float[Tensor, "*rows d"]:
    """h − ((h − m)·u) u, row by row."""
    return hidden - ((hidden - centre) * unit).sum(dim=-1, keepdim=True) * unit


def matched_random(
    hidden: Float[Tensor, "*rows d"],
    unit: Float[Tensor, "*rows d"],
    centre: Float[Tensor, " d"],
    noise: Float[Tensor, "*rows d"],
) -> Float[Tensor, "*rows d"]:
    """A random unit vector with the cosine to h − m that `unit` has, so that removing it removes the same norm.

    Parameters
    ----------
    noise
        Standard normal values that decide the direction.
    """
    offset = hidden - centre
    length = offset.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    along = offset / length
    cosine = (along * unit).sum(dim=-1, keepdim=True).clamp(-1, 1)
    across = noise - (noise * along).sum(dim=-1, keepdim=True) * along
    across = across / across.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    matched: Tensor = cosine * along + (1 - cosine**2).sqrt() * across
    return matched


class Directions:
    """The unit vectors that a run offers for removal at its lower site.

    Parameters
    ----------
    run
        The concept model.
    removal
        Which removal they are for: the published projection takes the raw code, the centred one the concept's mean
        less the site's training mean.
    """

    def __init__(self, run: Run, removal: Removal) -> None:
        self._alive = np.flatnonzero(run.counts > 0)
        if len(self._alive) < 2:
            raise ConfigError("the run has fewer than two concepts in use: there is no other code to compare with")
        self._rank = np.full(run.concepts, -1)
        self._rank[self._alive] = np.arange(len(self._alive))
        mean = torch.from_numpy(run.lower_mean)
        self.centre = torch.zeros_like(mean) if removal == "projection" else mean
        self.mean_direction = mean / mean.norm().clamp_min(1e-12)
        self.table = torch.zeros(run.concepts, len(mean))
        for concept in self._alive.tolist():
            if removal == "projection":
                self.table[concept] = torch.from_numpy(run.published_direction(concept))
            else:
                basis = run.direction(concept, run.config.lower)
                if len(basis) > 1:
                    raise ConfigError("the run's concepts have subspaces; this removal takes single directions")
                if len(basis) == 1:
                    self.table[concept] = torch.from_numpy(basis[0])

    def other(self, codes: Int64[np.ndarray, " row"], shifts: Int64[np.ndarray, " row"]) -> Int64[np.ndarray, " row"]:
        """Another code in use for each code: `shifts` places further among them, never the code itself."""
        count = len(self._alive)
        rank = np.maximum(self._rank[codes], 0)
        others: Int64[np.ndarray, " row"] = self._alive[(rank + 1 + shifts % (count - 1)) % count]
        return others


def norm_share(before: Float32[np.ndarray, "*rows d"], after: Float32[np.ndarray, "*rows d"]) -> float:
    """‖h − h′‖ / ‖h‖ over all rows given; 0 where there are none."""
    whole = float(np.linalg.norm(before))
    return float(np.linalg.norm(before - after)) / whole if whole > 0 else 0.0
