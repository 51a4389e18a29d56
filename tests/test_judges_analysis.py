"""Simulated judges with known utilities and biases, small tables by hand, and replies that do not fit the item file."""

import dataclasses
import json

import krippendorff
import numpy as np
import pytest
from clvq.errors import DataError
from clvq.evaluation.judges.agreement import agreement_with_people, spearman_resamples
from clvq.evaluation.judges.analysis import analyse
from clvq.evaluation.judges.biases import biases
from clvq.evaluation.judges.outcomes import outcomes
from clvq.evaluation.judges.ratings import Comparison, Rating
from clvq.evaluation.study.answers import Answer
from clvq.evaluation.study.items import items_digest, key_path, read_key
from scipy.stats import friedmanchisquare, kendalltau, spearmanr

from .study_maker import make_items

UTILITY = {"run-0": 3.6, "run-1": 3.2, "run-2": 2.9, "again": 3.6, "another text's concept": 2.2}
PLACES = (0.25, 0.1, 0.0, -0.1, -0.25)
SLOPE = 0.12


def _made(folder, **settings):
    path = folder / "items.json"
    items = make_items(path, **settings)
    return items, read_key(key_path(path), items_digest(path.read_bytes()))


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    return _made(tmp_path_factory.mktemp("judged"), items=60, methods=5, attention=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return _made(tmp_path_factory.mktemp("small"), items=2, methods=3, attention=1)


def _ratings(judged, seed, *, judges=("one", "two"), noise=0.3, places=PLACES, slope=SLOPE):
    """Two presentations of each item in random orders; longer concepts are liked better, and better ones are longer."""
    items, key = judged
    generator = np.random.default_rng(seed)
    made = []
    for judge in judges:
        for item in items.of_kind("main"):
            ease = generator.normal(0, 0.1)
            taste = {method: generator.normal(0, 0.2) for method in items.methods}
            length = {m: int(300 + 60 * (UTILITY[key.methods[m].name] - 3) + generator.normal(0, 60)) for m in taste}
            for presentation in range(2):
                for place, column in enumerate(generator.permutation(5).tolist()):
                    method = items.methods[column]
                    rating = UTILITY[key.methods[method].name] + ease + taste[method] + places[place]
                    rating += slope * (length[method] - 300) / 100 + generator.normal(0, noise)
                    rating = float(np.clip(rating, 1, 5))
                    made.append(Rating(judge, item.id, method, presentation, place, 5, rating, length[method]))
    return made


def _holds(estimate, truth):
    return estimate.low <= truth <= estimate.high


def test_simulated_ratings_are_analysed_as_they_were_made(judged):
    items, key = judged
    found = analyse(items, _ratings(judged, 4), key=key, seed=0)
    assert (found.protocol, found.items, len(found.judges)) == ("rate", 60, 2)
    for table in (found.pooled, *(judge.table for judge in found.judges)):
        assert {table.methods[0].name, table.methods[1].name} == {"run-0", "again"}
        assert table.methods[-1].role == "random"
        assert table.methods[-1].over_random is None
        for row in table.methods[:-1]:
            for figure in ("rating", "win_share", "log_strength"):
                assert getattr(row.over_random, figure).low > 0
        (twice,) = table.duplicates
        assert key.methods[twice.method].of == twice.of
        for figure in ("rating", "win_share", "first_share", "log_strength"):
            assert _holds(getattr(twice.difference, figure), 0)
        assert _holds(twice.head_to_head, 0.5)
    held = []
    for judge in found.judges:
        held += [_holds(place, truth) for place, truth in zip(judge.biases.positions, PLACES, strict=True)]
        held.append(_holds(judge.biases.length_slope, SLOPE))
        assert judge.biases.first_wins.low > 0.5
        assert judge.biases.length_slope.value == pytest.approx(SLOPE, abs=0.1)
        assert judge.biases.length_correlation.low > 0
        assert judge.biases.longer_wins.low > 0.5
        assert judge.biases.flips.low > 0
        assert 0 < judge.consistency.low < judge.consistency.high < 1
    # Of twelve intervals at 95 %, 0.6 are expected to miss.
    assert sum(held) >= 10
    assert found.agreement.w_methods > 0.8
    assert found.agreement.alpha.low > 0


def test_intervals_hold_over_many_simulated_judges(judged):
    items, key = judged
    runs, place, slope, level, twice = 40, [], [], [], []
    truth = {name: value + SLOPE * 0.6 * (value - 3) for name, value in UTILITY.items()}
    for seed in range(runs):
        ratings = _ratings(judged, 500 + seed, judges=("one",))
        found = analyse(items, ratings, key=key, seed=seed, resamples=300)
        measured = found.judges[0].biases
        place += [_holds(one, planted) for one, planted in zip(measured.positions, PLACES, strict=True)]
        slope.append(_holds(measured.length_slope, SLOPE))
        level += [_holds(row.figures.rating, truth[row.name]) for row in found.pooled.methods]
        twice.append(_holds(found.pooled.duplicates[0].head_to_head, 0.5))
    for held in (place, slope, level, twice):
        assert np.mean(held) >= 0.88


def test_a_judge_without_biases_shows_none(judged):
    items, key = judged
    ratings = _ratings(judged, 1, judges=("one",), places=(0.0,) * 5, slope=0.0)
    found = analyse(items, ratings, key=key, seed=0).judges[0].biases
    assert all(_holds(place, 0) for place in found.positions)
    assert _holds(found.first_wins, 0.5)
    assert _holds(found.length_slope, 0)
    # Better concepts are longer, which the raw figures show and the slope does not.
    assert found.length_correlation.low > 0


def _rate(judge, item, presentation, ratings, methods):
    return [
        Rating(judge, item, method, presentation, place, len(ratings), rating and float(rating), 100 * (place + 1))
        for place, (method, rating) in enumerate(zip(methods, ratings, strict=True))
    ]


def _weighted(items, weights):
    main = iter(weights)
    changed = (item.model_copy(update={"weight": next(main)}) if item.kind == "main" else item for item in items.items)
    return items.model_copy(update={"items": tuple(changed)})


def test_figures_of_ratings_by_hand(small):
    items, key = small
    items = _weighted(items, (1.0, 3.0))
    one, two = (item.id for item in items.of_kind("main"))
    a, b, c = items.methods
    ratings = [
        *_rate("j", one, 0, (5, 5, 1), (a, b, c)),
        *_rate("j", one, 1, (2, 4, 3), (c, b, a)),
        *_rate("j", two, 0, (4, 2, None), (a, b, c)),
    ]
    found = analyse(items, ratings, key=key, seed=0, resamples=20)
    rows = {row.method: row.figures for row in found.pooled.methods}
    assert rows[a].rating.value == pytest.approx((1 * 4 + 3 * 4) / 4)
    assert rows[b].rating.value == pytest.approx((1 * 4.5 + 3 * 2) / 4)
    assert rows[c].rating.value == pytest.approx(1.5)
    # On the first item a ties with b once and loses once, and beats c twice; on the second it beats b.
    assert rows[a].win_share.value == pytest.approx((1 * (0.25 + 1) + 3 * 1) / (2 + 3))
    assert rows[c].win_share.value == 0
    assert rows[a].tie_share.value == pytest.approx(0.5 / 5)
    assert rows[a].first_share.value == pytest.approx((1 * 0.25 + 3 * 1) / 4)
    assert rows[b].first_share.value == pytest.approx((1 * 0.75 + 3 * 0) / 4)
    assert found.pooled.methods[0].method == a
    measured = found.judges[0].biases
    # Decided, with the earlier one first: a>c, b>c; c<b, c<a, b>a; a>b.
    assert measured.first_wins.value == pytest.approx(4 / 6)
    assert measured.longer_wins.value == pytest.approx(2 / 6)
    assert measured.flips.value == 0
    first = [5 - 11 / 3, 2 - 3, 4 - 3]
    assert measured.positions[0].value == pytest.approx(np.mean(first))
    lengths = [spearmanr([5, 5, 1], [1, 2, 3]), spearmanr([2, 4, 3], [1, 2, 3]), spearmanr([4, 2], [1, 2])]
    assert measured.length_correlation.value == pytest.approx(np.mean([one.statistic for one in lengths]))
    lost = found.judges[0].invalid
    assert (lost.replies, lost.share) == (9, pytest.approx(1 / 9))
    assert lost.by_method == {a: 0, b: 0, c: pytest.approx(1 / 3)}
    assert lost.by_position == (0, 0, pytest.approx(1 / 3))


def test_judges_weigh_the_same_in_the_pool(small):
    items, key = small
    one, two = (item.id for item in items.of_kind("main"))
    ratings = _rate("often", one, 0, (5, 3, 1), items.methods) + _rate("often", two, 0, (5, 3, 1), items.methods)
    ratings += _rate("seldom", one, 0, (1, 3, 4), items.methods) + _rate("silent", one, 0, (None,) * 3, items.methods)
    found = analyse(items, ratings, key=key, seed=0, resamples=20)
    rows = {row.method: row.figures for row in found.pooled.methods}
    assert [rows[method].rating.value for method in items.methods] == [3, 3, 2.5]
    assert [rows[method].win_share.value for method in items.methods] == [0.5, 0.5, 0.5]
    assert [judge.judge for judge in found.judges] == ["often", "seldom", "silent"]
    silent = found.judges[2]
    assert silent.invalid.share == 1
    assert all(np.isnan(row.figures.rating.value) for row in silent.table.methods)


def _compare(items, theta, *, seed, first=0.0, length=0.0, tie=0.5, judge="one"):
    """Both orders of all pairs, by Davidson's model; and the shares that are to be expected of biases."""
    generator = np.random.default_rng(seed)
    made, sums = [], np.zeros((3, 2))
    count = len(items.methods)
    for item in items.of_kind("main"):
        sizes = generator.integers(100, 500, size=count).tolist()
        for a in range(count):
            for b in range(a):
                wins = []
                for presentation, (i, j) in enumerate(((a, b), (b, a))):
                    lead = theta[i] - theta[j] + first + length * (sizes[i] - sizes[j]) / 100
                    chances = np.array([np.exp(lead / 2), np.exp(-lead / 2), tie])
                    chances /= chances.sum()
                    winner = ("first", "second", "tie")[int(generator.choice(3, p=chances))]
                    made.append(
                        Comparison(
                            judge, item.id, presentation, items.methods[i], items.methods[j], winner, sizes[i], sizes[j]
                        )
                    )
                    decided = chances[0] + chances[1]
                    sums[0] += chances[0], decided
                    if sizes[i] != sizes[j]:
                        sums[1] += chances[int(sizes[i] < sizes[j])], decided
                    wins.append(chances[:2])
                # The first of one order is the second of the other: winning twice in first place is a flip.
                sums[2] += (wins[0] * wins[1]).sum(), wins[0].sum() * wins[1].sum()
    return made, sums[:, 0] / sums[:, 1]


def test_biases_of_comparisons_are_found_as_they_were_planted(judged):
    items, _ = judged
    held = []
    for seed in range(30):
        made, truth = _compare(items, np.linspace(-0.6, 0.6, 5), seed=seed, first=0.5, length=0.3)
        measured = biases(outcomes(items, made, "one"), seed=seed)
        found = (measured.first_wins, measured.longer_wins, measured.flips)
        assert measured.first_wins.low > 0.5
        assert measured.longer_wins.low > 0.5
        held += [_holds(one, share) for one, share in zip(found, truth, strict=True)]
        assert measured.positions == ()
        assert np.isnan(measured.length_slope.value)
    assert np.mean(held) >= 0.88


def test_strengths_of_comparisons_are_those_of_the_model(judged):
    items, key = judged
    level = {name: value - np.mean(list(UTILITY.values())) for name, value in UTILITY.items()}
    theta = np.array([level[key.methods[method].name] for method in items.methods])
    held = []
    for seed in range(10):
        found = analyse(items, _compare(items, theta, seed=seed)[0], key=key, seed=seed, resamples=300)
        assert found.protocol == "pairs"
        assert found.pooled.methods[-1].role == "random"
        assert np.isnan(found.pooled.methods[0].figures.rating.value)
        held += [_holds(row.figures.log_strength, level[row.name]) for row in found.pooled.methods]
        held += [_holds(found.pooled.duplicates[0].head_to_head, 0.5)]
    assert np.mean(held) >= 0.88


def test_figures_of_comparisons_by_hand(small):
    items, key = small
    item = items.of_kind("main")[0].id
    a, b, c = items.methods
    made = [
        Comparison("j", item, 0, a, b, "first", 10, 20),
        Comparison("j", item, 1, b, a, "first", 20, 10),
        Comparison("j", item, 0, a, c, "first", 10, 10),
        Comparison("j", item, 1, c, a, "second", 10, 10),
        Comparison("j", item, 0, b, c, "tie", 20, 10),
        Comparison("j", item, 1, c, b, None, 10, 20),
    ]
    found = analyse(items, made, key=key, seed=0, resamples=20)
    rows = {row.method: row.figures for row in found.pooled.methods}
    assert [rows[method].win_share.value for method in (a, b, c)] == [0.75, 0.5, 0.25]
    assert [rows[method].first_share.value for method in (a, b, c)] == [1, 0, 0]
    assert [rows[method].tie_share.value for method in (a, b, c)] == [0, 0.5, 0.5]
    measured = found.judges[0].biases
    assert measured.first_wins.value == 0.75
    assert measured.longer_wins.value == 0.5
    assert measured.flips.value == 0.5
    lost = found.judges[0].invalid
    assert lost.share == pytest.approx(1 / 6)
    assert lost.by_method == {a: 0, b: 0.25, c: 0.25}
    assert lost.by_position == ()
    units = np.array([[1, -1, 1, -1, 0, 0], [-1, 1, 1, -1, np.nan, np.nan]])
    theirs = krippendorff.alpha(reliability_data=units, level_of_measurement="ordinal")
    assert found.judges[0].consistency.value == pytest.approx(theirs)


def test_agreement_of_judges_is_that_of_the_package(judged):
    items, key = judged
    made = _ratings(judged, 3, judges=("one", "two", "three"))
    ratings = [dataclasses.replace(one, rating=float(round(one.rating))) for one in made]
    found = analyse(items, ratings, key=key, seed=0, resamples=50)
    values = {}
    for one in ratings:
        values.setdefault((one.judge, one.presentation), {})[one.item, one.method] = one.rating
    units = [(item.id, method) for item in items.of_kind("main") for method in items.methods]
    table = np.array([[[values[n, p][unit] for unit in units] for p in (0, 1)] for n in ("one", "two", "three")])
    between = table.mean(axis=1)
    theirs = krippendorff.alpha(reliability_data=between, level_of_measurement="interval")
    assert found.agreement.alpha.value == pytest.approx(theirs)
    assert _holds(found.agreement.alpha, theirs)
    own = krippendorff.alpha(reliability_data=table[0], level_of_measurement="ordinal")
    assert next(judge for judge in found.judges if judge.judge == "one").consistency.value == pytest.approx(own)
    by_item = between.reshape(3, 60, 5)
    within = [friedmanchisquare(*by_item[:, n].T).statistic / (3 * 4) for n in range(60)]
    assert found.agreement.w_items.value == pytest.approx(np.mean(within))
    means = friedmanchisquare(*by_item.mean(axis=1).T).statistic / (3 * 4)
    assert found.agreement.w_methods == pytest.approx(means)
    alone = analyse(items, _ratings(judged, 3, judges=("one",)), key=key, seed=0, resamples=20).agreement
    assert np.isnan(alone.alpha.value)
    assert np.isnan(alone.w_methods)


def test_judges_rank_methods_by_the_weights_of_items(small):
    items, key = small
    one, two = (item.id for item in items.of_kind("main"))
    ratings = [
        *_rate("a", one, 0, (5, 3, 1), items.methods),
        *_rate("b", one, 0, (1, 3, 5), items.methods),
        *_rate("a", two, 0, (5, 3, 1), items.methods),
        *_rate("b", two, 0, (5, 3, 1), items.methods),
    ]
    for weights, concordance in (((1.0, 3.0), 1), ((3.0, 1.0), 0)):
        found = analyse(_weighted(items, weights), ratings, key=key, seed=0, resamples=20).agreement
        assert found.w_methods == concordance
        assert found.w_items.value == 0.5


def test_attention_items_are_reported_and_not_counted(small):
    items, key = small
    (check,) = items.of_kind("attention")
    others = [method for method in items.methods if method != check.best]
    main = items.of_kind("main")[0].id
    ratings = _rate("good", main, 0, (5, 3, 1), items.methods)
    ratings += _rate("good", check.id, 0, (1, 5, 1), (others[0], check.best, others[1]))
    ratings += _rate("bad", main, 0, (5, 3, 1), items.methods)
    ratings += _rate("bad", check.id, 0, (5, 5, 1), (others[0], check.best, others[1]))
    ratings += _rate("bad", check.id, 1, (None, 1, 1), (check.best, *others))
    bad, good = analyse(items, ratings, key=key, seed=0, resamples=20).judges
    assert (good.attention.seen, good.attention.passed) == (1, 1)
    assert (bad.attention.seen, bad.attention.passed) == (2, 0)
    assert good.table == bad.table
    made = [
        Comparison("j", check.id, 0, check.best, others[0], "first", 1, 1),
        Comparison("j", check.id, 1, others[0], check.best, "first", 1, 1),
        Comparison("j", check.id, 0, check.best, others[1], None, 1, 1),
        Comparison("j", check.id, 0, others[0], others[1], "first", 1, 1),
    ]
    (judge,) = analyse(items, made, key=key, seed=0, resamples=20).judges
    assert (judge.attention.seen, judge.attention.passed) == (3, 1)


def test_judges_who_saw_attention_items_alone_have_no_figures(small):
    items, key = small
    (check,) = items.of_kind("attention")
    found = analyse(items, _rate("j", check.id, 0, (1, 2, 3), items.methods), key=key, seed=0, resamples=20)
    (judge,) = found.judges
    assert judge.invalid.replies == 0
    assert np.isnan(judge.invalid.share)
    assert np.isnan(judge.consistency.value)
    assert judge.biases.positions == ()
    for row in found.pooled.methods:
        assert all(np.isnan(one["value"]) for one in dataclasses.asdict(row.figures).values())


def _answers(judged, seed, people=6):
    """People who are right the more often the better the concept."""
    items, key = judged
    generator = np.random.default_rng(seed)
    return [
        Answer(
            f"p{person}",
            place,
            item.id,
            method,
            "main",
            item.prediction if generator.random() < UTILITY[key.methods[method].name] / 4 else 1 - item.prediction,
            3,
            1000,
            "2030-01-01T00:00:00Z",
        )
        for person in range(people)
        for place, item in enumerate(items.of_kind("main"))
        for method in items.methods
    ]


def test_judges_and_people_are_compared_over_what_both_saw(judged):
    items, _ = judged
    ratings = [one for one in _ratings(judged, 0) if one.method != items.methods[0]]
    answers = [one for one in _answers(judged, 0) if one.item != items.of_kind("main")[0].id]
    found = agreement_with_people(items, ratings, answers, seed=0, resamples=200)
    assert (found.units, found.items, found.answers, found.methods) == (59 * 4, 59, 59 * 4 * 6, 4)
    right = {item.id: item.prediction for item in items.items}
    theirs, ours = [], []
    for item in items.of_kind("main")[1:]:
        for method in items.methods[1:]:
            mine = [one for one in answers if (one.item, one.method) == (item.id, method)]
            theirs.append(np.mean([one.answer == right[one.item] for one in mine]))
            ours.append(np.mean([one.rating for one in ratings if (one.item, one.method) == (item.id, method)]))
    assert found.spearman.value == pytest.approx(spearmanr(ours, theirs).statistic)
    assert found.spearman.low > 0
    means = np.array([np.reshape(side, (59, 4)).mean(axis=0) for side in (ours, theirs)])
    assert found.methods_spearman == pytest.approx(spearmanr(*means).statistic)
    assert found.methods_kendall == pytest.approx(kendalltau(*means).statistic)
    nothing = agreement_with_people(items, ratings, [], seed=0, resamples=20)
    assert nothing.units == 0
    assert np.isnan(nothing.spearman.value)


def test_a_unit_that_is_drawn_twice_counts_twice_in_the_correlation():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 6, size=25) / 2, generator.normal(size=25)
    draws = generator.integers(0, 4, size=(30, 25))
    found = spearman_resamples(first, second, draws.astype(float))
    for rho, drawn in zip(found, draws, strict=True):
        assert rho == pytest.approx(spearmanr(np.repeat(first, drawn), np.repeat(second, drawn)).statistic)
    assert np.isnan(spearman_resamples(np.ones(25), second, draws.astype(float))).all()


def test_without_a_key_methods_go_by_their_blind_ids(judged):
    items, key = judged
    ratings = _ratings(judged, 0, judges=("one",))
    blind, named = (analyse(items, ratings, key=one, seed=0, resamples=20).pooled for one in (None, key))
    assert [row.name for row in blind.methods] == [row.method for row in named.methods]
    assert all(row.role is None and row.over_random is None for row in blind.methods)
    assert blind.duplicates == ()
    assert [row.figures for row in blind.methods] == pytest.approx([row.figures for row in named.methods])


def test_an_analysis_is_repeatable_and_becomes_json(judged):
    items, key = judged
    ratings = _ratings(judged, 0, judges=("one",))
    one, two = (json.dumps(dataclasses.asdict(analyse(items, r, key=key, seed=1))) for r in (ratings, ratings[::-1]))
    assert one == two
    assert json.loads(one)["judges"][0]["judge"] == "one"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item": "nowhere"}, "the item file has no such item"),
        ({"method": "other"}, "no method 'other', only"),
        ({"rating": 6.0}, "rates method .* 6, not from 1 to 5"),
        ({"rating": float("nan")}, "rates method .* nan, not from 1 to 5"),
        ({}, "presentation 0, stands there twice"),
    ],
)
def test_ratings_that_do_not_fit_the_items_are_named(judged, change, message):
    items, key = judged
    ratings = _ratings(judged, 0, judges=("one",))
    with pytest.raises(DataError, match=message) as error:
        analyse(items, [*ratings, dataclasses.replace(ratings[0], **change)], key=key, seed=0)
    assert "judge one's reply to item" in str(error.value)


def test_replies_of_two_protocols_or_none_are_refused(small):
    items, key = small
    item = items.of_kind("main")[0].id
    a, b, _ = items.methods
    rating = Rating("j", item, a, 0, 0, 3, 4.0, 10)
    comparison = Comparison("j", item, 0, a, b, "first", 10, 20)
    with pytest.raises(DataError, match="ratings and comparisons cannot be analysed together"):
        analyse(items, [rating, comparison], key=key, seed=0)
    with pytest.raises(DataError, match="there are no replies of judges"):
        analyse(items, [], key=key, seed=0)
    with pytest.raises(DataError, match=f"compares method {a} with itself"):
        analyse(items, [dataclasses.replace(comparison, second=a)], key=key, seed=0)
    turned = dataclasses.replace(comparison, first=b, second=a)
    with pytest.raises(DataError, match="stands there twice"):
        analyse(items, [comparison, turned], key=key, seed=0)
