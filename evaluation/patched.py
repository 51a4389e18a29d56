"""The model on texts whose states at a site were displaced: blocks above the site only, equal displacements once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from ..cache.reader import Cache
from ..errors import ConfigError, ModelError
from ..pipeline.language_model import LanguageModel
from ..progress import Progress
from .rows import TextRows
from .saliency import run_clean, salient_row

BATCH_SLOTS = 4096
"""Texts × longest text of what runs at once."""
_TEXTS_AT_A_TIME = 512
# Clean states beyond this are read again when they are needed.
_KEPT_BYTES = 2 << 30


@dataclass
class Forwards:
    """How many texts were to be run through the upper blocks, and how many were."""

    asked: int = 0
    run: int = 0


@dataclass(frozen=True)
class CleanBatch:
    """Texts of like length as the model sees them, unchanged."""

    numbers: list[int]
    ids: Int64[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]
    dtype: torch.dtype
    """Of the states as the model has them."""
    kept: Float[Tensor, "batch seq d"] | None

    def hidden(self, model: LanguageModel, site: str) -> Float32[Tensor, "batch seq d"]:
        """States at the site."""
        if self.kept is not None:
            return self.kept.float()
        with torch.no_grad():
            states, _ = model.read(self.ids, self.mask, [site])
        return states[site].float()


@dataclass(frozen=True)
class CleanTexts:
    """What the model makes of all texts unchanged."""

    batches: list[CleanBatch]
    probabilities: Float64[np.ndarray, "text class"]
    salient: list[int | None]


def read_clean(
    cache: Cache,
    model: LanguageModel,
    texts: Sequence[TextRows],
    *,
    site: str,
    salient: Sequence[int | None] | None,
    progress: Progress,
) -> CleanTexts:
    """Run all texts once, with gradients for their salient rows.

    Parameters
    ----------
    salient
        The salient row of each text; `None` to find it by gradient × input.

    Raises
    ------
    ConfigError
        Where no block lies above the site.
    ModelError
        Where the model's tokenizer is not the one that the cache was made with.
    """
    batches: list[CleanBatch] = []
    found = list(salient or [None] * len(texts))
    answers: dict[int, Float64[np.ndarray, " class"]] = {}
    left = _KEPT_BYTES
    progress.begin("read", len(texts), "texts")
    for numbers, ids in tokenised(cache, model, texts):
        progress.check()
        clean = run_clean(model, site, ids)
        probabilities = clean.probabilities.double().cpu().numpy()
        for place, number in enumerate(numbers):
            answers[number] = probabilities[place]
            if salient is None:
                found[number] = salient_row(texts[number], clean.attribution[place])
        left -= clean.hidden.nbytes
        batches.append(
            CleanBatch(numbers, clean.ids, clean.mask, clean.hidden.dtype, clean.hidden if left >= 0 else None)
        )
        progress.advance(len(numbers))
    return CleanTexts(batches, np.stack([answers[number] for number in range(len(texts))]), found)


def tokenised(
    cache: Cache, model: LanguageModel, texts: Sequence[TextRows]
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Texts in batches of like length, tokenised as when the cache was made."""
    settings: Any = cache.manifest.identity["settings"]
    max_length = settings["max_length"] if isinstance(settings, Mapping) else None
    if not isinstance(max_length, int):
        raise ConfigError(f"the manifest of {cache.path} does not say how long its texts may be")
    column = cache.texts["text"]
    # Rows may have been left out, so that the last one only hints at the length.
    order = sorted(range(len(texts)), key=lambda number: (int(texts[number].position.max()), number))
    for start in range(0, len(order), _TEXTS_AT_A_TIME):
        numbers = order[start : start + _TEXTS_AT_A_TIME]
        tokens = model.source.tokenize(
            [column[texts[number].text].as_py() for number in numbers],
            max_length=max_length,
            **{name: settings[name] for name in ("prompt", "answers", "chat") if name in settings},
        )
        batch: list[int] = []
        batch_ids: list[list[int]] = []
        for number, part in sorted(zip(numbers, tokens, strict=True), key=lambda pair: len(pair[1].ids)):
            rows = texts[number]
            if rows.position.max() >= len(part.ids) or (part.ids[rows.position] != rows.token).any():
                text_id = cache.texts["text_id"][rows.text]
                raise ModelError(
                    f"{model.source.name} tokenises text {text_id} of {cache.path} differently "
                    "than when the cache was made: give the model with the tokenizer files that it had then"
                )
            if batch and (len(batch) + 1) * len(part.ids) > BATCH_SLOTS:
                yield batch, batch_ids
                batch, batch_ids = [], []
            batch.append(number)
            batch_ids.append(part.ids.tolist())
        yield batch, batch_ids


@dataclass(frozen=True)
class Spots:
    """Positions of a batch that change, in segments: what changes together in one text."""

    place: Int64[np.ndarray, " segment"]
    """Text of the batch that each segment lies in."""
    bounds: Int64[np.ndarray, " ends"]
    """Segment i has the positions `bounds[i]` to `bounds[i + 1]`."""
    position: Int64[np.ndarray, " row"]
    row: Int64[np.ndarray, " row"]
    """Place of each position's row among the changed rows of all segments; a word has several positions."""

    @property
    def owner(self) -> Int64[np.ndarray, " row"]:
        """Text of the batch that each position lies in."""
        return np.repeat(self.place, np.diff(self.bounds))

    def vectors(self, hidden: Float32[Tensor, "batch seq d"]) -> Float32[Tensor, "row d"]:
        """The states at the positions."""
        there = torch.from_numpy(np.stack([self.owner, self.position])).to(hidden.device)
        return hidden[there[0], there[1]]


def spots_of(texts: Sequence[TextRows], changed: Sequence[Int64[np.ndarray, " _changed"]]) -> Spots:
    """The positions of each text's changed rows; texts without any have an empty segment."""
    positions, counts, sub_words = [np.zeros(0, dtype=np.int64)], [0], [np.zeros(0, dtype=np.int64)]
    for rows, numbers in zip(texts, changed, strict=True):
        spans = rows.subwords[numbers]
        first = rows.position[numbers] - spans + 1
        within = np.arange(spans.sum()) - np.repeat(np.cumsum(spans) - spans, spans)
        positions.append(np.repeat(first, spans) + within)
        counts.append(int(spans.sum()))
        sub_words.append(spans)
    spans = np.concatenate(sub_words)
    return Spots(
        place=np.arange(len(texts)),
        bounds=np.cumsum(counts),
        position=np.concatenate(positions),
        row=np.repeat(np.arange(len(spans)), spans),
    )


Key = tuple[int, float, bytes]
"""Text of the batch, strength, and what tells its displacement from others."""


@dataclass(frozen=True)
class _Waiting:
    key: Key
    place: int
    position: Int64[np.ndarray, " row"]
    change: Float32[Tensor, "row d"]
    strength: float


class Patched:
    """Answers of the model about one batch, with states displaced.

    Questions are collected until they fill a batch. Texts that are asked about with equal displacements, by whatever
    run or control, are run once; one with a displacement of zero is not run: its answer is the clean one.

    Parameters
    ----------
    clean
        Probabilities of the batch's texts, unchanged.
    """

    def __init__(
        self,
        model: LanguageModel,
        site: str,
        batch: CleanBatch,
        clean: Float64[np.ndarray, "batch class"],
        forwards: Forwards,
    ) -> None:
        self._model, self._site, self._batch, self._clean, self._forwards = model, site, batch, clean, forwards
        self.hidden = batch.hidden(model, site)
        self._capacity = max(1, BATCH_SLOTS // batch.ids.shape[1])
        self._waiting: list[_Waiting] = []
        self._answers: dict[Key, Float64[np.ndarray, " class"] | None] = {}
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(2, self.hidden.shape[2], generator=generator, dtype=torch.float64)
        self._probes = probes.to(self.hidden.device)

    def ask(self, spots: Spots, change: Float32[Tensor, "row d"], strength: float) -> list[Key | None]:
        """A ticket for each segment: its text with `strength` × `change` taken from its positions."""
        # Two sums in float64 tell displacements apart without a copy of them on the host.
        wide = change.double()
        marks = torch.stack([(wide * probe).sum(dim=1) for probe in self._probes] + [(wide != 0).any(dim=1).double()])
        prints = np.concatenate([spots.position[:, None].astype(np.float64), marks.T.cpu().numpy()], axis=1)
        tickets: list[Key | None] = []
        for segment, place in enumerate(spots.place.tolist()):
            part = slice(int(spots.bounds[segment]), int(spots.bounds[segment + 1]))
            self._forwards.asked += 1
            if not prints[part, 3].any():
                tickets.append(None)
                continue
            key = (place, strength, prints[part].tobytes())
            tickets.append(key)
            if key not in self._answers:
                self._answers[key] = None
                self._wait(_Waiting(key, place, spots.position[part], change[part], strength))
        return tickets

    def ask_unchanged(self) -> list[Key | None]:
        """A ticket for each text with nothing taken from it, which is run all the same."""
        nowhere = np.zeros(0, dtype=np.int64)
        keys: list[Key | None] = []
        for place in range(len(self._batch.numbers)):
            key = (place, 0.0, b"")
            self._forwards.asked += 1
            self._answers[key] = None
            self._wait(_Waiting(key, place, nowhere, self.hidden[0, :0], 0.0))
            keys.append(key)
        return keys

    def answers(
        self, tickets: Sequence[Key | None], places: Int64[np.ndarray, " segment"]
    ) -> Float64[np.ndarray, "segment class"]:
        """The probabilities that tickets stand for; runs what still waits."""
        if self._waiting:
            self._run()
        found: Float64[np.ndarray, "segment class"] = self._clean[places].copy()
        for segment, key in enumerate(tickets):
            if key is not None:
                answer = self._answers[key]
                if answer is not None:
                    found[segment] = answer
        return found

    def _wait(self, one: _Waiting) -> None:
        self._waiting.append(one)
        if len(self._waiting) >= self._capacity:
            self._run()

    @torch.no_grad()
    def _run(self) -> None:
        waiting, self._waiting = self._waiting, []
        device = self.hidden.device
        places = torch.tensor([one.place for one in waiting], device=device)
        states = self.hidden[places]
        counts = [len(one.position) for one in waiting]
        at = torch.from_numpy(
            np.stack([np.repeat(np.arange(len(waiting)), counts), np.concatenate([one.position for one in waiting])])
        ).to(device)
        states[at[0], at[1]] -= torch.cat([one.change * one.strength for one in waiting])
        batch = self._batch
        logits = self._model.logits_from(self._site, states.to(batch.dtype), batch.ids[places], batch.mask[places])
        for one, answer in zip(waiting, logits.double().softmax(dim=-1).cpu().numpy(), strict=True):
            self._answers[one.key] = answer
        self._forwards.run += len(waiting)
