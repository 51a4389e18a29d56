"""Memory for batches that is used again once nobody refers to it.

A fresh array of some megabytes costs as much as filling it: the system clears its pages first.
"""

import math
from collections import deque
from contextlib import suppress
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8


class Recycler:
    """Gives arrays whose memory comes back by itself when the last array or tensor that looks at it is gone.

    Parameters
    ----------
    keep
        Free blocks of memory that are kept.
    """

    def __init__(self, *, keep: int) -> None:
        self._free: deque[UInt8[np.ndarray, " _byte"]] = deque(maxlen=keep)

    def empty(self, *shape: int) -> Float32[np.ndarray, "..."]:
        """An array of the shape, with any contents."""
        size = 4 * math.prod(shape)
        block = np.empty(0, dtype=np.uint8)
        # The one that came back last may still lie in the processor's cache.
        with suppress(IndexError):
            block = self._free.pop()
        if len(block) < size:
            block = np.empty(size, dtype=np.uint8)
        whole = np.asarray(_Lent(block, self._free))
        return whole[:size].view(np.float32).reshape(shape)


class _Lent:
    """Between a block and all that looks at it: numpy follows the owners of a view up to the first that is no array."""

    # Of any: whoever checks types at run time would look at an item that another thread takes just then.
    def __init__(self, block: UInt8[np.ndarray, " _byte"], free: deque[Any]) -> None:
        self.__array_interface__ = block.__array_interface__
        self._block = block
        self._free = free

    def __del__(self) -> None:
        self._free.append(self._block)
