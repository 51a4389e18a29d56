"""Sparse autoencoders: against an oracle in float64, against what was planted, and that a stop changes nothing."""

import functools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import clvq
import numpy as np
import pytest
import torch
from clvq.cache.statistics import SiteStatistics
from clvq.errors import ConfigError, Interrupted
from clvq.progress import SILENT, Progress
from clvq.trainer.build import build
from clvq.trainer.config import with_overrides
from clvq.trainer.fit import fit
from clvq.trainer.methods import SaeConfig, method_config
from clvq.trainer.run import Run
from clvq.trainer.sae import SparseAutoencoder
from safetensors.torch import load_file

from .caches import LOWER, UPPER
from .stopping import Pulled, Stops

CPU = torch.device("cpu")
METHODS = ["sae", "cross-sae"]
# All that takes part: latents die and predict what is left over.
SMALL = {
    "encoder.k": "3",
    "encoder.aux_k": "4",
    "encoder.dead_after": "120",
    "encoder.epochs": "4",
    "encoder.rows_per_batch": "48",
    "optimizer.lr": "0.01",
}


def _config(method: str = "sae", **changes: str) -> SaeConfig:
    config = method_config(method, lower=LOWER, upper=UPPER, codes=24)
    assert isinstance(config, SaeConfig)
    return with_overrides(config, SMALL | {name.replace("__", "."): value for name, value in changes.items()})


def _rows(rows: int, d: int, *, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.normal(size=(rows, d)) * generator.uniform(0.5, 3, d) + 7).astype(np.float32)


def _model(config: SaeConfig, lower: np.ndarray, upper: np.ndarray, *, seed: int = 0) -> SparseAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(config, d_lower=lower.shape[1], d_upper=upper.shape[1])
        assert isinstance(model, SparseAutoencoder)
        model.place(SiteStatistics.of(lower), SiteStatistics.of(upper))
        # As after some training.
        model.encoder.data *= 10
        for name, parameter in model.named_parameters():
            if name != "decoder":
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def _oracle(
    model: SparseAutoencoder, lower: np.ndarray, upper: np.ndarray, dead: np.ndarray
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Losses and gradients of TopK with AuxK, by hand, in float64."""
    settings = model.config
    w, d, be, bd = (
        getattr(model, name).detach().double().numpy()
        for name in ("encoder", "decoder", "encoder_bias", "decoder_bias")
    )
    tied = model.before is None
    b = bd if tied else model.before.detach().double().numpy()
    lower, upper = lower.astype(np.float64), upper.astype(np.float64)
    given = (lower - lower.mean(axis=0)) / np.sqrt(lower.var(axis=0).mean())
    target = given if tied else (upper - upper.mean(axis=0)) / np.sqrt(upper.var(axis=0).mean())
    seen = (given - b) @ w + be

    def kept(values: np.ndarray, k: int) -> np.ndarray:
        order = np.argsort(-values, axis=1)[:, :k]
        mask = np.zeros(values.shape, dtype=bool)
        np.put_along_axis(mask, order, True, axis=1)
        return mask & (values > 0)

    mask = kept(seen, settings.k)
    active = np.where(mask, seen, 0)
    error = target - active @ d - bd
    size = error.size
    slope = -2 * error / size
    seen_slope = np.where(mask, slope @ d.T, 0)
    grads = {"decoder": active.T @ slope, "decoder_bias": slope.sum(axis=0)}

    aux_mask = np.zeros_like(mask)
    aux_mask[:, dead] = kept(seen[:, dead], settings.aux_k)
    aux = np.where(aux_mask, seen, 0)
    missed = error - aux @ d
    variance = ((error - error.mean(axis=0)) ** 2).mean()
    aux_slope = -2 * settings.aux_weight * missed / size / variance
    grads["decoder"] += aux.T @ aux_slope
    seen_slope += np.where(aux_mask, aux_slope @ d.T, 0)

    grads["encoder"] = (given - b).T @ seen_slope
    grads["encoder_bias"] = seen_slope.sum(axis=0)
    before = -(seen_slope @ w.T).sum(axis=0)
    if tied:
        grads["decoder_bias"] += before
    else:
        grads["before"] = before
    losses = {"reconstruction": (error**2).mean(), "dead": settings.aux_weight * (missed**2).mean() / variance}
    return losses, grads


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_those_of_an_oracle_in_float64(method: str) -> None:
    lower, upper = _rows(50, 16), _rows(50, 12, seed=1)
    model = _model(_config(method), lower, upper)
    dead = np.array([1, 5, 6, 9, 17, 20])
    model.idle[dead] = 1_000_000
    # They see something of many rows, but are among the strongest of few.
    model.encoder_bias.data[dead] -= 1.5
    given = torch.from_numpy(lower), torch.from_numpy(upper if method == "cross-sae" else lower)
    # What is active now is dead no longer.
    seen = model.activations(given[0]).detach()
    dead = dead[(seen[:, dead] == 0).all(dim=0).numpy()]
    losses = model.row_losses(*given, total=50)
    wanted, grads = _oracle(model, lower, upper, dead)
    assert {name: float(value.detach()) for name, value in losses.items()} == pytest.approx(wanted, rel=1e-4)
    assert wanted["dead"] > 0
    torch.stack(list(losses.values())).sum().backward()
    assert {name for name, _ in model.named_parameters()} == grads.keys()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.grad, grads[name], rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_without_dead_latents_there_is_no_loss_of_theirs(method: str) -> None:
    lower = _rows(50, 16)
    model = _model(_config(method), lower, lower)
    losses = model.row_losses(torch.from_numpy(lower), torch.from_numpy(lower), total=50)
    assert float(losses["dead"]) == 0


def test_a_step_keeps_decoder_vectors_at_unit_length_and_spends_nothing_on_it() -> None:
    lower = _rows(50, 16)
    model = _model(_config(), lower, lower)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        given = torch.from_numpy(lower)
        torch.stack(list(model.row_losses(given, given, total=50).values())).sum().backward()
        before = model.decoder.grad.clone()
        model.before_step()
        along = (model.decoder.grad * model.decoder.detach()).sum(dim=1)
        torch.testing.assert_close(along, torch.zeros(24), atol=1e-7, rtol=0)
        # Only what is along the vector has gone.
        gone = before - model.decoder.grad
        torch.testing.assert_close(gone, (gone * model.decoder.detach()).sum(dim=1, keepdim=True) * model.decoder)
        optimizer.step()
        model.after_step()
        torch.testing.assert_close(model.decoder.detach().norm(dim=1), torch.ones(24))


@pytest.mark.parametrize("low", [False, True])
def test_batchtopk_keeps_exactly_k_activations_a_row_on_average(low: bool) -> None:
    """Rounded to bfloat16, many activations are equal to the last one that is kept."""
    lower = _rows(200, 16)
    model = _model(_config(encoder__activation="batchtopk"), lower, lower)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        seen = model.pre_activations(torch.from_numpy(lower)).detach()
    if low:
        seen = seen.bfloat16().float()
        assert len(seen.unique()) < seen.numel() / 2
    kept = model._largest_of_all(seen, 200)
    assert len(kept.value) == 3 * 200
    flat = np.sort(seen.numpy().ravel())[::-1]
    np.testing.assert_array_equal(np.sort(kept.value.numpy())[::-1], flat[: 3 * 200])
    row = np.repeat(np.arange(200), np.diff(np.append(kept.first.numpy(), len(kept.value))))
    np.testing.assert_array_equal(seen.numpy()[row, kept.latent.numpy()], kept.value.numpy())
    assert float(model.threshold[0]) == flat[3 * 200 - 1]


def test_batchtopk_keeps_nothing_that_is_not_above_0() -> None:
    model = _model(_config(encoder__activation="batchtopk"), _rows(9, 16), _rows(9, 16))
    seen = -torch.rand(9, 24)
    seen[2, 3] = 1.0
    kept = model._largest_of_all(seen, 9)
    assert (kept.value.tolist(), kept.latent.tolist()) == ([1.0], [3])
    assert kept.first.tolist() == [0, 0, 0, *[1] * 6]


def test_a_batchtopk_threshold_keeps_k_activations_a_row_of_rows_never_seen() -> None:
    rows, _ = _planted(6_000)
    model = _trained("batchtopk")
    with torch.no_grad():
        active = model.activations(torch.from_numpy(rows[5_000:])) > 0
    assert active.sum(dim=1).double().mean() == pytest.approx(3, rel=0.1)
    assert active.sum(dim=1).unique().numel() > 1


@functools.cache
def _planted(rows: int, *, d: int = 24, directions: int = 32, active: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    truth = generator.normal(size=(directions, d))
    truth /= np.linalg.norm(truth, axis=1, keepdims=True)
    weights = np.zeros((rows, directions))
    for row in weights:
        row[generator.permutation(directions)[:active]] = generator.uniform(1, 3, active)
    return (weights @ truth + 0.01 * generator.normal(size=(rows, d)) + 5).astype(np.float32), truth


@functools.cache
def _trained(activation: str, *, steps: int = 500) -> SparseAutoencoder:
    """Of 48 latents, from 5,000 planted rows."""
    config = _config(encoder__activation=activation, encoder__latents="48", encoder__dead_after="5000")
    rows, _ = _planted(6_000)
    rows = rows[:5_000]
    given = torch.from_numpy(rows)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(config, d_lower=rows.shape[1], d_upper=rows.shape[1])
        assert isinstance(model, SparseAutoencoder)
        model.place(SiteStatistics.of(rows), SiteStatistics.of(rows))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
            part = given[torch.randint(len(given), (256,))]
            optimizer.zero_grad()
            torch.stack(list(model.row_losses(part, part, total=256).values())).sum().backward()
            model.before_step()
            optimizer.step()
            model.after_step()
    return model


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_planted_directions_are_found(activation: str) -> None:
    _, truth = _planted(6_000)
    found = _trained(activation).vectors().numpy()
    assert (truth @ found.T).max(axis=1).mean() > 0.9


def test_idle_counts_rows_since_a_latent_was_active_over_batches_of_any_size() -> None:
    lower = _rows(50, 16)
    model = _model(_config(), lower, lower)
    wanted = np.zeros(24, dtype=np.int64)
    for start, end in ((0, 20), (20, 50), (0, 7)):
        part = torch.from_numpy(lower[start:end])
        model.row_losses(part, part, total=end - start)
        used = (model.activations(part) > 0).any(dim=0).numpy()
        wanted = np.where(used, 0, wanted + end - start)
        np.testing.assert_array_equal(model.idle, wanted)
    assert wanted.max() > 0


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_looking_at_rows_changes_nothing(activation: str) -> None:
    lower = torch.from_numpy(_rows(50, 16))
    model = _model(_config(encoder__activation=activation), lower.numpy(), lower.numpy())
    model.row_losses(lower, lower, total=50)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.measure_rows(lower, lower)
    model.concept(lower)
    model.activations(lower)
    model.weights()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_latents_are_listed_strongest_first(activation: str) -> None:
    lower = torch.from_numpy(_rows(60, 16))
    model = _model(_config(encoder__activation=activation), lower.numpy(), lower.numpy())
    model.row_losses(lower, lower, total=60)
    with torch.no_grad():
        model.encoder_bias -= 1.5 if activation == "topk" else 0.2
        dense = model.activations(lower).numpy()
        nearest = (model.pre_activations(lower) - model.threshold).argmax(dim=1).numpy()
    listed = model.active(lower).numpy()
    assert listed.shape == (60, 3)
    for row, own, near in zip(dense, listed, nearest, strict=True):
        wanted = [int(latent) for latent in np.argsort(-row, kind="stable")[:3] if row[latent] > 0]
        assert own.tolist() == (wanted or [near]) + [-1] * (3 - max(len(wanted), 1))
    assert (listed[:, 1] == -1).any()
    assert (listed[:, 2] >= 0).any()
    np.testing.assert_array_equal(model.concept(lower), listed[:, 0])


@pytest.mark.parametrize("method", METHODS)
def test_weights_in_raw_coordinates_say_the_same_and_can_be_taken_over(method: str) -> None:
    lower, upper = _rows(50, 16), _rows(50, 12, seed=1)
    model = _model(_config(method), lower, upper)
    weights = model.weights()
    rows = torch.from_numpy(lower)
    with torch.no_grad():
        scaled, dense = (
            model.measure_rows(rows, rows if method == "sae" else torch.from_numpy(upper))[1],
            (model.activations(rows)),
        )
    scale = float(model.lower_rms if method == "sae" else model.upper_scale)
    seen = rows.double() @ weights.encoder + weights.encoder_bias
    active = torch.where(dense > 0, seen, 0)
    torch.testing.assert_close(active.float(), dense * scale, rtol=1e-4, atol=1e-4)
    predicted = active @ weights.decoder + weights.decoder_bias
    torch.testing.assert_close(predicted.float(), scaled["sae_fvu"], rtol=1e-4, atol=1e-4)
    # In other coordinates it is the same autoencoder.
    other = _model(_config(method), lower + 3, 2 * upper, seed=1)
    other.adopt(weights)
    torch.testing.assert_close(other.weights().encoder, weights.encoder, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other.weights().encoder_bias, weights.encoder_bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.weights().decoder_bias, weights.decoder_bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalization", ["constant_norm_rescale", "layer_norm"])
def test_rows_normalised_one_by_one_come_back_in_their_own_scale(normalization: str) -> None:
    lower = _rows(50, 16)
    config = _config(encoder__normalization=normalization, encoder__k="24", encoder__latents="24")
    model = _model(config, lower, lower)
    rows = torch.from_numpy(lower)
    torch.testing.assert_close(model._raw(model._given(rows), rows), rows, rtol=1e-3, atol=1e-3)
    given = model._given(rows)
    if normalization == "constant_norm_rescale":
        torch.testing.assert_close(given.norm(dim=1), torch.full((50,), 4.0))
    else:
        torch.testing.assert_close(given.std(dim=1), torch.ones(50), rtol=1e-4, atol=1e-4)


def _fit(cache: clvq.Cache, config: SaeConfig, out: Path, *, progress: Progress = SILENT) -> dict[str, Any]:
    return fit(cache, config, out, device=CPU, progress=progress).report


@pytest.mark.parametrize(("method", "activation"), [("sae", "batchtopk"), ("cross-sae", "topk")])
@pytest.mark.parametrize("kind", ["interrupted", "pulled"])
def test_stopped_again_and_again_it_ends_in_the_same_bytes(
    method: str, activation: str, kind: str, small_cache: clvq.Cache, tmp_path: Path
) -> None:
    config = _config(method, encoder__activation=activation, fit__checkpoint_minutes="1e-9")
    _fit(small_cache, config, tmp_path / "whole")
    every, stops = 7, 0
    while True:
        error = Interrupted("stop", signal_number=2) if kind == "interrupted" else Pulled()
        try:
            _fit(small_cache, config, tmp_path / "stopped", progress=Stops(every, error))
        except (Interrupted, Pulled):
            stops += 1
            every = 3 * every // 2
            continue
        break
    assert stops >= 3
    whole, stopped = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert stopped == whole


@pytest.mark.parametrize("method", METHODS)
def test_the_report_holds_what_numpy_finds(method: str, small_cache: clvq.Cache, tmp_path: Path) -> None:
    report = _fit(small_cache, _config(method, held_out='"dev"', encoder__activation="batchtopk"), tmp_path / "run")
    weights = Run.from_pretrained(tmp_path / "run").sparse_weights()
    rows = small_cache.rows_of(small_cache.splits(["dev"]), special="leading")
    lower = small_cache.vectors(LOWER, rows).astype(np.float64)
    target = small_cache.vectors(UPPER, rows).astype(np.float64) if method == "cross-sae" else lower
    seen = lower @ weights.encoder.numpy() + weights.encoder_bias.numpy()
    active = np.where(seen > weights.threshold.numpy(), seen, 0)
    predicted = active @ weights.decoder.numpy() + weights.decoder_bias.numpy()
    fvu = ((target - predicted) ** 2).sum() / ((target - target.mean(axis=0)) ** 2).sum()
    assert report["sae_fvu"] == pytest.approx(fvu, rel=1e-4)
    assert report["l0"] == pytest.approx((active > 0).sum(axis=1).mean(), rel=1e-3)
    assert report["silent_latents_share"] == pytest.approx((active == 0).all(axis=0).mean())
    model = load_file(tmp_path / "run" / "model.safetensors")
    assert report["dead_latents_share"] == pytest.approx((model["network.idle"] >= 120).double().mean())


_SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import rank_processes
from caches import LOWER, UPPER
from clvq.trainer.config import with_overrides
from clvq.trainer.methods import method_config

def config_of(job):
    return with_overrides(method_config(job["preset"], lower=LOWER, upper=UPPER, codes=24), job["settings"])

rank_processes.config_of = config_of
for job in json.loads(sys.argv[2]):
    print(json.dumps(rank_processes.forked(job)), flush=True)
"""


@pytest.fixture(scope="module")
def together(small_cache: clvq.Cache, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """Runs of one process and of two, by name, and their exit codes."""
    folder, jobs = tmp_path_factory.mktemp("ranks"), {}
    for method, activation in (("sae", "batchtopk"), ("cross-sae", "topk"), ("pca", "")):
        settings = SMALL | {"encoder.activation": activation} if activation else {}
        for count in (1, 2):
            name = f"{method} {count}"
            told = {"cache": str(small_cache.path), "out": str(folder / name), "preset": method, "ranks": count}
            jobs[name] = told | {"settings": settings}
    # A batch of one row leaves one of two processes without any.
    few = SMALL | {"encoder.rows_per_batch": "1", "encoder.epochs": "1", "encoder.dead_after": "20"}
    for count in (1, 2):
        jobs[f"few {count}"] = jobs["sae 1"] | {"out": str(folder / f"few {count}"), "ranks": count, "settings": few}
    (folder / "ranks.py").write_text(textwrap.dedent(_SCRIPT))
    command = [sys.executable, str(folder / "ranks.py"), str(Path(__file__).parent), json.dumps(list(jobs.values()))]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return folder, dict(zip(jobs, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", ["sae", "cross-sae", "few"])
def test_two_processes_equal_one_on_the_joined_batch(name: str, together: tuple[Path, dict[str, list[int]]]) -> None:
    folder, codes = together
    assert codes[f"{name} 1"] + codes[f"{name} 2"] == [0, 0, 0]
    one, two = (load_file(folder / f"{name} {count}" / "model.safetensors") for count in (1, 2))
    assert one["network.idle"].max() > 0
    for tensor in one:
        torch.testing.assert_close(two[tensor], one[tensor], rtol=1e-3, atol=1e-3, msg=f"{tensor} differs")


def test_a_method_without_epochs_is_refused_to_several_processes_before_anything_is_written(
    together: tuple[Path, dict[str, list[int]]],
) -> None:
    folder, codes = together
    assert (codes["pca 1"], codes["pca 2"]) == ([0], [4, 4])
    assert not (folder / "pca 2").exists()


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_an_activation_that_is_not_trained_here_is_refused(
    activation: str, small_cache: clvq.Cache, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"an autoencoder with {activation} is not trained here"):
        _fit(small_cache, _config(encoder__activation=activation), tmp_path / "run")
    assert not (tmp_path / "run").exists()
