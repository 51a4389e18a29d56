"""What the controls say where there is nothing to find: codes permuted among rows."""

from typing import Any

import numpy as np
import pytest
import torch
from clvq.evaluation.bootstrap import estimate
from clvq.evaluation.controls import OWN, Displacements, Subject, Taken, Vectors
from clvq.evaluation.outcome import Outcome
from clvq.evaluation.removal import Directions
from clvq.trainer.run import Run

WIDTH, CODES, TEXTS, REPETITIONS = 64, 20, 100, 200
CPU = torch.device("cpu")


class _Run(Run):
    """A run that knows the true clusters of its training rows."""

    def __init__(self, rows: np.ndarray, codes: np.ndarray) -> None:
        # Cached properties of the base class are filled, so that they are never computed.
        mine = vars(self)
        mine["counts"] = np.bincount(codes, minlength=CODES)
        mine["lower_mean"] = rows.mean(axis=0).astype(np.float32)
        means = [
            rows[codes == code].mean(axis=0) if (codes == code).any() else np.zeros(WIDTH) for code in range(CODES)
        ]
        mine["concept_means"] = np.stack(means).astype(np.float32)

    @property
    def config(self) -> Any:
        return type("Config", (), {"lower": "hidden.1"})

    @property
    def concepts(self) -> int:
        return CODES

    def direction(self, concept: int, site: str) -> np.ndarray:
        own = (self.concept_means[concept] - self.lower_mean).astype(np.float64)
        return (own / np.linalg.norm(own))[None].astype(np.float32)


def _gaps(seed: int, evenness: float) -> dict[Subject, np.ndarray]:
    """Probability lost by the permuted own code less that by each control, in a random network of two layers."""
    generator = np.random.default_rng(seed)
    first = torch.from_numpy(generator.normal(size=(WIDTH, WIDTH)).astype(np.float32) / 8)
    second = torch.from_numpy(generator.normal(size=(WIDTH, 3)).astype(np.float32) / 3)
    centres, mean = generator.normal(size=(CODES, WIDTH)), 0.5 * generator.normal(size=WIDTH)
    sizes = generator.dirichlet(np.full(CODES, evenness))

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        codes = generator.choice(CODES, size=count, p=sizes)
        return codes, mean + centres[codes] + 0.7 * generator.normal(size=(count, WIDTH))

    def answers(states: torch.Tensor) -> np.ndarray:
        hidden = torch.nn.functional.gelu(states @ first)
        return (hidden @ second).double().softmax(dim=-1).numpy()

    trained, rows = draw(2000)
    run = _Run(rows, trained)
    codes, states = draw(TEXTS)
    hidden = torch.from_numpy(states.astype(np.float32))
    before = answers(hidden)
    taken = Taken(
        [np.array([[code]]) for code in generator.permutation(codes)],
        [np.array([0])] * TEXTS,
        np.flatnonzero(run.counts > 0),
        ids=range(TEXTS),
        classes=before.argmax(axis=1).tolist(),
        seed=seed,
    )
    directions = Directions(run, "centred", device=CPU)
    vectors = Vectors.drawn(hidden, range(TEXTS), [1] * TEXTS, seed=seed)
    displacements = Displacements(
        directions, vectors, directions.centre, lambda subject: torch.from_numpy(taken.filled(subject, range(TEXTS)))
    )
    lost = {}
    subjects: tuple[Subject, ...] = (OWN, "matched code", "matched random", "same label")
    for subject in subjects:
        part = np.flatnonzero([taken.takes_part(subject, number) for number in range(TEXTS)])
        after = answers(hidden - displacements.of(subject))
        outcome = Outcome.empty(TEXTS)
        outcome.note(part, before[part], after[part], np.full(len(part), np.nan), np.zeros(len(part)))
        lost[subject] = outcome.probability_lost
    return {subject: lost[OWN] - values for subject, values in lost.items() if subject != OWN}


@pytest.mark.parametrize(("evenness", "random"), [(50.0, 0.91), (1.0, 0.82)])
def test_permuted_codes_seldom_beat_their_controls(evenness: float, random: float):
    """Where many texts share few codes their figures are not independent, and the matched random control shows it."""
    covered: dict[Subject, list[bool]] = {}
    for seed in range(REPETITIONS):
        for subject, gap in _gaps(seed, evenness).items():
            found = estimate(gap, seed=seed, resamples=500)
            covered.setdefault(subject, []).append(found.low <= 0 <= found.high)
    share = {subject: np.mean(values) for subject, values in covered.items()}
    assert share["matched code"] >= 0.91
    assert share["same label"] >= 0.91
    assert share["matched random"] >= random
