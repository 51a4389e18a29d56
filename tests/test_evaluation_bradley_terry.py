"""Strengths against scikit-learn's logistic regression, scipy's optimiser and two methods by hand."""

import numpy as np
import pytest
from clvq.evaluation.bradley_terry import PRIOR_SD, davidson
from scipy.optimize import minimize
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

FLAT = 1e6
"""A standard deviation at which the prior says nothing."""


def _random(seed: int, methods: int = 5, *, ties: bool = True):
    generator = np.random.default_rng(seed)
    wins = generator.uniform(0, 12, size=(1, methods, methods))
    tied = generator.uniform(0, 6, size=(1, methods, methods)) * ties
    for matrix in (wins, tied):
        matrix[:, np.arange(methods), np.arange(methods)] = 0
    return wins, tied + tied.transpose(0, 2, 1)


@pytest.mark.parametrize("sd", [FLAT, PRIOR_SD, 0.5])
def test_without_ties_strengths_are_those_of_logistic_regression(sd):
    wins, ties = _random(0, ties=False)
    design, won, weight = [], [], []
    for i in range(5):
        for j in range(5):
            if i != j:
                design.append(np.eye(5)[i] - np.eye(5)[j])
                won.append(1)
                weight.append(wins[0, i, j])
                design.append(np.eye(5)[j] - np.eye(5)[i])
                won.append(0)
                weight.append(wins[0, i, j])
    # Each comparison stands twice, once from either side, so that both classes occur.
    theirs = LogisticRegression(C=sd**2 / 2, fit_intercept=False, tol=1e-12, max_iter=10_000)
    theirs.fit(np.array(design), won, sample_weight=weight)
    expected = theirs.coef_[0] - theirs.coef_[0].mean()
    found = davidson(wins, ties, prior_sd=sd)
    np.testing.assert_allclose(found.log_strength[0], expected, atol=1e-5)
    assert found.tie[0] == 0


def _optimum(wins, ties, sd):
    """Log-strengths and log ν by a general optimiser."""
    count = wins.shape[1]

    def loss(parameters):
        strength, tie = parameters[:count], parameters[count]
        total = (parameters**2).sum() / (2 * sd**2)
        for i in range(count):
            for j in range(i):
                logits = np.array([strength[i], strength[j], tie + (strength[i] + strength[j]) / 2])
                observed = np.array([wins[0, i, j], wins[0, j, i], ties[0, i, j]])
                total -= observed @ (logits - logsumexp(logits))
        return total

    found = minimize(loss, np.zeros(count + 1), method="BFGS", options={"gtol": 1e-7}).x
    return found[:count] - found[:count].mean(), found[count]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sd", [FLAT, PRIOR_SD])
def test_with_ties_strengths_are_those_of_a_general_optimiser(seed, sd):
    wins, ties = _random(seed)
    strength, tie = _optimum(wins, ties, sd)
    found = davidson(wins, ties, prior_sd=sd)
    np.testing.assert_allclose(found.log_strength[0], strength, atol=1e-4)
    assert np.log(found.tie[0]) == pytest.approx(tie, abs=1e-4)


def test_two_methods_by_hand():
    wins = np.array([[[0.0, 30.0], [10.0, 0.0]]])
    found = davidson(wins, np.zeros((1, 2, 2)), prior_sd=FLAT)
    assert found.log_strength[0, 0] - found.log_strength[0, 1] == pytest.approx(np.log(3), abs=1e-6)
    tied = davidson(wins, np.array([[[0.0, 20.0], [20.0, 0.0]]]), prior_sd=FLAT)
    assert tied.log_strength[0, 0] - tied.log_strength[0, 1] == pytest.approx(np.log(3), abs=1e-6)
    # ν = ties / √(wins × losses).
    assert tied.tie[0] == pytest.approx(20 / np.sqrt(300), abs=1e-6)


def test_the_prior_says_little_beside_sixty_comparisons():
    wins = np.array([[[0.0, 42.0], [18.0, 0.0]]])
    found = davidson(wins, np.zeros((1, 2, 2))).log_strength[0]
    assert (found[0] - found[1]) / np.log(42 / 18) == pytest.approx(0.997, abs=1e-3)


def test_a_method_that_never_wins_has_a_finite_strength_and_is_last():
    wins = np.array([[[0.0, 30.0, 60.0], [30.0, 0.0, 60.0], [0.0, 0.0, 0.0]]])
    found = davidson(wins, np.zeros((1, 3, 3)))
    assert found.log_strength[0, 0] == pytest.approx(found.log_strength[0, 1])
    assert -10 < found.log_strength[0, 2] < -2
    only_ties = davidson(np.zeros((1, 2, 2)), np.array([[[0.0, 50.0], [50.0, 0.0]]]))
    np.testing.assert_allclose(only_ties.log_strength, 0, atol=1e-9)
    assert 10 < only_ties.tie[0] < np.inf


def test_every_resample_is_fitted_as_it_is_alone():
    generator = np.random.default_rng(0)
    wins = generator.integers(0, 9, size=(40, 4, 4)).astype(float) * (1 - np.eye(4))
    ties = generator.integers(0, 3, size=(40, 4, 4)).astype(float) * (1 - np.eye(4))
    ties = ties + ties.transpose(0, 2, 1)
    ties[::3] = 0
    together = davidson(wins, ties)
    for row in range(40):
        alone = davidson(wins[row : row + 1], ties[row : row + 1])
        np.testing.assert_allclose(together.log_strength[row], alone.log_strength[0], atol=1e-7)
        assert together.tie[row] == pytest.approx(alone.tie[0], abs=1e-6)
    np.testing.assert_allclose(together.log_strength.sum(axis=1), 0, atol=1e-7)


def test_extreme_counts_converge():
    wins, ties = np.zeros((1, 4, 4)), np.zeros((1, 4, 4))
    wins[0, [0, 1, 2], [1, 2, 3]] = [1e4, 1.0, 1e4]
    ties[0, [0, 3], [3, 0]] = 1e-2
    strength, tie = _optimum(wins, ties, PRIOR_SD)
    found = davidson(wins, ties)
    np.testing.assert_allclose(found.log_strength[0], strength, atol=1e-3)
    assert np.log(found.tie[0]) == pytest.approx(tie, abs=1e-3)


def test_what_was_not_compared_has_no_strength():
    wins = np.zeros((2, 4, 4))
    wins[0, [0, 1], [1, 0]] = 3, 1
    wins[0, 2, 1] = 2
    wins[1, 0, 1] = wins[1, 2, 3] = 1
    found = davidson(wins, np.zeros((2, 4, 4))).log_strength
    assert np.isnan(found[0, 3])
    assert np.isfinite(found[0, :3]).all()
    assert found[0, :3].sum() == pytest.approx(0, abs=1e-8)
    assert np.isnan(found[1]).all()
