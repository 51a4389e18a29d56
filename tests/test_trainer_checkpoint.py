"""Tensors as the bytes of a file, made without holding them twice."""

import safetensors.torch
import torch
from clvq.trainer.checkpoint import packed
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

_DTYPES = [torch.float32, torch.float64, torch.int64]


@st.composite
def _tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(st.lists(st.text("abcdé._", min_size=1), unique=True, max_size=5))
    tensors = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
        tensors[name] = (9 * values).to(draw(st.sampled_from(_DTYPES)))
        if draw(st.booleans()) and len(shape) > 1:
            tensors[name] = tensors[name].transpose(0, 1)
    return tensors


@given(_tensors(), st.sampled_from([None, {"state": '{"é": 1}'}]))
def test_the_bytes_are_those_of_the_safetensors_library(
    tensors: dict[str, Tensor], metadata: dict[str, str] | None
) -> None:
    data = b"".join(bytes(part) for part in packed(tensors, metadata=metadata))
    read = safetensors.torch.load(data)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert data == safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def test_no_more_than_one_tensor_is_held_beside_the_originals() -> None:
    tensors = {name: torch.randn(100, 100) for name in "abc"}
    for part, name in zip(list(packed(tensors))[1:], "abc", strict=True):
        assert memoryview(part).nbytes == tensors[name].nbytes
        # The very memory of the tensor, no copy.
        tensors[name][0, 0] = 7
        assert memoryview(part).cast("f")[0] == 7
