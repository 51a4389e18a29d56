"""Two ways of asking what a removal did: the model's own upper layers and head, and the paper's probe."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from ..cache.reader import Cache
from ..errors import ConfigError, ModelError
from ..pipeline.language_model import LanguageModel
from ..progress import Progress
from ..trainer.run import Run
from .probe import check_labels, cross_validated
from .removal import SUBJECTS, Directions, Removal, Subject, matched_random, norm_share, remove
from .rows import RowsChanged, TextRows, changed_rows
from .saliency import run_clean, salient_row

_BATCH_SLOTS = 4096
_TEXTS_AT_A_TIME = 512


@dataclass(frozen=True)
class Asked:
    """A run whose concepts are removed, and the concept of each evaluated row."""

    name: str
    run: Run
    codes: list[Int64[np.ndarray, " _row"]]
    """One array per text."""


@dataclass(frozen=True)
class Outcome:
    """What one condition did to each text; NaN where a text takes no part."""

    probability_lost: Float64[np.ndarray, " text"]
    """Of the class predicted before the removal."""
    flipped: Float64[np.ndarray, " text"]
    """1 where another class is predicted."""
    correct: Float64[np.ndarray, " text"]
    """1 where the label is predicted."""
    norm_removed: Float64[np.ndarray, " text"]
    """‖h − h′‖ / ‖h‖ over the vectors changed."""

    def only(self, texts: Bool[np.ndarray, " text"]) -> "Outcome":
        """The chosen texts."""
        return Outcome(*(getattr(self, name)[texts] for name in self.__dataclass_fields__))

    @classmethod
    def empty(cls, texts: int) -> "Outcome":
        """No text takes part yet."""
        return cls(*(np.full(texts, np.nan) for _ in range(4)))

    def note(
        self,
        text: int,
        before: Float64[np.ndarray, " class"],
        after: Float64[np.ndarray, " class"],
        label: int | None,
        norm_removed: float,
    ) -> None:
        """Record one text."""
        predicted = int(before.argmax())
        self.probability_lost[text] = before[predicted] - after[predicted]
        self.flipped[text] = float(after.argmax() != predicted)
        if label is not None:
            self.correct[text] = float(after.argmax() == label)
        self.norm_removed[text] = norm_removed


Condition = tuple[str, Removal, Subject]
"""Run, removal, what is removed."""


@dataclass
class ModelReadOut:
    """The model's own answers. Also holds the salient rows, which it finds on the way."""

    clean: Outcome
    outcomes: dict[Condition, Outcome]
    salient: list[int | None] = field(default_factory=list)


def read_out_model(
    cache: Cache,
    model: LanguageModel,
    asked: Sequence[Asked],
    texts: Sequence[TextRows],
    *,
    site: str,
    removals: Sequence[Removal],
    rows_changed: RowsChanged,
    salient: Sequence[int | None] | None,
    seed: int,
    progress: Progress,
) -> ModelReadOut:
    """Run the model with concepts removed at the site. With no runs, only the salient rows are found.

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
    labels = cache.texts["label"]
    result = ModelReadOut(
        clean=Outcome.empty(len(texts)),
        outcomes={
            (one.name, removal, subject): Outcome.empty(len(texts))
            for one in asked
            for removal in removals
            for subject in SUBJECTS
        },
        salient=list(salient or [None] * len(texts)),
    )
    directions = {(one.name, removal): Directions(one.run, removal) for one in asked for removal in removals}
    progress.begin("ablate", len(texts), "texts")
    for numbers, ids in _batches(cache, model, texts):
        progress.check()
        clean = run_clean(model, site, ids)
        hidden = clean.hidden.float()
        before = clean.probabilities.double().cpu().numpy()
        for place, number in enumerate(numbers):
            if salient is None:
                result.salient[number] = salient_row(texts[number], clean.attribution[place])
            label = labels[texts[number].text].as_py()
            result.clean.note(number, before[place], before[place], label, 0.0)
        for one in asked:
            changed = [
                changed_rows(texts[number], result.salient[number], rows_changed, one.run.config.special)
                for number in numbers
            ]
            noise = _noise(seed, [texts[number].text for number in numbers], tuple(hidden.shape[1:]))
            for removal in removals:
                table = directions[one.name, removal]
                for subject in SUBJECTS:
                    codes = _codes_at(one, texts, numbers, changed, hidden.shape[1], subject, table, seed)
                    after_hidden = _removed(hidden, codes, subject, table, noise, table.centre)
                    with torch.no_grad():
                        logits = model.logits_from(site, after_hidden.to(clean.hidden.dtype), clean.ids, clean.mask)
                    after = logits.double().softmax(dim=-1).cpu().numpy()
                    outcome = result.outcomes[one.name, removal, subject]
                    kept, gone = hidden.cpu().numpy(), after_hidden.cpu().numpy()
                    for place, number in enumerate(numbers):
                        if len(changed[place]) == 0:
                            continue
                        at = codes[place] >= 0
                        share = norm_share(kept[place][at], gone[place][at])
                        label = labels[texts[number].text].as_py()
                        outcome.note(number, before[place], after[place], label, share)
        progress.advance(len(numbers))
    return result


def probed_texts(cache: Cache, texts: Sequence[TextRows], rows_changed: RowsChanged, *, cls_vectors: bool) -> list[int]:
    """Numbers of the texts that the probe can be asked about: labelled, with a vector, and with a row to change.

    Raises
    ------
    ConfigError
        Where every row is to be changed, or too few texts have labels.
    """
    if rows_changed == "all":
        raise ConfigError(
            "the probe changes one vector per text: choose --rows-changed salient or cls, or --read-out model"
        )
    labels = cache.texts["label"]
    part = []
    for number, rows in enumerate(texts):
        cls, ordinary = rows.first_special() is not None, len(rows.ordinary()) > 0
        vector, row = (cls if cls_vectors else ordinary), (ordinary if rows_changed == "salient" else cls)
        if vector and row and labels[rows.text].as_py() is not None:
            part.append(number)
    check_labels(_labels(cache, texts, part))
    return part


def read_out_probe(
    cache: Cache,
    asked: Sequence[Asked],
    texts: Sequence[TextRows],
    part: Sequence[int],
    changed: Sequence[int | None],
    *,
    removals: Sequence[Removal],
    cls_vectors: bool,
    seed: int,
    progress: Progress,
) -> tuple[Outcome, dict[Condition, Outcome]]:
    """The paper's protocol: one vector per text loses the concept, and a probe of the clean vectors is asked again.

    Parameters
    ----------
    part
        Numbers of the texts to ask about; see `probed_texts`.
    changed
        Number of the row of each text whose concept is removed.
    cls_vectors
        A text's vector is its CLS row, rather than the mean of its ordinary rows.

    Returns
    -------
    clean, outcomes
        What the probes say of the unchanged vectors, and of each condition's.
    """
    labels = _labels(cache, texts, part)
    clean = _text_vectors(cache, asked[0].run.config.lower, [texts[number] for number in part], cls_vectors=cls_vectors)
    own = {one.name: np.array([one.codes[number][changed[number]] for number in part]) for one in asked}
    shifts = np.array([_shift(seed, texts[number].text) for number in part])
    tables = {(one.name, removal): Directions(one.run, removal) for one in asked for removal in removals}
    nothing = Outcome.empty(len(texts))
    outcomes: dict[Condition, Outcome] = {
        (run, removal, subject): Outcome.empty(len(texts)) for run, removal in tables for subject in SUBJECTS
    }
    # Changed vectors are made fold by fold: those of all conditions at once would be many times the texts.
    for places, probe in cross_validated(clean, labels, seed=seed, progress=progress):
        vectors = clean[places]
        hidden = torch.from_numpy(vectors)[:, None]
        noise = _noise(seed, [texts[part[place]].text for place in places.tolist()], (1, clean.shape[1]))
        # The site's mean is that of other rows: from it, all of these vectors lie to one side.
        mean = torch.from_numpy(np.delete(clean, places, axis=0).mean(axis=0))
        before = probe(vectors)
        for place, was in zip(places.tolist(), before, strict=True):
            nothing.note(part[place], was, was, int(labels[place]), 0.0)
        for (run, removal, subject), outcome in outcomes.items():
            table = tables[run, removal]
            codes = own[run][places]
            if subject == "random code":
                codes = table.other(codes, shifts[places])
            centre = mean if removal == "centred" else table.centre
            gone = _removed(hidden, codes[:, None], subject, table, noise, centre)[:, 0].numpy()
            for row, (place, was, now) in enumerate(zip(places.tolist(), before, probe(gone), strict=True)):
                outcome.note(part[place], was, now, int(labels[place]), norm_share(vectors[row], gone[row]))
    return nothing, outcomes


def _labels(cache: Cache, texts: Sequence[TextRows], part: Sequence[int]) -> Int64[np.ndarray, " part"]:
    labels = cache.texts["label"]
    return np.array([labels[texts[number].text].as_py() for number in part], dtype=np.int64)


def _text_vectors(
    cache: Cache, site: str, texts: Sequence[TextRows], *, cls_vectors: bool
) -> Float32[np.ndarray, "text d"]:
    """Each text's CLS row, or the mean of its ordinary rows: a BOS of huge norm would drown all else."""
    chosen = [rows.row[rows.special == 1 if cls_vectors else rows.ordinary()] for rows in texts]
    counts = np.array([len(rows) for rows in chosen])
    owner = np.repeat(np.arange(len(texts)), counts)
    total = np.zeros((len(texts), cache.width(site)))
    done = 0
    for block, vectors in cache.blocks([site], np.concatenate(chosen)):
        np.add.at(total, owner[done : done + len(block)], vectors[site])
        done += len(block)
    means: Float32[np.ndarray, "text d"] = (total / counts[:, None]).astype(np.float32)
    return means


def _batches(
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
            if batch and (len(batch) + 1) * len(part.ids) > _BATCH_SLOTS:
                yield batch, batch_ids
                batch, batch_ids = [], []
            batch.append(number)
            batch_ids.append(part.ids.tolist())
        yield batch, batch_ids


def _codes_at(
    one: Asked,
    texts: Sequence[TextRows],
    numbers: Sequence[int],
    changed: Sequence[Int64[np.ndarray, " _row"]],
    seq: int,
    subject: Subject,
    table: Directions,
    seed: int,
) -> Int64[np.ndarray, "batch seq"]:
    """The code to be removed at each position; −1 where nothing is. A word's code stands at all its sub-words."""
    codes = np.full((len(numbers), seq), -1, dtype=np.int64)
    for place, number in enumerate(numbers):
        mine = one.codes[number]
        if subject == "random code":
            shift = _shift(seed, texts[number].text)
            mine = table.other(mine, np.full(len(mine), shift))
        for row in changed[place].tolist():
            codes[place, texts[number].positions(row)] = mine[row]
    return codes


def _removed(
    hidden: Float[Tensor, "batch seq d"],
    codes: Int64[np.ndarray, "batch seq"],
    subject: Subject,
    table: Directions,
    noise: Float[Tensor, "batch seq d"],
    centre: Float[Tensor, " d"],
) -> Float[Tensor, "batch seq d"]:
    device = hidden.device
    at = torch.from_numpy(codes).to(device)
    centre = centre.to(device)
    if subject == "mean direction":
        unit = table.mean_direction.to(device).expand_as(hidden)
    else:
        unit = table.table.to(device)[at.clamp_min(0)]
    if subject == "matched random":
        unit = matched_random(hidden, unit, centre, noise.to(device))
    return remove(hidden, unit * (at >= 0)[..., None], centre)


def _noise(seed: int, texts: Sequence[int], shape: tuple[int, ...]) -> Float[Tensor, "batch seq d"]:
    """Standard normal values that depend on the seed and the text alone, not on its batch."""
    parts = [np.random.default_rng([seed, 2, text]).standard_normal(shape, dtype=np.float32) for text in texts]
    return torch.from_numpy(np.stack(parts))


def _shift(seed: int, text: int) -> int:
    return int(np.random.default_rng([seed, 3, text]).integers(1 << 30))
