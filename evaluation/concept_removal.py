"""Removing one concept everywhere in a text, concept by concept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64

from ..pipeline.language_model import LanguageModel
from ..progress import Progress
from .bootstrap import Estimate, estimate
from .controls import Displacements, Vectors
from .patched import CleanTexts, Forwards, Patched, Spots, spots_of
from .readouts import Asked
from .removal import Directions, Removal
from .rows import TextRows, changed_rows
from .significance import holm, sign_flip_p


@dataclass(frozen=True)
class Pairs:
    """What became of texts when one of their concepts was removed from all rows that belong to it."""

    text: Int64[np.ndarray, " pair"]
    concept: Int64[np.ndarray, " pair"]
    changes: Float64[np.ndarray, "pair class"]
    """Probability of each class after less before."""
    probability_lost: Float64[np.ndarray, " pair"]
    """Of the class predicted before."""
    flipped: Float64[np.ndarray, " pair"]
    control_lost: Float64[np.ndarray, " pair"]
    """As `probability_lost`, by the matched random control."""


@dataclass(frozen=True)
class ConceptEffect:
    """What removing one concept did to the texts that it was removed from.

    Without `--concepts`, these are the texts whose salient row belongs to it, and only the means are known.
    """

    run: str
    concept: int
    texts: int
    probability_lost: float
    flipped: float
    removal: Removal | None = None
    class_changes: list[float] | None = None
    """Mean change of each class's probability: which predictions the concept carries."""
    lost: Estimate | None = None
    """`probability_lost` with its interval; `None` for a concept of too few texts."""
    control_lost: Estimate | None = None
    """Probability lost by the matched random control."""
    own_minus_control: Estimate | None = None
    p: float | None = None
    """Of `own_minus_control`, by sign flips, Holm-adjusted over the run's concepts of enough texts."""


def remove_each_concept(
    model: LanguageModel,
    clean: CleanTexts,
    one: Asked,
    texts: Sequence[TextRows],
    removal: Removal,
    *,
    site: str,
    seed: int,
    forwards: Forwards,
    progress: Progress,
) -> Pairs:
    """Run the blocks above the site for each text and each of its concepts, and for the matched random control.

    Rows of the kinds that the run was trained on lose their concept; the strongest latent is that of a latent model.
    """
    directions = Directions(one.run, removal, device=model.device)
    pieces: list[Pairs] = []
    progress.begin(f"concepts of {one.name}", len(texts), "texts")
    for batch in clean.batches:
        progress.check()
        before = clean.probabilities[np.array(batch.numbers)]
        patched = Patched(model, site, batch, before, forwards)
        mine = [texts[number] for number in batch.numbers]
        changed = [changed_rows(rows, None, "all", one.run.config.special) for rows in mine]
        whole = spots_of(mine, changed)
        codes = np.concatenate([one.codes[number][rows] for number, rows in zip(batch.numbers, changed, strict=True)])
        at = codes[whole.row]
        vectors = Vectors.drawn(
            whole.vectors(patched.hidden), [rows.text for rows in mine], np.diff(whole.bounds).tolist(), seed=seed
        )
        concepts = torch.from_numpy(at[:, None]).to(model.device)
        displacements = Displacements(directions, vectors, directions.centre, lambda _, found=concepts: found)  # type: ignore[misc]
        spots, order, kinds = _by_concept(whole, at)
        there = torch.from_numpy(order).to(model.device)
        own, control = (
            patched.ask(spots, displacements.of(subject)[there], 1.0) for subject in ("own code", "matched random")
        )
        after, randomly = (patched.answers(tickets, spots.place) for tickets in (own, control))
        was = before[spots.place]
        predicted, rows_of = was.argmax(axis=1), np.arange(len(was))
        pieces.append(
            Pairs(
                text=np.array(batch.numbers)[spots.place],
                concept=kinds,
                changes=after - was,
                probability_lost=(was - after)[rows_of, predicted],
                flipped=(after.argmax(axis=1) != predicted).astype(np.float64),
                control_lost=(was - randomly)[rows_of, predicted],
            )
        )
        progress.advance(len(batch.numbers))
    return Pairs(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in Pairs.__dataclass_fields__))


def _by_concept(
    whole: Spots, codes: Int64[np.ndarray, " row"]
) -> tuple[Spots, Int64[np.ndarray, " row"], Int64[np.ndarray, " segment"]]:
    """A segment for each text and concept, the order of the positions in them, and the concept of each."""
    owner = whole.owner
    order = np.lexsort((whole.position, codes, owner))
    starts = np.flatnonzero(np.diff(owner[order], prepend=-1) | np.diff(codes[order], prepend=-1))
    spots = Spots(
        place=owner[order][starts],
        bounds=np.append(starts, len(order)),
        position=whole.position[order],
        row=whole.row[order],
    )
    return spots, order, codes[order][starts]


def concept_effects(
    run: str, removal: Removal, pairs: Pairs, part: Bool[np.ndarray, " text"], *, min_texts: int, seed: int
) -> list[ConceptEffect]:
    """Each concept's effect over the texts of `part`, the largest total effect first."""
    effects: list[dict[str, Any]] = []
    tested: list[int] = []
    raw: list[float] = []
    chosen = part[pairs.text]
    for concept in np.unique(pairs.concept[chosen]).tolist():
        mine = chosen & (pairs.concept == concept)
        lost, control = pairs.probability_lost[mine], pairs.control_lost[mine]
        estimates: dict[str, Estimate] = {}
        if mine.sum() >= min_texts:
            estimates = {
                "lost": estimate(lost, seed=seed),
                "control_lost": estimate(control, seed=seed),
                "own_minus_control": estimate(lost - control, seed=seed),
            }
            tested.append(len(effects))
            raw.append(float(sign_flip_p(lost - control, seed)))
        effects.append(
            {
                "concept": concept,
                "texts": int(mine.sum()),
                "probability_lost": float(lost.mean()),
                "flipped": float(pairs.flipped[mine].mean()),
                "class_changes": pairs.changes[mine].mean(axis=0).tolist(),
                **estimates,
            }
        )
    adjusted = dict(zip(tested, holm(np.array(raw)).tolist(), strict=True))
    found = [
        ConceptEffect(run=run, removal=removal, p=adjusted.get(place), **effect) for place, effect in enumerate(effects)
    ]
    return by_total_effect(found)


def by_total_effect(effects: Sequence[ConceptEffect]) -> list[ConceptEffect]:
    """The largest total effect first."""
    return sorted(effects, key=lambda effect: -effect.texts * effect.probability_lost)
