"""Which of torch's attention kernels are used where gradients are taken."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Leave cuDNN's attention out; torch takes another kernel of its own.

    With a mask and a length of 64, 192, 320, … its backward pass in bfloat16 or float16 can give gradients that are not
    numbers, while all that goes forward looks well (pytorch/pytorch#196678). Which kernel goes backward is decided on
    the way forward.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
