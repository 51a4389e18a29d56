"""Agreement among raters against the `krippendorff` package, published worked examples and scipy."""

from itertools import permutations

import krippendorff
import numpy as np
import pytest
from clvq.evaluation.raters import alpha_resamples, fleiss_kappa, kendall_w, krippendorff_alpha
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import friedmanchisquare

LEVELS = ("nominal", "ordinal", "interval")
NAN = np.nan

# Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section C.
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
)

# Fleiss 1971, table 1: 30 patients, six psychiatrists each, five diagnoses.
DIAGNOSES = [
    *("444444", "222555", "233335", "555555", "222444", "113333", "333355", "113334", "114444", "555555"),
    *("144444", "124444", "222333", "144444", "224445", "333335", "111455", "111112", "224444", "133555"),
    *("555555", "244444", "224555", "114444", "144445", "222224", "111155", "224444", "133333", "555555"),
]

TABLES = st.tuples(st.integers(2, 5), st.integers(1, 8)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.sampled_from([NAN, 0.0, 1.0, 2.0, 3.5, 7.0]))
)


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_the_published_example(level, alpha):
    assert krippendorff_alpha(PUBLISHED, level=level) == pytest.approx(alpha, abs=5e-4)


@pytest.mark.parametrize("level", LEVELS)
@given(values=TABLES)
def test_alpha_agrees_with_the_package_on_any_table(level, values):
    pairable = values[:, (~np.isnan(values)).sum(axis=0) >= 2]
    ours = krippendorff_alpha(values, level=level)
    if len(np.unique(pairable[~np.isnan(pairable)])) < 2:
        assert np.isnan(ours)
    else:
        theirs = krippendorff.alpha(reliability_data=pairable, level_of_measurement=level)
        assert ours == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("level", LEVELS)
def test_a_unit_that_is_drawn_twice_counts_as_two(level):
    generator = np.random.default_rng(0)
    values = generator.integers(1, 6, size=(4, 15)).astype(float)
    values[generator.random(values.shape) < 0.3] = NAN
    draws = generator.integers(0, 4, size=(20, 15))
    found = alpha_resamples(values, draws.astype(float), level=level)
    for alpha, drawn in zip(found, draws, strict=True):
        repeated = np.repeat(values, drawn, axis=1)
        assert alpha == pytest.approx(krippendorff.alpha(reliability_data=repeated, level_of_measurement=level))


@pytest.mark.parametrize("level", LEVELS)
def test_alpha_is_nan_where_nothing_could_disagree(level):
    assert np.isnan(krippendorff_alpha(np.full((3, 4), 2.0), level=level))
    assert np.isnan(krippendorff_alpha(np.array([[1.0, NAN], [NAN, 2.0]]), level=level))
    assert np.isnan(krippendorff_alpha(np.zeros((2, 0)), level=level))
    assert krippendorff_alpha(np.array([[1.0, 2.0], [1.0, 2.0]]), level=level) == 1


def _counts(rows: list[str]) -> np.ndarray:
    return np.array([[row.count(str(category)) for category in range(1, 6)] for row in rows])


def test_kappa_of_the_published_example():
    assert fleiss_kappa(_counts(DIAGNOSES)) == pytest.approx(0.430, abs=5e-4)


def test_kappa_with_unequally_many_answers_by_counting_pairs():
    rows = ["111", "12", "2233", "1", "", "55123"]
    agreement, shares = [], []
    for row in rows:
        if len(row) > 1:
            agreement.append(np.mean([one == other for one, other in permutations(row, 2)]))
            shares.append([row.count(c) / len(row) for c in "12345"])
    chance = sum(np.mean(shares, axis=0) ** 2)
    assert fleiss_kappa(_counts(rows)) == pytest.approx((np.mean(agreement) - chance) / (1 - chance))


def test_kappa_is_nan_where_nothing_could_disagree():
    assert np.isnan(fleiss_kappa(np.array([[3, 0], [2, 0]])))
    assert np.isnan(fleiss_kappa(np.array([[1, 0], [0, 1]])))
    assert fleiss_kappa(np.array([[3, 0], [0, 2]])) == 1


@given(
    st.tuples(st.integers(2, 6), st.integers(3, 7)).flatmap(
        lambda shape: arrays(np.float64, shape, elements=st.integers(1, 5).map(float))
    )
)
def test_w_agrees_with_the_friedman_test(scores):
    raters, objects = scores.shape
    if (scores == scores[:, :1]).all():
        assert np.isnan(kendall_w(scores))
    else:
        theirs = friedmanchisquare(*scores.T).statistic / (raters * (objects - 1))
        assert kendall_w(scores) == pytest.approx(theirs, abs=1e-9)


def test_w_leaves_out_raters_with_gaps_and_needs_two():
    same = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 9.0], [3.0, NAN, 1.0]])
    assert kendall_w(same) == 1
    assert np.isnan(kendall_w(same[1:]))
    assert np.isnan(kendall_w(np.ones((3, 1))))
