"""What an extraction will do, to the row and the byte, before the model is loaded.

The plan follows from the data, the tokenizer and the settings alone. It keeps a few numbers per text and, where words
are filtered by frequency, one bit per word; tokens are made again when a shard is extracted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64
from pydantic import BaseModel, ConfigDict, JsonValue

from ..cache.encoding import EXPECTED_SHARE, STORED_AS, array_layouts
from ..cache.layout import Encoding, SiteLayout
from ..cache.placement import Placement, place
from ..cache.writer import Extraction
from ..errors import ConfigError, ModelError
from ..progress import SILENT, Progress
from .data import Texts
from .language_model import DTypeName, Task
from .source import ModelSource
from .words import Rows, Tokens, token_rows, word_rows

_TEXTS_AT_A_TIME = 1_000
# Manifest, records, metadata, card: small files, but files.
_SMALL_FILES_PER_SHARD = 65_536


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
    """`classify` stores the model's own predictions."""
    dtype: DTypeName = "float32"
    """Type in which the model computes."""
    batch_tokens: int = 4096
    """Token slots of a batch. Part of the identity, since sums are rounded differently in other batches."""
    seed: int = 0
    """Order of the texts, and which occurrences are kept."""


@dataclass(frozen=True)
class Plan:
    """The plan of an extraction. Arrays run over the texts in the order in which they will lie in the cache."""

    config: ExtractConfig
    source: ModelSource
    texts: Texts
    order: Int64[np.ndarray, " text"]
    """Number of each text in `texts`."""
    tokens: Int64[np.ndarray, " text"]
    truncated: Int64[np.ndarray, " text"]
    row_counts: Int64[np.ndarray, " text"]
    placement: Placement
    kept: Bool[np.ndarray, " row"] | None
    """Which rows of the texts, in the data's order, survive the frequency filter; `None` where there is no filter."""
    kept_starts: Int64[np.ndarray, " text"]
    """Where each text of the data begins in `kept`."""
    counts: dict[str, int]

    @property
    def class_names(self) -> list[str] | None:
        """What the labels and predictions are called; `None` where there are neither."""
        return self.source.class_names if self.config.task == "classify" else self.texts.class_names

    def extraction(self) -> Extraction:
        """The plan as the cache's writer takes it."""
        config = self.config
        identity: dict[str, JsonValue] = {
            "model": self.source.identity(),
            "tokenizer": self.source.tokenizer_identity(),
            "data": self.texts.identity,
            "settings": config.model_dump(mode="json"),
        }
        return Extraction(
            identity=identity, geometry=self.placement.geometry, sites=self._sites(), classes=self._classes()
        )

    def _sites(self) -> dict[str, SiteLayout]:
        return {name: SiteLayout(width=self.source.width, encoding=self.config.encoding) for name in self.config.sites}

    def _classes(self) -> int | None:
        return len(self.source.class_names) if self.config.task == "classify" else None

    def bytes_at_most(self) -> int:
        """Upper limit of the cache's size: all values uncompressed, plus the texts and the small files."""
        layouts = array_layouts(self.placement.geometry, self._sites(), classes=self._classes())
        shards = self.placement.geometry.shards
        arrays = sum(shards * layout.file_bytes_at_most for layout in layouts.values())
        return int(arrays + self._other_bytes())

    def bytes_expected(self) -> int:
        """The size to expect with the compression measured on hidden states of trained models."""
        item = np.dtype(STORED_AS[self.config.encoding]).itemsize
        vectors = self.placement.geometry.rows * self.source.width * item * len(self.config.sites)
        columns = self.placement.geometry.rows * 12
        return int(vectors * EXPECTED_SHARE[self.config.encoding]) + columns + self._other_bytes() // 2

    def _other_bytes(self) -> int:
        texts = sum(len(text.encode()) for text in self.texts.text) + sum(
            column.nbytes for column in self.texts.kept.values()
        )
        # Statistics: two lines of at most 32 characters per channel and site, in each record and in the manifest.
        statistics = 2 * 32 * self.source.width * len(self.config.sites)
        shards = self.placement.geometry.shards
        return int(texts + 200 * len(self.texts) + (shards + 1) * (statistics + _SMALL_FILES_PER_SHARD))

    def shard(self, number: int) -> Int64[np.ndarray, " text"]:
        """Places, in the plan's order, of the texts of a shard."""
        start, end = self.placement.shard_starts[number : number + 2]
        return np.arange(start, end)

    def rows_of(self, place: int, tokens: Tokens) -> Rows:
        """The rows of the text at a place of the plan's order."""
        number = int(self.order[place])
        if self.config.rows == "token":
            return token_rows(tokens)
        rows, _ = word_rows(self.texts.text[number], tokens)
        if self.kept is None:
            return rows
        start = int(self.kept_starts[number])
        return rows.take(self.kept[start : start + len(rows)])


def make_plan(source: ModelSource, texts: Texts, config: ExtractConfig, *, progress: Progress = SILENT) -> Plan:
    """Tokenise all texts, choose their rows, and lay them into shards.

    Raises
    ------
    ConfigError
        Where the settings do not fit each other, the model or the data.
    """
    _check(source, texts, config)
    if config.task == "classify":
        texts = _with_the_models_classes(source, texts)
    row_counts, token_counts, truncated = [], [], []
    lost = cut_words = 0
    filtering = config.rows == "word" and (config.min_count > 1 or config.max_occurrences is not None)
    census = _Census(config) if filtering else None
    highest_id = 0
    progress.begin("plan", len(texts), "texts")
    for start in range(0, len(texts), _TEXTS_AT_A_TIME):
        chunk = texts.text[start : start + _TEXTS_AT_A_TIME]
        for number, tokens in enumerate(source.tokenize(chunk, max_length=config.max_length), start=start):
            if config.rows == "token":
                rows = token_rows(tokens)
            else:
                rows, without = word_rows(texts.text[number], tokens)
                lost += without
            if census is not None:
                census.add(texts.text[number], rows, trained=texts.split[number] == config.train_split)
            highest_id = max(highest_id, int(tokens.ids.max(initial=0)))
            row_counts.append(len(rows))
            token_counts.append(len(tokens.ids))
            truncated.append(tokens.truncated)
        progress.advance(len(chunk))
    vocabulary = source.config.get_text_config().vocab_size
    if highest_id >= vocabulary:
        raise ModelError(
            f"the tokenizer of {source.name} gives token {highest_id} and the model knows {vocabulary}: "
            "they do not belong together"
        )
    counts = np.array(row_counts, dtype=np.int64)
    starts = np.r_[0, np.cumsum(counts)[:-1]]
    kept = None
    if census is not None:
        kept = census.kept(np.random.default_rng([config.seed, 1]))
        cut_words = int((~kept).sum())
        counts = np.add.reduceat(np.r_[kept, False].astype(np.int64), starts) * (counts > 0)
    if counts.sum() == 0:
        raise ConfigError("no text has a row left: the texts are empty, or --min-count is too high")
    order = _order(texts, config.seed)
    tokens_of = np.array(token_counts, dtype=np.int64)
    cuts = np.array(truncated, dtype=np.int64)
    item = np.dtype(STORED_AS[config.encoding]).itemsize
    return Plan(
        config=config,
        source=source,
        texts=texts,
        order=order,
        tokens=tokens_of[order],
        truncated=cuts[order],
        row_counts=counts[order],
        placement=place(counts[order], row_bytes=source.width * item),
        kept=kept,
        kept_starts=starts,
        counts={
            "texts": len(texts),
            "empty_texts": sum(not text.strip() for text in texts.text),
            "texts_without_rows": int((counts == 0).sum()),
            "truncated_texts": int((cuts > 0).sum()),
            "truncated_tokens": int(cuts.sum()),
            "words_without_subwords": lost,
            "words_left_out_by_frequency": cut_words,
            "tokens": int(tokens_of.sum()),
        },
    )


def batches(lengths: Int64[np.ndarray, " text"], *, slots: int) -> Iterator[Int64[np.ndarray, " batch"]]:
    """Numbers of texts, longest first, in batches of at most `slots` places of which at least 90 % are real tokens."""
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    start, real = 0, 0
    for end, number in enumerate(order.tolist()):
        places = int(lengths[order[start]]) * (end - start + 1)
        if end > start and (places > slots or real + lengths[number] < 0.9 * places):
            yield order[start:end]
            start, real = end, 0
        real += int(lengths[number])
    if start < len(order):
        yield order[start:]


def _check(source: ModelSource, texts: Texts, config: ExtractConfig) -> None:
    if config.rows == "token" and (config.min_count > 1 or config.max_occurrences is not None):
        raise ConfigError("--min-count and --max-occurrences choose words; they need --rows word")
    if config.max_occurrences is not None and config.max_occurrences < 1:
        raise ConfigError(f"--max-occurrences is {config.max_occurrences}; it must be at least 1")
    if (config.min_count > 1 or config.max_occurrences is not None) and config.train_split not in texts.split:
        held = ", ".join(dict.fromkeys(texts.split))
        raise ConfigError(
            f"there is no split {config.train_split!r} to count words in; there is {held}: give --train-split"
        )
    if not source.shortest <= config.max_length <= source.window:
        raise ConfigError(
            f"--max-length is {config.max_length}; {source.name} takes {source.shortest} to {source.window} tokens"
        )
    if config.batch_tokens < 1:
        raise ConfigError(f"--batch-tokens is {config.batch_tokens}; it must be at least 1")


def _with_the_models_classes(source: ModelSource, texts: Texts) -> Texts:
    """The texts with their labels numbered as the model numbers its classes.

    Labels given as numbers are taken as they are, names are looked up.
    """
    if texts.class_names is None:
        return texts
    classes = source.class_names
    if not texts.labels_are_names:
        if len(texts.class_names) > len(classes):
            raise ConfigError(
                f"the data has {len(texts.class_names)} labels and {source.name} knows {len(classes)} classes "
                f"({', '.join(classes)}): use a model of this data, or --task none"
            )
        return replace(texts, class_names=classes)
    place = {name.casefold(): number for number, name in enumerate(classes)}
    for name in texts.class_names:
        if name.casefold() not in place:
            raise ConfigError(
                f"the label {name!r} is not a class of {source.name} (its classes are {', '.join(classes)}): "
                "give the labels as the model's class names or numbers, or use --task none"
            )
    number_of = [place[name.casefold()] for name in texts.class_names]
    labels = [None if label is None else number_of[label] for label in texts.label]
    return replace(texts, label=labels, class_names=classes)


def _order(texts: Texts, seed: int) -> Int64[np.ndarray, " text"]:
    """Split after split, so that a split lies in few shards; within each, a seeded shuffle."""
    splits = np.array(texts.split, dtype=str)
    parts = [
        np.random.default_rng([seed, 0, number]).permutation(np.flatnonzero(splits == split))
        for number, split in enumerate(dict.fromkeys(texts.split))
    ]
    return np.concatenate(parts)


class _Census:
    """Counts word types in the training split and chooses the occurrences that stay."""

    def __init__(self, config: ExtractConfig) -> None:
        self._config = config
        self._types: dict[str, int] = {}
        self._type_of: list[int] = []

    def add(self, text: str, rows: Rows, *, trained: bool) -> None:
        """Note the rows of the next text; −1 stands for a row that the filter leaves alone."""
        for start, end, word in zip(rows.char_start.tolist(), rows.char_end.tolist(), rows.word.tolist(), strict=True):
            exempt = word < 0 or not trained
            self._type_of.append(-1 if exempt else self._types.setdefault(text[start:end], len(self._types)))

    def kept(self, generator: np.random.Generator) -> Bool[np.ndarray, " row"]:
        """Which of the rows noted stay."""
        kinds = np.array(self._type_of, dtype=np.int64)
        counted = np.flatnonzero(kinds >= 0)
        kept = np.ones(len(kinds), dtype=bool)
        if len(counted) == 0:
            return kept
        kinds = kinds[counted]
        frequency = np.bincount(kinds)
        stays = frequency[kinds] >= self._config.min_count
        if self._config.max_occurrences is not None:
            random = self._config.occurrences == "random"
            rank_by = generator.random(len(kinds)) if random else np.arange(len(kinds))
            order = np.lexsort((rank_by, kinds))
            rank = np.empty(len(kinds), dtype=np.int64)
            first = np.cumsum(frequency) - frequency
            rank[order] = np.arange(len(kinds)) - first[kinds[order]]
            stays &= rank < self._config.max_occurrences
        kept[counted] = stays
        return kept
