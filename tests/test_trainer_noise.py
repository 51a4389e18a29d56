"""Random numbers of rows: their values, their spread, and that nothing but the row decides them."""

import numpy as np
import pytest
import torch
from clvq.trainer.noise import RowNoise

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
KEYS = [0, 1, -1, 12_345, 2**63 - 1, -(2**63)]
# Variance of a standard Gumbel number, and its mean: Euler's constant.
VARIANCE, MEAN = np.pi**2 / 6, 0.5772156649015329


def _finalised(state: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64, as in its reference implementation in C."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _gumbel(key: int, places: np.ndarray, columns: int, first: int = 0) -> np.ndarray:
    # Column c is number c + 1 of the SplitMix64 generator whose seed is a number of the row.
    seed = _finalised(places.astype(np.uint64) * GOLDEN + np.uint64(key % 2**64))
    number = np.arange(first + 1, first + columns + 1, dtype=np.uint64)
    uniform = ((_finalised(seed[:, None] + number * GOLDEN) >> np.uint64(40)).astype(float) + 0.5) / 2**24
    return -np.log(-np.log(uniform))


def _uniform(gumbel: torch.Tensor) -> np.ndarray:
    return np.exp(-np.exp(-gumbel.double().numpy()))


def test_the_oracle_is_splitmix64() -> None:
    """The first numbers that the reference implementation gives for the seed 1234567."""
    state = np.uint64(1_234_567) + np.arange(1, 4, dtype=np.uint64) * GOLDEN
    assert _finalised(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("key", KEYS)
def test_the_numbers_are_those_of_unsigned_splitmix64(key: int) -> None:
    places = np.array([0, 1, 2, 7, 1_000_003, 2**31, 2**40 + 1])
    found = RowNoise(key, torch.from_numpy(places)).gumbel(6, first=2)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), _gumbel(key, places, 6, first=2), rtol=1e-6, atol=1e-6)


def test_a_row_draws_the_same_numbers_in_any_batch_and_order() -> None:
    whole = RowNoise(5, torch.arange(1000)).gumbel(3)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(RowNoise(5, order).gumbel(3), whole[order])
    for part in order.split(77):
        assert torch.equal(RowNoise(5, part).gumbel(3), whole[part])


def test_a_column_draws_the_same_numbers_beside_any_others() -> None:
    noise = RowNoise(5, torch.arange(100))
    whole = noise.gumbel(8)
    assert torch.equal(noise.gumbel(3, first=4), whole[:, 4:7])
    assert torch.equal(noise.gumbel(1), whole[:, :1])


def test_no_rows_have_no_numbers() -> None:
    assert RowNoise(5, torch.arange(0)).gumbel(3).shape == (0, 3)


@pytest.mark.parametrize("key", KEYS)
def test_the_numbers_are_spread_as_gumbel_s(key: int) -> None:
    count = 200_000
    drawn = RowNoise(key, torch.arange(count)).gumbel(1)
    assert torch.isfinite(drawn).all()
    values = drawn.double().numpy()
    # Five standard errors each; the fourth central moment is 5.4 squared variances.
    assert abs(values.mean() - MEAN) < 5 * np.sqrt(VARIANCE / count)
    assert abs(values.var() - VARIANCE) < 5 * VARIANCE * np.sqrt(4.4 / count)
    shares = np.histogram(_uniform(drawn), bins=100, range=(0, 1))[0] / count
    # χ² with 99 degrees of freedom has mean 99 and standard deviation 14.1.
    assert abs(count * 100 * ((shares - 0.01) ** 2).sum() - 99) < 5 * 14.1


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 1000])
def test_columns_keys_and_places_know_nothing_of_each_other(lag: int) -> None:
    count = 100_000
    places, key = torch.arange(count), 3
    plain = RowNoise(key, places)
    first = plain.gumbel(1)
    others = {
        "column": plain.gumbel(1, first=lag),
        "key": RowNoise(key + lag, places).gumbel(1),
        "place": RowNoise(key, places + lag).gumbel(1),
    }
    for name, other in others.items():
        correlation = np.corrcoef(_uniform(first)[:, 0], _uniform(other)[:, 0])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(count), name
