"""The codes before the first step."""

from pathlib import Path

import clvq
import numpy as np
import pytest
import torch
from clvq.progress import Silent
from clvq.trainer.config import StartConfig, preset_config, with_overrides
from clvq.trainer.fit import fit
from clvq.trainer.kmeans import blocks_of
from clvq.trainer.start import starting_codes
from clvq.trainer.training import Training
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


def _codes(rows: np.ndarray, config: StartConfig) -> np.ndarray:
    cpu = torch.device("cpu")
    return starting_codes(blocks_of(rows, device=cpu), config, codes=5, seed=7, device=cpu).numpy()


def _ordered(codes: np.ndarray) -> np.ndarray:
    """By the largest channel, which is another one for each of the clouds."""
    return codes[codes.argmax(axis=1).argsort()]


def test_the_spherical_start_is_k_means_on_the_sphere_times_the_members_mean_norm() -> None:
    rows = _clouds()
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    fitted = KMeans(5, n_init=5, max_iter=300, random_state=7).fit((rows / norms[:, None]).astype(np.float32))
    centres = fitted.cluster_centers_.astype(np.float64)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    centres *= np.array([norms[fitted.labels_ == code].mean() for code in range(5)])[:, None]
    np.testing.assert_allclose(_ordered(_codes(rows, _start())), _ordered(centres), rtol=1e-5, atol=1e-6)


def test_the_plain_start_is_k_means() -> None:
    rows = _clouds()
    expected = KMeans(5, n_init=5, max_iter=300, random_state=7).fit(rows)
    codes = _codes(rows, _start(spherical=False))
    inertia = ((rows[:, None].astype(np.float64) - codes) ** 2).sum(axis=2).min(axis=1).sum()
    assert inertia <= 1.01 * expected.inertia_


def test_fewer_distinct_rows_than_codes_still_give_finite_codes() -> None:
    rows = np.repeat(np.eye(3, 6, dtype=np.float32), 10, axis=0)
    for spherical in (False, True):
        assert np.isfinite(_codes(rows, _start(spherical=spherical))).all()


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_the_network_holds_the_starting_codes_before_the_first_step(
    preset: str, small_cache: clvq.Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published code assigned the start to an attribute that nobody read."""
    config = with_overrides(
        preset_config(preset, lower=LOWER, upper=UPPER, codes=9),
        {"decoder.layers": "1"} | ({"encoder.epochs": "1"} if preset == "default" else {}),
    )
    seen, begin = {}, Training._start_codebook

    def stop(self: Training) -> None:
        begin(self)
        network = self.fitting.network
        lower = torch.from_numpy(small_cache.vectors(LOWER, self.train_rows.places()))
        seen["codebook"] = network.quantizer.codebook.numpy()
        seen["rows"] = (network.encode(lower) if preset == "default" else lower).detach().numpy()
        raise _Stopped

    monkeypatch.setattr(Training, "_start_codebook", stop)
    with pytest.raises(_Stopped):
        fit(small_cache, config, tmp_path / "run", device=torch.device("cpu"), progress=Silent())
    rows = seen["rows"]
    norms = np.linalg.norm(rows, axis=1) if preset == "paper" else np.ones(len(rows))
    units = (rows / norms[:, None]).astype(np.float32)
    fitted = KMeans(9, n_init=5, max_iter=300, random_state=0).fit(units)
    codes = seen["codebook"].astype(np.float64)
    lengths = np.linalg.norm(codes, axis=1)
    places = codes / lengths[:, None] if preset == "paper" else codes
    distances = ((units[:, None].astype(np.float64) - places) ** 2).sum(axis=2)
    # Means of unit vectors lie within the sphere and their directions on it; the rows differ little in direction.
    assert distances.min(axis=1).sum() <= (1.05 if preset == "paper" else 1.01) * fitted.inertia_
    if preset == "paper":
        index = distances.argmin(axis=1)
        np.testing.assert_allclose(lengths, [norms[index == code].mean() for code in range(9)], rtol=0.01)
