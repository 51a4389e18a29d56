"""Items: drawn by design, shown alike for all methods, with the key apart."""

import json
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clvq
import numpy as np
import pytest
import torch
from clvq.errors import ConfigError, DataError, DataNotFound, FormatVersion
from clvq.evaluation.rows import rows_by_text
from clvq.evaluation.saliency import run_clean, salient_row
from clvq.evaluation.study.items import Items, Sentence, Word, key_path, read_items, read_key
from clvq.evaluation.study.make import ItemConfig, ItemsResult, make_items
from clvq.evaluation.study.sampling import allocate, draw
from clvq.evaluation.study.views import NOTHING, Portrait, _trimmed, equal_views
from clvq.trainer.fit import fit
from clvq.trainer.methods import method_config
from clvq.trainer.run import Run
from hypothesis import given
from hypothesis import strategies as st

from . import tiny
from .study_maker import make_items as make_synthetic
from .worded import make_worded


@dataclass(frozen=True)
class Made:
    """A tiny classifier's cache, two runs, and what makes items of them."""

    cache: clvq.Cache
    runs: dict[str, Path]
    model: Any

    def items(self, out: Path, **settings: Any) -> ItemsResult:
        config = ItemConfig(**({"items": 20} | settings))
        return make_items(self.cache, self.runs, out, lambda: self.model, config)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    names = ((0, "anger"), (1, "fear"), (2, "joy"))
    model = tiny.make_model(folder / "model", "bert", classes=3, id2label=names)
    plan = tiny.plan_of(model, tiny.write_texts(folder / "data", texts=160), rows="word", task="classify")
    tiny.run(plan, folder / "cache")
    cache = clvq.Cache(folder / "cache")
    for seed in (0, 1):
        config = method_config(
            "kmeans", preset="default", lower="hidden.1", upper="hidden.3", codes=8, held_out="dev", seed=seed
        )
        fit(cache, config, folder / f"run-{seed}", device=torch.device("cpu"))
    runs = {f"run-{seed}": folder / f"run-{seed}" for seed in (0, 1)}
    return Made(cache, runs, tiny.load(plan.source, task="classify"))


@pytest.fixture(scope="module")
def result(made: Made, tmp_path_factory: pytest.TempPathFactory) -> ItemsResult:
    return made.items(tmp_path_factory.mktemp("items") / "items.json")


def test_the_item_file_says_nothing_of_runs_labels_or_controls(result: ItemsResult):
    text = result.path.read_text()
    for secret in ("run-0", "run-1", "kmeans", "duplicate", "once more", "another text", "text_id", '"label"'):
        assert secret not in text
    assert len(result.items.methods) == 4
    assert list(result.items.methods) == sorted(result.items.methods)


def test_the_key_is_for_its_owner_alone_and_belongs_to_one_item_file(result: ItemsResult, tmp_path: Path):
    assert stat.S_IMODE(result.key.stat().st_mode) == 0o600
    items, digest = read_items(result.path)
    assert items == result.items
    key = read_key(result.key, digest)
    assert Counter(method.role for method in key.methods.values()) == {"run": 2, "duplicate": 1, "random": 1}
    with pytest.raises(DataError, match=r"is the key of the item file .*give the key that was written with it"):
        read_key(result.key, "0" * 64)


def test_each_item_shows_the_concept_of_the_most_salient_word(made: Made, result: ItemsResult):
    key = read_key(result.key, result.digest)
    runs = {name: Run.from_pretrained(path) for name, path in made.runs.items()}
    texts = {rows.text: rows for rows in rows_by_text(made.cache, np.ones(len(made.cache.texts), dtype=bool))}
    for item in result.items.of_kind("main"):
        keyed = key.items[item.id]
        rows = texts[int(made.cache.text_index[keyed.text_id])]
        ids = made.model.source.tokenize([item.text], max_length=32)[0].ids.tolist()
        clean = run_clean(made.model, "hidden.1", [ids])
        number = salient_row(rows, clean.attribution[0])
        row = rows.row[[number]]
        start, end = (int(made.cache.column(name)[row[0]]) for name in ("char_start", "char_end"))
        assert item.salient == (start, end)
        assert item.prediction == int(clean.probabilities[0].argmax())
        for blind, method in key.methods.items():
            if method.role == "run":
                assert keyed.concepts[blind] == runs[method.name].assign(made.cache.vectors("hidden.1", row))[0]


def test_all_methods_of_an_item_show_equally_many_words_and_sentences(result: ItemsResult):
    for item in result.items.of_kind("main"):
        full = [view for view in item.concepts.values() if not view.empty]
        assert full
        assert len({(len(view.words), len(view.sentences)) for view in full}) == 1
        assert all(view.words for view in full)


def test_the_text_itself_and_repetitions_are_not_among_the_sentences(made: Made, tmp_path: Path):
    # Of texts that are also in the training split, so that their own sentences are among the members.
    own = made.items(tmp_path / "items.json", split=("train",), items=60, sentences=20)
    for item in own.items.of_kind("main"):
        for view in item.concepts.values():
            lines = [f"{part.before}{part.word}{part.after}" for part in view.sentences]
            assert item.text not in lines
            assert len(set(lines)) == len(lines)


def test_words_and_shares_are_those_of_the_training_rows(made: Made, result: ItemsResult):
    key = read_key(result.key, result.digest)
    blind, method = next((blind, one) for blind, one in key.methods.items() if one.role == "run")
    run = Run.from_pretrained(made.runs[method.name])
    train = made.cache.splits(["train"])
    rows = made.cache.rows_of(train, special=run.config.special)
    codes = run.assign(made.cache.vectors("hidden.1", rows))
    item = result.items.of_kind("main")[0]
    mine = rows[codes == key.items[item.id].concepts[blind]]
    said = []
    for row in mine.tolist():
        text = made.cache.texts["text"][int(made.cache.text_index[made.cache.column("text")[row]])].as_py()
        if made.cache.column("special")[row]:
            said.append("‹special token›")
        else:
            said.append(text[made.cache.column("char_start")[row] : made.cache.column("char_end")[row]].lower())
    counts = Counter(said)
    for word in item.concepts[blind].words:
        assert word.share == pytest.approx(counts[word.word] / len(mine))
    assert [counts[word.word] for word in item.concepts[blind].words] == sorted(counts.values(), reverse=True)[
        : len(item.concepts[blind].words)
    ]


def test_the_duplicate_shows_what_its_original_shows(result: ItemsResult):
    key = read_key(result.key, result.digest)
    (blind,) = [blind for blind, method in key.methods.items() if method.role == "duplicate"]
    original = key.methods[blind].of
    for item in result.items.items:
        if item.kind != "attention":
            assert item.concepts[blind] == item.concepts[original or ""]


def test_the_random_control_lends_each_texts_concept_to_another_text_once(result: ItemsResult):
    key = read_key(result.key, result.digest)
    (blind,) = [blind for blind, method in key.methods.items() if method.role == "random"]
    by_name = {method.name: own for own, method in key.methods.items() if method.role == "run"}
    mine = [key.items[item.id] for item in result.items.of_kind("main")]
    assert {keyed.drawn_from for keyed in mine} <= set(by_name)
    for run, own in by_name.items():
        lent = Counter(keyed.concepts[blind] for keyed in mine if keyed.drawn_from == run)
        assert lent <= Counter(keyed.concepts[own] for keyed in mine)


def test_equal_settings_give_equal_bytes_and_others_are_refused(made: Made, tmp_path: Path):
    out = tmp_path / "items.json"
    first = made.items(out, items=5)
    data = out.read_bytes(), first.key.read_bytes()
    assert made.items(out, items=5) == first
    assert (out.read_bytes(), first.key.read_bytes()) == data
    with pytest.raises(ConfigError, match="made with other settings or runs; answers may belong to it: give another"):
        made.items(out, items=6)
    assert out.read_bytes() == data[0]
    again = make_items(
        made.cache, made.runs, out, lambda: made.model, ItemConfig(items=6), force=True
    )  # fmt: skip
    assert len(again.items.of_kind("main")) == 6
    read_key(again.key, again.digest)


def test_items_to_practise_on_are_of_other_texts(made: Made, tmp_path: Path):
    found = made.items(tmp_path / "items.json", items=10, training=4, attention=5).items
    texts = [item.text for item in found.items if item.kind != "attention"]
    assert len(texts) == len(set(texts)) == 14
    asked = [item.prediction for item in found.of_kind("attention")]
    assert Counter(asked) == {0: 2, 1: 2, 2: 1}
    assert {item.best for item in found.of_kind("attention")} <= set(found.methods)


def test_classes_may_be_named_anew(made: Made, tmp_path: Path):
    found = made.items(tmp_path / "a.json", items=3, classes=("rage", "fright", "delight"))
    assert found.items.classes == ("rage", "fright", "delight")
    with pytest.raises(
        ConfigError, match=r"--classes names a, b, and the model .* tells 3 classes apart \(anger, fear"
    ):
        made.items(tmp_path / "b.json", classes=("a", "b"))


def test_what_cannot_be_made_into_items_is_refused_before_the_model_is_loaded(made: Made, tmp_path: Path):
    plain = make_worded(tmp_path / "plain", predictions=False).cache
    config = method_config("kmeans", preset="default", lower="hidden.1", upper="hidden.2", codes=4, held_out="dev")
    fit(plain, config, tmp_path / "run", device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="extracted without predictions, which items are about"):
        make_items(plain, {"run": tmp_path / "run"}, tmp_path / "i.json", lambda: 1 / 0, ItemConfig())
    with pytest.raises(ConfigError, match=r"an item file is JSON; give a name such as .*items\.json"):
        make_items(made.cache, made.runs, tmp_path / "items", lambda: 1 / 0, ItemConfig())
    with pytest.raises(ConfigError, match="one run without controls has nothing to be compared with"):
        make_items(
            made.cache, {"run-0": made.runs["run-0"]}, tmp_path / "i.json", lambda: made.model,
            ItemConfig(duplicate=False, random=False),
        )  # fmt: skip


def test_runs_of_different_lower_sites_are_refused(made: Made, tmp_path: Path):
    config = method_config("kmeans", preset="default", lower="hidden.3", upper="hidden.3", codes=4, held_out="dev")
    fit(made.cache, config, tmp_path / "upper", device=torch.device("cpu"))
    runs = {**made.runs, "upper": tmp_path / "upper"}
    with pytest.raises(
        ConfigError, match=r"different lower sites \(hidden.1, hidden.3\), and an item shows one salient"
    ):
        make_items(made.cache, runs, tmp_path / "i.json", lambda: 1 / 0, ItemConfig())


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(0, 200), st.booleans())
def test_an_allocation_takes_what_there_is_and_leaves_no_stratum_out(sizes: list[int], count: int, equal: bool):
    amounts = allocate(np.array(sizes), min(count, sum(sizes)), "equal" if equal else "proportional")
    assert amounts.sum() == min(count, sum(sizes))
    assert (amounts <= sizes).all()
    if count >= len(sizes):
        assert (amounts >= 1).all()


def test_proportional_allocation_keeps_shares_and_equal_allocation_does_not():
    assert allocate(np.array([700, 200, 100]), 50, "proportional").tolist() == [35, 10, 5]
    assert allocate(np.array([700, 200, 4]), 50, "equal").tolist() == [23, 23, 4]


@given(st.lists(st.sampled_from([(0, True), (0, False), (1, True), (1, None)]), min_size=1, max_size=80), st.data())
def test_weights_give_each_stratum_its_share_of_the_population(kinds: list[Any], data: st.DataObject):
    count = data.draw(st.integers(4, 100))
    drawn = draw(kinds, count, allocation=data.draw(st.sampled_from(["proportional", "equal"])), seed=0)
    assert len(set(drawn.texts)) == len(drawn.texts) == min(count, len(kinds))
    assert np.mean(drawn.weights) == pytest.approx(1)
    total = Counter[Any]()
    for text, weight in zip(drawn.texts, drawn.weights, strict=True):
        total[kinds[text]] += weight
    for kind, size in Counter(kinds).items():
        assert total[kind] / sum(total.values()) == pytest.approx(size / len(kinds))


def test_views_are_cut_to_the_shortest_and_empty_ones_do_not_count():
    def portrait(words: int, sentences: int) -> Portrait:
        return Portrait(
            tuple(Word(word=f"w{number}", share=0.1) for number in range(words)),
            tuple((f"t{number}", Sentence(before="", word=f"{number}", after="")) for number in range(sentences)),
            (),
        )

    views = equal_views(
        {"a": portrait(9, 8), "b": portrait(3, 4), "c": NOTHING}, "t0", words=5, sentences=5
    )  # fmt: skip
    assert {name: (len(view.words), len(view.sentences)) for name, view in views.items()} == {
        "a": (3, 3), "b": (3, 3), "c": (0, 0),
    }  # fmt: skip
    assert [part.word for part in views["a"].sentences] == ["1", "2", "3"]
    assert views["c"].empty


def test_spaces_that_a_tokenizer_counts_to_a_word_stand_outside_of_it():
    assert _trimmed("they", " rose ", "again") == ("they ", "rose", " again")
    assert _trimmed("a", "b", "c") == ("a", "b", "c")
    assert _trimmed("a", "  ", "c") == ("a", "  ", "c")


def _damaged(path: Path, change: Any) -> Path:
    plain = json.loads(path.read_bytes())
    change(plain)
    path.write_text(json.dumps(plain))
    return path


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda plain: plain.update(format="other"), DataError, "has the format 'other' instead of 'clvq-items'"),
        (lambda plain: plain.update(version=2), FormatVersion, "has version 2, and this clvq reads 1"),
        (lambda plain: plain.update(extra=1), DataError, "is no clvq-items file: extra"),
        (lambda plain: plain["methods"].append(plain["methods"][0]), DataError, "a blind id stands for two methods"),
        (lambda plain: plain["items"].append(plain["items"][0]), DataError, "two items have the same id"),
        (lambda plain: plain["items"][0]["concepts"].clear(), DataError, "has concepts of \\[\\] instead of"),
        (lambda plain: plain["items"][0].update(prediction=9), DataError, "has class 9 of 2"),
        (lambda plain: plain["items"][0].update(best="zzz"), DataError, "has the best method zzz"),
        (lambda plain: plain["items"][0].update(weight=-1), DataError, "items.0.weight"),
        (lambda plain: plain["items"][0].update(id="../x"), DataError, "items.0.id"),
    ],
)
def test_a_damaged_item_file_is_refused_with_the_place(tmp_path: Path, change: Any, error: Any, message: str):
    make_synthetic(tmp_path / "items.json", items=2)
    with pytest.raises(error, match=message):
        read_items(_damaged(tmp_path / "items.json", change))


def test_what_is_no_item_file_is_refused(tmp_path: Path):
    with pytest.raises(DataNotFound, match="is not there, or is a folder, and is to be an item file: make one with"):
        read_items(tmp_path)
    (tmp_path / "junk.json").write_bytes(b"\xff{")
    with pytest.raises(DataError, match="is not JSON"):
        read_items(tmp_path / "junk.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(DataError, match="has the format None instead of 'clvq-items'"):
        read_items(tmp_path / "list.json")


def test_an_item_file_comes_back_as_it_was(tmp_path: Path):
    made = make_synthetic(tmp_path / "items.json", hostile=True)
    found, digest = read_items(tmp_path / "items.json")
    assert found == made
    assert isinstance(found, Items)
    assert read_key(key_path(tmp_path / "items.json"), digest).items_sha256 == digest
