"""Cells of a study: `clvq` commands that run side by side, each in a process of its own, and are not run twice.

A finished cell leaves `cells/<name>.json` with its command line, the seconds of processor time that it took and its
key: the hash of the command line, of the version of clvq, and of the keys of the cells that it needs.
"""

import hashlib
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

LOG = logging.getLogger("study")

State = Literal["done", "failed", "stopped", "not run"]

_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 60
"""How long a process that is asked to stop has for saving."""


class NotToRunError(Exception):
    """A cell cannot be run: the message says what it lacks."""


@dataclass(frozen=True)
class Cell:
    """One command."""

    name: str
    """Such as `train/kmeans-seed=42`."""
    command: Callable[[], Sequence[str]]
    """Arguments of `clvq`; asked for when all that the cell needs is over. May raise `NotToRunError`."""
    made: Path
    """The file that it writes last, seen from the study's folder."""
    needs: tuple[str, ...] = ()
    """Names of cells that must be over before."""
    salt: str = ""
    """What else the result depends on, for the key."""


@dataclass(frozen=True)
class Record:
    """What became of a cell; one file."""

    name: str
    state: State
    command: str
    key: str
    cpu_seconds: float = 0.0
    """Processor time of the process and its children, user and system, of all attempts."""
    wall_seconds: float = 0.0
    """Of all attempts."""
    peak_mb: float = 0.0
    attempts: int = 0
    error: str | None = None
    """The last line that the process wrote, or what was missing."""


def record_file(out: Path, name: str) -> Path:
    """Where the record of a cell stands."""
    return out / "cells" / f"{name}.json"


def read_record(out: Path, name: str) -> Record | None:
    """The record of a cell, where it has one that can be read."""
    try:
        return Record(**json.loads(record_file(out, name).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def write_json(file: Path, value: object) -> None:
    """Write a file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.aside")
    aside.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    aside.replace(file)


@dataclass
class _Ready:
    """A cell that waits for its turn."""

    command: list[str]
    record: Record
    """Of the attempts before; the state is what it will be when the process is killed."""


@dataclass
class _Running:
    process: "subprocess.Popen[bytes]"
    record: Record
    log: Path
    started: float


def run_cells(
    cells: Sequence[Cell], out: Path, *, jobs: int, threads: int, check: Callable[[], None] = lambda: None
) -> dict[str, Record]:
    """Run what is not done yet, at most `jobs` at once, and give every cell's record.

    A cell that fails stops no other one; those that need what it would have made are not run.

    Parameters
    ----------
    check
        Called again and again. What it raises ends the study: the processes are told to stop, and what they leave is
        recorded.
    """
    waiting = {cell.name: cell for cell in cells}
    ready: dict[str, _Ready] = {}
    running: dict[str, _Running] = {}
    over: dict[str, Record] = {}
    try:
        while waiting or ready or running:
            check()
            for cell in [cell for cell in waiting.values() if all(need in over for need in cell.needs)]:
                del waiting[cell.name]
                found = _look_at(cell, out, over)
                if isinstance(found, Record):
                    over[cell.name] = found
                else:
                    ready[cell.name] = found
            while ready and len(running) < jobs:
                # Not the one that was ready first: the longest stand first, and would be left alone at the end.
                name = next(cell.name for cell in cells if cell.name in ready)
                running[name] = _start(ready.pop(name), out, threads)
            for name, one in list(running.items()):
                record = _ended(one)
                if record is not None:
                    del running[name]
                    over[name] = _keep(out, record)
            if running:
                time.sleep(_POLL_SECONDS)
    finally:
        _stop(running, out)
    return over


def _look_at(cell: Cell, out: Path, over: dict[str, Record]) -> Record | _Ready:
    """The record of a cell that is not to be run: it is done, or lacks something. Else what to run."""
    before = read_record(out, cell.name) or Record(cell.name, "not run", "", "")
    try:
        command = list(cell.command())
    except NotToRunError as error:
        return _keep(out, replace(before, state="not run", command="", key="", error=str(error)))
    # --force decides what is deleted, not what is made.
    told = [word for word in command if word != "--force"]
    parts = [version("clvq"), cell.salt, told, [over[need].key for need in cell.needs]]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if before.state == "done" and before.key == key and (out / cell.made).is_file():
        LOG.info("%s: done before", cell.name)
        return before
    line = shlex.join(["clvq", *command])
    return _Ready(command, replace(before, state="stopped", command=line, key=key, error=None))


def _start(ready: _Ready, out: Path, threads: int) -> _Running:
    log = out / "logs" / f"{ready.record.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "clvq.cli", *ready.command],
            cwd=out,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "160"},
            # Ctrl-C reaches this process alone, which tells the others once.
            start_new_session=True,
        )
    return _Running(process, ready.record, log, time.monotonic())


def _ended(one: _Running, *, wait: bool = False) -> Record | None:
    """The record of a process that has ended; `None` where it has not."""
    number, status, usage = os.wait4(one.process.pid, 0 if wait else os.WNOHANG)
    if number == 0:
        return None
    code = os.waitstatus_to_exitcode(status)
    # wait4 took the status that Popen would look for.
    one.process.returncode = code
    state: State = "done" if code == 0 else "failed"
    return replace(
        one.record,
        state=state,
        cpu_seconds=round(one.record.cpu_seconds + usage.ru_utime + usage.ru_stime, 2),
        wall_seconds=round(one.record.wall_seconds + time.monotonic() - one.started, 2),
        peak_mb=max(one.record.peak_mb, round(usage.ru_maxrss / 1024, 1)),
        attempts=one.record.attempts + 1,
        error=None if code == 0 else _last_line(one.log) or f"ended with {code} and said nothing",
    )


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _keep(out: Path, record: Record) -> Record:
    write_json(record_file(out, record.name), asdict(record))
    why = "" if record.error is None else f": {record.error}"
    LOG.info("%s: %s, %.1f s of processor time%s", record.name, record.state, record.cpu_seconds, why)
    return record


def _stop(running: dict[str, _Running], out: Path) -> None:
    """Tell the processes to stop; they save first."""
    for one in running.values():
        one.process.terminate()
    end = time.monotonic() + _PATIENCE_SECONDS
    for one in running.values():
        record = None
        while record is None and time.monotonic() < end:
            record = _ended(one)
            time.sleep(_POLL_SECONDS)
        if record is None:
            one.process.kill()
            record = _ended(one, wait=True)
        if record is not None:
            _keep(out, replace(record, state="done" if record.state == "done" else "stopped"))
