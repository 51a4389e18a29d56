"""Training by several processes: what equals one process, how all stop and go on together, and what is noticed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clvq
import pytest
import torch
from clvq.errors import ClvqError
from clvq.trainer import ranks
from clvq.trainer.config import DecoderConfig
from clvq.trainer.decoders import CodesDecoder, MemoryDecoder
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("rank_processes.py")
DIFFER, REFUSED, STOPPED = 3, 4, 128 + signal.SIGTERM
PRESETS = ["default", "paper"]
EVERY_STEP = {"fit.checkpoint_minutes": 1e-9}
# Figures that depend on the clock.
TIMED = {"seconds", "rows_per_second", "loader_wait_share", "train_seconds"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def codes(small_cache: clvq.Cache, folder: Path) -> dict[str, list[int]]:
    """Exit codes of all forked jobs, by name; each leaves a run of its name in `folder`."""
    jobs: dict[str, dict[str, Any]] = {}

    def job(name: str, preset: str, number: int, **rest: Any) -> None:
        jobs[name] = {"out": str(folder / name), "preset": preset, "ranks": number, **rest}

    for preset in PRESETS:
        for number in (1, 2, 3):
            job(f"{preset} {number}", preset, number)
        # A batch of at most two texts, or rows, leaves some of three ranks without any.
        few = {"fit.texts_per_batch": 2, "fit.epochs": 1}
        if preset == "default":
            few |= {"encoder.rows_per_batch": 2, "encoder.epochs": 1}
        for number in (1, 3):
            job(f"{preset} few {number}", preset, number, settings=few)
        job(f"{preset} stopped", preset, 2, harm="stop", rank=1, step=11)
        job(f"{preset} gone on", preset, 2, copied=str(folder / f"{preset} stopped"))
    job("paper by one", "paper", 1, copied=str(folder / "paper stopped"))
    job("drifted", "paper", 2, harm="drift", rank=1, step=11)
    (folder / "no run").mkdir()
    (folder / "no run" / "letter.txt").write_text("not to be lost")
    job("no run", "paper", 2)
    told = [{"cache": str(small_cache.path), **each} for each in jobs.values()]
    done = _run([sys.executable, str(SCRIPT), "jobs", json.dumps(told)])
    assert done.returncode == 0, done.stderr
    return dict(zip(jobs, map(json.loads, done.stdout.splitlines()), strict=True))


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )


def _launched(job: dict[str, Any], *options: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    return _run([*launcher, str(SCRIPT), "train", json.dumps(job)])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("one", "many"), [("1", "2"), ("1", "3"), ("few 1", "few 3")])
def test_many_ranks_equal_one_on_the_joined_batch(
    preset: str, one: str, many: str, codes: dict[str, list[int]], folder: Path
) -> None:
    """The few leave ranks without any text of a batch."""
    assert set(codes[f"{preset} {one}"] + codes[f"{preset} {many}"]) == {0}
    _close(folder / f"{preset} {one}", folder / f"{preset} {many}")


@pytest.mark.parametrize("preset", PRESETS)
def test_asked_of_one_rank_all_stop_at_the_same_step_and_go_on_to_the_same_bytes(
    preset: str, codes: dict[str, list[int]], folder: Path
) -> None:
    assert codes[f"{preset} stopped"] == [STOPPED, STOPPED]
    assert codes[f"{preset} gone on"] == [0, 0]
    assert (folder / f"{preset} stopped" / "checkpoint.safetensors").exists()
    _same(folder / f"{preset} 2", folder / f"{preset} gone on")


def test_another_number_of_ranks_goes_on(codes: dict[str, list[int]], folder: Path) -> None:
    assert codes["paper by one"] == [0]
    _close(folder / "paper 1", folder / "paper by one")


def test_a_rank_that_drifted_ends_all(codes: dict[str, list[int]], folder: Path) -> None:
    assert codes["drifted"] == [DIFFER, DIFFER]
    assert not (folder / "drifted" / "model.safetensors").exists()


def test_what_rank_0_refuses_ends_all_and_harms_nothing(codes: dict[str, list[int]], folder: Path) -> None:
    assert codes["no run"] == [REFUSED, REFUSED]
    assert [file.name for file in (folder / "no run").iterdir()] == ["letter.txt"]


def test_torchrun_restarts_after_a_rank_was_killed_and_the_bytes_are_the_same(
    codes: dict[str, list[int]], folder: Path, small_cache: clvq.Cache, tmp_path: Path
) -> None:
    job = {"cache": str(small_cache.path), "out": str(tmp_path / "run"), "preset": "paper", "settings": EVERY_STEP}
    done = _launched(job | {"harm": "kill", "rank": 1, "step": 13}, "--max-restarts", "1")
    assert done.returncode == 0, done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr or "exitcode: -9" in done.stderr, done.stderr
    _same(folder / "paper 2", tmp_path / "run")


def test_a_stop_of_torchrun_saves_and_the_next_one_goes_on_to_the_same_bytes(
    codes: dict[str, list[int]], folder: Path, small_cache: clvq.Cache, tmp_path: Path
) -> None:
    job = {"cache": str(small_cache.path), "out": str(tmp_path / "run"), "preset": "paper", "ranks": 2}
    stopped = _launched(job | {"harm": "stop launcher", "rank": 0, "step": 13})
    assert stopped.returncode != 0
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert "checkpoint.safetensors" in names
    assert "model.safetensors" not in names
    done = _run([sys.executable, str(SCRIPT), "jobs", json.dumps([job])])
    assert json.loads(done.stdout) == [0, 0], done.stderr
    _same(folder / "paper 2", tmp_path / "run")


def test_without_torchrun_there_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with ranks.process_group(torch.device("cpu")) as device:
        assert device == torch.device("cpu")
        assert not torch.distributed.is_initialized()


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 0,
    }.items():
        monkeypatch.setenv(name, str(value))
    yield
    assert not torch.distributed.is_initialized()


def test_the_group_ends_with_what_it_was_joined_for(group_of_one: None) -> None:
    def fails() -> None:
        with ranks.process_group(torch.device("cpu")):
            assert torch.distributed.get_backend() == "gloo"
            raise ClvqError("amiss")

    with pytest.raises(ClvqError, match="amiss"):
        fails()


@pytest.mark.parametrize("decoder", [CodesDecoder, MemoryDecoder])
def test_no_texts_decode_to_no_rows_and_have_a_gradient_of_zero(decoder: type[torch.nn.Module]) -> None:
    config = DecoderConfig(layers=2, heads=2, hidden=4, dropout=0.1)
    codes, mask = torch.zeros(0, 0, 8), torch.zeros(0, 0, dtype=torch.bool)
    if decoder is CodesDecoder:
        rows = CodesDecoder(config, width=8)(codes, mask, torch.zeros(0, 0, dtype=torch.int64))
    else:
        rows = MemoryDecoder(config, width=8, d_upper=6)(codes, codes, mask)
    assert rows.shape == (0, 0, 8 if decoder is CodesDecoder else 6)
    rows.sum().backward()


def _model(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def _figures(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines.append(json.loads((run / "report.json").read_bytes()))
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def _same(one: Path, other: Path) -> None:
    assert (other / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
    assert _figures(other) == _figures(one)


def _close(one: Path, other: Path) -> None:
    """Each code with as many rows, and all else equal but for the rounding of sums."""
    wanted, found = _model(one), _model(other)
    assert torch.equal(found["tables.counts"], wanted["tables.counts"])
    for name, tensor in wanted.items():
        if name.endswith("in_proj_bias"):
            # Attention is the same whatever its keys' bias: Adam makes steps of the rounding of a gradient of zero.
            tensor.view(3, -1)[1] = found[name].view(3, -1)[1]
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4, msg=f"{name} differs")
    for line, figures in zip(_figures(one), _figures(other), strict=True):
        for name, value in line.items():
            # Of each rank's own batch, padded by itself.
            if name != "real_slots_share":
                assert figures[name] == (
                    pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
                ), name
