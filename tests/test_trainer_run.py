"""A finished run: its figures against numpy, its directions, and where it can be carried."""

import json
from pathlib import Path
from types import SimpleNamespace

import clvq
import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
import torch
from clvq.errors import ConfigError, FormatVersion, RunMismatch, RunNotFound
from clvq.trainer.config import preset_config, with_overrides
from clvq.trainer.fit import fit
from clvq.trainer.measure import Unexplained, perplexity
from clvq.trainer.run import Run

from .caches import LOWER, UPPER, make_cache

CODES = 14


@pytest.fixture(scope="module", params=["default", "paper"])
def trained(request: pytest.FixtureRequest, small_cache: clvq.Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = with_overrides(
        preset_config(request.param, lower=LOWER, upper=UPPER, codes=CODES, held_out="dev"),
        {"decoder.layers": "1", "decoder.hidden": "8", "fit.epochs": "2", "fit.texts_per_batch": "8"}
        | ({"encoder.epochs": "3", "encoder.rows_per_batch": "64"} if request.param == "default" else {}),
    )
    out = tmp_path_factory.mktemp("run") / request.param
    fit(small_cache, config, out, device=torch.device("cpu"))
    return out


def _rows(cache: clvq.Cache, split: str) -> tuple[np.ndarray, np.ndarray]:
    rows = cache.rows_of(cache.splits([split]), special="leading")
    return cache.vectors(LOWER, rows), cache.vectors(UPPER, rows).astype(np.float64)


def _fvu(upper: np.ndarray, predicted: np.ndarray) -> float:
    return float(((upper - predicted) ** 2).sum() / ((upper - upper.mean(axis=0)) ** 2).sum())


def test_the_tables_are_means_over_the_training_rows_of_each_concept(trained: Path, small_cache: clvq.Cache) -> None:
    run = Run.from_pretrained(trained)
    lower, upper = _rows(small_cache, "train")
    concept = run.assign(lower)
    np.testing.assert_array_equal(run.counts, np.bincount(concept, minlength=CODES))
    np.testing.assert_allclose(run.lower_mean, lower.astype(np.float64).mean(axis=0), rtol=1e-5)
    for code in np.unique(concept):
        own = concept == code
        np.testing.assert_allclose(run.concept_means[code], lower[own].astype(np.float64).mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(run.upper_table[code], upper[own].mean(axis=0), rtol=1e-4, atol=1e-5)


def test_the_report_holds_what_numpy_finds(trained: Path, small_cache: clvq.Cache) -> None:
    run, report = Run.from_pretrained(trained), json.loads((trained / "report.json").read_bytes())
    lower, upper = _rows(small_cache, "dev")
    concept = run.assign(lower)
    counts = np.bincount(concept, minlength=CODES)
    shares = counts[counts > 0] / counts.sum()
    assert report["own_code_fvu"] == pytest.approx(_fvu(upper, run.upper_table[concept]), rel=1e-5)
    assert report["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert report["used_codes"] == (counts > 0).sum()
    assert report["dead_codes"] == (run.counts == 0).sum()
    assert report["largest_code_share"] == pytest.approx(run.counts.max() / run.counts.sum())
    codes = safetensors.numpy.load_file(trained / "model.safetensors")["network.quantizer.codebook"].astype(float)
    norms = np.linalg.norm(codes, axis=1)
    cosines = (codes @ codes.T) / np.outer(norms, norms)
    assert report["mean_pairwise_cosine"] == pytest.approx(cosines[~np.eye(CODES, dtype=bool)].mean(), rel=1e-4)
    assert np.sort(norms)[(CODES - 1) // 2] == pytest.approx(report["median_code_norm"])
    assert report["held_out_rows"] == len(lower)
    assert report["train_rows"] == run.counts.sum()
    assert report["held_out_texts"] == small_cache.splits(["dev"]).sum()
    assert report["train_texts"] == small_cache.splits(["train"]).sum()
    assert ("decoder_fvu_published" in report) == (run.config.preset == "paper")
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    trains = [line["phase"] == "train" for line in lines]
    assert (report["epochs"], report["stopped_early"]) == (sum(trains), False) == (2, False)
    assert trains[report["best_epoch"]]
    # Of codes that move, the figure of an epoch comes from its own sums and is near the exact one.
    near = 0.25 if run.config.preset == "paper" else 1e-6
    assert lines[-1]["held_out_own_code_fvu"] == pytest.approx(report["own_code_fvu"], rel=near)


def test_the_decoder_s_figures_are_those_of_each_text_decoded_by_itself(trained: Path, small_cache: clvq.Cache) -> None:
    run, report = Run.from_pretrained(trained), json.loads((trained / "report.json").read_bytes())
    predicted, upper, held_out = [], [], small_cache.splits(["dev"])
    for text in np.flatnonzero(held_out):
        rows = small_cache.rows_of(np.arange(len(held_out)) == text, special="leading")
        index = torch.from_numpy(run.assign(small_cache.vectors(LOWER, rows)))
        position = torch.from_numpy(small_cache.column("position")[rows].astype(np.int64))[None]
        with torch.no_grad():
            predicted.append(run._model.from_codes(index, torch.ones(1, len(rows), dtype=torch.bool), position))
        upper.append(small_cache.vectors(UPPER, rows).astype(np.float64))
    fvu = _fvu(np.concatenate(upper), torch.cat(predicted).double().numpy())
    assert report["decoder_fvu_codes_only"] == pytest.approx(fvu, rel=1e-4)
    assert report["decoder_fvu_codes_shuffled"] > fvu


def test_a_concept_s_direction_is_its_unit_mean_deviation(trained: Path, small_cache: clvq.Cache) -> None:
    run = Run.from_pretrained(trained)
    lower, _ = _rows(small_cache, "train")
    concept = run.assign(lower)
    for code in np.unique(concept):
        basis = run.direction(int(code), LOWER)
        assert basis.shape == (1, 16)
        np.testing.assert_allclose(basis @ basis.T, np.eye(1), atol=1e-6)
        wide = lower.astype(np.float64)
        expected = wide[concept == code].mean(axis=0) - wide.mean(axis=0)
        np.testing.assert_allclose(basis[0], expected / np.linalg.norm(expected), atol=1e-4)


def test_a_concept_without_rows_has_an_empty_direction(trained: Path) -> None:
    run = Run.from_pretrained(trained)
    run.counts[3] = 0
    assert run.direction(3, LOWER).shape == (0, 16)


def test_a_direction_at_the_upper_site_is_refused(trained: Path) -> None:
    with pytest.raises(ConfigError, match=r"live at hidden.1, not at hidden.2: ask for hidden.1"):
        Run.from_pretrained(trained).direction(0, UPPER)


@pytest.mark.parametrize("concept", [-1, CODES])
def test_a_concept_that_is_not_there_is_refused(trained: Path, concept: int) -> None:
    run = Run.from_pretrained(trained)
    with pytest.raises(ConfigError, match=f"there is no concept {concept}: they are numbered 0 to 13"):
        run.direction(concept, LOWER)
    with pytest.raises(ConfigError, match="there is no concept"):
        run.published_direction(concept)


def test_the_published_direction_is_the_code_itself_in_the_paper_and_the_uncentred_mean_otherwise(
    trained: Path,
) -> None:
    run = Run.from_pretrained(trained)
    codes = safetensors.numpy.load_file(trained / "model.safetensors")["network.quantizer.codebook"]
    source = codes if run.config.preset == "paper" else run.concept_means
    for concept in range(CODES):
        expected = source[concept] / np.linalg.norm(source[concept].astype(np.float64))
        np.testing.assert_allclose(run.published_direction(concept), expected, rtol=1e-5, atol=1e-6)


def test_rows_are_assigned_alike_in_any_portion(
    trained: Path, small_cache: clvq.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.from_pretrained(trained)
    lower, _ = _rows(small_cache, "train")
    whole = run.assign(lower)
    monkeypatch.setattr("clvq.trainer.run._ROWS_AT_A_TIME", 7)
    np.testing.assert_array_equal(run.assign(lower), whole)
    assert run.assign(lower[:0]).shape == (0,)


def test_a_run_knows_its_cache(trained: Path, small_cache: clvq.Cache, tmp_path: Path) -> None:
    run = Run.from_pretrained(trained)
    run.check_cache(small_cache)
    other = make_cache(tmp_path / "other", seed=9)
    with pytest.raises(RunMismatch, match="use the cache that it was trained on, or train again"):
        run.check_cache(other)


def test_a_run_fits_copies_of_its_cache_without_texts_but_no_other_values(
    trained: Path, small_cache: clvq.Cache, tmp_path: Path
) -> None:
    from clvq.cache.recode import recode
    from clvq.cache.sharing.push import push

    run = Run.from_pretrained(trained)
    push(small_cache.path, str(tmp_path / "shared"), without_texts=True)
    shared = clvq.Cache(tmp_path / "shared")
    assert shared.id != small_cache.id
    run.check_cache(shared)
    recode(small_cache, tmp_path / "recoded", "bf16")
    with pytest.raises(RunMismatch):
        run.check_cache(clvq.Cache(tmp_path / "recoded"))


def test_the_held_out_texts_are_named(trained: Path, small_cache: clvq.Cache) -> None:
    expected = np.asarray(small_cache.texts["text_id"])[small_cache.splits(["dev"])]
    np.testing.assert_array_equal(Run.from_pretrained(trained).held_out_texts, expected)


def test_a_saved_run_is_the_same_run(trained: Path, tmp_path: Path) -> None:
    Run.from_pretrained(trained).save_pretrained(tmp_path / "copy")
    for name in ("config.json", "report.json", "model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (trained / name).read_bytes()
    assert Run.from_pretrained(tmp_path / "copy").config == Run.from_pretrained(trained).config


def test_loading_a_run_leaves_torch_s_own_generator_alone(trained: Path) -> None:
    before = torch.random.get_rng_state()
    Run.from_pretrained(trained)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_run_is_not_saved_over_other_files(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty: give another folder"):
        Run.from_pretrained(trained).save_pretrained(tmp_path)


def test_a_run_is_uploaded_whole(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def api(token: str | None) -> SimpleNamespace:
        return SimpleNamespace(
            create_repo=lambda repo_id, exist_ok: calls.append((repo_id, exist_ok, token)),
            upload_folder=lambda repo_id, folder_path: calls.append(
                sorted(p.name for p in Path(folder_path).iterdir())
            ),
        )

    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    Run.from_pretrained(trained).push_to_hub("me/concepts", token="abc")
    assert calls == [("me/concepts", True, "abc"), ["config.json", "model.safetensors", "report.json"]]


def test_what_is_not_a_finished_run_is_refused_by_what_it_is(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(RunNotFound, match="it does not exist; make one with `clvq train"):
        Run.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(RunNotFound, match=r"has no config\.json"):
        Run.from_pretrained(tmp_path)
    for text, message in (("{", "is not JSON"), ('{"model_type": "bert"}', 'has no "format": "clvq-run"')):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(RunNotFound, match=message):
            Run.from_pretrained(tmp_path)
    plain = json.loads((trained / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(plain))
    with pytest.raises(RunNotFound, match="is an unfinished run; run the `clvq train` command that began it again"):
        Run.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(plain | {"version": 9}))
    with pytest.raises(FormatVersion, match="format version 9; this clvq reads version 1"):
        Run.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(plain | {"d_lower": "wide"}))
    with pytest.raises(RunNotFound, match="is damaged at 'd_lower'"):
        Run.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "widths"])
def test_a_damaged_model_is_refused(trained: Path, tmp_path: Path, damage: str) -> None:
    Run.from_pretrained(trained).save_pretrained(tmp_path / "copy")
    if damage == "cut":
        data = (tmp_path / "copy" / "model.safetensors").read_bytes()
        (tmp_path / "copy" / "model.safetensors").write_bytes(data[:-10])
    else:
        plain = json.loads((trained / "config.json").read_bytes())
        (tmp_path / "copy" / "config.json").write_text(json.dumps(plain | {"d_lower": 32_000_000}))
    with pytest.raises(RunNotFound, match="is damaged: its files do not fit together"):
        Run.from_pretrained(tmp_path / "copy")


def test_fvu_is_exact_under_a_large_common_mean() -> None:
    generator = np.random.default_rng(0)
    upper = (generator.normal(size=(200, 4)) + 30_000).astype(np.float32)
    predicted = upper + 0.5 * generator.normal(size=upper.shape).astype(np.float32)
    fvu = Unexplained(torch.full((4,), 29_990.0))
    for part in range(0, 200, 30):
        fvu.add(torch.from_numpy(upper[part : part + 30]), some=torch.from_numpy(predicted[part : part + 30]))
    expected = _fvu(upper.astype(np.float64), predicted.astype(np.float64))
    assert fvu.values()["some"] == pytest.approx(expected, rel=1e-9)


def test_rows_that_do_not_vary_have_no_fvu() -> None:
    fvu = Unexplained(torch.zeros(3))
    fvu.add(torch.ones(5, 3), some=torch.zeros(5, 3))
    assert fvu.values() == {"some": None}


def test_perplexity_is_the_number_of_equally_used_codes() -> None:
    assert perplexity(np.array([7, 0, 7, 7])) == pytest.approx(3)
    assert perplexity(np.array([0, 0])) == 0
