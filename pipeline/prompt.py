"""Texts inside a prompt: the tokens that a model is given for each, and those with which its answers begin.

A text and the prompt around it are tokenised as one string, since that is what the model was trained on: a token that
reaches over both is the text's. An answer is read off the token that would follow; what all answers begin with
(a blank that is a token of its own) is given to the model as well, so that the next token tells them apart.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from ..errors import ConfigError
from .words import INSTRUCTION, TEXT, Tokens, kinds_of

MARKER = "{text}"
# Beginnings and endings that melt with their neighbours in one tokenizer or another.
_REFERENCES = ("", "It works.", " no\n")


class Prompt:
    """A prompt with a place for the text, and the answers to tell apart.

    Parameters
    ----------
    tokenizer
        Of the model: a fast one.
    wording
        The prompt, with `{text}` exactly once. Unless it is a chat's, blanks at its end belong to the answers.
    answers
        What the model may say next.
    chat
        The wording holds all special tokens that the model expects: the tokenizer adds none.

    Raises
    ------
    ConfigError
        Where the wording has no place for the text or nothing after it, or the answers cannot be told apart by the
        first token that is not common to them.
    """

    def __init__(self, tokenizer: Any, wording: str, answers: Sequence[str], *, chat: bool) -> None:
        self._tokenizer, self._chat = tokenizer, chat
        if wording.count(MARKER) != 1:
            raise ConfigError(
                f"the prompt has {wording.count(MARKER) or 'no'} places for the text: write {MARKER} in it exactly once"
            )
        self._head, whole_tail = wording.split(MARKER)
        self._tail = whole_tail if chat else whole_tail.rstrip(" ")
        self._blanks = whole_tail[len(self._tail) :]
        if not self._tail:
            raise ConfigError(
                f"the prompt ends with {MARKER}, and what the model says next is read off its end: write something "
                "after it, such as a line break and 'Answer: '"
            )
        _check_answers(answers)
        self._closing: list[int] = []
        found = [self._continuation(text, answers) for text in _REFERENCES]
        if any(other != found[0] for other in found[1:]):
            raise ConfigError(
                "the tokens with which the answers begin depend on the text before them: "
                f"write a line break or a word between {MARKER} and the end of the prompt"
            )
        self._closing, self.answer_ids = found[0]
        self.shortest = len(self._encode([""])[0].ids)
        """Tokens of the prompt around an empty text."""
        self.begins_with_text = bool(self._encode([_REFERENCES[1]])[0].kind[0] == TEXT)
        """Whether a text's first token is the first that the model is given."""

    def tokenize(self, texts: Sequence[str], *, max_length: int) -> list[Tokens]:
        """The tokens of each text inside the prompt; of what is too long, the end of the text is cut off.

        Character offsets are those of the text. Special tokens that the tokenizer puts at the end are left out: the
        model is to go on there.

        Raises
        ------
        ConfigError
            Where the prompt alone is too long.
        """
        if self.shortest > max_length:
            raise ConfigError(
                f"the prompt alone has {self.shortest} tokens and --max-length is {max_length}: "
                "shorten the prompt, or give a larger --max-length"
            )
        result = self._encode(texts)
        lengths = [len(tokens.ids) for tokens in result]
        long = [number for number, length in enumerate(lengths) if length > max_length]
        while long:
            ends = [_earlier_end(result[number], max_length) for number in long]
            shorter = self._encode([texts[number][:end] for number, end in zip(long, ends, strict=True)])
            for number, tokens in zip(long, shorter, strict=True):
                result[number] = replace(tokens, truncated=lengths[number] - len(tokens.ids))
            long = [number for number in long if len(result[number].ids) > max_length]
        return result

    def _continuation(self, text: str, answers: Sequence[str]) -> tuple[list[int], list[int]]:
        """What all answers begin with after a text, and the token of each that follows."""
        before = self._encode([text])[0].ids.tolist()
        followed = self._encode([text] * len(answers), endings=[f"{self._blanks}{answer}" for answer in answers])
        rest = []
        for answer, tokens in zip(answers, followed, strict=True):
            ids = tokens.ids.tolist()
            if ids[: len(before)] != before:
                raise ConfigError(
                    f"the end of the prompt has other tokens where the answer {answer!r} follows: "
                    "end the prompt with a blank or a line break"
                )
            rest.append(ids[len(before) :])
        common = _common(rest)
        first = [ids[len(common)] if len(ids) > len(common) else None for ids in rest]
        for number, token in enumerate(first):
            like = first.index(token) if token is not None else int(number == 0)
            if like != number:
                one, other = sorted((number, like))
                raise ConfigError(
                    f"the answers {answers[one]!r} and {answers[other]!r} begin with the same token, and cannot be "
                    "told apart by it: choose answers that differ from their beginning on"
                )
        return common, [token for token in first if token is not None]

    def _encode(self, texts: Sequence[str], *, endings: Sequence[str] | None = None) -> list[Tokens]:
        endings = endings or [""] * len(texts)
        encoded = self._tokenizer(
            [f"{self._head}{text}{self._tail}{ending}" for text, ending in zip(texts, endings, strict=True)],
            add_special_tokens=not self._chat,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,
        )
        parts = zip(encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True)
        return [
            self._tokens(
                text,
                np.array(ids, dtype=np.int64),
                np.array(offsets, dtype=np.int64).reshape(-1, 2),
                np.array(special, dtype=bool),
            )
            for text, (ids, offsets, special) in zip(texts, parts, strict=True)
        ]

    def _tokens(
        self,
        text: str,
        ids: Int64[np.ndarray, " token"],
        offsets: Int64[np.ndarray, "token 2"],
        added: Bool[np.ndarray, " token"],
    ) -> Tokens:
        ordinary = np.flatnonzero(~added)
        upto = int(ordinary[-1]) + 1 if len(ordinary) else 0
        ids, offsets, added = ids[:upto], offsets[:upto], added[:upto]
        start, end = offsets[:, 0] - len(self._head), offsets[:, 1] - len(self._head)
        # An empty text has no tokens, though one may reach over its place.
        within = (start < len(text)) & ((end > 0) | ((end == start) & (start >= 0))) & bool(text)
        kind = np.where(within | added, kinds_of(added), INSTRUCTION)
        of_text = kind == TEXT
        more = np.array(self._closing, dtype=np.int64)
        return Tokens(
            ids=np.concatenate([ids, more]),
            start=np.concatenate([np.where(of_text, start.clip(0), 0), 0 * more]),
            end=np.concatenate([np.where(of_text, end.clip(0, len(text)), 0), 0 * more]),
            kind=np.concatenate([kind, 0 * more + INSTRUCTION]),
            truncated=0,
            cut=len(text),
        )


def _common(rows: list[list[int]]) -> list[int]:
    """What all rows begin with."""
    shortest = min(rows, key=len)
    same = (len({row[place] for row in rows}) == 1 for place in range(len(shortest)))
    return shortest[: next((place for place, alike in enumerate(same) if not alike), len(shortest))]


def _earlier_end(tokens: Tokens, max_length: int) -> int:
    """Where a text is to end, so that about as many tokens are left as fit; earlier than it ends now."""
    starts = np.sort(tokens.start[tokens.kind == TEXT])
    excess = len(tokens.ids) - max_length
    return min(int(starts[-excess]) if excess <= len(starts) else 0, tokens.cut - 1)


def _check_answers(answers: Sequence[str]) -> None:
    if len(answers) < 2:
        raise ConfigError(f"--answers gives {len(answers)} to choose from: give two or more, such as --answers no,yes")
    for number, answer in enumerate(answers):
        if not answer.strip():
            raise ConfigError(f"answer {number + 1} is empty: give --answers such as no,yes")
        if answer in answers[:number]:
            raise ConfigError(f"the answer {answer!r} is given twice")
