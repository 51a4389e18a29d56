"""The codes before the first step."""

from pathlib import Path

import clvq
import numpy as np
import pytest
import torch
from clvq.progress import Silent
from clvq.trainer import fit as fit_module
from clvq.trainer.config import StartConfig, preset_config, with_overrides
from clvq.trainer.fit import fit
from clvq.trainer.start import starting_codes, starting_rows
from sklearn.cluster import KMeans

LOWER, UPPER = "hidden.1", "hidden.2"


def _start(**changes: object) -> StartConfig:
    plain = preset_config("paper", lower=LOWER, upper=UPPER).start.model_dump()
    return StartConfig.model_validate(plain | changes)


def _clouds() -> np.ndarray:
    generator = np.random.default_rng(0)
    directions = np.eye(6)[generator.integers(0, 5, 400)]
    scales = 3 + 4 * generator.random(400)
    return (scales[:, None] * (directions + 0.05 * generator.normal(size=(400, 6)))).astype(np.float32)


def test_the_spherical_start_is_k_means_on_the_sphere_times_the_members_mean_norm() -> None:
    rows = _clouds()
    codes = starting_codes(rows, _start(), codes=5, seed=7)
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    fitted = KMeans(5, n_init=5, max_iter=300, random_state=7).fit((rows / norms[:, None]).astype(np.float32))
    for code in range(5):
        centre = fitted.cluster_centers_[code].astype(np.float64)
        expected = centre / np.linalg.norm(centre) * norms[fitted.labels_ == code].mean()
        np.testing.assert_allclose(codes[code], expected, rtol=1e-5, atol=1e-6)


def test_the_plain_start_is_k_means() -> None:
    rows = _clouds()
    codes = starting_codes(rows, _start(spherical=False, restarts=2), codes=5, seed=7)
    expected = KMeans(5, n_init=2, max_iter=300, random_state=7).fit(rows).cluster_centers_
    np.testing.assert_allclose(codes, expected, rtol=1e-5, atol=1e-6)


def test_fewer_distinct_rows_than_codes_still_give_finite_codes() -> None:
    rows = np.repeat(np.eye(3, 6, dtype=np.float32), 10, axis=0)
    for spherical in (False, True):
        assert np.isfinite(starting_codes(rows, _start(spherical=spherical), codes=5, seed=0)).all()


def test_the_sample_is_seeded_ascending_and_never_larger_than_allowed() -> None:
    rows = np.arange(1000, dtype=np.int64) * 3
    first = starting_rows(rows, _start(rows=50), seed=1)
    assert len(np.unique(first)) == 50
    assert np.isin(first, rows).all()
    assert (np.diff(first) > 0).all()
    assert (first == starting_rows(rows, _start(rows=50), seed=1)).all()
    assert (first != starting_rows(rows, _start(rows=50), seed=2)).any()
    assert starting_rows(rows, _start(rows=1000), seed=1) is rows


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_the_network_holds_the_starting_codes_before_the_first_step(
    preset: str, small_cache: clvq.Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published code assigned the start to an attribute that nobody read."""
    config = with_overrides(
        preset_config(preset, lower=LOWER, upper=UPPER, codes=9),
        {"decoder.layers": "1", "fit.warmup_epochs": "0", "start.restarts": "2"},
    )
    seen = {}

    def stop(self: fit_module._Training, batch: object, *, warm_up: bool) -> float:
        network = self.fitting.network
        rows = self.texts.train_rows(self.cache, self.config)
        lower = torch.from_numpy(small_cache.vectors(LOWER, rows))
        seen["codebook"], seen["total"] = network.quantizer.codebook.numpy(), network.quantizer.total.numpy()
        seen["rows"] = (network.encode(lower) if preset == "default" else lower).detach().numpy()
        raise _Stopped

    monkeypatch.setattr(fit_module._Training, "_step", stop)
    with pytest.raises(_Stopped):
        fit(small_cache, config, tmp_path / "run", device=torch.device("cpu"), progress=Silent())
    rows = seen["rows"]
    norms = np.linalg.norm(rows, axis=1) if preset == "paper" else np.ones(len(rows))
    units = (rows / norms[:, None]).astype(np.float32)
    fitted = KMeans(9, n_init=2, max_iter=config.start.iterations, random_state=config.seed).fit(units)
    expected = fitted.cluster_centers_.astype(np.float64)
    if preset == "paper":
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        expected *= np.array([norms[fitted.labels_ == code].mean() for code in range(9)])[:, None]
    np.testing.assert_allclose(seen["codebook"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(seen["codebook"], seen["total"])
