"""Orders in which concepts are shown, balanced over places and neighbours."""

from itertools import combinations


def williams(count: int) -> list[tuple[int, ...]]:
    """A balanced Latin square (Williams 1949, "Experimental designs balanced for the estimation of residual effects").

    Each number stands in each place equally often, and follows each other number equally often. `count` rows where it
    is even, twice as many where it is odd.
    """
    first = [0]
    low, high = 1, count - 1
    while len(first) < count:
        first.append(low if len(first) % 2 else high)
        low, high = (low + 1, high) if len(first) % 2 == 0 else (low, high - 1)
    rows = [tuple((place + shift) % count for place in first) for shift in range(count)]
    return rows if count % 2 == 0 else rows + [tuple(reversed(row)) for row in rows]


def orders_of(item: int, count: int, *, orders: int) -> list[tuple[int, ...]]:
    """The orders in which item number `item` is shown: each second one is the reverse of the one before it.

    Over items all rows of the square come up equally often, and so does each number in each place.
    """
    square = williams(count)
    shown: list[tuple[int, ...]] = []
    for pair in range((orders + 1) // 2):
        row = square[(item + pair) % len(square)]
        shown += [row, tuple(reversed(row))]
    return shown[:orders]


def pair_orders(count: int) -> list[tuple[int, int]]:
    """Every pair in both orders."""
    return [pair for first, second in combinations(range(count), 2) for pair in ((first, second), (second, first))]
