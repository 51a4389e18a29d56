"""Pools of decoded rows, and batches made of them some steps before they are asked for.

An epoch is a sequence of pools. While batches are made of one, the next is decoded into the other of two buffers, a
little with every batch, on a few threads. Tasks begin in the order in which they were handed in, and wait only for
tasks handed in before: so no two wait for each other, and a stream that is left early ends with what runs just then.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64, Shaped

from ..errors import ConfigError
from .reader import Cache
from .recycle import Recycler
from .shards import chunk_runs

POOL_BYTES = 256 << 20
# A thread decodes about 2 GB/s; whoever trains needs the rest of the machine.
THREADS = 2
# Batches made before they are asked for: enough that a late thread is not waited for.
_AHEAD = 4
# A task of so many chunks takes some 4 ms: long against handing it in, short against the batches made ahead.
_CHUNKS_PER_TASK = 8

Step = TypeVar("Step")
Step_co = TypeVar("Step_co", covariant=True)
Batch = TypeVar("Batch")
Task = Callable[[], object]


@runtime_checkable
class Plan(Protocol[Step_co]):
    """A pool to come. Its methods are called on other threads."""

    @property
    def continues(self) -> bool:
        """Whether its last step is finished by the first step of the next pool."""

    def places(self) -> Int64[np.ndarray, " row"]:
        """Its rows' places, ascending."""

    def steps(self) -> Sequence[Step_co]:
        """What is made of it, in order."""


@dataclass(frozen=True)
class Buffer:
    """Memory for a pool. Row 0 stands for padding: zeros, at place −1; the pool's rows follow."""

    places: Int64[np.ndarray, " pool"]
    """Where each row lies in the cache."""
    values: dict[str, Shaped[np.ndarray, "pool _d"]]
    """Site → vectors as stored."""
    scales: dict[str, Float32[np.ndarray, " pool"]]
    """int8 site → scales of the rows."""
    columns: dict[str, Shaped[np.ndarray, " pool"]]
    """Columns of the row axis."""


class Pool:
    """A buffer that is being filled."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.loading: list[Future[object]] = []
        self.full = False

    def wait(self) -> Buffer:
        """The buffer once it is full; raises what a task that fills it raised."""
        if not self.full:
            for future in self.loading:
                future.result()
            self.full = True
        return self.buffer


class _Coming(Generic[Step]):
    """A pool that is opened on another thread, then loaded task by task."""

    def __init__(
        self, pool: Pool, open_: Callable[[], tuple[Sequence[Step], list[Task]]], threads: ThreadPoolExecutor
    ) -> None:
        self.pool = pool
        self._threads = threads
        self._opening = threads.submit(open_)
        self._tasks: deque[Task] | None = None

    def load_share(self, of: int) -> None:
        """Hand in a share of the tasks that are left; of none as long as the pool is not open."""
        if self._opening.done():
            self._load(of)

    def load_rest(self) -> Sequence[Step]:
        """Hand in the tasks that are left, and give the pool's steps."""
        self._load(1)
        return self._opening.result()[0]

    def _load(self, of: int) -> None:
        if self._tasks is None:
            self._tasks = deque(self._opening.result()[1])
        for _ in range(-(-len(self._tasks) // max(1, of))):
            self.pool.loading.append(self._threads.submit(self._tasks.popleft()))


class Pools:
    """The pools of one stream.

    Parameters
    ----------
    cache
        Where to read.
    sites, columns
        What to read of each row.
    rows
        Rows of the largest pool.
    keep
        Whether there is only one pool, with all rows; it then stays in memory from one epoch to the next.
    threads
        Threads that decode and make batches.
    """

    def __init__(
        self, cache: Cache, sites: Sequence[str], columns: Sequence[str], *, rows: int, keep: bool, threads: int
    ) -> None:
        self.sites = tuple(sites)
        self._cache = cache
        self._columns = tuple(columns)
        self._rows = rows
        self._keep = keep
        self._threads = threads
        self._widening = {site: cache.widening(site) for site in self.sites}
        self._memory = Recycler(keep=2 * _AHEAD * len(self.sites))
        self._spare: list[Buffer] = []
        self._kept: Pool | None = None

    def empty(self, *shape: int) -> dict[str, Float32[np.ndarray, "..."]]:
        """Memory for the vectors of a batch at each site, the caller's for good."""
        return {site: self._memory.empty(*shape, self._cache.width(site)) for site in self.sites}

    def gather(
        self, buffer: Buffer, index: Int64[np.ndarray, " slot"], out: dict[str, Float32[np.ndarray, "slot _d"]]
    ) -> None:
        """Write the vectors of rows of a buffer into `out`."""
        for site, values in out.items():
            self._widening[site].gather(buffer.values[site], buffer.scales.get(site), index, values)

    def batches(self, plans: Sequence[Plan[Step]], make: Callable[[list[tuple[Pool, Step]]], Batch]) -> Iterator[Batch]:
        """What `make` makes of each step, in order; of a step that continues in the next pool, from both parts."""
        if not plans:
            return
        if self._kept is not None:
            buffers, first = [], self._kept
        else:
            buffers = [self._spare.pop() if self._spare else self._new_buffer() for _ in plans[:2]]
            first = Pool(buffers[0])
        threads = ThreadPoolExecutor(self._threads, thread_name_prefix="clvq-read")
        try:
            yield from self._run(plans, make, first, buffers, threads)
        finally:
            threads.shutdown(cancel_futures=True)
            if self._keep and first.full:
                self._kept = first
            else:
                self._spare = (self._spare + buffers)[:2]

    def _run(
        self,
        plans: Sequence[Plan[Step]],
        make: Callable[[list[tuple[Pool, Step]]], Batch],
        pool: Pool,
        buffers: list[Buffer],
        threads: ThreadPoolExecutor,
    ) -> Iterator[Batch]:
        ahead: deque[Future[Batch]] = deque()
        parts: list[tuple[Pool, Step]] = []
        coming: _Coming[Step] | None = _Coming(pool, partial(self._open, plans[0], pool), threads)
        # Batches that still read the buffer that the next pool goes into.
        busy: list[Future[Batch]] = []
        for number, plan in enumerate(plans):
            if coming is None:
                wait(busy)
                coming = self._begin(plan, buffers[number % 2], threads)
            pool, steps, coming, busy = coming.pool, coming.load_rest(), None, list(ahead)
            for step, spec in enumerate(steps):
                parts.append((pool, spec))
                if step + 1 < len(steps) or not plan.continues:
                    ahead.append(threads.submit(make, parts))
                    busy += ahead if len(parts) > 1 else []
                    parts = []
                while len(ahead) > _AHEAD:
                    yield ahead.popleft().result()
                if number + 1 < len(plans) and all(future.done() for future in busy):
                    busy = []
                    coming = coming or self._begin(plans[number + 1], buffers[(number + 1) % 2], threads)
                    coming.load_share(len(steps) - step)
        while ahead:
            yield ahead.popleft().result()

    def _begin(self, plan: Plan[Step], buffer: Buffer, threads: ThreadPoolExecutor) -> _Coming[Step]:
        pool = Pool(buffer)
        return _Coming(pool, partial(self._open, plan, pool), threads)

    def _open(self, plan: Plan[Step], pool: Pool) -> tuple[Sequence[Step], list[Task]]:
        """The pool's steps, and what fills its buffer where it is not full."""
        return plan.steps(), [] if pool.full else self._tasks(plan.places(), pool.buffer)

    def _tasks(self, places: Int64[np.ndarray, " row"], buffer: Buffer) -> list[Task]:
        rows = slice(1, 1 + len(places))
        buffer.places[rows] = places
        memory = {f"sites/{site}": values for site, values in buffer.values.items()}
        memory |= {f"scales/{site}": values for site, values in buffer.scales.items()}
        memory |= {f"rows/{column}": values for column, values in buffer.columns.items()}
        tasks: list[Task] = []
        for name, values in memory.items():
            layout, out = self._cache.layouts[name], values[rows]
            self._cache.files.soon(name, layout, places)
            runs = chunk_runs(places, layout.chunk)
            for some in (runs[first : first + _CHUNKS_PER_TASK] for first in range(0, len(runs), _CHUNKS_PER_TASK)):
                part = slice(some[0][0], some[-1][1])
                tasks.append(partial(self._cache.files.read, name, layout, places[part], out=out[part]))
        return tasks

    def _new_buffer(self) -> Buffer:
        def zeros_first(array: str, *rest: int) -> Shaped[np.ndarray, "pool *rest"]:
            memory = np.empty((1 + self._rows, *rest), dtype=self._cache.layouts[array].dtype)
            memory[0] = 0
            return memory

        places = np.empty(1 + self._rows, dtype=np.int64)
        places[0] = -1
        scaled = [site for site in self.sites if f"scales/{site}" in self._cache.layouts]
        return Buffer(
            places=places,
            values={site: zeros_first(f"sites/{site}", self._cache.width(site)) for site in self.sites},
            scales={site: zeros_first(f"scales/{site}") for site in scaled},
            columns={column: zeros_first(f"rows/{column}") for column in self._columns},
        )


def check_rank(rank: int, ranks: int) -> None:
    """Make sure that there is such a rank.

    Raises
    ------
    ConfigError
    """
    if not 0 <= rank < ranks:
        raise ConfigError(f"rank {rank} of {ranks} does not exist: ranks are numbered from 0")
