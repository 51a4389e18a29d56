"""Several runs and methods in one ablation: latents, seeds, curves, what is run once, what is left out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import clvq
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from clvq.errors import ConfigError, Interrupted, ModelError
from clvq.evaluation import patched
from clvq.evaluation.ablate import AblateConfig, ablate
from clvq.evaluation.tables import seed_groups
from clvq.progress import SILENT
from clvq.trainer.config import with_overrides
from clvq.trainer.fit import fit
from clvq.trainer.methods import method_config
from clvq.trainer.run import Run

from . import tiny

SITE = "hidden.1"


@dataclass(frozen=True)
class Study:
    """A tiny classifier, a cache made with it, and runs of three methods."""

    model_folder: Path
    cache: clvq.Cache
    runs: dict[str, Path]
    model: Any

    def ablate(self, out: Path, *names: str, **settings: Any) -> Any:
        chosen = {name: self.runs[name] for name in names or self.runs}
        config = AblateConfig(**({"read_outs": ("model",), "removals": ("centred",)} | settings))
        return ablate(self.cache, chosen, out, lambda: self.model, config)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("study")
    names = ((0, "anger"), (1, "fear"), (2, "joy"))
    model_folder = tiny.make_model(folder / "model", "bert", classes=3, id2label=names)
    plan = tiny.plan_of(model_folder, tiny.write_texts(folder / "data", texts=120), rows="word", task="classify")
    tiny.run(plan, folder / "cache")
    cache = clvq.Cache(folder / "cache")
    runs = {}
    for name, method, seed, changes in (
        ("km-seed=0", "kmeans", 0, {}),
        ("km-seed=1", "kmeans", 1, {}),
        ("sae", "sae", 0, {"encoder.epochs": "2", "encoder.k": "4", "encoder.aux_k": "0"}),
    ):
        config = method_config(method, lower=SITE, upper="hidden.3", codes=16, held_out="dev", seed=seed)
        fit(cache, with_overrides(config, changes), folder / name, device=torch.device("cpu"))
        runs[name] = folder / name
    return Study(model_folder, cache, runs, tiny.load(plan.source, task="classify"))


def _table(out: Path, **chosen: Any) -> list[dict[str, Any]]:
    rows = pq.read_table(out / "texts.parquet").to_pylist()
    return [row for row in rows if all(row[key] == value for key, value in chosen.items())]


def _hooked(study: Study, text: int, change: Any) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of a plain transformers model before and after `change` of the states [position, d] at the site."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model: Any = AutoModelForSequenceClassification.from_pretrained(study.model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(study.model_folder)
    words = study.cache.texts["text"][text].as_py()
    tokens = tokenizer(words, return_tensors="pt", truncation=True, max_length=32)

    def hook(block: Any, args: Any) -> Any:
        hidden = args[0].clone()
        hidden[0] = torch.from_numpy(change(hidden[0].double().numpy())).float()
        return (hidden, *args[1:])

    with torch.no_grad():
        before = model(**tokens).logits[0].double().softmax(-1).numpy()
        handle = model.bert.encoder.layer[1].register_forward_pre_hook(hook)
        after = model(**tokens).logits[0].double().softmax(-1).numpy()
        handle.remove()
    return before, after


@pytest.mark.parametrize(("removal", "k"), [("subspace", None), ("subspace", 2), ("mean", None)])
def test_removals_of_whole_rows_and_of_spans_equal_a_plain_hooked_model(
    study: Study, tmp_path: Path, removal: str, k: int | None
):
    settings = {"removals": (removal,), "rows_changed": "all", "subspace_k": k, "strengths": (0.5, 1.0)}
    study.ablate(tmp_path, "sae", controls=(), **settings)
    run, cache = Run.from_pretrained(study.runs["sae"]), study.cache
    subject = "own code" if removal == "subspace" else "whole row"
    lines = _table(tmp_path, removed=subject)
    assert len(lines) == 2 * 30
    mean = run.lower_mean.astype(np.float64)
    for line in lines[::6]:
        text = int(cache.text_index[line["text_id"]])
        rows = cache.rows_of(np.arange(len(cache.texts)) == text)
        active = run.active(cache.vectors(SITE, rows))[:, :k]

        def change(hidden: np.ndarray, rows: Any = rows, active: Any = active, line: Any = line) -> np.ndarray:
            for row, latents in zip(rows, active, strict=True):
                last, spans = int(cache.column("position")[row]), int(cache.column("subwords")[row])
                if cache.column("special")[row] > 1:
                    continue
                for position in range(last - spans + 1, last + 1):
                    delta = hidden[position] - mean
                    if removal == "subspace":
                        basis = run.encoder_directions[latents[latents >= 0]].astype(np.float64).T
                        delta = basis @ np.linalg.lstsq(basis, delta, rcond=1e-8)[0]
                    hidden[position] -= line["strength"] * delta
            return hidden

        before, after = _hooked(study, text, change)
        predicted = before.argmax()
        assert line["probability_lost"] == pytest.approx(before[predicted] - after[predicted], abs=1e-4)
        assert line["prediction"] == predicted


def test_nothing_removed_is_the_unpatched_model(study: Study, tmp_path: Path):
    result = study.ablate(tmp_path, "sae", controls=())
    assert result.self_check < 1e-5
    for line in _table(tmp_path, removed="nothing"):
        assert line["probability_lost"] == pytest.approx(0, abs=1e-5)
        assert line["flipped"] == 0
        # The cache's predictions came from the model as it is.
        assert (
            line["prediction"] == study.cache.texts["prediction"][int(study.cache.text_index[line["text_id"]])].as_py()
        )


def test_a_model_that_answers_otherwise_the_second_time_is_refused(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = study.model.logits_from

    def moody(site: str, hidden: Any, ids: Any, mask: Any) -> Any:
        logits = real(site, hidden, ids, mask)
        return logits if hidden.requires_grad else logits.roll(1, dims=-1)

    monkeypatch.setattr(study.model, "logits_from", moody)
    with pytest.raises(ModelError, match="answers otherwise when it is run again from the site with nothing removed"):
        study.ablate(tmp_path, "sae", controls=())


def test_what_is_equal_for_several_runs_is_run_once(study: Study, tmp_path: Path):
    both = ("km-seed=0", "km-seed=1")
    shared = study.ablate(tmp_path / "a", *both, controls=("mean direction", "gaussian"))
    one = study.ablate(tmp_path / "b", both[0], controls=("mean direction", "gaussian"))
    own = study.ablate(tmp_path / "c", both[0], controls=())
    texts = one.texts
    changed = len([line for line in _table(tmp_path / "c", removed="own code") if not np.isnan(line["flipped"])])
    # nothing; own, mean direction and gaussian of each run.
    assert own.forwards.asked == 2 * texts
    assert one.forwards.asked == 4 * texts
    assert shared.forwards.asked == 7 * texts
    assert own.forwards.run == texts + changed
    assert one.forwards.run == texts + 3 * changed
    assert shared.forwards.run <= texts + 4 * changed
    for control in ("mean direction", "gaussian"):
        first, second = (_table(tmp_path / "a", run=run, removed=control) for run in both)
        assert str([line["probability_lost"] for line in first]) == str([line["probability_lost"] for line in second])


def test_removing_whole_rows_is_one_condition_for_all_runs(study: Study, tmp_path: Path):
    result = study.ablate(tmp_path, removals=("centred", "mean"), controls=())
    assert [line.run for line in result.lines if line.removal == "mean"] == [""]
    assert all(line.own_minus_this is None for line in result.lines)


def test_results_do_not_depend_on_the_batch(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = {"removals": ("centred", "subspace"), "rows_changed": "all"}
    study.ablate(tmp_path / "a", "sae", **settings)
    monkeypatch.setattr(patched, "BATCH_SLOTS", 40)
    monkeypatch.setattr(patched, "_KEPT_BYTES", 5000)
    study.ablate(tmp_path / "b", "sae", **settings)
    first, second = _table(tmp_path / "a"), _table(tmp_path / "b")
    assert len(first) == len(second) > 400
    for one, other in zip(first, second, strict=True):
        assert {name: one[name] for name in ("text_id", "removed", "concept")} == {
            name: other[name] for name in ("text_id", "removed", "concept")
        }
        for name in ("probability_lost", "norm_removed"):
            assert one[name] == pytest.approx(other[name], abs=1e-5, nan_ok=True)


def test_a_run_without_latents_is_left_out_of_subspaces_and_named(study: Study, tmp_path: Path):
    result = study.ablate(tmp_path, removals=("centred", "subspace"), controls=())
    assert {(line.run, line.removal) for line in result.lines if line.removal} == {
        ("km-seed=0", "centred"), ("km-seed=1", "centred"), ("sae", "centred"), ("sae", "subspace"),
    }  # fmt: skip
    assert [(left.run, left.removal) for left in result.left_out] == [
        ("km-seed=0", "subspace"), ("km-seed=1", "subspace"),
    ]  # fmt: skip
    assert result.left_out[0].why == "kmeans has no latents to span a subspace"
    with pytest.raises(ConfigError, match=r"none of the runs \(km-seed=0\) has latents"):
        study.ablate(tmp_path / "b", "km-seed=0", removals=("subspace",))


def test_runs_that_differ_in_their_seed_alone_are_a_group(study: Study, tmp_path: Path):
    loaded = {name: Run.from_pretrained(path) for name, path in study.runs.items()}
    assert seed_groups(loaded) == {"km": ["km-seed=0", "km-seed=1"], "sae": ["sae"]}
    # A copy of a run is no other seed.
    assert set(seed_groups(loaded | {"copy": loaded["sae"]})) == {"km", "sae", "copy"}
    result = study.ablate(tmp_path, controls=("matched code", "same label"))
    assert {(line.group, line.seeds) for line in result.groups} == {("km", 2)}
    lines = {(line.run, line.removed): line for line in result.lines}
    for group in result.groups:
        mine = [lines[run, group.removed] for run in ("km-seed=0", "km-seed=1")]
        values = [line.probability_lost.value for line in mine]
        assert group.probability_lost.value == pytest.approx(np.mean(values))
        width = group.probability_lost.high - group.probability_lost.low
        assert width > 0
        if group.own_minus_this is not None:
            assert group.own_minus_this.value == pytest.approx(
                np.mean([line.own_minus_this.value for line in mine]), abs=1e-9
            )
    contrasts = {line.what: line for line in result.contrasts}
    assert set(contrasts) == {"own code", "own code − matched code"}
    assert {(line.first, line.second) for line in result.contrasts} == {("km", "sae")}
    own = {line.group: line.probability_lost.value for line in result.groups if line.removed == "own code"}
    gap = own["km"] - lines["sae", "own code"].probability_lost.value
    assert contrasts["own code"].difference.value == pytest.approx(gap)
    assert 0 < contrasts["own code"].p <= 1
    # Effects rise late: one point says nothing about smaller norms.
    for curve in result.curves:
        assert (curve.at_common_norm, curve.mean_to_common_norm, curve.own_minus_this) == (None, None, None)


def test_several_strengths_make_curves(study: Study, tmp_path: Path):
    strengths = (1.0, 0.25, 0.5)
    result = study.ablate(tmp_path, "km-seed=0", "sae", strengths=strengths, controls=("matched code", "gaussian"))
    curves = {(curve.group, curve.removed): curve for curve in result.curves}
    assert set(curves) == {
        (run, what) for run in ("km-seed=0", "sae") for what in ("own code", "matched code", "gaussian")
    }
    own = [curves[run, "own code"] for run in ("km-seed=0", "sae")]
    limit = min(curve.norm_removed[-1].value for curve in own)
    for (run, what), curve in curves.items():
        assert curve.strengths == [0.25, 0.5, 1.0]
        assert curve.common_norm == pytest.approx(limit)
        norms = [point.value for point in curve.norm_removed]
        np.testing.assert_allclose(norms, norms[-1] * np.array([0.25, 0.5, 1.0]), rtol=1e-4)
        lost = [point.value for point in curve.probability_lost]
        line = next(line for line in result.lines if (line.run, line.removed, line.strength) == (run, what, 0.5))
        assert line.probability_lost.value == pytest.approx(lost[1])
        assert line.p is None
        if what == "own code":
            assert curve.own_minus_this is None
        else:
            mine = curves[run, "own code"]
            own_norms, own_lost = (
                [point.value for point in points] for points in (mine.norm_removed, mine.probability_lost)
            )
            # Neither control removes more than the own code.
            height = np.interp(norms[-1], [0, *own_norms], [0, *own_lost])
            assert curve.own_minus_this.value == pytest.approx(height - lost[-1], abs=1e-6)
            assert curve.own_minus_this.low <= curve.own_minus_this.value <= curve.own_minus_this.high
        if norms[-1] < 0.99 * limit:
            # What removes less than all own codes do says nothing about that norm.
            assert curve.mean_to_common_norm is None
            continue
        grid = np.linspace(0, limit, 2001)
        expected = np.interp(grid, [0, *norms], [0, *lost])
        assert curve.mean_to_common_norm.value == pytest.approx(np.trapezoid(expected, grid) / limit, abs=1e-4)
        assert curve.at_common_norm.value == pytest.approx(expected[-1], abs=1e-6)
    assert curves["sae", "gaussian"].mean_to_common_norm is None
    (difference,) = [line for line in result.contrasts if line.what == "own code up to equal norm"]
    areas = [curve.mean_to_common_norm.value for curve in own]
    assert difference.difference.value == pytest.approx(areas[0] - areas[1])
    again = study.ablate(tmp_path, "km-seed=0", "sae", strengths=strengths, controls=("matched code", "gaussian"))
    assert str(again) == str(result)


def test_controls_can_do_without_the_weaker_strengths(study: Study, tmp_path: Path):
    settings = {"strengths": (0.5, 1.0), "controls": ("matched code", "gaussian"), "removals": ("centred", "mean")}
    whole = study.ablate(tmp_path / "all", "km-seed=0", "km-seed=1", "sae", **settings)
    own = study.ablate(tmp_path / "own", "km-seed=0", "km-seed=1", "sae", curves="own", **settings)
    controls = {"matched code", "gaussian"}
    for table in ("lines", "groups", "curves", "contrasts"):
        assert getattr(own, table)
    for table in ("lines", "groups"):
        kept = [line for line in getattr(whole, table) if line.removed not in controls or line.strength == 1]
        assert _without_p(getattr(own, table)) == _without_p(kept)
        assert len(kept) < len(getattr(whole, table))
    assert str(own.contrasts) == str(whole.contrasts)
    for mine, other in zip(own.curves, whole.curves, strict=True):
        if mine.removed in controls:
            assert (mine.strengths, mine.mean_to_common_norm) == ([1.0], None)
            assert mine.norm_removed[0].value == pytest.approx(other.norm_removed[-1].value)
            assert mine.own_minus_this is not None
        else:
            assert mine == other


def _without_p(lines: Sequence[Any]) -> str:
    return str([replace(line, p=None) if hasattr(line, "p") else line for line in lines])


def test_accuracy_is_put_between_the_clean_one_and_chance(study: Study, tmp_path: Path):
    result = study.ablate(tmp_path, "km-seed=0", rows_changed="all", controls=("gaussian",))
    clean = result.lines[0]
    part = _table(tmp_path, removed="nothing")
    labels = [line["label"] for line in part if line["label"] is not None]
    chance = max(np.bincount(labels)) / len(labels)
    for line in result.lines[1:]:
        room = clean.accuracy.value - chance
        if room > 0:
            assert line.drop_to_chance.value == pytest.approx(line.drop.value / room)
        else:
            assert np.isnan(line.drop_to_chance.value)


def test_tests_are_corrected_over_all_runs_and_controls(study: Study, tmp_path: Path):
    result = study.ablate(tmp_path, "km-seed=0", "sae")
    tested = [line for line in result.lines if line.p is not None]
    assert len(tested) == 14
    # 10,000 flips of 14 contrasts: no adjusted p can be lower.
    assert min(line.p for line in tested) >= 14 / 10_001 - 1e-12
    plain = json.loads((tmp_path / "ablation.json").read_bytes())
    assert plain["sign_flips"] == 10_000
    assert plain["provenance"]["runs"]["sae"]["method"] == "sae"
    assert plain["provenance"]["cache_id"] == study.cache.id
    assert set(plain["provenance"]["runs"]["sae"]) == {"method", "seed", "sha256"}


@pytest.mark.parametrize("removal", ["centred", "subspace"])
def test_one_concept_removed_everywhere_equals_a_plain_hooked_model(study: Study, tmp_path: Path, removal: str):
    result = study.ablate(tmp_path, "sae", removals=(removal,), controls=(), concepts=True, min_texts=2)
    run, cache = Run.from_pretrained(study.runs["sae"]), study.cache
    effect = next(effect for effect in result.concepts if 2 <= effect.texts <= 12)
    dev = cache.splits(["dev"])
    lost, changes = [], []
    for text in np.flatnonzero(dev).tolist():
        rows = cache.rows_of(np.arange(len(cache.texts)) == text)
        rows = rows[cache.column("special")[rows] <= 1]
        mine = rows[run.assign(cache.vectors(SITE, rows)) == effect.concept]
        if len(mine) == 0:
            continue

        def change(hidden: np.ndarray, mine: Any = mine) -> np.ndarray:
            unit = run.direction(effect.concept, SITE)[0].astype(np.float64)
            if removal == "subspace":
                unit = run.encoder_directions[effect.concept].astype(np.float64)
                unit /= np.linalg.norm(unit)
            for row in mine:
                last, spans = int(cache.column("position")[row]), int(cache.column("subwords")[row])
                for position in range(last - spans + 1, last + 1):
                    hidden[position] -= ((hidden[position] - run.lower_mean) @ unit) * unit
            return hidden

        before, after = _hooked(study, text, change)
        lost.append(before.max() - after[before.argmax()])
        changes.append(after - before)
    assert effect.texts == len(lost)
    assert effect.probability_lost == pytest.approx(np.mean(lost), abs=1e-4)
    np.testing.assert_allclose(effect.class_changes, np.mean(changes, axis=0), atol=1e-4)
    assert effect.lost is not None
    assert effect.own_minus_control.value == pytest.approx(effect.lost.value - effect.control_lost.value, abs=1e-9)


def test_an_interrupted_ablation_leaves_no_result(study: Study, tmp_path: Path):
    class Stopped(type(SILENT)):  # type: ignore[misc]
        def advance(self, amount: int = 1, **figures: float) -> None:
            raise Interrupted("stopped", signal_number=2)

    for concepts in (False, True):
        config = AblateConfig(read_outs=("model",), removals=("centred",), concepts=concepts)
        with pytest.raises(Interrupted):
            ablate(study.cache, {"sae": study.runs["sae"]}, tmp_path, lambda: study.model, config, progress=Stopped())
        assert not (tmp_path / "ablation.json").exists()
    assert study.ablate(tmp_path, "sae", controls=()).lines


def test_both_read_outs_know_all_removals(study: Study, tmp_path: Path):
    everything = ("projection", "centred", "subspace", "offset", "mean")
    result = study.ablate(tmp_path, "sae", read_outs=("model", "probe"), removals=everything)
    for read_out in ("model", "probe"):
        lines = [line for line in result.lines if line.read_out == read_out]
        assert len(lines) == 1 + 4 * 8 + 1
        own = {line.removal: line for line in lines if line.removed == "own code"}
        for line in lines:
            if line.removed in ("matched code", "matched random"):
                assert line.norm_removed.value == pytest.approx(own[line.removal].norm_removed.value, rel=1e-3)


def test_concepts_by_themselves_need_the_model(study: Study, tmp_path: Path):
    with pytest.raises(ConfigError, match="add model to --read-out"):
        study.ablate(tmp_path, "sae", read_outs=("probe",), concepts=True)
