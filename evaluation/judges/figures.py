"""How methods fare with judges: means by item weight, with intervals over items.

The presentations of an item to one judge are averaged first, so that an item counts once for a judge.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from ..bootstrap import Estimate, draw_counts, interval, ratio
from ..bradley_terry import davidson
from ..study.items import Items, Key, Role
from .outcomes import Outcomes

_FIGURES = ("rating", "win_share", "first_share", "tie_share", "log_strength")


@dataclass(frozen=True)
class Figures:
    """Figures of one method, or differences of them over the same draws."""

    rating: Estimate
    """Mean; NaN for comparisons."""
    win_share: Estimate
    """Wins and half of ties, of all comparisons with other methods; of ratings, within a presentation."""
    first_share: Estimate
    """Share of presentations in which it has the highest rating, or of items in which it has the largest win share;
    of k methods in first place each has 1/k."""
    tie_share: Estimate
    """Of all comparisons with other methods."""
    log_strength: Estimate
    """Davidson's, mean 0 over methods."""


@dataclass(frozen=True)
class MethodFigures:
    """One method, controls alike."""

    method: str
    """Blind id."""
    name: str
    """The blind id where there is no key."""
    role: Role | None
    """`None` without a key."""
    figures: Figures
    over_random: Figures | None
    """Less the random control; `None` without one, and for itself."""


@dataclass(frozen=True)
class Duplicate:
    """A duplicate control beside what it repeats: equal but for noise."""

    method: str
    """Blind id."""
    of: str
    difference: Figures
    """The duplicate less the other."""
    head_to_head: Estimate
    """The duplicate's wins and half of ties, of its comparisons with the other; 0.5 where they fare alike."""


@dataclass(frozen=True)
class FigureTable:
    """All methods, from the largest win share to the least."""

    methods: tuple[MethodFigures, ...]
    duplicates: tuple[Duplicate, ...]


@dataclass(frozen=True)
class Sums:
    """One judge's figures of each item, presentations averaged."""

    rating: Float64[np.ndarray, "item method"]
    """NaN without a valid reply."""
    wins: Float64[np.ndarray, "item method method"]
    """Share of presentations in which the first method beat the second; 0 where they did not meet."""
    ties: Float64[np.ndarray, "item method method"]
    met: Float64[np.ndarray, "item method method"]
    """1 where they met."""
    first: Float64[np.ndarray, "item method"]
    """NaN where there was nothing to be first of."""

    @property
    def win_share(self) -> Float64[np.ndarray, "item method"]:
        """Wins and half of ties among a method's comparisons on an item; NaN without any."""
        return _win_share(self.wins, self.ties, self.met)


def item_sums(outcomes: Outcomes) -> Sums:
    """Average the presentations of each item."""
    valid = ~np.isnan(outcomes.lead)
    times = valid.sum(axis=1).astype(np.float64)
    wins = np.nan_to_num(ratio((outcomes.lead == 1).sum(axis=1).astype(np.float64), times))
    ties = np.nan_to_num(ratio((outcomes.lead == 0).sum(axis=1).astype(np.float64), times))
    rated = ~np.isnan(outcomes.rating)
    rating = ratio(np.nan_to_num(outcomes.rating).sum(axis=1), rated.sum(axis=1).astype(np.float64))
    met = (times > 0).astype(np.float64)
    # Ratings know a first place in each presentation; comparisons only in an item as a whole.
    compared = np.where(valid.any(axis=3), outcomes.rating, np.nan)
    standing = compared if rated.any() else _win_share(wins, ties, met)[:, None]
    leads = np.isclose(standing, np.max(np.nan_to_num(standing, nan=-1.0), axis=2, keepdims=True))
    place = leads / np.maximum(leads.sum(axis=2, keepdims=True), 1)
    times_shown = (~np.isnan(standing)).sum(axis=1).astype(np.float64)
    return Sums(rating=rating, wins=wins, ties=ties, met=met, first=ratio(place.sum(axis=1), times_shown))


@dataclass(frozen=True)
class Drawn:
    """Figures of every resample."""

    values: Float64[np.ndarray, "resample method figure"]
    head_to_head: Float64[np.ndarray, "resample method method"]


def drawn_figures(
    sums: Sums, weights: Float64[np.ndarray, " item"], draws: Float64[np.ndarray, "resample item"]
) -> Drawn:
    """The figures of items that are counted as often as they were drawn."""
    count = sums.wins.shape[1]
    often = draws * weights

    def total(values: Float64[np.ndarray, "item method method"]) -> Float64[np.ndarray, "resample method method"]:
        flat: Float64[np.ndarray, "resample pair"] = often @ values.reshape(len(weights), count * count)
        return flat.reshape(len(draws), count, count)

    wins, ties, met = total(sums.wins), total(sums.ties), total(sums.met)
    columns = [
        _mean(sums.rating, often),
        _win_share(wins, ties, met),
        _mean(sums.first, often),
        ratio(ties.sum(axis=2), met.sum(axis=2)),
        davidson(wins, ties).log_strength,
    ]
    return Drawn(values=np.stack(columns, axis=2), head_to_head=ratio(wins + ties / 2, met))


def figure_tables(
    items: Items, judges: list[Sums], *, key: Key | None, seed: int, resamples: int
) -> tuple[list[FigureTable], FigureTable]:
    """The figures of each judge, and their means over judges over the same draws of items.

    Each judge weighs the same in a mean; one without a value for a figure takes no part in it.
    """
    weights = np.array([item.weight for item in items.of_kind("main")])
    observed = [drawn_figures(sums, weights, np.ones((1, len(weights)))) for sums in judges]
    parts: list[list[Drawn]] = [[] for _ in judges]
    for draws in draw_counts(len(weights), seed=seed, resamples=resamples, width=8 * len(items.methods) ** 2):
        for mine, sums in zip(parts, judges, strict=True):
            mine.append(drawn_figures(sums, weights, draws))
    again = [
        Drawn(
            np.concatenate([part.values for part in mine]),
            np.concatenate([part.head_to_head for part in mine]),
        )
        for mine in parts
    ]
    tables = [_table(items, key, one, drawn) for one, drawn in zip(observed, again, strict=True)]
    return tables, _table(items, key, _pooled(observed), _pooled(again))


def _pooled(judges: list[Drawn]) -> Drawn:
    return Drawn(
        values=mean_known(np.stack([one.values for one in judges])),
        head_to_head=mean_known(np.stack([one.head_to_head for one in judges])),
    )


def mean_known(values: Float64[np.ndarray, "judge *shape"]) -> Float64[np.ndarray, "*shape"]:
    """The mean over judges that have a value; NaN without any."""
    return ratio(np.nan_to_num(values).sum(axis=0), (~np.isnan(values)).sum(axis=0).astype(np.float64))


def _table(items: Items, key: Key | None, observed: Drawn, again: Drawn) -> FigureTable:
    value = observed.values[0]
    random = [place for place, name in enumerate(items.methods) if key and key.methods[name].role == "random"]

    def figures(place: int, less: int | None = None) -> Figures:
        at, drawn = value[place], again.values[:, place]
        if less is not None:
            at, drawn = at - value[less], drawn - again.values[:, less]
        found = [interval(float(one), column) for one, column in zip(at, drawn.T, strict=True)]
        return Figures(**dict(zip(_FIGURES, found, strict=True)))

    share = np.nan_to_num(value[:, _FIGURES.index("win_share")], nan=-1.0)
    methods = tuple(
        MethodFigures(
            method=items.methods[place],
            name=key.methods[items.methods[place]].name if key else items.methods[place],
            role=key.methods[items.methods[place]].role if key else None,
            figures=figures(place),
            over_random=figures(place, random[0]) if random and place != random[0] else None,
        )
        for place in np.argsort(-share, kind="stable").tolist()
    )
    duplicates = []
    for place, name in enumerate(items.methods):
        of = key.methods[name].of if key else None
        if of is not None:
            other = items.methods.index(of)
            head = interval(float(observed.head_to_head[0, place, other]), again.head_to_head[:, place, other])
            duplicates.append(Duplicate(name, of, figures(place, other), head))
    return FigureTable(methods=methods, duplicates=tuple(duplicates))


def _win_share(
    wins: Float64[np.ndarray, "item method method"],
    ties: Float64[np.ndarray, "item method method"],
    met: Float64[np.ndarray, "item method method"],
) -> Float64[np.ndarray, "item method"]:
    return ratio((wins + ties / 2).sum(axis=2), met.sum(axis=2))


def _mean(
    values: Float64[np.ndarray, "item method"], often: Float64[np.ndarray, "resample item"]
) -> Float64[np.ndarray, "resample method"]:
    return ratio(often @ np.nan_to_num(values), often @ (~np.isnan(values)).astype(np.float64))
