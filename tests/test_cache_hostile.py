"""Caches that were made to harm: nothing of theirs is run, believed or followed, and none takes much memory or time.

Whoever makes one can also make every checksum in it right; so they are here. A process of its own reads them.
"""

import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clvq.cache.encoding import ArrayLayout, array_layouts
from clvq.cache.layout import CARD, MANIFEST, TEXTS, array_file, read_manifest, to_json
from google_crc32c import value as crc32c
from numcodecs import blosc

from .cache_maker import EVERY_ENCODING, contents, known, seal, without_waiting

no_waiting = pytest.fixture(without_waiting, scope="module", autouse=True)
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured by /proc")

# What may be taken; the issue of one is far less, but for JSON that is as long as any manifest may be.
MOST_MEBIBYTES, MOST_SECONDS = 1000, 60


@dataclass(frozen=True)
class Answer:
    """How reading ended."""

    kind: str
    found: Any
    grew: float
    seconds: float


Reader = Callable[[Path, str], Answer]


@pytest.fixture(scope="module")
def reader(original: Path) -> Iterator[Reader]:
    """Does something with a cache in another process; fails where that takes too much memory or time."""
    script = Path(__file__).with_name("hostile_reader.py")
    process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(path: Path, do: str) -> Answer:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"path": str(path), "do": do}) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, "the process died"
        found = Answer(**json.loads(answer))
        assert found.kind != "an error that is not ours", found.found
        assert found.grew < MOST_MEBIBYTES
        assert found.seconds < MOST_SECONDS
        if isinstance(found.found, str):
            assert len(found.found) < 1000
            assert "\n" not in found.found
        return found

    for do in ("verify", "everything"):
        # Whatever is imported late is there from now on.
        assert read(original, do).kind == "done"
    yield read
    process.communicate()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole cache that no test changes."""
    path = tmp_path_factory.mktemp("hostile") / "cache"
    known(texts=12, widths=EVERY_ENCODING).write(path)
    return path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    """A copy of it to be made hostile."""
    shutil.copytree(original, tmp_path / "cache")
    return tmp_path / "cache"


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and seal it again."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    change(manifest)
    (path / MANIFEST).write_bytes(seal(manifest))


def vouch(path: Path, *names: str) -> None:
    """Let the manifest say of files what is true of them now."""

    def change(manifest: dict[str, Any]) -> None:
        for name in names:
            data = (path / name).read_bytes()
            for files in (manifest["files"], *(shard["files"] for shard in manifest["shards"])):
                if name in files:
                    files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    rewrite(path, change)


# --- code ------------------------------------------------------------------------------------------------------------


class Opens:
    """Makes a file when it is unpickled."""

    def __init__(self, file: str) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self._file),)


def test_nothing_in_a_cache_is_unpickled(path: Path, tmp_path: Path, reader: Reader) -> None:
    ran = tmp_path / "ran"
    load = pickle.dumps([Opens(str(ran))])
    v2 = {
        "zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "fill_value": None, "order": "C",
        "filters": [{"id": "pickle", "protocol": 5}], "compressor": None,
    }  # fmt: skip
    for folder in ("activations.zarr/sites/hidden.1", "activations.zarr/rows/text", "activations.zarr/object"):
        (path / folder).mkdir(exist_ok=True)
        (path / folder / ".zarray").write_text(json.dumps(v2))
        (path / folder / "0").write_bytes(load)
    (path / "activations.zarr/.zgroup").write_text('{"zarr_format": 2}')
    (path / "texts.pkl").write_bytes(load)
    assert reader(path, "everything").kind == "done"
    foreign = reader(path, "verify").found
    assert len(foreign) == 8
    assert all(line.endswith(" does not belong to the cache") for line in foreign)
    assert not ran.exists()
    # The payload works.
    pickle.loads(load)
    assert ran.exists()


def test_metadata_that_names_a_codec_which_runs_code_is_not_followed_but_named(path: Path, reader: Reader) -> None:
    name = "activations.zarr/sites/hidden.1/zarr.json"
    array = json.loads((path / name).read_bytes())
    array["codecs"] = [{"name": "numcodecs.pickle", "configuration": {"protocol": 5}}]
    (path / name).write_text(json.dumps(array))
    vouch(path, name)
    assert reader(path, "everything").kind == "done"
    assert reader(path, "verify").found == [f"{name} describes another array than the manifest does"]


# --- JSON ------------------------------------------------------------------------------------------------------------


def long_manifest(kind: str, size: int) -> Callable[[dict[str, Any]], bytes]:
    """A manifest of `size` bytes that is little but one kind of thing, as dense as is not refused at a glance."""

    def keys(inner: str, width: int = 22) -> str:
        return ", ".join(f'"{number:x}": {inner}'.ljust(width - 2) for number in range(size // width))

    def items(inner: str, width: int = 22) -> str:
        return ", ".join([inner.ljust(width - 2)] * (size // width))

    places = {
        "strings": ("identity", lambda: f'{{"a": [{items(json.dumps("aa"))}]}}'),
        "numbers": ("identity", lambda: f'{{"a": [{items("1234.5")}]}}'),
        "names": ("identity", lambda: f"{{{keys('1')}}}"),
        "objects": ("identity", lambda: f'{{"a": [{items(json.dumps(dict.fromkeys("ab", 1)), 80)}]}}'),
        "settings": ("identity", lambda: f'{{"a": "{"x" * size}"}}'),
        "counts": ("counts", lambda: f"{{{keys('1')}}}"),
        "wrong counts": ("counts", lambda: f"{{{keys('null')}}}"),
        "wrong names": ("class_names", lambda: f"[{items('1')}]"),
        "wrong files": ("files", lambda: f"{{{keys('1')}}}"),
        "wrong entries": ("files", lambda: f"{{{keys(json.dumps({'bytes': '', 'sha256': 1}), 80)}}}"),
        "wrong shards": ("shards", lambda: f"[{items('1')}]"),
        "wrong splits": ("splits", lambda: f"{{{keys('1')}}}"),
        "fields of a shard": ("shards", lambda: f"[{{{keys('1')}}}]"),
    }

    def make(plain: dict[str, Any]) -> bytes:
        if kind in ("brackets", "commas", "braces", "digits"):
            return {"brackets": b"[", "commas": b",", "braces": b"{", "digits": b"1"}[kind] * size
        if kind == "fields":
            return seal(json.dumps(plain).encode()[:-1] + b", " + keys("1").encode() + b"}")
        field, body = places[kind]
        return seal(json.dumps(plain | {field: "HERE"}).encode().replace(b'"HERE"', body().encode()))

    return make


KINDS = [
    "brackets", "commas", "braces", "digits", "fields", "strings", "numbers", "names", "objects", "settings", "counts",
    "wrong counts", "wrong names", "wrong files", "wrong entries", "wrong shards", "wrong splits", "fields of a shard",
]  # fmt: skip

ODD = ("counts", "strings", "numbers", "names", "objects")


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_manifest_is_refused_or_read_in_little_memory(
    path: Path, reader: Reader, kind: str, soak: bool, tell: Callable[[str], None]
) -> None:
    mebibytes = 63 if soak else 8
    plain = json.loads((path / MANIFEST).read_bytes())
    (path / MANIFEST).write_bytes(long_manifest(kind, mebibytes << 20)(plain))
    found = reader(path, "open")
    # Some are odd, but manifests.
    assert found.kind == "CacheCorrupt" or (found.kind == "done" and kind in ODD)
    assert found.grew < mebibytes * MOST_MEBIBYTES / 64
    tell(f"a manifest of {mebibytes} MiB of {kind}: {found.kind}, {found.grew:.0f} MiB, {found.seconds:.1f} s")


def test_a_deeply_nested_manifest_is_refused(path: Path, reader: Reader) -> None:
    for data in (b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000):
        (path / MANIFEST).write_bytes(data)
        assert "is not a manifest: it is nothing but brackets" in reader(path, "open").found
    plain = json.loads((path / "records/000000.json").read_bytes())
    deep = json.dumps(plain | {"checksum": "0" * 64, "format": "clvq-cache", "identity": "HERE"})
    for depth in (300, 900, 999):
        (path / MANIFEST).write_bytes(seal(deep.replace('"HERE"', "[" * depth + "]" * depth).encode()))
        assert reader(path, "open").kind == "CacheCorrupt"


# --- names and links -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "activations.zarr/../../secret", "C:\\secret", "\\\\server\\share", "C:secret"]
)
def test_a_manifest_that_names_a_file_elsewhere_is_refused(path: Path, reader: Reader, name: str) -> None:
    (path.parent / "secret").write_text("secret")

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop(CARD)

    rewrite(path, change)
    for do in ("open", "verify"):
        found = reader(path, do)
        assert found.kind == "CacheCorrupt"
        assert "is damaged at 'files." in found.found


LINKED = {
    "activations.zarr/sites/hidden.1/c/0/0": "everything",
    "activations.zarr/sites/hidden.4/c/1/0": "everything",
    "activations.zarr/scales/hidden.4/c/0": "everything",
    "activations.zarr/channel_scale/hidden.4/c/0": "everything",
    "activations.zarr/rows/text/c/0": "column",
    "activations.zarr/texts/logits/c/0/0": "logits",
    "activations.zarr/sites": "everything",
    "activations.zarr/rows/text/c": "column",
    "activations.zarr": "column",
    TEXTS: "texts",
}


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("target", ["same bytes", "secret", "nowhere", "itself"])
def test_a_link_is_never_followed(path: Path, reader: Reader, name: str, target: str) -> None:
    (path / name).rename(path.parent / "same bytes")
    (path.parent / "secret").write_bytes(b"secret" * 1000)
    (path / name).symlink_to(path / name if target == "itself" else path.parent / target)
    found = reader(path, LINKED[name])
    assert (found.kind, found.found) == (
        "CacheCorrupt",
        f"{path / name} is a symbolic link, and a cache holds none: get a whole copy of it",
    )
    lines = reader(path, "verify").found
    assert any(line.startswith((f"{name} is a symbolic link", f"{name}/")) for line in lines)


@pytest.mark.parametrize("name", [CARD, "records/000000.json", "activations.zarr/zarr.json", MANIFEST])
def test_a_link_in_the_place_of_what_reading_passes_over_is_named(path: Path, reader: Reader, name: str) -> None:
    (path / name).rename(path.parent / "elsewhere")
    (path / name).symlink_to(path.parent / "elsewhere")
    assert reader(path, "verify").found == [f"{name} is a symbolic link"]


@pytest.mark.parametrize("name", [name for name in LINKED if "/c/" in name or name == TEXTS])
def test_what_is_no_file_is_missing_and_nobody_waits_for_it(path: Path, reader: Reader, name: str) -> None:
    (path / name).unlink()
    os.mkfifo(path / name)
    found = reader(path, LINKED[name])
    assert found.kind == "CacheCorrupt"
    assert f"{path / name} is missing" in found.found
    assert reader(path, "verify").found == [f"{name} is missing"]


def test_a_manifest_that_is_no_file_is_no_manifest(path: Path, reader: Reader) -> None:
    (path / MANIFEST).unlink()
    os.mkfifo(path / MANIFEST)
    assert reader(path, "open").kind == "CacheNotFound"
    (path / MANIFEST).unlink()
    (path / MANIFEST).symlink_to("/dev/zero")
    assert reader(path, "open").kind == "CacheNotFound"


def test_a_sparse_file_of_any_size_is_not_read(path: Path, reader: Reader) -> None:
    for name, do in (("activations.zarr/sites/hidden.1/c/0/0", "rows"), (TEXTS, "texts"), (MANIFEST, "open")):
        os.truncate(path / name, 2**40)
        assert reader(path, do).kind == "CacheCorrupt"
        assert reader(path, "verify").seconds < 20


# --- shard files -----------------------------------------------------------------------------------------------------

SITE = "hidden.1"
FILE = f"activations.zarr/sites/{SITE}/c/0/0"


def layout_of(path: Path, array: str) -> ArrayLayout:
    manifest = read_manifest(path)[0]
    return array_layouts(manifest.geometry, manifest.sites, classes=manifest.classes)[array]


def forge(path: Path, chunks: list[bytes], index: list[tuple[int, int]] | None = None, *, name: str = FILE) -> None:
    """Put a shard file together from chunks without their checksums, with any index, and vouch for it."""
    body, entries = b"", []
    for chunk in chunks:
        entries.append((len(body), len(chunk) + 4))
        body += chunk + struct.pack("<I", crc32c(chunk))
    table = np.array(index or entries, dtype="<u8").tobytes()
    (path / name).write_bytes(body + table + struct.pack("<I", crc32c(table)))
    vouch(path, name)


def frame(path: Path, *, fill: int = 7) -> bytes:
    layout = layout_of(path, f"sites/{SITE}")
    values = np.full((layout.chunk, *layout.shape[1:]), fill, dtype=layout.dtype)
    packed: bytes = blosc.compress(values, b"zstd", 1, blosc.SHUFFLE, layout.chunk_bytes)
    return packed


def with_header(
    packed: bytes, *, nbytes: int | None = None, block: int | None = None, cbytes: int | None = None
) -> bytes:
    header = list(struct.unpack("<III", packed[4:16]))
    for place, value in enumerate((nbytes, block, cbytes)):
        if value is not None:
            header[place] = value
    return packed[:4] + struct.pack("<III", *header) + packed[16:]


def chunks_per_shard(path: Path) -> int:
    return layout_of(path, f"sites/{SITE}").chunks_per_shard


def test_forging_a_whole_shard_makes_one_that_is_read(path: Path, reader: Reader) -> None:
    forge(path, [frame(path)] * chunks_per_shard(path))
    assert reader(path, "rows").kind == "done"
    assert reader(path, "verify").found == []


BOMBS: dict[str, Callable[[Path], bytes]] = {
    "header that promises 2 GB": lambda path: with_header(frame(path), nbytes=2**31 - 1),
    "header that promises nothing": lambda path: with_header(frame(path), nbytes=0),
    "block of 2 GB": lambda path: with_header(frame(path), block=2**31 - 1),
    "block of no bytes": lambda path: with_header(frame(path), block=0),
    "block of 4 GB": lambda path: with_header(frame(path), block=2**32 - 1),
    "frame that claims more bytes than it has": lambda path: with_header(frame(path), cbytes=2**31 - 1),
    "frame that claims fewer": lambda path: with_header(frame(path), cbytes=16),
    "zstd that holds 64 MB": lambda path: with_header(
        blosc.compress(np.zeros(64 << 20, np.uint8), b"zstd", 1, blosc.NOSHUFFLE, 64 << 20),
        nbytes=layout_of(path, f"sites/{SITE}").chunk_bytes,
        block=layout_of(path, f"sites/{SITE}").chunk_bytes,
    ),
    "no frame": lambda path: b"\0" * 64,
    "noise": lambda path: np.random.default_rng(0).bytes(200),
    "frame of pickle": lambda path: pickle.dumps({"a": 1}) * 4,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_chunk_that_is_not_what_it_claims_is_refused(path: Path, reader: Reader, kind: str) -> None:
    bomb = BOMBS[kind](path)
    forge(path, [bomb, *[frame(path)] * (chunks_per_shard(path) - 1)])
    found = reader(path, "rows")
    assert found.kind == "CacheCorrupt"
    assert found.found.startswith(f"{path / FILE} is damaged: ")
    assert found.grew < 100
    assert reader(path, "verify").found == []


INDEXES: dict[str, tuple[list[tuple[int, int]], str]] = {
    "the same bytes": ([(0, 60), (0, 60)], "its index gives the same bytes to two chunks"),
    "bytes shared in part": ([(0, 60), (30, 60)], "its index gives the same bytes to two chunks"),
    "far outside": ([(2**40, 60), (0, 60)], "its index points outside the file"),
    "a sum that overflows": ([(2**63, 2**63), (0, 60)], "its index points outside the file"),
    "a huge size": ([(0, 2**62), (0, 60)], "its index points outside the file"),
    "half of a missing one": ([(2**64 - 1, 60), (0, 60)], "its index points outside the file"),
    "no bytes": ([(0, 0), (0, 60)], "its index gives a chunk a size that no chunk can have"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_points_anywhere_is_refused(path: Path, reader: Reader, kind: str) -> None:
    index, words = INDEXES[kind]
    rest = [(2**64 - 1, 2**64 - 1)] * (chunks_per_shard(path) - 2)
    forge(path, [frame(path)] * 4, index + rest)
    found = reader(path, "rows")
    assert (found.kind, found.found) == ("CacheCorrupt", f"{path / FILE} is damaged: {words}")


CHANGING = """
import os, random, struct, sys, tempfile
import numpy as np
from clvq.cache.encoding import ArrayLayout, pack
from clvq.cache.shards import read_chunk
from clvq.errors import CacheCorrupt
from google_crc32c import value as crc32c

layout = ArrayLayout("uint16", (512, 16), 512, 512, 0, ("row", "d"), {})
values = np.random.default_rng(0).normal(size=(512, 16)).astype(np.float32).view(np.uint16)[:, ::2]
original, draw, refused = pack(np.ascontiguousarray(values), layout)[:-4], random.Random(0), 0
out = np.empty((512, 16), np.uint16)
with tempfile.TemporaryFile() as file:
    for _ in range(int(sys.argv[1])):
        data = bytearray(original)
        for _ in range(draw.choice([1, 1, 2, 5])):
            # Half of them in the headers of Blosc and of zstd.
            place = draw.randrange(len(data)) if draw.random() < 0.5 else draw.randrange(40)
            data[place] = draw.choice([data[place] ^ 1 << draw.randrange(8), 0, 255, draw.randrange(256)])
        chunk = bytes(data) + struct.pack("<I", crc32c(bytes(data)))
        os.pwrite(file.fileno(), chunk, 0)
        try:
            read_chunk(file.fileno(), np.array([0, len(chunk)], dtype="<u8"), layout, name="f", out=out)
        except CacheCorrupt:
            refused += 1
print(refused)
"""


@pytest.mark.soak
def test_a_chunk_changed_anywhere_with_its_checksum_made_right_never_brings_the_process_down(
    soak: bool, tell: Callable[[str], None]
) -> None:
    tries = 100_000 if soak else 1000
    ended = subprocess.run([sys.executable, "-c", CHANGING, str(tries)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert int(ended.stdout) > tries / 4
    tell(f"{tries} chunks changed at random, checksums right: {ended.stdout.strip()} refused, no crash")


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_a_small_file_that_stands_for_a_large_chunk_takes_a_chunk_and_no_more(tmp_path: Path, reader: Reader) -> None:
    made = known(texts=3, widths={"hidden.1": (1, "fp32")})
    made.write(tmp_path / "cache")
    path, rows = tmp_path / "cache", 2**25

    def change(manifest: dict[str, Any]) -> None:
        shards = len(manifest["shards"])
        manifest["geometry"] |= {"rows": rows, "shard_rows": rows // shards, "chunk_rows": rows // shards}
        for shard in manifest["shards"]:
            shard["rows"] = rows // shards
        for site in manifest["sites"].values():
            site["statistics"]["count"] = rows

    rewrite(path, change)
    layout = layout_of(path, "sites/hidden.1")
    zeros = blosc.compress(np.zeros(layout.chunk, np.float32), b"zstd", 1, blosc.SHUFFLE, layout.chunk_bytes)
    assert len(zeros) < layout.chunk_bytes / 1000
    for name in ("sites/hidden.1", "rows/text"):
        for shard in range(made.geometry.shards):
            forge(path, [zeros], name=array_file(name, shard, 2 if name.startswith("sites") else 1))
    assert reader(path, "rows").kind == "done"
    assert reader(path, "rows").grew < 2.5 * layout.chunk_bytes / 2**20
    assert reader(path, "column").grew < 700


def test_a_claim_of_ever_so_many_rows_takes_no_memory(path: Path, reader: Reader) -> None:
    shards = len(json.loads((path / MANIFEST).read_bytes())["shards"])
    rows = shards << 26

    def change(manifest: dict[str, Any]) -> None:
        manifest["geometry"] |= {"rows": rows, "shard_rows": 1 << 26, "chunk_rows": 64}
        for shard in manifest["shards"]:
            shard["rows"] = 1 << 26
            # Lies, so that there are as many bytes as rows.
            for entry in shard["files"].values():
                entry["bytes"] = 1 << 40
        for site in manifest["sites"].values():
            site["statistics"]["count"] = rows

    rewrite(path, change)
    assert rows > 2 * 10**8
    assert reader(path, "open").grew < 100
    for do in ("column", "rows", "everything", "texts", "logits"):
        found = reader(path, do)
        assert found.kind == "CacheCorrupt"
        assert found.grew < 300


# --- texts -----------------------------------------------------------------------------------------------------------


def hostile_texts(path: Path, **columns: pa.Array) -> pa.Table:
    table = pq.read_table(path / TEXTS)
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table


@pytest.mark.parametrize(
    ("columns", "settings"),
    [
        (
            lambda: {"x": pa.array(["x" * (280 << 20), *[""] * 11])},
            {"use_dictionary": False, "write_statistics": False},
        ),
        (
            lambda: {
                "x": pa.DictionaryArray.from_arrays(pa.array(np.zeros(12, np.int32)), pa.array(["x" * (100 << 20)]))
            },
            {"dictionary_pagesize_limit": 1 << 30, "write_statistics": False},
        ),
        (
            lambda: {"x": pa.array([["x" * (1 << 20), *[""] * 1000], *[[]] * 11])},
            {"dictionary_pagesize_limit": 1 << 30, "write_statistics": False},
        ),
        (
            lambda: {"x": pa.array(["x" * 100_000] * 12)},
            {"use_dictionary": False, "column_encoding": {"x": "DELTA_BYTE_ARRAY"}},
        ),
        (lambda: {"x": pa.array([1] * 12, pa.int64())}, {"store_schema": True}),
    ],
    ids=["zstd", "dictionary", "dictionary in a list", "prefixes", "schema"],
)
def test_texts_that_stand_for_far_more_than_they_are_are_refused(
    path: Path, reader: Reader, columns: Callable[[], dict[str, pa.Array]], settings: dict[str, Any]
) -> None:
    table = hostile_texts(path, **columns())
    pq.write_table(table, path / TEXTS, **{"compression": "zstd", "store_schema": False, **settings})
    assert (path / TEXTS).stat().st_size < 100_000
    vouch(path, TEXTS)
    assert reader(path, "verify").found == []
    found = reader(path, "texts")
    assert found.kind == "CacheCorrupt"
    assert found.found.startswith(f"{path / TEXTS} cannot be read (")
    assert found.grew < 100


def test_texts_that_are_no_table_of_ours_are_refused(path: Path, reader: Reader) -> None:
    for data in (b"", b"PAR1", b"x" * 1000, pickle.dumps({}), (path / MANIFEST).read_bytes()):
        (path / TEXTS).write_bytes(data)
        vouch(path, TEXTS)
        assert reader(path, "texts").kind == "CacheCorrupt"
    pq.write_table(pa.table({"a": [1] * 12}), path / TEXTS, store_schema=False)
    vouch(path, TEXTS)
    assert "its column text_id is missing" in reader(path, "texts").found


def test_the_hostile_examples_leave_the_original_whole(original: Path, reader: Reader) -> None:
    assert reader(original, "verify").found == []
    assert to_json(json.loads((original / MANIFEST).read_bytes())) == contents(original)[MANIFEST]
