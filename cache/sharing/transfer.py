"""Many files on their way at once, in bounded memory."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

THREADS = 8
# Bytes of files that are held in memory on their way; a file that is larger travels alone.
MEMORY = 512 << 20
# How long a request to stop may go unseen.
_SECONDS = 0.1

Item = TypeVar("Item")


def in_parallel(
    work: Callable[[Item, Callable[[], bool]], None],
    items: Sequence[Item],
    *,
    check: Callable[[], None],
    done: Callable[[Item], None],
    threads: int = THREADS,
) -> None:
    """Do `work(item, stopped)` for all items, several at a time; `done` and `check` are called in this thread.

    Where `check`, `done` or one of the items raises, no further item is begun, `stopped()` becomes true for those at
    work, and when they have ended the exception is passed on.
    """
    stop = threading.Event()
    ended: SimpleQueue[tuple[Future[None], Item]] = SimpleQueue()
    with ThreadPoolExecutor(threads, thread_name_prefix="clvq-transfer") as pool:
        try:
            for item in items:
                pool.submit(work, item, stop.is_set).add_done_callback(partial(_note, ended, item))
            left = len(items)
            while left:
                with suppress(Empty):
                    future, item = ended.get(timeout=_SECONDS)
                    future.result()
                    done(item)
                    left -= 1
                check()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _note(ended: SimpleQueue[tuple[Future[None], Item]], item: Item, future: Future[None]) -> None:
    ended.put((future, item))


class Room:
    """Lets files into memory as long as all of them together stay below a limit."""

    def __init__(self, limit: int = MEMORY) -> None:
        self._limit = limit
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Wait until `size` more bytes fit, and hold their place."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + size <= self._limit)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()
