"""The two-way bootstrap against exact moments, and its coverage on crossed data with a known mean."""

import numpy as np
import pytest
from clvq.evaluation.bootstrap import Estimate, draw_counts, interval, resampled_means
from clvq.evaluation.clustered import ratio_resamples, ratios, two_way
from scipy.stats import t


def _crossed(people: int, things: int):
    return (index.ravel() for index in np.indices((people, things)))


@pytest.mark.parametrize("annotators_drawn", [True, False])
def test_resamples_have_the_exact_mean_and_variance(annotators_drawn):
    people, things = 5, 8
    values = np.random.default_rng(0).normal(1, 1, size=(people, things))
    annotator, item = _crossed(people, things)
    again = ratio_resamples(
        values.ravel(),
        np.ones(40),
        annotator,
        item,
        np.zeros(40, dtype=np.int64),
        groups=1,
        seed=0,
        resamples=40_000,
        annotators_drawn=annotators_drawn,
    )[:, 0]
    # E[counts of two units] of a multinomial draw, over its expectation: δ + 1 - 1/n.
    rows = np.eye(people) + 1 - 1 / people if annotators_drawn else np.ones((people, people))
    columns = np.eye(things) + 1 - 1 / things
    second = np.einsum("ik,jl,ij,kl->", rows, columns, values, values) / (people * things) ** 2
    assert again.mean() == pytest.approx(values.mean(), abs=0.01)
    assert again.var() == pytest.approx(second - values.mean() ** 2, rel=0.03)


def test_a_weight_is_as_good_as_a_repeated_record():
    generator = np.random.default_rng(0)
    annotator, item = _crossed(4, 6)
    group = generator.integers(0, 3, size=24)
    values, weights = generator.random(24), generator.integers(1, 4, size=24)
    settings = {"groups": 3, "seed": 5, "resamples": 50}
    weighted = ratio_resamples(values, weights.astype(float), annotator, item, group, **settings)
    again = [np.repeat(column, weights) for column in (values, np.ones(24), annotator, item, group)]
    np.testing.assert_allclose(weighted, ratio_resamples(*again, **settings))
    expected = [np.average(values[group == one], weights=weights[group == one]) for one in range(3)]
    np.testing.assert_allclose(ratios(values, weights.astype(float), group, groups=3), expected)


def test_groups_are_drawn_together():
    annotator, item = (np.tile(index, 2) for index in _crossed(4, 6))
    values = np.random.default_rng(0).random(24)
    group = np.repeat([0, 1], 24)
    again = ratio_resamples(
        np.concatenate([values, values + 0.25]), np.ones(48), annotator, item, group, groups=2, seed=0, resamples=30
    )
    np.testing.assert_allclose(again[:, 1] - again[:, 0], 0.25)


def test_a_group_without_drawn_records_has_no_mean():
    nothing = np.zeros(0)
    none = np.zeros(0, dtype=np.int64)
    assert np.isnan(ratio_resamples(nothing, nothing, none, none, none, groups=2, seed=0, resamples=3)).all()
    assert np.isnan(ratios(nothing, nothing, none, groups=2)).all()
    annotator, item = _crossed(3, 3)
    again = ratio_resamples(
        np.ones(9), np.ones(9), annotator, item, (item == 0).astype(np.int64), groups=2, seed=0, resamples=200
    )[:, 1]
    # An item of three is left out with the chance (2/3)³.
    assert np.isnan(again).mean() == pytest.approx(8 / 27, abs=0.1)
    assert (again[~np.isnan(again)] == 1).all()


def test_draws_do_not_depend_on_the_blocks():
    whole = np.concatenate(list(draw_counts(7, seed=3, resamples=20)))
    parts = list(draw_counts(7, seed=3, resamples=20, width=1_000_000))
    assert len(parts) > 1
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert (whole.sum(axis=1) == 7).all()
    annotator, item = _crossed(3, 7)
    settings = {"groups": 200_000, "seed": 3, "resamples": 8}
    group = np.zeros(21, dtype=np.int64)
    values = np.random.default_rng(0).random(21)
    narrow = ratio_resamples(values, np.ones(21), annotator, item, group, **{**settings, "groups": 1})
    wide = ratio_resamples(values, np.ones(21), annotator, item, group, **settings)
    np.testing.assert_allclose(wide[:, :1], narrow)


def _simulated(seed: int, keep: np.ndarray, annotators: float, items: float):
    generator = np.random.default_rng(seed)
    annotator, item = (index.ravel()[keep] for index in np.indices((12, 60)))
    own = generator.normal(0, annotators, size=12)[annotator] + generator.normal(0, items, size=60)[item]
    return TRUTH + own + generator.normal(0, 0.4, size=len(item)), annotator, item


TRUTH = 0.7
FULL = np.arange(720)
LATIN = np.flatnonzero((np.indices((12, 60)).sum(axis=0) % 4 == 0).ravel())


@pytest.mark.parametrize(("keep", "annotators", "items"), [(FULL, 0.1, 0.15), (LATIN, 0.1, 0.15), (LATIN, 0.0, 0.0)])
def test_intervals_cover_the_truth_of_crossed_data(keep, annotators, items):
    covered, width, plain = [], [], []
    for seed in range(300):
        values, annotator, item = _simulated(seed, keep, annotators, items)
        alike = np.ones(len(item)), annotator, item, np.zeros(len(item), dtype=np.int64)
        found = two_way(values, *alike, groups=1, seed=seed, resamples=300)
        one = found.estimate(np.ones(1))
        covered.append(one.low <= TRUTH <= one.high)
        width.append(one.high - one.low)
        pigeonhole = interval(float(values.mean()), found.drawn[:, 0])
        plain.append(pigeonhole.high - pigeonhole.low)
    assert 0.90 <= np.mean(covered) <= 0.99
    if keep is LATIN:
        assert np.mean(width) < 0.9 * np.mean(plain)


def test_drawing_records_covers_too_seldom():
    covered = []
    for seed in range(300):
        values, _, _ = _simulated(seed, FULL, 0.1, 0.15)
        one = interval(float(values.mean()), resampled_means(values[:, None], seed=seed, resamples=300)[:, 0])
        covered.append(one.low <= TRUTH <= one.high)
    assert np.mean(covered) <= 0.75


def test_p_fits_the_interval_and_is_seldom_small_where_there_is_nothing():
    p, fits = [], []
    for seed in range(300):
        values, annotator, item = _simulated(seed, FULL, 0.1, 0.15)
        group = np.random.default_rng([seed, 1]).integers(0, 2, size=720)
        found = two_way(values, np.ones(720), annotator, item, group, groups=2, seed=seed, resamples=300)
        contrast = np.array([1.0, -1.0])
        one = found.estimate(contrast)
        p.append(found.p(contrast))
        fits.append((p[-1] < 0.05) == (not one.low <= 0 <= one.high) or abs(p[-1] - 0.05) < 0.01)
    assert all(fits)
    # The width is set at 95 %, with Student's t, so that larger p are somewhat too large.
    assert np.mean(np.array(p) < 0.05) <= 0.08
    assert 0.25 <= np.mean(np.array(p) < 0.5) <= 0.55


def test_the_width_is_that_of_variance_by_both_clusters():
    values, annotator, item = _simulated(0, FULL, 0.1, 0.15)
    group = np.zeros(720, dtype=np.int64)
    found = two_way(values, np.ones(720), annotator, item, group, groups=1, seed=0, resamples=4000)
    table = values.reshape(12, 60)
    apart = table - table.mean()
    rows, columns = apart.mean(axis=1).var(ddof=1) / 12, apart.mean(axis=0).var(ddof=1) / 60
    variance = rows + columns - apart.var(ddof=1) / 720
    one = found.estimate(np.ones(1))
    assert one.high - one.low == pytest.approx(2 * t.ppf(0.975, 11) * variance**0.5, rel=0.04)
    assert one.value == pytest.approx(values.mean())
    assert found.estimate(np.ones(1), less=0.5).low == pytest.approx(one.low - 0.5)
    assert found.p(np.ones(1)) < 0.001


def test_one_annotator_gives_no_interval_over_annotators():
    values, none = np.random.default_rng(0).random(10), np.zeros(10, dtype=np.int64)
    settings = {"groups": 1, "seed": 0, "resamples": 50}
    over = two_way(values, np.ones(10), none, np.arange(10), none, **settings).estimate(np.ones(1))
    assert over.value == pytest.approx(values.mean())
    assert np.isnan(over.low)
    fixed = two_way(values, np.ones(10), none, np.arange(10), none, **settings, annotators_drawn=False)
    assert fixed.estimate(np.ones(1)).low < values.mean() < fixed.estimate(np.ones(1)).high
    same = two_way(np.ones(10), np.ones(10), np.arange(10) % 2, np.arange(10) // 2, none, **settings)
    assert same.estimate(np.ones(1)) == Estimate(1.0, 1.0, 1.0)
