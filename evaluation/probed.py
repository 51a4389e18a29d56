"""Asking the paper's probe what a removal did: one vector per text loses the concept."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from ..cache.reader import Cache
from ..errors import ConfigError
from ..progress import Progress
from .controls import Displacements, Subject, Taken, Vectors, subjects_of
from .outcome import NOTHING, Condition, Outcome
from .probe import check_labels, cross_validated
from .readouts import Asked, Removals, labels_of, taken_of
from .removal import Directions
from .rows import RowsChanged, TextRows

_CPU = torch.device("cpu")


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
    labels = labels_of(cache, texts)
    part = []
    for number, rows in enumerate(texts):
        cls, ordinary = rows.first_special() is not None, len(rows.ordinary()) > 0
        vector, row = (cls if cls_vectors else ordinary), (ordinary if rows_changed == "salient" else cls)
        if vector and row and not np.isnan(labels[number]):
            part.append(number)
    check_labels(labels[part].astype(np.int64))
    return part


def read_out_probe(
    cache: Cache,
    asked: Sequence[Asked],
    texts: Sequence[TextRows],
    part: Sequence[int],
    changed: Sequence[int | None],
    plan: Removals,
    *,
    cls_vectors: bool,
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
    numbers = np.array(part)
    labels = labels_of(cache, texts)
    site = asked[0].run.config.lower
    clean = _text_vectors(cache, site, [texts[number] for number in part], cls_vectors=cls_vectors)
    in_part = set(part)
    rows = [
        np.array([row] if row is not None and number in in_part else [], dtype=np.int64)
        for number, row in enumerate(changed)
    ]
    classes = [int(labels[number]) if number in in_part else None for number in range(len(texts))]
    by_name = {one.name: one for one in asked}
    made = {
        (name, removal): (
            Directions(by_name[name].run, removal, device=_CPU),
            taken_of(by_name[name], removal, rows, texts, classes, plan.seed),
        )
        for name, removals in plan.removals.items()
        for removal in removals
    }
    outcomes = {condition: Outcome.empty(len(texts)) for condition in (NOTHING, *plan.conditions())}
    unchanged = Outcome.empty(len(texts))
    # Changed vectors are made fold by fold: those of all conditions at once would be many times the texts.
    for places, probe in cross_validated(clean, labels[numbers].astype(np.int64), seed=plan.seed, progress=progress):
        whom = numbers[places]
        before = probe(clean[places])
        nothing = np.zeros(len(places))
        for outcome in (unchanged, outcomes[NOTHING]):
            outcome.note(whom, before, before, labels[whom], nothing)
        hidden = torch.from_numpy(clean[places])
        vectors = Vectors.drawn(hidden, [texts[number].text for number in whom], [1] * len(whom), seed=plan.seed)
        # The site's mean is that of other rows: from it, all of these vectors lie to one side.
        mean = torch.from_numpy(np.delete(clean, places, axis=0).mean(axis=0))
        for (name, removal), (directions, taken) in made.items():
            centre = directions.centre if removal == "projection" else mean
            concepts = partial(_concepts, taken, whom.tolist())
            displacements = Displacements(directions, vectors, centre, concepts)
            for subject in subjects_of(removal, plan.controls):
                delta = displacements.of(subject)
                there = np.array([taken.takes_part(subject, number) for number in whom.tolist()])
                share = (delta.norm(dim=1) / hidden.norm(dim=1).clamp_min(1e-12)).double().numpy()
                for strength in plan.strengths_of(subject):
                    after = probe((hidden - strength * delta).numpy())
                    outcomes[Condition(name, removal, subject, strength)].note(
                        whom[there], before[there], after[there], labels[whom[there]], strength * share[there]
                    )
    return unchanged, outcomes


def _concepts(taken: Taken, numbers: Sequence[int], subject: Subject) -> Int64[Tensor, "row k"]:
    return torch.from_numpy(taken.filled(subject, numbers))


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
