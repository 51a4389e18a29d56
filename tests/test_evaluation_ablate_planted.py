"""A model whose answer depends on one planted concept: the ablation finds it, and how much it matters."""

import json
from pathlib import Path
from typing import Any

import clvq
import numpy as np
import pytest
import torch
from clvq.evaluation.ablate import AblateConfig, AblateResult, ablate
from clvq.trainer.fit import fit
from clvq.trainer.methods import method_config
from clvq.trainer.run import Run

from . import tiny

# Three letters speak of each concept; the first concept decides.
CONCEPTS = ("abc", "def", "ghi", "jkl", "mno", "pqr", "stu")
PLANTED = CONCEPTS[0]


def _vectors() -> np.ndarray:
    """A direction for each concept, orthogonal to each other and to the constant that layer norm removes."""
    drawn = np.random.default_rng(0).normal(size=(tiny.WIDTH, len(CONCEPTS) + 1))
    drawn[:, 0] = 1
    return np.linalg.qr(drawn)[0].T[1:]


@torch.no_grad()
def _plant(folder: Path) -> None:
    """Let letters stand for concepts, block 1 average the text into its CLS row, and the head read the planted one."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bert, vectors = model.bert, torch.from_numpy(_vectors()).float()
    noise = torch.Generator().manual_seed(0)
    words = bert.embeddings.word_embeddings.weight
    words.copy_(0.02 * torch.randn(words.shape, generator=noise))
    for letters, vector in zip(CONCEPTS, vectors, strict=True):
        for letter in letters:
            words[tokenizer.convert_tokens_to_ids(letter)] += vector
    # Rows of a concept also say where they stand, which nothing reads.
    places = bert.embeddings.position_embeddings.weight
    places.copy_(torch.randn(places.shape, generator=noise))
    places -= places @ vectors.T @ vectors + places.mean(dim=1, keepdim=True)
    places /= places.norm(dim=1, keepdim=True)
    bert.embeddings.token_type_embeddings.weight.zero_()
    for number, layer in enumerate(bert.encoder.layer):
        for part in (layer.attention.output.dense, layer.output.dense):
            part.weight.zero_()
            part.bias.zero_()
        if number == 1:
            attention = layer.attention.self
            for part in (attention.query, attention.key):
                part.weight.zero_()
                part.bias.zero_()
            attention.value.weight.copy_(torch.eye(tiny.WIDTH))
            attention.value.bias.zero_()
            layer.attention.output.dense.weight.copy_(3 * torch.eye(tiny.WIDTH))
    bert.pooler.dense.weight.copy_(0.1 * torch.eye(tiny.WIDTH))
    bert.pooler.dense.bias.zero_()
    model.classifier.weight.zero_()
    model.classifier.weight[1] = 20 * vectors[0]
    model.classifier.bias.copy_(torch.tensor([2.0, 0.0]))
    model.save_pretrained(folder)


def _write(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 240), ("dev", 160)):
        lines = []
        for number in range(count):
            decided = number % 2 == 0
            letters = [generator.choice(list("".join(CONCEPTS[1:]))) for _ in range(generator.integers(5, 9))]
            letters += [generator.choice(list(PLANTED)) for _ in range(generator.integers(2, 6) if decided else 0)]
            text = " ".join(generator.permutation(letters).tolist())
            lines.append(json.dumps({"text": text, "label": "with" if decided else "none"}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[clvq.Cache, Path, Run, AblateResult]:
    folder = tmp_path_factory.mktemp("planted")
    model = tiny.make_model(folder / "model", "bert", classes=2, id2label=((0, "none"), (1, "with")))
    _plant(model)
    plan = tiny.plan_of(model, _write(folder / "data"), rows="token", task="classify")
    tiny.run(plan, folder / "cache")
    cache = clvq.Cache(folder / "cache")
    config = method_config("kmeans", lower="hidden.1", upper="hidden.3", codes=8, held_out="dev")
    fit(cache, config, folder / "run", device=torch.device("cpu"))
    settings = AblateConfig(read_outs=("model",), removals=("centred",), concepts=True)
    result = ablate(
        cache, {"run": folder / "run"}, folder / "a", lambda: tiny.load(plan.source, task="classify"), settings
    )
    return cache, model, Run.from_pretrained(folder / "run"), result


def _exact(cache: clvq.Cache, folder: Path, mean: np.ndarray) -> np.ndarray:
    """Probability lost by each text with the planted concept when its true direction leaves its true rows."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    unit, centre = torch.from_numpy(_vectors()[0]).float(), torch.from_numpy(mean)
    letters = {tokenizer.convert_tokens_to_ids(letter) for letter in PLANTED}
    lost = []
    for record in cache.texts.to_pylist():
        if record["split"] != "dev" or not set(PLANTED) & set(record["text"]):
            continue
        tokens = tokenizer(record["text"], return_tensors="pt", truncation=True, max_length=32)
        there = torch.tensor([int(token) in letters for token in tokens["input_ids"][0]])

        def change(block: Any, args: Any, there: torch.Tensor = there) -> Any:
            offset = (args[0] - centre) * there[None, :, None]
            return (args[0] - (offset @ unit)[..., None] * unit, *args[1:])

        with torch.no_grad():
            before = model(**tokens).logits[0].softmax(-1)
            handle = model.bert.encoder.layer[1].register_forward_pre_hook(change)
            after = model(**tokens).logits[0].softmax(-1)
            handle.remove()
        lost.append(float(before.max() - after[before.argmax()]))
    return np.array(lost)


def test_the_planted_concept_is_ranked_first_with_its_true_effect(
    planted: tuple[clvq.Cache, Path, Run, AblateResult],
):
    cache, folder, run, result = planted
    first = result.concepts[0]
    rows = cache.rows_of(cache.splits(["dev"]), special="none")
    from transformers import AutoTokenizer

    letters = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(list(PLANTED))
    true_rows = np.isin(cache.column("token")[rows], letters)
    codes = run.assign(cache.vectors("hidden.1", rows))
    assert set(codes[true_rows]) == {first.concept}
    assert set(codes[~true_rows]).isdisjoint({first.concept})
    exact = _exact(cache, folder, run.lower_mean)
    assert first.texts == len(exact) == 80
    assert first.lost is not None
    assert first.lost.low <= exact.mean() <= first.lost.high
    assert first.probability_lost == pytest.approx(exact.mean(), abs=0.02)
    assert exact.mean() > 0.3
    # It carries the class that the head reads it for, and no other concept of the texts' letters comes near it.
    assert first.class_changes is not None
    assert first.class_changes[1] == pytest.approx(-first.class_changes[0], abs=1e-6)
    assert first.class_changes[1] < -0.2
    others = [effect for effect in result.concepts if effect.concept in set(codes[~true_rows])]
    assert max(effect.texts * effect.probability_lost for effect in others) < 0.2 * first.texts * exact.mean()
    assert first.own_minus_control is not None
    assert first.own_minus_control.low > 0
    assert first.p is not None
    assert first.p < 0.01


def test_concepts_of_few_texts_have_no_interval(planted: tuple[clvq.Cache, Path, Run, AblateResult]):
    result = planted[3]
    for effect in result.concepts:
        assert (effect.lost is None) == (effect.p is None) == (effect.texts < 5)
    totals = [effect.texts * effect.probability_lost for effect in result.concepts]
    assert totals == sorted(totals, reverse=True)
