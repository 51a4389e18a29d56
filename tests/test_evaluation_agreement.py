"""Agreement of codes with concepts and of seeds with each other, against hand-worked cases and brute force."""

from itertools import combinations, permutations

import numpy as np
import pytest
from clvq.errors import DataError
from clvq.evaluation.agreement import (
    assignment_stability,
    direction_stability,
    matched_cosine,
    matched_f1,
    recovery,
)
from sklearn.metrics import f1_score, mutual_info_score


def _labels(seed: int, *, rows: int = 300, concepts: int = 4, codes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, concepts, rows)
    noisy = np.where(generator.random(rows) < 0.5, truth % codes, generator.integers(0, codes, rows))
    return truth, noisy


def _entropy(labels: np.ndarray) -> float:
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(shares * np.log(shares)).sum())


def test_codes_that_are_the_concepts_under_other_names_are_perfect():
    truth, _ = _labels(0)
    found = recovery(truth, np.array([17, 3, 900, 5])[truth])
    np.testing.assert_allclose(list(vars(found).values()), 1, atol=1e-12)


def test_one_code_for_everything_shows_nothing_but_the_largest_concept():
    truth = np.array([0, 0, 0, 1, 1, 2])
    found = recovery(truth, np.zeros(6, dtype=np.int64))
    assert (found.v_measure, found.ami, found.ari) == pytest.approx((0, 0, 0), abs=1e-12)
    assert found.purity == pytest.approx(3 / 6)
    # Concept 0: precision 3/6, recall 1; the others are without a code.
    assert found.matched_f1 == pytest.approx((2 * 3 / (3 + 6)) / 3)


def test_figures_of_a_small_case_are_those_worked_out_by_hand():
    truth = np.array([0, 0, 0, 0, 1, 1])
    codes = np.array([0, 0, 0, 1, 1, 1])
    found = recovery(truth, codes)
    assert found.purity == pytest.approx(5 / 6)
    # Code 0 with concept 0: 2·3/(4 + 3); code 1 with concept 1: 2·2/(2 + 3).
    np.testing.assert_allclose(matched_f1(truth, codes), [6 / 7, 4 / 5])
    # Pairs alike in both: 3 + 0 + 0 + 1; in one: 6 + 1 and 3 + 3; of 15 in all.
    expected = 7 * 6 / 15
    assert found.ari == pytest.approx((4 - expected) / ((7 + 6) / 2 - expected))
    # Both are harmonic means of I/H(truth) and I/H(codes).
    shares = np.array([[3, 1], [0, 2]]) / 6
    outer = shares.sum(1, keepdims=True) * shares.sum(0)
    information = sum(p * np.log(p / q) for p, q in zip(shares.ravel(), outer.ravel(), strict=True) if p)
    assert found.v_measure == pytest.approx(2 * information / (_entropy(truth) + _entropy(codes)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("concepts", "codes"), [(4, 4), (3, 5), (5, 3)])
def test_matched_f1_is_the_best_of_all_one_to_one_matchings(seed: int, concepts: int, codes: int):
    truth, found = _labels(seed, rows=40, concepts=concepts, codes=codes)
    of = {pair: f1_score(truth == pair[0], found == pair[1]) for pair in np.ndindex(concepts, codes)}
    # Partners beyond the codes stand for none.
    names = range(max(concepts, codes))
    best = max(
        sum(of.get((concept, code), 0.0) for concept, code in enumerate(order))
        for order in permutations(names, concepts)
    )
    assert matched_f1(truth, found).sum() == pytest.approx(best)
    assert recovery(truth, found).matched_f1 == pytest.approx(best / concepts)


def test_ami_of_unrelated_codes_is_zero_though_their_mutual_information_is_not():
    generator = np.random.default_rng(1)
    found = [recovery(generator.integers(0, 20, 400), generator.integers(0, 20, 400)) for _ in range(20)]
    assert abs(np.mean([one.ami for one in found])) < 0.02
    assert np.mean([one.v_measure for one in found]) > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_other_names_and_another_order_of_rows_change_nothing(seed: int):
    truth, codes = _labels(seed, concepts=6, codes=8)
    generator = np.random.default_rng(seed + 100)
    order, names = generator.permutation(len(truth)), generator.permutation(1000)
    before, after = recovery(truth, codes), recovery(names[truth[order]], names[::-1][codes[order]])
    assert vars(after) == pytest.approx(vars(before))


def test_v_measure_is_the_mutual_information_over_the_mean_entropy():
    truth, codes = _labels(7, concepts=6, codes=9)
    expected = mutual_info_score(truth, codes) / ((_entropy(truth) + _entropy(codes)) / 2)
    assert recovery(truth, codes).v_measure == pytest.approx(expected)


def test_nothing_to_compare_is_an_error():
    nothing = np.empty(0, dtype=np.int64)
    for refused in (
        lambda: recovery(nothing, nothing),
        lambda: matched_f1(nothing, nothing),
        lambda: assignment_stability([nothing, nothing]),
        lambda: assignment_stability([np.zeros(3, dtype=np.int64)]),
        lambda: direction_stability([np.eye(2)]),
        lambda: matched_cosine(np.eye(2), np.empty((0, 2))),
    ):
        with pytest.raises(DataError):
            refused()


@pytest.mark.parametrize(("first", "second"), [(5, 5), (3, 5), (5, 3)])
def test_matched_cosine_is_the_best_of_all_one_to_one_matchings(first: int, second: int):
    generator = np.random.default_rng(first)
    one, other = generator.normal(size=(first, 7)), generator.normal(size=(second, 7))
    few, many = sorted((one, other), key=len)
    cosines = [[a @ b / np.sqrt((a @ a) * (b @ b)) for b in many] for a in few]
    best = max(
        np.mean([cosines[a][b] for a, b in enumerate(order)]) for order in permutations(range(len(many)), len(few))
    )
    assert matched_cosine(one, other) == pytest.approx(best)


def test_directions_in_another_order_and_of_other_lengths_are_the_same():
    generator = np.random.default_rng(3)
    directions = generator.normal(size=(6, 9)).astype(np.float32)
    other = directions[generator.permutation(6)] * generator.uniform(0.1, 9, (6, 1)).astype(np.float32)
    assert matched_cosine(directions, other) == pytest.approx(1, abs=1e-6)
    assert matched_cosine(directions, -directions) < 0.8


def test_a_dead_code_has_no_direction_and_counts_as_nothing_found():
    directions = np.eye(4)
    dead = directions.copy()
    dead[2] = 0
    assert matched_cosine(directions, dead) == pytest.approx(3 / 4)


def test_stability_is_the_mean_over_all_pairs_of_seeds_with_the_extremes():
    generator = np.random.default_rng(5)
    truth, _ = _labels(5)
    seeds = [np.where(generator.random(300) < share, truth, 0) for share in (0.9, 0.7, 0.3)]
    found = assignment_stability(seeds)
    expected = [recovery(one, other).ami for one, other in combinations(seeds, 2)]
    assert found.pairs == pytest.approx(expected)
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(expected), min(expected), max(expected)))

    turned = [np.eye(3), np.eye(3)[::-1].copy(), np.array([[1.0, 1, 0], [0, 1, 0], [0, 0, 1]])]
    found = direction_stability(turned)
    third = (np.sqrt(0.5) + 2) / 3
    assert found.pairs == pytest.approx((1, third, third))
    assert (found.mean, found.low, found.high) == pytest.approx(((1 + 2 * third) / 3, third, 1))
