"""A text that stands in no cache, read as the texts of one were."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64

from ..cache.layout import SALIENCY_COLUMNS
from ..progress import SILENT
from .config import ExtractConfig
from .forward import make_shard
from .language_model import LanguageModel
from .work import Work, all_rows, tokenise


@dataclass(frozen=True)
class TypedText:
    """What an extraction would have stored of a text, before its vectors were encoded."""

    ids: list[int]
    """What the model was given."""
    columns: dict[str, Int64[np.ndarray, " row"]]
    """`position`, `subwords`, `token`, `char_start`, `char_end` and `special` of each row."""
    vectors: dict[str, Float32[np.ndarray, "row _d"]]
    """By site."""
    logits: Float32[np.ndarray, " class"] | None
    saliency: Float32[np.ndarray, " row"] | None
    truncated: int
    """Tokens beyond the window, which were left out."""


def read_typed(model: LanguageModel, config: ExtractConfig, text: str, sites: Sequence[str]) -> TypedText:
    """Tokenise a text, choose its rows and run the model, all as the settings say; no word is left out by frequency.

    Raises
    ------
    DataError
        Where the model fails on the text.
    """
    config = config.model_copy(update={"sites": tuple(sites)})
    (tokens,) = tokenise(model.source, config, [text])
    rows, _ = all_rows(config, text, tokens)
    work = Work(
        number=0,
        texts=[text],
        text_id=np.zeros(1, dtype=np.int64),
        row_counts=np.array([len(rows)]),
        kept=None,
        where=["the text"],
    )
    shard = make_shard(work, config, model, SILENT).shard
    saliency = shard.rows.get(next(iter(SALIENCY_COLUMNS)))
    names = ("position", "subwords", "token", "char_start", "char_end", "special")
    return TypedText(
        ids=tokens.ids.tolist(),
        columns={name: getattr(rows, name) for name in names},
        vectors=dict(shard.sites),
        logits=None if shard.logits is None else shard.logits[0],
        saliency=saliency,
        truncated=tokens.truncated,
    )
