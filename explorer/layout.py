"""Where concepts lie on a map: directions that are alike lie close together.

t-SNE (van der Maaten & Hinton 2008), started from the first principal components, over the most used concepts; the
others are put among the concepts that they are most like. One thread and a fixed seed: the same directions give the
same map.
"""

import numpy as np
from jaxtyping import Float32, Float64, Int64

MOST = 5_000
"""Concepts that t-SNE lays out; its time grows faster than their number."""
_FEWEST = 5
_COMPONENTS = 50
_PERPLEXITY = 30.0
_ITERATIONS = 500
_NEIGHBOURS = 3
_BLOCK = 1_024


def map_of(
    directions: Float32[np.ndarray, "concept d"], uses: Int64[np.ndarray, " concept"], *, seed: int
) -> Float64[np.ndarray, "concept 2"]:
    """Places in [−1, 1]².

    Parameters
    ----------
    directions
        Unit vectors; a vector of zeros lies in the middle.
    uses
        Which concepts matter more.
    """
    places = np.zeros((len(directions), 2))
    there = np.flatnonzero((directions != 0).any(axis=1))
    by_use = there[np.argsort(-uses[there], kind="stable")]
    core, rest = np.sort(by_use[:MOST]), np.sort(by_use[MOST:])
    if len(core) > 1:
        places[core] = _laid_out(directions[core].astype(np.float64), seed)
    for start in range(0, len(rest), _BLOCK):
        part = rest[start : start + _BLOCK]
        places[part] = _among(directions[core], places[core], directions[part])
    return _scaled(places, there)


def _laid_out(directions: Float64[np.ndarray, "concept d"], seed: int) -> Float64[np.ndarray, "concept 2"]:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    count, width = directions.shape
    # Sums of several threads are rounded in any order.
    with threadpool_limits(limits=1):
        components = PCA(min(_COMPONENTS, count, width), svd_solver="full").fit_transform(directions)
        if components.shape[1] < 2:
            components = np.pad(components, ((0, 0), (0, 2 - components.shape[1])))
        if count < _FEWEST or np.ptp(components, axis=0).max() < 1e-9:
            return np.asarray(components[:, :2], dtype=np.float64)
        perplexity = min(_PERPLEXITY, (count - 1) / 3)
        layout = TSNE(2, perplexity=perplexity, init="pca", max_iter=_ITERATIONS, random_state=seed, n_jobs=1)
        return np.asarray(layout.fit_transform(components), dtype=np.float64)


def _among(
    known: Float32[np.ndarray, "known d"],
    places: Float64[np.ndarray, "known 2"],
    directions: Float32[np.ndarray, "concept d"],
) -> Float64[np.ndarray, "concept 2"]:
    """The middle of the most like ones, each by its cosine."""
    cosines = directions @ known.T
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :_NEIGHBOURS]
    weights = np.take_along_axis(cosines, nearest, axis=1).astype(np.float64).clip(1e-6)
    weights /= weights.sum(axis=1, keepdims=True)
    middle: Float64[np.ndarray, "concept 2"] = (weights[..., None] * places[nearest]).sum(axis=1)
    return middle


def _scaled(
    places: Float64[np.ndarray, "concept 2"], there: Int64[np.ndarray, " _there"]
) -> Float64[np.ndarray, "concept 2"]:
    """In the middle of [−1, 1]², which they fill in both directions."""
    if len(there) == 0:
        return places
    low, high = places[there].min(axis=0), places[there].max(axis=0)
    # What is left of equal places is rounding.
    half = np.where(high - low > 1e-9 * np.ptp(places[there]), (high - low) / 2, 1.0)
    scaled = np.zeros_like(places)
    scaled[there] = (places[there] - (low + high) / 2) / half
    return scaled
