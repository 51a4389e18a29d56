"""The plan: rows, frequency filter, order, size and batches, known before a model is loaded."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clvq.errors import ConfigError, ModelError
from clvq.pipeline.batches import batches
from clvq.pipeline.plan import Plan
from clvq.pipeline.work import all_rows, tokenise
from hypothesis import given
from hypothesis import strategies as st

from .tiny import make_model, plan_of, write_texts

TinyModel = Callable[..., Path]


def words_of(plan: Plan) -> dict[int, list[tuple[int, str]]]:
    """Text of the data → its word rows in the plan: number of the word and the word."""
    found: dict[int, list[tuple[int, str]]] = {}
    shards = [plan.work(number) for number in range(plan.placement.geometry.shards)]
    works = [(work, place) for work in shards for place in range(len(work.texts))]
    for number, (work, place) in zip(plan.order.tolist(), works, strict=True):
        text = work.texts[place]
        tokens = tokenise(plan.source, plan.config, [text])[0]
        rows, _ = all_rows(plan.config, text, tokens)
        rows = rows if work.kept is None else rows.take(work.kept[place])
        assert len(rows) == work.row_counts[place]
        inner = rows.take(rows.special == 0)
        found[number] = [
            (word, text[start:end])
            for word, start, end in zip(
                inner.word.tolist(), inner.char_start.tolist(), inner.char_end.tolist(), strict=True
            )
        ]
        special = rows.take(rows.special > 0)
        assert special.position.tolist() == np.flatnonzero(tokens.kind).tolist()
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "data")


LIMITS: list[dict[str, Any]] = [
    {"min_count": 30},
    {"max_occurrences": 7, "occurrences": "first"},
    {"max_occurrences": 7},
    {"min_count": 30, "max_occurrences": 7, "occurrences": "first"},
    {"min_count": 30, "max_occurrences": 7, "seed": 5},
    {"min_count": 30, "max_occurrences": 7, "train_split": "dev"},
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_the_frequency_filter_keeps_what_a_plain_count_keeps(
    limits: dict[str, Any], data: Path, tiny_model: TinyModel
) -> None:
    plan = plan_of(tiny_model("bert"), data, rows="word", **limits)
    everything = words_of(plan_of(tiny_model("bert"), data, rows="word"))
    kept = words_of(plan)
    limit = limits.get("max_occurrences", 10**9)
    trained = [split == limits.get("train_split", "train") for split in plan.texts.split]
    assert 0 < sum(trained) < len(trained)
    frequency = Counter(word for text, rows in everything.items() if trained[text] for _, word in rows)
    seen: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for text in range(len(trained)):
        if not trained[text]:
            assert kept[text] == everything[text]
            continue
        assert set(kept[text]) <= set(everything[text])
        for number, word in everything[text]:
            seen[word].append((text, number))
    remaining: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for text in range(len(trained)):
        for number, word in kept[text] if trained[text] else []:
            remaining[word].append((text, number))
    for word, count in frequency.items():
        expected = min(count, limit) if count >= limits.get("min_count", 1) else 0
        assert len(remaining[word]) == expected
        if limits.get("occurrences") == "first":
            assert remaining[word] == seen[word][:expected]
    left_out = sum(frequency.values()) - sum(map(len, remaining.values()))
    assert 0 < left_out == plan.counts["words_left_out_by_frequency"]


def test_random_occurrences_follow_the_seed_and_reach_the_end(data: Path, tiny_model: TinyModel) -> None:
    def chosen(seed: int) -> dict[int, list[tuple[int, str]]]:
        return words_of(plan_of(tiny_model("bert"), data, rows="word", max_occurrences=7, seed=seed))

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)
    first = words_of(plan_of(tiny_model("bert"), data, rows="word", max_occurrences=7, occurrences="first"))
    late = [text for text, rows in chosen(1).items() if rows and text > 200]
    assert len(late) > len([text for text, rows in first.items() if rows and text > 200])


def test_a_plan_follows_from_its_inputs_alone(data: Path, tiny_model: TinyModel) -> None:
    one, two = (plan_of(tiny_model("bert"), data, rows="word", max_occurrences=7) for _ in range(2))
    assert one.extraction() == two.extraction()
    for name in ("order", "tokens", "truncated", "row_counts", "kept"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    other = plan_of(tiny_model("bert"), data, rows="word", max_occurrences=7, seed=1)
    assert other.order.tolist() != one.order.tolist()


def test_every_text_has_its_place_and_splits_lie_together(data: Path, tiny_model: TinyModel) -> None:
    plan = plan_of(tiny_model("bert"), data)
    assert sorted(plan.order.tolist()) == list(range(len(plan.texts)))
    splits = [plan.texts.split[number] for number in plan.order]
    assert splits == sorted(splits, key=["dev", "train"].index)
    shards = [plan.work(number) for number in range(plan.placement.geometry.shards)]
    assert len(shards) > 4
    assert list(chain(*(work.texts for work in shards))) == [plan.texts.text[number] for number in plan.order]
    assert list(chain(*(work.text_id for work in shards))) == plan.placement.text_id.tolist()


def test_the_plan_counts_what_happens_to_the_texts(tiny_model: TinyModel, tmp_path: Path) -> None:
    file = tmp_path / "all.txt"
    # Six tokens fit: CLS, four letters, SEP. A zero-width space is a word without sub-words.
    file.write_text("abcd\n\n \t\nabcdef\na\u200b b\nabcde fg\n", encoding="utf-8")
    plan = plan_of(tiny_model("bert"), file, rows="word", max_length=6)
    assert plan.counts == {
        "texts": 6,
        "empty_texts": 2,
        "texts_without_rows": 0,
        "truncated_texts": 2,
        "truncated_tokens": 2 + 3,
        "words_without_subwords": 1,
        "words_left_out_by_frequency": 0,
        "tokens": 6 + 2 + 2 + 6 + 4 + 6,
        "special_rows": 6 * 2,
    }
    decoder = plan_of(tiny_model("gpt2"), file, rows="word", max_length=6)
    assert decoder.counts["texts_without_rows"] == 2  # the empty text and the blank one


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"min_count": 2}, "--min-count and --max-occurrences choose words; they need --rows word"),
    ({"max_occurrences": 2}, "--min-count and --max-occurrences choose words; they need --rows word"),
    ({"rows": "word", "max_occurrences": 0}, "--max-occurrences is 0; it must be at least 1"),
    (
        {"rows": "word", "min_count": 2, "train_split": "test"},
        "there is no split 'test' to count words in; there is dev, train: give --train-split",
    ),
    ({"max_length": 65}, "--max-length is 65; NAME takes 2 to 64 tokens"),
    ({"max_length": 1}, "--max-length is 1; NAME takes 2 to 64 tokens"),
    ({"batch_tokens": 0}, "--batch-tokens is 0; it must be at least 1"),
    (
        {"task": "classify"},
        "the label 'anger' is not a class of NAME (its classes are LABEL_0, LABEL_1): give the labels as the model's "
        "class names or numbers, or use --task none",
    ),
]


@pytest.mark.parametrize(("settings", "message"), MISTAKES, ids=str)
def test_settings_that_cannot_work_are_named(
    settings: dict[str, Any], message: str, data: Path, tiny_model: TinyModel
) -> None:
    folder = tiny_model("bert")
    with pytest.raises(ConfigError) as caught:
        plan_of(folder, data, **settings)
    assert str(caught.value) == message.replace("NAME", folder.name)


def test_more_labels_than_classes_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a", "label": 2}\n')
    folder = tiny_model("bert")
    message = f"^the data has 3 labels and {folder.name} knows 2 classes \\(LABEL_0, LABEL_1\\): use a model of this"
    with pytest.raises(ConfigError, match=message):
        plan_of(folder, file, task="classify")


def test_a_plan_without_rows_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n\n")
    message = r"^no text has a row left: the texts are empty, or --min-count is too high$"
    with pytest.raises(ConfigError, match=message):
        plan_of(tiny_model("gpt2"), file)


def test_labels_given_as_names_are_numbered_like_the_models_classes(data: Path, tiny_model: TinyModel) -> None:
    names = ("Joy", "anger", "Fear")
    model = tiny_model("bert", classes=3, id2label=tuple(enumerate(names)))
    plain, plan = plan_of(model, data), plan_of(model, data, task="classify")
    assert plain.texts.class_names == ["anger", "fear", "joy"]
    assert plan.texts.class_names == list(names)
    for before, after in zip(plain.texts.label, plan.texts.label, strict=True):
        assert (before is None) == (after is None)
        if before is not None and after is not None:
            assert names[after].casefold() == plain.texts.class_names[before]


@given(st.lists(st.integers(0, 64), max_size=60), st.integers(1, 400))
def test_batches_hold_each_text_once_and_are_mostly_real(lengths: list[int], slots: int) -> None:
    made = [batch.tolist() for batch in batches(np.array(lengths, dtype=np.int64), slots=slots)]
    assert sorted(chain(*made)) == [number for number, length in enumerate(lengths) if length]
    for batch in made:
        own = [lengths[number] for number in batch]
        assert own[0] == max(own)
        if len(batch) > 1:
            assert len(batch) * own[0] <= slots
            assert sum(own) >= 0.9 * len(batch) * own[0]


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path, data: Path) -> None:
    folder = make_model(tmp_path / "model", "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    with pytest.raises(ModelError, match=r"gives token \d+ and the model knows 20: they do not belong together"):
        plan_of(folder, data)
