"""Extraction by the workers of a Dask cluster, of this machine or of many.

A shard is a task. A worker writes it into the cache itself and returns a receipt; what stands on the disk is the truth,
so a task that runs twice, or whose receipt is lost with its worker, does no harm. Only a few tasks a worker are under
way at a time: the scheduler never holds more texts than that.
"""

import logging
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
from distributed import Client, KilledWorker, LocalCluster, wait
from distributed.comm.core import CommClosedError

from ..cache.writer import CacheWriter
from ..errors import DataError, FolderInUse, RemoteUnreachable
from ..progress import SILENT, Progress
from .extract import ExtractResult, extract_by
from .plan import Plan
from .receipts import Tally
from .worker import IgnoreInterrupts, Order, make, scales, versions

_log = logging.getLogger(__name__)

# One shard being computed, one being written, and one ready to begin.
_TASKS_PER_WORKER = 3
_THREADS_PER_WORKER = 2
# A local worker takes seconds to start. Dask gives one up that ends while it starts; all are started again then.
_PATIENCE_SECONDS = 45.0
_STARTS = 3
# A receipt lies with the worker until it is fetched.
_RECEIPT_SECONDS = 5
_PLACING_TRIES = 3


@dataclass(frozen=True)
class Cluster:
    """Which workers make the shards: `workers` processes of this machine, or those of the scheduler at an address."""

    workers: int | None = None
    scheduler: str | None = None
    threads: int | None = None
    """Threads of torch in each worker; for local workers the cores are divided where it is not given."""
    worker_ttl: float = 60.0
    """Seconds without a sign of life after which a local worker is replaced, and its shards given to others."""
    allowed_failures: int = 4
    """So many local workers may end over a shard before it counts as one that cannot be made."""


def extract_on(
    plan: Plan,
    out: Path,
    cluster: Cluster,
    *,
    model: str,
    revision: str | None = None,
    device: str = "cpu",
    progress: Progress = SILENT,
    force: bool = False,
) -> ExtractResult:
    """Extract what is missing of a plan into `out` by the workers of a cluster, and finish the cache.

    Parameters
    ----------
    model, revision
        Where the workers find the model; compared with the plan's by its hashes.
    device
        `cpu`, or `cuda`: each local worker takes one of the GPUs, those of a scheduler the first that they see.

    Raises
    ------
    RemoteUnreachable
        Where the scheduler cannot be reached or is gone, or no local worker comes up; finished shards are kept.
    ClvqError
        As `extract`.
    """

    def make_shards(missing: list[int], writer: CacheWriter, tally: Tally) -> None:
        local = cluster.scheduler is None
        order = Order(
            model=model,
            revision=revision,
            config=plan.config,
            extraction=plan.extraction(),
            out=str(out.absolute()),
            device="each" if local and device == "cuda" else device,
            threads=_threads(cluster),
            versions=versions(),
        )
        left, idle = deque(missing), 0
        while left and idle < _STARTS:
            before = len(left)
            with _quiet(), _client(cluster) as client, suppress(_WorkersLost):
                _Dispatch(client, order, plan, tally, cluster).run(left, writer)
            idle = idle + 1 if len(left) == before else 0
        if left:
            raise RemoteUnreachable(
                f"the workers of this machine end again and again, and {_STARTS} times before any made a shard: "
                "see whether the memory is large enough, or try fewer or no --workers"
            )

    return extract_by(make_shards, plan, out, progress=progress, force=force)


def _threads(cluster: Cluster) -> int | None:
    if cluster.threads is None and cluster.workers is not None:
        return max(1, len(os.sched_getaffinity(0)) // cluster.workers)
    return cluster.threads


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask's own account of lost connections off stderr: what they mean here, `RemoteUnreachable` says."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _client(cluster: Cluster) -> Iterator[Any]:
    if cluster.scheduler is not None:
        where = {"scheduler_file" if cluster.scheduler.endswith(".json") else "address": cluster.scheduler}
        try:
            client = Client(**where, timeout=30)
        except (OSError, ValueError) as error:
            raise RemoteUnreachable(
                f"there is no Dask scheduler at {cluster.scheduler} ({_first_line(error)}): start one with "
                "`dask scheduler`, or give --workers"
            ) from error
        try:
            yield client
        finally:
            # A scheduler that is gone is not waited for.
            with suppress(TimeoutError):
                client.close(timeout=5)
        return
    settings = {
        "distributed.scheduler.worker-ttl": f"{cluster.worker_ttl:g} s",
        "distributed.scheduler.allowed-failures": cluster.allowed_failures,
    }
    with dask.config.set(settings):
        try:
            local = LocalCluster(
                n_workers=cluster.workers,
                threads_per_worker=_THREADS_PER_WORKER,
                processes=True,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": False},
                worker_dashboard_address=None,
                # Dask would end workers whose model and shards take more than an even share of the memory.
                memory_limit=0,
                silence_logs=logging.CRITICAL,
            )
        except RuntimeError as error:
            raise RemoteUnreachable(
                f"the workers of this machine do not start ({_first_line(error)}): run the same command again, or try "
                "without --workers"
            ) from error
        try:
            with Client(local) as client:
                # A worker may end just now; the one that takes its place gets the plugin when it starts.
                with suppress(CommClosedError):
                    client.register_plugin(IgnoreInterrupts())
                yield client
        finally:
            _end(local)


class _WorkersLost(Exception):
    """Local workers are gone for good; others may be started in their place."""


def _end(local: LocalCluster) -> None:
    """End the workers, also such as are stopped and hear of no friendlier way; they have nothing to lose."""
    nannies = list(local.workers.values())
    with suppress(TimeoutError):
        local.close(timeout=5)
    for nanny in nannies:
        if nanny.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(nanny.pid, signal.SIGKILL)
    # Until this is through, Python would wait for it when it ends.
    with suppress(TimeoutError):
        local.close(timeout=10)


class _Dispatch:
    """Gives shards to workers and takes their receipts."""

    def __init__(self, client: Client, order: Order, plan: Plan, tally: Tally, cluster: Cluster) -> None:
        self._client, self._order, self._plan, self._tally, self._cluster = client, order, plan, tally, cluster
        self._run = f"clvq-{time.time_ns():x}"
        self._workers, self._workers_seen = 0, time.monotonic()
        self._asked = 0.0
        self._warned = False
        self._submitted = 0

    def run(self, waiting: deque[int], writer: CacheWriter) -> None:
        """Make the shards that wait; where that ends early, those that are left wait again."""
        running, again = dict[Any, int](), Counter[int]()
        try:
            writer.fix_scales(self._scales)
            while waiting or running:
                self._count_workers()
                while waiting and len(running) < _TASKS_PER_WORKER * max(1, self._workers):
                    number = waiting.popleft()
                    running[self._submit(make, self._plan.work(number))] = number
                for future in self._finished(list(running)):
                    number = running[future]
                    try:
                        receipt = self._result(future, number)
                        del running[future]
                        self._tally.add(receipt, workers=float(self._workers))
                        writer.done.add(number)
                    except TimeoutError:
                        # The receipt was lost with its worker. The task runs again, and finds its shard there.
                        continue
                    except FolderInUse as error:
                        # A worker that was stopped while it placed its files lets go once it is ended.
                        del running[future]
                        again[number] += 1
                        if again[number] > _PLACING_TRIES:
                            self._tally.fail(number, DataError(str(error)))
                        else:
                            waiting.append(number)
                    except DataError as error:
                        del running[future]
                        self._tally.fail(number, error)
        finally:
            waiting.extend(running.values())
            with suppress(CommClosedError, CancelledError, OSError, TimeoutError):
                self._client.cancel(list(running))

    def _scales(self) -> Any:
        future = self._submit(scales, self._plan.scale_work())
        while True:
            self._count_workers()
            if self._finished([future]):
                with suppress(TimeoutError):
                    return self._result(future, 0)

    def _submit(self, function: Any, work: Any) -> Any:
        self._submitted += 1
        with self._connected():
            key = f"{self._run}-{function.__name__}-{work.number}-{self._submitted}"
            return self._client.submit(function, self._order, work, key=key, pure=False)

    def _finished(self, futures: list[Any]) -> list[Any]:
        """Those that are done; waits a moment for one. May raise `Interrupted`."""
        self._tally.progress.check()
        with self._connected():
            try:
                return list(wait(futures, timeout=0.2, return_when="FIRST_COMPLETED").done)
            except TimeoutError:
                return []

    def _result(self, future: Any, number: int) -> Any:
        with self._connected():
            try:
                return future.result(timeout=_RECEIPT_SECONDS)
            except KilledWorker as error:
                work = self._plan.work(number)
                raise DataError(
                    f"shard {number} ended {self._cluster.allowed_failures + 1} workers, one after the other: one of "
                    f"its {len(work.texts)} texts ({work.where[0]} … {work.where[-1]}) may need more memory than there "
                    "is; look at the workers' logs, or give a smaller --batch-tokens"
                ) from error

    def _count_workers(self) -> None:
        now = time.monotonic()
        if now < self._asked + 1:
            return
        with self._connected():
            self._workers = len(self._client.nthreads())
        self._asked = now
        if self._workers >= (self._cluster.workers or 1):
            self._workers_seen, self._warned = now, False
        elif self._cluster.scheduler is None and now > self._workers_seen + _PATIENCE_SECONDS:
            raise _WorkersLost
        elif self._cluster.scheduler is not None and now > self._workers_seen + 10 and not self._warned:
            _log.warning("the scheduler at %s has no workers; waiting for some", self._cluster.scheduler)
            self._warned = True

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            # Asked first: a call would wait for the connection for long.
            if not self._is_connected:
                raise CommClosedError(f"the client is {self._client.status}")
            yield
        except (OSError, CancelledError) as error:
            # An error of a worker's disk, say, is none of the connection.
            if self._is_connected and not isinstance(error, (CommClosedError, CancelledError)):
                raise
            raise RemoteUnreachable(
                f"the Dask scheduler is gone ({_first_line(error)}); every finished shard is kept: start it again, and "
                "run the same command again"
            ) from error

    @property
    def _is_connected(self) -> bool:
        return self._client.status in ("running", "newly-created")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
