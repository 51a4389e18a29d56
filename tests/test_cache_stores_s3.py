"""Caches in S3-compatible storage: a real server, and one that ignores conditions."""

import secrets
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from clvq.cache.sharing.s3 import S3Store
from clvq.errors import (
    CacheCorrupt,
    ClvqError,
    MissingExtra,
    RemoteDenied,
    RemoteNotFound,
    RemoteUnreachable,
    RemoteUnsafe,
)

from .servers import BUCKET, KEY, S3, SECRET, rclone, seaweed


@pytest.fixture
def prefix() -> str:
    """A place in the bucket that nobody else uses."""
    return f"tests/{secrets.token_hex(4)}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server that heeds conditions, named by the environment."""
    seaweed().into(monkeypatch)
    return seaweed()


@pytest.fixture
def store(server: S3, prefix: str) -> S3Store:
    return S3Store(BUCKET, prefix)


def test_what_is_written_is_read_back(store: S3Store, server: S3, prefix: str, tmp_path: Path) -> None:
    data = secrets.token_bytes(3_000_000)
    assert store.read("a/b", limit=10) is None
    store.write("a/b", b"old")
    store.write("a/b", data)
    assert server.get(prefix, "a/b") == data
    assert store.read("a/b", limit=len(data)) == data
    store.fetch("a/b", tmp_path / "b", size=len(data))
    assert (tmp_path / "b").read_bytes() == data
    store.delete("a/b")
    store.delete("a/b")
    assert server.names(prefix) == []


def test_the_bucket_itself_can_be_the_place(server: S3) -> None:
    store, name = S3Store(BUCKET, ""), secrets.token_hex(4)
    store.write(name, b"data")
    assert store.name == f"s3://{BUCKET}"
    assert store.read(name, limit=4) == b"data"


def test_a_file_of_another_size_is_not_fetched(store: S3Store, tmp_path: Path) -> None:
    store.write("file", b"12345")
    with pytest.raises(CacheCorrupt) as caught:
        store.read("file", limit=4)
    assert str(caught.value) == f"{store.name}/file has 5 bytes, more than the 4 that it may have; nothing was read"
    with pytest.raises(CacheCorrupt) as caught:
        store.fetch("file", tmp_path / "file", size=6)
    assert str(caught.value) == (f"{store.name}/file has 5 bytes instead of 6: ask whoever shared it to push it again")
    with pytest.raises(CacheCorrupt) as caught:
        store.fetch("none", tmp_path / "file", size=6)
    assert str(caught.value) == (
        f"{store.name}/none is missing, though the manifest lists it: ask whoever shared it to push it again"
    )
    assert not (tmp_path / "file").exists()


def test_of_many_who_create_a_file_at_once_one_succeeds_and_its_bytes_stay(store: S3Store) -> None:
    start = threading.Barrier(4)

    def create(number: int) -> bool:
        start.wait()
        return store.create("file", b"%d" % number)

    with ThreadPoolExecutor(4) as threads:
        first = list(threads.map(create, range(4)))
    assert first.count(True) == 1
    assert store.read("file", limit=1) == b"%d" % first.index(True)


def test_a_server_that_heeds_conditions_may_be_written_to_and_keeps_no_trace_of_the_question(
    store: S3Store, server: S3, prefix: str
) -> None:
    with store.writing(public=False):
        assert server.names(prefix) == []


def test_a_server_that_ignores_conditions_is_refused_and_keeps_no_trace_of_the_question(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = rclone()
    server.into(monkeypatch)
    store = S3Store(BUCKET, prefix)
    with pytest.raises(RemoteUnsafe) as caught, store.writing(public=False):
        pass
    assert str(caught.value) == (
        f"{store.name}: {server.endpoint} ignores conditional writes (If-None-Match), so that two who push at once "
        "would overwrite each other: push to a server that heeds them, or to a folder"
    )
    assert server.names(prefix) == []
    server.put(prefix, "file", b"data")
    assert store.read("file", limit=4) == b"data"


def told(error: BaseException) -> str:
    """Everything that Python can tell about an error."""
    return "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error))


@pytest.fixture
def mistake(server: S3, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Something wrong with the environment; the address of the server as it may be told."""
    match request.param:
        case "key":
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unknown-key")
        case "secret":
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
        case "unreachable":
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{KEY}:{SECRET}@127.0.0.1:1")
            return "http://127.0.0.1:1"
    return server.endpoint


@pytest.mark.parametrize(
    ("mistake", "kind", "message"),
    [
        (
            "key",
            RemoteDenied,
            "{0} denied access (InvalidAccessKeyId): check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_REGION, "
            "and what this key may do (list, get, put and delete)",
        ),
        (
            "secret",
            RemoteDenied,
            "{0} denied access (SignatureDoesNotMatch): check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_REGION, "
            "and what this key may do (list, get, put and delete)",
        ),
        (
            "unreachable",
            RemoteUnreachable,
            "{0} cannot be reached: check AWS_ENDPOINT_URL, AWS_REGION and the network",
        ),
        ("bucket", RemoteNotFound, "{0} has no bucket 'no-such-bucket': create it, or correct the URL"),
    ],
    indirect=["mistake"],
)
def test_a_mistake_is_told_in_one_line_that_holds_no_secret(mistake: str, kind: type[ClvqError], message: str) -> None:
    store = S3Store("no-such-bucket" if kind is RemoteNotFound else BUCKET, "cache")
    actions: list[Callable[[], object]] = [
        lambda: store.read("file", limit=1),
        lambda: store.fetch("file", Path("nowhere"), size=1),
        lambda: store.writing(public=False).__enter__(),
    ]
    # A server that does not answer is asked several times.
    for action in actions[: 1 if kind is RemoteUnreachable else 3]:
        with pytest.raises(kind) as caught:
            action()
        assert str(caught.value) == f"{store.name}: {message.format(mistake)}"
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None
        for word in (SECRET, KEY, "unknown-key", "wrong-secret"):
            assert word not in told(caught.value)


def test_without_obstore_the_extra_to_install_is_named(server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(MissingExtra) as caught:
        S3Store(BUCKET, "cache")
    assert str(caught.value) == f"s3://{BUCKET}/cache needs the package obstore: pip install 'clvq[s3]'"


def test_amazon_is_the_server_where_no_other_is_named(server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    problem = S3Store(BUCKET, "cache")._problem(ValueError("…"))
    assert str(problem).startswith(f"s3://{BUCKET}/cache: Amazon S3 cannot be reached: ")
