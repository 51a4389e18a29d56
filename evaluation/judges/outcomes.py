"""One judge's replies to main items as arrays, once it is known that they fit the item file."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from jaxtyping import Float64

from ...errors import DataError
from ..study.items import Items
from .ratings import Comparison, Rating

LOWEST, HIGHEST = 1, 5
Replies = Sequence[Rating] | Sequence[Comparison]


@dataclass(frozen=True)
class Outcomes:
    """Replies of one judge. Items are the main ones of the item file, methods its methods, both in its order."""

    rating: Float64[np.ndarray, "item presentation method"]
    """NaN without a valid reply, and throughout for comparisons; so are the next two."""
    position: Float64[np.ndarray, "item presentation method"]
    length: Float64[np.ndarray, "item presentation method"]
    lead: Float64[np.ndarray, "item presentation method method"]
    """1 where the first method won against the second, -1 where it lost, 0 for a tie; NaN where they did not meet."""
    earlier: Float64[np.ndarray, "item presentation method method"]
    """1 where the first method was shown before the second, -1 after it, 0 where they did not meet."""
    longer: Float64[np.ndarray, "item presentation method method"]
    """1 where the first method's concept was the longer, -1 the shorter, else 0."""


def are_ratings(replies: Replies) -> TypeGuard[Sequence[Rating]]:
    """Whether replies are ratings, not comparisons."""
    return all(isinstance(reply, Rating) for reply in replies)


def check_replies(items: Items, replies: Replies) -> None:
    """See to it that replies belong to the item file, and are all ratings or all comparisons.

    Raises
    ------
    DataError
        For an unknown item or method, a rating out of range, a concept that is compared with itself, two replies to
        one question, ratings mixed with comparisons, or none at all.
    """
    if not replies:
        raise DataError("there are no replies of judges: ask at least one judge")
    if len({type(reply) for reply in replies}) > 1:
        raise DataError("ratings and comparisons cannot be analysed together: give the replies of one protocol")
    known = {item.id for item in items.items}
    seen: set[tuple[object, ...]] = set()
    for reply in replies:
        what = f"judge {reply.judge}'s reply to item {reply.item}"
        methods = (reply.method,) if isinstance(reply, Rating) else (reply.first, reply.second)
        if reply.item not in known:
            raise DataError(f"{what}: the item file has no such item; give the item file that the judges were asked")
        for method in methods:
            if method not in items.methods:
                raise DataError(f"{what}: no method {method!r}, only {', '.join(items.methods)}")
        if len(methods) == 2 and methods[0] == methods[1]:
            raise DataError(f"{what} compares method {methods[0]} with itself: a comparison is of two methods")
        if isinstance(reply, Rating) and reply.rating is not None and not LOWEST <= reply.rating <= HIGHEST:
            raise DataError(f"{what} rates method {reply.method} {reply.rating:g}, not from {LOWEST} to {HIGHEST}")
        question = (reply.judge, reply.item, reply.presentation, frozenset(methods))
        if question in seen:
            raise DataError(
                f"{what}, presentation {reply.presentation}, stands there twice for {' and '.join(methods)}: "
                "keep one of the two"
            )
        seen.add(question)


def outcomes(items: Items, replies: Replies, judge: str) -> Outcomes:
    """The replies of a judge to main items, which `check_replies` has passed."""
    place = {item.id: number for number, item in enumerate(items.of_kind("main"))}
    column = {method: number for number, method in enumerate(items.methods)}
    if are_ratings(replies):
        return _of_ratings([one for one in replies if one.judge == judge and one.item in place], place, column)
    made = [one for one in replies if isinstance(one, Comparison) and one.judge == judge and one.item in place]
    return _of_comparisons(made, place, column)


def _of_ratings(ratings: list[Rating], place: dict[str, int], column: dict[str, int]) -> Outcomes:
    shape = (len(place), 1 + max((one.presentation for one in ratings), default=0), len(column))
    rating, position, length = (np.full(shape, np.nan) for _ in range(3))
    for one in ratings:
        at = (place[one.item], one.presentation, column[one.method])
        rating[at] = np.nan if one.rating is None else one.rating
        position[at], length[at] = one.position, one.length
    lead = np.sign(rating[..., :, None] - rating[..., None, :])
    diagonal = np.arange(len(column))
    lead[..., diagonal, diagonal] = np.nan
    return Outcomes(
        rating=rating,
        position=position,
        length=length,
        lead=lead,
        earlier=np.nan_to_num(np.sign(position[..., None, :] - position[..., :, None])),
        longer=np.nan_to_num(np.sign(length[..., :, None] - length[..., None, :])),
    )


def _of_comparisons(comparisons: list[Comparison], place: dict[str, int], column: dict[str, int]) -> Outcomes:
    shape = (len(place), 1 + max((one.presentation for one in comparisons), default=0), len(column))
    lead = np.full((*shape, len(column)), np.nan)
    earlier, longer = np.zeros_like(lead), np.zeros_like(lead)
    for one in comparisons:
        first, second = column[one.first], column[one.second]
        at = (place[one.item], one.presentation)
        for a, b, sign in ((first, second, 1.0), (second, first, -1.0)):
            earlier[(*at, a, b)] = sign
            longer[(*at, a, b)] = sign * np.sign(one.first_length - one.second_length)
            if one.winner is not None:
                lead[(*at, a, b)] = sign * {"first": 1.0, "second": -1.0, "tie": 0.0}[one.winner]
    nothing = np.full(shape, np.nan)
    return Outcomes(nothing, nothing, nothing, lead, earlier, longer)


@dataclass(frozen=True)
class Attention:
    """How often a judge did what an attention item asks."""

    seen: int
    """Presentations; of comparisons those with the method that was to be chosen."""
    passed: int
    """That method was rated above all others, or chosen."""


def attention(items: Items, replies: Replies, judge: str) -> Attention:
    """What a judge made of the attention items."""
    best = {item.id: item.best for item in items.of_kind("attention")}
    passed: list[bool] = []
    if are_ratings(replies):
        shown: dict[tuple[str, int], dict[str, float]] = {}
        for one in replies:
            if one.judge == judge and one.item in best:
                given = -np.inf if one.rating is None else one.rating
                shown.setdefault((one.item, one.presentation), {})[one.method] = given
        for (item, _), given_to in shown.items():
            mine = given_to.pop(best[item] or "", -np.inf)
            passed.append(mine > max(given_to.values(), default=-np.inf))
    else:
        for reply in replies:
            if isinstance(reply, Comparison) and reply.judge == judge and reply.item in best:
                pair = {"first": reply.first, "second": reply.second}
                if best[reply.item] in pair.values():
                    passed.append(pair.get(reply.winner or "") == best[reply.item])
    return Attention(seen=len(passed), passed=sum(passed))
