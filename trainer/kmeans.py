"""k-means over rows that need not fit into memory, plain or on the unit sphere.

Most of the work is done on weighted samples, each larger than the last, and ended by a few passes over all rows. Rows
are centred before anything else: under a mean far larger than the deviations, float32 could not tell codes apart.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from ..errors import DataError
from ..progress import SILENT, Progress

Blocks = Callable[[], Iterable[Float32[Tensor, "_block d"]]]
"""Gives all rows, in blocks of any length and in the same order each time that it is called."""

# Pieces are cut alike however the rows come, so that the bytes of the result do not depend on the blocks.
_PIECE = 2_048
# Scores of a product: no more than stay in a core's cache, but never so few rows that the product gets slow.
_SCORE_BYTES = {"cpu": 4 << 20}
_SCORE_BYTES_ELSEWHERE = 256 << 20
_LEAST_ROWS = 256
# Rows of the first sample per code, and how much larger the next one is.
_ROWS_PER_CODE, _LEAST_SAMPLE, _GROWTH = 64, 16_384, 4
# Centroids placed at once: so small a part of those that stand that they are drawn nearly as if one by one.
_BATCH_SHARE, _LARGEST_BATCH = 8, 1_024
# Centroids are moved elsewhere until so many attempts in a row were no gain. With fewer codes more depends on one.
_FAILED_MOVES, _FEW_CODES = 2, 50
# A squared distance this small beside the row's squared norm is float32's rounding.
_NOISE = 2e-6


@dataclass(frozen=True)
class KMeans:
    """What k-means found."""

    centroids: Float32[Tensor, "code d"]
    """In raw coordinates; for a code without members no more than a place where it does no harm."""
    counts: Int64[Tensor, " code"]
    """Members of each."""
    inertia: float
    """Σ over rows of the squared distance to the mean of their cluster; of unit vectors where `spherical`."""
    passes: int
    """Times that all rows were gone through."""


def kmeans(
    blocks: Blocks,
    *,
    codes: int,
    iterations: int,
    seed: int,
    device: torch.device,
    spherical: bool = False,
    tolerance: float = 5e-4,
    kept_bytes: int = 1 << 30,
    progress: Progress = SILENT,
) -> KMeans:
    """Cluster rows; equal calls give equal bytes on a CPU.

    Seeds are drawn by greedy k-means++ (Arthur & Vassilvitskii 2007), many at once and thinned by rejection, from a
    sample that favours rows far from the mean (Bachem et al. 2018). Centroids move twice as far as Lloyd moves them,
    for as long as that helps. The last pass is exact: nearest centroids, means and inertia are those of float64.

    Parameters
    ----------
    blocks
        The rows, on `device`.
    codes
        Clusters. Those left over where there are fewer distinct rows have no members.
    iterations
        Upper limit of the iterations on each sample and on all rows.
    spherical
        Cluster unit vectors; a centroid is then its direction times the mean norm of its members (CLVQ-VAE's
        codebook_initialization.py, `spherical`).
    tolerance
        Iterations end with one that lowers the inertia by less than this share of it.
    kept_bytes
        Rows that fit into so many bytes are read once and kept; others are read anew for every pass. The samples may
        take as much again, twice for a moment, and four rows per code in any case.

    Raises
    ------
    DataError
        Where there are no rows, or some are not finite.
    Interrupted
    """
    progress.begin("codebook start", None, "pass")
    rows = _Rows(blocks, spherical=spherical, kept_bytes=kept_bytes, device=device, progress=progress)
    search = _Search(
        codes=codes,
        iterations=iterations,
        tolerance=tolerance,
        generator=np.random.default_rng(seed),
        progress=progress,
    )
    first, *later = _sample_sizes(rows, codes, kept_bytes)
    sample, total = _draw_sample(rows, later[-1] if later else first, search.generator)
    small = sample.thinned(first)
    centroids = search.started(small)
    for size in later:
        larger = sample.thinned(size)
        centroids, _ = search.lloyd(larger, centroids, larger, larger.total())
    if len(sample.rows) < rows.count:
        centroids, _ = search.lloyd(rows, centroids, sample, total)
    return _finished(rows, centroids, total, spherical=spherical)


def blocks_of(rows: Float32[np.ndarray, "row d"], *, device: torch.device, size: int = 8_192) -> Blocks:
    """Rows in memory, as `kmeans` takes them."""

    def blocks() -> Iterator[Float32[Tensor, "block d"]]:
        for start in range(0, len(rows), size):
            yield torch.tensor(rows[start : start + size], device=device)

    return blocks


def assign(rows: Float32[Tensor, "row d"], centroids: Float32[Tensor, "code d"]) -> Int64[Tensor, " row"]:
    """Each row's nearest centroid, as in float64; the first of those that are equally near.

    Exact where torch's precision of float32 products is "highest", its default.
    """
    shift = centroids.mean(dim=0)
    wide = centroids.double() - shift.double()
    return torch.cat([_nearest_exactly(piece, shift, wide) for piece in rows.split(_PIECE)])


class _Rows:
    """All rows, centred, as unit vectors where asked for; read again for each pass, or kept where they fit."""

    def __init__(
        self, blocks: Blocks, *, spherical: bool, kept_bytes: int, device: torch.device, progress: Progress
    ) -> None:
        self._blocks, self._spherical, self._device, self._progress = blocks, spherical, device, progress
        self._kept: list[tuple[Tensor, Tensor]] | None = []
        self.count, self.passes, self.width = 0, 0, 0
        self._centre(kept_bytes)

    def _centre(self, kept_bytes: int) -> None:
        mean, spread = torch.zeros((), dtype=torch.float64, device=self._device), 0.0
        for piece, norms in self._read():
            wide = piece.double()
            own, share = wide.mean(dim=0), len(piece) / (self.count + len(piece))
            spread += float((wide - own).square().sum() + (own - mean).square().sum() * self.count * share)
            mean = mean + (own - mean) * share
            self.count, self.width = self.count + len(piece), piece.shape[1]
            if self._kept is not None:
                self._kept.append((piece.clone(), norms))
                if self.count * self.width * 4 > kept_bytes:
                    self._kept = None
        if self.count == 0 or not math.isfinite(spread):
            found = "no row" if self.count == 0 else "rows that are not finite"
            raise DataError(f"k-means was given {found}: choose other texts, or look for NaN in what makes the rows")
        self.shift: Float32[Tensor, " d"] = mean.float()
        self.spread = spread
        """Σ over rows of the squared distance to the mean, nearly."""
        for piece, _ in self._kept or []:
            piece.sub_(self.shift)
        self.passes = 1
        self._progress.advance()

    def _read(self) -> Iterator[tuple[Float32[Tensor, "piece d"], Float32[Tensor, " _piece"]]]:
        """The rows as they come, cut into equal pieces, and their norms. A piece is overwritten by the next."""
        buffer, filled = None, 0
        for block in self._blocks():
            while len(block):
                if buffer is None:
                    buffer = torch.empty(_PIECE, block.shape[1], device=self._device)
                part = block[: _PIECE - filled]
                buffer[filled : filled + len(part)] = part
                block, filled = block[len(part) :], filled + len(part)
                if filled == _PIECE:
                    yield self._cut(buffer)
                    filled = 0
        if buffer is not None and filled:
            yield self._cut(buffer[:filled])

    def _cut(self, piece: Float32[Tensor, "piece d"]) -> tuple[Float32[Tensor, "piece d"], Float32[Tensor, " _piece"]]:
        self._progress.check()
        if not self._spherical:
            return piece, piece.new_empty(0)
        norms = torch.linalg.vector_norm(piece, dim=1)
        return piece.div_(norms.clamp_min(torch.finfo(torch.float32).tiny)[:, None]), norms

    def with_norms(self) -> Iterator[tuple[Float32[Tensor, "piece d"], Float32[Tensor, " _piece"]]]:
        """Centred rows and, where `spherical`, the norms that they had."""
        if self._kept is not None:
            for pair in self._kept:
                self._progress.check()
                yield pair
        else:
            for piece, norms in self._read():
                yield piece.sub_(self.shift), norms
        self.passes += 1

    def weighted(self) -> Iterator[tuple[Float32[Tensor, "piece d"], None]]:
        """Centred rows, each of weight 1."""
        for piece, _ in self.with_norms():
            yield piece, None


@dataclass(frozen=True)
class _Sample:
    """Some rows, each standing for as many as its weight says."""

    rows: Float32[Tensor, "row d"]
    chance: Float64[Tensor, " row"]
    """Of being in a sample of expected size 1."""
    ticket: Float64[Tensor, " row"]
    """The row is in every sample of at least this expected size."""
    size: int
    """Expected rows, were none taken with certainty."""

    @cached_property
    def squares(self) -> Float64[Tensor, " row"]:
        """Squared norms."""
        return torch.cat([_squares(piece) for piece in self.rows.split(_PIECE)])

    def thinned(self, size: int) -> "_Sample":
        """The sample of a smaller expected size that this one contains."""
        if size >= self.size:
            return self
        inside = self.ticket < size
        return _Sample(self.rows[inside], self.chance[inside], self.ticket[inside], size)

    @cached_property
    def weight(self) -> Float32[Tensor, " row"]:
        """Rows that each row stands for."""
        weight: Tensor = (1 / (self.chance * self.size).clamp_max(1)).float()
        return weight

    def weighted(self) -> Iterator[tuple[Float32[Tensor, "piece d"], Float32[Tensor, " _piece"]]]:
        """Rows and their weights."""
        yield from zip(self.rows.split(_PIECE), self.weight.split(_PIECE), strict=True)

    def distances(self, centroids: Float32[Tensor, "code d"]) -> Float32[Tensor, " row"]:
        """Squared distance from each row to the nearest centroid; 0 where float32 cannot tell."""
        return self.near(torch.cat([_nearest(piece, centroids)[0] for piece in self.rows.split(_PIECE)]))

    def near(self, scores: Float32[Tensor, " row"]) -> Float32[Tensor, " row"]:
        """Squared distances of scores."""
        squares = self.squares.float()
        near = squares + 2 * scores
        return torch.where(near > _NOISE * squares, near, 0.0)

    def gains(self, centroids: Float32[Tensor, "code d"], near: Float32[Tensor, " row"]) -> Float32[Tensor, " code"]:
        """What each centroid by itself would take from the inertia, where the rows' distances are `near`."""
        halves = centroids.square().sum(dim=1) / -2
        gains = torch.zeros_like(halves)
        slack = (near - self.squares.float()) / 2
        parts = (part.split(_at_once(len(centroids), gains.device)) for part in (self.rows, self.weight, slack))
        for rows, weight, room in zip(*parts, strict=True):
            gains += weight @ torch.addmm(halves, rows, centroids.T).add_(room[:, None]).relu_()
        return 2 * gains

    def without_each(
        self, centroids: Float32[Tensor, "code d"]
    ) -> tuple[Float32[Tensor, " row"], Float64[Tensor, " code"], Int64[Tensor, " row"], Int64[Tensor, " row"]]:
        """Distance to the nearest centroid; by how much the inertia rises without each; the nearest and the next."""
        halves = centroids.square().sum(dim=1) / 2
        found = [
            torch.addmm(halves, part, centroids.T, alpha=-1).topk(2, dim=1, largest=False)
            for part in self.rows.split(min(_at_once(len(centroids), halves.device), _PIECE))
        ]
        scores, index = torch.cat([part[0] for part in found]), torch.cat([part[1] for part in found])
        near, next_near = self.near(scores[:, 0]), self.near(scores[:, 1])
        loss = torch.zeros(len(centroids), dtype=torch.float64, device=halves.device)
        loss.index_add_(0, index[:, 0], (self.weight * (next_near - near)).double())
        return near, loss, index[:, 0], index[:, 1]

    def total(self) -> float:
        """Weighted sum of the squared norms."""
        return float(self.weight.double() @ self.squares)


def _squares(rows: Float32[Tensor, "row d"]) -> Float64[Tensor, " row"]:
    squares: Tensor = rows.double().square_().sum(dim=1)
    return squares


def _sample_sizes(rows: _Rows, codes: int, kept_bytes: int) -> list[int]:
    """Expected sizes of the samples, rising; twice as many as there are rows means all of them."""
    allowed = kept_bytes // (4 * rows.width)
    sizes = [max(4 * codes, min(max(_ROWS_PER_CODE * codes, _LEAST_SAMPLE), allowed))]
    if rows.count <= 2 * sizes[0]:
        return [2 * rows.count]
    while _GROWTH * sizes[-1] <= min(rows.count // 2, allowed):
        sizes.append(_GROWTH * sizes[-1])
    return sizes


def _draw_sample(rows: _Rows, size: int, generator: np.random.Generator) -> tuple[_Sample, float]:
    """A sample, half of it drawn alike and half by the squared distance to the mean; and the sum of those squares."""
    # Taken at once: many small pieces would scatter over the heap and keep it from being used again. Ten standard
    # deviations more than expected.
    room = min(rows.count, size + 10 * math.isqrt(size) + 10)
    taken = rows.shift.new_empty(room, rows.width)
    chances, tickets = (taken.new_empty(room, dtype=torch.float64) for _ in range(2))
    filled, total = 0, 0.0
    for piece, _ in rows.weighted():
        squares = _squares(piece)
        total += float(squares.sum())
        far = squares / rows.spread if rows.spread > 0 else torch.zeros_like(squares)
        chance = 0.5 / rows.count + 0.5 * far
        ticket = torch.from_numpy(generator.random(len(piece))).to(chance) / chance
        inside = (ticket < size).nonzero()[:, 0]
        here = slice(filled, filled + len(inside))
        taken[here], chances[here], tickets[here] = piece[inside], chance[inside], ticket[inside]
        filled = here.stop
    return _Sample(taken[:filled], chances[:filled], tickets[:filled], size), total


class _Search:
    """Seeds and iterations, on a sample or on all rows."""

    def __init__(
        self, *, codes: int, iterations: int, tolerance: float, generator: np.random.Generator, progress: Progress
    ) -> None:
        self.codes, self.iterations, self.tolerance = codes, iterations, tolerance
        self.generator, self.progress = generator, progress

    def seeds(self, sample: _Sample) -> Float32[Tensor, "code d"]:
        """The first centroids."""
        first = self._draw(sample.weight.double().cumsum(dim=0), 1)
        return self.grown(sample, sample.rows[first])

    def grown(self, sample: _Sample, centroids: Float32[Tensor, "some d"]) -> Float32[Tensor, "code d"]:
        """The centroids and, up to the full number, rows that lie far from them."""
        tries = 2 + int(math.log(self.codes))
        near = sample.distances(centroids)
        while len(centroids) < self.codes:
            self.progress.check()
            chances = (near.double() * sample.weight).cumsum(dim=0)
            if not chances[-1] > 0:
                return torch.cat([centroids, centroids.new_zeros(self.codes - len(centroids), centroids.shape[1])])
            batch = min(self.codes - len(centroids), 1 + len(centroids) // _BATCH_SHARE, _LARGEST_BATCH)
            drawn = self._draw(chances, batch * tries)
            best = sample.gains(sample.rows[drawn], near).view(batch, tries).argmax(dim=1, keepdim=True)
            picked = self._spread(sample, drawn.view(batch, tries).gather(1, best)[:, 0], near)
            near = torch.minimum(near, sample.distances(sample.rows[picked]))
            centroids = torch.cat([centroids, sample.rows[picked]])
        return centroids

    def _draw(self, chances: Float64[Tensor, " row"], number: int) -> Int64[Tensor, " drawn"]:
        """Rows by their chances, given as running sums."""
        points = torch.from_numpy(self.generator.random(number)).to(chances) * chances[-1]
        return torch.searchsorted(chances, points, right=True).clamp_max(len(chances) - 1)

    def _spread(
        self, sample: _Sample, picked: Int64[Tensor, " picked"], near: Float32[Tensor, " row"]
    ) -> Int64[Tensor, " kept"]:
        """Those of the rows that would still be drawn with the ones before them in place."""
        rows = sample.rows[picked]
        between = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square_().cpu().numpy()
        before = near[picked].cpu().numpy()
        now, kept = before.copy(), []
        for place, point in enumerate(self.generator.random(len(picked))):
            if point * before[place] < now[place]:
                kept.append(place)
                now = np.minimum(now, between[place])
        return picked[kept]

    def started(self, sample: _Sample) -> Float32[Tensor, "code d"]:
        """Centroids of the sample: seeds, iterations, and codes moved from where they are of least use."""
        centroids, inertia = self.lloyd(sample, self.seeds(sample), sample, sample.total())
        failed, patience = 0, _FAILED_MOVES + 10 * _FEW_CODES // (self.codes + _FEW_CODES)
        while failed < patience and (moved := self._moved(sample, centroids)) is not None:
            found, less = self.lloyd(sample, moved, sample, sample.total())
            failed = failed + 1 if inertia - less <= self.tolerance * inertia else 0
            if less < inertia:
                centroids, inertia = found, less
        return centroids

    def _moved(self, sample: _Sample, centroids: Float32[Tensor, "code d"]) -> Float32[Tensor, "code d"] | None:
        """Centroids put on rows that gain more by it than the members lose, one in any case; `None` if none gains.

        After Lattanzi & Sohler (2019). Gain and loss are those before any mean has followed, so that the truth may be
        better than they say.
        """
        if len(centroids) < 2:
            return None
        near, losses, owner, heir = sample.without_each(centroids)
        chances = (near.double() * sample.weight).cumsum(dim=0)
        if not chances[-1] > 0:
            return None
        drawn = self._draw(chances, min(len(centroids), _LARGEST_BATCH))
        order = sample.gains(sample.rows[drawn], near).argsort(descending=True, stable=True)
        places = self._spread(sample, drawn[order], near)
        gains = sample.gains(sample.rows[places], near).tolist()
        loss, moves, fixed = losses.tolist(), 0, set[int]()
        moved = centroids.clone()
        for code in losses.argsort(stable=True).tolist():
            if moves == len(gains) or (moves and gains[moves] <= loss[code]):
                break
            if code not in fixed:
                # Those that take over its members stay, or the loss would be a larger one.
                fixed.update(heir[owner == code].unique().tolist())
                moved[code] = sample.rows[places[moves]]
                moves += 1
        return moved if moves else None

    def lloyd(
        self, rows: _Rows | _Sample, centroids: Float32[Tensor, "code d"], sample: _Sample, total: float
    ) -> tuple[Float32[Tensor, "code d"], float]:
        """Means of clusters of the rows, whose squared norms sum to `total`, and their inertia."""
        best, least, step = centroids, math.inf, 1.0
        for number in range(self.iterations):
            sums, weights = _clusters(rows.weighted(), centroids, self.progress)
            inertia = _inertia(sums, weights, total)
            self.progress.advance(inertia=inertia)
            gained = least - inertia
            if gained > 0:
                used = weights > 0
                best, least = (sums / weights.clamp_min(1e-300)[:, None]).float(), inertia
                if not used.all():
                    best[~used] = self.grown(sample, best[used])[int(used.sum()) :]
            if gained <= self.tolerance * inertia and (gained >= 0 or step == 0):
                break
            # Going past the means halves the iterations; the first move, from rows, would go too far by it.
            step = step if gained > 0 else 0.0
            past = used[:, None] if step and number else used.new_zeros(())
            centroids = torch.where(past, torch.lerp(centroids, best, 1 + step), best)
        return best, least


def _clusters(
    rows: Iterable[tuple[Float32[Tensor, "_piece d"], Float32[Tensor, " _piece"] | None]],
    centroids: Float32[Tensor, "code d"],
    progress: Progress,
) -> tuple[Float64[Tensor, "code d"], Float64[Tensor, " code"]]:
    """Weighted sum of each cluster's members, and sum of their weights."""
    sums = torch.zeros_like(centroids, dtype=torch.float64)
    weights = sums.new_zeros(len(sums))
    for piece, weight in rows:
        progress.check()
        index, wide = _nearest(piece, centroids)[1], piece.double()
        mass = wide.new_ones(len(wide)) if weight is None else weight.double()
        sums.index_add_(0, index, wide if weight is None else wide.mul_(mass[:, None]))
        weights.index_add_(0, index, mass)
    return sums, weights


def _inertia(sums: Float64[Tensor, "code d"], weights: Float64[Tensor, " code"], total: float) -> float:
    # Exact to float64 with no work on rows: Σ‖x − c‖² = Σ‖x‖² − Σ‖sum‖² / weight where each c is its members' mean.
    explained = (sums.square().sum(dim=1) / weights.clamp_min(1e-300)).sum()
    return max(total - float(explained), 0.0)


def _at_once(codes: int, device: torch.device) -> int:
    """Rows whose scores against all codes are held at a time."""
    return max(_SCORE_BYTES.get(device.type, _SCORE_BYTES_ELSEWHERE) // (4 * codes), _LEAST_ROWS)


def _nearest(
    rows: Float32[Tensor, "row d"], centroids: Float32[Tensor, "code d"]
) -> tuple[Float32[Tensor, " row"], Int64[Tensor, " row"]]:
    """Half the squared distance to the nearest centroid, less half the row's squared norm; and which that is."""
    halves = centroids.square().sum(dim=1) / 2
    found = [
        torch.addmm(halves, part, centroids.T, alpha=-1).min(dim=1)
        for part in rows.split(_at_once(len(centroids), rows.device))
    ]
    return torch.cat([scores for scores, _ in found]), torch.cat([index for _, index in found])


def _nearest_exactly(
    rows: Float32[Tensor, "row d"], shift: Float32[Tensor, " d"], centroids: Float64[Tensor, "code d"]
) -> Int64[Tensor, " row"]:
    """The centroid nearest to each row less `shift`, as in float64."""
    narrow = centroids.float()
    halves, lengths = centroids.square().sum(dim=1) / 2, torch.linalg.vector_norm(narrow, dim=1)
    # Largest rounding error of a product of d terms, with those of the shift and of the centroids (Higham 2002, §3.1).
    unit = (rows.shape[1] + 8) * torch.finfo(torch.float32).eps / 2
    found = []
    for part in rows.split(_at_once(len(centroids), rows.device)):
        centred = part - shift
        scores = torch.addmm(halves.float(), centred, narrow.T, alpha=-1)
        errors = torch.linalg.vector_norm(centred, dim=1)[:, None] * lengths + lengths.square()
        bound, index = (scores + errors.mul_(unit)).min(dim=1)
        unsure = ((scores.sub_(errors) <= bound[:, None]).sum(dim=1) > 1).nonzero()[:, 0]
        wide = part[unsure].double() - shift.double()
        index[unsure] = torch.addmm(halves, wide, centroids.T, alpha=-1).argmin(dim=1)
        found.append(index)
    return torch.cat(found)


def _finished(rows: _Rows, centroids: Float32[Tensor, "code d"], total: float, *, spherical: bool) -> KMeans:
    """The exact last pass."""
    wide = centroids.double()
    sums, counts = torch.zeros_like(wide), torch.zeros(len(wide), dtype=torch.int64, device=wide.device)
    norm_sums = wide.new_zeros(len(wide))
    none = torch.zeros_like(rows.shift)
    for piece, norms in rows.with_norms():
        index = _nearest_exactly(piece, none, wide)
        sums.index_add_(0, index, piece.double())
        counts += torch.bincount(index, minlength=len(wide))
        if spherical:
            norm_sums.index_add_(0, index, norms.double())
    used, weights = counts > 0, counts.double()
    inertia = _inertia(sums, weights, total)
    wide[used] = sums[used] / weights[used, None]
    wide += rows.shift.double()
    if spherical:
        lengths = torch.where(used, norm_sums / weights.clamp_min(1), norm_sums.sum() / rows.count)
        wide *= (lengths / torch.linalg.vector_norm(wide, dim=1).clamp_min(1e-300))[:, None]
    return KMeans(centroids=wide.float(), counts=counts, inertia=inertia, passes=rows.passes)
