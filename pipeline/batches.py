"""Batches of texts of about equal length, under a budget of token slots."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64


def batches(lengths: Int64[np.ndarray, " text"], *, slots: int) -> Iterator[Int64[np.ndarray, " batch"]]:
    """Numbers of texts, longest first, in batches of at most `slots` places of which at least 90 % are real tokens."""
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    start, real = 0, 0
    for end, number in enumerate(order.tolist()):
        places = int(lengths[order[start]]) * (end - start + 1)
        if end > start and (places > slots or real + lengths[number] < 0.9 * places):
            yield order[start:end]
            start, real = end, 0
        real += int(lengths[number])
    if start < len(order):
        yield order[start:]
