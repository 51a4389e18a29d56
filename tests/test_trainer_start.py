"""The codes before the first step."""

from pathlib import Path

import clvq
import numpy as np
import pytest
import torch
from clvq.progress import Silent
from clvq.trainer.config import TrainConfig, preset_config, with_overrides
from clvq.trainer.fit import fit
from clvq.trainer.network import Network
from clvq.trainer.training import Training
from sklearn.cluster import KMeans

LOWER, UPPER = "hidden.1", "hidden.2"


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

    def stop(self: Training, network: Network, config: TrainConfig) -> None:
        begin(self, network, config)
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
