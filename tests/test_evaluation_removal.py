"""Displacements against float64, and the controls."""

from typing import Any

import numpy as np
import pytest
import torch
from clvq.errors import ConfigError
from clvq.evaluation.bootstrap import estimate, estimates, resampled_means, resampled_over_seeds
from clvq.evaluation.controls import (
    CONTROLS,
    OWN,
    PARTNERED,
    Displacements,
    Taken,
    Vectors,
    other_codes,
    partners,
    subjects_of,
)
from clvq.evaluation.removal import Directions, match, onto_span
from clvq.trainer.run import Run

D, K = 24, 9
CPU = torch.device("cpu")


class _Run(Run):
    """A run made of random tables: code 4 has no rows, and latents depend on each other."""

    def __init__(self, counts: list[int] | None = None) -> None:
        generator = np.random.default_rng(0)
        # Cached properties of the base class are filled, so that they are never computed.
        mine = vars(self)
        mine["counts"] = np.array(counts or [5, 3, 8, 1, 0, 2, 2, 9, 4])
        mine["lower_mean"] = generator.normal(size=D).astype(np.float32)
        mine["concept_means"] = (mine["lower_mean"] + generator.normal(size=(K, D))).astype(np.float32)
        mine["encoder_directions"] = (3 * generator.normal(size=(K, D))).astype(np.float32)
        mine["encoder_directions"][8] = 2 * mine["encoder_directions"][0] - mine["encoder_directions"][1]
        mine["encoder_directions"][7] = 0

    @property
    def config(self) -> Any:
        return type("Config", (), {"lower": "hidden.1"})

    @property
    def concepts(self) -> int:
        return len(self.counts)

    def direction(self, concept: int, site: str) -> np.ndarray:
        assert site == "hidden.1"
        own = (self.concept_means[concept] - self.lower_mean).astype(np.float64)
        return (own / np.linalg.norm(own))[None].astype(np.float32)

    def published_direction(self, concept: int) -> np.ndarray:
        own = self.concept_means[concept].astype(np.float64)
        return (own / np.linalg.norm(own)).astype(np.float32)


def _hidden(rows: int = 60, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, D, generator=generator) + 1


def _codes(rows: int = 60, seed: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(K, size=(rows, 1)))


@pytest.mark.parametrize("removal", ["projection", "centred", "offset"])
def test_a_removal_of_one_code_equals_float64(removal: Any):
    run, hidden, codes = _Run(), _hidden(), _codes()
    directions = Directions(run, removal, device=CPU)
    found = directions.displacement(hidden, codes, directions.centre).numpy()
    for row, code in enumerate(codes[:, 0].tolist()):
        h, m = hidden[row].double().numpy(), run.lower_mean.astype(np.float64)
        mean = run.concept_means[code].astype(np.float64)
        centre = np.zeros(D) if removal == "projection" else m
        u = (mean - centre) / np.linalg.norm(mean - centre)
        expected = mean - m if removal == "offset" else np.outer(u, u) @ (h - centre)
        if run.counts[code] == 0:
            expected = np.zeros(D)
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_a_subspace_removal_leaves_nothing_in_the_span_of_the_active_latents():
    run, hidden = _Run(), _hidden()
    generator = np.random.default_rng(3)
    active = np.stack([generator.permutation(K)[:4] for _ in range(len(hidden))])
    active[::3, 2:] = -1
    active[5] = -1
    # Latents 0, 1 and 8 span two dimensions, and latent 7 none.
    active[7] = [0, 1, 8, 7]
    directions = Directions(run, "subspace", device=CPU)
    found = directions.displacement(hidden, torch.from_numpy(active), directions.centre).numpy()
    for row, latents in enumerate(active):
        basis = run.encoder_directions[latents[latents >= 0]].astype(np.float64).T
        offset = hidden[row].double().numpy() - run.lower_mean
        expected = basis @ np.linalg.lstsq(basis, offset, rcond=1e-8)[0] if basis.size else np.zeros(D)
        np.testing.assert_allclose(found[row], expected, atol=1e-5)
    assert np.abs(found[5]).max() == 0


def test_a_span_is_projected_on_whatever_its_vectors_depend_on():
    generator = torch.Generator().manual_seed(0)
    offset = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    whole = torch.eye(10, dtype=torch.float64).repeat(3, 1, 1)
    torch.testing.assert_close(onto_span(offset, whole), offset)
    torch.testing.assert_close(onto_span(offset, torch.cat([whole, whole], dim=1)), offset)
    assert onto_span(offset, torch.zeros(3, 4, 10, dtype=torch.float64)).abs().max() == 0


def test_removing_the_offset_from_the_mean_makes_the_row_the_mean():
    run, hidden = _Run(), _hidden()
    directions = Directions(run, "mean", device=CPU)
    left = hidden - directions.displacement(hidden, _codes(), directions.centre)
    torch.testing.assert_close(left, torch.from_numpy(run.lower_mean).expand_as(left), atol=1e-5, rtol=0)


def test_after_a_centred_removal_no_offset_along_the_direction_is_left():
    directions, hidden, codes = Directions(_Run(), "centred", device=CPU), _hidden(), _codes()
    once = hidden - directions.displacement(hidden, codes, directions.centre)
    again = directions.displacement(once, codes, directions.centre)
    assert again.abs().max() < 1e-5


def test_a_row_without_a_concept_and_a_concept_without_rows_are_left_alone():
    hidden, codes = _hidden(2), torch.tensor([[-1], [4]])
    for removal in ("projection", "centred", "offset"):
        directions = Directions(_Run(), removal, device=CPU)  # type: ignore[arg-type]
        assert directions.displacement(hidden, codes, directions.centre).abs().max() == 0


def _displacements(removal: Any, *, rows: int = 60, active: bool = False) -> tuple[Displacements, Vectors, Directions]:
    run, hidden = _Run(), _hidden(rows)
    concepts = {OWN: _codes(rows, 4), "random code": _codes(rows, 5), "same label": _codes(rows, 6)}
    if active:
        generator = np.random.default_rng(7)
        concepts = {
            subject: torch.from_numpy(np.stack([generator.permutation(6)[:3] for _ in range(rows)]))
            for subject in concepts
        }
    vectors = Vectors.drawn(hidden, list(range(rows)), [1] * rows, seed=0)
    directions = Directions(run, removal, device=CPU)
    return Displacements(directions, vectors, directions.centre, lambda subject: concepts[subject]), vectors, directions


@pytest.mark.parametrize("removal", ["projection", "centred", "subspace", "offset"])
@pytest.mark.parametrize("control", ["matched code", "matched random"])
def test_matched_controls_have_the_own_norm_and_cosine_and_nothing_else_of_the_code(removal: Any, control: Any):
    displacements, vectors, directions = _displacements(removal, active=removal == "subspace")
    own, other = displacements.of(OWN), displacements.of(control)
    offset = vectors.hidden - directions.centre
    torch.testing.assert_close(other.norm(dim=1), own.norm(dim=1), rtol=1e-5, atol=1e-6)
    alive = own.norm(dim=1) > 1e-3
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(other, offset)[alive], cosine(own, offset)[alive], atol=1e-4, rtol=0)
    along = torch.nn.functional.normalize(offset, dim=-1)
    rest = [part - (part * along).sum(-1, keepdim=True) * along for part in (own, other)]
    assert cosine(*rest)[alive].abs().mean() < 0.6
    if control == "matched code":
        # Across h − m it goes where the random code's own displacement goes.
        random = displacements.of("random code")
        theirs = random - (random * along).sum(-1, keepdim=True) * along
        seen = alive & (theirs.norm(dim=1) > 1e-2) & (rest[1].norm(dim=1) > 1e-2)
        torch.testing.assert_close(cosine(rest[1], theirs)[seen], torch.ones(int(seen.sum())), atol=1e-3, rtol=0)


def test_a_match_towards_nothing_goes_the_other_way():
    hidden, noise = _hidden(), _hidden(seed=9)
    own = 0.3 * _hidden(seed=8)
    for towards in (torch.zeros_like(own), 2 * hidden):
        found = match(own, hidden, towards, noise)
        torch.testing.assert_close(found.norm(dim=1), own.norm(dim=1))
        torch.testing.assert_close((found * hidden).sum(1), (own * hidden).sum(1), atol=1e-3, rtol=1e-4)


def test_a_concept_without_direction_is_matched_by_removing_nothing():
    hidden = _hidden()
    assert match(torch.zeros_like(hidden), hidden, _hidden(seed=3), _hidden(seed=4)).abs().max() == 0


def test_controls_without_a_concept_are_projections_on_their_directions():
    displacements, vectors, directions = _displacements("centred")
    offset = (vectors.hidden - directions.centre).double()
    mean = torch.from_numpy(_Run().lower_mean).double()
    for control, unit in (
        ("mean direction", (mean / mean.norm()).expand_as(offset)),
        ("gaussian", torch.nn.functional.normalize(vectors.gaussian.double(), dim=-1)),
    ):
        expected = (offset * unit).sum(-1, keepdim=True) * unit
        torch.testing.assert_close(displacements.of(control).double(), expected, atol=1e-5, rtol=0)  # type: ignore[arg-type]
    assert subjects_of("mean", CONTROLS) == ("whole row",)
    torch.testing.assert_close(displacements.of("whole row"), offset.float())


def test_another_code_is_in_use_and_never_the_code_itself():
    alive = np.array([0, 2, 3, 5])
    drawn = {code: {int(other_codes(np.array([code]), alive, shift)[0]) for shift in range(200)} for code in range(6)}
    for code, others in drawn.items():
        assert others == {0, 2, 3, 5} - {code}


def test_a_run_with_one_concept_has_no_control():
    with pytest.raises(ConfigError, match="fewer than two concepts in use: there is no other code to compare with"):
        other_codes(np.array([1]), np.array([1]), 3)


def _taken(own: list[np.ndarray], *, alive: np.ndarray, classes: list[int | None], seed: int = 0) -> Taken:
    changed = [np.arange(len(rows)) for rows in own]
    return Taken(own, changed, alive, ids=[7 * n for n in range(len(own))], classes=classes, seed=seed)


def test_other_latents_are_as_many_in_use_and_none_of_the_rows_own():
    generator = np.random.default_rng(0)
    own = [np.stack([generator.permutation(30)[:5] for _ in range(4)]) for _ in range(20)]
    own[3][1, 2:] = -1
    alive = np.arange(1, 30)
    taken = _taken(own, alive=alive, classes=[0] * 20)
    for number, mine in enumerate(own):
        found = taken.take("random code", number)
        assert found is not None
        for row, (theirs, other) in enumerate(zip(mine, found, strict=True)):
            real = other[other >= 0]
            assert len(real) == len(set(real)) == (theirs >= 0).sum()
            assert not set(real) & set(theirs)
            assert set(real) <= set(alive)
            assert row == 0 or theirs.tolist() != mine[0].tolist()


def test_partners_are_other_texts_of_the_same_and_of_another_class():
    classes = [0, 1, 0, 1, 1, None, 2, 0]
    part = [True, True, True, True, False, True, True, True]
    found = partners([3 * n for n in range(8)], part, classes, seed=0)
    for number, kind in enumerate(classes):
        same, other = (found[subject][number] for subject in PARTNERED)
        if not part[number] or kind is None:
            assert same is None
            assert other is None
        else:
            assert (same is None) == (kind == 2)
            assert same is None or (same != number and classes[same] == kind and part[same])
            assert other is not None
            assert classes[other] not in (kind, None)
            assert part[other]
    assert found != partners([3 * n for n in range(8)], part, classes, seed=1)


def test_a_partners_rows_are_taken_in_turn():
    own = [np.array([[1], [2], [3]]), np.array([[4], [5]])]
    taken = _taken(own, alive=np.arange(6), classes=[0, 0])
    assert taken.take("same label", 0).tolist() == [[4], [5], [4]]  # type: ignore[union-attr]
    assert taken.take("same label", 1).tolist() == [[1], [2]]  # type: ignore[union-attr]
    assert taken.take("other label", 1) is None
    assert taken.filled("other label", [0, 1]).tolist() == [[-1]] * 5
    assert not taken.takes_part("other label", 0)
    assert taken.takes_part("matched code", 0)


def test_random_directions_depend_on_the_seed_and_the_text_alone():
    whole = Vectors.drawn(_hidden(6), [10, 20, 30], [1, 2, 3], seed=0)
    alone = Vectors.drawn(_hidden(2), [20], [2], seed=0)
    assert torch.equal(whole.across[1:3], alone.across)
    assert torch.equal(whole.gaussian[1:3], alone.gaussian)
    assert not torch.equal(alone.across, alone.gaussian)
    assert not torch.equal(alone.across, Vectors.drawn(_hidden(2), [20], [2], seed=1).across)


def test_bootstrap_intervals_have_the_width_that_theory_gives():
    values = np.random.default_rng(0).normal(2.0, 3.0, size=900)
    half = 1.96 * values.std() / np.sqrt(len(values))
    for found in (estimate(values, seed=0), estimates(np.stack([values, -values], axis=1), seed=0)[0]):
        assert found.value == pytest.approx(values.mean())
        assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
        assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_leaves_out_texts_without_a_value():
    values = np.array([1.0, np.nan, 3.0])
    assert estimate(values, seed=0).value == 2.0
    assert np.isnan(estimate(np.array([np.nan]), seed=0).low)
    one, none = estimates(np.stack([values, np.full(3, np.nan)], axis=1), seed=0)
    assert one.value == 2.0
    assert (one.low, one.high) == (1.0, 3.0)
    assert np.isnan(none.value)
    assert np.isnan(estimates(np.zeros((0, 1)), seed=0)[0].value)


def test_columns_are_resampled_together():
    values = np.random.default_rng(0).normal(size=(50, 2))
    again = resampled_means(np.concatenate([values, values[:, :1] - values[:, 1:]], axis=1), seed=3)
    np.testing.assert_allclose(again[:, 0] - again[:, 1], again[:, 2], atol=1e-12)


def test_one_seed_is_resampled_as_texts_alone_and_several_spread_wider():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(1, 80, 2))
    np.testing.assert_array_equal(resampled_over_seeds(values, seed=1), resampled_means(values[0], seed=1))
    between = np.array([-1.0, 0.0, 1.0])[:, None, None] + 0.1 * generator.normal(size=(3, 80, 1))
    spread = resampled_over_seeds(between, seed=1)[:, 0].std()
    # Three seeds drawn with replacement: the variance of their mean is (2/3)/3.
    assert spread == pytest.approx(np.sqrt(2 / 9), rel=0.05)
