"""A study's server as a process of its own, for the tests to talk to and to kill."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_CODE = """
import json, sys
from pathlib import Path
from clvq.errors import ClvqError
from clvq.evaluation.study.server import serve
def ready(links):
    print(json.dumps(links), flush=True)
try:
    serve(Path(sys.argv[1]), port=int(sys.argv[2]), ready=ready, **json.loads(sys.argv[3]))
except ClvqError as error:
    print(type(error).__name__, error, file=sys.stderr)
    sys.exit(getattr(error, "signal_number", 1))
"""


class Server:
    """Serves a folder; started anew, it takes the same port."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder, self.settings = folder, settings
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", _CODE, str(self.folder), str(self.port), json.dumps(self.settings)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server did not start: {self.process.stderr.read()}")
        self.public: list[str] = json.loads(line)
        """The links as they are given to people."""
        self.links = [f"http://127.0.0.1:{self.port}/a/{link.split('/a/')[1]}" for link in self.public]
        """The same at the server's own address."""

    def kill(self) -> None:
        """As if the machine had lost its power, but for what the system still writes."""
        self.end(signal.SIGKILL)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Exit status, and what was said on stderr."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)
        said = self.process.communicate(timeout=30)[1]
        return self.process.returncode, said

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.kill()


def ask(url: str, body: object = None, *, timeout: float = 10) -> tuple[int, Any]:
    """Status and JSON of a GET, or of a POST as the pages send it."""
    parts = urlsplit(url)
    headers = {} if body is None else {"Content-Type": "application/json", "Origin": f"http://{parts.netloc}"}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data, headers=headers), timeout=timeout) as got:
            return got.status, json.loads(got.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def an_answer(
    standing: dict[str, Any], *, answer: int = 0, confidence: int = 2, milliseconds: int = 900
) -> dict[str, Any]:
    """An answer to the open question, as a page sends it."""
    question = standing["question"]
    named = {name: question[name] for name in ("place", "item", "method")}
    return {**named, "answer": answer, "confidence": confidence, "milliseconds": milliseconds}
