"""Where caches are pushed to and pulled from: URLs, folders, files on their way, many at once."""

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest
from clvq.cache.layout import FileEntry
from clvq.cache.sharing.hub import HubStore
from clvq.cache.sharing.stores import FolderStore, Store, Upload, open_store
from clvq.cache.sharing.transfer import Room, in_parallel
from clvq.errors import CacheCorrupt, ClvqError, ConfigError, FolderInUse, RemoteDenied

PLACES = "give a folder, s3://bucket/prefix or hf://user/name"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://host/cache", f"https:// is no place for a cache: {PLACES}"),
        ("gs://bucket/cache", f"gs:// is no place for a cache: {PLACES}"),
        (
            "s3://key:secret@bucket/cache",
            "the s3:// URL names a user or password before '@': leave them out; credentials are taken from the "
            "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)",
        ),
        (
            "hf://hf_secret@user/cache",
            "the hf:// URL names a user or password before '@': leave them out; credentials are taken from the "
            "environment (HF_TOKEN)",
        ),
        (
            "s3://bucket/cache?key=secret",
            f"the s3:// URL has a part behind '?' or '#', where nothing is expected: {PLACES}",
        ),
        ("s3://", f"s3:// has an empty part, '.' or '..': {PLACES}"),
        ("s3://bucket//cache", f"s3://bucket//cache has an empty part, '.' or '..': {PLACES}"),
        ("s3://bucket/../cache", f"s3://bucket/../cache has an empty part, '.' or '..': {PLACES}"),
        ("s3://b/cache", "s3://b/cache: 'b' cannot be the name of a bucket: give s3://bucket/prefix"),
        ("s3://my bucket", "s3://my bucket: 'my bucket' cannot be the name of a bucket: give s3://bucket/prefix"),
        ("hf://name", "hf://name does not name a data set repository: give hf://user/name or …/name@revision"),
        ("hf://a/b/c", "hf://a/b/c does not name a data set repository: give hf://user/name or …/name@revision"),
        (
            "hf://user/name@",
            "hf://user/name@ does not name a data set repository: give hf://user/name or …/name@revision",
        ),
        (
            "hf://models/user/name",
            "hf://models/user/name is a model: caches live in data set repositories, hf://user/name",
        ),
        (
            "hf://spaces/user/name",
            "hf://spaces/user/name is a space: caches live in data set repositories, hf://user/name",
        ),
        (
            "file://host/cache",
            "file://host/cache names the machine 'host'; a file:// URL has three slashes: file:///folder",
        ),
    ],
)
def test_a_wrong_url_is_refused_with_what_to_give_instead(url: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(url)
    assert str(caught.value) == message
    assert "secret" not in message.replace("AWS_SECRET_ACCESS_KEY", "")


def test_without_credentials_in_the_environment_storage_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    began = time.monotonic()
    with pytest.raises(RemoteDenied) as caught:
        open_store("s3://bucket/cache")
    assert str(caught.value) == (
        "s3://bucket/cache: the environment holds no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
        "or AWS_SKIP_SIGNATURE=true to read a public bucket"
    )
    assert isinstance(caught.value, PermissionError)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("hf://user/name", "hf://user/name"),
        ("hf://datasets/user/name/", "hf://user/name"),
        ("hf://user/name@clvq-0123", "hf://user/name@clvq-0123"),
        ("HF://user/name@feature/two", "hf://user/name@feature/two"),
        ("file:///some/a%20folder", "/some/a folder"),
        ("file://localhost/some/folder", "/some/folder"),
        ("some/folder", "some/folder"),
        ("C:\\folder", "C:\\folder"),
    ],
)
def test_a_url_names_a_place(url: str, name: str) -> None:
    store = open_store(url)
    assert store.name == name
    assert isinstance(store, Store)
    assert isinstance(store, HubStore) == name.startswith("hf:")


def upload(file: Path, data: bytes | None = None) -> Upload:
    """The upload of a file that had `data` when it was recorded."""
    data = file.read_bytes() if data is None else data
    return Upload("some/file", file, FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))


def test_a_file_that_is_not_as_it_was_recorded_is_not_sent(tmp_path: Path) -> None:
    file = tmp_path / "file"
    advice = "run `clvq cache verify` and `clvq cache repair`, then push again; what was sent so far is kept"

    def refused() -> str:
        with pytest.raises(CacheCorrupt) as caught:
            upload(file, b"data").read()
        return str(caught.value)

    assert refused() == f"{file} is missing: {advice}"
    file.write_bytes(b"longer data")
    assert refused() == f"{file} has 11 bytes instead of 4: {advice}"
    file.write_bytes(b"dada")
    assert refused() == f"{file} has other bytes than were written (SHA-256 differs): {advice}"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert refused() == f"{file} is no plain file: {advice}"
    file.unlink()
    file.write_bytes(b"data")
    assert upload(file, b"data").read() == b"data"


def test_a_folder_keeps_what_was_written_and_lets_one_create(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "new" / "place")
    with store.writing(public=False):
        assert store.create("unfinished.json", b"first")
        assert not store.create("unfinished.json", b"second")
        assert store.read("a/b", limit=10) is None
        store.write("a/b", b"old")
        store.write("a/b", b"new")
        with pytest.raises(FolderInUse), FolderStore(store.path).writing(public=False):
            pass
    assert store.read("a/b", limit=3) == b"new"
    assert store.read("unfinished.json", limit=10) == b"first"
    store.fetch("a/b", tmp_path / "fetched", size=3)
    assert (tmp_path / "fetched").read_bytes() == b"new"
    store.delete("unfinished.json")
    store.delete("unfinished.json")
    assert sorted(file.name for file in store.path.rglob("*")) == ["a", "b"]


def test_what_a_kill_left_in_a_folder_is_cleared_away_when_writing_begins(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".file.123.aside").write_bytes(b"half")
    (tmp_path / ".unfinished.json.new.aside").write_bytes(b"half")
    (tmp_path / "unfinished.json").write_bytes(b"claim")
    with FolderStore(tmp_path).writing(public=False):
        assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["unfinished.json"]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(ConfigError) as caught, FolderStore(tmp_path).writing(public=False):
        pass
    assert str(caught.value) == (
        f"{tmp_path} is not empty and holds no clvq cache (it holds 'thesis.txt'): push to another folder"
    )
    with pytest.raises(ConfigError) as caught, FolderStore(tmp_path / "thesis.txt").writing(public=False):
        pass
    assert str(caught.value) == (
        f"{tmp_path}/thesis.txt is a file, and a folder is needed there: give another place to push to"
    )


def test_of_a_strangers_folder_only_plain_files_of_the_right_size_are_read(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"12345")
    for name in ("folder", "link", "pipe"):
        with pytest.raises(CacheCorrupt, match=f"^{tmp_path}/{name} (is no plain file|cannot be read)"):
            store.read(name, limit=100)
    with pytest.raises(CacheCorrupt) as caught:
        store.read("file", limit=4)
    assert str(caught.value) == f"{tmp_path}/file has 5 bytes, more than the 4 that it may have; nothing was read"
    with pytest.raises(CacheCorrupt) as caught:
        store.fetch("file", tmp_path / "target", size=6)
    assert str(caught.value) == (f"{tmp_path}/file has 5 bytes instead of 6: ask whoever shared it to push it again")
    with pytest.raises(CacheCorrupt) as caught:
        store.fetch("none", tmp_path / "target", size=6)
    assert str(caught.value) == (
        f"{tmp_path}/none is missing, though the manifest lists it: ask whoever shared it to push it again"
    )
    assert not (tmp_path / "target").exists()


def test_small_files_are_compared_with_what_stands_there(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "place")
    uploads = []
    for name, data in {"equal": b"data", "other": b"dada", "longer": b"more data"}.items():
        store.write(name, data)
        uploads.append(Upload(name, tmp_path, upload(tmp_path, b"data").entry))
    uploads.append(Upload("none", tmp_path, upload(tmp_path, b"data").entry))
    found = store.compare(uploads, check=lambda: None)
    assert found == {"equal": True, "other": False, "longer": False}


def test_many_at_once_are_done_here_while_they_are_worked_on_elsewhere() -> None:
    here, done, at_once, most = threading.get_ident(), [], 0, 0
    lock = threading.Lock()

    def work(item: int, stopped: object) -> None:
        nonlocal at_once, most
        assert threading.get_ident() != here
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.02)
        with lock:
            at_once -= 1

    def note(item: int) -> None:
        assert threading.get_ident() == here
        done.append(item)

    in_parallel(work, range(20), check=lambda: None, done=note, threads=4)
    assert sorted(done) == list(range(20))
    assert 1 < most <= 4


@pytest.mark.parametrize("where", ["work", "check"])
def test_an_error_or_a_request_to_stop_begins_nothing_more(where: str) -> None:
    begun, told = [], []

    def work(item: int, stopped: object) -> None:
        begun.append(item)
        if where == "work" and item == 3:
            raise ClvqError("no more")
        time.sleep(0.3)
        told.append(stopped())  # type: ignore[operator]

    def check() -> None:
        if where == "check" and begun:
            raise ClvqError("no more")

    with pytest.raises(ClvqError, match=r"^no more$"):
        in_parallel(work, range(1000), check=check, done=lambda item: None, threads=4)
    assert len(begun) <= 12
    assert told[-1] is True


def test_memory_is_bounded_but_a_file_that_is_larger_travels_alone() -> None:
    room, used, most = Room(100), 0, 0
    lock = threading.Lock()

    def work(size: int, stopped: object) -> None:
        nonlocal used, most
        with room.of(size):
            with lock:
                used += size
                most = max(most, used)
                assert used <= 100 or used == size
            time.sleep(0.005)
            with lock:
                used -= size

    in_parallel(work, [60, 30, 500, 10, 40, 40, 90, 500, 1, 1, 1], check=lambda: None, done=lambda size: None)
    assert most == 500
