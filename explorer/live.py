"""What a site can do with the model at hand: take concepts out of a text and see the prediction, read a new text.

A removal is that of `clvq ablate`: from all rows of the concepts, at the run's lower site, with the blocks above it
running on. Typed texts are tokenised and read as the cache was made, and their vectors rounded as it stores them, so
that a text has the same concepts in both.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int64

from ..cache.encoding import dequantise, from_bits, quantise, to_bits
from ..cache.reader import Cache
from ..errors import ConfigError
from ..evaluation.patched import CleanBatch, Forwards, Patched, spots_of, tokenised
from ..evaluation.removal import Directions, Removal
from ..evaluation.rows import TextRows, changed_rows, rows_by_text
from ..pipeline.language_model import LanguageModel
from ..trainer.run import Run

_KEPT_TEXTS = 8


@runtime_checkable
class TypedText(Protocol):
    """A text that stands in no cache, as `pipeline.typed.read_typed` reads it."""

    @property
    def ids(self) -> list[int]:
        """What the model was given."""

    @property
    def columns(self) -> Mapping[str, Int64[np.ndarray, " row"]]:
        """`position`, `subwords`, `token`, `char_start`, `char_end` and `special` of each row."""

    @property
    def vectors(self) -> Mapping[str, Float32[np.ndarray, "row _d"]]:
        """By site."""

    @property
    def logits(self) -> Float32[np.ndarray, " class"] | None:
        """Of the classes."""

    @property
    def saliency(self) -> Float32[np.ndarray, " row"] | None:
        """Of each row."""

    @property
    def truncated(self) -> int:
        """Tokens that were left out."""


ReadTyped = Callable[[LanguageModel, str, Sequence[str]], TypedText]
"""Reads a text at some sites."""


@dataclass(frozen=True)
class _Text:
    """A text before the model, and the concepts of its rows by id of the run."""

    rows: TextRows
    ids: list[int]
    codes: Mapping[str, Int64[np.ndarray, " row"]]


class Live:
    """The model with the runs of a site. One thing is done at a time.

    Parameters
    ----------
    runs
        By their ids on the site.
    texts
        `text_id` of each text of the site, by its number.
    read_typed
        How a typed text is read.
    """

    def __init__(
        self,
        cache: Cache,
        runs: Mapping[str, Run],
        texts: Sequence[int],
        model: LanguageModel,
        read_typed: ReadTyped,
    ) -> None:
        self._cache, self._runs, self._texts = cache, runs, texts
        self._model, self._read_typed = model, read_typed
        self._directions: dict[tuple[str, Removal], Directions] = {}
        self._known: OrderedDict[int | str, _Text] = OrderedDict()
        self._clean: OrderedDict[tuple[int | str, str], tuple[CleanBatch, Any]] = OrderedDict()
        self._turn = threading.Lock()

    def remove(
        self, run: str, text: int | str, codes: Sequence[int], removal: Removal, rows: Sequence[int] | None
    ) -> dict[str, Any]:
        """Probabilities before and after concepts are taken out of a text.

        Parameters
        ----------
        text
            Number on the site, or what somebody typed.
        rows
            Numbers of the rows to change; all that have one of the concepts where it is `None`.

        Raises
        ------
        ConfigError
            Where there is no such run, text, concept or row.
        """
        chosen = self._run(run)
        for code in codes:
            if not 0 <= code < chosen.concepts:
                raise ConfigError(f"there is no concept {code}: they are numbered 0 to {chosen.concepts - 1}")
        with self._turn:
            found = self._find(text)
            count = len(found.rows.row)
            for row in rows or ():
                if not 0 <= row < count:
                    raise ConfigError(f"the text has no row {row}: they are numbered 0 to {count - 1}")
            mine = found.codes[run]
            changed = changed_rows(found.rows, None, "all", chosen.config.special)
            changed = changed[np.isin(mine[changed], np.array(list(codes), dtype=np.int64))]
            if rows is not None:
                changed = changed[np.isin(changed, np.array(rows, dtype=np.int64))]
            before, after = self._answers(text, found, chosen, run, changed, removal)
        return {"before": before.tolist(), "after": after.tolist(), "rows": changed.tolist()}

    def read(self, text: str) -> dict[str, Any]:
        """A typed text as the site shows those of the cache.

        Raises
        ------
        ConfigError
            Where it is empty.
        DataError
            Where the model fails on it.
        """
        with self._turn:
            typed = self._typed(text)
            found = self._find(text, typed)
        columns = typed.columns
        spans = np.stack([columns[name] for name in ("char_start", "char_end", "special")], axis=1)
        codes = {}
        for name, run in self._runs.items():
            member = np.isin(np.arange(len(spans)), changed_rows(found.rows, None, "all", run.config.special))
            codes[name] = [
                code if there else None for code, there in zip(found.codes[name].tolist(), member.tolist(), strict=True)
            ]
        told: dict[str, Any] = {
            "text": text,
            "rows": spans.tolist(),
            "codes": codes,
            "prediction": None,
            "probabilities": None,
            "saliency": None,
            "truncated": typed.truncated,
        }
        if typed.logits is not None:
            probabilities = torch.from_numpy(typed.logits.astype(np.float64)).softmax(dim=-1).numpy()
            told |= {"prediction": int(probabilities.argmax()), "probabilities": probabilities.tolist()}
        if typed.saliency is not None and np.isfinite(typed.saliency).all():
            told["saliency"] = typed.saliency.tolist()
        return told

    def _run(self, run: str) -> Run:
        if run not in self._runs:
            raise ConfigError(f"the site has no run {run!r}; it has {', '.join(self._runs)}")
        return self._runs[run]

    def _find(self, text: int | str, typed: TypedText | None = None) -> _Text:
        if text not in self._known:
            found = self._stored(text) if isinstance(text, int) else self._from_typed(typed or self._typed(text))
            _keep(self._known, text, found)
        return self._known[text]

    def _stored(self, number: int) -> _Text:
        if not 0 <= number < len(self._texts):
            raise ConfigError(f"the site has no text {number}: they are numbered 0 to {len(self._texts) - 1}")
        chosen = np.zeros(len(self._cache.texts), dtype=bool)
        chosen[self._cache.text_index[self._texts[number]]] = True
        (rows,) = rows_by_text(self._cache, chosen)
        ((_, (ids,)),) = tokenised(self._cache, self._model, [rows])
        codes = {name: run.assign(self._cache.vectors(run.config.lower, rows.row)) for name, run in self._runs.items()}
        return _Text(rows, ids, codes)

    def _typed(self, text: str) -> TypedText:
        if not text.strip():
            raise ConfigError("the text is empty: type some words")
        return self._read_typed(self._model, text, list(dict.fromkeys(run.config.lower for run in self._runs.values())))

    def _from_typed(self, typed: TypedText) -> _Text:
        columns = {name: typed.columns[name] for name in ("position", "subwords", "token", "special")}
        rows = TextRows(text=-1, row=np.arange(len(columns["position"])), **columns)
        codes = {
            name: run.assign(_as_stored(self._cache, run.config.lower, typed.vectors[run.config.lower]))
            for name, run in self._runs.items()
        }
        return _Text(rows, typed.ids, codes)

    @torch.no_grad()
    def _answers(
        self,
        text: int | str,
        found: _Text,
        run: Run,
        name: str,
        changed: Int64[np.ndarray, " changed"],
        removal: Removal,
    ) -> tuple[Any, Any]:
        site = run.config.lower
        batch, before = self._unchanged(text, found, site)
        patched = Patched(self._model, site, batch, before, Forwards())
        spots = spots_of([found.rows], [changed])
        at = torch.from_numpy(found.codes[name][changed][spots.row][:, None]).to(self._model.device)
        directions = self._directions_of(name, run, removal)
        change = directions.displacement(spots.vectors(patched.hidden), at, directions.centre)
        (after,) = patched.answers(patched.ask(spots, change, 1.0), spots.place)
        return before[0], after

    def _unchanged(self, text: int | str, found: _Text, site: str) -> tuple[CleanBatch, Any]:
        """The text as the model sees it, and its probabilities."""
        key = text, site
        if key not in self._clean:
            ids, mask = self._model.pad([found.ids])
            states, _ = self._model.read(ids, mask, [site])
            hidden = states[site]
            logits = self._model.logits_from(site, hidden, ids, mask)
            # As `read_clean` has them.
            before = logits.float().softmax(dim=-1).double().cpu().numpy()
            _keep(self._clean, key, (CleanBatch([0], ids, mask, hidden.dtype, hidden), before))
        return self._clean[key]

    def _directions_of(self, name: str, run: Run, removal: Removal) -> Directions:
        key = name, removal
        if key not in self._directions:
            self._directions[key] = Directions(run, removal, device=self._model.device)
        return self._directions[key]


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    """Keep a value; the oldest one goes where there are too many."""
    kept[key] = value
    while len(kept) > _KEPT_TEXTS:
        kept.popitem(last=False)


def _as_stored(cache: Cache, site: str, vectors: Float32[np.ndarray, "row d"]) -> Float32[np.ndarray, "row d"]:
    """The vectors with the rounding of the cache's encoding."""
    encoding = cache.manifest.sites[site].encoding
    if encoding == "int8":
        name = f"channel_scale/{site}"
        scale = cache.files.read(name, cache.layouts[name], np.arange(cache.width(site)))
        return dequantise(*quantise(vectors, scale, site=site), scale)
    return from_bits(to_bits(vectors, encoding, site=site), encoding)
