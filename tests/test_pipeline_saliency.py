"""Saliency: against captum on the model's own block, against gradients taken by hand, and in a cache."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clvq
import numpy as np
import pytest
import torch
from clvq.cache.layout import SALIENCY_COLUMNS
from clvq.cache.verify import verify
from clvq.cli import app
from clvq.errors import ConfigError, MissingExtra, ResumeMismatch
from clvq.pipeline.config import ExtractConfig
from clvq.pipeline.extract import extract
from clvq.pipeline.forward import load_model
from clvq.pipeline.language_model import LanguageModel
from clvq.pipeline.saliency import attribute, baseline_states, of_rows, saliency_settings
from clvq.pipeline.source import find_model
from clvq.pipeline.words import Rows
from clvq.pipeline.work import tokenise
from typer.testing import CliRunner

from .cache_maker import contents
from .tiny import load, plan_of, run, write_texts

TinyModel = Callable[..., Path]
NAMES = ((0, "joy"), (1, "anger"), (2, "fear"))
IG: dict[str, Any] = {
    "task": "classify", "saliency": "ig", "saliency_site": "hidden.1", "saliency_steps": 8, "saliency_baseline": "pad",
}  # fmt: skip
GRADIENT: dict[str, Any] = {"task": "classify", "saliency": "gradient", "saliency_site": "hidden.1"}


def settings(**changes: Any) -> ExtractConfig:
    return ExtractConfig(**({"sites": ("hidden.1",), "max_length": 32, "batch_tokens": 64} | IG | changes))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data") / "texts", texts=32)


def batch_of(model: LanguageModel, texts: list[str], site: str = "hidden.1") -> dict[str, Any]:
    """What `attribute` is given for the texts."""
    tokens = model.source.tokenize(texts, max_length=32)
    ids, mask = model.pad([part.ids.tolist() for part in tokens])
    kept = ~mask
    for number, part in enumerate(tokens):
        kept[number, : len(part.kind)] = torch.from_numpy(part.kind != 0)
    with torch.no_grad():
        states, scores = model.read(ids, mask, [site], logits=True)
    return {"hidden": states[site], "ids": ids, "mask": mask, "kept": kept, "target": scores.argmax(dim=-1)}


def logit(model: LanguageModel, batch: dict[str, Any], states: torch.Tensor, site: str = "hidden.1") -> torch.Tensor:
    """The logit of each text's target with other states at the site."""
    found = model.logits_from(site, states, batch["ids"], batch["mask"])
    return found.gather(1, batch["target"][:, None])[:, 0]


TEXTS = ["the don and the cat", "a", "well known things, all of them"]


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_integrated_gradients_are_those_of_captum_on_the_models_own_block(family: str, tiny_model: TinyModel) -> None:
    from captum.attr import LayerIntegratedGradients

    model = load(find_model(str(tiny_model(family, classes=3))), task="classify")
    network = model.model
    inner = getattr(network, network.base_model_prefix)
    block = (inner.h if family == "gpt2" else inner.layers if family == "llama" else inner.encoder.layer)[0]
    for text in TEXTS:
        batch = batch_of(model, [text])
        theirs, delta = LayerIntegratedGradients(lambda ids: network(input_ids=ids).logits, block).attribute(
            batch["ids"], target=batch["target"], n_steps=8, return_convergence_delta=True
        )
        found = attribute(model, settings(saliency_baseline="published"), **batch)
        expected = (theirs[0] if isinstance(theirs, tuple) else theirs).double().sum(dim=-1).numpy()
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(found.positions, expected, rtol=1e-4, atol=1e-5)
        # Captum's begins at the logit of a text of token 0 alone, whose last token a decoder's head does not find.
        if family in ("bert", "roberta"):
            np.testing.assert_allclose(found.delta, delta.numpy(), atol=1e-5)


@pytest.mark.parametrize("baseline", ["pad", "zero", "published"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_they_add_up_to_what_the_logit_gains_over_the_baseline(
    family: str, baseline: str, tiny_model: TinyModel
) -> None:
    model = load(find_model(str(tiny_model(family, classes=3))), task="classify")
    batch = batch_of(model, TEXTS)
    config = settings(saliency_baseline=baseline, saliency_steps=200)
    found = attribute(model, config, **batch)
    start = baseline_states(model, config, **{k: batch[k] for k in ("ids", "mask", "kept")}, states=batch["hidden"])
    gain = (logit(model, batch, batch["hidden"]) - logit(model, batch, start)).numpy()
    assert np.abs(gain).max() > 0.01
    np.testing.assert_allclose(found.positions.sum(axis=1) - found.delta, gain, atol=1e-5)
    # From zero, what normalises states changes all along the first few steps, and none of them sees it.
    if baseline == "pad":
        assert np.abs(found.delta).max() < 0.02 * np.abs(gain).max()


def test_a_batch_gives_each_text_what_it_gets_alone_and_its_padding_nothing(tiny_model: TinyModel) -> None:
    for family in ("bert", "llama"):
        model = load(find_model(str(tiny_model(family, classes=3))), task="classify")
        batch = batch_of(model, TEXTS)
        for config in (settings(), settings(saliency="gradient")):
            together = attribute(model, config, **batch)
            assert (together.positions[~batch["mask"].numpy()] == 0).all()
            for number, text in enumerate(TEXTS):
                alone = attribute(model, config, **batch_of(model, [text]))
                length = alone.positions.shape[1]
                np.testing.assert_allclose(together.positions[number, :length], alone.positions[0], atol=1e-4)
                np.testing.assert_allclose(together.delta[number], alone.delta[0], atol=1e-4)


class Linear(LanguageModel):
    """A model whose logits are a linear map of the states, and all states of an id a multiple of it."""

    pad_id = 7

    def __init__(self) -> None:
        self.weight = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()

    def read(self, ids: Any, mask: Any, sites: Any, *, logits: bool = False) -> Any:
        return {sites[0]: ids[..., None] * torch.tensor([1.0, -2.0, 0.5])}, None

    def logits_from(self, site: str, hidden: Any, ids: Any, mask: Any) -> Any:
        return torch.einsum("bsd,sdc->bc", hidden * mask[..., None], self.weight[: hidden.shape[1]])


@pytest.mark.parametrize("baseline", ["pad", "zero", "published"])
@pytest.mark.parametrize("steps", [1, 3])
def test_of_a_linear_model_each_position_has_exactly_its_share(baseline: str, steps: int) -> None:
    model = Linear()
    ids = torch.tensor([[1, 5, 6, 2], [1, 9, 2, 7]])
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
    kept = torch.tensor([[True, False, False, True], [True, False, True, True]])
    hidden = model.read(ids, mask, ["hidden.1"])[0]["hidden.1"]
    target = torch.tensor([1, 0])
    given = {"hidden": hidden, "ids": ids, "mask": mask, "kept": kept, "target": target}
    found = attribute(model, settings(saliency_baseline=baseline, saliency_steps=steps), **given)
    begins = {"pad": torch.where(kept, ids, 7), "zero": 0 * ids, "published": 0 * ids}[baseline]
    moved = ((ids - begins) * mask)[..., None] * torch.tensor([1.0, -2.0, 0.5])
    share = torch.stack([(moved[n] * model.weight[..., target[n]]).sum(-1) for n in range(2)])
    np.testing.assert_allclose(found.positions, share.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.delta, 0, atol=1e-5)


def test_gradient_times_input_is_what_autograd_gives_and_promises_no_sum(tiny_model: TinyModel) -> None:
    model = load(find_model(str(tiny_model("bert", classes=3))), task="classify")
    batch = batch_of(model, TEXTS)
    states = batch["hidden"].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(logit(model, batch, states).sum(), states)
    found = attribute(model, settings(saliency="gradient"), **batch)
    expected = (gradient * states).detach().sum(dim=-1).numpy()
    np.testing.assert_allclose(found.positions, expected * batch["mask"].numpy(), rtol=1e-4, atol=1e-6)
    assert np.isnan(found.delta).all()


def test_a_model_in_bfloat16_gives_about_the_same(tiny_model: TinyModel) -> None:
    source = find_model(str(tiny_model("bert", classes=3)))
    exact = load(source, task="classify")
    coarse = LanguageModel(source, task="classify", dtype="bfloat16", device=torch.device("cpu"))
    for config in (settings(), settings(saliency="gradient")):
        batch = batch_of(exact, TEXTS)
        wanted = attribute(exact, config, **batch).positions
        found = attribute(coarse, config, **(batch_of(coarse, TEXTS) | {"target": batch["target"]})).positions
        assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > 0.99


def test_a_row_has_the_sum_of_its_subwords_and_the_size_of_the_largest() -> None:
    values = np.array([5.0, -1.0, 0.5, -2.0, -3.0, 4.0])
    ones = np.ones(4, dtype=np.int64)
    rows = Rows(
        position=np.array([0, 2, 4, 5]), subwords=np.array([1, 2, 2, 1]), token=ones, word=ones, char_start=ones,
        char_end=ones, special=0 * ones,
    )  # fmt: skip
    total, largest = of_rows(values, rows)
    assert total.tolist() == [5.0, -0.5, -5.0, 4.0]
    assert largest.tolist() == [5.0, 0.5, 2.0, 4.0]


@pytest.mark.parametrize("rows", ["word", "token"])
@pytest.mark.parametrize("extra", [IG, GRADIENT], ids=["ig", "gradient"])
def test_the_cache_holds_what_one_text_alone_gives(
    extra: dict[str, Any], rows: str, data: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    plan = plan_of(tiny_model("bert", classes=3, id2label=NAMES), data, rows=rows, encoding="fp32", **extra)
    run(plan, tmp_path / "cache")
    cache, model = clvq.Cache(tmp_path / "cache"), load(plan.source, task="classify")
    assert verify(cache.path).problems == []
    signed, largest = (cache.column(name) for name in SALIENCY_COLUMNS)
    position, subwords = cache.column("position"), cache.column("subwords")
    unused = cache.column("text") < 0
    assert np.isnan(signed[unused]).all()
    assert np.isfinite(signed[~unused]).all()
    delta = cache.convergence_delta()
    for number, row in enumerate(cache.texts.to_pylist()):
        alone = attribute(model, plan.config, **batch_of(model, [row["text"]]))
        own = range(row["first_row"], row["first_row"] + row["row_count"])
        for place in own:
            part = alone.positions[0, position[place] - subwords[place] + 1 : position[place] + 1]
            np.testing.assert_allclose(signed[place], part.sum(), atol=1e-4)
            np.testing.assert_allclose(largest[place], abs(part.max()), atol=1e-4)
        np.testing.assert_allclose(delta[number], alone.delta[0], atol=1e-4)
        # The words of these texts share no sub-word, so that no position counts twice.
        if rows == "token":
            np.testing.assert_allclose(signed[own.start : own.stop].sum(), alone.positions.sum(), atol=1e-4)
    convergence = cache.manifest.convergence
    if extra is IG:
        assert convergence is not None
        assert convergence.texts == len(cache.texts)
        assert convergence.median == sorted(np.abs(delta).tolist())[(len(delta) + 1) // 2 - 1]
        assert "integrated gradients at `hidden.1`, 8 steps, baseline pad" in (cache.path / "README.md").read_text()
    else:
        assert convergence is None
        assert np.isnan(delta).all()
        assert "gradient × input at `hidden.1`." in (cache.path / "README.md").read_text()


def test_everything_else_is_to_the_last_byte_what_it_is_without_saliency(
    data: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("gpt2", classes=3, id2label=NAMES)
    common = {"task": "classify", "encoding": "int8", "sites": ("hidden.1", "hidden.3")}
    run(plan_of(model, data, **common), tmp_path / "without")
    # A site that is not stored.
    run(plan_of(model, data, **(common | IG | {"saliency_site": "hidden.2"})), tmp_path / "with")
    arrays = {name: data for name, data in contents(tmp_path / "without").items() if name.startswith("activations")}
    made = contents(tmp_path / "with")
    assert arrays == {name: made[name] for name in arrays}
    new = {name.split("/")[2] for name in made.keys() - contents(tmp_path / "without").keys()}
    assert new == {"saliency", "saliency_max", "convergence_delta"}
    without, with_it = clvq.Cache(tmp_path / "without"), clvq.Cache(tmp_path / "with")
    assert without.manifest.vectors_id == with_it.manifest.vectors_id
    # Texts without tokens have no prediction to attribute.
    assert np.array_equal(np.isnan(with_it.convergence_delta()), np.isnan(with_it.logits()).any(axis=1))
    assert np.isnan(with_it.convergence_delta()).any()


def test_of_a_prompted_text_the_baseline_keeps_the_prompt_and_all_rows_add_up(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {
        "task": "prompt", "prompt": "say how\n{text}\nit is. mood: ", "answers": ("joy", "anger"),
        "answer_names": ("joy", "anger"), "max_length": 50, "saliency_steps": 100,
    }  # fmt: skip
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "the don"}\n{"text": "a cat and the dog"}\n')
    plan = plan_of(tiny_model("gpt2", continues=True), data, **(IG | asked))
    model = load_model(plan.source, plan.config, device=torch.device("cpu"))
    extract(plan, tmp_path / "cache", lambda: model)
    cache = clvq.Cache(tmp_path / "cache")
    for number, row in enumerate(cache.texts.to_pylist()):
        (tokens,) = tokenise(plan.source, plan.config, [row["text"]])
        assert {0, 3} <= set(tokens.kind.tolist())
        ids, mask = model.pad([tokens.ids.tolist()])
        replaced = torch.where(torch.from_numpy(tokens.kind != 0)[None], ids, 0)
        with torch.no_grad():
            _, there = model.read(ids, mask, [], logits=True)
            begin, _ = model.read(replaced, mask, ["hidden.1"])
            before = model.logits_from("hidden.1", begin["hidden.1"], ids, mask)
        assert there is not None
        gain = float(there.max() - before[0, there.argmax()])
        own = slice(row["first_row"], row["first_row"] + row["row_count"])
        total = float(cache.column("saliency")[own].sum())
        assert total - cache.convergence_delta()[number] == pytest.approx(gain, abs=1e-4)
        assert abs(cache.convergence_delta()[number]) < 0.1 * abs(gain)
        # What is the same in both is not to blame.
        kinds = cache.column("special")[own]
        assert np.abs(cache.column("saliency")[own][: int(np.argmax(kinds == 0))]).max() < 1e-6


def test_the_command_resumes_and_repairs_to_the_same_bytes(data: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("bert", classes=3, id2label=NAMES)
    common = ["extract", str(model), str(data), "--sites", "2,1", "--task", "classify", "--saliency", "ig"]
    common += ["--saliency-steps", "5", "--batch-tokens", "256", "--json"]
    whole, other = tmp_path / "whole", tmp_path / "other"
    made = CliRunner().invoke(app, [*common, "--out", str(whole)])
    assert made.exit_code == 0
    settings: Any = clvq.Cache(whole).manifest.identity["settings"]
    assert {name: settings[name] for name in settings if name.startswith("saliency")} == {
        "saliency": "ig", "saliency_site": "hidden.1", "saliency_steps": 5, "saliency_baseline": "pad",
    }  # fmt: skip
    for part in ("1/2", "2/2"):
        assert CliRunner().invoke(app, [*common, "--out", str(other), "--shard-range", part]).exit_code == 0
    assert contents(other) == contents(whole)
    for file in ("rows/saliency/c/0", "texts/convergence_delta/c/1"):
        (other / "activations.zarr" / file).write_bytes(b"damaged")
    mended = CliRunner().invoke(app, ["cache", "repair", str(other), "--model", str(model), "--data", str(data)])
    assert mended.exit_code == 0
    assert contents(other) == contents(whole)
    refused = CliRunner().invoke(app, [*common, "--saliency-baseline", "zero", "--out", str(whole)])
    assert isinstance(refused.exception, ResumeMismatch)
    assert 'identity.settings.saliency_baseline: "pad" there, "zero" now' in str(refused.exception)
    shown = CliRunner().invoke(app, ["cache", "info", str(whole), "--json"])
    assert json.loads(shown.stdout)["convergence_delta"]["texts"] == 32


def test_the_site_is_the_lowest_hidden_one_asked_for_where_none_is_given(tiny_model: TinyModel) -> None:
    source = find_model(str(tiny_model("bert", classes=3)))
    given: dict[str, Any] = {"steps": 9, "baseline": "zero"}
    assert saliency_settings(source, ["hidden.2"], kind="none", site=None, **given) == {}
    found = saliency_settings(source, ["mlp_in.0", "hidden.2", "hidden.1"], kind="ig", site=None, **given)
    assert found == {
        "saliency": "ig", "saliency_site": "hidden.1", "saliency_steps": 9, "saliency_baseline": "zero",
    }  # fmt: skip
    found = saliency_settings(source, ["hidden.2"], kind="gradient", site="0", **given)
    assert found == {"saliency": "gradient", "saliency_site": "hidden.0"}
    with pytest.raises(ConfigError, match="give --saliency-site"):
        saliency_settings(source, ["mlp_in.0"], kind="ig", site=None, **given)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"task": "none"}, "--saliency explains predictions, and --task none makes none"),
        ({"saliency_site": "hidden.3"}, "with blocks above it, hidden.0 … hidden.2"),
        ({"saliency_site": "mlp_in.1"}, "--saliency-site mlp_in.1: saliency is attributed to a hidden site"),
        ({"saliency_steps": 0}, "--saliency-steps is 0; it must be at least 1"),
        ({"saliency_steps": None}, "needs a number of steps"),
    ],
)
def test_what_cannot_be_attributed_is_refused_with_the_plan(
    changes: dict[str, Any], told: str, data: Path, tiny_model: TinyModel
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(tiny_model("bert", classes=3, id2label=NAMES), data, **(IG | changes))
    assert told in str(caught.value)


def test_without_captum_the_plan_says_how_to_get_it(
    data: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "captum"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "captum", None)
    model = tiny_model("bert", classes=3, id2label=NAMES)
    plan_of(model, data, task="classify")
    with pytest.raises(MissingExtra, match=r"pip install 'clvq\[attribution\]'"):
        plan_of(model, data, **IG)
