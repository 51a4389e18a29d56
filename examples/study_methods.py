"""The methods of a study, and how many epochs of each a limit of processor time allows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FALLING = 0.005
"""A held-out loss still falls where the last epoch lowers it by more than this share of the one before."""


@dataclass(frozen=True)
class Method:
    """One way to make concepts, as `clvq train` is told."""

    options: tuple[str, ...]
    size: Literal["codes", "latents"] | None = "codes"
    """The study's setting that says how many concepts there are; `None` where the data do."""
    epochs: Mapping[str, int] | None = None
    """Setting → epochs wanted; `None` where the method has no epochs."""
    phases: Mapping[str, str] | None = None
    """Setting → the phase of `metrics.jsonl` that it is about."""

    @property
    def has_latents(self) -> bool:
        """Whether several concepts are active on a row."""
        return "sae" in self.options or "cross-sae" in self.options


_ENCODER_AND_DECODER = {"encoder.epochs": "encoder", "fit.epochs": "train"}
_BATCH = ("--set", "encoder.activation=batchtopk")


def _sparse(method: str, *options: str, size: Literal["codes", "latents"] = "latents") -> Method:
    epochs, phases = {"encoder.epochs": 16}, {"encoder.epochs": "train"}
    return Method(("--method", method, *options), size, epochs=epochs, phases=phases)


METHODS: Mapping[str, Method] = {
    # The slowest first, so that no long one is left alone at the end. Its authors train for 50 epochs.
    "clvq-vae-paper": Method(
        ("--method", "clvq-vae", "--preset", "paper"), epochs={"fit.epochs": 50}, phases={"fit.epochs": "train"}
    ),
    "clvq-vae": Method(
        ("--method", "clvq-vae"), epochs={"encoder.epochs": 8, "fit.epochs": 4}, phases=_ENCODER_AND_DECODER
    ),
    "vq-vae": Method(("--method", "vq-vae"), epochs={"fit.epochs": 12}, phases={"fit.epochs": "train"}),
    "sae": _sparse("sae"),
    "sae-batchtopk": _sparse("sae", *_BATCH),
    "cross-sae": _sparse("cross-sae"),
    "cross-sae-batchtopk": _sparse("cross-sae", *_BATCH),
    # As many latents as the others have codes.
    "sae-few": _sparse("sae", size="codes"),
    "agglomerative": Method(("--method", "agglomerative")),
    "kmeans": Method(("--method", "kmeans")),
    "pca": Method(("--method", "pca")),
    # One concept for each class.
    "mean-difference": Method(("--method", "mean-difference"), None),
}


@dataclass(frozen=True)
class Cost:
    """What a pilot of one epoch took, in seconds of processor time."""

    per_epoch: dict[str, float]
    """Setting → seconds of an epoch, measuring included."""
    other: float
    """All the rest: the program's start, the codebook's start, last passes."""


@dataclass(frozen=True)
class Budget:
    """How many epochs a fit is given, and why; one file beside the runs."""

    epochs: dict[str, int]
    wanted: dict[str, int]
    at_most_epochs: int
    at_most_cpu_seconds: float
    expected_cpu_seconds: float
    limited_by: Literal["nothing", "epochs", "processor time"]


def pilot_cost(method: Method, run: Path, *, cpu_seconds: float, wall_seconds: float) -> Cost:
    """What the pilot's epochs cost.

    `metrics.jsonl` has the time of an epoch by the clock and without measuring. The share of the clock that was the
    process's own is taken as that of the whole pilot, and measuring a row as no dearer than training on it.
    """
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    share = cpu_seconds / wall_seconds * (1 + report["held_out_rows"] / report["train_rows"])
    lines = read_lines(run)
    per_epoch = {
        setting: share * sum(line["seconds"] for line in lines if line["phase"] == phase)
        for setting, phase in (method.phases or {}).items()
    }
    return Cost(per_epoch, max(0.0, cpu_seconds - sum(per_epoch.values())))


def budget(method: Method, cost: Cost, *, epochs: int, cpu_seconds: float) -> Budget:
    """As many epochs as wanted, as far as the two limits allow; all phases are shortened in proportion."""
    wanted = dict(method.epochs or {})
    given = {setting: min(count, epochs) for setting, count in wanted.items()}
    limited: Literal["nothing", "epochs", "processor time"] = "nothing" if given == wanted else "epochs"
    whole = sum(cost.per_epoch[setting] * count for setting, count in given.items())
    room = cpu_seconds - cost.other
    if whole > room:
        limited = "processor time"
        given = {setting: max(1, int(count * room / whole)) for setting, count in given.items()}
    expected = cost.other + sum(cost.per_epoch[setting] * count for setting, count in given.items())
    return Budget(given, wanted, epochs, cpu_seconds, round(expected, 1), limited)


def read_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; none where there is no such file."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def still_falling(lines: Sequence[Mapping[str, Any]]) -> dict[str, bool | None]:
    """Phase → whether its last epoch still lowered the held-out loss; `None` after a single epoch."""
    losses: dict[str, list[float]] = {}
    for line in lines:
        losses.setdefault(line["phase"], []).append(line["held_out_loss_total"])
    return {
        phase: None if len(values) < 2 else values[-1] < values[-2] * (1 - FALLING) for phase, values in losses.items()
    }
