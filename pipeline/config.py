"""Settings of an extraction."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from ..cache.layout import ALL_COLUMNS, ROW_COLUMNS, Encoding
from .language_model import DTypeName, Task
from .words import Policy


class ExtractConfig(BaseModel):
    """Settings of an extraction. All of them are part of the cache's identity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sites: tuple[str, ...]
    """Full names of the sites."""
    rows: Literal["token", "word"] = "token"
    """What a row is."""
    pool: Literal["last", "mean"] = "last"
    """How a word's vector is made from its sub-words'."""
    min_count: int = 1
    """Keep words that occur so often in the training split."""
    max_occurrences: int | None = None
    """Keep so many occurrences of a word in the training split."""
    occurrences: Literal["random", "first"] = "random"
    """Which occurrences: a seeded sample, or the first in the data's order (as published)."""
    train_split: str = "train"
    """The split that the two limits apply to."""
    max_length: int
    """Tokens at which a text is cut, special ones included."""
    encoding: Encoding = "bf16"
    """How vectors are stored."""
    task: Task = "none"
    """`classify` stores the predictions of the model's head, `prompt` which answer it would give to a prompt."""
    prompt: str | None = None
    """What the model is given, with `{text}` in the place of the text; a chat template stands written out in it."""
    answers: tuple[str, ...] = ()
    """What the model may say after the prompt: one text for each class."""
    answer_names: tuple[str, ...] = ()
    """What the classes are called."""
    chat: bool = False
    """Whether the prompt holds all special tokens, as a chat template writes them; else the tokenizer adds its own."""
    special: Policy = "mark"
    """What becomes of special tokens: rows that are marked, rows like the text's, or no rows."""
    instruction: Policy = "mark"
    """The same of the tokens of the prompt around the text."""
    dtype: DTypeName = "float32"
    """Type in which the model computes."""
    batch_tokens: int = 1024
    """Token slots of a batch. Part of the identity, since sums are rounded differently in other batches."""
    saliency: Literal["ig", "gradient"] | None = None
    """Attribute each prediction to the rows by integrated gradients, or by gradient × input."""
    saliency_site: str | None = None
    """The hidden site that predictions are attributed to; as the next two, `None` where it means nothing."""
    saliency_steps: int | None = None
    """Points on the path of integrated gradients."""
    saliency_baseline: Literal["pad", "zero", "published"] | None = None
    """Where the path begins: the text with its own tokens replaced by padding, zero vectors, or token 0 everywhere."""
    seed: int = 0
    """Order of the texts, and which occurrences are kept."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the row axis of the cache."""
        return tuple(ALL_COLUMNS if self.saliency else ROW_COLUMNS)
