"""The processes that train one model together: how they add up, agree, stop and notice that they drifted apart.

They are those of `torch.distributed`'s default group, looked up whenever they are needed; where there is none, this
process is alone and everything here costs nothing.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from signal import SIGTERM

import torch
import torch.distributed as dist
from jaxtyping import Int64, Shaped
from torch import Tensor

from ..errors import ClvqError, ConfigError, Interrupted, RanksDiffer
from ..progress import Progress

# What torchrun tells each process that it starts.
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Others wait while one starts the codebook. A process that ends is noticed at once all the same: its connections close.
_PATIENCE = timedelta(days=2)
# How the work of process 0 ended, if not by a signal's number.
_DONE, _FAILED = 0, -1

_ALONE = ContextVar("alone", default=False)


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that `torchrun` started, where it started this one; gives the device to work on.

    Those on GPUs talk by NCCL and each take the one of their number on this machine; all others talk by gloo.

    Raises
    ------
    ConfigError
        Where this machine has fewer GPUs than processes, or torch was built without `torch.distributed`.
    """
    if any(name not in os.environ for name in _LAUNCHED):
        yield device
        return
    if not dist.is_available():
        raise ConfigError("torchrun started this process, but this torch has no torch.distributed: start it by itself")
    if device.type != "cuda":
        _join("gloo")
    else:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if (found := torch.cuda.device_count()) <= device.index:
            raise ConfigError(
                f"process {device.index} of this machine has no GPU of its own, there are {found}: "
                f"start {found} with torchrun --nproc-per-node {found}, or give --device cpu"
            )
        torch.cuda.set_device(device)
        _join("nccl", device)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _join(backend: str, device: torch.device | None = None) -> None:
    # Not there in a torch without `torch.distributed`.
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, ranks = next(rendezvous("env://", timeout=_PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # torchrun keeps its store when it restarts the processes, and with it the addresses of those that died. The
        # number of restarts is only on one machine the same for all.
        store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=_PATIENCE, device_id=device)


def count() -> int:
    """How many processes there are."""
    together = dist.is_available() and dist.is_initialized() and not _ALONE.get()
    return dist.get_world_size() if together else 1


def number() -> int:
    """Which of them this one is."""
    return dist.get_rank() if count() > 1 else 0


@contextmanager
def led() -> Iterator[bool]:
    """Work that process 0 does by itself while the others wait; gives whether this one is to do it.

    Whatever process 0 raises, all others raise too: `Interrupted` for `Interrupted`, and `ClvqError` for the rest.
    """
    if count() == 1:
        yield True
        return
    leads = number() == 0
    ended = _numbers(_FAILED if leads else _DONE)
    token = _ALONE.set(True)
    try:
        yield leads
        ended.fill_(_DONE)
    except Interrupted as error:
        ended.fill_(error.signal_number)
        raise
    finally:
        _ALONE.reset(token)
        # A sum, so that process 0 goes nowhere before the others have come here.
        add_up(ended)
    if not leads and (outcome := int(ended)) != _DONE:
        if outcome == _FAILED:
            raise ClvqError("rank 0 could not go on: what it says itself is the reason")
        raise Interrupted("rank 0 was asked to stop, so all ranks do", signal_number=outcome)


def decided(value: bool) -> bool:
    """What process 0 finds."""
    if count() == 1:
        return value
    found = _numbers(value)
    spread(found)
    return bool(found)


def add_up(*tensors: Shaped[Tensor, "*_any"]) -> None:
    """Make each tensor the sum of all processes', in place; those of one type in one go."""
    if count() == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        with _reaching_all():
            dist.all_reduce(flat)
        for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(part.view_as(tensor))


def joined(values: Shaped[Tensor, "_mine *rest"]) -> Shaped[Tensor, "_all *rest"]:
    """The values of all processes, one after the other; their numbers may differ."""
    if count() == 1:
        return values
    lengths = [int(length) for length in _gathered(_numbers(len(values)))]
    padded = values.new_zeros(max(lengths), *values.shape[1:])
    padded[: len(values)] = values
    return torch.cat([part[:length] for part, length in zip(_gathered(padded), lengths, strict=True)])


def spread(*tensors: Shaped[Tensor, "*_any"]) -> None:
    """Make each tensor that of process 0, in place."""
    if count() == 1:
        return
    with _reaching_all():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def require_equal(name: str, tensor: Shaped[Tensor, "*_any"]) -> None:
    """Make sure that all processes hold the same bytes.

    Raises
    ------
    RanksDiffer
        In all of them.
    """
    if count() == 1:
        return
    digest = hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).digest()[:8]
    digests = [int(each) for each in _gathered(_numbers(int.from_bytes(digest, "big", signed=True)))]
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise RanksDiffer(
            f"the {name} of rank {others[0]} is no longer that of rank 0, so their results would mean nothing: "
            "give all ranks the same hardware and versions, and run the same command again to go on from the last "
            "checkpoint"
        )


class Together:
    """A `Progress` by which all processes stop at the same point, whichever of them is asked to.

    They call `check` together. Only there is `Interrupted` raised, unless a process works alone.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._asked: Interrupted | None = None

    def begin(self, task: str, total: int | None, unit: str) -> None:
        """A task starts."""
        with self._noted():
            self._progress.begin(task, total, unit)

    def advance(self, amount: int = 1, **figures: float) -> None:
        """More units are done."""
        with self._noted():
            self._progress.advance(amount, **figures)

    def check(self) -> None:
        """A safe point."""
        self.agree()

    def agree(self, *mine: int) -> list[int]:
        """A safe point; gives the sum of each number over all processes."""
        with self._noted():
            self._progress.check()
        if count() == 1:
            return list(mine)
        sums = _numbers(*mine, self._asked is not None)
        add_up(sums)
        *totals, stops = sums.tolist()
        if stops:
            raise self._asked or Interrupted("another rank was asked to stop, so all do", signal_number=SIGTERM)
        return totals

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except Interrupted as error:
            if count() == 1:
                raise
            self._asked = error


def _numbers(*values: int) -> Int64[Tensor, " value"]:
    """Numbers where the group can send them."""
    return torch.tensor(values, dtype=torch.int64, device="cpu" if "gloo" in dist.get_backend_config() else "cuda")


def _gathered(tensor: Shaped[Tensor, "*any"]) -> list[Shaped[Tensor, "*any"]]:
    parts = [torch.empty_like(tensor) for _ in range(count())]
    with _reaching_all():
        dist.all_gather(parts, tensor)
    return parts


@contextmanager
def _reaching_all() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ClvqError(
            "another rank has ended or cannot be reached; if it says nothing itself, it was killed: "
            "run the same command again to go on from the last checkpoint"
        ) from error
