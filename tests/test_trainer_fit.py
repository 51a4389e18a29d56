"""Training from end to end: what is refused, what is left behind, and that a stop of any kind changes nothing."""

import json
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import clvq
import numpy as np
import pytest
import torch
from clvq.cache.files import only_writer
from clvq.errors import ClvqError, ConfigError, FolderInUse, FormatVersion, Interrupted, ResumeMismatch, RunNotFound
from clvq.progress import SILENT, Progress, Silent
from clvq.trainer.config import TrainConfig, preset_config, with_overrides
from clvq.trainer.data import Texts
from clvq.trainer.fit import FitResult, fit
from clvq.trainer.network import build
from clvq.trainer.run import Run
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .caches import LOWER, UPPER, make_cache
from .stopping import Pulled, Stops

CPU = torch.device("cpu")
PRESETS = ["default", "paper"]


def _config(preset: str = "default", **changes: str) -> TrainConfig:
    small = {
        "decoder.layers": "1",
        "decoder.heads": "2",
        "decoder.hidden": "8",
        "fit.epochs": "3",
        "fit.texts_per_batch": "8",
        "optimizer.lr": "0.003",
    }
    # Units drop out; codes die, are revived and are drawn: everything random takes part.
    if preset == "default":
        small |= {"encoder.epochs": "2", "encoder.rows_per_batch": "64", "decoder.dropout": "0.1"}
    else:
        small |= {"quantizer.revive_after": "2", "quantizer.temperature": "20"}
    return with_overrides(preset_config(preset, lower=LOWER, upper=UPPER, codes=9), small | changes)


def _fit(
    cache: clvq.Cache, config: TrainConfig, out: Path, *, progress: Progress = SILENT, force: bool = False
) -> FitResult:
    return fit(cache, config, out, device=CPU, progress=progress, force=force)


@pytest.fixture(scope="module", params=PRESETS)
def whole(request: pytest.FixtureRequest, small_cache: clvq.Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each preset that nobody disturbed; checkpoints are written after every step."""
    out = tmp_path_factory.mktemp("run") / request.param
    _fit(small_cache, _config(request.param, **{"fit.checkpoint_minutes": "1e-9"}), out)
    return out


class _Counts(Silent):
    """Counts the moments at which `Stops` could stop."""

    def __init__(self) -> None:
        self.moments = 0

    def check(self) -> None:
        self.moments += 1

    def advance(self, amount: int = 1, **figures: float) -> None:
        self.check()


class _Fails(Silent):
    def begin(self, task: str, total: int | None, unit: str) -> None:
        raise AssertionError(f"{task} was begun")


def test_a_run_holds_its_files_and_nothing_else(whole: Path) -> None:
    assert sorted(file.name for file in whole.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "report.json",
    ]


def test_the_same_settings_give_the_same_bytes(whole: Path, small_cache: clvq.Cache, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    torch.manual_seed(7)
    _fit(small_cache, Run.from_pretrained(whole).config, tmp_path)
    torch.random.set_rng_state(before)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_another_seed_gives_another_model(whole: Path, small_cache: clvq.Cache, tmp_path: Path) -> None:
    config = with_overrides(Run.from_pretrained(whole).config, {"seed": "1"})
    _fit(small_cache, config, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()


def test_training_leaves_torch_s_own_generator_alone(small_cache: clvq.Cache, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    _fit(small_cache, _config(**{"fit.epochs": "1"}), tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("kind", ["interrupted", "pulled"])
def test_stopped_again_and_again_it_ends_in_the_same_bytes(
    whole: Path, kind: str, small_cache: clvq.Cache, tmp_path: Path
) -> None:
    """Interrupted, it saves where it is; with the plug pulled, it goes on from the last checkpoint."""
    config = Run.from_pretrained(whole).config
    every, stops = 7, 0
    while True:
        error = Interrupted("stop", signal_number=2) if kind == "interrupted" else Pulled()
        try:
            _fit(small_cache, config, tmp_path, progress=Stops(every, error))
        except (Interrupted, Pulled):
            stops += 1
            # Always stopping at the same place of the last, unsaved stretch would never end.
            every = 3 * every // 2
            continue
        break
    assert stops >= 3
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    _equal_but_for_time(whole, tmp_path)


def _equal_but_for_time(whole: Path, other: Path) -> None:
    timed = {"seconds", "rows_per_second", "loader_wait_share", "train_seconds"}
    first, second = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        + [json.loads((run / "report.json").read_bytes())]
        for run in (whole, other)
    )
    assert [{k: v for k, v in line.items() if k not in timed} for line in first] == [
        {k: v for k, v in line.items() if k not in timed} for line in second
    ]


@pytest.fixture(scope="module", params=PRESETS)
def counted(
    request: pytest.FixtureRequest, small_cache: clvq.Cache, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int]:
    """A run of each preset, and at how many moments it could have been stopped."""
    out, counts = tmp_path_factory.mktemp("counted") / request.param, _Counts()
    _fit(small_cache, _config(request.param), out, progress=counts)
    return out, counts.moments


@pytest.mark.parametrize("share", [0.0, 0.05, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0])
def test_interrupted_between_checkpoints_it_saves_and_goes_on_to_the_same_bytes(
    share: float, counted: tuple[Path, int], small_cache: clvq.Cache, tmp_path: Path
) -> None:
    whole, moments = counted
    config, after = Run.from_pretrained(whole).config, max(1, round(share * moments))
    with pytest.raises(Interrupted):
        _fit(small_cache, config, tmp_path, progress=Stops(after, Interrupted("stop", signal_number=15)))
    assert not (tmp_path / "model.safetensors").exists()
    _fit(small_cache, config, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    _equal_but_for_time(whole, tmp_path)


_SCRIPT = """
import sys
from pathlib import Path
import torch
import clvq
from clvq.progress import Silent
from clvq.trainer.config import TrainConfig
from clvq.trainer.fit import fit

class Told(Silent):
    def check(self):
        print("step", flush=True)

if __name__ == "__main__":
    torch.set_num_threads(1)
    config = TrainConfig.model_validate_json(sys.argv[3])
    fit(clvq.Cache(sys.argv[1]), config, Path(sys.argv[2]), device=torch.device("cpu"), progress=Told())
    print("end", flush=True)
"""


def test_killed_with_sigkill_at_random_moments_it_ends_in_the_same_bytes(
    whole: Path, small_cache: clvq.Cache, tmp_path: Path
) -> None:
    chance = random.Random(0)
    out, script = tmp_path / "run", tmp_path / "train.py"
    script.write_text(textwrap.dedent(_SCRIPT))
    config = Run.from_pretrained(whole).config.model_dump_json()
    kills = 0
    while not (out / "model.safetensors").exists():
        command = [sys.executable, str(script), str(small_cache.path), str(out), config]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(chance.randint(2, 9) if kills < 3 else 10_000):
                if process.stdout.readline().strip() != "step":
                    break
            else:
                # Any moment within about a step, the writing of a checkpoint included.
                with_delay = chance.random() * 0.02
                try:
                    process.wait(with_delay)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
            process.stdout.read()
        assert process.returncode in (0, -signal.SIGKILL)
    assert kills == 3
    _fit(small_cache, Run.from_pretrained(whole).config, out)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    _equal_but_for_time(whole, out)


def test_killed_before_its_first_file_was_whole_it_begins_again(small_cache: clvq.Cache, tmp_path: Path) -> None:
    (tmp_path / ".config.json.123.aside").write_bytes(b"{")
    _fit(small_cache, _config(**{"fit.epochs": "1"}), tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_finished_run_is_returned_at_once(whole: Path, small_cache: clvq.Cache) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in whole.iterdir()}
    result = _fit(small_cache, Run.from_pretrained(whole).config, whole, progress=_Fails())
    assert {file.name: file.stat().st_mtime_ns for file in whole.iterdir()} == before
    assert result.path == whole
    assert result.report == json.loads((whole / "report.json").read_bytes())


def test_other_settings_in_the_same_folder_are_refused_by_name(whole: Path, small_cache: clvq.Cache) -> None:
    config = with_overrides(Run.from_pretrained(whole).config, {"seed": "7", "quantizer.codes": "8"})
    with pytest.raises(ResumeMismatch) as caught:
        _fit(small_cache, config, whole)
    message = str(caught.value)
    assert "config.quantizer.codes: 9 there, 8 now; config.seed: 42 there, 7 now" in message
    assert "give another --out, or --force to delete it" in message


def test_another_cache_in_the_same_folder_is_refused(whole: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", seed=1)
    with pytest.raises(ResumeMismatch, match=f'cache_id: .* there, "{other.id[:12]}'):
        _fit(other, Run.from_pretrained(whole).config, whole)


def test_force_replaces_a_run_and_touches_no_foreign_file(small_cache: clvq.Cache, tmp_path: Path) -> None:
    _fit(small_cache, _config(**{"fit.epochs": "1"}), tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    config = _config(**{"fit.epochs": "2"})
    _fit(small_cache, config, tmp_path / "run", force=True)
    assert Run.from_pretrained(tmp_path / "run").config == config
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_not_a_run_is_refused_even_with_force(small_cache: clvq.Cache, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(ConfigError, match=r"is not empty and is not a clvq run \(it holds 'notes.txt'\)"):
            _fit(small_cache, _config(), tmp_path, force=force)


def test_a_model_s_folder_is_not_taken_for_a_run(small_cache: clvq.Cache, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="is not empty and is not a clvq run"):
        _fit(small_cache, _config(), tmp_path, force=True)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "bert"}'


def test_a_run_of_another_format_version_is_refused(whole: Path, small_cache: clvq.Cache, tmp_path: Path) -> None:
    plain = json.loads((whole / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(plain | {"version": 2}))
    with pytest.raises(FormatVersion, match="format version 2; this clvq reads version 1"):
        _fit(small_cache, _config(), tmp_path)


def test_one_process_at_a_time_writes_a_run(small_cache: clvq.Cache, tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(FolderInUse):
        _fit(small_cache, _config(), tmp_path)


def test_more_codes_than_training_rows_are_refused_with_both_numbers(small_cache: clvq.Cache, tmp_path: Path) -> None:
    config = _config(**{"quantizer.codes": "5000"})
    rows = Texts.of(small_cache, _config()).train_rows(small_cache, _config()).rows
    with pytest.raises(ConfigError, match=f"{rows} training rows, fewer than the 5000 codes: use --codes N"):
        _fit(small_cache, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": "train"}, "split 'train' is named both for training and as held out"),
        ({"held_out": "test"}, "holds no split 'test'; it holds"),
        ({"upper": "hidden.9"}, "holds no site 'hidden.9'; it holds hidden.1, hidden.2"),
        ({"decoder.heads": "3"}, "decoder.heads = 3 does not divide the codes' 16 channels"),
    ],
)
def test_settings_that_do_not_suit_the_cache_are_refused_before_anything_is_written(
    changes: dict[str, str], message: str, small_cache: clvq.Cache, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        _fit(small_cache, _config(**changes), tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_loss_that_is_no_longer_finite_stops_the_run(preset: str, small_cache: clvq.Cache, tmp_path: Path) -> None:
    config = _config(preset, **{"optimizer.lr": "1e30"})
    with pytest.raises(ClvqError, match=r"the loss is (nan|inf) at step \d+ of epoch 0 .* lower optimizer.lr"):
        _fit(small_cache, config, tmp_path)
    # Of the codebook's start, which stood before the loss was lost.
    assert (tmp_path / "checkpoint.safetensors").is_file() == (preset == "paper")
    with pytest.raises(RunNotFound, match="is an unfinished run"):
        Run.from_pretrained(tmp_path)


def test_the_lower_site_may_be_its_own_upper_site(small_cache: clvq.Cache, tmp_path: Path) -> None:
    for preset in PRESETS:
        config = _config(preset, upper=LOWER, **{"fit.epochs": "1"})
        report = _fit(small_cache, config, tmp_path / preset).report
        assert 0 < report["own_code_fvu"] < 0.6


def test_sites_of_different_width_go_together(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", d=12, d_upper=8)
    for preset in PRESETS:
        _fit(cache, _config(preset, **{"fit.epochs": "1"}), tmp_path / preset)
        run = Run.from_pretrained(tmp_path / preset)
        assert run.concept_means.shape == (9, 12)
        assert run.upper_table.shape == (9, 8)


def test_texts_that_are_equal_stay_on_one_side(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", copies=30, splits=("train",))
    contents = np.asarray(cache.texts["text_sha256"].to_pylist())
    sides = [Texts.of(cache, _config(seed=str(seed))) for seed in range(10)]
    for side in sides:
        assert (side.train ^ side.held_out).all()
        assert not set(contents[side.train]) & set(contents[side.held_out])
        assert len(set(contents[side.held_out])) == 3
    assert len({side.held_out.tobytes() for side in sides}) > 5


def test_a_named_split_is_held_out_whole(small_cache: clvq.Cache) -> None:
    texts = Texts.of(small_cache, _config(held_out="dev"))
    assert (texts.train == small_cache.splits(["train"])).all()
    assert (texts.held_out == small_cache.splits(["dev"])).all()


def test_a_single_distinct_text_cannot_be_divided(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", texts=2, copies=1, splits=("train",))
    with pytest.raises(ConfigError, match="holds 1 distinct texts in train: at least 2 are needed"):
        Texts.of(cache, _config())


def test_only_the_first_special_row_of_a_text_trains(small_cache: clvq.Cache) -> None:
    texts, found = Texts.of(small_cache, _config()), set[int]()
    rows = texts.train_rows(small_cache, _config())
    for shard in range(small_cache.manifest.geometry.shards):
        found |= set(small_cache.column("special")[rows.of_shard(shard)].tolist())
    assert found == {0, 1}
    owners = small_cache.column("text")
    chosen = np.isin(owners, np.asarray(small_cache.texts["text_id"])[texts.train])
    assert rows.rows == (chosen & (small_cache.column("special") <= 1)).sum()


@pytest.mark.parametrize("preset", PRESETS)
def test_training_stops_when_patience_is_over(preset: str, small_cache: clvq.Cache, tmp_path: Path) -> None:
    # So small that the first epoch stays the best; or, for codes that move by themselves, so large that it gets worse.
    rate = {"default": "1e-30", "paper": "0.1"}[preset]
    config = _config(preset, **{"fit.epochs": "50", "fit.patience": "2", "optimizer.lr": rate})
    report = _fit(small_cache, config, tmp_path).report
    assert report["stopped_early"]
    assert report["stop_reason"] == "no better held-out loss for 2 epochs"
    assert report["epochs"] < 50
    encoder = 2 if preset == "default" else 0
    assert report["epochs"] == report["best_epoch"] - encoder + 1 + 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["held_out_loss_total"] for line in lines if line["phase"] == "train"]
    assert int(np.argmin(losses)) == report["best_epoch"] - encoder


def test_the_best_epoch_s_weights_are_kept(small_cache: clvq.Cache, tmp_path: Path) -> None:
    # So high a rate that the loss gets worse some time.
    config = _config("paper", **{"fit.epochs": "50", "fit.patience": "1", "optimizer.lr": "0.1"})
    report = _fit(small_cache, config, tmp_path / "run").report
    assert report["best_epoch"] == report["epochs"] - 2
    # A run that ends there has the same weights.
    shorter = with_overrides(config, {"fit.epochs": str(report["epochs"] - 1)})
    _fit(small_cache, shorter, tmp_path / "shorter")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "shorter"))
    assert first == second


def test_the_published_rate_is_halved_when_the_held_out_loss_gets_no_better(
    small_cache: clvq.Cache, tmp_path: Path
) -> None:
    config = _config("paper", **{"fit.epochs": "8", "optimizer.lr": "0.1", "optimizer.plateau_patience": "1"})
    _fit(small_cache, config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rate, best, worse = 0.1, float("inf"), 0
    for line in lines:
        # Better is what is lower by a ten-thousandth, as in torch's ReduceLROnPlateau.
        better = line["held_out_loss_total"] < best * (1 - 1e-4)
        best, worse = (line["held_out_loss_total"], 0) if better else (best, worse + 1)
        if worse > 1:
            rate, worse = rate / 2, 0
        assert line["lr"] == pytest.approx(rate)
    assert rate < 0.1


def test_a_linear_schedule_rises_and_falls_to_0_in_the_encoder_s_training_and_again_after_it(
    small_cache: clvq.Cache, tmp_path: Path
) -> None:
    rates: dict[int, list[float]] = {}

    def note(optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        learning = sum(p.grad is not None for p in optimizer.param_groups[0]["params"])
        rates.setdefault(learning, []).append(optimizer.param_groups[0]["lr"])

    hook = register_optimizer_step_pre_hook(note)
    try:
        config = _config(**{"encoder.rows_per_batch": "4", "fit.texts_per_batch": "1", "optimizer.lr": "0.01"})
        _fit(small_cache, config, tmp_path)
    finally:
        hook.remove()
    # Encoder and decoder have different numbers of weights; each phase trains one of them.
    assert len(rates) == 2
    for found in map(np.array, rates.values()):
        steps, peak = len(found), int(found.argmax())
        assert steps > 100
        assert found[0] < 0.05 * 0.01
        assert peak / steps == pytest.approx(0.05, abs=1.5 / steps)
        assert found[peak] == pytest.approx(0.95 * 0.01, rel=0.02)
        assert (np.diff(found[: peak + 1]) > 0).all()
        done = np.arange(steps) / steps
        np.testing.assert_allclose(found[peak + 1 :], 0.01 * (1 - done[peak + 1 :]), atol=0.01 * 1.5 / steps)
        assert 0 < found[-1] < 0.01 * 3 / steps


def test_every_epoch_leaves_a_line_of_figures(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    paper = Run.from_pretrained(whole).config.preset == "paper"
    assert [line["phase"] for line in lines] == ([] if paper else ["encoder"] * 2) + ["train"] * 3
    assert [line["epoch"] for line in lines] == list(range(len(lines)))
    parts = {"encoder": {"predictor"}, "train": {"reconstruction", "commitment"} if paper else {"decoder"}}
    for line in lines:
        for side in ("train", "held_out"):
            names = {name.removeprefix(f"{side}_loss_") for name in line if name.startswith(f"{side}_loss_")}
            assert names == parts[line["phase"]] | {"total"}
            total = sum(line[f"{side}_loss_{part}"] for part in parts[line["phase"]])
            assert line[f"{side}_loss_total"] == pytest.approx(total)
        assert 0 <= line["loader_wait_share"] <= 1
        assert 0.5 < line["real_slots_share"] <= 1
        assert line["rows_per_second"] > 0
        if line["phase"] == "encoder":
            # The loss is in units of the variance over the training rows, the FVU of that over the held-out ones.
            assert line["held_out_predictor_fvu"] == pytest.approx(line["held_out_loss_predictor"], rel=0.3)
            continue
        assert 1 <= line["held_out_used_codes"] <= 9
        assert 1 <= line["held_out_perplexity"] <= line["held_out_used_codes"]
        assert line["held_out_decoder_fvu"] > 0
        assert line["held_out_own_code_fvu"] > 0


def test_an_epoch_s_figure_is_the_mean_over_all_its_rows(small_cache: clvq.Cache, tmp_path: Path) -> None:
    # Nothing is learned: over batches of unlike size, the figure is the loss of all rows together.
    config = _config(**{"optimizer.lr": "1e-30", "fit.epochs": "1", "encoder.dropout": "0"})
    _fit(small_cache, config, tmp_path)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    rows = small_cache.rows_of(Texts.of(small_cache, config).train, special="leading")
    assert len(rows) % 64
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        linear = build(config, d_lower=16, d_upper=16).encoder.linear
    lower, upper = (small_cache.vectors(site, rows).astype(np.float64) for site in (LOWER, UPPER))
    z = (lower - lower.mean(axis=0)) / lower.std(axis=0)
    z = z @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()
    target = (upper - upper.mean(axis=0)) / np.sqrt(upper.var(axis=0).mean())
    assert line["train_loss_predictor"] == pytest.approx(((z - target) ** 2).mean(), rel=1e-5)


def test_the_description_says_nothing_of_when_or_where(whole: Path) -> None:
    plain = json.loads((whole / "config.json").read_bytes())
    assert plain.keys() == {
        "format",
        "version",
        "clvq",
        "cache_id",
        "vectors_id",
        "config",
        "d_lower",
        "d_upper",
        "held_out_texts",
    }
    assert str(whole) not in (whole / "config.json").read_text()
