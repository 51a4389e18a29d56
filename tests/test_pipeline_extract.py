"""Extraction from end to end, against transformers run on one text at a time."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import clvq
import numpy as np
import pytest
import torch
from clvq.cache.files import only_writer
from clvq.cache.verify import verify
from clvq.errors import CacheIncomplete, DataError, DiskFull, FolderInUse, Interrupted, ModelError, ResumeMismatch
from clvq.pipeline.extract import check_disk, extract
from clvq.pipeline.language_model import LanguageModel
from clvq.pipeline.words import find_words
from clvq.progress import Silent
from numpy.typing import NDArray

from .cache_maker import contents
from .tiny import plan_of, run, write_texts

TinyModel = Callable[..., Path]
NAMES = ((0, "joy"), (1, "anger"), (2, "fear"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data") / "texts", texts=140)


@pytest.fixture(scope="session")
def whole(data: Path, tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed extraction with the settings of `tiny.plan_of` gives."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    run(plan_of(tiny_model("bert"), data), out)
    return out


def reference(model: Path, text: str, *, max_length: int, classify: bool) -> tuple[Any, Any, NDArray[Any] | None]:
    """Tokens, hidden states and logits of one text from transformers; no states where it has no tokens."""
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    factory = AutoModelForSequenceClassification if classify else AutoModel
    key = (model, classify)
    if key not in _LOADED:
        _LOADED[key] = (AutoTokenizer.from_pretrained(model), factory.from_pretrained(model).eval())
    tokenizer, network = _LOADED[key]
    encoded = tokenizer(text, truncation=True, max_length=max_length, return_offsets_mapping=True)
    if not encoded["input_ids"]:
        return encoded, None, None
    with torch.inference_mode():
        output = network(input_ids=torch.tensor([encoded["input_ids"]]), output_hidden_states=True)
    logits = output.logits[0].numpy() if classify else None
    return encoded, [state[0].numpy() for state in output.hidden_states], logits


_LOADED: dict[tuple[Path, bool], tuple[Any, Any]] = {}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("bert", {"task": "classify"}),
        ("gpt2", {"task": "classify", "encoding": "fp32"}),
        ("llama", {"rows": "word", "pool": "mean", "encoding": "fp32"}),
        ("deberta-v2", {"rows": "word", "task": "classify", "max_length": 12}),
        ("bert", {"rows": "word", "max_occurrences": 9, "min_count": 3, "batch_tokens": 40}),
    ],
    ids=str,
)
def test_every_row_is_what_the_model_gives_for_the_span_it_claims(
    family: str, settings: dict[str, Any], data: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    classify = settings.get("task") == "classify"
    model = tiny_model(family, classes=3, id2label=NAMES) if classify else tiny_model(family)
    plan = plan_of(model, data, **settings)
    result = run(plan, tmp_path / "cache")
    cache = clvq.Cache(tmp_path / "cache")
    assert verify(tmp_path / "cache").problems == []
    assert result.cache_id == cache.id
    assert result.rows == cache.manifest.geometry.rows == plan.row_counts.sum()
    assert result.shards > 4
    assert result.real_share > 0.7

    table = cache.texts.to_pylist()
    assert sorted((row["split"], row["source_row"]) for row in table) == sorted(
        zip(plan.texts.split, plan.texts.source_row, strict=True)
    )
    columns = {
        name: cache.column(name) for name in ("position", "subwords", "token", "char_start", "char_end", "special")
    }
    vectors = {site: cache.vectors(f"hidden.{site}", np.arange(cache.manifest.geometry.row_places)) for site in (1, 3)}
    logits = cache.logits() if classify else None
    tolerance = 1e-4 if settings.get("encoding") == "fp32" else 2**-8
    same = compared = 0
    for place, row in enumerate(table):
        source = json.loads((data / f"{row['split']}.jsonl").read_text().splitlines()[row["source_row"]])
        text = source["text"]
        assert row["text"] == text
        encoded, states, expected = reference(model, text, max_length=plan.config.max_length, classify=classify)
        if classify:
            name = cache.manifest.class_names[row["label"]] if row["label"] is not None else None
            assert name == source["label"]
            if states is None:
                assert row["prediction"] is None
                assert np.isnan(logits[place]).all()
            else:
                np.testing.assert_allclose(logits[place], expected, rtol=1e-3, atol=1e-4)
                assert row["prediction"] == expected.argmax()
        own = range(row["first_row"], row["first_row"] + row["row_count"])
        assert [cache.column("text")[r] for r in own] == [row["text_id"]] * row["row_count"]
        words = set(find_words(text))
        for r in own:
            last, count = columns["position"][r], columns["subwords"][r]
            span = (columns["char_start"][r], columns["char_end"][r])
            assert columns["token"][r] == encoded["input_ids"][last]
            if columns["special"][r]:
                assert span == (0, 0)
            elif plan.config.rows == "word":
                assert span in words
            else:
                assert span == encoded["offset_mapping"][last]
            for site in (1, 3):
                wanted = states[site][last]
                if plan.config.pool == "mean":
                    wanted = states[site][last + 1 - count : last + 1].mean(axis=0)
                np.testing.assert_allclose(vectors[site][r], wanted, rtol=tolerance, atol=1e-4)
                same += (torch.from_numpy(wanted).bfloat16().float().numpy() == vectors[site][r]).sum()
                compared += len(wanted)
    assert compared > 0
    if settings.get("encoding", "bf16") == "bf16":
        # Batches are summed in another order, which changes the rounding of a few values.
        assert same / compared > 0.99


def test_texts_without_tokens_are_kept_without_rows(data: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    run(plan_of(tiny_model("gpt2", classes=3, id2label=NAMES), data, task="classify"), tmp_path / "cache")
    cache = clvq.Cache(tmp_path / "cache")
    empty = [row for row in cache.texts.to_pylist() if row["text"] == ""]
    assert len(empty) > 2
    assert {row["row_count"] for row in empty} == {0}
    assert {row["prediction"] for row in empty} == {None}
    assert cache.manifest.counts["texts_without_rows"] == len(empty)


@pytest.mark.parametrize("encoding", ["bf16", "fp32"])
def test_the_size_is_known_before(encoding: str, data: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    # Random weights give values that hardly compress, and this many channels make the vectors most of the cache.
    model = tiny_model("bert", hidden_size=384, num_hidden_layers=3)
    plan = plan_of(model, data, encoding=encoding, sites=("hidden.1", "hidden.2", "hidden.3"))
    result = run(plan, tmp_path / "cache")
    files = contents(tmp_path / "cache")
    size = sum(map(len, files.values()))
    assert size - len(files["manifest.json"]) == result.bytes
    assert size <= plan.bytes_at_most() <= 2 * size
    assert 0.5 * size < plan.bytes_expected() < plan.bytes_at_most()


def test_a_disk_without_room_is_refused_before_work_begins(
    data: Path, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tiny_model("bert"), data)
    out = tmp_path / "cache"
    monkeypatch.setattr("clvq.pipeline.extract.free_bytes", lambda path: 1000)
    need = plan.bytes_at_most()
    message = f"{out} needs up to {need:,} more bytes and the disk has 1,000 free: free some room, choose another"
    with pytest.raises(DiskFull, match=f"^{re.escape(message)}"):
        run(plan, out)
    assert not out.exists()


def test_what_was_written_before_counts_as_room(
    data: Path, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = plan_of(tiny_model("bert"), data), tmp_path / "cache"
    with pytest.raises(Interrupted):
        run(plan, out, progress=StopAfter(5))
    there = sum(map(len, contents(out).values()))
    monkeypatch.setattr("clvq.pipeline.extract.free_bytes", lambda path: plan.bytes_at_most() - there)
    check_disk(plan, out)
    monkeypatch.setattr("clvq.pipeline.extract.free_bytes", lambda path: plan.bytes_at_most() - there - 1_000_000)
    with pytest.raises(DiskFull):
        check_disk(plan, out)


class StopAfter(Silent):
    """Asks for a stop after some batches, or after some shards."""

    def __init__(self, shards: int = 10**9, *, batches: int = 10**9) -> None:
        self.shards, self.batches = shards, batches

    def advance(self, amount: int = 1, **figures: float) -> None:
        self.shards -= 1
        if self.shards == 0:
            raise Interrupted("asked to stop", signal_number=15)

    def check(self) -> None:
        self.batches -= 1
        if self.batches == 0:
            raise Interrupted("asked to stop", signal_number=15)


def records(out: Path) -> set[str]:
    return {file.name for file in (out / "records").iterdir()}


@pytest.mark.parametrize(("progress", "kept"), [(StopAfter(3), 3), (StopAfter(batches=40), 1)], ids=["shard", "batch"])
def test_a_stop_keeps_what_is_finished(
    progress: StopAfter, kept: int, data: Path, whole: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    plan, out = plan_of(tiny_model("bert"), data), tmp_path / "cache"
    with pytest.raises(Interrupted, match="asked to stop"):
        run(plan, out, progress=progress)
    done = records(out)
    assert len(done) >= kept
    assert len(done) < plan.placement.geometry.shards
    with pytest.raises(CacheIncomplete):
        clvq.Cache(out)
    result = run(plan, out)
    assert result.shards_done_before == len(done)
    assert contents(out) == contents(whole)


def test_a_finished_cache_is_left_as_it_is_and_no_model_is_loaded(
    data: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    plan, out = plan_of(tiny_model("bert"), data), tmp_path / "cache"
    first = run(plan, out)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}

    def no_model() -> Any:
        raise AssertionError("the model was loaded")

    again = extract(plan, out, no_model)
    assert again.cache_id == first.cache_id
    assert again.shards_done_before == again.shards == first.shards
    assert np.isnan(again.real_share)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"sites": ("hidden.1", "hidden.2")},
            'identity.settings.sites: ["hidden.1", "hidden.3"] there, ["hidden.1", "hidden.2"] now',
        ),
        ({"encoding": "fp16"}, 'identity.settings.encoding: "bf16" there, "fp16" now'),
        ({"pool": "mean"}, 'identity.settings.pool: "last" there, "mean" now'),
        ({"batch_tokens": 128}, "identity.settings.batch_tokens: 256 there, 128 now"),
        ({"seed": 1}, "identity.settings.seed: 0 there, 1 now"),
        ("data", "identity.data.files.train: "),
        ("model", "identity.model.weights.model.safetensors: "),
    ],
    ids=str,
)
def test_other_settings_are_refused_by_name_unless_forced(
    change: dict[str, Any] | str,
    named: str,
    finished: bool,
    data: Path,
    whole: Path,
    tiny_model: TinyModel,
    tmp_path: Path,
) -> None:
    model, out = tiny_model("bert"), tmp_path / "cache"
    plan = plan_of(model, data)
    if finished:
        shutil.copytree(whole, out)
    else:
        with pytest.raises(Interrupted):
            run(plan, out, progress=StopAfter(2))
    if change == "data":
        other_data = Path(shutil.copytree(data, tmp_path / "other"))
        with open(other_data / "train.jsonl", "a") as file:
            file.write('{"text": "more", "label": "joy", "doc": "d"}\n')
        other = plan_of(model, other_data)
    elif change == "model":
        other = plan_of(tiny_model("bert", seed=1), data)
    else:
        assert isinstance(change, dict)
        other = plan_of(model, data, **change)
    before = contents(out)
    with pytest.raises(ResumeMismatch) as caught:
        run(other, out)
    assert named in str(caught.value)
    assert str(caught.value).endswith("give another --out, or --force to delete it")
    assert contents(out) == before


@pytest.mark.parametrize("finished", [False, True])
def test_force_deletes_what_stands_there(
    finished: bool, data: Path, whole: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    other = plan_of(tiny_model("bert"), data, sites=("hidden.0",), encoding="fp32")
    if finished:
        run(other, out)
    else:
        with pytest.raises(Interrupted):
            run(other, out, progress=StopAfter(2))
    run(plan_of(tiny_model("bert"), data), out, force=True)
    assert contents(out) == contents(whole)


def test_two_runs_at_once_are_refused(data: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    plan = plan_of(tiny_model("bert"), data)
    out = tmp_path / "cache"
    message = f"^{re.escape(str(out))} is being written by another process"
    with only_writer(out), pytest.raises(FolderInUse, match=message):
        run(plan, out)
    run(plan, out)


def test_values_that_are_not_finite_are_named_by_text(tiny_model: TinyModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_model("bert"), tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("word_embeddings.weight"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    weights[name][tokenizer["model"]["vocab"]["z"]] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "dev.txt"
    file.write_text("fine\nalso fine\nz\nfine again\n")
    message = (
        "broken gives values at hidden.1 that are not finite numbers, for row 2 of split 'dev': "
        "try --dtype float32, or drop the text (1 shard could not be made; 0 of 1 were, and are kept)"
    )
    with pytest.raises(DataError) as caught:
        run(plan_of(folder, file), tmp_path / "cache")
    assert str(caught.value) == message


def test_a_text_that_the_model_fails_on_is_named(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = LanguageModel.read
    file = tmp_path / "dev.txt"
    file.write_text("fine\nalso fine\nqqqq\nfine again\nqqqq once more\n")
    plan = plan_of(tiny_model("bert"), file)
    letter = int(plan.source.tokenize(["q"], max_length=8)[0].ids[1])

    def failing(self: LanguageModel, ids: torch.Tensor, *others: Any, **settings: Any) -> Any:
        if (ids == letter).any():
            raise IndexError("a long story\nof the model's own")
        return read(self, ids, *others, **settings)

    monkeypatch.setattr(LanguageModel, "read", failing)
    with pytest.raises(
        DataError, match=r"fails on row \d of split 'dev', row \d of split 'dev' \(IndexError: a long"
    ) as e:
        run(plan, tmp_path / "cache")
    assert {"row 2 of", "row 4 of"} == set(re.findall(r"row \d of", str(e.value)))
    assert not list((tmp_path / "cache").glob("records/*"))
    assert "drop or mend the text (1 shard could not be made" in str(e.value)


def test_a_batch_that_fails_though_no_text_does_is_an_error_of_the_model(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = LanguageModel.read
    file = tmp_path / "dev.txt"
    file.write_text("fine\nfine\n")
    failure: list[Exception] = [RuntimeError("too many")]

    def failing(self: LanguageModel, ids: torch.Tensor, *others: Any, **settings: Any) -> Any:
        if len(ids) > 1:
            raise failure[0]
        return read(self, ids, *others, **settings)

    plan = plan_of(tiny_model("bert"), file)
    monkeypatch.setattr(LanguageModel, "read", failing)
    with pytest.raises(ModelError, match=r"fails on a batch of 2 texts: RuntimeError: too many$"):
        run(plan, tmp_path / "cache")
    failure[0] = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(
        ModelError, match=r"memory is too small for batches of 256 token slots: give a smaller --batch-to"
    ):
        run(plan, tmp_path / "cache")


def test_a_model_that_overflows_everywhere_is_named_too(tiny_model: TinyModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_model("bert"), tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    for name, values in weights.items():
        if name.endswith("LayerNorm.weight"):
            values.fill_(float("inf"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "dev.txt"
    file.write_text("fine\n")
    with pytest.raises(DataError, match=r"^broken gives values at hidden\.1 that are not finite numbers, for row 0"):
        run(plan_of(folder, file), tmp_path / "cache")


def _shards(out: Path) -> int:
    return len(records(out)) if (out / "records").is_dir() else 0


def _wait_for_more_than(shards: int, out: Path) -> None:
    deadline = time.monotonic() + 60
    while _shards(out) <= shards and not (out / "manifest.json").exists() and time.monotonic() < deadline:
        time.sleep(0.001)


def test_kill_9_at_any_moment_and_then_again_gives_the_same_bytes(
    data: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("bert", classes=3, id2label=NAMES)
    out, log = tmp_path / "cache", tmp_path / "log"
    random, seen = Random(0), []
    command = [sys.executable, "-m", "tests.tiny", str(model), str(data), str(tmp_path / "whole"), str(out)]
    with (
        open(log, "wb") as errors,
        subprocess.Popen(
            command, cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        ) as server,
    ):
        assert server.stdin is not None
        assert server.stdout is not None
        duration = float(server.stdout.readline() or log.read_text())
        for number in range(12):
            server.stdin.write(b"start\n")
            server.stdin.flush()
            child = int(server.stdout.readline())
            # Early ones at any moment; later ones right after one more shard, so that there is something to resume.
            if number < 8:
                time.sleep(random.uniform(0, 0.05 * duration))
            else:
                _wait_for_more_than(seen[-1], out)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            if server.stdout.readline() != b"-9\n":
                break
            seen.append(_shards(out))
        server.stdin.write(b"start\n")
        server.stdin.close()
        server.stdout.readline()
        assert server.stdout.readline() == b"0\n", log.read_text()
    assert len(seen) >= 9
    assert seen == sorted(seen)
    assert seen[-1] > 0
    assert contents(out) == contents(tmp_path / "whole")
