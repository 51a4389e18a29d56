"""One shard's texts, and which of their rows stay: all that somebody who makes the shard needs besides the model."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from .config import ExtractConfig
from .prompt import Prompt
from .source import ModelSource
from .words import Rows, Tokens, token_rows, under, word_rows


@dataclass(frozen=True)
class Work:
    """The texts of one shard, in the order in which they will lie there. A few bytes a row; may be sent to a worker."""

    number: int
    """Of the shard."""
    texts: list[str]
    text_id: Int64[np.ndarray, " text"]
    row_counts: Int64[np.ndarray, " text"]
    """Rows that stay."""
    kept: list[Bool[np.ndarray, " _row"]] | None
    """Which rows of each text stay; `None` where all do."""
    where: list[str]
    """How errors call each text."""

    @property
    def rows(self) -> int:
        """Rows of the shard."""
        return int(self.row_counts.sum())


def prompt_of(source: ModelSource, config: ExtractConfig) -> Prompt | None:
    """The prompt around each text, where there is one."""
    if config.prompt is None:
        return None
    return Prompt(source.tokenizer, config.prompt, config.answers, chat=config.chat)


def tokenise(source: ModelSource, config: ExtractConfig, texts: list[str]) -> list[Tokens]:
    """The tokens that the model is given for each text."""
    return source.tokenize(
        texts, max_length=config.max_length, prompt=config.prompt, answers=config.answers, chat=config.chat
    )


def all_rows(config: ExtractConfig, text: str, tokens: Tokens) -> tuple[Rows, int]:
    """The rows of a text before the frequency filter, and how many words have no sub-word."""
    rows, lost = (token_rows(tokens), 0) if config.rows == "token" else word_rows(text, tokens)
    return under(rows, special=config.special, instruction=config.instruction), lost
