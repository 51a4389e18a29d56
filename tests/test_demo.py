"""The demo's folder, and the commands that it ends with."""

import shlex
import sys
from pathlib import Path

import pytest
import torch
from clvq import cli, demo
from clvq.errors import ConfigError

from . import tiny


def test_a_folder_with_other_work_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "_packaged", lambda package: tmp_path)
    out = tmp_path / "project"
    (out / "model").mkdir(parents=True)
    (out / "model" / "weights").write_text("a month of training")
    with pytest.raises(ConfigError, match=r"project is not empty and holds no demo .it holds 'model'.: give another"):
        demo.run_demo(out, device=torch.device("cpu"))
    assert [str(path.relative_to(out)) for path in sorted(out.rglob("*"))] == ["model", "model/weights"]


def test_a_demo_that_was_stopped_is_taken_up_again(tmp_path: Path):
    (tmp_path / ".demo.json.123.aside").write_text("{")
    demo._take(tmp_path)
    (tmp_path / "data").mkdir()
    demo._take(tmp_path)


def test_the_commands_at_its_end_work_in_a_folder_with_spaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(demo, "LOWER", 1)
    monkeypatch.setattr(demo, "UPPER", 3)
    out = tmp_path / "my demo"
    out.mkdir()
    tiny.make_model(out / "model", "bert", classes=3, id2label=((0, "anger"), (1, "fear"), (2, "joy")))
    data = tiny.write_texts(tmp_path / "data", texts=160)
    tiny.run(tiny.plan_of(out / "model", data, rows="word", task="classify"), out / "cache")

    def clvq(words: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["clvq", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, capsys.readouterr().err

    settings = ("fit.epochs=1", "decoder.heads=4", "decoder.layers=1", "decoder.hidden=64")
    small = ["--codes", "8", *(word for setting in settings for word in ("--set", setting))]
    sites = ["--lower", "1", "--upper", "3", "--held-out", "dev", "--set", "encoder.epochs=1"]
    clvq(["train", str(out / "cache"), *sites, *small, "--out", str(out / "run")])
    clvq(
        [
            "ablate",
            *(str(out / name) for name in ("cache", "run")),
            "--model",
            str(out / "model"),
            "--out",
            str(out / "ablation"),
        ]
    )
    for command in demo._next_commands(out):
        # Serving would go on until it is told to stop.
        words = [word for word in shlex.split(command) if word != "--serve"]
        clvq([*words, *small] if words[0] == "train" else words)
    assert (out / "ablation-all" / "ablation.json").is_file()
    assert (out / "site" / "index.html").is_file()
