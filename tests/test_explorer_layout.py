"""The parts of the explorer that need no cache: scripts, numbers, the map, the flow's information."""

import numpy as np
import pytest
from clvq.evaluation.information import pairs_of
from clvq.explorer import layout
from clvq.explorer.data_files import read_script, rounded, script
from clvq.explorer.flow import Assigned, flows, normalized_information
from clvq.explorer.layout import map_of
from clvq.explorer.members import Smallest
from sklearn.manifold import trustworthiness

from .study_maker import HOSTILE


def test_information_is_one_for_equal_and_none_without_rows():
    codes = np.array([0, 1, 1, 2])
    assert normalized_information(pairs_of(codes, codes)) == pytest.approx(1)
    assert normalized_information(pairs_of(codes[:0], codes[:0])) is None


@pytest.mark.parametrize("odd", HOSTILE)
def test_any_text_goes_round_through_a_script(odd, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.js").write_bytes(script("x", {odd: [odd]}))
    assert read_script(tmp_path, "x") == {odd: [odd]}


def test_numbers_have_four_digits_and_what_is_no_number_is_null():
    assert rounded([0.123456, np.float32(1234.56), float("nan"), 7, np.array([2.0, np.inf]), True, "0.123456"]) == [
        0.1235, 1235, None, 7, [2, None], True, "0.123456"
    ]  # fmt: skip
    assert isinstance(rounded(2.0), int)


def test_the_smallest_keys_are_kept_whatever_the_blocks():
    generator = np.random.default_rng(0)
    codes, keys = generator.integers(0, 7, 500), generator.integers(0, 40, 500).astype(np.float64)
    kept = Smallest(9, 4)
    for part in np.array_split(np.arange(500), [1, 3, 3, 200]):
        kept.add(codes[part], keys[part], part)
    for code in range(9):
        mine = sorted(np.flatnonzero(codes == code).tolist(), key=lambda row: (keys[row], row))[:4]
        assert [row for row in kept.rows[code].tolist() if row >= 0] == mine


def test_like_directions_lie_together_on_the_map():
    generator = np.random.default_rng(1)
    centres = generator.normal(size=(6, 20))
    vectors = centres[generator.integers(0, 6, 90)] + 0.2 * generator.normal(size=(90, 20))
    vectors[-1] = 0
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    places = map_of(unit, np.arange(90), seed=3)
    assert trustworthiness(unit[:-1], places[:-1], n_neighbors=5) > 0.9
    assert np.abs(places).max(axis=0) == pytest.approx([1, 1])
    assert (places[-1] == 0).all()
    assert (map_of(unit, np.arange(90), seed=3) == places).all()


def test_concepts_beyond_the_limit_of_the_map_lie_among_their_like(monkeypatch):
    monkeypatch.setattr(layout, "MOST", 40)
    generator = np.random.default_rng(1)
    kind = generator.integers(0, 4, 80)
    vectors = generator.normal(size=(4, 20))[kind] + 0.1 * generator.normal(size=(80, 20))
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    places = map_of(unit, np.arange(80), seed=0)
    for place in range(80):
        near = np.argsort(np.linalg.norm(places - places[place], axis=1))[1:4]
        assert (kind[near] == kind[place]).all()


@pytest.mark.parametrize("count", [0, 1, 2, 4, 6])
def test_few_concepts_have_places_too(count):
    places = map_of(np.eye(8, dtype=np.float32)[:count], np.ones(count, dtype=np.int64), seed=0)
    assert places.shape == (count, 2)
    assert np.isfinite(places).all()
    assert np.abs(places).max(initial=0) <= 1


def test_rows_that_only_one_run_knows_do_not_flow():
    lower = Assigned("r0", "hidden.1", np.array([0, 0, 1, -1, 2], dtype=np.int32))
    upper = Assigned("r1", "hidden.9", np.array([4, 4, -1, 4, 5], dtype=np.int32))
    top = Assigned("r2", "hidden.12", np.zeros(5, dtype=np.int32))
    first, second = flows([top, lower, upper], ["hidden.1", "hidden.5", "hidden.9", "hidden.12"])
    assert (first["lower"], first["upper"], first["rows"], first["same_site"]) == ("r0", "r1", 3, False)
    assert first["links"].tolist() == [[0, 4, 2], [2, 5, 1]]
    # Only neighbouring sites are joined.
    assert (second["lower"], second["upper"]) == ("r1", "r2")
