"""How long work tells about itself, and how it is asked to stop, without the library printing or catching signals.

A `Progress` is called only at points where everything done so far is consistent. It may raise `Interrupted` there; the
caller saves what it has and lets the exception through.
"""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """What a long job calls while it works."""

    def begin(self, task: str, total: int | None, unit: str) -> None:
        """A task of `total` units starts; `None` where the total is not known."""

    def advance(self, amount: int = 1, **figures: float) -> None:
        """`amount` more units are done; `figures` are the latest measurements. May raise `Interrupted`."""

    def check(self) -> None:
        """A safe point within a unit; raises `Interrupted` where a stop was asked for."""


class Silent:
    """A `Progress` that shows nothing and never stops the work."""

    def begin(self, task: str, total: int | None, unit: str) -> None:
        """Ignore."""

    def advance(self, amount: int = 1, **figures: float) -> None:
        """Ignore."""

    def check(self) -> None:
        """Ignore."""


SILENT = Silent()
