"""The rivals: what each finds against an independent oracle, and that each is a run like any other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clvq
import numpy as np
import pytest
import torch
from clvq.errors import ConfigError, Interrupted, ResumeMismatch
from clvq.progress import SILENT, Progress
from clvq.trainer.config import with_overrides
from clvq.trainer.fit import fit
from clvq.trainer.methods import METHODS, PlainConfig, TrainedConfig, method_config
from clvq.trainer.run import Run
from clvq.trainer.sweep import members
from safetensors.torch import load_file
from scipy.cluster.hierarchy import fcluster, ward
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from .caches import LOWER, UPPER, make_cache
from .commands import Command, command_of
from .stopping import Stops

CPU = torch.device("cpu")
RIVALS = [method for method in METHODS if method != "clvq-vae"]
LATENTS = ("sae", "cross-sae")
SMALL_NETWORK = {
    "decoder.layers": "1",
    "decoder.heads": "2",
    "decoder.hidden": "8",
    "fit.epochs": "2",
    "fit.texts_per_batch": "8",
    "optimizer.lr": "0.003",
}
SMALL = {
    "vq-vae": SMALL_NETWORK,
    "agglomerative": {"rows": "200"},
    **{name: {"encoder.k": "3", "encoder.epochs": "2", "encoder.rows_per_batch": "64"} for name in LATENTS},
}


def _config(method: str, *, preset: str = "default", codes: int | None = 8, **changes: str) -> Any:
    config = method_config(
        method,
        preset=preset,
        lower=LOWER,
        upper=UPPER,
        codes=None if method == "mean-difference" else codes,
        classes=2,
        held_out="dev",
    )
    return with_overrides(config, SMALL.get(method, {}) | changes)


def _fit(
    cache: clvq.Cache, config: TrainedConfig | PlainConfig, out: Path, *, progress: Progress = SILENT
) -> dict[str, Any]:
    return fit(cache, config, out, device=CPU, progress=progress).report


def _rows(cache: clvq.Cache, split: str = "train", site: str = LOWER) -> np.ndarray:
    return cache.vectors(site, cache.rows_of(cache.splits([split]), special="leading"))


def _labels(cache: clvq.Cache) -> np.ndarray:
    rows = cache.rows_of(cache.splits(["train"]), special="leading")
    return np.array(cache.texts["label"].to_pylist())[cache.text_index[cache.read_column("text", rows)]]


Trained = Callable[[str], Path]


@pytest.fixture(scope="module")
def trained(small_cache: clvq.Cache, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The run of a method, each made once."""
    folder = tmp_path_factory.mktemp("rivals")

    def run(method: str) -> Path:
        _fit(small_cache, _config(method), folder / method)
        return folder / method

    return run


def test_kmeans_is_as_good_as_scikit_learn_s(trained: Trained, small_cache: clvq.Cache) -> None:
    run, rows = Run.from_pretrained(trained("kmeans")), _rows(small_cache).astype(np.float64)
    codes = load_file(trained("kmeans") / "model.safetensors")["network.quantizer.codebook"].double().numpy()
    distances = ((rows[:, None] - codes) ** 2).sum(axis=2)
    np.testing.assert_array_equal(run.assign(rows.astype(np.float32)), distances.argmin(axis=1))
    theirs = KMeans(8, n_init=10, random_state=0).fit(rows).inertia_
    assert distances.min(axis=1).sum() < 1.02 * theirs


@pytest.mark.parametrize("sampled", [200, 10_000])
def test_agglomerative_is_ward_s_cut_of_a_seeded_sample_and_the_nearest_mean_beyond(
    sampled: int, small_cache: clvq.Cache, tmp_path: Path
) -> None:
    _fit(small_cache, _config("agglomerative", rows=str(sampled)), tmp_path)
    places = small_cache.rows_of(small_cache.splits(["train"]), special="leading")
    sample = np.sort(np.random.default_rng(42).permutation(places)[:sampled])
    rows = small_cache.vectors(LOWER, sample).astype(np.float64)
    cut = fcluster(ward(rows), 8, criterion="maxclust")
    means = np.array([rows[cut == cluster].mean(axis=0) for cluster in range(1, 9)])
    codes = load_file(tmp_path / "model.safetensors")["network.quantizer.codebook"].double().numpy()
    order, ours = np.lexsort(means.T), np.lexsort(codes.T)
    np.testing.assert_allclose(codes[ours], means[order], rtol=1e-5)
    everything = _rows(small_cache)
    nearest = ((everything[:, None].astype(np.float64) - codes) ** 2).sum(axis=2).argmin(axis=1)
    np.testing.assert_array_equal(Run.from_pretrained(tmp_path).assign(everything), nearest)


def test_agglomerative_is_refused_more_rows_than_memory_holds_and_fewer_than_codes(
    small_cache: clvq.Cache, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="rows cannot be 50000: Input should be less than or equal to 40000"):
        _config("agglomerative", rows="50000")
    with pytest.raises(ConfigError, match="rows = 5 is fewer than the 8 codes: set it higher"):
        _fit(small_cache, _config("agglomerative", rows="5"), tmp_path / "run")


def test_pca_is_scikit_learn_s(trained: Trained, small_cache: clvq.Cache) -> None:
    run, rows = Run.from_pretrained(trained("pca")), _rows(small_cache).astype(np.float64)
    theirs = PCA(4).fit(rows)
    for concept in range(8):
        (ours,) = run.direction(concept, LOWER)
        assert abs(ours @ theirs.components_[concept // 2]) == pytest.approx(1, abs=1e-4)
        np.testing.assert_array_equal(ours, run.direction(concept - concept % 2, LOWER)[0])
    axes = np.concatenate([run.direction(2 * component, LOWER) for component in range(4)])
    scores = (rows - rows.mean(axis=0)) @ axes.T
    component = np.abs(scores).argmax(axis=1)
    negative = scores[np.arange(len(rows)), component] < 0
    np.testing.assert_array_equal(run.assign(rows.astype(np.float32)), 2 * component + negative)


def test_pca_has_no_more_components_than_channels(small_cache: clvq.Cache, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"hidden\.1 has 16 channels, and so many components: use --codes 32 or fewer"
    ):
        _fit(small_cache, _config("pca", codes=34), tmp_path / "run")
    with pytest.raises(ConfigError, match="codes cannot be 7"):
        _config("pca", codes=7)


def test_mean_differences_are_numpy_s(trained: Trained, small_cache: clvq.Cache) -> None:
    run, rows = Run.from_pretrained(trained("mean-difference")), _rows(small_cache).astype(np.float64)
    labels = _labels(small_cache)
    wanted = np.array([rows[labels == label].mean(axis=0) - rows.mean(axis=0) for label in (0, 1)])
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    for label in (0, 1):
        np.testing.assert_allclose(run.direction(label, LOWER)[0], wanted[label], atol=1e-4)
        np.testing.assert_allclose(run.published_direction(label), wanted[label], atol=1e-4)
    ours = run.assign(rows.astype(np.float32))
    assert (ours == ((rows - rows.mean(axis=0)) @ wanted.T).argmax(axis=1)).mean() > 0.99


def test_mean_differences_need_every_class_among_the_training_texts(small_cache: clvq.Cache, tmp_path: Path) -> None:
    config = _config("mean-difference")
    with pytest.raises(ConfigError, match="no training text has label 2, whose mean is asked for"):
        _fit(small_cache, config.model_copy(update={"codes": 3}), tmp_path / "run")


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_vq_vae_reconstructs_the_lower_site_and_still_tells_the_upper_one(
    preset: str, small_cache: clvq.Cache, tmp_path: Path
) -> None:
    report = _fit(small_cache, _config("vq-vae", preset=preset, **{"fit.epochs": "6"}), tmp_path)
    run = Run.from_pretrained(tmp_path)
    assert run.config.target == LOWER
    lower, upper = _rows(small_cache, "dev").astype(np.float64), _rows(small_cache, "dev", UPPER).astype(np.float64)
    concept = run.assign(lower.astype(np.float32))
    own = ((upper - run.upper_table[concept]) ** 2).sum() / ((upper - upper.mean(axis=0)) ** 2).sum()
    assert report["own_code_fvu"] == pytest.approx(own, rel=1e-5)
    predicted = []
    for text in np.flatnonzero(small_cache.splits(["dev"])):
        rows = small_cache.rows_of(np.arange(len(small_cache.texts)) == text, special="leading")
        index = torch.from_numpy(run.assign(small_cache.vectors(LOWER, rows)))
        position = torch.from_numpy(small_cache.column("position")[rows].astype(np.int64))[None]
        with torch.no_grad():
            decoded = run._model.from_codes(index, torch.ones(1, len(rows), dtype=torch.bool), position)
        predicted.append(decoded.double().numpy())
    error = (lower - np.concatenate(predicted)) ** 2
    fvu = error.sum() / ((lower - lower.mean(axis=0)) ** 2).sum()
    assert report["decoder_fvu_codes_only"] == pytest.approx(fvu, rel=1e-4)
    if preset == "default":
        assert fvu < 0.5


def test_dead_codes_of_a_vq_vae_are_put_on_rows_again(small_cache: clvq.Cache, tmp_path: Path) -> None:
    dead = {}
    for after in ("0", "3"):
        # Codes that begin where no row is: k-means of the lower rows, which the network never sees as they are.
        config = _config(
            "vq-vae", codes=30, **{"quantizer.revive_after": after, "start.space": "lower", "fit.epochs": "6"}
        )
        dead[after] = _fit(small_cache, config, tmp_path / after)["dead_codes"]
    assert dead["3"] < dead["0"]


@pytest.mark.parametrize("method", RIVALS)
def test_every_rival_is_a_run_like_any_other(
    method: str, trained: Trained, small_cache: clvq.Cache, tmp_path: Path
) -> None:
    run, rows = Run.from_pretrained(trained(method)), _rows(small_cache)
    concept = run.assign(rows)
    assert (concept.dtype, concept.shape) == (np.int64, (len(rows),))
    np.testing.assert_array_equal(run.counts, np.bincount(concept, minlength=run.concepts))
    np.testing.assert_allclose(run.lower_mean, rows.astype(np.float64).mean(axis=0), rtol=1e-5)
    assert run.upper_table.shape == (run.concepts, 16)
    for code in range(run.concepts):
        basis = run.direction(code, LOWER)
        assert basis.shape == (min(1, run.counts[code]), 16)
        np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-5)
        assert np.linalg.norm(run.published_direction(code)) == pytest.approx(1, abs=1e-5)
    assert run.has_latents == (method in LATENTS)
    if run.has_latents:
        active = run.active(rows)
        assert active.shape == (len(rows), 3)
        np.testing.assert_array_equal(active[:, 0], concept)
        directions = run.encoder_directions
        assert (directions.dtype, directions.shape) == (np.float32, (run.concepts, 16))
        seen = rows.astype(np.float64) @ directions.T.astype(np.float64)
        ours = run.sparse_weights()
        scale = np.linalg.norm(ours.encoder.numpy()) / np.linalg.norm(directions)
        np.testing.assert_allclose(seen * scale, rows.astype(np.float64) @ ours.encoder.numpy(), rtol=1e-3, atol=1e-3)
    else:
        for ask in (lambda: run.active(rows), lambda: run.encoder_directions, run.sparse_weights):
            with pytest.raises(ConfigError, match=f"{method} gives a row one concept and has no latents"):
                ask()
    run.save_pretrained(tmp_path / "copy")
    for name in ("config.json", "report.json", "model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (trained(method) / name).read_bytes()
    np.testing.assert_array_equal(Run.from_pretrained(tmp_path / "copy").assign(rows), concept)


def test_the_published_direction_of_an_autoencoder_lives_at_the_lower_site(
    trained: Trained, small_cache: clvq.Cache
) -> None:
    for method, name in (("sae", "decoder"), ("cross-sae", "encoder")):
        tensor = load_file(trained(method) / "model.safetensors")[f"network.{name}"].double().numpy()
        vectors = tensor if method == "sae" else tensor.T
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        run = Run.from_pretrained(trained(method))
        for concept in range(run.concepts):
            np.testing.assert_allclose(run.published_direction(concept), vectors[concept], atol=1e-5)


@pytest.mark.parametrize("method", RIVALS)
def test_the_same_settings_give_the_same_bytes_and_others_are_refused_there(
    method: str, trained: Trained, small_cache: clvq.Cache, tmp_path: Path
) -> None:
    config = Run.from_pretrained(trained(method)).config
    _fit(small_cache, config, tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (trained(method) / name).read_bytes()
    with pytest.raises(ResumeMismatch, match=r"config\.seed: 42 there, 7 now"):
        _fit(small_cache, with_overrides(config, {"seed": "7"}), tmp_path)


@pytest.mark.parametrize("method", RIVALS)
def test_stopped_again_and_again_it_ends_in_the_same_bytes(
    method: str, trained: Trained, small_cache: clvq.Cache, tmp_path: Path
) -> None:
    config, every, stops = Run.from_pretrained(trained(method)).config, 3, 0
    while True:
        try:
            _fit(small_cache, config, tmp_path, progress=Stops(every, Interrupted("stop", signal_number=2)))
        except Interrupted:
            stops, every = stops + 1, 2 * every
            continue
        break
    assert stops >= 1
    assert (tmp_path / "model.safetensors").read_bytes() == (trained(method) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", [method for method in RIVALS if method != "mean-difference"])
def test_a_sweep_of_codes_means_each_method_s_concepts(method: str) -> None:
    found = members(_config(method), ["codes=4,6"], seeds=2)
    assert [(member.config.concepts, member.config.seed) for member in found] == [(4, 42), (4, 43), (6, 42), (6, 43)]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_of(monkeypatch, capsys)


def test_the_command_sweeps_codes_and_seeds_of_a_rival(
    command: Command, small_cache: clvq.Cache, tmp_path: Path
) -> None:
    sites = ("--lower", 1, "--upper", 2, "--held-out", "dev")
    more = ("--method", "kmeans", "--sweep", "codes=4,6", "--seeds", 2, "--out", tmp_path, "--json")
    code, out, err = command("train", small_cache.path, *sites, *more)
    assert code == 0, err
    assert [row["settings"] for row in json.loads(out)["rows"]] == [{"codes": 4}, {"codes": 6}]
    assert Run.from_pretrained(tmp_path / "codes=4-seed=43").concepts == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "kmeans", "--preset", "paper"), "kmeans has no preset 'paper': leave --preset out"),
        (("--method", "mean-difference", "--codes", 5), "has one concept for each of the 2 classes: leave --codes out"),
        (("--method", "k-means"), "there is no method 'k-means': use one of clvq-vae, vq-vae, kmeans"),
        (("--method", "kmeans", "--codes", 5000), "training rows, fewer than the 5000 codes"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    words: tuple[object, ...], message: str, command: Command, small_cache: clvq.Cache, tmp_path: Path
) -> None:
    given = ("train", small_cache.path, "--lower", 1, "--upper", 2, "--out", tmp_path / "run")
    code, _, err = command(*given, *words)
    assert (code, err.count("\n")) == (1, 1)
    assert message in err
    assert not (tmp_path / "run").exists()


def test_mean_differences_of_texts_without_labels_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs texts with labels of two classes or more, and the cache has 0"):
        method_config("mean-difference", lower=LOWER, upper=UPPER, classes=0)


def test_sites_of_different_width_go_together(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", d=12, d_upper=8)
    for method in RIVALS:
        _fit(cache, _config(method), tmp_path / method)
        run = Run.from_pretrained(tmp_path / method)
        assert (run.concept_means.shape[1], run.upper_table.shape[1]) == (12, 8)
