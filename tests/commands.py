"""The command, run in this process."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
from clvq import cli


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


def command_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `clvq` with the words that it is given."""

    def run(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["clvq", *map(str, words)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = 0 if stop.code is None else int(stop.code)
        shown = capsys.readouterr()
        return Ended(code, shown.out, shown.err)

    return run
