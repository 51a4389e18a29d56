"""Two ways of asking what a removal did: the model's own upper layers and head, and the paper's probe."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from ..cache.reader import Cache
from ..errors import ConfigError
from ..pipeline.language_model import LanguageModel
from ..progress import Progress
from ..trainer.run import Run
from .probe import cross_validated
from .removal import SUBJECTS, Directions, Removal, Subject, matched_random, norm_share, remove
from .rows import RowsChanged, TextRows, changed_rows
from .saliency import run_clean, salient_row

_BATCH_SLOTS = 4096


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
    site: int,
    removals: Sequence[Removal],
    rows_changed: RowsChanged,
    seed: int,
    progress: Progress,
) -> ModelReadOut:
    """Run the model with concepts removed at the site. With no runs, only the salient rows are found.

    Raises
    ------
    ConfigError
        Where no text has a row of the kind to be changed.
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
        salient=[None] * len(texts),
    )
    directions = {(one.name, removal): Directions(one.run, removal) for one in asked for removal in removals}
    progress.begin("ablate", len(texts), "texts")
    for numbers, ids in _batches(cache, model, texts):
        progress.check()
        clean = run_clean(model, site, ids)
        hidden = clean.hidden.float()
        before = clean.probabilities.double().cpu().numpy()
        for place, number in enumerate(numbers):
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
                    after_hidden = _removed(hidden, codes, subject, table, noise)
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
    for one in asked:
        if not np.isfinite(result.outcomes[one.name, removals[0], SUBJECTS[0]].norm_removed).any():
            raise ConfigError(
                f"no text has a row to change with --rows-changed {rows_changed}"
                + ("; the tokenizer adds no leading special token" if rows_changed == "cls" else "")
            )
    return result


def read_out_probe(
    cache: Cache,
    asked: Sequence[Asked],
    texts: Sequence[TextRows],
    salient: Sequence[int | None],
    *,
    removals: Sequence[Removal],
    rows_changed: RowsChanged,
    cls_vectors: bool,
    seed: int,
    progress: Progress,
) -> tuple[Outcome, dict[Condition, Outcome]]:
    """The paper's protocol: one vector per text (CLS for encoders, the mean row for decoders) loses the concept.

    Parameters
    ----------
    cls_vectors
        Take each text's CLS row rather than its mean row.

    Returns
    -------
    clean, outcomes
        What the probes say of the unchanged vectors, and of each condition's.

    Raises
    ------
    ConfigError
        Where every row is to be changed, texts have no labels, or an encoder's cache has no CLS rows.
    """
    if rows_changed == "all":
        raise ConfigError(
            "the probe changes one vector per text: choose --rows-changed salient or cls, or --read-out model"
        )
    site = asked[0].run.config.lower
    labels = cache.texts["label"]
    part = []
    for number, rows in enumerate(texts):
        chosen = salient[number] if rows_changed == "salient" else rows.first_special()
        vector_there = not cls_vectors or rows.first_special() is not None
        if chosen is not None and vector_there and labels[rows.text].as_py() is not None:
            part.append((number, chosen))
    if not part:
        raise ConfigError("the probe needs labelled texts with a row to remove; the chosen texts have none")
    clean = np.stack([_text_vector(cache, site, texts[number], cls_vectors=cls_vectors) for number, _ in part])
    targets = np.array([labels[texts[number].text].as_py() for number, _ in part], dtype=np.int64)
    hidden = torch.from_numpy(clean)[:, None]
    noise = _noise(seed, [texts[number].text for number, _ in part], (1, clean.shape[1]))
    changed: dict[str, Float32[np.ndarray, "text d"]] = {}
    conditions: dict[str, Condition] = {}
    for one in asked:
        own = np.array([one.codes[number][chosen] for number, chosen in part])
        shifts = np.array([_shift(seed, texts[number].text) for number, _ in part])
        for removal in removals:
            table = Directions(one.run, removal)
            for subject in SUBJECTS:
                codes = table.other(own, shifts) if subject == "random code" else own
                name = f"{one.name}\0{removal}\0{subject}"
                changed[name] = _removed(hidden, codes[:, None], subject, table, noise)[:, 0].numpy()
                conditions[name] = (one.name, removal, subject)
    answers = cross_validated(clean, targets, changed, seed=seed, progress=progress)
    outcomes = {}
    for name, after in answers.items():
        outcome = Outcome.empty(len(texts))
        vectors = changed.get(name, clean)
        for place, (number, _) in enumerate(part):
            share = norm_share(clean[place], vectors[place])
            outcome.note(number, answers["clean"][place], after[place], int(targets[place]), share)
        outcomes[name] = outcome
    return outcomes.pop("clean"), {conditions[name]: outcome for name, outcome in outcomes.items()}


def _text_vector(cache: Cache, site: str, rows: TextRows, *, cls_vectors: bool) -> Float32[np.ndarray, " d"]:
    first = rows.first_special()
    which = rows.row[[first]] if cls_vectors and first is not None else rows.row
    vector: Float32[np.ndarray, " d"] = cache.vectors(site, which).mean(axis=0)
    return vector


def _batches(
    cache: Cache, model: LanguageModel, texts: Sequence[TextRows]
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Texts in batches of like length, tokenised as when the cache was made."""
    settings = cache.manifest.identity["settings"]
    max_length = settings["max_length"] if isinstance(settings, Mapping) else None
    if not isinstance(max_length, int):
        raise ConfigError(f"the manifest of {cache.path} does not say how long its texts may be")
    column = cache.texts["text"]
    length = [int(rows.position.max()) for rows in texts]
    order = sorted(range(len(texts)), key=lambda number: (length[number], number))
    while order:
        size = max(1, _BATCH_SLOTS // (length[order[min(len(order), 64) - 1]] + 2))
        numbers, order = order[:size], order[size:]
        tokens = model.source.tokenize(
            [column[texts[number].text].as_py() for number in numbers], max_length=max_length
        )
        yield numbers, [part.ids.tolist() for part in tokens]


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
) -> Float[Tensor, "batch seq d"]:
    device = hidden.device
    at = torch.from_numpy(codes).to(device)
    centre = table.centre.to(device)
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
