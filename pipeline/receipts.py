"""What is told of each shard that is done, and of all of them together."""

import time
from dataclasses import dataclass, field

from ..errors import DataError
from ..progress import Progress

# A few texts may be bad; more failures than this are of another kind, and the next shards would fail too.
_MOST_FAILURES = 3


@dataclass(frozen=True)
class Receipt:
    """Proof that a shard stands in the cache."""

    shard: int
    rows: int
    bytes: int
    real: int
    """Token slots computed that were real tokens; 0 where somebody else had made the shard."""
    slots: int


@dataclass
class Tally:
    """Counts receipts and failures, and reports them."""

    shards: int
    """How many are to be made."""
    progress: Progress
    real: int = 0
    slots: int = 0
    rows: int = 0
    bytes: int = 0
    done: int = 0
    failures: dict[int, DataError] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """The time counts from now."""
        self.started = time.perf_counter()

    def add(self, receipt: Receipt, **figures: float) -> None:
        """A shard is done. May raise `Interrupted`."""
        self.done += 1
        self.real, self.slots = self.real + receipt.real, self.slots + receipt.slots
        self.rows, self.bytes = self.rows + receipt.rows, self.bytes + receipt.bytes
        self.progress.advance(
            receipt.rows,
            rows_per_second=self.rows / max(time.perf_counter() - self.started, 1e-9),
            real_share=self.real / max(self.slots, 1),
            megabytes=self.bytes / 1e6,
            shards_done=float(self.done),
            shards_failed=float(len(self.failures)),
            **figures,
        )

    def fail(self, shard: int, error: DataError) -> None:
        """A shard cannot be made; too many of them end the work."""
        self.failures[shard] = error
        if len(self.failures) > _MOST_FAILURES:
            self.settle()

    def settle(self) -> None:
        """Raise where shards failed.

        Raises
        ------
        DataError
        """
        if self.failures:
            first = "; ".join(dict.fromkeys(str(self.failures[shard]) for shard in sorted(self.failures)))
            several = f"{len(self.failures)} shards could" if len(self.failures) > 1 else "1 shard could"
            raise DataError(f"{first} ({several} not be made; {self.done} of {self.shards} were, and are kept)")
