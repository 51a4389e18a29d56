"""Caches on the Hub: the real client against a small fake of the server."""

import hashlib
import os
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from clvq.cache.layout import FileEntry
from clvq.cache.sharing import hub as hub_module
from clvq.cache.sharing.hub import HubStore
from clvq.cache.sharing.stores import Upload
from clvq.errors import CacheCorrupt, ClvqError, RemoteDenied, RemoteNotFound, RemoteUnreachable

from .fake_hub import SIGNATURE, TOKEN, Hub

# The client calls its own HTTP library in a way that this one advises against.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "user/cache"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub().serving() as hub:
        hub.into(monkeypatch)
        yield hub


@pytest.fixture
def store(hub: Hub) -> HubStore:
    """A store whose repository is there."""
    store = HubStore(NAME, None)
    with store.writing(public=False):
        return store


def unit(folder: Path, **files: bytes) -> list[Upload]:
    """Files that are to be sent together."""
    uploads = []
    for name, data in files.items():
        file = folder / name
        file.write_bytes(data)
        uploads.append(Upload(name, file, FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())))
    return uploads


def put(store: HubStore, *units: list[Upload]) -> list[Upload]:
    done: list[Upload] = []
    store.put(units, check=lambda: None, done=done.extend)
    return done


@pytest.mark.parametrize("public", [False, True])
def test_a_repository_is_made_private_unless_asked_otherwise_and_stays_as_it_is(hub: Hub, public: bool) -> None:
    for again in (public, not public):
        with HubStore(NAME, None).writing(public=again):
            assert hub.repositories[NAME].private is not public


def test_small_and_large_files_come_back_as_they_were(
    hub: Hub, store: HubStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Larger ones are not held in memory.
    monkeypatch.setattr(hub_module, "_SMALL", 20_000)
    files = {"small": b"data", "large": os.urandom(10_000), "larger": os.urandom(30_000)}
    uploads = unit(tmp_path, **files)
    assert put(store, uploads) == uploads
    assert hub.repositories[NAME].head() == files | {".gitattributes": b""}
    for name, data in files.items():
        assert store.read(name, limit=len(data)) == data
        store.fetch(name, tmp_path / "fetched", size=len(data))
        assert (tmp_path / "fetched").read_bytes() == data
    assert store.read("none", limit=10) is None
    # The client leaves notes beside what it downloads.
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fetched", *sorted(files)]


def test_units_go_into_few_commits_each_whole(
    hub: Hub, store: HubStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "_FILES_PER_COMMIT", 4)
    units = [unit(tmp_path, **{f"{number}-{part}": b"%d" % number for part in "ab"}) for number in range(5)]
    put(store, *units)
    assert hub.repositories[NAME].messages[1:] == [f"Add {count} files of a cache" for count in (4, 4, 2)]


def test_a_file_that_changed_since_it_was_recorded_is_not_committed(
    hub: Hub, store: HubStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "_SMALL", 100)
    for name, size in (("small", 10), ("large", 1000)):
        uploads = unit(tmp_path, **{name: bytes(size)})
        (tmp_path / name).write_bytes(b"\1" * size)
        with pytest.raises(CacheCorrupt, match=rf"^{tmp_path}/{name} has other bytes than were written"):
            put(store, uploads)
    assert list(hub.repositories[NAME].head()) == [".gitattributes"]


def test_files_of_another_size_than_listed_are_not_fetched(store: HubStore, tmp_path: Path) -> None:
    put(store, unit(tmp_path, file=b"12345"))
    for action, message in (
        (lambda: store.read("file", limit=4), "file has 5 bytes, more than the 4 that it may have; nothing was read"),
        (
            lambda: store.fetch("file", tmp_path / "target", size=6),
            "file has 5 bytes instead of 6: ask whoever shared it to push it again",
        ),
        (
            lambda: store.fetch("none", tmp_path / "target", size=6),
            "none is missing, though the manifest lists it: ask whoever shared it to push it again",
        ),
    ):
        with pytest.raises(CacheCorrupt) as caught:
            action()
        assert str(caught.value) == f"hf://{NAME}/{message}"


def test_the_hashes_that_the_hub_lists_tell_what_stands_there(store: HubStore, hub: Hub, tmp_path: Path) -> None:
    uploads = unit(tmp_path, small=b"data", large=bytes(10_000), other=b"old", none=b"data")
    put(store, uploads[:3])
    uploads[2] = unit(tmp_path, other=b"new")[0]
    before = len(hub.requests)
    assert store.compare(uploads, check=lambda: None) == {"small": True, "large": True, "other": False}
    assert not any("/resolve/" in request for request in hub.requests[before:])


def test_creating_a_file_survives_a_commit_by_somebody_else_and_yields_to_the_same_file(
    store: HubStore, hub: Hub
) -> None:
    others = [{"other": b"1"}]

    def somebody_else(lines: list[dict[str, object]]) -> None:
        if others:
            hub.repositories[NAME].commit("main", others.pop(0), "Somebody else's")

    hub.before_commit = somebody_else
    assert store.create("claim", b"ours")
    assert hub.repositories[NAME].head() == {"other": b"1", "claim": b"ours"}
    others.append({"other": b"2", "manifest": b"theirs"})
    assert not store.create("manifest", b"ours")
    assert hub.repositories[NAME].head()["manifest"] == b"theirs"


def test_the_manifest_comes_in_the_commit_that_ends_the_claim_and_gets_the_tag(store: HubStore, hub: Hub) -> None:
    store.create("unfinished.json", b"claim")
    store.publish(b"manifest", tag="clvq-0123")
    repository = hub.repositories[NAME]
    assert repository.head() == {".gitattributes": b"", "manifest.json": b"manifest"}
    assert repository.messages[1:] == ["Begin a cache: unfinished.json", "Finish the cache clvq-0123"]
    assert repository.tags == {"clvq-0123": repository.branches["main"]}
    store.publish(b"manifest", tag="clvq-0123")
    assert len(repository.messages) == 3


def test_reading_stays_at_the_commit_that_was_found_first(hub: Hub, store: HubStore, tmp_path: Path) -> None:
    put(store, unit(tmp_path, file=b"first"))
    reader, tagged = HubStore(NAME, None), HubStore(NAME, "v1")
    hub.repositories[NAME].tags["v1"] = hub.repositories[NAME].branches["main"]
    assert reader.read("file", limit=10) == b"first"
    put(store, unit(tmp_path, file=b"second"))
    assert reader.read("file", limit=10) == b"first"
    assert tagged.read("file", limit=10) == b"first"
    assert HubStore(NAME, None).read("file", limit=10) == b"second"


def test_a_branch_can_be_written_to(hub: Hub, tmp_path: Path) -> None:
    store = HubStore(NAME, "two")
    for _ in range(2):
        with store.writing(public=False):
            put(store, unit(tmp_path, file=b"data"))
    assert "file" in hub.repositories[NAME].head("two")
    assert "file" not in hub.repositories[NAME].head()


def test_a_file_that_the_repository_leaves_out_without_a_word_is_missed(
    store: HubStore, hub: Hub, tmp_path: Path
) -> None:
    hub.ignored = lambda path: path == "c"
    with pytest.raises(CacheCorrupt) as caught:
        put(store, unit(tmp_path, a=b"data", c=b"data"))
    assert str(caught.value) == (
        f"hf://{NAME} does not hold c after it was sent: look whether a .gitignore there leaves it out, and push again"
    )


def test_without_a_token_in_the_environment_nothing_is_written_and_none_from_a_login_is_used(
    hub: Hub, store: HubStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RemoteDenied) as caught, HubStore(NAME, None).writing(public=False):
        pass
    assert str(caught.value) == (
        f"hf://{NAME}: the environment holds no token: set HF_TOKEN to one that may write there"
    )
    with pytest.raises(RemoteNotFound) as missing:
        HubStore(NAME, None).read("file", limit=1)
    assert str(missing.value) == (
        f"hf://{NAME}: there is no such data set repository, or it cannot be seen without a token in HF_TOKEN: "
        "correct the URL, or set another token"
    )


def wrong(hub: Hub, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    match what:
        case "offline":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        case "unreachable":
            monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        case "token":
            monkeypatch.setenv("HF_TOKEN", f"{TOKEN}-of-another")
        case "403" | "500":
            hub.status = lambda method, path: int(what)


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("offline", RemoteUnreachable, "HF_HUB_OFFLINE is set: unset it to reach the Hub"),
        (
            "unreachable",
            RemoteUnreachable,
            "the Hub cannot be reached or broke off (ConnectError): check the network and HF_ENDPOINT, and run the "
            "same command again",
        ),
        (
            "token",
            RemoteNotFound,
            "there is no such data set repository, or it cannot be seen with the token in HF_TOKEN: correct the URL, "
            "or set another token",
        ),
        ("403", RemoteDenied, "the Hub denied access to the token in HF_TOKEN: set one that may"),
        ("500", RemoteUnreachable, "the Hub failed (500): run the same command again later"),
    ],
)
def test_a_mistake_is_told_in_one_line_that_holds_no_secret(
    hub: Hub, store: HubStore, what: str, kind: type[ClvqError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong(hub, what, monkeypatch)
    with pytest.raises(kind) as caught:
        HubStore(NAME, None).read("file", limit=1)
    assert str(caught.value) == f"hf://{NAME}: {message}"
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_an_upload_that_the_storage_refuses_shows_no_signed_address(hub: Hub, store: HubStore, tmp_path: Path) -> None:
    hub.status = lambda method, path: 403 if method == "PUT" else None
    with pytest.raises(RemoteDenied) as caught:
        put(store, unit(tmp_path, large=bytes(10_000)))
    text = "".join(traceback.format_exception(caught.value))
    assert SIGNATURE not in text
    assert TOKEN not in text


def test_an_unknown_revision_is_named(hub: Hub, store: HubStore) -> None:
    with pytest.raises(RemoteNotFound) as caught:
        HubStore(NAME, "v9").read("file", limit=1)
    assert str(caught.value) == f"hf://{NAME}@v9: the repository has no revision 'v9': see its branches"


def test_the_client_draws_no_bars_and_writes_no_lines(
    hub: Hub, store: HubStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    before = are_progress_bars_disabled()
    put(store, unit(tmp_path, small=b"data", large=bytes(10_000)))
    put(store, unit(tmp_path, small=b"data", large=bytes(10_000)))
    store.fetch("large", tmp_path / "fetched", size=10_000)
    store.read("small", limit=4)
    assert capfd.readouterr() == ("", "")
    assert are_progress_bars_disabled() is before is False
