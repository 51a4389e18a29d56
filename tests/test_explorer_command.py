"""`clvq explore` as a user runs it."""

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from .commands import Command, command_of
from .worded import make_worded, train


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_of(monkeypatch, capsys)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    train(make_worded(folder / "cache").cache, folder / "run")
    return folder


def test_a_site_is_built_drawn_and_left_as_it_is_the_next_time(command: Command, made: Path, tmp_path: Path):
    words = ("explore", made / "cache", made / "run", "--out", tmp_path / "site", "--rationale", "evidence")
    first = command(*words, "--figures", tmp_path / "charts")
    assert (first.code, first.err) == (0, "")
    assert "concepts of run; 120 of 120 texts;" in first.out
    assert f"open it: {tmp_path / 'site' / 'index.html'}" in first.out
    charts = sorted(path.name for path in (tmp_path / "charts").iterdir())
    assert charts == ["r0-map.png", "r0-map.svg", "r0-purity.png", "r0-purity.svg"]
    again = json.loads(command(*words, "--json").out)
    assert again["unchanged"]
    by_report = command("report", tmp_path / "site")
    assert by_report.out == f"{tmp_path / 'site-charts'}: 4 charts of {tmp_path / 'site'}, as SVG and PNG\n"
    for name in charts:
        assert (tmp_path / "site-charts" / name).read_bytes() == (tmp_path / "charts" / name).read_bytes()


def test_a_site_is_served_without_its_model_until_it_is_told_to_stop(made: Path, tmp_path: Path):
    code = "from clvq.cli import main; main()"
    words = ["explore", *(str(made / name) for name in ("cache", "run")), "--out", str(tmp_path / "site")]
    started = subprocess.Popen(
        [sys.executable, "-c", code, *words, "--serve", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: list[str] = []
    while not lines or not lines[-1].startswith("serving"):
        lines.append(started.stdout.readline())  # type: ignore[union-attr]
        assert lines[-1]
    address = lines[-1].split()[-1]
    with urllib.request.urlopen(f"{address.rstrip('/')}/data/site.js", timeout=10) as answer:
        assert b'"live":false' in answer.read().replace(b" ", b"")
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=30)[1]
    assert started.returncode == 130
    assert "the pages are served without the model, so that nothing can be removed" in said
    assert "say where it is with --model FOLDER" in said


def test_mistakes_are_one_line(command: Command, made: Path, tmp_path: Path):
    def line(*words: object) -> str:
        ended = command("explore", made / "cache", made / "run", "--out", tmp_path / "site", *words)
        assert (ended.code, ended.err.count("\n")) == (1, 1)
        return ended.err

    assert "reasons" in line("--rationale", "reasons")
    assert "holds no ablation.json: give the folder that `clvq ablate --out` wrote" in line("--ablation", tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "thesis.txt").write_text("mine")
    assert "thesis.txt" in line()
