"""The studies of `examples/`: cells, limits, tables; small ones of a random model from end to end."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import clvq
import pytest
from clvq.trainer.run import Run

from .tiny import write_texts

EXAMPLES = Path(clvq.__file__).parent / "examples"
SCRIPTS = ["study.py", "results.py", "finetune.py", "movies/run.py", "jigsaw/run.py", "ag_news/run.py"]
FEW = ["--lower", "1", "--upper", "3", "--texts", "60", "--seeds", "2", "--codes", "6", "--max-length", "32"]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads a script of `examples/` by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def run_study(out: Path, model: Path, data: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "study.py"), "--model", str(model), "--data", str(data)]
    return subprocess.run(
        [*command, "--out", str(out), *FEW, *more], capture_output=True, text=True, check=False, timeout=280
    )


@pytest.fixture(scope="module")
def small_study(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three methods and two seeds of a random classifier, and one of the methods ablated; its folder, and a function
    that goes on with other options."""
    folder = tmp_path_factory.mktemp("study")
    model = tiny_model("bert", classes=3, id2label=((0, "anger"), (1, "fear"), (2, "joy")))
    data = write_texts(folder / "data", texts=80)

    def go_on(*more: str) -> subprocess.CompletedProcess[str]:
        return run_study(folder / "out", model, data, *more)

    trained = go_on("--methods", "kmeans,pca,mean-difference", "--evaluations", "")
    ablated = go_on("--methods", "kmeans", "--evaluations", "salient,all,published")
    return folder / "out", go_on, (trained, ablated)


def test_every_method_and_seed_is_trained_and_one_ablated(small_study: Any) -> None:
    out, _, (trained, ablated) = small_study
    assert (trained.returncode, ablated.returncode) == (0, 0), trained.stderr + ablated.stderr
    assert "7 of 7 cells are done" in trained.stderr
    assert "6 of 6 cells are done" in ablated.stderr
    for method in ("kmeans", "pca", "mean-difference"):
        for seed in (42, 43):
            run = Run.from_pretrained(out / "runs" / f"{method}-seed={seed}")
            assert (run.config.method, run.config.seed, run.config.held_out) == (method, seed, "dev")
            assert run.concepts == (3 if method == "mean-difference" else 6)
    found = json.loads((out / "ablations/salient/ablation.json").read_text())
    assert found["trained_texts"] == 0
    assert len(found["provenance"]["runs"]) == 2
    records = [json.loads(file.read_text()) for file in (out / "cells").rglob("*.json")]
    assert len(records) == 10
    for record in records:
        assert record["state"] == "done"
        assert record["cpu_seconds"] > 0.1
        assert record["command"].startswith("clvq ")


def test_every_number_of_the_tables_stands_in_a_file(small_study: Any) -> None:
    out, _, _ = small_study
    tables = json.loads((out / "results.json").read_text())["tables"]
    assert [table["title"][:9] for table in tables] == [
        "At a glan",
        "Fits",
        "As publis",
        "The model",
        "The model",
        "At equal ",
    ]
    numbers = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?%?")
    for table in tables:
        for row in table["rows"]:
            for field in row[1:]:
                values = []
                for source in field["sources"]:
                    found = json.loads((out / source["file"]).read_text())
                    for key in source["at"]:
                        found = found[key]
                    assert found == source["value"]
                    values.append(found)
                shown = numbers.findall(field["text"])
                assert len(shown) <= len(values)
                assert all(any(_is_shown(text, value) for value in values) for text in shown), field
    lines = (out / "results.md").read_text().splitlines()
    # The names of columns have numbers too.
    told = numbers.findall("".join(line for line in lines if line[:1] == "|" and not line.startswith("| method")))
    fields = [field["text"] for table in tables for row in table["rows"] for field in row]
    assert sorted(told) == sorted(numbers.findall(" ".join(fields)))


def _is_shown(text: str, value: float) -> bool:
    """Whether the text is the value, rounded."""
    plain = text.rstrip("%").replace(",", "").lstrip("+")
    decimals = len(plain.partition(".")[2])
    return float(plain) == pytest.approx(
        round(value * (100 if text.endswith("%") else 1), decimals), abs=0.51 * 10**-decimals * 0.02
    )


def test_what_is_done_is_not_done_again_and_a_cell_that_fails_stops_no_other(small_study: Any) -> None:
    out, go_on, _ = small_study
    before = {file: file.stat().st_mtime_ns for file in (out / "runs").rglob("*") if file.is_file()}
    # One latent is too few.
    ended = go_on("--methods", "sae,kmeans,pca", "--latents", "1", "--evaluations", "")
    assert ended.returncode == 1
    assert all(file.stat().st_mtime_ns == changed for file, changed in before.items())
    for name in ("extract", "train/pca-seed=42", "train/kmeans-seed=43"):
        assert f"{name}: done before" in ended.stderr
    failed = json.loads((out / "cells/pilot/sae.json").read_text())
    assert failed["state"] == "failed"
    assert failed["error"].startswith("Error: Invalid value for '--codes'")
    assert json.loads((out / "cells/train/sae-seed=43.json").read_text())["error"] == "pilot/sae is not done"
    text = (out / "results.md").read_text()
    assert "| pca |" in text
    assert failed["error"] in text.partition("## Not done")[2]


def test_a_limited_fit_has_the_epochs_of_its_budget(small_study: Any) -> None:
    out, go_on, _ = small_study
    told = ("--methods", "sae-few", "--seeds", "1", "--evaluations", "quality", "--at-most-epochs", "2")
    ended = go_on(*told)
    assert ended.returncode == 0, ended.stderr
    given = json.loads((out / "budgets/sae-few.json").read_text())
    assert (given["epochs"], given["wanted"]) == ({"encoder.epochs": 2}, {"encoder.epochs": 16})
    assert Run.from_pretrained(out / "runs/sae-few-seed=42").config.encoder.epochs == 2
    text = (out / "results.md").read_text()
    assert re.search(r"\| sae-few \| 16 \| 2 \| epochs \| (yes|no) \| 2 \| 600 \|", text)
    assert re.search(r"\| sae-few \| \d\.\d{3} \[", text.partition("## What concepts tell")[2])


def _cell(cells: ModuleType, name: str, *command: str, needs: tuple[str, ...] = (), made: str = "made") -> Any:
    return cells.Cell(name, lambda: command, Path(made), needs)


def test_cells_wait_for_those_that_they_need_even_where_one_fails(example: Any, tmp_path: Path) -> None:
    cells = example("study_cells")
    (tmp_path / "made").touch()
    three = [
        _cell(cells, "last", "--version", needs=("good", "bad")),
        _cell(cells, "good", "--version"),
        _cell(cells, "bad", "cache", "info", "nowhere"),
    ]
    found = cells.run_cells(three, tmp_path, jobs=2, threads=1)
    assert {name: record.state for name, record in found.items()} == {"good": "done", "bad": "failed", "last": "done"}
    assert found["bad"].error.startswith("error: nowhere is not a clvq cache")
    assert list(found)[-1] == "last"
    again = cells.run_cells(three, tmp_path, jobs=1, threads=1)
    assert {name: record.attempts for name, record in again.items()} == {"good": 1, "bad": 2, "last": 1}
    assert again["bad"].cpu_seconds > found["bad"].cpu_seconds


def test_a_cell_that_becomes_ready_goes_before_those_that_stand_after_it(example: Any, tmp_path: Path) -> None:
    cells = example("study_cells")
    (tmp_path / "made").touch()
    three = [
        _cell(cells, "first", "--version"),
        _cell(cells, "long", "--version", needs=("first",)),
        _cell(cells, "short", "--version"),
    ]
    assert list(cells.run_cells(three, tmp_path, jobs=1, threads=1)) == ["first", "long", "short"]


def test_a_cell_is_run_again_where_its_command_its_needs_or_its_file_changed(example: Any, tmp_path: Path) -> None:
    cells = example("study_cells")
    (tmp_path / "made").touch()

    def attempts(*told: str, made: str = "made") -> list[int]:
        two = [_cell(cells, "a", *told), _cell(cells, "b", "--version", needs=("a",), made=made)]
        return [record.attempts for record in cells.run_cells(two, tmp_path, jobs=1, threads=1).values()]

    assert attempts("--version") == [1, 1]
    assert attempts("--version", "--force") == [1, 1]
    assert attempts("--help") == [2, 2]
    assert attempts("--help", made="gone") == [2, 3]


def test_a_record_that_is_damaged_is_none(example: Any, tmp_path: Path) -> None:
    cells = example("study_cells")
    file = cells.record_file(tmp_path, "a/b")
    file.parent.mkdir(parents=True)
    for damaged in ("", "[]", '{"name": "a/b"}', '{"strange": 1}'):
        file.write_text(damaged)
        assert cells.read_record(tmp_path, "a/b") is None


def test_a_stop_ends_the_processes_and_is_recorded(tiny_model: Any, tmp_path: Path) -> None:
    model, data = tiny_model("bert", classes=3), write_texts(tmp_path / "data", texts=40)
    command = [sys.executable, str(EXAMPLES / "study.py"), "--model", str(model), "--data", str(data), *FEW]
    out = tmp_path / "out"
    study = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE, text=True)
    log = out / "logs" / "extract.log"
    end = time.monotonic() + 60
    while not log.is_file() and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(study.pid, signal.SIGINT)
    _, told = study.communicate(timeout=60)
    assert study.returncode == 130, told
    assert "run the same command again to go on" in told
    assert json.loads((out / "cells/extract.json").read_text())["state"] == "stopped"


def test_epochs_are_as_many_as_both_limits_allow(example: Any) -> None:
    methods = example("study_methods")
    both, paper = methods.METHODS["clvq-vae"], methods.METHODS["clvq-vae-paper"]
    cost = methods.Cost({"encoder.epochs": 10.0, "fit.epochs": 20.0}, other=100.0)
    whole = methods.budget(both, cost, epochs=20, cpu_seconds=600)
    assert (whole.epochs, whole.limited_by) == ({"encoder.epochs": 8, "fit.epochs": 4}, "nothing")
    assert whole.expected_cpu_seconds == 100 + 8 * 10 + 4 * 20
    half = methods.budget(both, cost, epochs=20, cpu_seconds=180)
    assert (half.epochs, half.limited_by) == ({"encoder.epochs": 4, "fit.epochs": 2}, "processor time")
    none = methods.budget(both, cost, epochs=20, cpu_seconds=1)
    assert none.epochs == {"encoder.epochs": 1, "fit.epochs": 1}
    capped = methods.budget(paper, methods.Cost({"fit.epochs": 1.0}, other=0.0), epochs=20, cpu_seconds=600)
    assert (capped.epochs, capped.wanted, capped.limited_by) == ({"fit.epochs": 20}, {"fit.epochs": 50}, "epochs")


def test_what_an_epoch_costs_follows_from_the_pilot(example: Any, tmp_path: Path) -> None:
    methods = example("study_methods")
    (tmp_path / "report.json").write_text(json.dumps({"held_out_rows": 25, "train_rows": 100}))
    lines = [{"phase": "encoder", "seconds": 4.0}, {"phase": "train", "seconds": 8.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Half of the time by the clock was the process's own.
    cost = methods.pilot_cost(methods.METHODS["clvq-vae"], tmp_path, cpu_seconds=20, wall_seconds=40)
    assert cost.per_epoch == {"encoder.epochs": 0.5 * 1.25 * 4, "fit.epochs": 0.5 * 1.25 * 8}
    assert cost.other == 20 - 2.5 - 5


def test_a_loss_still_falls_where_the_last_epoch_lowers_it_by_more_than_half_a_percent(example: Any) -> None:
    falling = example("study_methods").still_falling
    lines = [
        {"phase": phase, "held_out_loss_total": loss}
        for phase, losses in {"encoder": (1.0, 0.994), "train": (1.0, 0.5, 0.498), "one": (1.0,)}.items()
        for loss in losses
    ]
    assert falling(lines) == {"encoder": True, "train": False, "one": None}


def test_make_results_finds_data_and_models_by_their_endings(example: Any, tmp_path: Path) -> None:
    for folder in ("m/gte-movies", "m/bert-movies", "m/gte-ag_news", "m/other", "d/eraser-movies", "d/jigsaw"):
        (tmp_path / folder).mkdir(parents=True)
    decoder = tmp_path / "small.gguf"
    found = example("results").find(tmp_path / "m", tmp_path / "d", [decoder])
    assert [one.name for one in found] == ["movies-bert-movies", "movies-gte-movies", "movies-small", "jigsaw-small"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_it_takes(script: str, example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("script", EXAMPLES / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    told = capsys.readouterr().out
    assert "--data" in told
    assert ("--decoder" in told) == (script.endswith("run.py") or script == "results.py")


@pytest.mark.parametrize("kind", ["movies", "jigsaw", "ag_news"])
def test_a_decoder_is_asked_by_a_prompt_that_is_there(kind: str, example: Any) -> None:
    module = example("results")._script(kind)
    text = module.DECODER["prompt"].read_text(encoding="utf-8")
    assert text.count("{text}") == 1
    # The answers begin with the blank.
    assert text.removesuffix("\n").endswith(" ")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--methods", "magic"], "there is no method 'magic'"),
        (["--evaluations", "magic"], "there is no evaluation 'magic'"),
        (["--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["--answers", "a,b"], "--prompt and --answers belong together"),
    ],
)
def test_a_mistake_is_named(
    given: list[str], told: str, example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        example("study").main(["--model", "m", "--data", "d", "--out", str(tmp_path), *FEW, *given])
    assert told in capsys.readouterr().err


def test_a_fine_tuned_folder_is_one_that_extract_takes(
    example: Any, tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from clvq.pipeline.source import find_model

    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 40), ("dev", 20)):
        lines = [
            {"text": "a b" if number % 2 else "x y z", "label": ["good", "bad"][number % 2]} for number in range(count)
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = ["--model", str(tiny_model("bert")), "--data", str(data), "--out", str(tmp_path / "classifier")]
    more = ["--epochs", "8", "--lr", "3e-3", "--device", "cpu"]
    assert example("finetune").main([*told, *more]) == 0
    # Two sentences, told apart by every letter.
    assert capsys.readouterr().out.startswith("accuracy 1.000 on 20 texts, 0.500 of which are of the largest class")
    assert find_model(str(tmp_path / "classifier")).config.id2label == {0: "bad", 1: "good"}
    assert example("finetune").main([*told, *more]) == 1


def test_a_label_that_no_training_text_has_is_refused(example: Any, tiny_model: Any, tmp_path: Path) -> None:
    from clvq.errors import ConfigError

    for split, label in (("train", "good"), ("dev", "bad")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": "a", "label": label}) + "\n")
    with pytest.raises(ConfigError, match="row 0 of dev has the label 'bad', which no training text has"):
        example("finetune").finetune(str(tiny_model("bert")), str(tmp_path), tmp_path / "out")


def test_the_first_tables_of_several_studies_stand_in_one_file(small_study: Any, example: Any, tmp_path: Path) -> None:
    out, _, _ = small_study
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "feelings").symlink_to(out)
    example("study_tables").write_overview(tmp_path, ["feelings", "unfinished", "missing"])
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# Results", "## feelings"]
    assert "[All tables](feelings/results.md)" in lines
    (first, *_) = json.loads((out / "results.json").read_text())["tables"]
    assert [line for line in lines if line.startswith("| ") and not line.startswith("| method")] == [
        f"| {' | '.join(field['text'] for field in row)} |" for row in first["rows"]
    ]
    assert first["about"] in lines


def test_an_autoencoder_loses_the_subspace_of_its_latents_too(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = example("study")
    monkeypatch.setattr(module, "_finished", lambda *_: True)
    wanted = module.Study(model="m", data="d", out=tmp_path, lower="1", upper="2", methods=("sae", "kmeans"))
    cells = {cell.name: cell.command() for cell in module.cells_of(wanted, "") if cell.name.endswith("published")}
    removals = {name: command[command.index("--removal") + 1] for name, command in cells.items()}
    assert removals == {
        "ablations/sae/published": "projection,subspace",
        "ablations/kmeans/published": "projection",
    }
