"""k-means against scikit-learn, and against numpy in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from clvq.errors import DataError, Interrupted
from clvq.progress import Silent
from clvq.trainer import kmeans as kmeans_module
from clvq.trainer.kmeans import Blocks, KMeans, assign, blocks_of, kmeans
from sklearn.cluster import KMeans as Reference
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")


@pytest.fixture
def _small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of few rows, so that a small test has several."""
    monkeypatch.setattr(kmeans_module, "_LEAST_SAMPLE", 1)


def _found(rows: np.ndarray, codes: int, **settings: Any) -> KMeans:
    settings = {"iterations": 100, "seed": 0, "device": CPU} | settings
    return kmeans(blocks_of(rows, device=CPU), codes=codes, **settings)


def _mixture(rows: int, d: int, kinds: int, noise: float, *, mean: float = 0.0, seed: int = 0) -> np.ndarray:
    """Clouds around random centres, the k-th 1/k as large as the first."""
    generator = np.random.default_rng(seed)
    shares = 1 / np.arange(1, kinds + 1)
    centres = generator.normal(size=(kinds, d)) + mean
    kind = generator.choice(kinds, rows, p=shares / shares.sum())
    return (centres[kind] + noise * generator.normal(size=(rows, d))).astype(np.float32)


def _distances(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return ((rows.astype(np.float64)[:, None] - centroids.astype(np.float64)) ** 2).sum(axis=2)


def _inertia(rows: np.ndarray, centroids: np.ndarray) -> float:
    return float(_distances(rows, centroids).min(axis=1).sum())


def _odd(rows: np.ndarray, *, lengths: tuple[int, ...] = (1, 700, 3, 0, 2_500)) -> Blocks:
    def blocks() -> Iterator[torch.Tensor]:
        start, turn = 0, 0
        while start < len(rows):
            end = start + lengths[turn % len(lengths)]
            yield torch.tensor(rows[start:end])
            start, turn = end, turn + 1

    return blocks


@pytest.mark.parametrize(
    ("rows", "codes"),
    [
        (_mixture(3_000, 16, 40, 0.1), 40),
        (_mixture(3_000, 16, 40, 1.0), 40),
        (_mixture(3_000, 8, 12, 0.5, mean=20), 10),
        # More rows than the sample.
        (_mixture(40_000, 12, 30, 1.0), 12),
    ],
    ids=["apart", "mingled", "few", "sampled"],
)
def test_inertia_is_that_of_scikit_learns_best_of_five(rows: np.ndarray, codes: int) -> None:
    reference = Reference(codes, n_init=5, max_iter=300, random_state=0).fit(rows - rows.mean(axis=0))
    for seed in range(3):
        found = _found(rows, codes, seed=seed)
        assert found.inertia <= 1.01 * reference.inertia_
        assert _inertia(rows, found.centroids.numpy()) <= found.inertia * (1 + 1e-6)


def test_the_spherical_inertia_is_that_of_scikit_learn_on_unit_vectors() -> None:
    rows = _mixture(4_000, 12, 20, 0.3, mean=1)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    reference = Reference(15, n_init=5, max_iter=300, random_state=0).fit(units)
    assert _found(rows, 15, spherical=True).inertia <= 1.01 * reference.inertia_


def _apart(d: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Rows of five directions that nobody could confuse, and which each is of."""
    generator = np.random.default_rng(3)
    kind = generator.integers(0, 5, 400)
    lengths = 3 + 4 * generator.random(400)
    return (lengths[:, None] * (np.eye(d)[kind] + 0.05 * generator.normal(size=(400, d)))).astype(np.float32), kind


def test_spherical_centroids_are_directions_of_mean_unit_vectors_times_the_members_mean_norm() -> None:
    rows, kind = _apart()
    found = _found(rows, 5, spherical=True)
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)
    expected = []
    for one in range(5):
        mean = (wide / norms[:, None])[kind == one].mean(axis=0)
        expected.append(mean / np.linalg.norm(mean) * norms[kind == one].mean())
    nearest = _distances(np.array(expected), found.centroids.numpy()).argmin(axis=1)
    np.testing.assert_allclose(found.centroids.numpy()[nearest], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found.counts.numpy()[nearest], np.bincount(kind))


@pytest.mark.usefixtures("_small_samples")
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("kept", [1 << 30, 100_000])
def test_odd_blocks_and_reading_anew_give_the_bytes_of_rows_in_memory(spherical: bool, kept: int) -> None:
    rows = _mixture(6_000, 8, 12, 0.5, mean=3)
    whole = _found(rows, 5, spherical=spherical)
    settings = {"codes": 5, "iterations": 100, "seed": 0, "device": CPU, "spherical": spherical}
    odd = kmeans(_odd(rows), kept_bytes=kept, **settings)
    assert torch.equal(odd.centroids, whole.centroids)
    assert torch.equal(odd.counts, whole.counts)
    assert (odd.inertia, odd.passes) == (whole.inertia, whole.passes)


@pytest.mark.usefixtures("_small_samples")
def test_rows_that_fit_are_read_once_and_others_in_each_pass() -> None:
    rows, calls = _mixture(6_000, 8, 12, 0.5), []

    def blocks() -> Iterator[torch.Tensor]:
        calls.append(1)
        yield from blocks_of(rows, device=CPU)()

    settings = {"codes": 5, "iterations": 100, "seed": 0, "device": CPU}
    kmeans(blocks, **settings)
    assert len(calls) == 1
    found = kmeans(blocks, kept_bytes=100_000, **settings)
    assert len(calls) - 1 == found.passes


def test_means_and_inertia_are_exact_under_a_mean_far_larger_than_the_deviations() -> None:
    generator = np.random.default_rng(5)
    kind = generator.integers(0, 4, 2_000)
    centres = 8 * np.eye(4, 10) + 30_000
    rows = (centres[kind] + generator.normal(size=(2_000, 10))).astype(np.float32)
    found = _found(rows, 4)
    wide = rows.astype(np.float64)
    means = np.array([wide[kind == one].mean(axis=0) for one in range(4)])
    nearest = _distances(means, found.centroids.numpy()).argmin(axis=1)
    np.testing.assert_array_equal(found.centroids.numpy()[nearest], means.astype(np.float32))
    np.testing.assert_allclose(found.inertia, ((wide - means[kind]) ** 2).sum(), rtol=1e-9)


@pytest.mark.usefixtures("_small_samples")
def test_a_few_far_rows_get_codes_of_their_own_though_the_sample_is_small() -> None:
    rows = _mixture(6_000, 8, 12, 0.5)
    rows[[17, 2_345, 5_999], [0, 0, 1]] += [27_000, 27_000, -20_000]
    found = _found(rows, 8)
    sizes = dict(
        zip(np.round(found.centroids[:, :2].numpy() / 1_000).sum(axis=1).tolist(), found.counts.tolist(), strict=True)
    )
    assert (sizes[27], sizes[-20]) == (2, 1)
    ordinary = Reference(6, n_init=5, random_state=0).fit(np.delete(rows, [17, 2_345, 5_999], axis=0))
    assert found.inertia <= 1.01 * ordinary.inertia_ + _inertia(rows[[17, 2_345]], rows[[17, 2_345]].mean(axis=0)[None])


@pytest.mark.parametrize("spherical", [False, True])
def test_codes_without_distinct_rows_are_dead_and_finite(spherical: bool) -> None:
    distinct = np.array([[3, 0, 0], [0, 2, 1], [1, 1, -5]], dtype=np.float32)
    found = _found(np.repeat(distinct, 10, axis=0), 7, spherical=spherical)
    assert torch.isfinite(found.centroids).all()
    assert sorted(found.counts.tolist()) == [0, 0, 0, 0, 10, 10, 10]
    used = found.centroids[found.counts > 0].numpy()
    np.testing.assert_allclose(np.sort(used, axis=0), np.sort(distinct, axis=0), rtol=1e-6, atol=1e-6)
    assert found.inertia < 1e-9


@pytest.mark.parametrize(("rows", "codes"), [(9, 9), (4, 9), (1, 2), (5, 1)])
def test_any_number_of_rows_suits_any_number_of_codes(rows: int, codes: int) -> None:
    values = _mixture(rows, 3, 4, 1.0)
    found = _found(values, codes)
    assert found.counts.sum() == rows
    assert (found.counts > 0).sum() == min(rows, codes)
    np.testing.assert_allclose(found.inertia, _inertia(values, found.centroids.numpy()), rtol=1e-6, atol=1e-9)


def test_rows_that_are_all_equal_make_one_code() -> None:
    found = _found(np.full((50, 3), 7, dtype=np.float32), 4)
    assert sorted(found.counts.tolist()) == [0, 0, 0, 50]
    assert (found.centroids == 7).all()


def test_empty_clusters_are_put_on_far_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, kind = _apart()

    def one_place(self: object, sample: Any) -> torch.Tensor:
        return sample.rows[:1].repeat(5, 1)

    monkeypatch.setattr(kmeans_module._Search, "seeds", one_place)
    monkeypatch.setattr(kmeans_module._Search, "_moved", lambda self, sample, centroids: None)
    found = _found(rows, 5, spherical=True)
    np.testing.assert_array_equal(np.sort(found.counts.numpy()), np.sort(np.bincount(kind)))


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    rows = _mixture(3_000, 16, 40, 1.0)
    first, again, other = (_found(rows, 20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.centroids, again.centroids)
    assert not torch.equal(first.centroids, other.centroids)


@pytest.mark.parametrize("mean", [0.0, 3_000.0])
def test_assignment_is_that_of_float64_even_where_float32_cannot_tell(mean: float) -> None:
    generator = np.random.default_rng(8)
    centroids = (generator.normal(size=(30, 20)) + mean).astype(np.float32)
    # Rows hardly nearer to one of two codes than to the other.
    pairs = generator.integers(0, 30, (2_500, 2))
    middle = centroids[pairs].astype(np.float64).mean(axis=1)
    rows = (middle + 1e-6 * generator.normal(size=middle.shape)).astype(np.float32)
    rows[::3] += generator.normal(size=rows[::3].shape).astype(np.float32)
    distances = _distances(rows, centroids)
    index = assign(torch.tensor(rows), torch.tensor(centroids)).numpy()
    chosen = distances[np.arange(len(rows)), index]
    np.testing.assert_allclose(chosen, distances.min(axis=1), rtol=1e-12)
    best, second = np.sort(distances, axis=1)[:, :2].T
    clear = second - best > 1e-9 * second
    assert clear.sum() > 2_000
    np.testing.assert_array_equal(index[clear], distances.argmin(axis=1)[clear])


class _Largest(TorchDispatchMode):
    """The most entries that any tensor has while it is entered."""

    entries = 0

    def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, torch.Tensor):
                self.entries = max(self.entries, one.numel())
        return result


def test_no_tensor_grows_with_the_rows() -> None:
    largest = []
    for rows in (12_000, 24_000):
        values = _mixture(rows, 4, 300, 0.3)
        with _Largest() as seen:
            kmeans(
                blocks_of(values, device=CPU, size=1_000),
                codes=128,
                iterations=2,
                seed=0,
                device=CPU,
                kept_bytes=65_536,
            )
        largest.append(seen.entries)
    assert max(largest) <= 2**20


@pytest.mark.parametrize(("rows", "says"), [(np.zeros((0, 3)), "no row"), (np.array([[1, np.nan]]), "not finite")])
def test_what_cannot_be_clustered_is_refused(rows: np.ndarray, says: str) -> None:
    with pytest.raises(DataError, match=says):
        _found(rows.astype(np.float32), 2)


@pytest.mark.usefixtures("_small_samples")
def test_a_stop_is_heard_in_the_midst_of_a_pass() -> None:
    read = []

    class Stopping(Silent):
        def check(self) -> None:
            if len(read) >= 20:
                raise Interrupted("stop", signal_number=2)

    def blocks() -> Iterator[torch.Tensor]:
        for block in blocks_of(_mixture(6_000, 8, 12, 0.5), device=CPU, size=500)():
            read.append(1)
            yield block

    with pytest.raises(Interrupted):
        kmeans(blocks, codes=5, iterations=9, seed=0, device=CPU, kept_bytes=100_000, progress=Stopping())
    assert len(read) < 26
