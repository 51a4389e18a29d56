"""Reading a cache that lies elsewhere: only what is needed is fetched, checked, and kept within bounds."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import clvq
import numpy as np
import pytest
import torch
from clvq.cache.layout import FileEntry
from clvq.cache.sharing import spool as spooling
from clvq.cache.sharing.push import push
from clvq.cache.sharing.remote import RemoteCache, open_cache
from clvq.cache.sharing.spool import Spool, spool_folder
from clvq.cache.stream import TextStream
from clvq.errors import CacheCorrupt, CacheNotFound, ClvqError, ConfigError
from clvq.trainer.config import preset_config, with_overrides
from clvq.trainer.fit import fit

from .cache_maker import EVERY_ENCODING, contents, known, without_waiting
from .caches import LOWER, UPPER, make_cache
from .sharing import HubPlace, Place, a_place

pytestmark = [
    # The Hub's client calls its own HTTP library in a way that this one advises against.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("_quick"),
]


@pytest.fixture
def _quick() -> Iterator[None]:
    yield from without_waiting()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> clvq.Cache:
    folder = tmp_path_factory.mktemp("remote") / "cache"
    known(texts=40, longest=12, widths=EVERY_ENCODING).write(folder)
    return clvq.Cache(folder)


@pytest.fixture(params=["s3", "hub"])
def place(
    request: pytest.FixtureRequest, cache: clvq.Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """Somewhere that holds the cache."""
    with a_place(request.param, tmp_path, monkeypatch) as place:
        push(cache.path, place.url)
        yield place


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def fetched(spool: Path) -> dict[str, int]:
    """Files in the spool but for locks and manifests, and their bytes."""
    return {
        file.relative_to(spool).as_posix().partition("/")[2]: file.stat().st_size
        for file in spool.glob("*/*/**/*")
        if file.is_file()
    } | {file.name: file.stat().st_size for file in spool.glob("*/texts.parquet")}


def test_it_reads_as_a_cache_on_this_machine_does(place: Place, cache: clvq.Cache, spool: Path) -> None:
    remote = open_cache(place.url, spool=spool)
    assert isinstance(remote, RemoteCache)
    assert (remote.id, remote.manifest) == (cache.id, cache.manifest)
    assert remote.texts.equals(cache.texts)
    rows = np.random.default_rng(0).permutation(cache.rows_of(cache.splits(["dev", "train"])))
    for site in cache.manifest.sites:
        assert np.array_equal(remote.vectors(site, rows), cache.vectors(site, rows))
    for column in cache.manifest.columns:
        assert np.array_equal(remote.column(column), cache.column(column))
    assert np.array_equal(remote.logits(), cache.logits())
    assert all(contents(cache.path)[name] == (spool / cache.id / name).read_bytes() for name in fetched(spool))


def test_only_what_is_read_is_fetched_and_only_once(
    place: Place, cache: clvq.Cache, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = open_cache(place.url, spool=spool)
    assert fetched(spool) == {}
    remote.vectors("hidden.2", np.array([0, 1]))
    assert sorted(fetched(spool)) == ["activations.zarr/sites/hidden.2/c/0/0"]
    again = open_cache(place.url, spool=spool)
    monkeypatch.setattr(type(again._store), "fetch", None)
    assert np.array_equal(again.vectors("hidden.2", np.array([0, 1])), cache.vectors("hidden.2", np.array([0, 1])))


def test_damage_there_is_refused_and_damage_here_is_fetched_anew(place: Place, cache: clvq.Cache, spool: Path) -> None:
    name = "activations.zarr/sites/hidden.2/c/0/0"
    whole = contents(cache.path)[name]
    rows = np.array([0, 1])
    place.put(name, bytes(len(whole)))
    with pytest.raises(CacheCorrupt, match=r"has other bytes than its manifest says \(SHA-256 differs\), 3 times over"):
        open_cache(place.url, spool=spool).vectors("hidden.2", rows)
    place.put(name, whole)
    open_cache(place.url, spool=spool).vectors("hidden.2", rows)
    for damage in (whole[:-1] + b"x", whole[:-1], b""):
        (spool / cache.id / name).write_bytes(damage)
        assert np.array_equal(
            open_cache(place.url, spool=spool).vectors("hidden.2", rows), cache.vectors("hidden.2", rows)
        )
        assert (spool / cache.id / name).read_bytes() == whole


def test_a_place_without_a_cache_and_a_folder_are_told_apart(
    place: Place, cache: clvq.Cache, spool: Path, tmp_path: Path
) -> None:
    for folder in (cache.path, str(cache.path), f"file://{cache.path}"):
        assert type(open_cache(folder, spool=spool)) is clvq.Cache
    with pytest.raises(CacheNotFound):
        open_cache(tmp_path / "none")
    place.put("manifest.json", None)
    with pytest.raises(CacheNotFound) as caught:
        open_cache(place.url, spool=spool)
    assert str(caught.value) == (f"{place.url} holds no cache: there is no manifest.json; see whether the URL is right")
    assert not spool.exists()


class Source:
    """Files that a spool can fetch, with a note of what it did."""

    def __init__(self, count: int, size: int) -> None:
        self.files = {f"cache/files/{number}": bytes([number]) * size for number in range(count)}
        self.fetches: list[str] = []
        self.seconds = 0.0

    def have(self, spool: Spool, number: int) -> Path:
        name = f"cache/files/{number}"
        data = self.files[name]

        def fetch(target: Path) -> None:
            self.fetches.append(name)
            time.sleep(self.seconds)
            target.write_bytes(data)

        import hashlib

        return spool.have(name, FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()), fetch)

    def check(self, spool: Spool, number: int) -> None:
        assert self.have(spool, number).read_bytes() == self.files[f"cache/files/{number}"]


def there(root: Path) -> list[int]:
    return sorted(int(file.name) for file in root.glob("cache/files/*"))


def test_the_spool_stays_within_its_bounds_and_keeps_what_was_used_last(
    spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spooling, "_HELD", 2)
    source = Source(30, 100)
    kept = Spool(spool, limit=1000)
    for number in range(10):
        source.check(kept, number)
        os.utime(spool / f"cache/files/{number}", (number, number))
    assert there(spool) == list(range(10))
    # Used again, the oldest are not the oldest any more.
    for number in (0, 1):
        source.check(kept, number)
    source.check(kept, 10)
    assert {0, 1, 10} < set(there(spool))
    assert not {2, 3} & set(there(spool))
    for number in range(11, 30):
        source.check(kept, number)
        assert sum(file.stat().st_size for file in spool.glob("cache/files/*")) <= 1000
    assert len(source.fetches) == 30


def test_files_just_given_out_stay_whatever_the_limit(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spooling, "_HELD", 5)
    source = Source(10, 100)
    kept, other = Spool(spool, limit=1), Spool(spool, limit=1)
    for number in range(5):
        source.check(kept, number)
    # Not even another process takes them away.
    source.check(other, 9)
    assert there(spool) == [0, 1, 2, 3, 4, 9]
    kept.close()
    source.check(other, 8)
    assert there(spool) == [8, 9]


def test_of_many_who_need_a_file_one_fetches_it(spool: Path) -> None:
    source = Source(4, 100)
    source.seconds = 0.05
    # Two spools of one folder are what two processes are to each other.
    spools = [Spool(spool), Spool(spool)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: source.check(spools[number % 2], number % 4), range(32)))
    assert sorted(source.fetches) == sorted(source.files)


def test_many_threads_read_right_while_files_come_and_go(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spooling, "_HELD", 8)
    source = Source(40, 100)
    spools = [Spool(spool, limit=1500), Spool(spool, limit=1500)]

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 40, 60).tolist():
            source.check(spools[seed % 2], number)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(read, range(6)))
    assert len(source.fetches) > 40


def test_what_a_kill_left_half_fetched_is_not_taken_for_a_file(spool: Path) -> None:
    source = Source(2, 100)
    kept = Spool(spool, limit=150)
    source.check(kept, 0)
    half, young = spool / "cache/files/7.part", spool / "cache/files/8.part"
    for part in (half, young):
        part.write_bytes(bytes(100))
    os.utime(half, (0, 0))
    kept.close()
    source.check(kept, 1)
    # Somebody may still be writing the other.
    assert not half.exists()
    assert young.exists()


def test_a_fetch_that_fails_leaves_the_next_one_to_try(spool: Path) -> None:
    def fail(target: Path) -> None:
        target.write_bytes(b"half")
        raise ClvqError("broke off")

    kept, source = Spool(spool), Source(1, 100)
    data = source.files["cache/files/0"]
    with pytest.raises(ClvqError, match=r"^broke off$"):
        kept.have("cache/files/0", FileEntry(bytes=len(data), sha256="0" * 64), fail)
    source.check(kept, 0)


READER = """
    import sys
    from pathlib import Path
    import numpy as np
    from clvq.cache.sharing import spool
    from clvq.cache.sharing.remote import open_cache
    spool._HELD = 4
    cache = open_cache(sys.argv[1], spool=Path(sys.argv[2]), spool_bytes=10_000)
    rows = cache.rows_of(cache.splits(["dev", "train"]))
    generator = np.random.default_rng(int(sys.argv[3]))
    sums = 0.0
    for _ in range(15):
        for site in generator.permutation(list(cache.manifest.sites)).tolist():
            sums += float(np.float64(cache.vectors(site, generator.choice(rows, 50))).sum())
    sys.stdout.write(repr(sums))
"""


def test_two_processes_share_a_spool_that_is_too_small_for_them(
    cache: clvq.Cache, spool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_place("s3", tmp_path, monkeypatch) as place:
        push(cache.path, place.url)
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(READER), place.url, spool, str(seed)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for seed in (1, 2)
        ]
        ended = [process.communicate() for process in processes]
        assert [errors for _, errors in ended] == ["", ""]
        rows = cache.rows_of(cache.splits(["dev", "train"]))
        for seed, (output, _) in zip((1, 2), ended, strict=True):
            generator, sums = np.random.default_rng(seed), 0.0
            for _ in range(15):
                for site in generator.permutation(list(cache.manifest.sites)).tolist():
                    sums += float(np.float64(cache.vectors(site, generator.choice(rows, 50))).sum())
            assert float(output) == sums
        sizes = [len(data) for name, data in contents(cache.path).items() if "/sites/" in name or "/scales/" in name]
        # Without an end to what is kept, all of it would be there.
        assert sum(fetched(spool).values()) < sum(sizes)


class Delayed:
    """Makes each fetch of a store take a while, and counts how many are under way."""

    def __init__(self, remote: RemoteCache, seconds: float) -> None:
        self.lock, self.now, self.most = threading.Lock(), 0, 0
        fetch = remote._store.fetch

        def slowly(file: str, target: Path, *, size: int) -> None:
            with self.lock:
                self.now += 1
                self.most = max(self.most, self.now)
            time.sleep(seconds)
            fetch(file, target, size=size)
            with self.lock:
                self.now -= 1

        remote._store.fetch = slowly  # type: ignore[method-assign]


def test_a_stream_has_the_next_files_fetched_side_by_side(
    cache: clvq.Cache, spool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_place("s3", tmp_path, monkeypatch) as place:
        push(cache.path, place.url)
        remote = open_cache(place.url, spool=spool)
        assert isinstance(remote, RemoteCache)
        delayed = Delayed(remote, 0.02)

        def epoch(cache: clvq.Cache) -> list[np.ndarray]:
            texts = cache.splits(["dev", "train"])
            stream = TextStream(cache, ["hidden.2", "hidden.4"], texts, special="all", seed=0, texts_per_batch=8)
            return [batch.values["hidden.4"] for batch in stream.epoch(0)]

        for mine, theirs in zip(epoch(remote), epoch(cache), strict=True):
            assert np.array_equal(mine, theirs)
        assert 4 <= delayed.most <= 8


def test_training_streams_from_storage_and_gives_the_same_run(
    spool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = make_cache(tmp_path / "cache")
    config = with_overrides(
        preset_config("default", lower=LOWER, upper=UPPER, codes=9),
        {
            "decoder.layers": "1",
            "decoder.heads": "2",
            "decoder.hidden": "8",
            "fit.epochs": "2",
            "fit.texts_per_batch": "8",
            "encoder.epochs": "1",
        },
    )
    with a_place("s3", tmp_path / "shared", monkeypatch) as place:
        push(local.path, place.url)
        for source, out in ((local, "local"), (open_cache(place.url, spool=spool), "remote")):
            fit(source, config, tmp_path / out, device=torch.device("cpu"))
    assert (tmp_path / "local/model.safetensors").read_bytes() == (tmp_path / "remote/model.safetensors").read_bytes()


def test_on_the_hub_reading_stays_at_the_commit_that_was_there_when_it_was_opened(
    cache: clvq.Cache, spool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_place("hub", tmp_path, monkeypatch) as place:
        push(cache.path, place.url)
        assert isinstance(place, HubPlace)
        remote = open_cache(place.url, spool=spool)
        for name in place.contents():
            place.put(name, None)
        rows = np.array([0, 1])
        assert np.array_equal(remote.vectors("hidden.2", rows), cache.vectors("hidden.2", rows))


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"CLVQ_HOME": "/a", "XDG_CACHE_HOME": "/b"}, "/a/spool"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/clvq/spool"),
        ({"HOME": "/c"}, "/c/.cache/clvq/spool"),
    ],
)
def test_the_spool_lies_where_the_environment_says(
    environment: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CLVQ_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert spool_folder() == Path(folder)


def test_where_fetched_files_cannot_be_kept_the_setting_is_named(
    cache: clvq.Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "spool").write_text("a file")
    monkeypatch.setenv("CLVQ_HOME", str(tmp_path / "home"))
    with a_place("s3", tmp_path, monkeypatch) as place:
        push(cache.path, place.url)
        with pytest.raises(ConfigError) as caught:
            open_cache(place.url)
    assert str(caught.value) == (
        f"fetched files cannot be kept in {tmp_path}/home/spool: set CLVQ_HOME to a folder for them"
    )


def test_nothing_goes_on_when_the_cache_is_let_go(
    cache: clvq.Cache, spool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waits_for(condition: Callable[[], bool]) -> bool:
        until = time.monotonic() + 10
        while not condition() and time.monotonic() < until:
            time.sleep(0.01)
        return condition()

    with a_place("s3", tmp_path, monkeypatch) as place:
        push(cache.path, place.url)
        before = threading.active_count()
        remote = open_cache(place.url, spool=spool)
        remote.column("text")
        assert threading.active_count() > before
        remote.close()
        del remote
        assert waits_for(lambda: threading.active_count() == before)
