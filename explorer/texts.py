"""The texts that can be opened: which they are, and what is told of each."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from ..cache.reader import Cache
from ..errors import ConfigError
from ..evaluation.rationales import parts_of
from .describe import Concepts, TextFacts
from .rows import Rows, short

_BEGINNING = 80


def facts_of(cache: Cache) -> tuple[TextFacts, list[str], Float64[np.ndarray, "text class"] | None]:
    """Labels and predictions of all texts, the names of their values, and the probabilities where there are some."""
    labels = np.array([-1 if one is None else one for one in cache.texts["label"].to_pylist()], dtype=np.int64)
    predictions = np.full(len(labels), -1, dtype=np.int64)
    probabilities = None
    if cache.manifest.predictions:
        logits = cache.logits().astype(np.float64)
        there = np.isfinite(logits).all(axis=1)
        probabilities = np.full_like(logits, np.nan)
        raised = np.exp(logits[there] - logits[there].max(axis=1, keepdims=True))
        probabilities[there] = raised / raised.sum(axis=1, keepdims=True)
        predictions[there] = logits[there].argmax(axis=1)
    names = list(cache.manifest.class_names or [])
    count = max(int(labels.max(initial=-1)), int(predictions.max(initial=-1)), (cache.manifest.classes or 0) - 1) + 1
    names += [f"class {number}" for number in range(len(names), count)]
    return TextFacts(labels, predictions, len(names)), names, probabilities


def choose_texts(
    rows: Rows,
    held_out: Bool[np.ndarray, " text"],
    concepts: Sequence[Concepts],
    *,
    most: int,
    seed: int,
) -> Int64[np.ndarray, " chosen"]:
    """Rows of `Cache.texts`: the held-out texts first, then others, each part in their order.

    Where there are more texts than can be shown, up to half of the places go to texts with sentences of concepts, the
    most typical sentences first; the others to a sample of the held-out texts, then of all.
    """
    with_rows = np.diff(rows.first) > 0
    said = _with_sentences(rows, concepts)
    generator = np.random.default_rng([seed, 6])
    kept_out = generator.permutation(np.flatnonzero(held_out & with_rows))
    others = generator.permutation(np.flatnonzero(~held_out & with_rows))
    reserved = min(len(said), most // 2)
    order = [kept_out[: most - reserved], said, kept_out, others]
    chosen = np.array(list(dict.fromkeys(np.concatenate(order).tolist()))[:most], dtype=np.int64)
    return np.concatenate([np.sort(chosen[held_out[chosen]]), np.sort(chosen[~held_out[chosen]])])


def _with_sentences(rows: Rows, concepts: Sequence[Concepts]) -> Int64[np.ndarray, " text"]:
    """Texts of sentences: the first sentence of each concept, most used ones first, then the second ones."""
    found: dict[int, None] = {}
    for sentences in ("typical", "drawn"):
        per_run = [[getattr(one, sentences)[place] for place in np.argsort(-one.uses)] for one in concepts]
        longest = max((len(own) for lists in per_run for own in lists), default=0)
        for place in range(longest):
            for lists in per_run:
                found.update((int(rows.text[own[place]]), None) for own in lists if place < len(own))
    return np.array(list(found), dtype=np.int64)


def listed(cache: Cache, chosen: Int64[np.ndarray, " chosen"], facts: TextFacts) -> dict[str, Any]:
    """By what the texts are searched."""
    splits = list(cache.manifest.splits)
    return {
        "first": [short(" ".join(said.split()), _BEGINNING) for said in _column(cache, "text", chosen)],
        "label": _known(facts.labels[chosen]),
        "prediction": _known(facts.predictions[chosen]),
        "split": [splits.index(split) for split in _column(cache, "split", chosen)],
        "splits": splits,
    }


def told(
    cache: Cache,
    rows: Rows,
    chosen: Int64[np.ndarray, " chosen"],
    codes: Mapping[str, Int32[np.ndarray, " row"]],
    facts: TextFacts,
    probabilities: Float64[np.ndarray, "text class"] | None,
    *,
    rationale: str | None,
) -> Iterator[dict[str, Any]]:
    """What the view of each text shows.

    Parameters
    ----------
    codes
        Id of the run → the concept of each row; −1 where it has none.
    """
    starts, ends = cache.column("char_start"), cache.column("char_end")
    saliency = cache.column("saliency") if cache.manifest.saliency else None
    for number, text in enumerate(chosen.tolist()):
        said = cache.texts["text"][text].as_py()
        own = slice(int(rows.first[text]), int(rows.first[text + 1]))
        place = rows.place[own]
        yield {
            "n": number,
            "split": cache.texts["split"][text].as_py(),
            "text": said,
            "label": _known(facts.labels[[text]])[0],
            "prediction": _known(facts.predictions[[text]])[0],
            "probabilities": None if probabilities is None or facts.predictions[text] < 0 else probabilities[text],
            "rows": np.stack([starts[place], ends[place], rows.special[own]], axis=1),
            "codes": {run: _known(found[own]) for run, found in codes.items()},
            "saliency": None if saliency is None else _finite(saliency[place]),
            "rationale": None if rationale is None else marked(said, cache.texts[rationale][text].as_py(), rationale),
        }


def marked(text: str, value: Any, field: str) -> list[list[int]] | None:
    """Where the parts that a kept field names stand in the text; `None` where it names none.

    Raises
    ------
    ConfigError
        Where the field holds something else than a part or parts of a text.
    """
    parts = parts_of(value, field)
    if not parts:
        return None
    inside = np.zeros(len(text) + 2, dtype=bool)
    for part in parts:
        begin = text.find(part)
        while begin >= 0:
            inside[begin + 1 : begin + 1 + len(part)] = True
            begin = text.find(part, begin + 1)
    edges = np.flatnonzero(np.diff(inside.astype(np.int8)))
    return edges.reshape(-1, 2).tolist()


def check_rationale(cache: Cache, field: str | None) -> None:
    """Make sure that the cache keeps the field.

    Raises
    ------
    ConfigError
    """
    names = cache.texts.column_names
    if field is not None and field not in names:
        raise ConfigError(
            f"{cache.path} keeps no field {field!r} of its texts (it has {', '.join(names)}): "
            f"extract with --keep-fields {field}"
        )


def _column(cache: Cache, name: str, chosen: Int64[np.ndarray, " chosen"]) -> list[Any]:
    return list(cache.texts[name].take(chosen).to_pylist())


def _known(values: Int64[np.ndarray, " value"] | Int32[np.ndarray, " value"]) -> list[int | None]:
    return [None if value < 0 else value for value in values.tolist()]


def _finite(values: Float32[np.ndarray, " value"]) -> Float32[np.ndarray, " value"] | None:
    return values if np.isfinite(values).any() else None
