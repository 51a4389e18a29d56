"""The command: what it prints, how it fails, how it stops."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import clvq
import pytest

from . import tiny
from .commands import Command, command_of


@dataclass(frozen=True)
class World:
    """A tiny classifier, texts, and a cache and run made from them with the command."""

    folder: Path
    model: Path
    data: Path
    cache: Path
    run: Path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_of(monkeypatch, capsys)


def _clvq(*words: object) -> list[str]:
    return [sys.executable, "-c", "from clvq.cli import main; main()", *map(str, words)]


def _extract(world: World, out: Path, **options: object) -> list[object]:
    given = {"sites": "1,3", "rows": "word", "task": "classify"} | options
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    return ["extract", world.model, world.data, *words, "--out", out, "--max-length", 32]


TRAIN = ("--lower", 1, "--upper", 3, "--codes", 8, "--held-out", "dev", "--set", "fit.epochs=1",
         "--set", "encoder.epochs=1", "--set", "decoder.heads=4")  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    model = tiny.make_model(folder / "model", "bert", classes=3, id2label=((0, "anger"), (1, "fear"), (2, "joy")))
    data = tiny.write_texts(folder / "data", texts=160)
    world = World(folder, model, data, folder / "cache", folder / "run")
    for words in (
        _extract(world, world.cache),
        ["train", world.cache, *TRAIN, "--out", world.run],
    ):
        subprocess.run(
            _clvq(*words),
            check=True,
            capture_output=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    return world


def test_dry_run_prints_the_plan_and_writes_nothing(world: World, command: Command, tmp_path: Path):
    ended = command(*_extract(world, tmp_path / "c"), "--dry-run", "--json")
    plan = json.loads(ended.out)
    assert ended.code == 0
    assert not (tmp_path / "c").exists()
    made = clvq.Cache(world.cache).manifest
    assert plan["rows"] == made.geometry.rows
    assert plan["shards"] == made.geometry.shards
    size = sum(file.stat().st_size for file in world.cache.rglob("*") if file.is_file())
    assert size <= plan["bytes_at_most"]


def test_json_is_one_object_and_nothing_else(world: World, command: Command, tmp_path: Path):
    for words in (
        ["cache", "info", world.cache],
        ["cache", "verify", world.cache],
        _extract(world, world.cache),
        ["train", world.cache, *TRAIN, "--out", world.run],
        ["ablate", world.cache, world.run, "--model", world.model, "--out", tmp_path / "a", "--read-out", "model"],
    ):
        ended = command(*words, "--json")
        assert ended.code == 0, ended.err
        assert isinstance(json.loads(ended.out), dict)
        assert ended.err == ""


def test_the_ablation_table_shows_every_control(world: World, command: Command, tmp_path: Path):
    ended = command("ablate", world.cache, world.run, "--model", world.model, "--out", tmp_path / "a")
    assert ended.code == 0, ended.err
    for word in ("own code", "random code", "matched random", "mean direction", "nothing", "95 %"):
        assert word in ended.out
    assert re.search(r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", ended.out)


def test_the_ablation_table_is_never_cut_to_fit(world: World, command: Command, tmp_path: Path):
    long = tmp_path / "a run with a name that is longer than any table has room for"
    shutil.copytree(world.run, long)
    ended = command("ablate", world.cache, world.run, long, "--model", world.model, "--out", tmp_path / "a b")
    assert ended.code == 0, ended.err
    assert "…" not in ended.out
    # Two read-outs and two removals: the own code and seven controls, and two differences from the other run.
    assert ended.out.count(long.name) == 2 * 2 * (8 + 2)
    assert re.search(r"nothing \(\d+ texts\)", ended.out)
    assert f"{tmp_path / 'a b'} holds this table" in ended.out


def test_the_only_split_is_trained_on_whatever_it_is_called(world: World, command: Command, tmp_path: Path):
    shutil.copy(world.data / "train.jsonl", tmp_path / "reviews.jsonl")
    alone = World(world.folder, world.model, tmp_path / "reviews.jsonl", tmp_path / "c", tmp_path / "r")
    assert command(*_extract(alone, alone.cache)).code == 0
    words = [word for word in TRAIN if word not in ("--held-out", "dev")]
    ended = command("train", alone.cache, *words, "--out", alone.run)
    assert ended.code == 0, ended.err
    assert json.loads((alone.run / "config.json").read_bytes())["config"]["split"] == ["reviews"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_knows_few_characters_gets_what_it_can_show(world: World, encoding: str):
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    for words in (["cache", "info", world.cache], ["cache", "info", world.cache, "--json"], ["extract", "-h"]):
        ended = subprocess.run(_clvq(*words), capture_output=True, env=env, check=True)
        assert ended.stderr == b""
        shown = ended.stdout.decode(encoding)
        if "--json" in words:
            assert "32 × bf16" in json.loads(shown)["sites"]["hidden.1"]


def test_version_and_usage(command: Command):
    assert command("--version").out.strip() == clvq.__version__
    assert command("extract").code == 2
    assert command("no-such-command").code == 2
    assert command("train", "cache", "--nonsense", 1).code == 2


MISTAKES = {
    "no model": (
        ["extract", "{tmp}/none", "{data}", "--sites", "1", "--out", "{tmp}/c"],
        r"error: .*/none is not a folder: give a Hugging Face model folder, or the name of a Hub model",
    ),
    "no Hub model": (
        ["extract", "nobody/nothing", "{data}", "--sites", "1", "--out", "{tmp}/c"],
        r"error: 'nobody/nothing' is no local folder, and could not be had from the Hub: .*",
    ),
    "no data": (
        ["extract", "{model}", "{tmp}/none.csv", "--sites", "1", "--out", "{tmp}/c"],
        r"error: .*/none.csv does not exist: give a file or folder, or the name of a data set on the Hub",
    ),
    "no field": (
        ["extract", "{model}", "{data}", "--sites", "1", "--text-field", "body", "--out", "{tmp}/c"],
        r"error: .*dev.jsonl has no field 'body'; it has 'text', 'label', 'doc': see --text-field, .*",
    ),
    "site too high": (
        ["extract", "{model}", "{data}", "--sites", "4", "--out", "{tmp}/c"],
        r"error: site hidden.4 is beyond the last layer: model has 3 blocks, so its sites are hidden.0 .* … hidden.3",
    ),
    "empty file": (
        ["extract", "{model}", "{empty}", "--sites", "1", "--out", "{tmp}/c"],
        r"error: .*empty.jsonl holds no texts",
    ),
    "not a number of rows": (
        ["extract", "{model}", "{data}", "--sites", "1", "--rows", "sentence", "--out", "{tmp}/c"],
        r"error: --rows sentence: input should be 'token' or 'word'",
    ),
    "a prompt without its task": (
        ["extract", "{model}", "{data}", "--sites", "1", "--answers", "no,yes", "--out", "{tmp}/c"],
        r"error: --answers is for --task prompt, and --task is none",
    ),
    "a task without its prompt": (
        ["extract", "{model}", "{data}", "--sites", "1", "--task", "prompt", "--out", "{tmp}/c"],
        r"error: --task prompt needs --prompt FILE and --answers, such as --answers negative,positive",
    ),
    "an unknown policy": (
        ["extract", "{model}", "{data}", "--sites", "1", "--special", "hide", "--out", "{tmp}/c"],
        r"error: --special hide: input should be 'mark', 'keep' or 'drop'",
    ),
    "other settings": (
        ["extract", "{model}", "{data}", "--sites", "1,3", "--rows", "token", "--max-length", 32, "--out", "{cache}"],
        r"error: .*cache holds an extraction with other settings \(.*settings.rows: \"word\" there, \"token\" now.*"
        r": give another --out, or --force to delete it",
    ),
    "no cache": (
        ["train", "{tmp}/none", "--lower", 1, "--upper", 3, "--out", "{tmp}/r"],
        r"error: .*/none is not a clvq cache: it does not exist; make one with `clvq extract … --out .*/none`",
    ),
    "no such site": (
        ["train", "{cache}", "--lower", 2, "--upper", 3, "--out", "{tmp}/r"],
        r"error: .*/cache holds no site 'hidden.2'; it holds hidden.1, hidden.3",
    ),
    "fewer rows than codes": (
        ["train", "{cache}", "--lower", 1, "--upper", 3, "--codes", 100000, "--out", "{tmp}/r"],
        r"error: .*100,?000.*--codes.*",
    ),
    "unknown setting": (
        ["train", "{cache}", "--lower", 1, "--upper", 3, "--set", "fit.epoch=3", "--out", "{tmp}/r"],
        r"error: .*fit.*epochs.*",
    ),
    "setting without value": (
        ["train", "{cache}", "--lower", 1, "--upper", 3, "--set", "fit.epochs", "--out", "{tmp}/r"],
        r"error: --set fit.epochs: write it as name=value, such as fit.epochs=20",
    ),
    "no such device": (
        ["train", "{cache}", "--lower", 1, "--upper", 3, "--device", "cuda:99", "--out", "{tmp}/r"],
        r"error: --device cuda:99: there are \d+ CUDA devices here; try --device cpu",
    ),
    "no run": (
        ["ablate", "{cache}", "{tmp}/none", "--model", "{model}", "--out", "{tmp}/a"],
        r"error: .*/none .*run.*",
    ),
    "no model said": (
        ["ablate", "{cache}", "{run}", "--out", "{tmp}/a"],
        r"error: .*/cache was made with the local model 'model'; say where it is with --model FOLDER",
    ),
    "another model": (
        ["ablate", "{cache}", "{run}", "--model", "{other}", "--out", "{tmp}/a"],
        r"error: other is not the model that the cache was made with \(model\): weights.model.safetensors: .*",
    ),
    "no read-out": (
        ["ablate", "{cache}", "{run}", "--model", "{model}", "--read-out", "", "--out", "{tmp}/a"],
        r"error: --read-out '': tuple should have at least 1 item.*",
    ),
    "no removal": (
        ["ablate", "{cache}", "{run}", "--model", "{model}", "--removal", "", "--out", "{tmp}/a"],
        r"error: --removal '': tuple should have at least 1 item.*",
    ),
    "no sites": (
        ["extract", "{model}", "{data}", "--sites", "", "--out", "{tmp}/c"],
        r"error: no site is asked for; give --sites, such as --sites 8,12",
    ),
    "an unknown encoding": (
        ["cache", "recode", "{cache}", "--encoding", "fp8", "--out", "{tmp}/c"],
        r"error: --encoding fp8: give bf16, fp16, fp32, int8",
    ),
    "the same encoding": (
        ["cache", "recode", "{cache}", "--encoding", "bf16", "--out", "{tmp}/c"],
        r"error: .*/cache is stored as bf16 already",
    ),
    "an unknown read-out": (
        ["ablate", "{cache}", "{run}", "--model", "{model}", "--read-out", "tea", "--out", "{tmp}/a"],
        r"error: --read-out tea: input should be 'model' or 'probe'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do_and_leaves_nothing_behind(
    mistake: str, world: World, command: Command, tmp_path: Path
):
    words, expected = MISTAKES[mistake]
    (tmp_path / "empty.jsonl").write_text("")
    if "{other}" in words:
        tiny.make_model(tmp_path / "other", "bert", classes=3, seed=1, id2label=((0, "anger"), (1, "fear"), (2, "joy")))
    names = {"tmp": tmp_path, "empty": tmp_path / "empty.jsonl", "other": tmp_path / "other"}
    names |= {name: getattr(world, name) for name in ("model", "data", "cache", "run")}
    before = sorted(tmp_path.iterdir())
    ended = command(*(str(word).format(**names) for word in words))
    assert ended.code == 1
    assert ended.out == ""
    assert ended.err.count("\n") == 1
    assert re.fullmatch(expected, ended.err.strip()), ended.err
    left = [path for path in sorted(tmp_path.iterdir()) if path not in before]
    assert all(path.is_dir() and not any(path.iterdir()) for path in left), left


def test_a_run_of_another_cache_is_refused(world: World, command: Command, tmp_path: Path):
    assert command(*_extract(world, tmp_path / "c", sites="1,2")).code == 0
    ended = command("ablate", tmp_path / "c", world.run, "--model", world.model, "--out", tmp_path / "a")
    assert ended.code == 1
    assert re.match(r"error: the run was trained on the cache [0-9a-f]{12}…, and .*/c is [0-9a-f]{12}…: use", ended.err)


def test_a_cache_of_another_version_is_refused(world: World, command: Command, tmp_path: Path):
    shutil.copytree(world.cache, tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_bytes())
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(manifest | {"version": 9}))
    ended = command("cache", "info", tmp_path / "c")
    assert ended.code == 1
    assert "is a cache of format version 9; this clvq reads version 1" in ended.err


def test_no_free_disk_is_said_before_the_model_is_loaded(
    world: World, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 4096))
    ended = command(*_extract(world, tmp_path / "c"))
    assert ended.code == 1
    assert re.match(
        r"error: .*/c needs up to [\d,]+ more bytes and the disk has 4,096 free: free some room, ", ended.err
    )
    assert not (tmp_path / "c").exists()


def test_an_out_that_cannot_be_a_folder_is_refused(world: World, command: Command, tmp_path: Path):
    (tmp_path / "file").write_text("")
    ended = command(*_extract(world, tmp_path / "file" / "c"))
    assert ended.code == 1
    assert ended.err.endswith("file is a file, and a folder is needed there: give another --out\n")


def test_verify_names_a_flipped_bit_and_exits_with_1(world: World, command: Command, tmp_path: Path):
    shutil.copytree(world.cache, tmp_path / "c")
    assert command("cache", "verify", tmp_path / "c").code == 0
    file = tmp_path / "c" / "activations.zarr" / "sites" / "hidden.1" / "c" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(bytes(data))
    ended = command("cache", "verify", tmp_path / "c")
    assert ended.code == 1
    assert "activations.zarr/sites/hidden.1/c/0/0 has other bytes" in ended.out
    assert ended.err.endswith("has 1 problem; `clvq cache repair` makes damaged files anew\n")
    ended = command("cache", "repair", tmp_path / "c")
    assert ended.code == 1
    assert "give --model and --data to compute them again" in ended.err
    ended = command("cache", "repair", tmp_path / "c", "--model", world.model, "--data", world.data)
    assert ended.code == 0, ended.err
    assert "activations.zarr/sites/hidden.1/c/0/0" in ended.out
    assert file.read_bytes() == (world.cache / file.relative_to(tmp_path / "c")).read_bytes()
    (tmp_path / "c" / "mine.txt").write_text("")
    ended = command("cache", "repair", tmp_path / "c")
    assert ended.code == 1
    assert ended.err.endswith("/c still has 1 problem: what does not belong to the cache is not touched\n")


def test_a_cache_is_recoded_and_trained_from(world: World, command: Command, tmp_path: Path):
    ended = command("cache", "recode", world.cache, "--encoding", "int8", "--out", tmp_path / "c", "--json")
    assert ended.code == 0, ended.err
    made = json.loads(ended.out)
    assert made["parent"] == clvq.Cache(world.cache).id
    assert 0 < made["losses"]["hidden.3"]["relative_error"] < 0.02
    assert command("cache", "verify", tmp_path / "c").code == 0
    ended = command("train", tmp_path / "c", *TRAIN, "--out", tmp_path / "r", "--json")
    assert ended.code == 0, ended.err


def test_signs_that_would_steer_a_terminal_are_shown_and_not_sent(world: World, command: Command, tmp_path: Path):
    from clvq.cache.layout import Manifest, sealed_json

    shutil.copytree(world.cache, tmp_path / "c")
    file = tmp_path / "c" / "manifest.json"
    manifest = Manifest.model_validate_json(file.read_bytes())
    identity = {**manifest.identity, "note": "\x1b]0;owned\x07\x9b2J"}
    file.write_bytes(sealed_json(manifest.model_copy(update={"identity": identity})))
    ended = command("cache", "info", tmp_path / "c")
    assert ended.code == 0
    assert "\\x1b]0;owned\\x07\\x9b2J" in ended.out
    assert not set(ended.out) & set("\x1b\x07\x9b")


def test_settings_come_from_a_file_and_from_the_command_line(world: World, command: Command, tmp_path: Path):
    settings = {"fit": {"epochs": 1}, "encoder": {"epochs": 1}, "decoder": {"heads": 4}}
    (tmp_path / "s.json").write_text(json.dumps(settings))
    words = ["train", world.cache, "--lower", 1, "--upper", 3, "--codes", 8, "--config", tmp_path / "s.json"]
    ended = command(*words, "--set", "decoder.heads=2", "--out", tmp_path / "r", "--json")
    assert ended.code == 0, ended.err
    kept = json.loads((tmp_path / "r" / "config.json").read_bytes())["config"]
    assert kept["fit"]["epochs"] == 1
    assert kept["decoder"]["heads"] == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_so_and_goes_on_when_run_again(
    number: signal.Signals, code: int, world: World, tmp_path: Path
):
    words = ["train", world.cache, *TRAIN, "--set", "fit.epochs=40", "--out", tmp_path / "r"]
    running = subprocess.Popen(_clvq(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    # The first line of metrics is written when an epoch has ended: training is under way.
    while not (tmp_path / "r" / "metrics.jsonl").exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(number)
    _, err = running.communicate(timeout=120)
    assert running.returncode == code, err
    assert f"stopped by {number.name}; everything finished is saved: run the same command again to go on" in err
    assert "Traceback" not in err
    epochs = len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines())
    again = subprocess.run(_clvq(*words, "--json"), capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["epochs"] >= epochs
