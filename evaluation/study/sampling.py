"""Which texts become items: a seeded draw, stratified by what the model predicts and whether it is right.

Proportional allocation keeps the population's shares. Equal allocation, as published, draws as many wrong predictions
as right ones; each item then carries a weight of N_h / n_h, texts of its stratum by items of it, so that weighted
means still speak of the population (Horvitz and Thompson 1952).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int64

from .items import Stratum

Allocation = Literal["proportional", "equal"]
Kind = tuple[int, bool | None]


@dataclass(frozen=True)
class Drawn:
    """The texts drawn, in random order, each with its weight."""

    texts: list[int]
    weights: list[float]
    """N_h / n_h, at a mean of 1."""
    strata: tuple[Stratum, ...]


def draw(kinds: Sequence[Kind], count: int, *, allocation: Allocation, seed: int) -> Drawn:
    """Draw texts without replacement.

    Parameters
    ----------
    kinds
        Prediction of each text, and whether it is right (`None` without a label).
    count
        How many to draw; all where there are fewer.
    """
    generator = np.random.default_rng(seed)
    strata = sorted(set(kinds), key=lambda kind: (kind[0], kind[1] is None, kind[1]))
    members = [generator.permutation([n for n, kind in enumerate(kinds) if kind == stratum]) for stratum in strata]
    sizes = np.array([len(part) for part in members], dtype=np.int64)
    amounts = allocate(sizes, min(count, len(kinds)), allocation)
    chosen, weights = [], []
    for part, size, amount in zip(members, sizes.tolist(), amounts.tolist(), strict=True):
        chosen += part[:amount].tolist()
        weights += [size / max(amount, 1)] * amount
    order = generator.permutation(len(chosen)).tolist()
    scale = len(chosen) / sum(weights) if weights else 1.0
    return Drawn(
        texts=[chosen[place] for place in order],
        weights=[weights[place] * scale for place in order],
        strata=tuple(
            Stratum(prediction=prediction, right=right, texts=size, items=amount)
            for (prediction, right), size, amount in zip(strata, sizes.tolist(), amounts.tolist(), strict=True)
        ),
    )


def allocate(sizes: Int64[np.ndarray, " stratum"], count: int, allocation: Allocation) -> Int64[np.ndarray, " stratum"]:
    """How many texts of each stratum to draw, `count` in all (at most all texts).

    Every stratum gets one before any gets two, as far as `count` goes, largest strata first: what was not drawn from at
    all could not be weighted. The rest goes by largest remainders.
    """
    amounts = np.zeros(len(sizes), dtype=np.int64)
    if len(sizes) == 0 or count <= 0:
        return amounts
    amounts[np.argsort(-sizes, kind="stable")[:count]] = 1
    wanted = sizes / sizes.sum() * count if allocation == "proportional" else np.full(len(sizes), count / len(sizes))
    while amounts.sum() < min(count, sizes.sum()):
        # The one that lacks most of what it is to have; full ones lack nothing.
        lacks = np.where(amounts < sizes, wanted - amounts, -np.inf)
        amounts[int(np.argmax(lacks))] += 1
    return amounts
