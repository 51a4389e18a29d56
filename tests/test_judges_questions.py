"""What judges are asked: blind, in balanced orders, in a form that no text can break out of."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from clvq.errors import ConfigError
from clvq.evaluation.judges.config import JudgeConfig
from clvq.evaluation.judges.orders import orders_of, pair_orders, williams
from clvq.evaluation.judges.questions import questions
from clvq.evaluation.judges.replies import InvalidReply, parse
from clvq.evaluation.study.items import Items, key_path
from hypothesis import given
from hypothesis import strategies as st

from .study_maker import make_items

SCHEMA = {
    "type": "object",
    "properties": {
        "A": {"type": "integer", "enum": [1, 2, 3, 4, 5]},
        "B": {"type": "integer", "enum": [1, 2, 3, 4, 5]},
    },
}


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Items:
    return make_items(tmp_path_factory.mktemp("items") / "items.json", items=8, methods=4, attention=2)


@pytest.mark.parametrize("count", range(2, 11))
def test_a_williams_square_is_balanced_over_places_and_neighbours(count: int):
    square = williams(count)
    assert all(sorted(row) == list(range(count)) for row in square)
    places = Counter((place, number) for row in square for place, number in enumerate(row))
    neighbours = Counter(pair for row in square for pair in pairwise(row))
    assert len(places) == count**2
    assert len(neighbours) == count * (count - 1)
    assert len(set(places.values())) == len(set(neighbours.values())) == 1


@pytest.mark.parametrize("orders", [1, 2, 3, 4])
def test_over_items_each_method_stands_in_each_place_equally_often(orders: int):
    count = 5
    shown = [row for item in range(2 * count) for row in orders_of(item, count, orders=orders)]
    assert len(shown) == 2 * count * orders
    assert len(set(Counter((place, number) for row in shown for place, number in enumerate(row)).values())) == 1


def test_a_second_order_is_the_reverse_of_the_first():
    first, second = orders_of(3, 6, orders=2)
    assert second == tuple(reversed(first))


def test_pairs_are_asked_in_both_orders():
    assert sorted(pair_orders(4)) == [(a, b) for a in range(4) for b in range(4) if a != b]


def test_each_item_is_presented_in_as_many_orders_as_asked(items: Items):
    asked = questions(items, JudgeConfig(orders=3))
    assert Counter(one.item for one in asked) == {item.id: 3 for item in items.items if item.kind != "training"}
    assert {one.presentation for one in asked} == {0, 1, 2}
    assert all(sorted(one.methods) == list(items.methods) for one in asked)


def test_pairs_ask_about_each_two_methods_twice(items: Items):
    asked = [one for one in questions(items, JudgeConfig(protocol="pairs")) if one.kind == "main"]
    assert len(asked) == 8 * 4 * 3
    by_pair = Counter((one.item, frozenset(one.methods), one.presentation) for one in asked)
    assert set(by_pair.values()) == {1}


def test_nothing_that_a_judge_sees_names_a_method_or_an_item(items: Items, tmp_path: Path):
    made = make_items(tmp_path / "items.json", items=3, methods=4)
    key = json.loads(key_path(tmp_path / "items.json").read_bytes())
    secrets = [*made.methods, *(item.id for item in made.items), *(one["name"] for one in key["methods"].values())]
    for protocol in ("rate", "pairs", "guess"):
        for one in questions(made, JudgeConfig(protocol=protocol)):
            sent = one.system + one.request + json.dumps(one.schema)
            assert not [secret for secret in secrets if re.search(rf"\b{re.escape(secret)}\b", sent)]


def test_a_judge_that_guesses_sees_neither_text_nor_prediction(items: Items):
    for one in questions(items, JudgeConfig(protocol="guess")):
        shown = json.loads(one.request)
        assert set(shown) == {"classes", "concept"}
        assert "secret" not in one.request


def test_the_first_class_changes_so_that_a_liking_for_it_favours_none(items: Items):
    firsts = Counter(
        json.loads(one.request)["classes"][0]
        for one in questions(items, JudgeConfig(protocol="guess"))
        if one.kind == "main"
    )
    assert len(firsts) == 2
    assert len(set(firsts.values())) == 1


def test_hostile_text_stays_inside_the_json_of_the_request(tmp_path: Path):
    made = make_items(tmp_path / "items.json", items=14, methods=3, hostile=True)
    by_id = {item.id: item for item in made.items}
    for one in questions(made, JudgeConfig(labels=True)):
        shown = json.loads(one.request)
        assert set(shown) == {"text", "predicted class", "classes", "concepts"}
        if one.kind == "main":
            assert shown["text"] == by_id[one.item].text
            for label, method in zip("ABC", one.methods, strict=True):
                view = by_id[one.item].concepts[method]
                assert shown["concepts"][label]["sentences"] == [
                    f"{part.before}[{part.word}]{part.after}" for part in view.sentences
                ]


def test_shares_of_labels_are_shown_only_where_asked_for(items: Items):
    assert '"labels"' not in questions(items, JudgeConfig())[0].request
    main = [one for one in questions(items, JudgeConfig(labels=True)) if one.kind == "main"]
    assert all('"labels"' in one.request for one in main)


def test_an_attention_check_says_how_it_wants_to_be_rated(items: Items):
    (check, *_) = [one for one in questions(items, JudgeConfig()) if one.kind == "attention"]
    best = next(item.best for item in items.items if item.id == check.item)
    concepts = list(json.loads(check.request)["concepts"].values())
    for method, concept in zip(check.methods, concepts, strict=True):
        assert ("rate this concept 5" if method == best else "rate this concept 1") in concept["sentences"][0]


def test_more_methods_than_letters_are_refused(items: Items):
    many = items.model_copy(update={"methods": tuple(f"m{number}" for number in range(27))})
    with pytest.raises(ConfigError, match="27 methods are too many to be shown at once: 26 are possible"):
        questions(many, JudgeConfig())


@pytest.mark.parametrize(
    "text",
    [
        '{"A": 1, "B": 5}',
        'Sure!\n```json\n{"A": 1, "B": 5.0}\n```\nDone.',
        '<think>{"A": 2, "B": 2}</think> {"B": 5, "A": 1} {"A": 3}',
    ],
)
def test_an_object_is_found_in_fences_thoughts_and_words(text: str):
    assert parse(text, SCHEMA) == {"A": 1, "B": 5}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "there is no JSON object in it"),
        ("A: 1, B: 2", "there is no JSON object in it"),
        ('{"A": 1, "B": ', "what looks like a JSON object cannot be read as one"),
        ('{"A": 1}', "the field 'B' is missing"),
        ('{"A": 1, "B": 6}', "the field 'B' is 6 instead of one of [1, 2, 3, 4, 5]"),
        ('{"A": true, "B": 2}', "the field 'A' is true instead"),
        ('{"A": "1", "B": 2}', "the field 'A' is \"1\" instead"),
        ('{"A": 1.5, "B": 2}', "the field 'A' is 1.5 instead"),
        ('{"A": 1e999, "B": 2}', "the field 'A' is Infinity instead"),
        ('{"A": [1], "B": 2}', "the field 'A' is [1] instead"),
        ('{"A": 1, "B": 2, "C": 3}', "there is a field 'C' that was not asked for"),
        ('{"A": 1, "A": 2, "B": 3}', "a field is there twice"),
        ('{"A": ' + "9" * 5000 + ', "B": 1}', "cannot be read as one"),
        ("{" + '"A": {' * 100_000, "cannot be read as one"),
    ],
)
def test_a_reply_that_does_not_answer_is_refused_with_the_reason(text: str, why: str):
    with pytest.raises(InvalidReply) as caught:
        parse(text, SCHEMA)
    assert why in str(caught.value)


@given(st.text() | st.from_regex(r'\{"A": .*\}'))
def test_no_reply_breaks_the_parser(text: str):
    try:
        found = parse(text, SCHEMA)
    except InvalidReply:
        return
    assert set(found) == {"A", "B"}
    assert all(value in (1, 2, 3, 4, 5) for value in found.values())
