"""Scores of scripted annotators whose accuracy is known, and answers that do not fit the item file."""

import dataclasses
import json

import numpy as np
import pytest
from clvq.errors import DataError
from clvq.evaluation.study.answers import Answer
from clvq.evaluation.study.items import items_digest, key_path, read_key
from clvq.evaluation.study.score import chance, score
from scipy.stats import norm

from .study_maker import make_items

PEOPLE = tuple(f"person-{number:02}" for number in range(12))
# A good run, a middling one, the good one again, and answers that ignore the concept.
ACCURACY = {"run-0": 0.85, "run-1": 0.70, "again": 0.85, "another text's concept": 0.50}
LAST = "another text's concept"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "items.json"
    items = make_items(path, items=60, methods=4, attention=3, training=2)
    key = read_key(key_path(path), items_digest(path.read_bytes()))
    return items, key


def _answer(person, place, item, method, answer, *, confidence=3, milliseconds=4000):
    return Answer(person, place, item.id, method, item.kind, answer, confidence, milliseconds, "2030-01-01T00:00:00Z")


def _scripted(study, seed, *, spread=0.0):
    """Answers to every item with one method each, balanced, and the accuracy that each annotator has.

    `spread` is the standard deviation of annotators' skill and of items' ease.
    """
    items, key = study
    generator = np.random.default_rng(seed)
    accuracy = {method: ACCURACY[keyed.name] for method, keyed in key.methods.items()}
    main = items.of_kind("main")
    skill, ease = generator.normal(0, spread, len(PEOPLE)), generator.normal(0, spread, len(main))
    turn = generator.permutation(len(main))
    answers, truth = [], {}
    for number, person in enumerate(PEOPLE):
        chances = []
        for place, item in enumerate(main):
            method = items.methods[(turn[place] + number) % 4]
            odds = accuracy[method]
            if key.methods[method].role != "random":
                odds = float(np.clip(odds + skill[number] + ease[place], 0.05, 0.95))
            right = generator.random() < odds
            chances.append(odds)
            given = item.prediction if right else 1 - item.prediction
            answers.append(_answer(person, place, item, method, given, confidence=4 if right else 2))
        truth[person] = float(np.mean(chances))
    return answers, truth


def test_scripted_annotators_are_scored_as_they_were_made(study):
    items, key = study
    answers, truth = _scripted(study, 1)
    found = score(items, answers, key=key, seed=0)
    table = found.all
    assert (table.annotators, table.answers) == (12, 720)
    assert table.methods[-1].role == "random"
    assert table.methods[-1].accuracy.low <= 0.5 <= table.methods[-1].accuracy.high
    assert table.methods[-1].over_uniform.low <= 0 <= table.methods[-1].over_uniform.high
    assert table.methods[-1].over_random is None
    for row in table.methods:
        assert row.accuracy.low <= ACCURACY[row.name] <= row.accuracy.high
        assert row.answers == 180
        if row.role != "random":
            assert row.over_random.low > 0
            assert row.over_uniform.low > 0
            assert (row.confidence_right, row.confidence_wrong) == (4, 2)
    (again,) = table.duplicates
    assert key.methods[again.first].of == again.second
    assert again.difference.low <= 0 <= again.difference.high
    assert again.p > 0.05
    good, control = (next(row.method for row in table.methods if row.name == name) for name in ("run-0", LAST))
    apart = next(pair for pair in table.differences if (pair.first, pair.second) == (good, control))
    assert apart.difference.low > 0
    assert apart.p < 0.05
    assert apart.p <= apart.p_holm
    for person in found.annotators:
        assert person.answers == 60
        assert person.accuracy.low <= truth[person.annotator] <= person.accuracy.high


def test_intervals_hold_over_many_studies(study):
    items, key = study
    studies, held, covered, methods = 60, 0, 0, []
    for seed in range(studies):
        answers, truth = _scripted(study, 100 + seed, spread=0.08)
        found = score(items, answers, key=key, seed=seed, resamples=300)
        held += sum(one.accuracy.low <= truth[one.annotator] <= one.accuracy.high for one in found.annotators)
        (again,) = found.all.duplicates
        covered += again.difference.low <= 0 <= again.difference.high
        control = next(row for row in found.all.methods if row.role == "random")
        methods.append(control.accuracy.low <= 0.5 <= control.accuracy.high)
    assert held >= 0.90 * studies * len(PEOPLE)
    assert covered >= 0.90 * studies
    assert np.mean(methods) >= 0.90


def test_accuracy_goes_by_the_weights_of_items(study):
    items, key = study
    main = items.of_kind("main")
    heavy = items.model_copy(
        update={
            "items": tuple(
                item.model_copy(update={"weight": 3.0 if place % 2 else 0.5}) for place, item in enumerate(items.items)
            )
        }
    )
    answers, _ = _scripted(study, 0)
    weights = {item.id: item.weight for item in heavy.items}
    predictions = {item.id: item.prediction for item in main}
    found = score(heavy, answers, key=key, seed=0, resamples=50)
    for row in found.all.methods:
        mine = [answer for answer in answers if answer.method == row.method]
        right = [answer.answer == predictions[answer.item] for answer in mine]
        expected = np.average(right, weights=[weights[answer.item] for answer in mine])
        assert row.accuracy.value == pytest.approx(expected)
        common = np.average(
            [predictions[answer.item] for answer in mine], weights=[weights[answer.item] for answer in mine]
        )
        most = np.average([predictions[item.id] for item in main], weights=[weights[item.id] for item in main])
        guess = common if most > 0.5 else 1 - common
        assert row.over_most_frequent.value == pytest.approx(expected - guess)
    for one in found.annotators:
        right = [answer.answer == predictions[answer.item] for answer in answers if answer.annotator == one.annotator]
        assert one.accuracy.value == pytest.approx(np.mean(right))


def test_an_annotators_interval_is_wilsons(study):
    items, key = study
    main = items.of_kind("main")[:10]
    answers = [
        _answer("a", place, item, items.methods[0], item.prediction if place < 8 else 1 - item.prediction)
        for place, item in enumerate(main)
    ]
    (one,) = score(items, answers, key=key, seed=0, resamples=20).annotators
    z = norm.ppf(0.975)
    middle, half = (0.8 + z**2 / 20) / (1 + z**2 / 10), z / (1 + z**2 / 10) * np.sqrt(0.016 + z**2 / 400)
    assert one.accuracy.value == 0.8
    assert one.accuracy.low == pytest.approx(middle - half)
    assert one.accuracy.high == pytest.approx(middle + half)


def test_chance_by_hand(study):
    items, _ = study
    main = items.of_kind("main")
    kept = tuple(
        item.model_copy(update={"prediction": int(place > 0), "weight": 2.0 if place == 0 else 1.0})
        for place, item in enumerate(main[:4])
    )
    found = chance(items.model_copy(update={"items": kept}))
    assert found.uniform == 0.5
    assert found.most_frequent == pytest.approx(0.6)
    assert found.proportional == pytest.approx(0.4**2 + 0.6**2)
    assert np.isnan(chance(items.model_copy(update={"items": ()})).most_frequent)


def test_those_who_fail_an_attention_item_are_kept_and_left_out_beside_it(study):
    items, key = study
    answers, _ = _scripted(study, 0)
    checks = items.of_kind("attention")
    answers += [_answer("person-00", 60 + place, item, "", item.prediction) for place, item in enumerate(checks)]
    answers += [_answer("person-01", 60, checks[0], "", 1 - checks[0].prediction)]
    answers += [_answer("person-02", 61, item, items.methods[0], item.prediction) for item in items.of_kind("training")]
    found = score(items, answers, key=key, seed=0, resamples=50)
    assert found.failed == ("person-01",)
    assert (found.all.annotators, found.attentive.annotators) == (12, 11)
    assert (found.all.answers, found.attentive.answers) == (720, 660)
    by_name = {one.annotator: one for one in found.annotators}
    assert (by_name["person-00"].attention_seen, by_name["person-00"].attention_failed) == (3, 0)
    assert (by_name["person-01"].attention_seen, by_name["person-01"].attention_failed) == (1, 1)
    assert (by_name["person-02"].training_seen, by_name["person-02"].training_right) == (2, 2)
    alone = score(items, [one for one in answers if one.annotator != "person-01"], key=key, seed=0, resamples=50)
    assert found.attentive == alone.all


def test_annotators_who_always_say_the_same_show_in_the_answers(study):
    items, key = study
    main = items.of_kind("main")
    method = items.methods[0]
    answers = [_answer(person, place, item, method, 1) for person in PEOPLE[:3] for place, item in enumerate(main)]
    found = score(items, answers, key=key, seed=0, resamples=50)
    row = found.all.methods[0]
    positive = sum(item.prediction for item in main)
    assert row.answered == ((0, 3 * (60 - positive)), (0, 3 * positive))
    assert row.accuracy.value == pytest.approx(positive / 60)
    # No disagreement is to be expected of one answer, so that agreement shows nothing.
    assert np.isnan(found.all.agreement.alpha.value)
    assert np.isnan(found.all.agreement.kappa)
    empty = found.all.methods[-1]
    assert empty.answers == 0
    assert np.isnan(empty.accuracy.value)


def test_agreement_is_over_questions_with_two_answers(study):
    items, key = study
    main = items.of_kind("main")
    method, other = items.methods[:2]
    answers = [_answer(person, 0, item, method, item.prediction) for person in PEOPLE[:3] for item in main[:20]]
    answers += [_answer("person-00", 0, item, other, 0) for item in main[:20]]
    found = score(items, answers, key=key, seed=0, resamples=50).all.agreement
    assert (found.questions, found.answers) == (20, 60)
    assert found.alpha.value == found.kappa == 1
    noisy = [_answer(person, 0, item, method, n % 2) for n, person in enumerate(PEOPLE[:2]) for item in main]
    assert score(items, noisy, key=key, seed=0, resamples=50).all.agreement.alpha.value < 0


def test_annotators_who_are_not_drawn_give_narrower_intervals(study):
    items, key = study
    answers, _ = _scripted(study, 0, spread=0.15)
    drawn, fixed = (
        score(items, answers, key=key, seed=0, resamples=400, annotators_drawn=one).all.methods for one in (True, False)
    )
    for over, within in zip(drawn, fixed, strict=True):
        assert over.accuracy.value == within.accuracy.value
        assert within.accuracy.high - within.accuracy.low < over.accuracy.high - over.accuracy.low
    alone = [answer for answer in answers if answer.annotator == "person-00"]
    assert np.isnan(score(items, alone, key=key, seed=0, resamples=50).all.methods[0].accuracy.low)
    one = score(items, alone, key=key, seed=0, resamples=50, annotators_drawn=False).all.methods[0].accuracy
    assert one.low < one.value < one.high


def test_without_a_key_methods_go_by_their_blind_ids(study):
    items, key = study
    answers, _ = _scripted(study, 0)
    blind, named = (score(items, answers, key=one, seed=0, resamples=50) for one in (None, key))
    assert {row.name for row in blind.all.methods} == set(items.methods)
    assert all(row.role is None and row.over_random is None for row in blind.all.methods)
    assert blind.all.duplicates == ()
    assert [row.accuracy for row in blind.all.methods] == [row.accuracy for row in named.all.methods]


def test_a_score_is_repeatable_and_becomes_json(study):
    items, key = study
    answers, _ = _scripted(study, 0)
    one, two = (json.dumps(dataclasses.asdict(score(items, answers, key=key, seed=3, resamples=50))) for _ in range(2))
    assert one == two
    assert json.loads(one)["all"]["methods"][0]["accuracy"]["value"] > 0.7


def test_no_answers_give_a_score_without_numbers(study):
    items, key = study
    found = score(items, [], key=key, seed=0, resamples=20)
    assert found.annotators == ()
    assert np.isnan(found.all.methods[0].accuracy.value)
    assert found.all.agreement.questions == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item": "nowhere"}, "the item file has no such item"),
        ({"method": "other"}, "no method 'other', only"),
        ({"answer": 2}, "is class 2, and there are the classes 0 to 1"),
        ({"answer": -1}, "is class -1"),
        ({"confidence": 5}, "has the confidence 5 instead of one from 1 to 4"),
        ({"milliseconds": -1}, "took -1 ms"),
        ({"kind": "training"}, "is of kind training, and the item is of kind main"),
        ({}, "stands there twice: keep one of the two"),
    ],
)
def test_answers_that_do_not_fit_the_items_are_named(study, change, message):
    items, key = study
    answers, _ = _scripted(study, 0)
    spoilt = [*answers, dataclasses.replace(answers[0], **change)]
    with pytest.raises(DataError, match=message) as error:
        score(items, spoilt, key=key, seed=0, resamples=20)
    assert "annotator person-00's answer to item" in str(error.value)
