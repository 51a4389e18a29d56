"""Which rows belong to each concept: one pass over the vectors, of which a few numbers stay for each row or concept."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from ..cache.reader import Cache
from ..progress import Progress
from ..trainer.run import Run
from .rows import Rows


class Smallest:
    """The rows with the smallest keys of each concept, of rows that come in blocks.

    Parameters
    ----------
    kept
        How many of each concept.
    """

    def __init__(self, concepts: int, kept: int) -> None:
        self._kept = kept
        self._keys = np.full((concepts, kept), np.inf)
        self.rows = np.full((concepts, kept), -1, dtype=np.int64)
        """Smallest key first; −1 where there are fewer."""

    def add(
        self,
        concepts: Int64[np.ndarray, " row"],
        keys: Float64[np.ndarray, " row"],
        rows: Int64[np.ndarray, " row"],
    ) -> None:
        """A block; of equal keys, the row that came first stays first."""
        if len(concepts) == 0 or self._kept == 0:
            return
        order = np.lexsort((rows, keys, concepts))
        sorted_concepts = concepts[order]
        touched, first, inverse = np.unique(sorted_concepts, return_index=True, return_inverse=True)
        rank = np.arange(len(order)) - first[inverse]
        kept = rank < self._kept
        new_keys = np.full((len(touched), self._kept), np.inf)
        new_rows = np.full((len(touched), self._kept), -1, dtype=np.int64)
        new_keys[inverse[kept], rank[kept]] = keys[order][kept]
        new_rows[inverse[kept], rank[kept]] = rows[order][kept]
        both_keys = np.concatenate([self._keys[touched], new_keys], axis=1)
        both_rows = np.concatenate([self.rows[touched], new_rows], axis=1)
        best = np.argsort(both_keys, axis=1, kind="stable")[:, : self._kept]
        self._keys[touched] = np.take_along_axis(both_keys, best, axis=1)
        self.rows[touched] = np.take_along_axis(both_rows, best, axis=1)


@dataclass(frozen=True)
class Members:
    """What a run makes of all rows."""

    codes: Int32[np.ndarray, " row"]
    """The concept of each row; −1 for rows of kinds that the run was not trained on."""
    trained: Bool[np.ndarray, " row"]
    """Rows that the run was trained on."""
    directions: Float32[np.ndarray, "concept d"]
    """Unit vectors at the lower site; zero where a concept has none."""
    typical: Int64[np.ndarray, "concept kept"]
    """Training rows along the concept's direction, the largest cosine first; −1 where there are fewer."""
    drawn: Int64[np.ndarray, "concept kept"]
    """Training rows drawn at random."""
    upper_mean: Float64[np.ndarray, " d_upper"]
    """Of the training rows."""
    upper_norm: float
    """Mean length of the training rows at the upper site, less their mean."""
    upper_labels: Float64[np.ndarray, "class d_upper"]
    """Mean of the training rows of each label's texts there, less the mean of all; zero where a label has none."""


def read_members(
    cache: Cache,
    run: Run,
    rows: Rows,
    labels: Int64[np.ndarray, " text"],
    *,
    classes: int,
    kept: int,
    seed: int,
    progress: Progress,
) -> Members:
    """Assign all rows.

    Parameters
    ----------
    labels
        Of each row of `Cache.texts`; −1 where it has none.
    kept
        Typical rows, and rows drawn, of each concept.
    """
    config = run.config
    sites = list(dict.fromkeys([config.lower, config.upper]))
    member = rows.members(run)
    trained_texts = cache.splits(config.split) & ~np.isin(np.asarray(cache.texts["text_id"]), run.held_out_texts)
    trained = member & trained_texts[rows.text]
    directions = unit_directions(run)
    weights = run.counts / max(1, int(run.counts.sum()))
    upper_mean: Float64[np.ndarray, " d_upper"] = weights @ run.upper_table.astype(np.float64)
    codes = np.full(len(rows.place), -1, dtype=np.int32)
    chance = np.random.default_rng([seed, 5]).random(len(rows.place))
    typical, drawn = (Smallest(run.concepts, kept) for _ in range(2))
    sums = np.zeros((classes + 1, len(upper_mean)))
    counts = np.zeros(classes + 1, dtype=np.int64)
    lengths = 0.0
    asked = np.flatnonzero(member)
    progress.begin("concepts of rows", len(asked), "rows")
    done = 0
    for _, vectors in cache.blocks(sites, rows.place[asked]):
        block = asked[done : done + len(vectors[config.lower])]
        done += len(block)
        found = run.assign(vectors[config.lower])
        codes[block] = found
        inside = trained[block]
        mine, concepts = block[inside], found[inside]
        offset = vectors[config.lower][inside] - run.lower_mean
        cosine = (offset * directions[concepts]).sum(axis=1) / np.linalg.norm(offset, axis=1).clip(1e-12)
        typical.add(concepts, -cosine.astype(np.float64), mine)
        drawn.add(concepts, chance[mine], mine)
        upper = vectors[config.upper][inside] - upper_mean
        lengths += float(np.linalg.norm(upper, axis=1).sum())
        label = labels[rows.text[mine]]
        for value in np.unique(label).tolist():
            # A text without a label counts into the last line, which nobody reads.
            sums[value] += upper[label == value].sum(axis=0)
            counts[value] += int((label == value).sum())
        progress.advance(len(block))
    return Members(
        codes=codes,
        trained=trained,
        directions=directions,
        typical=typical.rows,
        drawn=drawn.rows,
        upper_mean=upper_mean,
        upper_norm=lengths / max(1, int(trained.sum())),
        upper_labels=sums[:classes] / counts[:classes, None].clip(1),
    )


def unit_directions(run: Run) -> Float32[np.ndarray, "concept d"]:
    """Each concept's direction at the lower site; zero where it has none."""
    directions = np.zeros((run.concepts, len(run.lower_mean)), dtype=np.float32)
    for concept in np.flatnonzero(run.counts > 0).tolist():
        basis = run.direction(concept, run.config.lower)
        if len(basis):
            directions[concept] = basis[0]
    return directions
