"""Places that caches are shared through, for tests; as a script, it pushes a folder to a URL, or pulls into it."""

import hashlib
import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest
from clvq.progress import Silent

SCRIPT = Path(__file__)
KINDS = ["folder", "s3", "hub"]


class Place(Protocol):
    """Somewhere to push to and to pull from, looked at from behind."""

    url: str
    environment: dict[str, str]
    """Of processes that use it."""

    def contents(self) -> dict[str, bytes]:
        """Every file that is there."""

    def put(self, name: str, data: bytes | None) -> None:
        """Write a file as nobody in the library would, or take it away."""


class FolderPlace:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = str(path)
        self.environment: dict[str, str] = {}

    def contents(self) -> dict[str, bytes]:
        files = [file for file in self.path.rglob("*") if file.is_file()]
        return {file.relative_to(self.path).as_posix(): file.read_bytes() for file in files}

    def put(self, name: str, data: bytes | None) -> None:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            file.unlink()
        else:
            file.write_bytes(data)


class S3Place:
    def __init__(self) -> None:
        from .servers import BUCKET, seaweed

        self.server = seaweed()
        self.prefix = f"tests/{secrets.token_hex(4)}"
        self.url = f"s3://{BUCKET}/{self.prefix}"
        self.environment = self.server.environment

    def contents(self) -> dict[str, bytes]:
        return self.server.contents(self.prefix)

    def put(self, name: str, data: bytes | None) -> None:
        from .servers import BUCKET

        if data is None:
            self.server.ask("DELETE", f"/{BUCKET}/{self.prefix}/{name}")
        else:
            self.server.put(self.prefix, name, data)


class HubPlace:
    def __init__(self, hub: object) -> None:
        from .fake_hub import Hub

        assert isinstance(hub, Hub)
        self.hub = hub
        self.url = "hf://user/cache"
        self.environment = hub.environment

    def contents(self) -> dict[str, bytes]:
        if "user/cache" not in self.hub.repositories:
            return {}
        files = self.hub.repositories["user/cache"].head()
        return {name: data for name, data in files.items() if name != ".gitattributes"}

    def put(self, name: str, data: bytes | None) -> None:
        from .fake_hub import Repository

        repository = self.hub.repositories.setdefault("user/cache", Repository(private=True))
        files = dict(repository.head())
        if data is None:
            del files[name]
        else:
            files[name] = data
        repository.commit("main", files, "Somebody else's")


@contextmanager
def a_place(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A place of one of `KINDS` that holds nothing, with an environment in which it can be used."""
    if kind == "folder":
        yield FolderPlace(folder)
    elif kind == "s3":
        place = S3Place()
        place.server.into(monkeypatch)
        yield place
    else:
        from .fake_hub import Hub

        with Hub().serving() as hub:
            hub.into(monkeypatch)
            yield HubPlace(hub)


class StopsAfter(Silent):
    """Asks to stop once so many bytes, or files, are done."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, amount: int = 1, **figures: float) -> None:
        from clvq.errors import Interrupted

        self.left -= 1
        if self.left <= 0:
            raise Interrupted("stopped", signal_number=2)


def resealed(manifest: bytes, **changes: object) -> bytes:
    """A manifest with other members, whose checksum is right all the same."""
    plain = json.loads(manifest) | changes | {"checksum": "0" * 64}
    data = (json.dumps(plain, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()
    digest = hashlib.sha256(data).hexdigest()
    return re.sub(rb'("checksum": ")0{64}', rb"\g<1>" + digest.encode(), data, count=1)


def started(action: str, folder: Path, place: Place) -> subprocess.Popen[bytes]:
    """A process that is about to push the folder to the place, or to pull into it."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, action, folder, place.url], stdout=subprocess.PIPE, env=os.environ | place.environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


if __name__ == "__main__":
    from clvq.cache.sharing.pull import pull
    from clvq.cache.sharing.push import push
    from clvq.cache.sharing.stores import open_store

    open_store(sys.argv[3])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if sys.argv[1] == "push":
        push(Path(sys.argv[2]), sys.argv[3])
    else:
        pull(sys.argv[3], Path(sys.argv[2]))
