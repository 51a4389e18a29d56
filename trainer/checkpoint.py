"""The state of an unfinished run, in one file that is replaced whole: tensors, and the rest as JSON beside them.

No state of a random generator is stored: every step seeds its generators from (seed, epoch, step).
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ..cache.files import write_file
from . import ranks
from .concepts import ConceptModel

# In the order in which the safetensors library lays them, wide ones first, so that each lies where it may be read.
_DTYPES = {torch.int64: "I64", torch.float64: "F64", torch.float32: "F32"}
# What the names of those tensors of a network begin with that neither codes nor decoder have a part in.
_BEFORE_CODES = ("encoder.", "lower_", "upper_")


@dataclass
class Sums:
    """What an epoch has added up so far."""

    losses: dict[str, float] = field(default_factory=dict)
    """Part of the loss → Σ over steps of its value times the step's rows."""
    rows: int = 0
    slots: int = 0
    done: int = 0
    """Rows of the encoder's training, texts of what follows."""
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds of `seconds` in which the next batch was not there yet."""


@dataclass
class State:
    """Where a run stands, besides its tensors."""

    epoch: int = 0
    """The epoch that is next or under way, those of the encoder's training included."""
    step: int = 0
    """Steps done in it."""
    codebook_started: bool = False
    stop_reason: str | None = None
    """Why training is over; `None` while it is not."""
    best: float | None = None
    best_epoch: int | None = None
    epochs_without_better: int = 0
    total_seconds: float = 0.0
    total_waited: float = 0.0
    sums: Sums = field(default_factory=Sums)


class Fitting:
    """A network with everything that its training carries along."""

    def __init__(
        self,
        network: ConceptModel,
        optimizer: torch.optim.Optimizer,
        plateau: torch.optim.lr_scheduler.ReduceLROnPlateau,
        *,
        codes: int,
        d_upper: int,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.plateau = plateau
        self.state = State()
        self.best_tensors: dict[str, Tensor] = {}
        device = network.upper_mean.device
        self.code_counts = torch.zeros(codes, dtype=torch.int64, device=device)
        """Rows of each code in the epoch so far, those of this process; of no code where the codebook stays."""
        self.code_sums = torch.zeros(codes, d_upper, dtype=torch.float64, device=device)
        """Sum of those rows at the upper site."""

    def begin_epoch(self, epoch: int) -> None:
        """Set the epoch's sums to zero."""
        self.state.epoch, self.state.step, self.state.sums = epoch, 0, Sums()
        self.code_counts.zero_()
        self.code_sums.zero_()

    def keep_best(self) -> None:
        """Remember the weights as they are now."""
        self.best_tensors = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}

    def save(self, path: Path) -> None:
        """Replace the file at `path` by the present state; all processes call this, and the first one writes.

        Raises
        ------
        DiskFull
            Where there is no room; the file is as it was.
        """
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_tensors.items()}
        for number, entries in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in entries.items()}
        # One part of each process: whoever goes on with it adds the same numbers in the same order.
        tensors |= {name: ranks.joined(part[None]) for name, part in self._parts().items()}
        plain = {
            "state": asdict(self.state),
            "plateau": self.plateau.state_dict(),
            "lr": [group["lr"] for group in self.optimizer.param_groups],
        }
        with ranks.led() as leads:
            if leads:
                write_file(path, packed(tensors, metadata={"state": json.dumps(plain)}))

    def load(self, path: Path) -> None:
        """Take over the state in the file at `path`."""
        tensors, plain = _read(path)
        self.network.load_state_dict(_under("network.", tensors))
        device = self.code_counts.device
        self.best_tensors = {name: tensor.to(device) for name, tensor in _under("best.", tensors).items()}
        for name, own in self._parts().items():
            if len(tensors[name]) == ranks.count():
                own.copy_(tensors[name][ranks.number()])
            elif ranks.number() == 0:
                own.copy_(tensors[name].sum(dim=0))
        for group, lr in zip(self.optimizer.param_groups, plain["lr"], strict=True):
            group["lr"] = lr
        self._load_optimizer(tensors)
        self.plateau.load_state_dict(plain["plateau"])
        self.state = State(**(plain["state"] | {"sums": Sums(**plain["state"]["sums"])}))

    def _parts(self) -> dict[str, Tensor]:
        return {"code_counts": self.code_counts, "code_sums": self.code_sums}

    def hand_over(self, path: Path, *, metrics: list[dict[str, Any]]) -> None:
        """Write down what a run that differs only in its codes and what follows them can take over.

        That is the sites' statistics, and the encoder with its optimiser's state and its lines of `metrics.jsonl`.

        Raises
        ------
        DiskFull
        """
        network = self.network.state_dict()
        tensors = {f"network.{name}": network[name] for name in network if name.startswith(_BEFORE_CODES)}
        for number, entries in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in entries.items()}
        plain = {
            "epoch": self.state.epoch,
            "total_seconds": self.state.total_seconds,
            "total_waited": self.state.total_waited,
            "metrics": metrics,
        }
        write_file(path, packed(tensors, metadata={"state": json.dumps(plain)}))

    def take_over(self, path: Path) -> list[dict[str, Any]]:
        """Go on from where another run's `hand_over` left `path`; gives the lines of its `metrics.jsonl`."""
        tensors, plain = _read(path)
        self.network.load_state_dict(self.network.state_dict() | _under("network.", tensors))
        self._load_optimizer(tensors)
        metrics: list[dict[str, Any]] = plain.pop("metrics")
        self.state = State(**plain)
        return metrics

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Its state; the rates are left as they are."""
        entries: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            number, key = name.split(".", 1)
            entries.setdefault(int(number), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safetensors.safe_open(path, framework="pt") as file:
        # Clones lie where torch puts its own tensors: the same alignment gives the same sums.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 — not a mapping
        plain: dict[str, Any] = json.loads(file.metadata()["state"])
    return tensors, plain


def packed(tensors: dict[str, Tensor], *, metadata: dict[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """Tensors as the bytes of a safetensors file, one after the other, so that none is held twice."""
    order = list(_DTYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _DTYPES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
