"""Whether the rows of a concept are alike at a site, and so across layers: at the lower site and at the upper one.

Demou et al. (2605.09438) ask of a crosscoder's latent whether several layers drive it. A code is assigned at one layer,
so here it is asked whether its rows behave alike at another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from scipy.sparse import csr_array  # type: ignore[import-untyped]

from ..cache.reader import Cache
from ..progress import Progress
from .bootstrap import Estimate
from .intervals import groups_of, jackknife, share_estimates
from .partitions import WORD, Partition, Sides

# Rows between which pairs are drawn: their vectors are in memory at once.
_POOL = 20_000
_TRIES = 32


@dataclass(frozen=True)
class Coherence:
    """Of one partition at one site."""

    r2: Estimate
    """1 − Σ‖y − mean of its concept's training rows‖² / Σ‖y − ȳ‖²: what the concept alone tells of the row."""
    closeness: Estimate
    """Mean cosine of two rows of one concept less that of two rows of different concepts; never of one word or text."""


def coherence(
    cache: Cache,
    sides: Sides,
    partitions: Sequence[Partition],
    sites: Sequence[str],
    *,
    seed: int,
    progress: Progress,
) -> dict[str, list[Coherence]]:
    """Of each site, the coherence of each partition."""
    rows = len(sides.reference.place) + 2 * len(sides.evaluated.place)
    progress.begin("coherence", rows * len(sites), "row")
    partners = [_partners(sides, part, seed=seed) for part in partitions]
    result = {}
    for site in sites:
        mean, tables = _training_means(cache, sides, partitions, site, progress)
        explained = _explained(cache, sides, partitions, site, tables, seed=seed, progress=progress)
        pool = cache.vectors(site, sides.evaluated.place[_pool(sides, seed)]) - mean.astype(np.float32)
        units = pool / np.maximum(np.linalg.norm(pool, axis=1, keepdims=True), 1e-12)
        result[site] = [Coherence(r2, _closeness(units, found)) for r2, found in zip(explained, partners, strict=True)]
    return result


def _training_means(
    cache: Cache, sides: Sides, partitions: Sequence[Partition], site: str, progress: Progress
) -> tuple[Float64[np.ndarray, " d"], list[Float64[np.ndarray, "_concept d"]]]:
    """The mean training row, and that of each concept; the mean of all for a concept without any."""
    sums = [np.zeros((part.concepts, cache.width(site))) for part in partitions]
    start = 0
    for block, vectors in cache.blocks([site], sides.reference.place):
        wide = vectors[site].astype(np.float64)
        end = start + len(block)
        for part, total in zip(partitions, sums, strict=True):
            codes = part.reference[start:end]
            members = csr_array(
                (np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(part.concepts, len(codes))
            )
            total += members @ wide
        start = end
        progress.advance(len(block))
    mean = sums[0].sum(axis=0) / len(sides.reference.place)
    tables = []
    for part, total in zip(partitions, sums, strict=True):
        counts = np.bincount(part.reference, minlength=part.concepts)[:, None]
        tables.append(np.where(counts > 0, total / np.maximum(counts, 1), mean))
    return mean, tables


def _explained(
    cache: Cache,
    sides: Sides,
    partitions: Sequence[Partition],
    site: str,
    tables: Sequence[Float64[np.ndarray, "_concept d"]],
    *,
    seed: int,
    progress: Progress,
) -> list[Estimate]:
    place = sides.evaluated.place
    centre = np.zeros(cache.width(site))
    for block, vectors in cache.blocks([site], place):
        centre += vectors[site].sum(axis=0, dtype=np.float64) / len(place)
        progress.advance(len(block))
    variance = np.empty(len(place))
    errors = np.empty((len(partitions), len(place)))
    start = 0
    for block, vectors in cache.blocks([site], place):
        wide = vectors[site].astype(np.float64)
        end = start + len(block)
        variance[start:end] = np.square(wide - centre).sum(axis=1)
        for number, (part, table) in enumerate(zip(partitions, tables, strict=True)):
            errors[number, start:end] = np.square(wide - table[part.evaluated[start:end]]).sum(axis=1)
        start = end
        progress.advance(len(block))
    owner = np.unique(sides.evaluated.text, return_inverse=True)[1]
    total = np.bincount(owner, weights=variance)
    left = [np.bincount(owner, weights=error) for error in errors]
    kept = np.stack([total - part for part in left], axis=1)
    return share_estimates(kept, np.repeat(total[:, None], len(left), axis=1), seed=seed)


def _pool(sides: Sides, seed: int) -> Int64[np.ndarray, " pool"]:
    """Numbers of the evaluated rows between which pairs are drawn, ascending."""
    rows = len(sides.evaluated.place)
    pool: Int64[np.ndarray, " pool"] = np.sort(np.random.default_rng([seed, 3]).permutation(rows)[:_POOL])
    return pool


@dataclass(frozen=True)
class _Partners:
    """Of rows of the pool, one of the same concept and one of another; neither of the same word or text."""

    row: Int64[np.ndarray, " pair"]
    same: Int64[np.ndarray, " pair"]
    other: Int64[np.ndarray, " pair"]
    group: Int64[np.ndarray, "pair owner"]
    """Of the texts of all three."""


def _partners(sides: Sides, part: Partition, *, seed: int) -> _Partners:
    pool = _pool(sides, seed)
    codes, text = part.evaluated[pool], np.unique(sides.evaluated.text, return_inverse=True)[1]
    word, owner = sides.evaluated.attributes[WORD][pool], text[pool]
    generator = np.random.default_rng([seed, 4])
    order = np.argsort(codes, kind="stable")
    first = np.searchsorted(codes[order], codes, side="left")
    size = np.searchsorted(codes[order], codes, side="right") - first

    def unlike(found: Int64[np.ndarray, " pool"]) -> Bool[np.ndarray, " pool"]:
        fits: Bool[np.ndarray, " pool"] = (word[found] != word) & (owner[found] != owner)
        return fits

    same = np.full(len(pool), -1)
    other = np.full(len(pool), -1)
    # Drawn again until it fits: uniform among what fits. A row for which nothing is found takes no part.
    for _ in range(_TRIES):
        near = order[first + (generator.random(len(pool)) * size).astype(np.int64)]
        same = np.where((same < 0) & unlike(near), near, same)
        far = generator.integers(len(pool), size=len(pool))
        other = np.where((other < 0) & unlike(far) & (codes[far] != codes), far, other)
    row = np.flatnonzero((same >= 0) & (other >= 0))
    same, other = same[row], other[row]
    group = groups_of(int(text.max()) + 1, seed=seed)[owner]
    return _Partners(row, same, other, np.stack([group[row], group[same], group[other]], axis=1))


def _closeness(units: Float32[np.ndarray, "pool d"], found: _Partners) -> Estimate:
    if len(found.row) == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    gain = np.concatenate(
        [
            (units[row] * (units[same] - units[other])).sum(axis=1, dtype=np.float64)
            for row, same, other in zip(
                *(np.array_split(part, 1 + len(part) // 2_048) for part in (found.row, found.same, found.other)),
                strict=True,
            )
        ]
    )

    def mean(kept: Bool[np.ndarray, " pair"]) -> Float64[np.ndarray, " figure"]:
        return np.array([gain[kept].mean() if kept.any() else np.nan])

    return jackknife(mean, found.group)[0]


def figures(found: Mapping[str, Sequence[Coherence]], number: int) -> dict[str, Estimate]:
    """The figures of one partition by name."""
    return {f"r2 {site}": parts[number].r2 for site, parts in found.items()} | {
        f"closeness {site}": parts[number].closeness for site, parts in found.items()
    }
