"""Planted concepts: each switch does to the rows what it says, and the truth about them is the truth."""

import os
from pathlib import Path

import clvq
import numpy as np
import pytest
from clvq.cache.verify import verify
from clvq.errors import ResumeMismatch
from clvq.evaluation.planted import LOWER, UPPER, Planted, PlantedConfig, plant
from pydantic import ValidationError
from sklearn.metrics import mutual_info_score

SMALL = {"texts": 150, "concepts": 12, "width": 24, "upper_width": 20, "zipf": 0.5}
EVERYTHING = {
    "duplicated": 1,
    "crossed": 1,
    "crossing": 3,
    "superposed": 1,
    "row_pairs": 1,
    "quiet": 4,
    "neighbour_pairs": 2,
    "nuisance_types": 3,
    "positional": 1.0,
    "upper_nuisance": 0.2,
    "outlier_channels": 2,
    "upper_outliers": 0.1,
}


@pytest.fixture(autouse=True)
def _no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is killed here, and hundreds of fsyncs take most of a small cache's time.
    monkeypatch.setattr(os, "fsync", lambda _: None)


def _planted(folder: Path, **settings: object) -> Planted:
    return plant(PlantedConfig(**{**SMALL, **settings}), folder / "cache")


def _rows(planted: Planted) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places, lower and upper rows of both splits, in float64."""
    rows = planted.cache.rows_of(np.ones(len(planted.cache.texts), dtype=bool))
    return rows, *(planted.cache.vectors(site, rows).astype(np.float64) for site in (LOWER, UPPER))


def _means(vectors: np.ndarray, labels: np.ndarray) -> dict[int, np.ndarray]:
    return {int(label): vectors[labels == label].mean(axis=0) for label in np.unique(labels)}


def _files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_equal_settings_give_equal_bytes_and_another_seed_other_ones(tmp_path: Path):
    first, second = (_planted(tmp_path / name, **EVERYTHING, seed=3) for name in ("first", "second"))
    other = _planted(tmp_path / "other", **EVERYTHING, seed=4)
    assert _files(first.cache.path) == _files(second.cache.path)
    np.testing.assert_array_equal(first.concept, second.concept)
    assert first.cache.id != other.cache.id
    assert not np.array_equal(_rows(first)[1][:50], _rows(other)[1][:50])


def test_the_cache_is_whole_and_holds_both_splits(tmp_path: Path):
    planted = _planted(tmp_path, **EVERYTHING, dev_share=0.3)
    assert verify(planted.cache.path).problems == []
    assert planted.cache.splits(["dev"]).sum() == 45
    assert planted.cache.splits(["train"]).sum() == 105
    assert (planted.cache.width(LOWER), planted.cache.width(UPPER)) == (24, 20)


def test_planting_again_finds_the_cache_and_other_settings_are_refused(tmp_path: Path):
    first = _planted(tmp_path)
    assert _planted(tmp_path).cache.id == first.cache.id
    with pytest.raises(ResumeMismatch):
        _planted(tmp_path, seed=1)


def test_every_row_in_use_has_a_concept_and_a_word_that_names_its_form(tmp_path: Path):
    planted = _planted(tmp_path, **EVERYTHING)
    rows, _, _ = _rows(planted)
    used = planted.cache.column("text") >= 0
    for column in (planted.concept, planted.form, planted.guess, planted.guess_with_neighbour):
        np.testing.assert_array_equal(column >= 0, used)
    texts = planted.cache.texts["text"].to_pylist()
    owner = planted.cache.text_index[planted.cache.column("text")[rows]]
    start, end = (planted.cache.column(name)[rows] for name in ("char_start", "char_end"))
    words = [texts[text][a:b] for text, a, b in zip(owner, start, end, strict=True)]
    assert words == [f"w{form}" for form in planted.form[rows]]
    assert all(texts[text] == " ".join(np.array(words)[owner == text]) for text in range(5))


def test_the_upper_centres_are_the_means_of_the_concepts_rows(tmp_path: Path):
    planted = _planted(tmp_path, texts=600, duplicated=2, neighbour_pairs=2)
    rows, _, upper = _rows(planted)
    for concept, mean in _means(upper, planted.concept[rows]).items():
        count = (planted.concept[rows] == concept).sum()
        error = mean - planted.upper_centres[concept]
        assert np.abs(error).max() < 5 * planted.config.upper_noise / np.sqrt(count)


def test_frequencies_follow_zipf(tmp_path: Path):
    planted = _planted(tmp_path, texts=1000, shortest=10, longest=10, concepts=8, zipf=1.5)
    found = np.sort(np.bincount(planted.concept[planted.concept >= 0]))[::-1] / 10_000
    expected = np.arange(1, 9) ** -1.5
    expected /= expected.sum()
    assert np.abs(found - expected).max() < 5 * np.sqrt(0.25 / 10_000)


def test_without_noise_and_difficulties_a_concept_is_one_point_at_either_site(tmp_path: Path):
    planted = _planted(tmp_path, noise=0, upper_noise=0)
    rows, lower, upper = _rows(planted)
    for vectors in (lower, upper):
        assert len(np.unique(vectors.round(3), axis=0)) == len(np.unique(planted.concept[rows])) == 12
    np.testing.assert_allclose(upper, planted.upper_centres[planted.concept[rows]], atol=1e-5)


def test_synonyms_are_unrelated_below_and_one_above(tmp_path: Path):
    planted = _planted(tmp_path, noise=0, upper_noise=0, texts=60, duplicated=2, synonyms=3, width=200)
    rows, lower, upper = _rows(planted)
    lower -= np.mean(list(_means(lower, planted.form[rows]).values()), axis=0)
    for concept in planted.of_kind("duplicated"):
        mine = planted.concept[rows] == concept
        centres = np.unique(lower[mine].round(3), axis=0)
        assert len(centres) == 3
        cosines = np.corrcoef(centres)[np.triu_indices(3, 1)]
        assert np.abs(cosines).max() < 0.35
        assert np.ptp(upper[mine], axis=0).max() == 0


def test_neither_factor_of_crossed_concepts_says_which_it_is_and_both_together_do(tmp_path: Path):
    planted = _planted(tmp_path, texts=300, noise=0, crossed=1, crossing=3, width=40)
    rows, lower, _ = _rows(planted)
    concepts, forms = planted.concept[rows], planted.form[rows]
    square = planted.of_kind("crossed")
    crossed = np.isin(concepts, square)
    centres = _means(lower[crossed], forms[crossed])
    assert len(centres) == 9
    # A sum of two factors of three values each, less the overall mean, spans 2 + 2 dimensions and no more.
    spread = np.array(list(centres.values()))
    assert np.linalg.matrix_rank(spread - spread.mean(axis=0), tol=1e-3) == 4
    # Additive in factors of a Latin square: all concepts have the same mean centre, so no linear map tells them apart.
    of = {form: concepts[forms == form][0] for form in centres}
    means = [np.mean([centres[form] for form in centres if of[form] == concept], axis=0) for concept in square]
    np.testing.assert_allclose(means, [means[0]] * 3, atol=1e-4)


def test_row_pairs_differ_in_a_direction_that_hardly_varies_and_by_the_gap(tmp_path: Path):
    planted = _planted(tmp_path, texts=1000, concepts=4, row_pairs=1, quiet=4, nuisance_types=5, zipf=0)
    rows, lower, _ = _rows(planted)
    one, other = planted.of_kind("row pair")
    means = _means(lower, planted.concept[rows])
    axes = np.linalg.eigh(np.cov(lower.T))[1].T
    quiet, loud = axes[:4], axes[4:]
    difference = means[one] - means[other]
    assert np.linalg.norm(quiet @ difference) == pytest.approx(6 * 0.05, rel=0.1)
    # What is left elsewhere is the error of two means of about 4,000 rows, of noise 0.5 and nuisance 2.
    assert np.abs(loud @ difference).max() < 0.05 * np.abs(loud @ (means[one] - lower.mean(axis=0))).max() + 0.1
    share = np.var((lower - lower.mean(axis=0)) @ quiet.T, axis=0).sum() / np.var(lower, axis=0).sum()
    assert share < 0.001


def test_a_row_pair_is_decided_by_the_row_as_often_as_its_gap_allows(tmp_path: Path):
    planted = _planted(tmp_path, texts=800, concepts=4, row_pairs=1, row_pair_gap=2.0, width=40)
    rows, _, _ = _rows(planted)
    mine = np.isin(planted.concept[rows], planted.of_kind("row pair"))
    # Two normal distributions two deviations apart, equally frequent: Φ(−1) is mistaken.
    wrong = (planted.guess[rows] != planted.concept[rows])[mine].mean()
    assert wrong == pytest.approx(0.158655, abs=5 * np.sqrt(0.1587 * 0.8413 / mine.sum()))


def test_a_neighbour_pair_looks_the_same_below_and_the_row_before_decides(tmp_path: Path):
    planted = _planted(tmp_path, texts=400, neighbour_pairs=2, noise=0)
    rows, lower, _ = _rows(planted)
    concepts, forms = planted.concept[rows], planted.form[rows]
    starts = planted.cache.column("position")[rows] == 0
    before = np.roll(forms, 1)
    for pair in planted.of_kind("neighbour pair").reshape(-1, 2):
        mine = np.isin(concepts, pair)
        assert set(concepts[mine]) == set(pair)
        assert len(np.unique(lower[mine].round(3), axis=0)) == 1
        assert 0.3 < (concepts[mine] == pair[0]).mean() < 0.7
        for form in np.unique(before[mine & ~starts]):
            assert len(np.unique(concepts[mine & ~starts & (before == form)])) == 1
        assert set(concepts[mine & starts]) == {pair[0]}


def test_ceilings_say_what_a_single_row_cannot_show(tmp_path: Path):
    planted = _planted(tmp_path, texts=500, neighbour_pairs=3, width=60, zipf=0)
    rows, _, _ = _rows(planted)
    told, alone = planted.ceiling(rows, neighbours=True), planted.ceiling(rows, neighbours=False)
    np.testing.assert_allclose(list(vars(told).values()), 1, atol=1e-12)
    # Half of twelve concepts are told apart by a coin: F1 about 1/2; half of their rows have the other concept.
    assert alone.matched_f1 == pytest.approx(6 / 12 + 6 / 12 / 2, abs=0.02)
    assert alone.purity == pytest.approx(1 - 6 / 12 / 2, abs=0.03)
    # Homogeneity 1 − log 2 · (1/2) / log 12, completeness 1, of pairs taken for one concept.
    homogeneity = 1 - np.log(2) / 2 / np.log(12)
    assert alone.v_measure == pytest.approx(2 * homogeneity / (1 + homogeneity), abs=0.01)


def test_nuisance_has_more_variance_than_concepts_and_says_nothing_of_them(tmp_path: Path):
    plain = _planted(tmp_path / "plain")
    planted = _planted(tmp_path / "nuisance", nuisance_types=5, nuisance=2.0)
    rows, lower, upper = _rows(planted)
    _, before, upper_before = _rows(plain)
    added = lower - before
    # Five points, however the float32 sums were rounded.
    points = [added[0]]
    for row in added:
        if min(np.abs(row - point).max() for point in points) > 1e-3:
            points.append(row)
    assert len(points) == 5
    labels = np.argmin([np.abs(added - point).max(axis=1) for point in points], axis=0)
    assert mutual_info_score(labels, planted.concept[rows]) < 0.05
    assert np.var(added, axis=0).sum() > 1.5 * np.var(before, axis=0).sum()
    np.testing.assert_array_equal(upper, upper_before)


def test_position_moves_rows_along_one_line(tmp_path: Path):
    plain, planted = _planted(tmp_path / "plain"), _planted(tmp_path / "position", positional=1.5, upper_nuisance=0.5)
    rows, lower, upper = _rows(planted)
    _, lower_before, upper_before = _rows(plain)
    position = planted.cache.column("position")[rows]
    for added, scale in ((lower - lower_before, 1.5), (upper - upper_before, 0.75)):
        assert np.linalg.matrix_rank(added, tol=1e-2) == 1
        length = np.sqrt(np.square(added[position == 0][0]).mean())
        assert scale / 2 < length < scale * 2
        np.testing.assert_allclose(added[position == 12], 0, atol=1e-4)


def test_superposed_rows_are_sums_of_centres(tmp_path: Path):
    plain = _planted(tmp_path / "plain", noise=0, offset=0)
    planted = _planted(tmp_path / "superposed", noise=0, offset=0, superposed=1, superposition=0.6)
    rows, lower, _ = _rows(planted)
    centres = np.array(list(_means(_rows(plain)[1], plain.form[rows]).values()))
    added = lower - centres[planted.form[rows]]
    distances = np.linalg.norm(added[:, None] - 0.6 * centres, axis=2)
    assert distances.min(axis=1).max() < 1e-4
    assert set(distances.argmin(axis=1)) == set(range(12))


def test_outliers_are_huge_and_only_in_their_channels(tmp_path: Path):
    plain = _planted(tmp_path / "plain")
    planted = _planted(tmp_path / "outliers", outlier_channels=2, outlier_scale=200.0, upper_outliers=0.5)
    _, lower, upper = _rows(planted)
    _, lower_before, upper_before = _rows(plain)
    np.testing.assert_array_equal(lower[:, 2:], lower_before[:, 2:])
    np.testing.assert_array_equal(upper[:, 2:], upper_before[:, 2:])
    added = (lower - lower_before)[:, :2]
    assert np.abs(added).max() > 2_000
    # Far heavier than a normal distribution, whose kurtosis is 3.
    assert (np.mean(added**4) / np.mean(added**2) ** 2) > 6
    np.testing.assert_allclose((upper - upper_before)[:, :2], added / 2, atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"concepts": 10, "row_pairs": 6}, "12 together"),
        ({"shortest": 9, "longest": 8}, "longest = 8"),
        ({"row_pairs": 1, "width": 8, "quiet": 8}, "quiet = 8"),
        ({"outlier_channels": 9, "width": 8}, "outlier_channels = 9"),
        ({"outlier_channels": 9, "upper_width": 8, "upper_outliers": 1.0}, "of 8 channels"),
        ({"synonims": 2}, "synonims"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings: dict[str, float], said: str):
    with pytest.raises(ValidationError, match=said):
        PlantedConfig(**settings)


def test_a_planted_cache_can_be_opened_by_path_alone(tmp_path: Path):
    planted = _planted(tmp_path)
    assert clvq.Cache(planted.cache.path).manifest.identity["planted"]["concepts"] == 12
