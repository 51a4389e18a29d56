"""Autoencoders to sae-lens' files and back, and what a stranger's files may not do."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clvq
import numpy as np
import pytest
import torch
from clvq.errors import ClvqError, ConfigError, DataError, DataNotFound, RunMismatch
from clvq.trainer.config import with_overrides
from clvq.trainer.fit import fit
from clvq.trainer.methods import SaeConfig, method_config
from clvq.trainer.run import Run
from clvq.trainer.sae_lens import CFG, WEIGHTS, read, write
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from .caches import LOWER, UPPER, make_cache
from .commands import command_of

CPU = torch.device("cpu")
D, LATENTS = 16, 20


def _config(method: str = "sae", codes: int = LATENTS, **changes: str) -> SaeConfig:
    config = method_config(method, lower=LOWER, upper=UPPER, codes=codes, held_out="dev")
    assert isinstance(config, SaeConfig)
    small = {"encoder.k": "3", "encoder.epochs": "2", "encoder.rows_per_batch": "48", "optimizer.lr": "0.01"}
    return with_overrides(config, small | {name.replace("__", "."): value for name, value in changes.items()})


@pytest.fixture(scope="module")
def trained(small_cache: clvq.Cache, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A run of a method and activation."""
    folder = tmp_path_factory.mktemp("trained")

    def run(method: str, activation: str) -> Path:
        out = folder / f"{method} {activation}"
        fit(small_cache, _config(method, encoder__activation=activation), out, device=CPU)
        return out

    return run


def _taken_over(cache: clvq.Cache, folder: Path, out: Path) -> dict[str, Any]:
    foreign = read(folder, d_lower=cache.width(LOWER), d_upper=cache.width(UPPER))
    config = foreign.settings(_config(foreign.method, foreign.latents))
    return fit(cache, config, out, device=CPU, foreign=foreign).report


def _dev(cache: clvq.Cache, site: str = LOWER) -> np.ndarray:
    return cache.vectors(site, cache.rows_of(cache.splits(["dev"]), special="leading"))


@pytest.mark.parametrize(
    ("method", "activation", "architecture"),
    [
        ("sae", "topk", "topk"),
        ("sae", "batchtopk", "jumprelu"),
        ("cross-sae", "batchtopk", "jumprelu_transcoder"),
    ],
)
def test_there_and_back_it_is_the_same_autoencoder(
    method: str, activation: str, architecture: str, trained: Any, small_cache: clvq.Cache, tmp_path: Path
) -> None:
    run = Run.from_pretrained(trained(method, activation))
    cfg = write(run, tmp_path / "out", cache=small_cache)
    assert cfg["architecture"] == architecture
    assert json.loads((tmp_path / "out" / CFG).read_bytes()) == cfg
    assert cfg["metadata"]["hook_name"] == "blocks.0.hook_resid_post"
    assert cfg["metadata"]["model_name"] == "synthetic"
    report = _taken_over(small_cache, tmp_path / "out", tmp_path / "back")
    back, rows = Run.from_pretrained(tmp_path / "back"), _dev(small_cache)
    np.testing.assert_array_equal(back.active(rows), run.active(rows))
    np.testing.assert_array_equal(back.counts, run.counts)
    own = json.loads((trained(method, activation) / "report.json").read_bytes())
    for figure in ("sae_fvu", "own_code_fvu", "l0", "silent_latents_share"):
        assert report[figure] == pytest.approx(own[figure], rel=1e-4), figure
    assert "dead_latents_share" not in report
    assert back.config.source is not None


@pytest.mark.parametrize(("method", "activation"), [("sae", "topk"), ("sae", "batchtopk"), ("cross-sae", "batchtopk")])
def test_the_files_say_by_sae_lens_equations_what_the_run_says(
    method: str, activation: str, trained: Any, small_cache: clvq.Cache, tmp_path: Path
) -> None:
    run = Run.from_pretrained(trained(method, activation))
    cfg = write(run, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    rows, target = _dev(small_cache), _dev(small_cache, UPPER if method == "cross-sae" else LOWER)
    active, predicted = _sae_lens(cfg, tensors, rows)
    for row, listed in zip(active, run.active(rows), strict=True):
        strongest = [int(latent) for latent in np.argsort(-row, kind="stable")[:3] if row[latent] > 0]
        assert strongest == [latent for latent in listed.tolist() if latent >= 0][: len(strongest)]
    target = target.astype(np.float64)
    fvu = ((target - predicted) ** 2).sum() / ((target - target.mean(axis=0)) ** 2).sum()
    report = json.loads((trained(method, activation) / "report.json").read_bytes())
    assert report["sae_fvu"] == pytest.approx(fvu, rel=1e-4)
    np.testing.assert_allclose(np.linalg.norm(tensors["W_dec"], axis=1), 1, rtol=1e-5)


def _sae_lens(cfg: dict[str, Any], tensors: dict[str, np.ndarray], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`encode` and `decode` of sae-lens 6, written anew in float64."""
    t = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    x = rows.astype(np.float64)
    back, shift = np.ones((len(x), 1)), np.zeros((len(x), 1))
    match cfg.get("normalize_activations", "none"):
        case "constant_norm_rescale":
            back = np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(x.shape[1])
            x = x / back
        case "layer_norm":
            shift = x.mean(axis=1, keepdims=True)
            back = (x - shift).std(axis=1, ddof=1, keepdims=True)
            x = (x - shift) / (back + 1e-5)
    seen = (x - cfg.get("apply_b_dec_to_input", True) * t["b_dec"] if cfg["architecture"] in SINGLE else x) @ t["W_enc"]
    seen = seen + t["b_enc"]
    lengths = np.linalg.norm(t["W_dec"], axis=1) if cfg.get("rescale_acts_by_decoder_norm") else 1.0
    seen = seen * lengths
    if cfg["architecture"] == "topk":
        order = np.argsort(-seen, axis=1)[:, : cfg["k"]]
        active = np.zeros_like(seen)
        np.put_along_axis(active, order, np.maximum(np.take_along_axis(seen, order, axis=1), 0), axis=1)
    else:
        active = np.maximum(seen, 0) * (seen > t.get("threshold", t.get("topk_threshold", 0)))
    return active, (active / lengths @ t["W_dec"] + t["b_dec"]) * back + shift


SINGLE = ("standard", "topk", "jumprelu", "batchtopk")


def _foreign(folder: Path, cfg: dict[str, Any], *, seed: int = 0, **changes: Any) -> dict[str, np.ndarray]:
    """A folder as sae-lens writes it, with random weights whose decoder has vectors of any length."""
    generator = np.random.default_rng(seed)
    tensors = {
        "W_enc": generator.normal(size=(D, LATENTS)) / 4,
        "b_enc": generator.normal(size=LATENTS),
        "W_dec": generator.normal(size=(LATENTS, D)) * generator.uniform(0.2, 3, (LATENTS, 1)),
        "b_dec": generator.normal(size=D) + 5,
    }
    if "jumprelu" in cfg["architecture"]:
        tensors["threshold"] = generator.uniform(0, 3, LATENTS)
    if cfg["architecture"] == "batchtopk":
        tensors["topk_threshold"] = np.array(1.3)
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()} | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CFG).write_text(json.dumps({"d_in": D, "d_sae": LATENTS, **cfg}))
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)
    return tensors


FOREIGN = [
    {"architecture": "standard"},
    {"architecture": "standard", "apply_b_dec_to_input": False, "normalize_activations": "none"},
    {"architecture": "standard", "normalize_activations": "layer_norm"},
    {"architecture": "topk", "k": 4},
    {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True},
    {"architecture": "topk", "k": 4, "normalize_activations": "constant_norm_rescale"},
    {"architecture": "jumprelu", "apply_b_dec_to_input": False},
    {"architecture": "jumprelu", "normalize_activations": "constant_norm_rescale"},
    {"architecture": "batchtopk", "k": 4.5, "rescale_acts_by_decoder_norm": True},
    {"architecture": "batchtopk", "k": 4, "rescale_acts_by_decoder_norm": False},
    {"architecture": "transcoder", "apply_b_dec_to_input": False, "d_out": D},
    {"architecture": "jumprelu_transcoder", "apply_b_dec_to_input": False, "d_out": D},
]


@pytest.mark.parametrize("cfg", FOREIGN, ids=lambda cfg: "-".join(map(str, cfg.values())))
def test_what_sae_lens_saved_says_here_what_it_says_there(
    cfg: dict[str, Any], small_cache: clvq.Cache, tmp_path: Path
) -> None:
    tensors = _foreign(tmp_path / "theirs", cfg)
    report = _taken_over(small_cache, tmp_path / "theirs", tmp_path / "run")
    rows = _dev(small_cache)
    crosses = "transcoder" in cfg["architecture"]
    active, predicted = _sae_lens(cfg, tensors, rows)
    target = (_dev(small_cache, UPPER) if crosses else rows).astype(np.float64)
    fvu = ((target - predicted) ** 2).sum() / ((target - target.mean(axis=0)) ** 2).sum()
    assert report["sae_fvu"] == pytest.approx(fvu, rel=1e-3)
    assert report["l0"] == pytest.approx((active > 0).sum(axis=1).mean(), rel=1e-3)
    # The strongest is the one that adds most, where that does not change which are active.
    weight = 1 if cfg["architecture"] == "topk" else np.linalg.norm(tensors["W_dec"], axis=1)
    if cfg.get("rescale_acts_by_decoder_norm"):
        weight = 1
    some = (active > 0).any(axis=1)
    strongest = (active * weight).argmax(axis=1)
    assert (Run.from_pretrained(tmp_path / "run").assign(rows) == strongest)[some].mean() > 0.99


def test_rows_are_scaled_by_their_mean_norm_where_that_was_not_folded_in(
    small_cache: clvq.Cache, tmp_path: Path
) -> None:
    cfg = {"architecture": "standard", "normalize_activations": "expected_average_only_in"}
    tensors = _foreign(tmp_path / "theirs", cfg)
    report = _taken_over(small_cache, tmp_path / "theirs", tmp_path / "run")
    train = small_cache.vectors(LOWER, small_cache.rows_of(small_cache.splits(["train"]), special="leading"))
    factor = np.sqrt(D) / np.linalg.norm(train.astype(np.float64), axis=1).mean()
    rows = _dev(small_cache).astype(np.float64)
    _, predicted = _sae_lens({"architecture": "standard"}, tensors, rows * factor)
    fvu = ((rows - predicted / factor) ** 2).sum() / ((rows - rows.mean(axis=0)) ** 2).sum()
    assert report["sae_fvu"] == pytest.approx(fvu, rel=1e-3)


def test_a_file_of_version_5_is_read_as_sae_lens_reads_it(small_cache: clvq.Cache, tmp_path: Path) -> None:
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "normalize_activations": False}
    tensors = _foreign(
        tmp_path / "theirs", {"architecture": "standard", **old, "hook_name": "blocks.0.hook_resid_post"}
    )
    found = read(tmp_path / "theirs", d_lower=D, d_upper=D)
    assert (found.activation, found.k, found.hook_name) == ("topk", 4, "blocks.0.hook_resid_post")
    np.testing.assert_allclose(found.weights.encoder, tensors["W_enc"])


def test_another_place_than_it_was_trained_at_is_told(
    small_cache: clvq.Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = {"architecture": "standard", "metadata": {"hook_name": "blocks.4.hook_resid_post"}}
    _foreign(tmp_path / "theirs", cfg)
    with caplog.at_level(logging.WARNING):
        _taken_over(small_cache, tmp_path / "theirs", tmp_path / "run")
    assert "trained at blocks.4.hook_resid_post, which is hidden.5, and is used at hidden.1" in caplog.text


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"architecture": "gated"}, "has the architecture 'gated': clvq reads standard, topk, jumprelu"),
        ({"architecture": "skip_transcoder"}, "has the architecture 'skip_transcoder'"),
        ({"normalize_activations": "covariance_whitening"}, "has normalize_activations = 'covariance_whitening'"),
        ({"reshape_activations": "hook_z"}, "has reshape_activations = 'hook_z': clvq reads None, 'none'"),
        ({"activation_fn": "tanh-relu"}, "has activation_fn = 'tanh-relu'"),
        ({"finetuning_scaling_factor": True}, "has finetuning_scaling_factor = True"),
        ({"architecture": "topk"}, "has k = None, and a topk autoencoder has 1 to 20 active latents"),
        ({"architecture": "topk", "k": 21}, "has k = 21"),
        ({"architecture": "transcoder", "d_out": D}, "has apply_b_dec_to_input = True"),
        ({"d_sae": 1 << 40}, r"W_enc in .* is F32 \[16, 20\], and \[16, 1099511627776\]"),
        ({"d_sae": "many"}, "is not a cfg.json of sae-lens, at 'd_sae'"),
        ({"d_sae": -1}, "at 'd_sae'"),
    ],
)
def test_what_is_not_known_here_is_refused_by_name(cfg: dict[str, Any], message: str, tmp_path: Path) -> None:
    _foreign(tmp_path, {"architecture": "standard"} | cfg)
    with pytest.raises(DataError, match=message):
        read(tmp_path, d_lower=D, d_upper=D)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_enc": np.zeros((D, 3), np.float32)}, r"W_enc in .* is F32 \[16, 3\], and \[16, 20\]"),
        ({"b_enc": np.zeros(LATENTS, np.int64)}, "b_enc in .* is I64"),
        ({"b_dec": np.full(D, np.nan, np.float32)}, "b_dec in .* has values that are not finite"),
        ({"W_skip": np.zeros((D, D), np.float32)}, "do not agree on W_skip"),
        ({"b_dec": None}, "do not agree on b_dec"),
    ],
)
def test_weights_that_are_not_what_they_should_be_are_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _foreign(tmp_path, {"architecture": "standard"}, **changes)
    with pytest.raises(DataError, match=message):
        read(tmp_path, d_lower=D, d_upper=D)


def test_widths_that_are_not_the_site_s_are_refused(tmp_path: Path) -> None:
    _foreign(tmp_path, {"architecture": "standard"})
    with pytest.raises(ConfigError, match="has d_in = 16, and the site has 12 channels"):
        read(tmp_path, d_lower=12, d_upper=16)
    _foreign(tmp_path, {"architecture": "transcoder", "apply_b_dec_to_input": False, "d_out": D})
    with pytest.raises(ConfigError, match="has d_out = 16, and the site has 12 channels"):
        read(tmp_path, d_lower=16, d_upper=12)


def test_missing_and_oversized_files_are_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(DataNotFound, match=r"has no cfg\.json; give the folder with it"):
        read(tmp_path, d_lower=D, d_upper=D)
    _foreign(tmp_path, {"architecture": "standard"})
    (tmp_path / WEIGHTS).rename(tmp_path / "sae_weights.pt")
    with pytest.raises(DataNotFound, match=r"has no sae_weights\.safetensors: clvq reads no other files"):
        read(tmp_path, d_lower=D, d_upper=D)
    with open(tmp_path / WEIGHTS, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"has 1,099,511,627,776 bytes, and its cfg\.json allows"):
        read(tmp_path, d_lower=D, d_upper=D)
    with open(tmp_path / CFG, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="has 1,099,511,627,776 bytes, more than the 1,048,576 that are read"):
        read(tmp_path, d_lower=D, d_upper=D)


@given(st.binary(max_size=300), st.sampled_from(["cfg", "weights", "tail"]))
def test_whatever_bytes_there_are_the_error_is_one_of_ours(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, where: str
) -> None:
    folder = tmp_path_factory.mktemp("odd")
    _foreign(folder, {"architecture": "standard"})
    whole = (folder / WEIGHTS).read_bytes()
    match where:
        case "cfg":
            (folder / CFG).write_bytes(data)
        case "weights":
            (folder / WEIGHTS).write_bytes(data)
        case "tail":
            (folder / WEIGHTS).write_bytes(whole[: len(whole) - 1 - len(data)])
    with pytest.raises(ClvqError):
        read(folder, d_lower=D, d_upper=D)


@given(
    st.dictionaries(
        st.sampled_from(["architecture", "k", "normalize_activations", "metadata", "activation_fn_kwargs", "d_out"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
            max_leaves=4,
        ),
    )
)
def test_whatever_a_cfg_says_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, cfg: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("odd")
    _foreign(folder, {"architecture": "standard"})
    plain = json.loads((folder / CFG).read_text())
    (folder / CFG).write_text(json.dumps(plain | cfg))
    try:
        found = read(folder, d_lower=D, d_upper=D)
    except ClvqError:
        return
    assert found.k >= 1


def test_what_sae_lens_has_no_kind_for_is_not_exported(trained: Any, small_cache: clvq.Cache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no cross-layer autoencoder \(transcoder\) with topk: train with --set"):
        write(Run.from_pretrained(trained("cross-sae", "topk")), tmp_path / "out")
    fit(small_cache, method_config("pca", lower=LOWER, upper=UPPER, codes=4), tmp_path / "pca", device=CPU)
    with pytest.raises(ConfigError, match=r"pca .* has no latents"):
        write(Run.from_pretrained(tmp_path / "pca"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_needs_an_empty_folder_and_the_run_s_own_cache(trained: Any, tmp_path: Path) -> None:
    run = Run.from_pretrained(trained("sae", "topk"))
    with pytest.raises(RunMismatch):
        write(run, tmp_path / "out", cache=make_cache(tmp_path / "cache", seed=5))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty: give another folder"):
        write(run, tmp_path / "out")


def test_weights_from_elsewhere_need_their_folder_and_decide_their_settings(
    trained: Any, small_cache: clvq.Cache, tmp_path: Path
) -> None:
    write(Run.from_pretrained(trained("sae", "topk")), tmp_path / "theirs")
    foreign = read(tmp_path / "theirs", d_lower=D, d_upper=D)
    config = foreign.settings(_config())
    with pytest.raises(ConfigError, match="whose weights are not here: give them with --from"):
        fit(small_cache, config, tmp_path / "run", device=CPU)
    with pytest.raises(ConfigError, match=r"decides source, encoder\.activation"):
        fit(small_cache, with_overrides(config, {"encoder.k": "2"}), tmp_path / "run", device=CPU, foreign=foreign)
    with pytest.raises(ConfigError, match="is of --method sae, and cross-sae is asked for"):
        fit(small_cache, _config("cross-sae"), tmp_path / "run", device=CPU, foreign=foreign)
    assert not (tmp_path / "run").exists()
    first = fit(small_cache, config, tmp_path / "run", device=CPU, foreign=foreign)
    # A finished run is returned as it is.
    assert fit(small_cache, config, tmp_path / "run", device=CPU).report == first.report


def test_the_command_exports_and_takes_over(
    trained: Any, small_cache: clvq.Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ended = command_of(monkeypatch, capsys)
    run, theirs = trained("sae", "topk"), tmp_path / "theirs"
    code, out, err = ended("export", run, "--out", theirs, "--cache", small_cache.path, "--json")
    assert (code, json.loads(out)["architecture"]) == (0, "topk"), err
    train = ("train", small_cache.path, "--lower", 1, "--upper", 2, "--from", theirs, "--held-out", "dev")
    code, out, err = ended(*train, "--method", "sae", "--out", tmp_path / "run", "--json")
    assert (code, json.loads(out)["codes"]) == (0, LATENTS), err
    for words, message in (
        (("--method", "cross-sae"), "is of --method sae, and cross-sae is asked for"),
        (("--method", "sae", "--codes", 7), "has 20 latents, and --codes 7 is asked for"),
        (("--method", "sae", "--seeds", 2), "leave --sweep and --seeds out"),
    ):
        code, _, err = ended(*train, *words, "--out", tmp_path / "other")
        assert (code, err.count("\n")) == (1, 1)
        assert message in err
