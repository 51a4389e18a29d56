"""Where the codes stand before the first step: k-means, plain or on the unit sphere."""

import warnings

import numpy as np
from jaxtyping import Float32, Int64
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from .config import StartConfig

# scikit-learn adds up its threads' parts in the order in which they end. The sum of two does not depend on it.
_THREADS = 2


def starting_rows(rows: Int64[np.ndarray, " row"], config: StartConfig, *, seed: int) -> Int64[np.ndarray, " sample"]:
    """The rows that k-means sees: all of them, or a seeded sample in ascending order."""
    if len(rows) <= config.rows:
        return rows
    picked = np.random.default_rng(seed).choice(len(rows), config.rows, replace=False)
    return rows[np.sort(picked)]


def starting_codes(
    rows: Float32[np.ndarray, "row d"], config: StartConfig, *, codes: int, seed: int
) -> Float32[np.ndarray, "code d"]:
    """Centroids of the rows.

    `spherical` is the published scaled-spherical k-means (codebook_initialization.py): ordinary k-means on unit
    vectors, its centroids brought back to the sphere and multiplied by the mean norm of their members.
    """
    if not config.spherical:
        centroids: Float32[np.ndarray, "code d"] = _fitted(rows, config, codes=codes, seed=seed).cluster_centers_
        return centroids
    norms = np.linalg.norm(rows, axis=1)
    units = rows / np.maximum(norms, np.finfo(np.float32).tiny)[:, None]
    fitted = _fitted(units, config, codes=codes, seed=seed)
    members = np.bincount(fitted.labels_, minlength=codes)
    mean_norms = np.bincount(fitted.labels_, weights=norms, minlength=codes) / np.maximum(members, 1)
    mean_norms[members == 0] = norms.mean()
    directions = fitted.cluster_centers_.astype(np.float64)
    directions /= np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    scaled: Float32[np.ndarray, "code d"] = (directions * mean_norms[:, None]).astype(np.float32)
    return scaled


def _fitted(rows: Float32[np.ndarray, "row d"], config: StartConfig, *, codes: int, seed: int) -> KMeans:
    means = KMeans(codes, init="k-means++", n_init=config.restarts, max_iter=config.iterations, random_state=seed)
    with threadpool_limits(_THREADS, user_api="openmp"), warnings.catch_warnings():
        # Fewer distinct rows than codes: the codes left over are dead ones, which the report counts.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return means.fit(rows)
