"""Prompted decoders: the tokens around a text, the answers' logits, and what becomes of the rows."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import clvq
import numpy as np
import pytest
import torch
from clvq import cli
from clvq.cache.layout import Manifest, sealed_json
from clvq.cache.repair import repair
from clvq.cache.verify import verify
from clvq.errors import ConfigError
from clvq.pipeline.forward import load_model
from clvq.pipeline.prompt import Prompt
from clvq.pipeline.remake import Extractor
from clvq.pipeline.source import ModelSource, find_model
from clvq.pipeline.words import find_words, word_rows
from clvq.pipeline.work import all_rows, tokenise
from hypothesis import given
from hypothesis import strategies as st

from .tiny import KINDS, make_config, make_tokenizer, plan_of, run, write_texts

TinyModel = Callable[..., Path]
WORDING = "say how\n{text}\nit is. mood: "
ANSWERS = ("joy", "anger", "fear")
CHAT = (
    "{{ '<s>' }}{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@cache
def source(kind: str) -> ModelSource:
    tokenizer = make_tokenizer(kind)
    return ModelSource("tiny", None, Path("nowhere"), make_config("llama", tokenizer), tokenizer)


def prompt_of(kind: str, wording: str = WORDING, answers: tuple[str, ...] = ANSWERS, *, chat: bool = False) -> Prompt:
    return Prompt(source(kind).tokenizer, wording, answers, chat=chat)


def pieces(kind: str, ids: Any) -> list[str]:
    names: list[str] = source(kind).tokenizer.convert_ids_to_tokens(list(ids))
    return names


# Any text, and characters that tokenizers drop, split, merge with their neighbours or take for their own tokens.
_ODD = st.lists(
    st.sampled_from(["the", " t", "\n", "  ", "👩", "e\u0301", "\u0301", "\u200b", "[SEP]", "</s>", "{text}"])
)
TEXTS = st.one_of(st.text(max_size=40), _ODD.map("".join))
# A tokenizer begins anew after its own special tokens, so that what follows them may be cut up otherwise.
PLAIN_TEXTS = TEXTS.filter(lambda text: not any(token in text for token in ("[SEP]", "</s>", "<s>", "<pad>", "<unk>")))


@given(text=TEXTS, kind=st.sampled_from(KINDS))
def test_the_model_is_given_the_prompt_with_the_text_as_one_string(text: str, kind: str) -> None:
    tokens = prompt_of(kind).tokenize([text], max_length=10_000)[0]
    tokenizer = source(kind).tokenizer
    whole = tokenizer(f"say how\n{text}\nit is. mood:")["input_ids"]
    if kind == "wordpiece":
        assert whole.pop() == tokenizer.sep_token_id
    # The blank before the answers is a token of its own, but where it is not.
    blank = {"wordpiece": [], "bytes": ["Ġ"], "metaspace": ["▁"]}[kind]
    assert tokens.ids.tolist() == whole + tokenizer.convert_tokens_to_ids(blank)
    assert tokens.truncated == 0
    assert tokens.cut == len(text)


@given(text=PLAIN_TEXTS, kind=st.sampled_from(KINDS))
def test_the_prompts_own_tokens_are_the_same_whatever_the_text_is(text: str, kind: str) -> None:
    tokens = prompt_of(kind).tokenize([text], max_length=10_000)[0]
    empty = prompt_of(kind).tokenize([""], max_length=10_000)[0]
    assert tokens.ids[tokens.kind > 0].tolist() == empty.ids.tolist()
    assert empty.kind.tolist() == tokens.kind[tokens.kind > 0].tolist()
    assert set(empty.kind.tolist()) <= {1, 3}
    assert (tokens.kind == 1).sum() == (kind != "bytes")
    own = tokens.kind == 0
    inside = np.flatnonzero(own)
    assert (np.diff(inside) == 1).all()
    assert ((tokens.start >= 0) & (tokens.start <= tokens.end) & (tokens.end <= len(text))).all()
    assert not tokens.start[~own].any()
    assert not tokens.end[~own].any()
    if kind != "wordpiece":
        # These tokenizers drop no character.
        covered = {place for start, end in zip(tokens.start, tokens.end, strict=True) for place in range(start, end)}
        assert covered == set(range(len(text)))


@given(text=PLAIN_TEXTS, kind=st.sampled_from(KINDS), room=st.integers(0, 20))
def test_only_the_end_of_the_text_is_ever_cut(text: str, kind: str, room: int) -> None:
    prompt = prompt_of(kind)
    most = prompt.shortest + room
    (whole,) = prompt.tokenize([text], max_length=10_000)
    (tokens,) = prompt.tokenize([text], max_length=most)
    assert len(tokens.ids) <= most
    assert tokens.truncated == len(whole.ids) - len(tokens.ids)
    assert (tokens.truncated > 0) == (len(whole.ids) > most)
    assert tokens.ids[tokens.kind > 0].tolist() == whole.ids[whole.kind > 0].tolist()
    np.testing.assert_array_equal(tokens.ids, prompt.tokenize([text[: tokens.cut]], max_length=10_000)[0].ids)
    assert (tokens.end <= tokens.cut).all()
    rows, _ = word_rows(text, tokens)
    kept = [span for span in find_words(text) if span[1] <= tokens.cut]
    words = rows.take(rows.special == 0)
    assert set(zip(words.char_start, words.char_end, strict=True)) <= set(kept)


@pytest.mark.parametrize(
    ("kind", "text", "room", "words", "truncated"),
    [
        ("bytes", "ok 👩 a", 10, ["ok", "👩", "a"], 0),
        ("bytes", "ok 👩 a", 6, ["ok", "👩"], 2),
        # An emoji of three tokens, of which two have room: it goes as a whole.
        ("bytes", "ok 👩 a", 5, ["ok"], 5),
        ("bytes", "ok 👩 a", 0, [], 8),
        ("wordpiece", "abc de", 4, ["abc"], 1),
        ("wordpiece", "abc de", 2, [], 3),
        ("metaspace", "don't go", 4, ["don't"], 2),
    ],
)
def test_a_word_that_the_window_cuts_is_left_out(
    kind: str, text: str, room: int, words: list[str], truncated: int
) -> None:
    prompt = prompt_of(kind)
    (tokens,) = prompt.tokenize([text], max_length=prompt.shortest + room)
    rows, lost = word_rows(text, tokens)
    inner = rows.take(rows.special == 0)
    assert [text[start:end] for start, end in zip(inner.char_start, inner.char_end, strict=True)] == words
    assert tokens.truncated == truncated
    assert lost == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the", [("h", 3, 0, 0), ("i", 3, 0, 0), ("Ġthe", 0, 0, 3), (".", 3, 0, 0)]),
        ("ok", [("h", 3, 0, 0), ("i", 3, 0, 0), ("Ġ", 3, 0, 0), ("o", 0, 0, 1), ("k", 0, 1, 2), (".", 3, 0, 0)]),
        ("", [("h", 3, 0, 0), ("i", 3, 0, 0), ("Ġ", 3, 0, 0), (".", 3, 0, 0)]),
    ],
)
def test_a_token_that_reaches_into_the_text_is_the_texts(text: str, expected: list[tuple[str, int, int, int]]) -> None:
    (tokens,) = prompt_of("bytes", "hi {text}.", ("a", "b")).tokenize([text], max_length=64)
    assert list(zip(pieces("bytes", tokens.ids), tokens.kind, tokens.start, tokens.end, strict=True)) == expected


def test_an_empty_text_has_no_token_even_where_one_reaches_over_its_place() -> None:
    (tokens,) = prompt_of("bytes", "h{text}e\n", ("a", "b")).tokenize([""], max_length=64)
    assert list(zip(pieces("bytes", tokens.ids), tokens.kind, strict=True)) == [("he", 3), ("Ċ", 3)]


@pytest.mark.parametrize(
    ("kind", "wording", "answers", "fed", "told_apart"),
    [
        # A blank that is a token of its own is given to the model.
        ("bytes", "a\n{text}\nb: ", ("no", "yes"), ["b", ":", "Ġ"], ["n", "y"]),
        ("bytes", "a\n{text}\nb: ", ("the", "tall"), ["b", ":"], ["Ġthe", "Ġt"]),
        ("bytes", "a\n{text}\nb:", ("the", "all"), ["b", ":"], ["t", "a"]),
        ("bytes", "a\n{text}\nb:   ", ("no", "yes"), [":", "Ġ", "Ġ", "Ġ"], ["n", "y"]),
        ("bytes", "{text}\n", ("0", "1", "2"), ["Ċ"], ["0", "1", "2"]),
        ("metaspace", "a\n{text}\nb: ", ("no", "yes"), ["b", "<0x3A>", "▁"], ["n", "y"]),
        ("metaspace", "a\n{text}\nb: ", ("the", "yes"), ["b", "<0x3A>"], ["▁the", "▁"]),
        ("wordpiece", "a\n{text}\nb: ", ("no", "yes"), ["b", ":"], ["n", "y"]),
        ("wordpiece", "a\n{text}\nb", ("no", "yes"), ["b"], ["##n", "##y"]),
    ],
)
def test_answers_are_told_apart_by_the_token_that_follows_what_they_share(
    kind: str, wording: str, answers: tuple[str, ...], fed: list[str], told_apart: list[str]
) -> None:
    prompt = prompt_of(kind, wording, answers)
    (tokens,) = prompt.tokenize(["ok"], max_length=64)
    assert pieces(kind, tokens.ids)[-len(fed) :] == fed
    assert pieces(kind, prompt.answer_ids) == told_apart
    # Which is how the tokenizer goes on where the answer stands there.
    for answer, token in zip(answers, prompt.answer_ids, strict=True):
        said = source(kind).tokenizer(wording.replace("{text}", "ok") + answer)["input_ids"]
        assert said[: len(tokens.ids) + 1] == [*tokens.ids.tolist(), token]


MISTAKES = {
    "no place": ("what is it? ", ANSWERS, "the prompt has no places for the text: write {text} in it exactly once"),
    "two places": (
        "{text} or {text}? ",
        ANSWERS,
        "the prompt has 2 places for the text: write {text} in it exactly once",
    ),
    "nothing after the text": (
        "say: {text} ",
        ANSWERS,
        "the prompt ends with {text}, and what the model says next is read off its end: write something after it, such "
        "as a line break and 'Answer: '",
    ),
    "one answer": (WORDING, ("yes",), "--answers gives 1 to choose from: give two or more, such as --answers no,yes"),
    "an empty answer": (WORDING, ("yes", " "), "answer 2 is empty: give --answers such as no,yes"),
    "an answer twice": (WORDING, ("no", "yes", "no"), "the answer 'no' is given twice"),
    "one beginning": (
        WORDING,
        ("x", "nah", "no"),
        "the answers 'nah' and 'no' begin with the same token, and cannot be told apart by it: choose answers that "
        "differ from their beginning on",
    ),
    "one within the other": (
        WORDING,
        ("no", "no way"),
        "the answers 'no' and 'no way' begin with the same token, and cannot be told apart by it: choose answers that "
        "differ from their beginning on",
    ),
    "an end that melts": (
        "{text}\nh",
        ("x", "e"),
        "the end of the prompt has other tokens where the answer 'e' follows: end the prompt with a blank or a line "
        "break",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_prompt_that_cannot_work_is_named(mistake: str) -> None:
    wording, answers, message = MISTAKES[mistake]
    with pytest.raises(ConfigError) as caught:
        prompt_of("bytes", wording, answers)
    assert str(caught.value) == message


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data") / "texts", texts=140)


def prompted(**settings: Any) -> dict[str, Any]:
    given = {"task": "prompt", "prompt": WORDING, "answers": ANSWERS, "answer_names": ANSWERS, "max_length": 50}
    return given | settings


@pytest.mark.parametrize(("family", "settings"), [("gpt2", {}), ("llama", {"rows": "word"})], ids=str)
def test_logits_and_rows_are_what_the_model_gives_for_the_prompt(
    family: str, settings: dict[str, Any], data: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model(family, continues=True)
    plan = plan_of(folder, data, **prompted(encoding="fp32", **settings))
    result = run(plan, tmp_path / "cache")
    made = clvq.Cache(tmp_path / "cache")
    assert made.manifest.class_names == list(ANSWERS)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    said = [answer[0] for answer in ANSWERS]
    logits = made.logits()
    column = {name: made.column(name) for name in ("position", "token", "char_start", "char_end", "special", "word")}
    whole = 0
    for place, row in enumerate(made.texts.to_pylist()):
        source = json.loads((data / f"{row['split']}.jsonl").read_text().splitlines()[row["source_row"]])
        assert (made.manifest.class_names[row["label"]] if row["label"] is not None else None) == source["label"]
        if row["truncated_tokens"]:
            continue
        whole += 1
        ids = tokenizer(f"say how\n{row['text']}\nit is. mood:")["input_ids"]
        ids.append(tokenizer.convert_tokens_to_ids({"gpt2": "Ġ", "llama": "▁"}[family]))
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        expected = output.logits[0, -1, tokenizer.convert_tokens_to_ids(said)].numpy()
        np.testing.assert_allclose(logits[place], expected, rtol=1e-3, atol=1e-4)
        assert row["prediction"] == expected.argmax()
        own = np.arange(row["first_row"], row["first_row"] + row["row_count"])
        position = column["position"][own]
        assert column["token"][own].tolist() == np.array(ids)[position].tolist()
        np.testing.assert_allclose(
            made.vectors("hidden.1", own), output.hidden_states[1][0][position], rtol=1e-3, atol=1e-4
        )
        outside = column["special"][own] > 0
        assert not column["char_start"][own][outside].any()
        assert not column["char_end"][own][outside].any()
        assert (column["word"][own][outside] == -1).all()
        spans = list(zip(column["char_start"][own][~outside], column["char_end"][own][~outside], strict=True))
        if plan.config.rows == "word":
            assert spans == find_words(row["text"])
        else:
            assert {place for start, end in spans for place in range(start, end)} == set(range(len(row["text"])))
    assert 0 < whole < len(made.texts)
    assert result.counts["truncated_texts"] == len(made.texts) - whole
    shortest = len(tokenizer("say how\n\nit is. mood: ")["input_ids"])
    leading = family == "llama"
    assert result.counts["instruction_rows"] == (shortest - leading) * len(made.texts)
    assert result.counts["special_rows"] == leading * len(made.texts)
    assert (column["special"][: made.manifest.geometry.row_places] == 3).sum() == result.counts["instruction_rows"]


def test_a_window_without_room_for_the_prompt_is_refused(data: Path, tiny_model: TinyModel) -> None:
    message = r"^the prompt alone has 22 tokens and --max-length is 21: shorten the prompt, or give a larger --max-"
    with pytest.raises(ConfigError, match=message):
        plan_of(tiny_model("gpt2", continues=True), data, **prompted(max_length=21))


BEGINNINGS = [
    ("gpt2", "{text}\nmood: ", True),
    ("gpt2", WORDING, False),
    # Its tokenizer puts a token of its own before all.
    ("llama", "{text}\nmood: ", False),
]


@pytest.mark.parametrize(("family", "wording", "warned"), BEGINNINGS)
def test_a_text_that_holds_the_models_first_token_is_warned_of(
    family: str,
    wording: str,
    warned: bool,
    data: Path,
    tiny_model: TinyModel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan_of(tiny_model(family, continues=True), data, **prompted(prompt=wording))
    message = (
        "the prompt begins with {text}, and the tokenizer puts nothing before it: decoders often give the very first "
        "token a norm a hundred times that of others, and here it is a row of each text, which then decides what "
        "codes, errors and removed norms say: write a word before {text}, such as 'Text: '"
    )
    assert caplog.messages == [message] * warned


LABELS = [
    (
        "joy,anger",
        "the label 'fear' is none of the answers (the answers are joy, anger): name the answers as the labels",
    ),
    ("joy,anger,sad", "the label 'fear' is none of the answers (the answers are joy, anger, sad): name the answers as"),
]


@pytest.mark.parametrize(("answers", "message"), LABELS)
def test_labels_that_are_no_answers_are_refused(answers: str, message: str, data: Path, tiny_model: TinyModel) -> None:
    given = tuple(answers.split(","))
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        plan_of(tiny_model("gpt2", continues=True), data, **prompted(answers=given, answer_names=given))


def test_more_numbered_labels_than_answers_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 3}\n')
    message = r"^the data has 4 labels and there are 3 answers \(joy, anger, fear\): give --answers one for each label$"
    with pytest.raises(ConfigError, match=message):
        plan_of(tiny_model("gpt2", continues=True), tmp_path / "a.jsonl", **prompted())


def test_a_task_without_its_prompt_is_refused(data: Path, tiny_model: TinyModel) -> None:
    for wrong in ({"task": "prompt"}, prompted(task="none"), prompted(answer_names=()), {"answers": ANSWERS}):
        with pytest.raises(ConfigError, match=r"^a prompt, and answers with their names, belong to --task prompt, and"):
            plan_of(tiny_model("gpt2", continues=True), data, **wrong)


@pytest.mark.parametrize("rows", ["token", "word"])
def test_policies_mark_rows_keep_them_as_the_texts_or_leave_them_out(
    rows: str, data: Path, tiny_model: TinyModel
) -> None:
    model = tiny_model("llama", continues=True)

    def counted(**settings: Any) -> tuple[list[int], dict[str, int], list[list[int]]]:
        plan = plan_of(model, data, **prompted(rows=rows, **settings))
        kinds, positions = np.zeros(4, dtype=np.int64), []
        tokens = tokenise(plan.source, plan.config, plan.texts.text)
        for text, part in zip(plan.texts.text, tokens, strict=True):
            own, _ = all_rows(plan.config, text, part)
            kinds += np.bincount(own.special, minlength=4)
            positions.append(own.position.tolist())
        assert plan.row_counts.sum() == kinds.sum()
        return kinds.tolist(), plan.counts, positions

    marked, counts, where = counted()
    assert counts["special_rows"] == marked[1] == 140
    assert counts["instruction_rows"] == marked[3] > 140
    kept, counts, same = counted(special="keep", instruction="keep")
    assert kept == [sum(marked), 0, 0, 0]
    assert same == where
    assert (counts["special_rows"], counts["instruction_rows"]) == (marked[1], marked[3])
    dropped, counts, _ = counted(special="drop", instruction="drop")
    assert dropped == [marked[0], 0, 0, 0]
    assert (counts["special_rows"], counts["instruction_rows"]) == (0, 0)
    assert counts["texts_without_rows"] > 0  # the empty ones
    mixed, _, _ = counted(special="drop", instruction="keep")
    assert mixed == [marked[0] + marked[3], 0, 0, 0]
    mixed, _, _ = counted(instruction="drop")
    assert mixed == [marked[0], marked[1], 0, 0]


@pytest.mark.parametrize("instruction", ["mark", "keep", "drop"])
def test_the_frequency_filter_counts_words_of_texts_alone(instruction: str, data: Path, tiny_model: TinyModel) -> None:
    model = tiny_model("llama", continues=True)
    limits = {"rows": "word", "min_count": 5, "max_occurrences": 9}
    plain = plan_of(model, data, **prompted(**limits))
    plan = plan_of(model, data, **prompted(instruction=instruction, **limits))
    outside = plain.counts["instruction_rows"] if instruction == "drop" else 0
    assert plan.row_counts.sum() == plain.row_counts.sum() - outside
    assert plan.counts["words_left_out_by_frequency"] == plain.counts["words_left_out_by_frequency"] > 0


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["clvq", *map(str, words), "--json"])
    capsys.readouterr()
    with suppress(SystemExit):
        cli.main()
    return json.loads(capsys.readouterr().out)


def test_a_prompted_cache_is_repaired_trained_from_and_ablated(
    data: Path,
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(tiny_model("llama", continues=True), model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))
    (tmp_path / "p.txt").write_text("how is\n{text}\n")
    words = [
        "--task",
        "prompt",
        "--prompt",
        tmp_path / "p.txt",
        "--answers",
        "JOY=glad,anger,fear",
        "--special",
        "drop",
    ]
    extract = ["extract", model, data, "--sites", "1,3", "--out", out, *words, "--batch-tokens", 256]

    plan = command(monkeypatch, capsys, *extract, "--dry-run")
    found = command(monkeypatch, capsys, *extract)
    assert plan["instruction_rows"] == found["instruction_rows"] > 0
    assert found["special_rows"] == 0
    made = clvq.Cache(out)
    assert made.manifest.class_names == ["JOY", "anger", "fear"]
    recorded: Any = made.manifest.identity["settings"]
    assert recorded["prompt"] == "<s>[user]how is\n{text}</s>[assistant]"
    assert (recorded["chat"], recorded["answers"], recorded["special"]) == (True, ["glad", "anger", "fear"], "drop")
    card = (out / "README.md").read_text()
    assert "Special tokens have no rows. Tokens of the prompt around the text have rows of their own kind" in card
    assert command(monkeypatch, capsys, "cache", "info", out)["settings"] == recorded

    # From what the cache records alone: the file is not needed again.
    (tmp_path / "p.txt").unlink()
    logits = out / "activations.zarr" / "texts" / "logits" / "c" / "0" / "0"
    before = logits.read_bytes()
    logits.write_bytes(before[:-1])
    command(monkeypatch, capsys, "cache", "repair", out, "--model", model, "--data", data)
    assert logits.read_bytes() == before
    assert verify(out).problems == []

    fit = ["--set", "fit.epochs=1", "--set", "encoder.epochs=1", "--set", "decoder.heads=4", "--held-out", "dev"]
    run_folder = tmp_path / "run"
    command(monkeypatch, capsys, "train", out, "--lower", 1, "--upper", 3, "--codes", 8, *fit, "--out", run_folder)
    ablation = command(
        monkeypatch, capsys, "ablate", out, run_folder, "--model", model, "--read-out", "model", "--out", tmp_path / "a"
    )
    nothing = next(line for line in ablation["lines"] if line["removed"] == "nothing")
    # What the read-out says of the unchanged model is what was stored.
    known = [row for row in made.texts.to_pylist() if row["split"] == "dev" and row["label"] is not None]
    chosen = [row for row in known if row["text"]]
    accuracy = np.mean([row["prediction"] == row["label"] for row in chosen])
    assert nothing["accuracy"]["value"] == pytest.approx(accuracy)


def test_a_cache_from_before_these_settings_is_repaired(data: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    out, model = tmp_path / "cache", tiny_model("bert")
    plan = plan_of(model, data)
    run(plan, out)
    file = out / "manifest.json"
    manifest = Manifest.model_validate_json(file.read_bytes())
    young = ("prompt", "answers", "answer_names", "chat", "special", "instruction")
    settings: Any = manifest.identity["settings"]
    settings = {name: value for name, value in settings.items() if name not in young}
    old = manifest.model_copy(update={"identity": {**manifest.identity, "settings": settings}})
    file.write_bytes(sealed_json(old))
    shard = out / "activations.zarr" / "sites" / "hidden.1" / "c" / "0" / "0"
    before = shard.read_bytes()
    shard.unlink()
    source = find_model(str(model))
    again = Extractor(old, source, str(data), lambda: load_model(source, plan.config, device=torch.device("cpu")))
    assert repair(out, again).mended == ["activations.zarr/sites/hidden.1/c/0/0"]
    assert shard.read_bytes() == before
