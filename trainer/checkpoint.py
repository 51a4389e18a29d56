"""The state of an unfinished run, in one file that is replaced whole: tensors, and the rest as JSON beside them.

No state of a random generator is stored: every step seeds its generators from (seed, epoch, step).
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..cache.files import write_file
from .network import Network


@dataclass
class Sums:
    """What an epoch has added up so far."""

    losses: dict[str, float] = field(default_factory=dict)
    """Part of the loss → Σ over steps of its value times the step's rows."""
    rows: int = 0
    slots: int = 0
    texts: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds of `seconds` in which the next batch was not there yet."""


@dataclass
class State:
    """Where a run stands, besides its tensors."""

    epoch: int = 0
    """The epoch that is next or under way, warm-up included."""
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
        network: Network,
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
        """Rows of each code in the epoch so far."""
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
        """Replace the file at `path` by the present state.

        Raises
        ------
        DiskFull
            Where there is no room; the file is as it was.
        """
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_tensors.items()}
        for number, entries in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in entries.items()}
        tensors |= {"code_counts": self.code_counts, "code_sums": self.code_sums}
        plain = {
            "state": asdict(self.state),
            "plateau": self.plateau.state_dict(),
            "lr": [group["lr"] for group in self.optimizer.param_groups],
        }
        write_file(path, pack(tensors, metadata={"state": json.dumps(plain)}))

    def load(self, path: Path) -> None:
        """Take over the state in the file at `path`."""
        with safetensors.safe_open(path, framework="pt") as file:
            # Clones lie where torch puts its own tensors: the same alignment gives the same sums.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 — not a mapping
            plain = json.loads(file.metadata()["state"])
        self.network.load_state_dict(_under("network.", tensors))
        device = self.code_counts.device
        self.best_tensors = {name: tensor.to(device) for name, tensor in _under("best.", tensors).items()}
        self.code_counts.copy_(tensors["code_counts"])
        self.code_sums.copy_(tensors["code_sums"])
        entries: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under("optimizer.", tensors).items():
            number, key = name.split(".", 1)
            entries.setdefault(int(number), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        for group, lr in zip(groups, plain["lr"], strict=True):
            group["lr"] = lr
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        self.plateau.load_state_dict(plain["plateau"])
        self.state = State(**(plain["state"] | {"sums": Sums(**plain["state"]["sums"])}))


def pack(tensors: dict[str, Tensor], *, metadata: dict[str, str] | None = None) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data: bytes = safetensors.torch.save(plain, metadata)
    return data


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
