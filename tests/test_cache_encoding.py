"""Values to bits and shard files, and back."""

import io
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from clvq.cache.encoding import ArrayLayout, from_bits, to_bits, write_shard
from clvq.cache.layout import Encoding
from clvq.errors import DataError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numcodecs import blosc

# Float32 bits of both zeros, subnormals, ties to even and to odd, and the largest value that bf16 can round to.
AWKWARD = [0, 1 << 31, 1, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x7FFFFF, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7F7FFF]
BF16_OVERFLOW = 0x7F7F8000


def floats(bits: list[int]) -> np.ndarray:
    return np.array(bits, dtype=np.uint32).view(np.float32)[None]


def below(limit: int) -> st.SearchStrategy[list[int]]:
    """Bits of float32 values of either sign whose magnitude's bits are below `limit`."""
    one = st.builds(lambda sign, bits: sign << 31 | bits, st.integers(0, 1), st.integers(0, limit - 1))
    return st.lists(one, min_size=1, max_size=50)


@settings(deadline=None)
@given(below(BF16_OVERFLOW))
@example(AWKWARD)
def test_bf16_rounds_as_torch_does(bits: list[int]) -> None:
    values = floats(bits)
    oracle = torch.from_numpy(values.copy()).to(torch.bfloat16)
    stored = to_bits(values, "bf16", site="hidden.1")
    assert stored.dtype == np.uint16
    assert np.array_equal(stored.view(np.int16), oracle.view(torch.int16).numpy())
    assert np.array_equal(from_bits(stored, "bf16").view(np.uint32), oracle.float().numpy().view(np.uint32))


@settings(deadline=None)
@given(below(int(np.float32(65520.0).view(np.uint32))))
@example([0x33000000, 0x33000001, 0x33800000, 0x387FC000, 0x387FE000, 0x477FE000, 0x477FEFFF])
def test_fp16_rounds_as_torch_does(bits: list[int]) -> None:
    values = floats(bits)
    oracle = torch.from_numpy(values.copy()).to(torch.float16)
    stored = to_bits(values, "fp16", site="hidden.1")
    assert np.array_equal(stored.view(np.int16), oracle.view(torch.int16).numpy())
    assert np.array_equal(from_bits(stored, "fp16").view(np.uint32), oracle.float().numpy().view(np.uint32))


@settings(deadline=None)
@given(below(0x7F800000))
@example(AWKWARD)
def test_fp32_keeps_every_bit(bits: list[int]) -> None:
    values = floats(bits)
    assert np.array_equal(from_bits(to_bits(values, "fp32", site="s"), "fp32").view(np.uint32), values.view(np.uint32))


def test_no_rows_are_encoded_to_no_rows() -> None:
    assert to_bits(np.zeros((0, 3), np.float32), "bf16", site="s").shape == (0, 3)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_that_fp16_cannot_hold_is_refused(sign: int) -> None:
    values = np.array([[1.0, sign * 65520.0]], dtype=np.float32)
    with pytest.raises(DataError) as caught:
        to_bits(values, "fp16", site="hidden.8")
    assert str(caught.value) == (
        "hidden.8 has a value of magnitude 65520, and fp16 holds at most 65,504: use --encoding bf16 or fp32"
    )
    assert np.isfinite(to_bits(np.nextafter(values, 0, dtype=np.float32), "fp16", site="hidden.8")).all()


@pytest.mark.parametrize("sign", [0, 1 << 31])
def test_a_value_that_bf16_would_round_to_infinity_is_refused(sign: int) -> None:
    with pytest.raises(DataError) as caught:
        to_bits(floats([sign | BF16_OVERFLOW]), "bf16", site="hidden.8")
    assert str(caught.value) == (
        "hidden.8 has a value of magnitude 3.39618e+38, and bf16 holds at most 3.38953e+38: use --encoding fp32"
    )
    assert np.isfinite(from_bits(to_bits(floats([sign | BF16_OVERFLOW - 1]), "bf16", site="s"), "bf16")).all()


@pytest.mark.parametrize("encoding", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(encoding: Encoding, value: float) -> None:
    with pytest.raises(DataError, match=r"^s has a value that is not finite: the model itself overflowed; try"):
        to_bits(np.array([[0.0, value, 1.0]], dtype=np.float32), encoding, site="s")


def layout_of(dtype: str, shard: int, chunk: int, rest: tuple[int, ...], *, fill: int = 0) -> ArrayLayout:
    dimensions = ("row", "d")[: 1 + len(rest)]
    return ArrayLayout(dtype, (shard * 2, *rest), shard, chunk, fill, dimensions, {})


def written(values: np.ndarray, layout: ArrayLayout) -> bytes:
    sink = io.BytesIO()
    write_shard(sink, values, layout)
    return sink.getvalue()


@pytest.fixture
def many_threads() -> Iterator[None]:
    before = blosc.set_nthreads(8)
    yield
    blosc.set_nthreads(before)


@pytest.mark.usefixtures("many_threads")
def test_large_chunks_have_the_same_bytes_however_many_threads_compress() -> None:
    # More than one Blosc block of 1 MiB in a chunk would be written in the order in which threads finish.
    layout = layout_of("int32", 4_000_000, 4_000_000, ())
    values = np.random.default_rng(0).integers(0, 1 << 20, layout.shard).astype(np.int32)
    several = {written(values, layout) for _ in range(5)}
    alone: list[bytes] = []
    thread = threading.Thread(target=lambda: alone.append(written(values, layout)))
    thread.start()
    thread.join()
    blosc.set_nthreads(1)
    assert several == {alone[0]} == {written(values, layout)}
    nbytes, block = np.frombuffer(alone[0][4:12], dtype="<u4")
    assert block == nbytes == layout.chunk_bytes


@pytest.mark.parametrize("encoding", ["bf16", "fp16", "fp32"])
def test_rounding_does_not_depend_on_how_values_lie_in_memory(encoding: Encoding) -> None:
    values = np.random.default_rng(0).normal(size=(200, 12)).astype(np.float32)
    plain = to_bits(values, encoding, site="s")
    spread = np.zeros((400, 36), dtype=np.float32)
    spread[::2, ::3] = values
    for other in (np.asfortranarray(values), spread[::2, ::3]):
        assert np.array_equal(to_bits(other, encoding, site="s"), plain)
    for start in range(0, 200, 7):
        assert np.array_equal(to_bits(values[start : start + 7], encoding, site="s"), plain[start : start + 7])
