"""How the concepts of two runs go together: which concept of the second a row has that has one of the first."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from ..evaluation.information import Pairs, pairs_of

LINKS = 200


@dataclass(frozen=True)
class Assigned:
    """A run with the concept of each row."""

    id: str
    lower: str
    """Its lower site."""
    codes: Int32[np.ndarray, " row"]
    """−1 for rows that the run says nothing of."""


def flows(runs: Sequence[Assigned], sites: Sequence[str]) -> list[dict[str, Any]]:
    """The flow between runs of neighbouring lower sites, from the lower to the higher one, and of the same site.

    Parameters
    ----------
    sites
        All sites from low to high; those between two runs' sites that no run has do not part them.
    """
    levels = [site for site in sites if any(run.lower == site for run in runs)]
    found = []
    for one, other in combinations(sorted(runs, key=lambda run: levels.index(run.lower)), 2):
        apart = levels.index(other.lower) - levels.index(one.lower)
        if apart <= 1:
            found.append(_flow(one, other, same_site=apart == 0))
    return found


def _flow(lower: Assigned, upper: Assigned, *, same_site: bool) -> dict[str, Any]:
    both = (lower.codes >= 0) & (upper.codes >= 0)
    pairs = pairs_of(lower.codes[both].astype(np.int64), upper.codes[both].astype(np.int64))
    order = np.lexsort((pairs.second, pairs.first, -pairs.count))[:LINKS]
    return {
        "lower": lower.id,
        "upper": upper.id,
        "same_site": same_site,
        "links": np.stack([pairs.first[order], pairs.second[order], pairs.count[order]], axis=1),
        "rows": int(both.sum()),
        "nmi": normalized_information(pairs),
    }


def normalized_information(pairs: Pairs) -> float | None:
    """Mutual information over the arithmetic mean of the entropies, from 0 to 1; `None` without rows.

    Not adjusted for chance: with many concepts and few rows it is above 0 also where they say nothing of each other.
    """
    if len(pairs.count) == 0:
        return None
    rows = pairs.count.sum()
    first, second = (_totals(values, pairs.count) for values in (pairs.first, pairs.second))
    entropies = [_entropy(totals / rows) for totals in (first, second)]
    joint = _entropy(pairs.count / rows)
    mean = sum(entropies) / 2
    return float(min(1.0, max(0.0, (sum(entropies) - joint) / mean))) if mean > 0 else 1.0


def _totals(values: Int64[np.ndarray, " pair"], count: Int64[np.ndarray, " pair"]) -> Int64[np.ndarray, " value"]:
    totals = np.bincount(values, weights=count).astype(np.int64)
    return totals[totals > 0]


def _entropy(shares: Any) -> float:
    return float(-(shares * np.log(shares)).sum())
