"""Words, and which sub-words belong to them. Expected values are written by hand."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from clvq.pipeline.forward import Places, pool
from clvq.pipeline.source import ModelSource
from clvq.pipeline.words import Rows, Tokens, find_words, token_rows, word_rows
from hypothesis import given
from hypothesis import strategies as st

from .tiny import KINDS, make_config, make_tokenizer

NURSE = "👩\u200d⚕\ufe0f"  # one emoji of four characters
CAFES = "cafe\u0301s"  # a decomposed accent
PERSIAN = "می\u200cخواهم"  # one word with a zero-width non-joiner inside


@cache
def source(kind: str) -> ModelSource:
    tokenizer = make_tokenizer(kind)
    return ModelSource("tiny", None, Path("nowhere"), make_config("bert", tokenizer), tokenizer)


def tokens_of(kind: str, text: str, *, max_length: int = 64) -> Tokens:
    return source(kind).tokenize([text], max_length=max_length)[0]


def pieces_of(kind: str, text: str, *, max_length: int = 64) -> tuple[dict[str, list[str]], int]:
    """Each word, as it stands in the text, with its sub-words; and how many words were lost."""
    tokens = tokens_of(kind, text, max_length=max_length)
    rows, lost = word_rows(text, tokens)
    names = source(kind).tokenizer.convert_ids_to_tokens(tokens.ids.tolist())
    words = rows.take(rows.special == 0)
    found = {}
    for start, end, last, count in zip(words.char_start, words.char_end, words.position, words.subwords, strict=True):
        found[text[start:end]] = names[last + 1 - count : last + 1]
    return found, lost


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \n\t ", []),
        ("it's, isn't it?", ["it's", ",", "isn't", "it", "?"]),
        ("dogs' rock’n’roll 'tis", ["dogs", "'", "rock’n’roll", "'", "tis"]),
        ("well-known", ["well", "-", "known"]),
        ("two  spaces\r\nand_lines", ["two", "spaces", "and_lines"]),
        (f"{NURSE}{NURSE} 🇫🇷", [NURSE, NURSE, "🇫🇷"]),
        (f"{CAFES} नमस्ते", [CAFES, "नमस्ते"]),
        ("中文 字。", ["中文", "字", "。"]),
        (f"{PERSIAN} co\u00adop ক্\u200dষ", [PERSIAN, "co\u00adop", "ক্\u200dষ"]),
        ("a\u200bb", ["a", "\u200b", "b"]),
        ("[SEP]!!", ["[", "SEP", "]", "!", "!"]),
        ("3.5%", ["3", ".", "5", "%"]),
    ],
)
def test_words_are_runs_of_letters_and_single_marks(text: str, words: list[str]) -> None:
    assert [text[start:end] for start, end in find_words(text)] == words


TRICKY = f" isn't  well-known\nok {NURSE} {CAFES} नमस्ते 中文 a\u200bb [SEP] {PERSIAN}"


def test_sub_words_of_a_tricky_text_with_a_bert_type_tokenizer() -> None:
    found, lost = pieces_of("wordpiece", TRICKY)
    assert found == {
        "isn't": ["i", "##s", "##n", "'", "t"],
        "well": ["well"],
        "-": ["-"],
        "known": ["known"],
        "ok": ["o", "##k"],
        NURSE: ["[UNK]"],
        CAFES: ["c", "##a", "##f", "##e", "##s"],
        "नमस्ते": ["[UNK]"],
        "中文": ["中", "文"],
        "a": ["a"],
        "b": ["##b"],
        # The tokenizer takes these five characters for its own token, which three words then share.
        "[": ["[SEP]"],
        "SEP": ["[SEP]"],
        "]": ["[SEP]"],
        PERSIAN: ["[UNK]"],
    }
    assert lost == 1  # the zero-width space


def test_sub_words_of_a_tricky_text_with_a_gpt_type_tokenizer() -> None:
    found, lost = pieces_of("bytes", f"{TRICKY[:33]} [SEP] the")
    assert found == {
        "isn't": ["i", "s", "n", "'", "t"],
        "well": ["w", "e", "l", "l"],
        "-": ["-"],
        "known": ["k", "n", "o", "w", "n"],
        "ok": ["o", "k"],
        NURSE: ["ðŁ", "ĳ", "©", "â", "Ģ", "į", "â", "ļ", "ķ", "ï", "¸", "ı"],
        CAFES: ["c", "a", "f", "e", "Ì", "ģ", "s"],
        "[": ["["],
        "SEP": ["S", "E", "P"],
        "]": ["]"],
        "the": ["Ġthe"],
    }
    assert lost == 0


def test_sub_words_of_a_tricky_text_with_a_llama_type_tokenizer() -> None:
    text = f"don't  well-known\nthe {NURSE[0]} a\u200bb 中"
    encoded = source("metaspace").tokenizer(text)
    assert set(encoded.word_ids()) == {None, 0}  # useless for words: one word is the whole text
    found, lost = pieces_of("metaspace", text)
    assert found == {
        "don't": ["▁", "don", "'", "t"],
        "well": ["w", "e", "l", "l"],
        "-": ["-"],
        "known": ["k", "n", "o", "w", "n"],
        "the": ["t", "he"],
        NURSE[0]: ["<0xF0>", "<0x9F>", "<0x91>", "<0xA9>"],
        "a": ["a"],
        "\u200b": ["<0xE2>", "<0x80>", "<0x8B>"],
        "b": ["b"],
        "中": ["<0xE4>", "<0xB8>", "<0xAD>"],
    }
    assert lost == 0


@pytest.mark.parametrize("text", ["Don't go,  it's well-known!", f" {CAFES} in 中文\nok", "a (b) c... \t"])
def test_every_tokenizer_gives_the_same_words(text: str) -> None:
    spans = []
    for kind in KINDS:
        rows, lost = word_rows(text, tokens_of(kind, text))
        words = rows.take(rows.special == 0)
        assert lost == 0
        spans.append(list(zip(words.word, words.char_start, words.char_end, strict=True)))
    assert spans[0] == spans[1] == spans[2]
    assert [(start, end) for _, start, end in spans[0]] == find_words(text)


def test_special_rows_say_whether_they_lead() -> None:
    rows, _ = word_rows("ok", tokens_of("wordpiece", "ok"))
    assert rows.special.tolist() == [1, 0, 2]
    assert rows.position.tolist() == [0, 2, 3]
    assert rows.word.tolist() == [-1, 0, -1]
    assert rows.char_start.tolist() == [0, 0, 0]
    assert rows.char_end.tolist() == [0, 2, 0]
    assert word_rows("ok", tokens_of("metaspace", "ok"))[0].special.tolist() == [1, 0]
    assert word_rows("ok", tokens_of("bytes", "ok"))[0].special.tolist() == [0]


def test_token_rows_are_all_tokens_with_their_spans() -> None:
    rows = token_rows(tokens_of("wordpiece", "ab,"))
    assert rows.position.tolist() == [0, 1, 2, 3, 4]
    assert list(zip(rows.char_start, rows.char_end, strict=True)) == [(0, 0), (0, 1), (1, 2), (2, 3), (0, 0)]
    assert rows.special.tolist() == [1, 0, 0, 0, 2]
    assert rows.word.tolist() == [-1] * 5
    assert rows.subwords.tolist() == [1] * 5


@pytest.mark.parametrize(
    ("kind", "text", "max_length", "words", "truncated"),
    [
        ("wordpiece", "abc de", 7, ["abc", "de"], 0),
        ("wordpiece", "abc de", 6, ["abc"], 1),
        ("wordpiece", "abc de", 5, ["abc"], 2),
        ("wordpiece", "abc de", 4, [], 3),
        ("wordpiece", "abc de", 2, [], 5),
        # The accent has no token of its own, and the word is whole all the same.
        ("wordpiece", "e\u0301 x", 3, ["e\u0301"], 1),
        ("bytes", "ok 👩 a", 8, ["ok", "👩", "a"], 0),
        ("bytes", "ok 👩 a", 6, ["ok", "👩"], 2),
        # An emoji of three tokens, of which two are left: each of them spans the whole character.
        ("bytes", "ok 👩 a", 5, ["ok"], 3),
        ("bytes", "👩", 1, [], 2),
        ("metaspace", "don't go", 7, ["don't"], 1),
        ("metaspace", "don't go", 4, [], 4),
    ],
)
def test_a_word_that_the_window_cuts_is_left_out(
    kind: str, text: str, max_length: int, words: list[str], truncated: int
) -> None:
    found, lost = pieces_of(kind, text, max_length=max_length)
    assert list(found) == words
    assert lost == 0
    assert tokens_of(kind, text, max_length=max_length).truncated == truncated


def test_texts_without_tokens_have_no_rows() -> None:
    tokens = tokens_of("bytes", "")
    assert len(tokens.ids) == 0
    assert len(token_rows(tokens)) == 0
    assert len(word_rows("", tokens)[0]) == 0
    assert len(word_rows("", tokens_of("metaspace", ""))[0]) == 1
    assert len(word_rows(" \n", tokens_of("wordpiece", " \n"))[0]) == 2


def test_pooling_takes_the_last_sub_word_or_the_mean() -> None:
    text = "abc de"
    rows: list[Rows] = [word_rows(text, tokens_of("wordpiece", text))[0], word_rows("", tokens_of("bytes", ""))[0]]
    # Positions: CLS a ##b ##c d ##e SEP; channel 0 holds the square of the position, channel 1 the text.
    states = torch.zeros(2, 7, 2)
    states[..., 0] = torch.arange(7.0) ** 2
    states[0, :, 1], states[1, :, 1] = 5, 9
    places = Places.of(rows, torch.device("cpu"))
    assert pool(states, places, mean=False).tolist() == [[0, 5], [9, 5], [25, 5], [36, 5]]
    mean = pool(states, places, mean=True)
    np.testing.assert_allclose(mean, [[0, 5], [(1 + 4 + 9) / 3, 5], [(16 + 25) / 2, 5], [36, 5]], rtol=1e-6)


# Words, marks and characters that tokenizers drop, split or normalise, beside any text at all.
_FRAGMENTS = [NURSE, CAFES, PERSIAN, "नमस्ते", "don't", "the", "中", "ﬁ", "İ", "½", "؀", "[SEP]", "</s>"]
_ODD = st.lists(st.sampled_from([*_FRAGMENTS, " ", "  ", "\n", "\u200b", "\u0301", "\x00", "\ufffd"])).map("".join)


@given(text=st.one_of(st.text(max_size=40), _ODD), max_length=st.integers(2, 64), kind=st.sampled_from(KINDS))
def test_rows_of_any_text_lie_inside_it(text: str, max_length: int, kind: str) -> None:
    tokens = tokens_of(kind, text, max_length=max_length)
    assert len(tokens.ids) <= max_length
    words = find_words(text)
    uncovered = set(range(len(text))) - {place for start, end in words for place in range(start, end)}
    assert all(text[place].isspace() for place in uncovered)
    rows, lost = word_rows(text, tokens)
    for made in (rows, token_rows(tokens)):
        assert np.all((made.char_start >= 0) & (made.char_start <= made.char_end) & (made.char_end <= len(text)))
        assert np.all((made.position - made.subwords >= -1) & (made.subwords >= 1))
        assert np.all(made.position < len(tokens.ids))
        assert made.token.tolist() == tokens.ids[made.position].tolist()
    inner = rows.take(rows.special == 0)
    assert [words[number] for number in inner.word] == list(zip(inner.char_start, inner.char_end, strict=True))
    assert np.all(np.diff(inner.word) > 0)
    assert np.all(np.diff(rows.position) >= 0)
    assert len(inner) + lost <= len(words)
    if tokens.truncated == 0:
        assert len(inner) + lost == len(words)
    for start, end, last, count in zip(inner.char_start, inner.char_end, inner.position, inner.subwords, strict=True):
        own = slice(last + 1 - count, last + 1)
        assert not (tokens.kind > 0)[own].any()
        # The first and the last sub-word overlap the word.
        assert tokens.start[last] < end
        assert tokens.end[last + 1 - count] > start
