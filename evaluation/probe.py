"""The paper's read-out: a small classifier trained on clean vectors and asked again after a removal.

Published: Linear(d, 64) → ReLU → Dropout(0.2) → Linear(64, classes), Adam 1e-3, batches of 32, at most 100 epochs,
patience 5, 20 stratified folds. The published code chose the epoch on the very fold that it reported; here it is chosen
on a tenth of the training folds.
"""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor, nn

from ..errors import ConfigError
from ..progress import Progress

FOLDS = 20
_HIDDEN, _DROPOUT, _LEARNING_RATE, _BATCH, _EPOCHS, _PATIENCE, _MIN_DELTA = 64, 0.2, 1e-3, 32, 100, 5, 1e-3


Probe = Callable[[Float32[np.ndarray, "text d"]], Float64[np.ndarray, "text class"]]
"""Vectors to class probabilities."""


def check_labels(labels: Int64[np.ndarray, " text"]) -> None:
    """Make sure that probes can be cross-validated.

    Raises
    ------
    ConfigError
        Where a class has fewer than three texts, or there is only one class.
    """
    names, counts = np.unique(labels, return_counts=True)
    if len(names) < 2 or counts.min() < 3:
        found = ", ".join(f"{count} of label {name}" for name, count in zip(names, counts, strict=True))
        raise ConfigError(
            f"the probe needs two classes with three texts each; the chosen texts have {found or 'no labels'}: "
            "choose more texts with --split, or --read-out model"
        )


def cross_validated(
    vectors: Float32[np.ndarray, "text d"], labels: Int64[np.ndarray, " text"], *, seed: int, progress: Progress
) -> Iterator[tuple[Int64[np.ndarray, " held_out"], Probe]]:
    """Fold by fold, the texts held out and the probe that was trained on the others.

    Parameters
    ----------
    vectors
        Unchanged vectors, which the probes are trained on.

    Raises
    ------
    ConfigError
        See `check_labels`.
    """
    from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit

    check_labels(labels)
    counts = np.unique(labels, return_counts=True)[1]
    folds = int(min(FOLDS, counts.min()))
    outer = StratifiedKFold(folds, shuffle=True, random_state=seed)
    progress.begin("probe", folds, "folds")
    for fold, (rest, held_out) in enumerate(outer.split(vectors, labels)):
        inner = StratifiedShuffleSplit(1, test_size=max(0.1, len(counts) / len(rest)), random_state=seed)
        fit, choose = next(inner.split(vectors[rest], labels[rest]))
        network = _fit(vectors, labels, rest[fit], rest[choose], classes=int(labels.max()) + 1, seed=seed + fold)
        yield held_out, partial(_answers, network)
        progress.advance()


@torch.no_grad()
def _answers(network: nn.Module, vectors: Float32[np.ndarray, "text d"]) -> Float64[np.ndarray, "text class"]:
    answers: Float64[np.ndarray, "text class"] = network(torch.from_numpy(vectors)).double().softmax(dim=-1).numpy()
    return answers


def _fit(
    vectors: Float32[np.ndarray, "text d"],
    labels: Int64[np.ndarray, " text"],
    fit: Int64[np.ndarray, " fit"],
    choose: Int64[np.ndarray, " choose"],
    *,
    classes: int,
    seed: int,
) -> nn.Module:
    # The generator of the process is left as it was found.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = nn.Sequential(
            nn.Linear(vectors.shape[1], _HIDDEN), nn.ReLU(), nn.Dropout(_DROPOUT), nn.Linear(_HIDDEN, classes)
        )
        optimizer = torch.optim.Adam(probe.parameters(), lr=_LEARNING_RATE)
        inputs, targets = torch.from_numpy(vectors), torch.from_numpy(labels)
        best, best_state, waited = float("inf"), _copy(probe), 0
        for _ in range(_EPOCHS):
            probe.train()
            for batch in _batches(torch.from_numpy(fit)):
                loss = nn.functional.cross_entropy(probe(inputs[batch]), targets[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            probe.eval()
            with torch.no_grad():
                held_out = float(nn.functional.cross_entropy(probe(inputs[choose]), targets[choose]))
            if held_out < best - _MIN_DELTA:
                best, best_state, waited = held_out, _copy(probe), 0
            else:
                waited += 1
                if waited >= _PATIENCE:
                    break
        probe.load_state_dict(best_state)
    return probe.eval()


def _batches(numbers: Tensor) -> Iterator[Tensor]:
    order = numbers[torch.randperm(len(numbers))]
    yield from order.split(_BATCH)


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}
