"""Sign flips against exact enumeration and scipy, Holm's correction by hand."""

from itertools import product

import numpy as np
import pytest
from clvq.evaluation.significance import holm, sign_flip_p
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import permutation_test

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12).map(np.array)


@pytest.mark.parametrize("seed", range(4))
def test_sign_flips_come_near_all_flips_of_a_few_texts(seed: int):
    values = np.random.default_rng(seed).normal(0.5, 1, size=9)
    signs = np.array(list(product([-1, 1], repeat=9)))
    exact = np.mean(np.abs(signs @ values) >= abs(values.sum()) - 1e-12)
    assert float(sign_flip_p(values, 0)) == pytest.approx(exact, abs=0.02)


def test_sign_flips_agree_with_scipy():
    values = np.random.default_rng(0).normal(0.15, 1, size=120)
    theirs = permutation_test(
        (values,), lambda x: x.mean(), permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(1)
    )
    assert float(sign_flip_p(values, 0)) == pytest.approx(theirs.pvalue, abs=0.015)


def test_the_smallest_p_is_that_of_no_flip_as_extreme():
    assert float(sign_flip_p(np.ones(60), 0, flips=99)) == 0.01
    assert float(sign_flip_p(np.zeros(60), 0, flips=99)) == 1.0


def test_contrasts_are_tested_together_as_they_are_alone():
    values = np.random.default_rng(0).normal(0.1, 1, size=(70, 3))
    values[::2, 1] = np.nan
    values[:, 2] = np.nan
    found = sign_flip_p(values, 5)
    assert found[0] == sign_flip_p(values[:, 0], 5)
    known = values[::, 1][1::2]
    signs = 2.0 * np.random.default_rng(8).integers(0, 2, size=(20_000, len(known))) - 1
    assert found[1] == pytest.approx(np.mean(np.abs(signs @ known) >= abs(known.sum())), abs=0.02)
    assert np.isnan(found[2])


def test_p_is_uniform_where_there_is_nothing():
    generator = np.random.default_rng(0)
    p = sign_flip_p(generator.standard_t(3, size=(40, 1000)), 1, flips=400)
    for level in (0.05, 0.2, 0.5):
        assert np.mean(p <= level) == pytest.approx(level, abs=0.05)


def test_holm_by_hand():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.2, np.nan, 0.01])), [0.2, np.nan, 0.02])
    np.testing.assert_allclose(holm(np.array([0.6, 0.7])), [1.0, 1.0])
    assert holm(np.array([])).shape == (0,)


@given(P_VALUES)
def test_holm_never_lowers_a_p_and_keeps_their_order(p: np.ndarray):
    adjusted = holm(p)
    assert (adjusted >= p - 1e-15).all()
    assert (adjusted <= 1).all()
    assert adjusted[np.argmin(p)] == min(1, len(p) * p.min())
    order = np.argsort(p, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()


@given(P_VALUES, st.randoms())
def test_holm_does_not_depend_on_the_order_of_the_tests(p: np.ndarray, random: object):
    order = np.array(sorted(range(len(p)), key=lambda _: random.random()))  # type: ignore[attr-defined]
    np.testing.assert_allclose(holm(p[order]), holm(p)[order])
