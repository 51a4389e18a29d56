"""Dealing questions: balance over cells and within a person, whoever stops, and places of attention checks."""

from collections import Counter

import numpy as np
import pytest
from clvq.errors import ConfigError
from clvq.evaluation.study.deal import (
    Pool,
    Question,
    add_to,
    assign,
    booklet,
    booklets,
    hashed,
    main_questions,
    make_pool,
    tie_keys,
)
from clvq.evaluation.study.settings import StudySettings
from hypothesis import given, settings
from hypothesis import strategies as st

from .study_maker import make_items


def a_pool(items: int = 60, methods: int = 5, *, questions: int | None = None, checks: int = 3, seed: int = 0) -> Pool:
    return Pool(
        main=tuple(f"item-{number}" for number in range(items)),
        training=(Question("practice", "m0", "training"),),
        attention=tuple(f"check-{number}" for number in range(checks)),
        methods=tuple(f"m{number}" for number in range(methods)),
        questions=questions or items,
        seed=seed,
    )


def counted(pool: Pool, dealt: list[list[Question]]) -> np.ndarray:
    counts = np.zeros((len(pool.main), len(pool.methods)), dtype=np.int64)
    for questions in dealt:
        add_to(counts, pool, questions)
    return counts


def per_method(pool: Pool, questions: list[Question]) -> list[int]:
    had = Counter(question.method for question in questions if question.kind == "main")
    return [had[method] for method in pool.methods]


@pytest.mark.parametrize("seed", range(3))
def test_twelve_people_give_each_cell_two_or_three_answers_and_see_each_method_equally_often(seed: int):
    pool = a_pool(seed=seed)
    dealt = booklets(pool, 12)
    counts = counted(pool, dealt)
    assert set(counts.ravel()) == {2, 3}
    assert all(per_method(pool, questions) == [12] * 5 for questions in dealt)


@settings(max_examples=25)
@given(
    items=st.integers(1, 40),
    methods=st.integers(2, 7),
    people=st.integers(1, 9),
    share=st.floats(0.05, 1),
    checks=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_any_study_is_balanced(items: int, methods: int, people: int, share: float, checks: int, seed: int):
    pool = a_pool(items, methods, questions=max(1, round(share * items)), checks=checks, seed=seed)
    dealt = booklets(pool, people)
    counts = counted(pool, dealt)
    # Of an item's cells, and of the items, none is two answers ahead of another.
    assert np.ptp(counts.sum(axis=1)) <= 1
    assert counts.sum() == people * pool.questions
    for questions in dealt:
        assert np.ptp(per_method(pool, questions)) <= 1
        asked = [question.item for question in questions]
        assert len(set(asked)) == len(asked) == 1 + pool.questions + checks
        assert questions[0].kind == "training"
    if items % methods == 0 and pool.questions == items:
        assert np.ptp(counts) <= 1


@pytest.mark.parametrize("people", [5, 12, 15])
def test_fewer_questions_than_items_cover_all_items_alike(people: int):
    pool = a_pool(questions=20)
    counts = counted(pool, booklets(pool, people))
    assert np.ptp(counts) <= 1
    assert np.ptp(counts.sum(axis=1)) <= 1


def test_the_assignment_has_the_fewest_answers_of_all():
    # Against trying all ways of giving 6 items 3 methods, twice each.
    from itertools import permutations

    generator = np.random.default_rng(0)
    for _ in range(5):
        counts = generator.integers(0, 4, size=(6, 3))
        keys = generator.random((6, 3))
        chosen = assign(counts, np.zeros(6, bool), np.zeros(3, np.int64), keys, questions=6)
        ways = set(permutations([0, 0, 1, 1, 2, 2]))
        best = min(int(counts[np.arange(6), list(way)].sum()) for way in ways)
        assert int(counts[np.arange(6), chosen].sum()) == best
        assert sorted(chosen) == [0, 0, 1, 1, 2, 2]


def test_items_that_were_seen_are_not_asked_again_and_methods_had_before_count():
    pool = a_pool(10, 2)
    seen = np.arange(10) < 4
    questions = main_questions(pool, np.zeros((10, 2), np.int64), seen, np.array([4, 0]), 1)
    assert {question.item for question in questions} == set(pool.main[4:])
    assert per_method(pool, questions) == [1, 5]


def test_the_rarest_cells_are_filled_first():
    pool = a_pool(10, 2)
    counts = np.full((10, 2), 3)
    counts[7, 1] = counts[2, 0] = 0
    first = main_questions(pool, counts, np.zeros(10, bool), np.zeros(2, np.int64), 1)[:2]
    assert {(question.item, question.method) for question in first} == {("item-7", "m1"), ("item-2", "m0")}


def test_whoever_stops_early_has_had_all_methods_about_equally_often():
    pool = a_pool()
    for questions in booklets(pool, 4):
        main = [question for question in questions if question.kind == "main"]
        for end in range(len(main)):
            assert np.ptp(per_method(pool, main[:end])) <= 1


@pytest.mark.parametrize(("questions", "checks"), [(60, 3), (60, 1), (4, 4), (1, 5), (7, 0)])
def test_attention_checks_are_spread_one_in_each_part(questions: int, checks: int):
    pool = a_pool(60, 5, questions=questions, checks=checks)
    for dealt in booklets(pool, 5):
        kinds = [question.kind for question in dealt[1:]]
        places = [place for place, kind in enumerate(kinds) if kind == "attention"]
        total = questions + checks
        assert len(places) == checks
        for part, place in enumerate(places):
            assert total * part // checks <= place < total * (part + 1) // checks


def test_people_get_different_orders_and_the_same_seed_gives_the_same():
    pool = a_pool()
    one, two = booklets(pool, 2)
    assert [question.item for question in one] != [question.item for question in two]
    assert booklets(pool, 2) == [one, two]
    assert booklets(a_pool(seed=1), 1)[0] != one


def test_hashes_look_uniform_and_stay_the_same():
    values = np.array([hashed(0, "item", number) for number in range(2_000)])
    assert np.histogram(values, bins=10, range=(0, 1))[0] == pytest.approx(200, abs=60)
    assert hashed(0, "practice", "item-3", "ma") == 0.6879972365298137
    assert hashed(1, "2") == hashed("1", 2)


def test_practice_is_asked_with_one_method_and_first(tmp_path):
    items = make_items(tmp_path / "items.json", items=6, methods=3, training=4, attention=2)
    pool = make_pool(items, StudySettings(seed=5))
    assert sorted(question.item for question in pool.training) == ["item-000", "item-001", "item-002", "item-003"]
    assert {question.method for question in pool.training} <= set(items.methods)
    counts = np.zeros((6, 3), np.int64)
    assert booklet(pool, counts, 3)[:4] == list(pool.training)
    assert tie_keys(pool, 3).shape == (6, 3)


def test_more_questions_than_items_are_refused(tmp_path):
    items = make_items(tmp_path / "items.json", items=6)
    with pytest.raises(ConfigError, match="there are 6 main items for 7 questions per person: ask for at most 6"):
        make_pool(items, StudySettings(per_annotator=7))


def test_a_study_without_main_items_is_refused(tmp_path):
    items = make_items(tmp_path / "items.json", items=0)
    with pytest.raises(ConfigError, match="no main items"):
        make_pool(items, StudySettings())
