"""Rows with what is known of each, and the concepts that runs and baselines put them in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from ..cache.reader import Cache
from ..errors import ConfigError
from ..progress import Progress
from ..trainer.run import Run
from .tagging import Tagger, tag_rows

WORD, TAG, LABEL = "word", "pos", "label"


@dataclass(frozen=True)
class Rows:
    """Ordinary rows of chosen texts, in the order in which they lie on disk."""

    place: Int64[np.ndarray, " row"]
    """In the cache."""
    text: Int64[np.ndarray, " row"]
    """Row of `Cache.texts`."""
    attributes: Mapping[str, Int64[np.ndarray, " row"]]
    """Number of each row's value; −1 where it has none."""


@dataclass(frozen=True)
class Sides:
    """The rows that say what a concept is, and those that it is measured on."""

    reference: Rows
    evaluated: Rows
    names: Mapping[str, Sequence[str]]
    """Of each attribute's values."""
    trained_texts: int
    """Evaluated texts that a run was trained on."""


@dataclass(frozen=True)
class Partition:
    """Concepts of the rows of both sides."""

    name: str
    concepts: int
    reference: Int64[np.ndarray, " reference"]
    evaluated: Int64[np.ndarray, " evaluated"]


def choose_texts(cache: Cache, runs: Mapping[str, Run], split: Sequence[str]) -> Bool[np.ndarray, " text"]:
    """The texts of the splits, or those that the runs held out.

    Raises
    ------
    ConfigError
        Where the cache lacks a split, or no split is named and the runs held out different texts.
    """
    if split:
        return cache.splits(split)
    held_out = {tuple(run.held_out_texts.tolist()) for run in runs.values()}
    if len(held_out) > 1:
        raise ConfigError("the runs held out different texts: name the split to evaluate with --split")
    chosen = np.zeros(len(cache.texts), dtype=bool)
    chosen[cache.text_index[np.array(held_out.pop(), dtype=np.int64)]] = True
    return chosen


def read_sides(
    cache: Cache, runs: Mapping[str, Run], evaluated: Bool[np.ndarray, " text"], tagger: Tagger | None
) -> Sides:
    """The ordinary rows of the evaluated texts, and of all other texts that a run was trained on.

    Raises
    ------
    ConfigError
        Where either side has no rows, or the cache was shared without its texts.
    """
    ids = np.asarray(cache.texts["text_id"])
    trained = np.zeros(len(ids), dtype=bool)
    for run in runs.values():
        trained |= cache.splits(run.config.split) & ~np.isin(ids, run.held_out_texts)
    if "text" not in cache.texts.column_names:
        raise ConfigError(f"{cache.path} was shared without its texts, which words are read from: use a whole copy")
    words: dict[str, int] = {}
    tags: dict[str, int] = {}
    sides = {
        "training": _read(cache, trained & ~evaluated, words, tags, tagger),
        "evaluated": _read(cache, evaluated, words, tags, tagger),
    }
    for name, rows in sides.items():
        if len(rows.place) == 0:
            raise ConfigError(
                f"there are no {name} rows in {cache.path}: a concept's main word is taken from training texts and "
                "measured on others, so choose a split that is not all of the training texts with --split"
            )
    labels = cache.manifest.class_names or [
        str(number) for number in range(1 + max(int(rows.attributes[LABEL].max()) for rows in sides.values()))
    ]
    names = {WORD: list(words), LABEL: list(labels)} | ({} if tagger is None else {TAG: list(tags)})
    return Sides(sides["training"], sides["evaluated"], names, int((trained & evaluated).sum()))


def _read(
    cache: Cache,
    texts: Bool[np.ndarray, " text"],
    words: dict[str, int],
    tags: dict[str, int],
    tagger: Tagger | None,
) -> Rows:
    place = cache.rows_of(texts, special="none")
    owner = cache.text_index[cache.column("text")[place]]
    starts, ends = (cache.column(name)[place].astype(np.int64) for name in ("char_start", "char_end"))
    word = np.empty(len(place), dtype=np.int64)
    tag = np.full(len(place), -1, dtype=np.int64)
    written = cache.texts["text"]
    for part in np.split(np.arange(len(place)), np.flatnonzero(np.diff(owner)) + 1):
        if len(part) == 0:
            continue
        text = written[int(owner[part[0]])].as_py()
        spans = zip(starts[part].tolist(), ends[part].tolist(), strict=True)
        word[part] = [words.setdefault(text[start:end].strip().lower(), len(words)) for start, end in spans]
        if tagger is not None:
            found = tag_rows(tagger, text, starts[part], ends[part])
            tag[part] = [-1 if name is None else tags.setdefault(name, len(tags)) for name in found]
    labels = np.array([-1 if label is None else label for label in cache.texts["label"].to_pylist()], dtype=np.int64)
    attributes = {WORD: word, LABEL: labels[owner]} | ({} if tagger is None else {TAG: tag})
    return Rows(place, owner, attributes)


def partitions_of(
    cache: Cache, runs: Mapping[str, Run], sides: Sides, *, seed: int, progress: Progress
) -> tuple[list[Partition], list[Partition]]:
    """The concepts of the runs, and those of baselines that need no concept model.

    The baselines: all rows in one concept; for each number K of concepts that runs have, each of the K − 1 most
    frequent training words a concept and the rest one; and the concepts of the first run with K, shuffled over rows.
    """
    progress.begin("concepts of rows", len(runs), "run")
    of_runs = []
    for name, run in runs.items():
        codes = [_assign(cache, run, rows) for rows in (sides.reference, sides.evaluated)]
        of_runs.append(Partition(name, run.concepts, *codes))
        progress.advance()
    baselines = [
        Partition("one concept", 1, *(np.zeros_like(rows.place) for rows in (sides.reference, sides.evaluated)))
    ]
    for concepts in sorted({part.concepts for part in of_runs}):
        first = next(part for part in of_runs if part.concepts == concepts)
        generator = np.random.default_rng([seed, 2])
        shuffled = [generator.permutation(codes) for codes in (first.reference, first.evaluated)]
        baselines.append(Partition(f"shuffled ({concepts})", concepts, *shuffled))
        baselines.append(word_types(sides, concepts))
    return of_runs, baselines


def word_types(sides: Sides, concepts: int) -> Partition:
    """Each of the most frequent training words a concept, all other words the last one."""
    words = [rows.attributes[WORD] for rows in (sides.reference, sides.evaluated)]
    counts = np.bincount(words[0], minlength=len(sides.names[WORD]))
    common = np.argsort(-counts, kind="stable")[: concepts - 1]
    table = np.full(len(counts), concepts - 1, dtype=np.int64)
    table[common] = np.arange(len(common))
    return Partition(f"word types ({concepts})", concepts, *(table[part] for part in words))


def _assign(cache: Cache, run: Run, rows: Rows) -> Int64[np.ndarray, " row"]:
    site = run.config.lower
    return np.concatenate([run.assign(vectors[site]) for _, vectors in cache.blocks([site], rows.place)])
