"""What stops a training at one of its safe points."""

from clvq.progress import Silent


class Stops(Silent):
    """Raises at its `after`-th safe point."""

    def __init__(self, after: int, error: BaseException | type[BaseException]) -> None:
        self.left, self.error = after, error

    def check(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise self.error

    def advance(self, amount: int = 1, **figures: float) -> None:
        self.check()


class Pulled(BaseException):
    """As if the plug had been pulled: nothing in the library catches it."""
