"""Removing directions, and the controls."""

import numpy as np
import pytest
import torch
from clvq.errors import ConfigError
from clvq.evaluation.bootstrap import estimate
from clvq.evaluation.removal import Directions, matched_random, norm_share, remove
from clvq.trainer.run import Run

D = 24


def _vectors(seed: int, rows: int = 50) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = 5 * torch.randn(rows, D, generator=generator) + 3
    unit = torch.nn.functional.normalize(torch.randn(rows, D, generator=generator), dim=-1)
    return hidden, unit, torch.randn(D, generator=generator), torch.randn(rows, D, generator=generator)


def test_a_zero_direction_changes_nothing():
    hidden, unit, centre, _ = _vectors(0)
    assert torch.equal(remove(hidden, torch.zeros_like(unit), centre), hidden)


@pytest.mark.parametrize("centred", [False, True])
def test_removal_equals_the_projector_in_float64(centred: bool):
    hidden, unit, centre, _ = _vectors(1)
    centre = centre if centred else torch.zeros(D)
    for h, u, found in zip(hidden, unit, remove(hidden, unit, centre), strict=True):
        h64, u64, m64 = (part.double().numpy() for part in (h, u, centre))
        projector = np.eye(D) - np.outer(u64, u64)
        np.testing.assert_allclose(found.numpy(), m64 + projector @ (h64 - m64), atol=1e-5)


def test_after_a_centred_removal_no_offset_along_the_direction_is_left():
    hidden, unit, centre, _ = _vectors(2)
    once = remove(hidden, unit, centre)
    assert ((once - centre) * unit).sum(-1).abs().max() < 1e-5
    torch.testing.assert_close(remove(once, unit, centre), once, atol=1e-5, rtol=0)


def test_a_matched_random_direction_has_the_same_cosine_and_removes_the_same_norm():
    hidden, unit, centre, noise = _vectors(3)
    other = matched_random(hidden, unit, centre, noise)
    torch.testing.assert_close(other.norm(dim=-1), torch.ones(len(hidden)), atol=1e-5, rtol=0)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(hidden - centre, other), cosine(hidden - centre, unit), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        (hidden - remove(hidden, other, centre)).norm(dim=-1),
        (hidden - remove(hidden, unit, centre)).norm(dim=-1),
        atol=1e-4,
        rtol=0,
    )
    # Beyond the part along h − m that both must share, nothing of the code is left in it.
    along = torch.nn.functional.normalize(hidden - centre, dim=-1)
    rest = [part - (part * along).sum(-1, keepdim=True) * along for part in (unit, other)]
    assert cosine(*rest).mean().abs() < 0.1


def test_a_concept_without_direction_is_matched_by_removing_nothing():
    hidden, unit, centre, noise = _vectors(4)
    other = matched_random(hidden, torch.zeros_like(unit), centre, noise)
    torch.testing.assert_close(remove(hidden, other, centre), hidden, atol=1e-4, rtol=0)


def test_norm_share_is_what_was_taken_of_what_was_there():
    before = np.array([[3.0, 4.0], [0.0, 0.0]], dtype=np.float32)
    assert norm_share(before, np.array([[3.0, 0.0], [0.0, 0.0]], dtype=np.float32)) == pytest.approx(0.8)
    assert norm_share(np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32)) == 0.0


class _Run(Run):
    """A run of which only the counts matter."""

    def __init__(self, counts: list[int]) -> None:
        # Cached properties of the base class are filled, so that they are never computed.
        vars(self)["counts"] = np.array(counts)
        vars(self)["lower_mean"] = np.ones(3, dtype=np.float32)

    @property
    def concepts(self) -> int:
        return len(self.counts)

    def published_direction(self, concept: int) -> np.ndarray:
        return np.eye(3, dtype=np.float32)[concept % 3]


def test_another_code_is_in_use_and_never_the_code_itself():
    directions = Directions(_Run([4, 0, 2, 9, 0, 1]), "projection")
    codes = np.repeat([0, 2, 3, 5], 200)
    others = directions.other(codes, np.arange(len(codes)))
    assert (others != codes).all()
    for code in (0, 2, 3, 5):
        assert set(others[codes == code]) == {0, 2, 3, 5} - {code}


def test_a_run_with_one_concept_has_no_control():
    with pytest.raises(ConfigError, match="fewer than two concepts in use: there is no other code to compare with"):
        Directions(_Run([0, 7]), "projection")


def test_bootstrap_intervals_have_the_width_that_theory_gives():
    values = np.random.default_rng(0).normal(2.0, 3.0, size=900)
    found = estimate(values, seed=0)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_leaves_out_texts_without_a_value():
    values = np.array([1.0, np.nan, 3.0])
    assert estimate(values, seed=0).value == 2.0
    assert np.isnan(estimate(np.array([np.nan]), seed=0).low)
