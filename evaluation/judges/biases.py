"""What a judge goes by besides the concepts: the place in which one is shown, and its length.

Items are not weighted here: a bias is the judge's, whatever the texts. Intervals are over items.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.stats import rankdata  # type: ignore[import-untyped]

from ..bootstrap import Estimate
from ..intervals import share_estimates
from ..study.items import Items
from .outcomes import Outcomes, Replies, are_ratings
from .ratings import Comparison, Rating


@dataclass(frozen=True)
class Biases:
    """Biases of one judge."""

    positions: tuple[Estimate, ...]
    """Mean rating in each place less the mean of its presentation: 0 without a bias, where methods take all places
    equally often. Empty for comparisons."""
    first_wins: Estimate
    """Of decided comparisons, the share that was won by the concept shown earlier; 0.5 without a bias. Of ratings,
    within a presentation."""
    flips: Estimate
    """Of two presentations of the same two concepts, both decided, the share that the other one won."""
    longer_wins: Estimate
    """Of decided comparisons of unlike length, the share that the longer concept won."""
    length_correlation: Estimate
    """Spearman's ρ of length and rating within a presentation, averaged. A method that is better and longer raises it
    and `longer_wins`. NaN for comparisons; so is the next."""
    length_slope: Estimate
    """Rating points per 100 characters within a presentation, methods' mean ratings and lengths taken out: what length
    does to one method's concepts. Of presentations with all ratings valid."""


def biases(outcomes: Outcomes, *, seed: int) -> Biases:
    """Measure the biases of a judge."""
    decided = np.abs(np.nan_to_num(outcomes.lead)) == 1
    shares = []
    for other in (outcomes.earlier, outcomes.longer):
        counted = decided & (other != 0)
        shares.append(((counted & (outcomes.lead == other)).sum(axis=(1, 2, 3)), counted.sum(axis=(1, 2, 3))))
    won, times = (outcomes.lead == 1).sum(axis=1), decided.sum(axis=1)
    shares.append(((won * (times - won)).sum(axis=(1, 2)), (times * (times - 1) / 2).sum(axis=(1, 2))))
    shares.append(_correlations(outcomes))
    shares.append(_slopes(outcomes))
    columns = [np.stack([pair[side] for pair in shares], axis=1).astype(np.float64) for side in (0, 1)]
    first_wins, longer_wins, flips, correlation, slope = share_estimates(columns[0], columns[1], seed=seed)
    return Biases(
        positions=_positions(outcomes, seed=seed),
        first_wins=first_wins,
        flips=flips,
        longer_wins=longer_wins,
        length_correlation=correlation,
        length_slope=slope,
    )


def _centred(values: Float64[np.ndarray, "*shape method"]) -> Float64[np.ndarray, "*shape method"]:
    """Less the mean of the presentation."""
    known = np.maximum((~np.isnan(values)).sum(axis=-1, keepdims=True), 1)
    centred: Float64[np.ndarray, "*shape method"] = values - np.nansum(values, axis=-1, keepdims=True) / known
    return centred


def _positions(outcomes: Outcomes, *, seed: int) -> tuple[Estimate, ...]:
    places = np.unique(outcomes.position[~np.isnan(outcomes.position)])
    if len(places) == 0:
        return ()
    apart = _centred(outcomes.rating)
    here = (outcomes.position[..., None] == places) & ~np.isnan(apart)[..., None]
    parts = np.where(here, np.nan_to_num(apart)[..., None], 0.0).sum(axis=(1, 2))
    return tuple(share_estimates(parts, here.sum(axis=(1, 2)).astype(np.float64), seed=seed))


_Parts = tuple[Float64[np.ndarray, " item"], Float64[np.ndarray, " item"]]


def _correlations(outcomes: Outcomes) -> _Parts:
    """Sum and number of the correlations of each item."""
    parts, wholes = np.zeros(len(outcomes.rating)), np.zeros(len(outcomes.rating))
    for item, presentation in np.argwhere((~np.isnan(outcomes.rating)).sum(axis=2) >= 2).tolist():
        rating, length = outcomes.rating[item, presentation], outcomes.length[item, presentation]
        known = ~np.isnan(rating)
        ranks = rankdata(np.stack([rating[known], length[known]]), axis=1)
        ranks -= ranks.mean(axis=1, keepdims=True)
        spread = np.sqrt(np.square(ranks).sum(axis=1)).prod()
        if spread > 0:
            parts[item] += (ranks[0] * ranks[1]).sum() / spread
            wholes[item] += 1
    return parts, wholes


def _slopes(outcomes: Outcomes) -> _Parts:
    """Sums of products and of squares of each item, per 100 characters."""
    full = ~np.isnan(outcomes.rating).any(axis=2)
    parts, wholes = np.zeros(len(full)), np.zeros(len(full))
    if full.any():
        rating, length = _centred(outcomes.rating[full]), _centred(outcomes.length[full]) / 100
        rating, length = rating - rating.mean(axis=0), length - length.mean(axis=0)
        owner = np.nonzero(full)[0]
        np.add.at(parts, owner, (rating * length).sum(axis=1))
        np.add.at(wholes, owner, np.square(length).sum(axis=1))
    return parts, wholes


@dataclass(frozen=True)
class Invalid:
    """Shares of replies to main items without a valid answer; NaN without replies."""

    replies: int
    """Ratings or comparisons that were asked for."""
    share: float
    by_method: dict[str, float]
    """By blind id; of comparisons those in which the method takes part."""
    by_position: tuple[float, ...]
    """Empty for comparisons."""


def invalid(items: Items, replies: Replies, judge: str) -> Invalid:
    """How many of a judge's replies are no valid answer, and to what."""
    main = {item.id for item in items.of_kind("main")}
    mine = [one for one in replies if one.judge == judge and one.item in main]
    missing = [one.rating is None if isinstance(one, Rating) else one.winner is None for one in mine]
    by_method = {
        method: _share([lost for one, lost in zip(mine, missing, strict=True) if method in _methods(one)])
        for method in items.methods
    }
    places = [one.position for one in mine if isinstance(one, Rating)] if are_ratings(replies) else []
    by_position = tuple(
        _share([lost for at, lost in zip(places, missing, strict=True) if at == place])
        for place in range(max(places, default=-1) + 1)
    )
    return Invalid(replies=len(mine), share=_share(missing), by_method=by_method, by_position=by_position)


def _methods(reply: Rating | Comparison) -> tuple[str, ...]:
    return (reply.method,) if isinstance(reply, Rating) else (reply.first, reply.second)


def _share(values: Sequence[bool]) -> float:
    return float(np.mean(values)) if values else float("nan")
