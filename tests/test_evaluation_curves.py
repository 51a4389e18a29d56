"""Curves of effect against norm, against numpy on a fine grid and by hand."""

import numpy as np
import pytest
from clvq.evaluation.curves import effect_at, mean_effect
from hypothesis import given
from hypothesis import strategies as st

STEPS = st.lists(st.tuples(st.floats(0.05, 2), st.floats(-1, 1)), min_size=1, max_size=6)


def test_a_straight_line_has_half_its_height_on_the_way():
    norms, effects = np.array([[0.2]]), np.array([[0.5]])
    assert mean_effect(norms, effects, np.array([0.2])) == pytest.approx(0.25)
    assert mean_effect(norms, effects, np.array([0.1])) == pytest.approx(0.125)
    assert effect_at(norms, effects, np.array([0.1])) == pytest.approx(0.25)


@given(STEPS, st.floats(0.01, 1))
def test_area_and_height_equal_numpys_on_a_fine_grid(steps: list[tuple[float, float]], share: float):
    norms = np.cumsum([step for step, _ in steps])
    effects = np.array([effect for _, effect in steps])
    limit = share * norms[-1]
    x, y = np.append(0, norms), np.append(0, effects)
    assert float(effect_at(norms, effects, np.array(limit))) == pytest.approx(np.interp(limit, x, y), abs=1e-9)
    grid = np.unique(np.concatenate([x[x < limit], np.linspace(0, limit, 50)]))
    area = np.trapezoid(np.interp(grid, x, y), grid) / limit
    assert float(mean_effect(norms, effects, np.array(limit))) == pytest.approx(area, abs=1e-9)


def test_beyond_its_last_point_a_curve_is_flat():
    norms, effects = np.array([0.5, 1.0]), np.array([0.2, 0.4])
    assert float(effect_at(norms, effects, np.array(2.0))) == pytest.approx(0.4)
    assert float(mean_effect(norms, effects, np.array(2.0))) == pytest.approx((0.2 + 0.4) / 2)


def test_without_a_norm_there_is_no_mean():
    nothing = np.zeros(2)
    assert np.isnan(float(mean_effect(nothing, np.ones(2), np.array(0.0))))
    assert float(effect_at(nothing, np.ones(2), np.array(0.0))) == 0


def test_many_curves_are_measured_at_once():
    generator = np.random.default_rng(0)
    norms = np.cumsum(generator.random((7, 4)), axis=1)
    effects, limits = generator.normal(size=(7, 4)), generator.random(7)
    for measure in (mean_effect, effect_at):
        together = measure(norms, effects, limits)
        for one in range(7):
            assert together[one] == pytest.approx(float(measure(norms[one], effects[one], np.array(limits[one]))))
