"""How well concepts agree with what is known of their rows: words, parts of speech, labels."""

import numpy as np
from jaxtyping import Bool, Float64, Int64

from .bootstrap import Estimate
from .information import (
    adjusted_information,
    effective_number,
    information_within,
    most_frequent,
    pairs_of,
    purity,
)
from .intervals import groups_of, jackknife, share_estimates
from .partitions import LABEL, WORD, Partition, Rows, Sides

# Figures that need all pairs of values at once are of whole texts with no more rows than this in all.
_ROWS_AT_ONCE = 50_000


def main_values(rows: Rows, codes: Int64[np.ndarray, " row"], attribute: str, concepts: int) -> Int64[np.ndarray, " c"]:
    """Each concept's most frequent value of an attribute; −1 where it has no row with a value."""
    values = rows.attributes[attribute]
    known = values >= 0
    return most_frequent(pairs_of(codes[known], values[known]), concepts)


def agreement_figures(sides: Sides, part: Partition, *, seed: int) -> dict[str, Estimate]:
    """The figures of a partition by name: `word purity`, `word ami` and so on.

    Those measured against training rows have bootstrap intervals over texts, those within the evaluated rows jackknife
    intervals over groups of texts.
    """
    owner = np.unique(sides.evaluated.text, return_inverse=True)[1]
    shares: dict[str, tuple[Bool[np.ndarray, " row"], Bool[np.ndarray, " row"]]] = {}
    for attribute, values in sides.evaluated.attributes.items():
        known = values >= 0
        main = main_values(sides.reference, part.reference, attribute, part.concepts)
        shares[f"{attribute} purity"] = (known & (main[part.evaluated] == values), known)
        homes = _homes(sides, part, attribute)
        seen = known & (homes[values] >= 0)
        shares[f"{attribute} coverage"] = (seen & (homes[values] == part.evaluated), seen)
    parts, wholes = (
        np.stack([np.bincount(owner, weights=pair[side]) for pair in shares.values()], axis=1) for side in (0, 1)
    )
    figures = dict(zip(shares, share_estimates(parts, wholes, seed=seed), strict=True))
    return figures | _within(sides, part, owner, seed=seed)


def _homes(sides: Sides, part: Partition, attribute: str) -> Int64[np.ndarray, " value"]:
    """The concept that most training rows of each value are in; −1 for a value that training rows lack."""
    values = sides.reference.attributes[attribute]
    known = values >= 0
    size = max(1, len(sides.names[attribute]))
    return most_frequent(pairs_of(values[known], part.reference[known]), size)


def _within(sides: Sides, part: Partition, owner: Int64[np.ndarray, " row"], *, seed: int) -> dict[str, Estimate]:
    """Figures within the evaluated rows, or within whole texts of them drawn with the seed."""
    rows = sides.evaluated
    sizes = np.bincount(owner)
    order = np.random.default_rng([seed, 5]).permutation(len(sizes))
    taken = np.zeros(len(sizes), dtype=bool)
    taken[order[: max(1, int(np.searchsorted(np.cumsum(sizes[order]), _ROWS_AT_ONCE, side="right")))]] = True
    chosen = np.flatnonzero(taken[owner])
    codes = part.evaluated[chosen]
    attributes = {name: values[chosen] for name, values in rows.attributes.items()}
    words, labels = attributes[WORD], attributes[LABEL]
    # Of each text a word's first row alone: the rows of a word are then of different texts, and independent of another.
    once = np.zeros(len(chosen), dtype=bool)
    once[np.unique(np.stack([owner[chosen], words]), axis=1, return_index=True)[1]] = True
    once &= labels >= 0

    def figures(kept: Bool[np.ndarray, " row"]) -> Float64[np.ndarray, " figure"]:
        found = []
        for values in attributes.values():
            used = kept & (values >= 0)
            pairs = pairs_of(codes[used], values[used])
            found += [purity(pairs), adjusted_information(pairs)]
        found.append(effective_number(pairs_of(codes[kept], words[kept])))
        used = kept & once
        beyond, by_chance = information_within(words[used], codes[used], labels[used])
        return np.array([*found, beyond - by_chance, by_chance])

    names = [f"{name} {figure}" for name in attributes for figure in ("purity within", "ami")]
    names += ["words per concept", "label beyond word", "label beyond word by chance"]
    return dict(zip(names, jackknife(figures, groups_of(len(sizes), seed=seed)[owner[chosen]][:, None]), strict=True))
