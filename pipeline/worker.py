"""Making shards in the process of a Dask worker: one model, loaded once."""

import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from distributed import Worker, WorkerPlugin, get_worker
from jaxtyping import Float32

from ..cache.extraction import Extraction
from ..cache.layout import MANIFEST, UNFINISHED
from ..cache.shard_writer import ShardWriter
from ..errors import ConfigError, ResumeMismatch
from ..progress import SILENT
from .config import ExtractConfig
from .forward import channel_scales, load_model, make_shard
from .receipts import Receipt
from .source import find_model
from .work import Work

PACKAGES = ("clvq", "torch", "transformers", "tokenizers", "numpy", "numcodecs", "dask", "distributed")


@dataclass(frozen=True)
class Order:
    """What a worker needs to know of an extraction, the same for all its shards."""

    model: str
    """Folder or Hub name."""
    revision: str | None
    config: ExtractConfig
    extraction: Extraction
    out: str
    """The cache's folder, the same for all workers."""
    device: str
    """`cpu`, `cuda`, or `each` for one of the machine's GPUs per worker."""
    threads: int | None
    """Of torch; as it comes where not given."""
    versions: dict[str, str]
    """Of the packages that the bytes depend on, where the command runs."""


def versions() -> dict[str, str]:
    """Versions of the packages that the bytes of a cache depend on, here."""
    from importlib.metadata import version

    return {name: version(name) for name in PACKAGES}


def make(order: Order, work: Work) -> Receipt:
    """Make a shard, unless it is there already.

    Raises
    ------
    DataError
        Where the model fails on a text.
    ClvqError
        Where this worker cannot make any.
    """
    station = _held.station(order)
    station.read_scales()
    written = station.writer.written(work.number)
    if written is not None:
        return Receipt(work.number, work.rows, written, 0, 0)
    # A worker may be given several shards at once: while one is computed, another is written.
    with station.computing:
        made = make_shard(work, order.config, station.model, SILENT)
    with station.writing:
        try:
            written = station.writer.commit(made.shard)
        except ResumeMismatch:
            # Somebody else, with other hardware, was first: what stands there is the shard.
            written = station.writer.written(work.number)
            if written is None:
                raise
    return Receipt(work.number, work.rows, written, made.real, made.slots)


def scales(order: Order, work: Work) -> dict[str, Float32[np.ndarray, " _d"]]:
    """Scales of the channels for int8."""
    station = _held.station(order)
    with station.computing:
        return channel_scales(work, order.config, station.model, SILENT)


class IgnoreInterrupts(WorkerPlugin):
    """Leaves Ctrl-C, which the terminal sends to all processes, to the one that ends the workers."""

    def setup(self, worker: Worker) -> None:
        """Ignore SIGINT."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Station:
    """What a worker keeps for an extraction."""

    def __init__(self, order: Order) -> None:
        mine = versions()
        odd = [f"{name} {mine[name]} there, {ours} here" for name, ours in order.versions.items() if mine[name] != ours]
        if odd:
            raise ConfigError(
                f"a worker has other versions, which may give other bytes ({', '.join(odd)}): make them the same"
            )
        out = Path(order.out)
        if not any((out / name).is_file() for name in (UNFINISHED, MANIFEST)):
            raise ConfigError(f"a worker does not see the cache at {out}: put it on a disk that all workers share")
        if order.threads is not None:
            torch.set_num_threads(order.threads)
        source = find_model(order.model, revision=order.revision)
        source.require_identity(order.extraction.identity["model"])
        self.order = order
        self.model = load_model(source, order.config, device=_device(order.device))
        self.writer = ShardWriter(out, order.extraction)
        self.computing, self.writing = threading.Lock(), threading.Lock()
        self._scaled = False

    def read_scales(self) -> None:
        """Take the channel scales that were fixed; they are read once."""
        with self.writing:
            if not self._scaled:
                self.writer.fix_scales(dict)
                self._scaled = True


class _Held:
    """At most one station: a worker that goes over to another extraction gives the first one's memory back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._station: _Station | None = None

    def station(self, order: Order) -> _Station:
        """The station of an extraction, made where it is not the one held."""
        with self._lock:
            if self._station is None or self._station.order != order:
                self._station = None
                self._station = _Station(order)
            return self._station


_held = _Held()


def _device(name: str) -> torch.device:
    if name != "each":
        return torch.device(name)
    return torch.device("cuda", int(get_worker().name) % torch.cuda.device_count())
