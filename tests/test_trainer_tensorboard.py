"""TensorBoard's scalars, as its own reader sees them."""

import errno
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from clvq.errors import DiskFull, MissingExtra
from clvq.trainer.tensorboard import TensorBoard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer


@pytest.fixture(autouse=True)
def _a_second_for_each_look_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    # Files are read in the order of their names, which hold the second: no run is gone on with in the one it began in.
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=itertools.count(1_800_000_000).__next__))


def _figures(epoch: int, *, own: float = 0.5) -> dict[str, float | int | str | None]:
    return {
        "epoch": epoch,
        "phase": "train",
        "train_loss_own": own,
        "held_out_loss_own": 0.75,
        "held_out_own_code_fvu": 0.25,
        "held_out_decoder_fvu": None,
        "train_context_fvu": 0.125,
        "held_out_perplexity": 300.5,
        "held_out_used_codes": 400,
        "held_out_margin": 2.0,
        "lr": 0.001953125,
        "seconds": 8.0,
        "rows_per_second": 1024.0,
        "loader_wait_share": 0.0625,
    }


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    read = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_every_number_of_an_epoch_is_a_scalar_in_its_group(tmp_path: Path) -> None:
    with TensorBoard(tmp_path / "tensorboard", first_epoch=0) as board:
        board.epoch(_figures(0))
    assert _scalars(tmp_path / "tensorboard") == {
        "loss/train/own": [(0, 0.5)],
        "loss/held_out/own": [(0, 0.75)],
        "fvu/own_code": [(0, 0.25)],
        "fvu/train/context": [(0, 0.125)],
        "codebook/perplexity": [(0, 300.5)],
        "codebook/used_codes": [(0, 400.0)],
        "other/margin": [(0, 2.0)],
        "optimizer/lr": [(0, 0.001953125)],
        "time/seconds": [(0, 8.0)],
        "time/rows_per_second": [(0, 1024.0)],
        "time/loader_wait_share": [(0, 0.0625)],
    }


def test_an_epoch_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with TensorBoard(tmp_path, first_epoch=0) as board:
        for epoch in range(3):
            board.epoch(_figures(epoch))
            assert [step for step, _ in _scalars(tmp_path)["fvu/own_code"]] == list(range(epoch + 1))


@pytest.mark.parametrize("lost", [0, 5])
def test_a_killed_run_that_is_gone_on_with_has_every_epoch_once(tmp_path: Path, lost: int) -> None:
    killed = TensorBoard(tmp_path, first_epoch=0)
    for epoch in range(4):
        killed.epoch(_figures(epoch, own=1.0))
    killed.close()
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    file.write_bytes(data[: len(data) - lost])
    with TensorBoard(tmp_path, first_epoch=2) as board:
        for epoch in range(2, 5):
            board.epoch(_figures(epoch, own=0.5))
    assert _scalars(tmp_path)["loss/train/own"] == [(0, 1.0), (1, 1.0), (2, 0.5), (3, 0.5), (4, 0.5)]


def test_a_run_that_begins_anew_hides_the_one_before(tmp_path: Path) -> None:
    for own in (1.0, 0.5):
        with TensorBoard(tmp_path, first_epoch=0) as board:
            board.epoch(_figures(0, own=own))
    assert _scalars(tmp_path)["loss/train/own"] == [(0, 0.5)]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with TensorBoard(tmp_path / "board", first_epoch=0) as board:
        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.flush", full)
        with pytest.raises(DiskFull, match=r"no room left on the disk while writing .*board"):
            board.epoch(_figures(0))


def test_without_tensorboard_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtra, match=r"pip install 'clvq\[tensorboard\]'"):
        TensorBoard(tmp_path / "board", first_epoch=0)
    assert not (tmp_path / "board").exists()
