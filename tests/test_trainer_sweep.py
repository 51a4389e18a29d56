"""Many runs: which there are, that sharing changes no byte, and that failures and stops stay where they belong."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import clvq
import numpy as np
import pytest
import torch
from clvq import cli
from clvq.cache.files import only_writer
from clvq.errors import ConfigError, FolderInUse, Interrupted
from clvq.evaluation.compare import compare, over_seeds
from clvq.progress import Silent
from clvq.trainer.config import TrainConfig, preset_config, with_overrides
from clvq.trainer.fit import fit
from clvq.trainer.run import Run
from clvq.trainer.sweep import Member, members, train_all
from sklearn.metrics import adjusted_mutual_info_score

from .caches import LOWER, UPPER

CPU = torch.device("cpu")
SMALL = {"decoder.layers": "1", "decoder.heads": "2", "decoder.hidden": "8", "fit.epochs": "1"}


def _base(preset: str = "default", **changes: str) -> TrainConfig:
    small = SMALL | ({"encoder.epochs": "2"} if preset == "default" else {})
    return with_overrides(preset_config(preset, lower=LOWER, upper=UPPER, codes=9, held_out="dev"), small | changes)


class _Counts(Silent):
    """Notes which tasks were begun, and stops the work at its `after`-th safe point."""

    def __init__(self, *, after: int = -1) -> None:
        self.tasks: list[str] = []
        self.left = after

    def begin(self, task: str, total: int | None, unit: str) -> None:
        self.tasks.append(task)

    def advance(self, amount: int = 1, **figures: float) -> None:
        self.check()

    def check(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Interrupted("stopped", signal_number=signal.SIGTERM)


def _same(one: Path, other: Path) -> bool:
    return all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in ("config.json", "model.safetensors")
    )


def test_a_sweep_is_every_combination_with_every_seed():
    found = members(_base(), ["codes=9,10", "optimizer.name=adam,adamw"], seeds=2)
    assert [member.name for member in found] == [
        f"codes={codes}-optimizer.name={name}-seed={seed}"
        for codes in (9, 10)
        for name in ("adam", "adamw")
        for seed in (42, 43)
    ]
    for member in found:
        config = member.config
        assert (
            member.name == f"codes={config.quantizer.codes}-optimizer.name={config.optimizer.name}-seed={config.seed}"
        )
        assert with_overrides(_base(), member.overrides()) == config


def test_folder_names_are_safe_and_differ():
    found = members(_base(), ['split=["train"],["a/b"],["a:b"]'], seeds=1)
    assert len({member.name for member in found}) == 3
    assert not any(set(member.name) & set('/\\:"[] ') for member in found)
    assert [member.config.split for member in found] == [("train",), ("a/b",), ("a:b",)]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (["code=1,2"], "there is no setting 'code'"),
        (["fit.epochs=many"], "fit.epochs cannot be 'many'"),
        (["codes"], "write it as name=value,value"),
        (["codes="], "write it as name=value,value"),
        (["codes=9,9"], "gives codes=9-seed=42 twice"),
        (["encoder.dropout=0,0.0"], "gives encoder.dropout=0.0-seed=42 twice"),
        (["codes=9", "quantizer.codes=10"], "names quantizer.codes twice"),
        (["seed=1,2"], "give --seed for the first seed"),
        (["preset=paper"], "choose another --method or --preset"),
    ],
)
def test_a_sweep_that_cannot_be_meant_is_refused(sweep: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        members(_base(), sweep, seeds=1)


@pytest.mark.parametrize(
    ("setting", "shares"),
    [
        ("codes=9,10", True),
        ("decoder.hidden=8,16", True),
        ("start.iterations=3,4", True),
        ("fit.epochs=1,2", True),
        ("encoder.dropout=0,0.5", False),
        ("optimizer.lr=0.1,0.2", False),
        ("fit.precision=float32,bfloat16", False),
        ("special=all,none", False),
    ],
)
def test_only_what_comes_after_the_encoder_may_differ_where_it_is_shared(setting: str, shares: bool):
    one, other = members(_base(), [setting], seeds=1)
    assert (one.before_codes == other.before_codes) is shares


def test_seeds_share_nothing():
    one, other = members(_base(), [], seeds=2)
    assert one.before_codes != other.before_codes


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_what_is_shared_is_done_once_and_changes_no_byte(preset: str, small_cache: clvq.Cache, tmp_path: Path):
    shared = tmp_path / "shared.safetensors"
    first, _, _, last = members(_base(preset), ["codes=9,12", "decoder.hidden=8,16"], seeds=1)
    for number, member in enumerate([first, last]):
        whole, part, tasks = tmp_path / f"whole-{number}", tmp_path / member.name, _Counts()
        fit(small_cache, member.config, whole, device=CPU)
        fit(small_cache, member.config, part, device=CPU, shared=shared, progress=tasks)
        assert _same(whole, part)
        once = {"statistics", "encoder"} if preset == "default" else {"statistics"}
        assert set(tasks.tasks) & {"statistics", "encoder"} == (once if number == 0 else set())
        lines = [
            [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (whole, part)
        ]
        for one, other in zip(*lines, strict=True):
            timed = {"seconds", "rows_per_second", "loader_wait_share"}
            assert {k: v for k, v in one.items() if k not in timed} == {
                k: v for k, v in other.items() if k not in timed
            }


@pytest.mark.parametrize("after", [1, 12])
def test_a_run_that_took_over_may_be_stopped(after: int, small_cache: clvq.Cache, tmp_path: Path):
    one, other = (member.config for member in members(_base(), ["codes=9,12"], seeds=1))
    shared = tmp_path / "shared.safetensors"
    fit(small_cache, one, tmp_path / "one", device=CPU, shared=shared)
    fit(small_cache, other, tmp_path / "whole", device=CPU)
    with pytest.raises(Interrupted):
        fit(small_cache, other, tmp_path / "part", device=CPU, shared=shared, progress=_Counts(after=after))
    fit(small_cache, other, tmp_path / "part", device=CPU, shared=shared)
    assert _same(tmp_path / "whole", tmp_path / "part")


# A process that stands for a training: quick to start, and the test says what it does.
CHILD = """
import pathlib, signal, sys, time
folder, shared = map(pathlib.Path, sys.argv[1:])
folder.mkdir()
started = time.monotonic()
def saved(*_):
    (folder / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, saved)
(folder / "ready").touch()
"""


def _child(body: str):
    code = CHILD + textwrap.dedent(body)
    return lambda member, folder, shared: [sys.executable, "-I", "-S", "-c", code, str(folder), str(shared)]


def _train_all(chosen: list[Member], out: Path, body: str, *, jobs: int, progress=None) -> dict[str, str]:
    return train_all(chosen, out, _child(body), cache_id="c" * 64, jobs=jobs, progress=progress or Silent())


def test_a_run_that_fails_stops_no_other(tmp_path: Path):
    chosen = members(_base(), ["codes=9,10,11,12"], seeds=1)
    body = """
    if "=10-" in folder.name:
        sys.exit("error: no room for ten")
    if "=11-" in folder.name:
        import os
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "done").touch()
    """
    failed = _train_all(chosen, tmp_path, body, jobs=2)
    assert failed == {"codes=10-seed=42": "no room for ten", "codes=11-seed=42": "ended by SIGKILL"}
    assert [(tmp_path / member.name / "done").exists() for member in chosen] == [True, False, False, True]


def test_others_wait_for_the_encoder_of_one_and_then_go_on_beside_it(tmp_path: Path):
    body = """
    first = not shared.exists()
    if first:
        time.sleep(0.2)
        (folder / "first").touch()
        shared.touch()
        while not list(folder.parent.glob("*/second")):
            time.sleep(0.01)
    else:
        (folder / "second").touch()
    """
    chosen = members(_base(), ["codes=9,10,11"], seeds=1)
    assert _train_all(chosen, tmp_path, body, jobs=3) == {}
    assert [(tmp_path / member.name / "first").exists() for member in chosen] == [True, False, False]
    assert not list(tmp_path.glob("*.safetensors"))


def test_where_the_one_ahead_fails_the_next_takes_its_place(tmp_path: Path):
    body = """
    if "=9-" in folder.name:
        sys.exit(1)
    shared.touch()
    """
    failed = _train_all(members(_base(), ["codes=9,10,11"], seeds=1), tmp_path, body, jobs=3)
    assert failed == {"codes=9-seed=42": "ended with exit status 1"}


def test_no_more_than_jobs_run_at_once(tmp_path: Path):
    body = """
    beside = [ready for ready in folder.parent.glob("*/ready") if not (ready.parent / "over").exists()]
    time.sleep(0.1)
    (folder / "over").touch()
    sys.exit(0 if len(beside) <= 2 else "too many")
    """
    assert _train_all(members(_base(), [], seeds=5), tmp_path, body, jobs=2) == {}


def test_a_stop_reaches_all_and_all_save(tmp_path: Path):
    class Stops(Silent):
        def advance(self, amount: int = 1, **figures: float) -> None:
            if len(list(tmp_path.glob("*/ready"))) == 2:
                raise Interrupted("stopped", signal_number=signal.SIGINT)

    with pytest.raises(Interrupted):
        _train_all(members(_base(), [], seeds=3), tmp_path, "time.sleep(600)", jobs=2, progress=Stops())
    assert len(list(tmp_path.glob("*/saved"))) == 2


def test_a_sweep_into_a_run_is_refused(tmp_path: Path):
    (tmp_path / "config.json").touch()
    with pytest.raises(ConfigError, match="is a run, and a sweep needs a folder"):
        _train_all(members(_base(), [], seeds=2), tmp_path, "", jobs=1)


def _words(cache: clvq.Cache, out: Path) -> list[str]:
    settings = [
        word for name, value in (SMALL | {"encoder.epochs": "2"}).items() for word in ("--set", f"{name}={value}")
    ]
    words = ["train", str(cache.path), "--lower", "1", "--upper", "2", "--held-out", "dev", *settings]
    return [*words, "--sweep", "codes=9,12", "--seeds", "2", "--out", str(out), "--json"]


def test_a_sweep_killed_and_begun_again_makes_the_runs_that_train_alone_makes(
    small_cache: clvq.Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "sweep"
    words = _words(small_cache, out)
    killed = subprocess.Popen([sys.executable, "-P", "-m", "clvq.cli", *words], stdout=subprocess.DEVNULL)
    while not list(out.glob("*/model.safetensors")):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    done = {file: file.stat().st_mtime_ns for file in out.glob("*/model.safetensors")}
    for folder in out.glob("*/"):
        _wait_until_free(folder)

    monkeypatch.setattr(sys, "argv", ["clvq", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert result["failed"] == {}
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert [row["settings"] for row in result["rows"]] == [{"codes": 9}, {"codes": 12}]
    assert json.loads((out / "sweep.json").read_bytes())["rows"] == result["rows"]
    for row in result["rows"]:
        assert row["runs"] == [f"codes={row['settings']['codes']}-seed={seed}" for seed in (42, 43)]
        for name, seed in zip(row["runs"], (42, 43), strict=True):
            alone = with_overrides(_base(), {"quantizer.codes": str(row["settings"]["codes"]), "seed": str(seed)})
            fit(small_cache, alone, tmp_path / name, device=CPU)
            assert _same(tmp_path / name, out / name)
        reports = [json.loads((out / name / "report.json").read_bytes()) for name in row["runs"]]
        figure = row["figures"]["own_code_fvu"]
        assert figure["mean"] == pytest.approx(np.mean([report["own_code_fvu"] for report in reports]))
        assert figure["seeds"] == 2


def _wait_until_free(folder: Path) -> None:
    """Until the processes of a sweep that was killed have noticed and ended."""
    while True:
        try:
            with only_writer(folder):
                return
        except FolderInUse:
            time.sleep(0.02)


def test_torchrun_and_a_sweep_are_refused_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, small_cache: clvq.Cache
):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["clvq", *_words(small_cache, tmp_path / "sweep")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: --sweep and --seeds train whole runs side by side")


def test_the_interval_over_seeds_is_student_s():
    found = over_seeds(np.array([1.0, 2.0, 3.0]))
    # A table's t at 97.5 % and 2 degrees of freedom.
    assert (found.mean, found.seeds) == (2.0, 3)
    assert (found.low, found.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    alone = over_seeds(np.array([5.0]))
    assert (alone.mean, alone.low, alone.high, alone.seeds) == (5.0, None, None, 1)


def test_seeds_are_compared_on_the_rows_that_they_held_out(small_cache: clvq.Cache, tmp_path: Path):
    paths = [tmp_path / member.name for member in members(_base(), [], seeds=2)]
    for member, path in zip(members(_base(), [], seeds=2), paths, strict=True):
        fit(small_cache, member.config, path, device=CPU)
    found = compare(
        small_cache, {"seeds": paths, "itself": [paths[0]] * 2, "one": paths[:1], "none": []}, progress=Silent()
    )

    rows = small_cache.rows_of(small_cache.splits(["dev"]))
    rows = rows[np.isin(small_cache.column("special")[rows], (0, 1))]
    lower = small_cache.vectors(LOWER, rows)
    codes = [Run.from_pretrained(path).assign(lower) for path in paths]
    seeds, itself = found["seeds"], found["itself"]
    assert seeds.assignments is not None
    assert seeds.assignments.mean == pytest.approx(adjusted_mutual_info_score(*codes))
    assert itself.assignments is not None
    assert itself.directions is not None
    assert seeds.directions is not None
    assert itself.assignments.mean == pytest.approx(1)
    assert itself.directions.mean == pytest.approx(1)
    assert seeds.directions.mean < 0.999
    assert (found["one"].directions, found["one"].assignments, found["none"].figures) == (None, None, {})
    reports = [json.loads((path / "report.json").read_bytes()) for path in paths]
    for name, figure in seeds.figures.items():
        assert figure.mean == pytest.approx(np.mean([report[name] for report in reports]))
