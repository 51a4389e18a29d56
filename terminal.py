"""How the command talks: tables and JSON on stdout, progress and one-line messages on stderr."""

import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from .errors import Interrupted

if TYPE_CHECKING:
    from .evaluation.bootstrap import Estimate


class _Terminal:
    """Shows progress on stderr where that is a terminal, and turns SIGINT and SIGTERM into `Interrupted`."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._task: Any = None
        self._signal: int | None = None

    def stop(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            os._exit(128 + number)
        self._signal = number
        say("stopping as soon as everything finished is saved; once more to stop at once")

    def begin(self, task: str, total: int | None, unit: str) -> None:
        if self._task is not None:
            self._bars.update(self._task, visible=False)
        self._task = self._bars.add_task(task, total=total, unit=unit, figures="")

    def advance(self, amount: int = 1, **figures: float) -> None:
        shown = " ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in figures.items())
        self._bars.update(self._task, advance=amount)
        if shown:
            self._bars.update(self._task, figures=shown)
        self.check()

    def check(self) -> None:
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            raise Interrupted(
                f"stopped by {name}; everything finished is saved: run the same command again to go on",
                signal_number=self._signal,
            )


def _short(value: float) -> str:
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"


@contextmanager
def progress_bars(*, shown: bool = True) -> Iterator[_Terminal]:
    """Progress for the library to report to, and a clean stop on Ctrl-C and SIGTERM."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        # What stands beside it fits a terminal of 100 columns.
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with RichProgress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bars:
        terminal = _Terminal(bars)
        before = {number: signal.signal(number, terminal.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield terminal
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def show(figures: dict[str, Any], *, as_json: bool, title: str) -> None:
    """Figures by name, as a table or as JSON."""
    if as_json:
        print_json(figures)
        return
    table = Table(title=printable(title), title_justify="left", show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in figures.items():
        for label, shown in _flat(name, value):
            table.add_row(printable(label.replace("_", " ")), printable(shown))
    put(table)


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name} {key}", inner)
    elif isinstance(value, (list, tuple)):
        yield name, "\n".join(map(str, value)) or "none"
    elif isinstance(value, bool) or value is None:
        yield name, {True: "yes", False: "no", None: "–"}[value]
    elif isinstance(value, int) and name != "seed":
        yield name, f"{value:,}"
    elif isinstance(value, float):
        yield name, f"{value:.4g}" if math.isfinite(value) else "–"
    else:
        yield name, str(value)


def print_json(value: Any) -> None:
    """One JSON object; numbers that JSON does not know become null."""

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {str(key): plain(inner) for key, inner in part.items()}
        if isinstance(part, (list, tuple)):
            return [plain(inner) for inner in part]
        if isinstance(part, float) and not math.isfinite(part):
            return None
        return str(part) if isinstance(part, Path) else part

    unicode = sys.stdout.encoding.lower().startswith("utf")
    put(json.dumps(plain(value), ensure_ascii=not unicode, indent=1))


def put(what: Any, *, whole: bool = False) -> None:
    """To stdout. Text goes as it is; tables are wrapped, unless they must stay `whole`."""
    if isinstance(what, str):
        sys.stdout.write(printable(what) + "\n")
    else:
        console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
        if whole:
            console.width = max(console.width, console.measure(what, options=console.options.update(width=999)).maximum)
        console.print(what)


def titled(columns: list[str], title: str) -> Table:
    """An empty table of results."""
    return Table(*columns, title=title, box=SIMPLE_HEAD, title_justify="left")


def interval(value: "Estimate | None", form: str = ".3f") -> str:
    """An estimate with its interval; a dash where there is none."""
    if value is None or math.isnan(value.value):
        return "–"
    return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"


def say(message: str) -> None:
    """One line to stderr."""
    sys.stderr.write(printable(" ".join(message.split())) + "\n")


def printable(text: str) -> str:
    """Text as a terminal may see it: a stranger's cache may hold signs that would steer it."""
    return "".join(sign if sign.isprintable() or sign == "\n" else repr(sign)[1:-1] for sign in text)
