"""Ablation against an independent way of doing the same: the plain transformers model with a hook."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import clvq
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from clvq.errors import ConfigError, ModelError, ResumeMismatch, RunMismatch
from clvq.evaluation import ablation_folder, patched, probed
from clvq.evaluation.ablate import AblateConfig, ablate
from clvq.evaluation.concepts import describe, shorten
from clvq.evaluation.controls import CONTROLS
from clvq.evaluation.rows import changed_rows, rows_by_text
from clvq.evaluation.saliency import run_clean, salient_row
from clvq.trainer.config import preset_config, with_overrides
from clvq.trainer.fit import fit
from clvq.trainer.run import Run

from . import tiny

LAYER = 1
SITE = f"hidden.{LAYER}"


@dataclass(frozen=True)
class Study:
    """A tiny classifier, a cache made with it, and a run trained on the cache."""

    family: str
    model_folder: Path
    cache: clvq.Cache
    run_folder: Path
    run: Run
    model: Any


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return _make_study(tmp_path_factory.mktemp("study"), "bert")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Its tokenizer begins texts with a BOS and ends them with nothing."""
    return _make_study(tmp_path_factory.mktemp("decoder"), "llama", rows="token")


def _make_study(folder: Path, family: str, *, rows: str = "word") -> Study:
    names = ((0, "anger"), (1, "fear"), (2, "joy"))
    model_folder = tiny.make_model(folder / "model", family, classes=3, id2label=names)
    data = tiny.write_texts(folder / "data", texts=120)
    plan = tiny.plan_of(model_folder, data, rows=rows, task="classify")
    tiny.run(plan, folder / "cache")
    cache = clvq.Cache(folder / "cache")
    config = preset_config("default", lower="hidden.1", upper="hidden.3", codes=12, held_out="dev")
    config = with_overrides(config, {"fit.epochs": "2", "encoder.epochs": "1", "decoder.heads": "4"})
    fit(cache, config, folder / "run", device=torch.device("cpu"))
    run = Run.from_pretrained(folder / "run")
    return Study(family, model_folder, cache, folder / "run", run, tiny.load(plan.source, task="classify"))


def _ablate(study: Study, out: Path, **settings: Any) -> Any:
    return ablate(study.cache, {"run": study.run_folder}, out, lambda: study.model, AblateConfig(**settings))


def _table(out: Path, **chosen: str) -> list[dict[str, Any]]:
    rows = pq.read_table(out / "texts.parquet").to_pylist()
    return [row for row in rows if all(row[key] == value for key, value in chosen.items())]


@pytest.mark.parametrize("rows_changed", ["salient", "cls", "all"])
@pytest.mark.parametrize("removal", ["projection", "centred", "offset"])
@pytest.mark.parametrize("kind", ["study", "decoder"])
def test_the_model_read_out_equals_a_plain_hooked_model(
    kind: str, tmp_path: Path, rows_changed: str, removal: str, request: pytest.FixtureRequest
):
    study: Study = request.getfixturevalue(kind)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    _ablate(study, tmp_path, read_outs=("model",), removals=(removal,), rows_changed=rows_changed)
    model = AutoModelForSequenceClassification.from_pretrained(study.model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(study.model_folder)
    cache, run = study.cache, study.run
    compared = 0
    for line in _table(tmp_path, removed="own code"):
        if np.isnan(line["flipped"]):
            continue
        text = int(cache.text_index[line["text_id"]])
        chosen = np.zeros(len(cache.texts), dtype=bool)
        chosen[text] = True
        rows = cache.rows_of(chosen)
        special = cache.column("special")[rows]
        codes = run.assign(cache.vectors("hidden.1", rows))
        if rows_changed == "salient":
            targets = [row for row in range(len(rows)) if special[row] == 0 and codes[row] == line["concept"]]
        elif rows_changed == "cls":
            targets = np.flatnonzero(special == 1).tolist()
        else:
            targets = np.flatnonzero(special <= 1).tolist()
        tokens = tokenizer(cache.texts["text"][text].as_py(), return_tensors="pt", truncation=True, max_length=32)

        def answer(hidden_change: Any, tokens: Any = tokens) -> np.ndarray:
            layers = model.bert.encoder.layer if study.family == "bert" else model.model.layers
            hook = layers[LAYER].register_forward_pre_hook(hidden_change)
            with torch.no_grad():
                logits = model(**tokens).logits[0].double()
            hook.remove()
            return logits.softmax(-1).numpy()

        def without(rows_taken: list[int], rows: Any = rows, codes: Any = codes) -> Any:
            def change(block: Any, args: Any) -> Any:
                hidden = args[0].clone().double().numpy()
                for row in rows_taken:
                    last = int(cache.column("position")[rows[row]])
                    first = last - int(cache.column("subwords")[rows[row]]) + 1
                    if removal == "centred":
                        unit, centre = run.direction(int(codes[row]), "hidden.1")[0], run.lower_mean
                    else:
                        unit, centre = run.published_direction(int(codes[row])), np.zeros(tiny.WIDTH)
                    for position in range(first, last + 1):
                        if removal == "offset":
                            hidden[0, position] -= run.concept_means[codes[row]].astype(np.float64) - run.lower_mean
                            continue
                        offset = hidden[0, position] - centre
                        hidden[0, position] -= (offset @ unit) * unit
                return (torch.from_numpy(hidden).float(), *args[1:])

            return change

        before = answer(lambda block, args: None)
        predicted = before.argmax()
        # Several rows may share the salient row's code: then one of them must explain the figure.
        options = [[target] for target in targets] if rows_changed == "salient" else [targets]
        lost = [before[predicted] - answer(without(option))[predicted] for option in options]
        assert np.abs(np.array(lost) - line["probability_lost"]).min() < 1e-4
        compared += 1
    assert compared > 20


def test_saliency_is_the_change_of_the_logit_when_a_position_grows(study: Study):
    ids = [study.model.source.tokenize(["the cat don't sat", "well known"], max_length=32)[0].ids.tolist()]
    clean = run_clean(study.model, SITE, ids)
    predicted = int(clean.probabilities[0].argmax())
    step = 1e-2
    for position in range(len(ids[0])):
        ends = []
        for sign in (1, -1):
            hidden = clean.hidden.clone()
            hidden[0, position] *= 1 + sign * step
            with torch.no_grad():
                ends.append(float(study.model.logits_from(SITE, hidden, clean.ids, clean.mask)[0, predicted]))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert clean.attribution[0, position] == pytest.approx(slope, abs=2e-3)


def test_the_salient_row_is_never_special_and_sums_over_its_sub_words(study: Study):
    texts = rows_by_text(study.cache, np.ones(len(study.cache.texts), dtype=bool))
    several = next(rows for rows in texts if (rows.subwords > 1).any() and (rows.special == 0).sum() > 1)
    number = int(np.flatnonzero(several.subwords > 1)[0])
    attribution = np.full(64, 0.0)
    attribution[several.positions(number)] = -1.0
    attribution[0] = 100.0
    other = int(np.flatnonzero((several.special == 0) & (np.arange(len(several.row)) != number))[0])
    attribution[several.position[other]] = several.subwords[number] - 0.5
    assert salient_row(several, attribution) == number
    only_special = next(rows for rows in texts if (rows.special > 0).all())
    assert salient_row(only_special, attribution) is None
    assert len(changed_rows(only_special, None, "salient", "leading")) == 0


def test_removing_a_zero_direction_leaves_the_models_logits_as_they_are(study: Study):
    ids = [tokens.ids.tolist() for tokens in study.model.source.tokenize(["the cat", "a dog sat"], max_length=32)]
    clean = run_clean(study.model, SITE, ids)
    with torch.no_grad():
        _, whole = study.model.read(clean.ids, clean.mask, [SITE], logits=True)
    torch.testing.assert_close(whole.softmax(-1), clean.probabilities, atol=1e-6, rtol=0)


def test_controls_and_intervals_are_in_the_table(study: Study, tmp_path: Path):
    result = _ablate(study, tmp_path)
    kinds = {(line.read_out, line.removal, line.removed) for line in result.lines}
    subjects = ("own code", *CONTROLS)
    for read_out in ("model", "probe"):
        assert (read_out, None, "nothing") in kinds
        for removal in ("projection", "centred"):
            assert {(read_out, removal, subject) for subject in subjects} <= kinds
    lines = {(line.read_out, line.removal, line.removed): line for line in result.lines}
    for line in result.lines:
        assert line.flipped.low <= line.flipped.value <= line.flipped.high
        own = lines[line.read_out, line.removal, "own code"] if line.removal else None
        partnered = line.removed in ("same label", "other label")
        if own is not None and line.removed != "own code" and not partnered:
            gap = own.probability_lost.value - line.probability_lost.value
            assert line.own_minus_this.value == pytest.approx(gap, abs=1e-9)
        if own is not None and line.removed in ("matched random", "matched code"):
            assert line.norm_removed.value == pytest.approx(own.norm_removed.value, rel=1e-3)
        # Only where all lines are over the same texts do the accuracies differ by the drop.
        clean = lines[line.read_out, None, "nothing"]
        assert line.texts == clean.texts or (partnered and line.texts < clean.texts)
        assert partnered or line.drop.value == pytest.approx(clean.accuracy.value - line.accuracy.value, abs=1e-9)
    plain = json.loads((tmp_path / "ablation.json").read_bytes())
    assert plain["settings"]["cache_id"] == study.cache.id
    assert result.trained_texts == 0


def test_accuracy_before_removal_is_the_models_own(study: Study, tmp_path: Path):
    result = _ablate(study, tmp_path, read_outs=("model",), removals=("centred",))
    dev = study.cache.splits(["dev"])
    # Texts of special tokens alone have no row to change, and all lines are over the same texts.
    ordinary = study.cache.rows_of(dev, special="none")
    dev &= np.isin(np.arange(len(dev)), study.cache.text_index[study.cache.column("text")[ordinary]])
    labels = np.array([np.nan if label is None else label for label in study.cache.texts["label"].to_pylist()])[dev]
    predictions = np.array(study.cache.texts["prediction"].to_pylist(), dtype=float)[dev]
    expected = (labels == predictions)[~np.isnan(labels)].mean()
    assert result.lines[0].accuracy.value == pytest.approx(expected)


def test_the_same_ablation_again_is_read_back_and_another_is_refused(study: Study, tmp_path: Path):
    settings = {"read_outs": ("model",), "removals": ("centred",)}
    first = _ablate(study, tmp_path, **settings)

    def never() -> Any:
        raise AssertionError("the model was loaded again")

    config = AblateConfig(**settings)
    again = ablate(study.cache, {"run": study.run_folder}, tmp_path, never, config)
    assert [(line.removed, line.flipped.value) for line in again.lines] == [
        (line.removed, line.flipped.value) for line in first.lines
    ]
    with pytest.raises(ResumeMismatch, match=r"other settings \(config.seed: 0 there, 7 now\)"):
        _ablate(study, tmp_path, **settings, seed=7)
    forced = ablate(
        study.cache,
        {"run": study.run_folder},
        tmp_path,
        lambda: study.model,
        AblateConfig(**settings, seed=7),
        force=True,
    )
    assert len(forced.lines) == len(first.lines)


def test_what_cannot_be_ablated_is_refused_with_what_to_do(study: Study, small_cache: clvq.Cache, tmp_path: Path):
    with pytest.raises(RunMismatch, match="the run was trained on the cache"):
        ablate(small_cache, {"run": study.run_folder}, tmp_path / "a", lambda: study.model, AblateConfig())
    with pytest.raises(ConfigError, match="the probe changes one vector per text"):
        _ablate(study, tmp_path / "b", read_outs=("probe",), rows_changed="all")
    with pytest.raises(ConfigError, match="holds no split 'test'; it holds dev, train"):
        _ablate(study, tmp_path / "c", split=("test",))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no ablation"):
        _ablate(study, tmp_path / "d")
    with pytest.raises(ConfigError, match=r"no block lies above hidden\.3"):
        study.model.logits_from(
            "hidden.3", torch.zeros(1, 2, 32), torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2) > 0
        )


def test_training_texts_are_counted_when_they_are_evaluated(study: Study, tmp_path: Path):
    result = _ablate(study, tmp_path, read_outs=("model",), removals=("centred",), split=("train",), max_texts=10)
    assert result.texts == 10
    assert result.trained_texts == 10


def test_a_concept_is_described_by_its_own_training_rows(study: Study):
    cache, run = study.cache, study.run
    train = cache.splits(["train"])
    concept = int(run.counts.argmax())
    (found,) = describe(cache, run, [concept], train, words=5, examples=2)
    assert found.rows == run.counts[concept]
    rows = cache.rows_of(train, special="leading")
    mine = rows[run.assign(cache.vectors("hidden.1", rows)) == concept]
    said = []
    for row in mine:
        text = cache.texts["text"][int(cache.text_index[cache.column("text")[row]])].as_py()
        special = cache.column("special")[row]
        said.append(
            "‹special token›" if special else text[cache.column("char_start")[row] : cache.column("char_end")[row]]
        )
    for word, count in found.words:
        assert sum(one.lower() == word for one in said) == count
    assert len(found.examples) == 2
    assert sum(found.labels.values()) == pytest.approx(1.0)


def test_results_do_not_depend_on_the_folder_of_the_run(study: Study, tmp_path: Path):
    settings = {"read_outs": ("model",), "removals": ("centred",)}
    _ablate(study, tmp_path / "a", **settings)
    moved = tmp_path / "elsewhere"
    shutil.copytree(study.run_folder, moved)
    ablate(study.cache, {"run": moved}, tmp_path / "b", lambda: study.model, AblateConfig(**settings))
    assert (tmp_path / "a" / "ablation.json").read_bytes() == (tmp_path / "b" / "ablation.json").read_bytes()


@pytest.mark.parametrize("kind", ["study", "decoder"])
def test_the_probe_is_asked_about_vectors_centred_among_themselves(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    # CLS rows lie apart from other rows: about the mean of all rows, each removal would move them all one way.
    study: Study = request.getfixturevalue(kind)
    asked: list[np.ndarray] = []

    def one_fold(vectors: np.ndarray, labels: np.ndarray, **_: Any) -> Any:
        def probe(changed: np.ndarray) -> np.ndarray:
            asked.append(changed)
            return np.full((len(changed), 3), 1 / 3)

        asked.append(vectors)
        yield np.arange(4), probe

    monkeypatch.setattr(probed, "cross_validated", one_fold)
    settings = {"read_outs": ("probe",), "rows_changed": "cls", "removals": ("centred",)}
    _ablate(study, tmp_path, **settings)
    table = [row for row in _table(tmp_path, removed="own code") if not np.isnan(row["flipped"])]
    vectors, before, own = asked[0].astype(np.float64), asked[1], asked[2]
    np.testing.assert_array_equal(before, asked[0][:4])
    for number, row in enumerate(table):
        chosen = np.arange(len(study.cache.texts)) == study.cache.text_index[row["text_id"]]
        special = "all" if study.family == "bert" else "none"
        rows = study.cache.vectors("hidden.1", study.cache.rows_of(chosen, special=special))
        np.testing.assert_allclose(before[number], rows[0] if study.family == "bert" else rows.mean(0), atol=1e-5)
        unit = study.run.direction(row["concept"], "hidden.1")[0].astype(np.float64)
        expected = vectors[number] - ((vectors[number] - vectors[4:].mean(axis=0)) @ unit) * unit
        np.testing.assert_allclose(own[number], expected, atol=1e-4)
    assert len(table) == 4


def test_a_decoder_is_ablated_with_both_read_outs(decoder: Study, tmp_path: Path):
    result = _ablate(decoder, tmp_path)
    assert {line.read_out for line in result.lines} == {"model", "probe"}
    own = [line for line in result.lines if line.removed == "own code"]
    assert len(own) == 4
    assert all(line.norm_removed.value > 0 for line in own)


def test_what_the_probe_cannot_do_is_said_before_the_model_is_loaded(study: Study, tmp_path: Path):
    def never() -> Any:
        raise AssertionError("the model was loaded")

    for settings, message in (
        ({"rows_changed": "all"}, "the probe changes one vector per text"),
        ({"max_texts": 3}, "three texts each; the chosen texts have .* or --read-out model"),
        ({"max_texts": 0}, "none of the chosen texts has a row"),
    ):
        with pytest.raises(ConfigError, match=message):
            ablate(study.cache, {"run": study.run_folder}, tmp_path, never, AblateConfig(**settings))


def test_a_text_without_leading_special_token_has_no_cls_to_change(tmp_path: Path):
    study = _make_study(tmp_path, "gpt2", rows="token")
    assert len(_ablate(study, tmp_path / "salient").lines) > 2
    with pytest.raises(ConfigError, match="for the run run with --rows-changed cls; the tokenizer adds no leading"):
        _ablate(study, tmp_path / "cls", rows_changed="cls")


def test_another_tokenizer_than_the_caches_is_refused(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = type(study.model.source)
    real = source.tokenize

    def shifted(self: Any, texts: Any, **settings: Any) -> Any:
        return real(self, [f"a {text}" for text in texts], **settings)

    monkeypatch.setattr(source, "tokenize", shifted)
    with pytest.raises(ModelError, match=r"tokenises text \d+ of .* differently than when the cache was made"):
        _ablate(study, tmp_path, read_outs=("model",))


def test_batches_are_as_large_as_their_texts_not_as_the_rows_kept(decoder: Study, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patched, "BATCH_SLOTS", 128)
    names = ("row", "position", "subwords", "token", "special")
    whole = rows_by_text(decoder.cache, decoder.cache.splits(["train"]))
    first = [replace(rows, **{name: getattr(rows, name)[:1] for name in names}) for rows in whole]
    seen = []
    for numbers, ids in patched.tokenised(decoder.cache, decoder.model, first):
        assert len(ids) == 1 or len(ids) * max(map(len, ids)) <= 128
        assert [len(part) for part in ids] == [len(whole[number].row) for number in numbers]
        seen += numbers
    assert sorted(seen) == list(range(len(whole)))


def test_a_damaged_result_is_named_and_replaced_by_force(study: Study, tmp_path: Path):
    (tmp_path / "ablation.json").write_text('{"settings": ')
    settings = {"read_outs": ("model",), "removals": ("centred",)}
    with pytest.raises(ConfigError, match=r"ablation\.json is damaged: give another --out, or --force"):
        _ablate(study, tmp_path, **settings)
    config = AblateConfig(**settings)
    ablate(study.cache, {"run": study.run_folder}, tmp_path, lambda: study.model, config, force=True)
    assert json.loads((tmp_path / "ablation.json").read_bytes())["lines"]


def test_a_kill_while_a_result_is_replaced_leaves_no_old_table_beside_new_texts(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"read_outs": ("model",), "removals": ("centred",)}
    _ablate(study, tmp_path, **settings)
    real = ablation_folder.write_file

    def killed(path: Path, data: bytes) -> None:
        if path.name == "ablation.json":
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(ablation_folder, "write_file", killed)
    other = AblateConfig(**settings, seed=5)
    with pytest.raises(KeyboardInterrupt):
        ablate(study.cache, {"run": study.run_folder}, tmp_path, lambda: study.model, other, force=True)
    monkeypatch.undo()
    assert not (tmp_path / "ablation.json").exists()
    assert _ablate(study, tmp_path, **settings).lines


def test_examples_of_a_concept_are_single_lines():
    assert shorten("one\n\ttwo ", "a\u2028b", " three\r\nfour") == ("one two ", "a b", " three four")


def test_stored_saliency_finds_the_same_salient_rows_without_the_model(study: Study, tmp_path: Path):
    def no_model() -> Any:
        raise AssertionError("nothing needs the model")

    found = {}
    for site in ("hidden.1", "hidden.2"):
        plan = tiny.plan_of(
            study.model_folder, study.cache.path.parent / "data", rows="word", task="classify",
            saliency="gradient", saliency_site=site,
        )  # fmt: skip
        tiny.run(plan, tmp_path / site)
        found[site] = clvq.Cache(tmp_path / site)
    # The run was trained on a cache without saliency, whose vectors are the same.
    config = AblateConfig(read_outs=("probe",), saliency="stored")
    ablate(found["hidden.1"], {"run": study.run_folder}, tmp_path / "stored", no_model, config)
    _ablate(study, tmp_path / "gradient", read_outs=("probe",))
    stored, computed = (_table(tmp_path / name, removed="own code") for name in ("stored", "gradient"))
    assert stored
    assert [row["concept"] for row in stored] == [row["concept"] for row in computed]
    both = AblateConfig(read_outs=("model",), saliency="stored")
    ablate(found["hidden.1"], {"run": study.run_folder}, tmp_path / "model", lambda: study.model, both)
    _ablate(study, tmp_path / "by gradient", read_outs=("model",))
    # As text, in which what is not a number equals itself.
    assert str(_table(tmp_path / "model")) == str(_table(tmp_path / "by gradient"))
    with pytest.raises(ConfigError, match=r"is of hidden.2, and concepts are removed at hidden.1"):
        ablate(found["hidden.2"], {"run": study.run_folder}, tmp_path / "other", no_model, config)
    with pytest.raises(ConfigError, match="holds no saliency"):
        _ablate(study, tmp_path / "none", saliency="stored")
