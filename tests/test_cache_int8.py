"""int8: how far values move, what is refused, and who fixes the channel scales."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zarr
from clvq import Cache
from clvq.cache.encoding import SCALE_ROWS, channel_scale, dequantise, quantise, scale_texts
from clvq.cache.statistics import EncodingLoss
from clvq.cache.verify import verify
from clvq.cache.writer import CacheWriter
from clvq.errors import CacheCorrupt, ConfigError, DataError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .cache_maker import Known, contents, known, without_waiting

no_waiting = pytest.fixture(without_waiting, scope="module", autouse=True)

SMALLEST, LARGEST = 2.0**-149, np.finfo(np.float32).max
# Whatever their ratio, float32 holds it.
FLOATS = st.floats(width=32, min_value=-(2.0**60), max_value=2.0**60)
SCALES = st.floats(width=32, min_value=2.0**-60, max_value=2.0**60)


def arrays(draw: st.DrawFn, elements: st.SearchStrategy[float], *shape: int) -> np.ndarray:
    size = int(np.prod(shape))
    values = draw(st.lists(elements, min_size=size, max_size=size))
    return np.array(values, dtype=np.float32).reshape(shape)


@st.composite
def rows_and_scale(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    rows, width = draw(st.integers(1, 70)), draw(st.integers(1, 4))
    return arrays(draw, FLOATS, rows, width), arrays(draw, SCALES, width)


def both_ways(values: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stored values, row scales, and what is read back, in float64."""
    stored, rows = quantise(values, scale, site="s")
    return stored, rows.astype(np.float64)[:, None], dequantise(stored, rows, scale).astype(np.float64)


def bound(rows: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Half a step; four roundings of float32; and what float32 cannot tell apart near zero."""
    half, rounding = 0.5, 127 * 4 * 2.0**-24
    return rows * scale * (half + rounding) + 130 * SMALLEST * np.maximum(scale, 1)


@settings(deadline=None)
@given(rows_and_scale())
@example((np.array([[SMALLEST, 100 * SMALLEST]], np.float32), np.array([1, 1], np.float32)))
@example((np.array([[190 * SMALLEST, 0]], np.float32), np.array([1, 1], np.float32)))
@example((np.array([[1e-30, 2.0**60], [SMALLEST, 1]], np.float32), np.array([2.0**60, 2.0**-60], np.float32)))
def test_a_value_moves_by_half_a_step_at_most(case: tuple[np.ndarray, np.ndarray]) -> None:
    values, scale = case
    stored, rows, back = both_ways(values, scale)
    assert stored.dtype == np.int8
    assert (stored >= -127).all()
    assert (np.abs(back - values.astype(np.float64)) <= bound(rows, scale.astype(np.float64))).all()


@settings(deadline=None)
@given(rows_and_scale())
def test_the_largest_ratio_of_a_row_is_stored_as_127_and_no_step_is_wasted(case: tuple[np.ndarray, np.ndarray]) -> None:
    values, scale = case
    stored, rows, _ = both_ways(values, scale)
    largest = np.abs(values.astype(np.float64) / scale).max(1)
    normal = largest > 127 * 2.0**-126
    assert (np.abs(stored.astype(int)).max(1)[normal] == 127).all()
    assert np.allclose(rows[normal, 0], largest[normal] / 127, rtol=1e-6)


def test_the_sign_of_a_row_changes_nothing_but_signs() -> None:
    values = np.random.default_rng(0).normal(size=(200, 9)).astype(np.float32)
    stored, rows = quantise(values, np.ones(9, np.float32), site="s")
    mirrored, same = quantise(-values, np.ones(9, np.float32), site="s")
    assert np.array_equal(stored, -mirrored)
    assert np.array_equal(rows, same)


def test_rows_of_zeros_and_of_values_that_vanish_beside_the_scale_are_zeros() -> None:
    values = np.array([[0, 0], [-0.0, 0], [1e-30, -1e-30], [0, 1]], dtype=np.float32)
    stored, rows, back = both_ways(values, np.array([1e30, 1e30], dtype=np.float32))
    assert (stored[:3] == 0).all()
    assert (rows[:3] == 0).all()
    assert (back[:3] == 0).all()
    # Neither scale nor value is a negative zero: it would not be one on every machine.
    assert not np.signbit(rows).any()
    assert not np.signbit(back[:3]).any()
    assert back[3, 1] == pytest.approx(1)


def hidden_states(rows: int, width: int) -> np.ndarray:
    """Rows as of a language model: massive activations in two channels and in few rows, other channels unlike."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(rows, width)) * np.exp(generator.normal(0, 0.7, width)) + generator.normal(
        size=width
    )
    values[:, 3] = 300 + 40 * values[:, 3]
    values[::97, 5] = 27_000
    return values.astype(np.float32)


def test_an_outlier_channel_takes_nothing_from_the_others() -> None:
    values = hidden_states(2000, 96)
    scale = channel_scale(values)
    loss = EncodingLoss.of(values, dequantise(*quantise(values, scale, site="s"), scale))
    assert loss.median_row <= 0.01
    # One scale for all channels, as a control: most values become zero.
    flat = np.ones(96, dtype=np.float32)
    control = EncodingLoss.of(values, dequantise(*quantise(values, flat, site="s"), flat))
    assert control.lost_share > 0.4 > 10 * loss.lost_share
    others = np.delete(np.arange(96), [3, 5])
    ordinary = np.delete(np.arange(2000), np.arange(0, 2000, 97))
    part = np.ix_(ordinary, others)
    back = dequantise(*quantise(values, scale, site="s"), scale)
    assert np.linalg.norm(back[part] - values[part]) / np.linalg.norm(values[part]) < 0.02


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 99))
def test_a_channels_scale_is_one_of_its_magnitudes_with_a_quarter_above_it(rows: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_t(2, size=(rows, 5)).astype(np.float32)
    scale = channel_scale(values)
    magnitudes = np.abs(values)
    assert np.array_equal(scale, np.sort(magnitudes, axis=0)[min(3 * rows // 4, rows - 1)])
    assert (scale >= np.quantile(magnitudes, 0.75, axis=0, method="lower")).all()
    assert ((magnitudes > scale).sum(0) <= rows / 4).all()


def test_a_channel_of_zeros_or_of_values_too_small_to_divide_by_has_scale_one() -> None:
    values = np.array([[0, 1e-40, 2.0**-126, 3]], dtype=np.float32).repeat(8, 0)
    assert channel_scale(values).tolist() == [1, 1, 2.0**-126, 3]
    assert channel_scale(np.zeros((0, 3), dtype=np.float32)).tolist() == [1, 1, 1]


def test_a_few_rows_of_massive_activations_do_not_set_the_scale() -> None:
    values = np.ones((100, 1), dtype=np.float32)
    values[::5] = 27_000
    assert channel_scale(values).tolist() == [1]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    values = np.ones((70, 3), dtype=np.float32)
    values[69, 1] = value
    with pytest.raises(DataError, match=r"^s has a value that is not finite: the model itself overflowed; try"):
        quantise(values, np.ones(3, np.float32), site="s")


@pytest.mark.parametrize("sign", [1, -1])
def test_a_value_that_would_come_back_as_infinity_is_refused(sign: int) -> None:
    values = np.array([[sign * LARGEST, 1]], dtype=np.float32)
    with pytest.raises(DataError) as caught:
        quantise(values, np.ones(2, np.float32), site="s")
    assert str(caught.value) == (
        "s has a value of magnitude 3.40282e+38, and int8 holds at most 3.4e+38: use --encoding fp32"
    )
    large = np.array([[sign * 3.39e38, 1]], dtype=np.float32)
    for scale in (1, 3, 1.1, 1e38):
        assert np.isfinite(both_ways(large, np.full(2, scale, np.float32))[2]).all()


def test_a_value_too_far_from_its_channels_scale_is_refused() -> None:
    values = np.array([[1e38, 1]], dtype=np.float32)
    with pytest.raises(DataError) as caught:
        quantise(values, np.array([1e-3, 1], np.float32), site="hidden.8")
    assert str(caught.value) == ("hidden.8 has a value too far from its channel's scale for int8: use --encoding fp32")


@settings(deadline=None)
@given(
    st.floats(width=32, min_value=2.0**120, allow_infinity=False),
    st.floats(width=32, min_value=2.0**-126, max_value=2.0**126),
)
# The ratio of the two is the largest that float32 holds.
@example(float(np.float32(2.9514789e20)), float(np.float32(8.6736174e-19)))
def test_what_is_not_refused_comes_back_finite_and_close(value: float, scale: float) -> None:
    values = np.array([[value, -value, 0]], dtype=np.float32)
    with suppress(DataError):
        _, _, back = both_ways(values, np.full(3, scale, np.float32))
        assert np.allclose(back, values.astype(np.float64), rtol=1e-6)


def test_no_rows_are_stored_as_no_rows() -> None:
    stored, rows = quantise(np.zeros((0, 3), np.float32), np.ones(3, np.float32), site="s")
    assert stored.shape == (0, 3)
    assert rows.shape == (0,)


def test_scales_come_from_the_first_256_texts_or_from_as_many_as_have_enough_rows() -> None:
    assert scale_texts(np.full(1000, 10)).tolist() == list(range(256))
    assert scale_texts(np.full(100, 10)).tolist() == list(range(100))
    enough = scale_texts(np.full(1000, 1000))
    assert (len(enough) - 1) * 1000 < SCALE_ROWS <= len(enough) * 1000
    assert scale_texts(np.array([10**6, 1])).tolist() == [0]


@pytest.fixture(scope="module")
def made() -> Known:
    """The contents of a cache of two int8 sites and one of another encoding."""
    return known(texts=12, widths={"hidden.1": (6, "int8"), "hidden.2": (5, "bf16"), "hidden.3": (3, "int8")})


@pytest.fixture(scope="module")
def whole(made: Known, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished cache."""
    path = tmp_path_factory.mktemp("int8") / "cache"
    made.write(path)
    return path


def test_zarr_finds_the_scales_of_rows_and_channels_and_zeros_for_unused_rows(made: Known, whole: Path) -> None:
    group = zarr.open_group(whole / "activations.zarr", mode="r")
    assert (
        sorted(group["scales"].array_keys()) == sorted(group["channel_scale"].array_keys()) == ["hidden.1", "hidden.3"]
    )
    for site in ("hidden.1", "hidden.3"):
        stored, rows = quantise(made.vectors[site], made.scales[site], site=site)
        assert np.array_equal(group[f"channel_scale/{site}"][:], made.scales[site])
        assert np.array_equal(group[f"scales/{site}"][:][made.places], rows)
        assert np.array_equal(group[f"sites/{site}"][:][made.places], stored)
        unused = np.delete(np.arange(made.geometry.row_places), made.places)
        assert (group[f"scales/{site}"][:][unused] == 0).all()
        assert (group[f"sites/{site}"][:][unused] == 0).all()


def test_manifest_and_card_say_what_int8_did_to_the_values(made: Known, whole: Path) -> None:
    cache, card = Cache(whole), (whole / "README.md").read_text()
    for name in made.vectors:
        before, after = made.vectors[name].astype(np.float64), cache.vectors(name, made.places).astype(np.float64)
        error, own = np.linalg.norm(after - before, axis=1), np.linalg.norm(before, axis=1)
        cosine = (before * after).sum(1) / own / np.linalg.norm(after, axis=1)
        site = cache.manifest.sites[name]
        assert site.loss.relative_l2 == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-9)
        assert site.loss.mean_cosine == pytest.approx(cosine.mean(), abs=1e-12)
        assert site.loss.worst_row == pytest.approx((error / own).max(), rel=1e-9)
        assert site.loss.median_row == pytest.approx(np.median(error / own), rel=0.1)
        assert site.loss.lost == np.count_nonzero((after == 0) & (before != 0))
        assert (site.loss.rows, site.loss.values) == (len(before), before.size)
        assert site.statistics.mean == pytest.approx(after.mean(0).tolist(), rel=1e-9)
        line = next(line for line in card.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {site.loss.relative_l2:.2g} / {site.loss.median_row:.2g} / {site.loss.worst_row:.2g} |" in line
        assert f"{site.loss.lost_share:.2%}" in line


def test_a_shard_before_the_scales_are_fixed_is_refused(made: Known, tmp_path: Path) -> None:
    with CacheWriter(tmp_path, made.extraction) as writer:
        with pytest.raises(ConfigError) as caught:
            writer.commit(made.shard(0))
        assert str(caught.value) == "hidden.1 is stored as int8: its channel scales are to be fixed first"
        assert writer.done == set()
        assert list((tmp_path / "staging").iterdir()) == []
    assert contents(tmp_path / "records") == {}


def never() -> dict[str, np.ndarray]:
    raise AssertionError("the scales are fixed already")


def test_scales_are_asked_for_only_where_a_site_needs_them_and_they_are_not_there(made: Known, tmp_path: Path) -> None:
    plain = known(texts=5)
    with CacheWriter(tmp_path / "plain", plain.extraction) as writer:
        writer.fix_scales(never)
    with CacheWriter(tmp_path / "int8", made.extraction) as writer:
        writer.fix_scales(lambda: made.scales)
        writer.fix_scales(never)
    with CacheWriter(tmp_path / "int8", made.extraction) as writer:
        writer.fix_scales(never)


def test_the_first_scales_win_and_all_shards_agree_on_them(made: Known, whole: Path, tmp_path: Path) -> None:
    other = {site: scale * 3 for site, scale in made.scales.items()}
    with CacheWriter(tmp_path, made.extraction) as writer:
        writer.fix_scales(lambda: made.scales)
        writer.commit(made.shard(0))
    # The other site's file is lost: what is there stays as it is.
    with CacheWriter(tmp_path, made.extraction) as writer:
        writer.fix_scales(lambda: other)
        writer.commit(made.shard(1))
    made.write(tmp_path)
    assert contents(tmp_path) == contents(whole)


def test_a_scale_that_is_missing_is_made_again_and_the_others_are_kept(made: Known, tmp_path: Path) -> None:
    with CacheWriter(tmp_path, made.extraction) as writer:
        writer.fix_scales(lambda: made.scales)
    kept, lost = (tmp_path / f"activations.zarr/channel_scale/hidden.{number}/c/0" for number in (1, 3))
    lost.unlink()
    before = kept.read_bytes()
    other = {site: scale * 3 for site, scale in made.scales.items()}
    with CacheWriter(tmp_path, made.extraction) as writer:
        writer.fix_scales(lambda: other)
    assert kept.read_bytes() == before
    made.write(tmp_path)
    group = zarr.open_group(tmp_path / "activations.zarr", mode="r")
    assert np.array_equal(group["channel_scale/hidden.1"][:], made.scales["hidden.1"])
    assert np.array_equal(group["channel_scale/hidden.3"][:], other["hidden.3"])
    values = made.vectors["hidden.3"]
    stored, rows = quantise(values, other["hidden.3"], site="s")
    assert np.array_equal(Cache(tmp_path).vectors("hidden.3", made.places), dequantise(stored, rows, other["hidden.3"]))
    assert verify(tmp_path).problems == []


@pytest.mark.parametrize("place", [0, 20, -1])
def test_a_damaged_scale_is_named_and_nothing_is_written_with_it(made: Known, tmp_path: Path, place: int) -> None:
    with CacheWriter(tmp_path, made.extraction) as writer:
        writer.fix_scales(lambda: made.scales)
    file = tmp_path / "activations.zarr/channel_scale/hidden.3/c/0"
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    with CacheWriter(tmp_path, made.extraction) as writer, pytest.raises(CacheCorrupt) as caught:
        writer.fix_scales(never)
    assert str(caught.value).startswith(f"{file} is damaged: ")
    assert contents(tmp_path / "records") == {}
