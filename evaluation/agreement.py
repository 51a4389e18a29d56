"""How well codes agree: with concepts that are known, and with the codes of another seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float, Float64, Int64
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, v_measure_score
from sklearn.metrics.cluster import contingency_matrix

from ..errors import DataError


@dataclass(frozen=True)
class Recovery:
    """How much of the true concepts the codes of the same rows show. Each figure is 1 where they are the same."""

    v_measure: float
    """Harmonic mean of homogeneity and completeness (Rosenberg and Hirschberg 2007). Many codes raise it by chance."""
    ami: float
    """Mutual information adjusted for chance (Vinh et al. 2010), arithmetic mean of the entropies."""
    ari: float
    """Rand index adjusted for chance (Hubert and Arabie 1985)."""
    matched_f1: float
    """Mean over concepts of `matched_f1`."""
    purity: float
    """Share of rows whose concept is the most frequent one of their code."""


@dataclass(frozen=True)
class Stability:
    """Agreement of all pairs of seeds: its mean, and the least and the most that a pair agrees."""

    mean: float
    low: float
    high: float
    pairs: tuple[float, ...]
    """In the order of `itertools.combinations`."""


def recovery(truth: Int64[np.ndarray, " row"], codes: Int64[np.ndarray, " row"]) -> Recovery:
    """Compare the codes of rows with their concepts; what numbers stand for either does not matter.

    Raises
    ------
    DataError
        Where there are no rows.
    """
    counts = _contingency(truth, codes)
    return Recovery(
        v_measure=float(v_measure_score(truth, codes)),
        ami=float(adjusted_mutual_info_score(truth, codes)),
        ari=float(adjusted_rand_score(truth, codes)),
        matched_f1=float(_matched_f1(counts).mean()),
        purity=float(counts.max(axis=0).sum() / counts.sum()),
    )


def matched_f1(truth: Int64[np.ndarray, " row"], codes: Int64[np.ndarray, " row"]) -> Float64[np.ndarray, " concept"]:
    """F1 of each concept that occurs, ascending, with its own code of the best one-to-one matching; 0 without a code.

    The matching (Kuhn 1955) is the one with the largest sum of F1, so every concept counts as much as any other.

    Raises
    ------
    DataError
        Where there are no rows.
    """
    return _matched_f1(_contingency(truth, codes))


def _contingency(
    truth: Int64[np.ndarray, " row"], codes: Int64[np.ndarray, " row"]
) -> Int64[np.ndarray, "concept code"]:
    if len(truth) == 0:
        raise DataError("there are no rows to compare: give the concepts and codes of one row or more")
    counts: Int64[np.ndarray, "concept code"] = contingency_matrix(truth, codes)
    return counts


def _matched_f1(counts: Int64[np.ndarray, "concept code"]) -> Float64[np.ndarray, " concept"]:
    f1 = 2 * counts / (counts.sum(axis=1, keepdims=True) + counts.sum(axis=0))
    concepts, codes = linear_sum_assignment(f1, maximize=True)
    found = np.zeros(len(f1))
    found[concepts] = f1[concepts, codes]
    return found


def matched_cosine(first: Float[np.ndarray, "code d"], second: Float[np.ndarray, "other d"]) -> float:
    """Mean cosine of the directions of two codebooks, each with its partner of the best one-to-one matching.

    The directions are to be centred. One of length 0 has cosine 0 with any. Of unlike numbers of codes the surplus goes
    without a partner and does not count.

    Raises
    ------
    DataError
        Where a codebook is empty.
    """
    if len(first) == 0 or len(second) == 0:
        raise DataError(f"{len(first)} and {len(second)} directions cannot be matched: give one or more on either side")
    cosines = _units(first) @ _units(second).T
    return float(cosines[linear_sum_assignment(cosines, maximize=True)].mean())


def _units(directions: Float[np.ndarray, "code d"]) -> Float64[np.ndarray, "code d"]:
    wide = directions.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    units: Float64[np.ndarray, "code d"] = np.divide(wide, lengths, out=np.zeros_like(wide), where=lengths > 0)
    return units


def direction_stability(seeds: Sequence[Float[np.ndarray, "_code d"]]) -> Stability:
    """`matched_cosine` of each pair of seeds' centred concept directions.

    Raises
    ------
    DataError
        Where there are fewer than two seeds, or one without codes.
    """
    return _over_pairs([matched_cosine(first, second) for first, second in _pairs(seeds)])


def assignment_stability(seeds: Sequence[Int64[np.ndarray, " row"]]) -> Stability:
    """Adjusted mutual information of each pair of seeds' codes of the same rows.

    Raises
    ------
    DataError
        Where there are fewer than two seeds, or no rows.
    """
    pairs = _pairs(seeds)
    if len(seeds[0]) == 0:
        raise DataError("there are no rows to compare: give the codes of one row or more")
    return _over_pairs([float(adjusted_mutual_info_score(first, second)) for first, second in pairs])


def _pairs(seeds: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    if len(seeds) < 2:
        raise DataError(f"stability needs the results of two seeds or more, and got {len(seeds)}")
    return list(combinations(seeds, 2))


def _over_pairs(values: list[float]) -> Stability:
    return Stability(mean=float(np.mean(values)), low=min(values), high=max(values), pairs=tuple(values))
