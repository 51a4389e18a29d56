"""From rows as they are stored to float32, in as few passes over memory as there can be."""

import numpy as np
from jaxtyping import Float32, Int64, Shaped

from .layout import Encoding

# Rows of so many bytes are gathered, then widened: few enough to stay in the processor's cache in between.
_BLOCK_BYTES = 512 << 10


class Widening:
    """Exact float32 values of the stored rows of one site.

    Parameters
    ----------
    encoding
        How the site is stored.
    channel_scale
        For int8: one factor per channel.
    """

    def __init__(self, encoding: Encoding, channel_scale: Float32[np.ndarray, " d"] | None) -> None:
        self._encoding = encoding
        self._channel_scale = channel_scale

    def into(
        self,
        stored: Shaped[np.ndarray, "row d"],
        row_scale: Float32[np.ndarray, " row"] | None,
        out: Float32[np.ndarray, "row d"],
    ) -> None:
        """Write the values of the rows, which have one scale each where they are int8, into `out`."""
        if self._encoding == "bf16":
            np.left_shift(stored, 16, out=out.view(np.uint32), dtype=np.uint32)
            return
        np.copyto(out, stored)
        if row_scale is not None and self._channel_scale is not None:
            # In this order: float32 products depend on it.
            out *= row_scale[:, None]
            out *= self._channel_scale

    def gather(
        self,
        stored: Shaped[np.ndarray, "pool d"],
        row_scale: Float32[np.ndarray, " pool"] | None,
        index: Int64[np.ndarray, " row"],
        out: Float32[np.ndarray, "row d"],
    ) -> None:
        """Write the values of `stored[index]`, no index being out of range, into `out`."""
        if self._encoding == "fp32":
            np.take(stored, index, axis=0, out=out, mode="clip")
            return
        size = max(1, _BLOCK_BYTES // stored[0].nbytes)
        block = np.empty((min(size, len(index)), stored.shape[1]), dtype=stored.dtype)
        for start in range(0, len(index), size):
            part = index[start : start + size]
            rows = block[: len(part)]
            # With `raise`, the default, numpy gathers into memory of its own first.
            np.take(stored, part, axis=0, out=rows, mode="clip")
            scale = None if row_scale is None else row_scale[part]
            self.into(rows, scale, out[start : start + size])
