"""What a run shows while it goes on: each epoch's figures as TensorBoard's scalars."""

import math
from collections.abc import Mapping
from pathlib import Path

from ..cache.files import disk_full_names
from ..errors import MissingExtra
from .figures import Place


class TensorBoard:
    """Writes the figures of each epoch into a folder that `tensorboard --logdir` shows.

    Parameters
    ----------
    folder
        Created where missing; what earlier calls of the same run left there is gone on with.
    first_epoch
        The epoch that is written next. What the folder holds of it and of later ones, from a call that was killed, is
        hidden.

    Raises
    ------
    MissingExtra
        Where tensorboard is not installed.
    DiskFull
    """

    def __init__(self, folder: Path, *, first_epoch: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra("TensorBoard's scalars need tensorboard: pip install 'clvq[tensorboard]'") from error
        self._folder = folder
        with disk_full_names(folder):
            self._writer = SummaryWriter(str(folder), purge_step=first_epoch)

    def epoch(self, figures: Mapping[str, float | int | str | None]) -> None:
        """Write a line of `metrics.jsonl`; a reader sees it when this returns. What is not a finite number is left out.

        Raises
        ------
        DiskFull
        """
        epoch = figures["epoch"]
        with disk_full_names(self._folder):
            for name, value in figures.items():
                if name != "epoch" and isinstance(value, int | float) and math.isfinite(value):
                    self._writer.add_scalar(tag(name), value, epoch)
            self._writer.flush()

    def close(self) -> None:
        """Write out what is left and close the file."""
        with disk_full_names(self._folder):
            self._writer.close()

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def tag(figure: str) -> str:
    """The scalar's name: its group, its side for a loss and for what is of the training rows, and its own name."""
    place = Place.of(figure)
    side = place.side if place.side == "train" or place.group == "loss" else ""
    return "/".join(part for part in (place.group, side, place.name) if part)
