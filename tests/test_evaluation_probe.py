"""The probe of the published protocol, without its selection on the test fold."""

import numpy as np
import pytest
import torch
from clvq.errors import ConfigError
from clvq.evaluation.probe import cross_validated
from clvq.progress import SILENT


def _blobs(gap: float, texts: int = 240, d: int = 12) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = np.arange(texts) % 2
    vectors = generator.normal(size=(texts, d)).astype(np.float32)
    vectors[:, 0] += gap * (2 * labels - 1)
    return vectors, labels


def _answers(vectors: np.ndarray, labels: np.ndarray, seed: int = 0, **changed: np.ndarray) -> dict[str, np.ndarray]:
    answers = {name: np.full((len(labels), labels.max() + 1), np.nan) for name in ("clean", *changed)}
    for held_out, probe in cross_validated(vectors, labels, seed=seed, progress=SILENT):
        for name, asked in (("clean", vectors), *changed.items()):
            # NaN: every text is held out once.
            assert np.isnan(answers[name][held_out]).all()
            answers[name][held_out] = probe(asked[held_out])
    return answers


def _accuracy(answers: np.ndarray, labels: np.ndarray) -> float:
    return float((answers.argmax(axis=1) == labels).mean())


def test_the_probe_learns_what_is_there_and_loses_it_when_it_is_removed():
    vectors, labels = _blobs(4.0)
    without = vectors.copy()
    without[:, 0] = 0
    turned = vectors.copy()
    turned[:, 0] *= -1
    answers = _answers(vectors, labels, without=without, turned=turned)
    assert _accuracy(answers["clean"], labels) > 0.97
    assert 0.3 < _accuracy(answers["without"], labels) < 0.7
    assert _accuracy(answers["turned"], labels) < 0.03


def test_the_probe_does_not_beat_chance_on_labels_that_mean_nothing():
    # Choosing the epoch on the fold that is reported would.
    vectors, _ = _blobs(0.0, texts=400)
    labels = np.random.default_rng(1).permutation(np.arange(400) % 2)
    accuracy = _accuracy(_answers(vectors, labels)["clean"], labels)
    assert abs(accuracy - 0.5) < 3 * 0.025


def test_unchanged_vectors_get_the_same_answers_and_probabilities_sum_to_one():
    vectors, labels = _blobs(1.0, texts=60)
    before = torch.random.get_rng_state()
    answers = _answers(vectors, labels, seed=3, same=vectors.copy())
    np.testing.assert_array_equal(answers["clean"], answers["same"])
    np.testing.assert_allclose(answers["clean"].sum(axis=1), 1.0)
    again = _answers(vectors, labels, seed=3)
    np.testing.assert_array_equal(answers["clean"], again["clean"])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_too_few_texts_of_a_class_are_refused_with_the_numbers():
    vectors, labels = _blobs(1.0, texts=30)
    labels[:] = 0
    labels[:2] = 1
    with pytest.raises(ConfigError, match="three texts each; the chosen texts have 28 of label 0, 2 of label 1"):
        _answers(vectors, labels)
