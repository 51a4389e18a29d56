"""Every call that was answered, on disk, so that nothing is paid for twice: one JSON object a line, in order.

A call is found again by what was sent, so replies also serve other settings that ask the same.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ...cache.files import disk_full_names, fsync_folder
from ...errors import DataError
from .endpoint import Reply


@dataclass(frozen=True)
class Call:
    """A call and what came of it."""

    key: str
    judge: str
    reply: Reply | None
    refused: str | None
    """Why the server does not answer this request."""


_CALL = TypeAdapter(Call)


def call_key(endpoint: str, body: Mapping[str, Any]) -> str:
    """What tells a call from others."""
    return hashlib.sha256(json.dumps([endpoint, body], sort_keys=True).encode()).hexdigest()


class Calls:
    """The calls in a file; used from several threads.

    Raises
    ------
    DataError
        Where a line is damaged. A last line that a stop cut off is no damage: its call is made again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._found: dict[str, Call] = {}
        data = path.read_bytes() if path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                call = _CALL.validate_python(json.loads(line))
            except (ValidationError, ValueError, TypeError, RecursionError) as error:
                raise DataError(
                    f"{path}: line {number} is damaged; take it out, and run the command again to make its call anew"
                ) from error
            self._found[call.key] = call
        with disk_full_names(path):
            new = not path.is_file()
            self._file = open(path, "x+b" if new else "r+b")  # noqa: SIM115 - open as long as the calls are
            self._file.truncate(len(whole))
            self._file.seek(len(whole))
            if new:
                fsync_folder(path.parent)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def get(self, key: str) -> Call | None:
        """The call, if it was made."""
        return self._found.get(key)

    def of_judge(self, judge: str) -> list[Call]:
        """All calls of a judge."""
        return [call for call in self._found.values() if call.judge == judge]

    def add(self, call: Call) -> None:
        """Keep a call; on disk when this returns."""
        line = json.dumps(asdict(call), ensure_ascii=True).encode() + b"\n"
        with self._lock, disk_full_names(self.path):
            place = self._file.tell()
            try:
                self._file.write(line)
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError:
                # Half a line would hide what is written after it.
                self._file.seek(place)
                self._file.truncate(place)
                raise
            self._found[call.key] = call
