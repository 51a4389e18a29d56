"""What an extraction will do, to the row and the byte, before the model is loaded.

The plan follows from the data, the tokenizer and the settings alone. It keeps a few numbers per text and, where words
are filtered by frequency, one bit per word; tokens are made again when a shard is extracted.
"""

import logging
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64
from pydantic import JsonValue

from ..cache.encoding import EXPECTED_SHARE, STORED_AS, array_layouts, scale_texts
from ..cache.extraction import Extraction
from ..cache.layout import SiteLayout
from ..cache.placement import Placement, place
from ..errors import ConfigError, ModelError
from ..progress import SILENT, Progress
from .classes import classes_of, with_classes
from .config import ExtractConfig
from .data import Texts
from .saliency import check_saliency
from .source import ModelSource
from .words import INSTRUCTION, LEADING, SPECIAL, Rows
from .work import Work, all_rows, prompt_of, tokenise

_log = logging.getLogger(__name__)

_TEXTS_AT_A_TIME = 1_000
# Manifest, records, metadata, card: small files, but files.
_SMALL_FILES_PER_SHARD = 65_536


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
        return classes_of(self.source, self.config) or self.texts.class_names

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
            identity=identity,
            geometry=self.placement.geometry,
            sites=self._sites(),
            classes=self._classes(),
            columns=config.columns,
        )

    def _sites(self) -> dict[str, SiteLayout]:
        return {name: SiteLayout(width=self.source.width, encoding=self.config.encoding) for name in self.config.sites}

    def _classes(self) -> int | None:
        classes = classes_of(self.source, self.config)
        return None if classes is None else len(classes)

    def bytes_at_most(self) -> int:
        """Upper limit of the cache's size: all values uncompressed, plus the texts and the small files."""
        layouts = array_layouts(
            self.placement.geometry, self._sites(), classes=self._classes(), columns=self.config.columns
        )
        shards = self.placement.geometry.shards
        arrays = sum(shards * layout.file_bytes_at_most for layout in layouts.values())
        return int(arrays + self._other_bytes())

    def bytes_expected(self) -> int:
        """The size to expect with the compression measured on hidden states of trained models."""
        item = np.dtype(STORED_AS[self.config.encoding]).itemsize
        vectors = self.placement.geometry.rows * self.source.width * item * len(self.config.sites)
        columns = self.placement.geometry.rows * (20 if self.config.saliency else 12)
        return int(vectors * EXPECTED_SHARE[self.config.encoding]) + columns + self._other_bytes() // 2

    def _other_bytes(self) -> int:
        texts = sum(len(text.encode()) for text in self.texts.text) + sum(
            column.nbytes for column in self.texts.kept.values()
        )
        # Statistics: two lines of at most 32 characters per channel and site, in each record and in the manifest.
        statistics = 2 * 32 * self.source.width * len(self.config.sites)
        shards = self.placement.geometry.shards
        return int(texts + 200 * len(self.texts) + (shards + 1) * (statistics + _SMALL_FILES_PER_SHARD))

    def work(self, number: int) -> Work:
        """What is to be done for a shard."""
        start, end = self.placement.shard_starts[number : number + 2]
        return self._work(number, np.arange(start, end))

    def rows_in(self, number: int) -> int:
        """Rows of a shard."""
        start, end = self.placement.shard_starts[number : number + 2]
        return int(self.row_counts[start:end].sum())

    def scale_work(self) -> Work:
        """The plan's first texts, from which the channel scales of int8 follow."""
        return self._work(0, scale_texts(self.row_counts))

    def _work(self, number: int, places: Int64[np.ndarray, " text"]) -> Work:
        chosen, texts = self.order[places].tolist(), self.texts
        kept = None
        if self.kept is not None:
            ends = np.r_[self.kept_starts[1:], len(self.kept)]
            kept = [self.kept[self.kept_starts[text] : ends[text]] for text in chosen]
        return Work(
            number=number,
            texts=[texts.text[text] for text in chosen],
            text_id=self.placement.text_id[places],
            row_counts=self.row_counts[places],
            kept=kept,
            where=[f"row {texts.source_row[text]} of split {texts.split[text]!r}" for text in chosen],
        )


def make_plan(source: ModelSource, texts: Texts, config: ExtractConfig, *, progress: Progress = SILENT) -> Plan:
    """Tokenise all texts, choose their rows, and lay them into shards.

    Raises
    ------
    ConfigError
        Where the settings do not fit each other, the model or the data.
    """
    _check(source, texts, config)
    texts = with_classes(source, texts, config)
    row_counts, token_counts, truncated = [], [], []
    lost = cut_words = 0
    filtering = config.rows == "word" and (config.min_count > 1 or config.max_occurrences is not None)
    census = _Census(config) if filtering else None
    prompt = prompt_of(source, config)
    highest_id = max(prompt.answer_ids) if prompt is not None else 0
    if prompt is not None and prompt.begins_with_text:
        _log.warning(
            "the prompt begins with {text}, and the tokenizer puts nothing before it: decoders often give the very "
            "first token a norm a hundred times that of others, and here it is a row of each text, which then decides "
            "what codes, errors and removed norms say: write a word before {text}, such as 'Text: '"
        )
    kinds = np.zeros(INSTRUCTION + 1, dtype=np.int64)
    progress.begin("plan", len(texts), "texts")
    for start in range(0, len(texts), _TEXTS_AT_A_TIME):
        chunk = texts.text[start : start + _TEXTS_AT_A_TIME]
        for number, tokens in enumerate(tokenise(source, config, chunk), start=start):
            rows, without = all_rows(config, texts.text[number], tokens)
            lost += without
            if census is not None:
                census.add(texts.text[number], rows, trained=texts.split[number] == config.train_split)
            highest_id = max(highest_id, int(tokens.ids.max(initial=0)))
            kinds += np.bincount(tokens.kind, minlength=len(kinds))
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
    instruction_rows = int(kinds[INSTRUCTION]) * (config.instruction != "drop")
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
            "special_rows": int(kinds[[LEADING, SPECIAL]].sum()) * (config.special != "drop"),
            **({"instruction_rows": instruction_rows} if prompt is not None else {}),
        },
    )


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
    check_saliency(source, config)
    given = config.prompt is not None and len(config.answers) == len(config.answer_names) > 0
    if given != (config.task == "prompt") or (not given and (config.answers or config.answer_names or config.chat)):
        raise ConfigError("a prompt, and answers with their names, belong to --task prompt, and it to them")
    if config.batch_tokens < 1:
        raise ConfigError(f"--batch-tokens is {config.batch_tokens}; it must be at least 1")


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
