"""Reading shard files: what was written comes back, and nothing that a file claims of itself is believed unchecked."""

import io
import os
import struct
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from clvq.cache.encoding import ArrayLayout, write_shard
from clvq.cache.layout import array_file
from clvq.cache.shards import ShardFiles, chunk_runs, read_chunk, read_index
from clvq.errors import CacheCorrupt
from google_crc32c import value as crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import blosc


def layout_of(dtype: str, shard: int, chunk: int, rest: tuple[int, ...], *, fill: int = 0) -> ArrayLayout:
    dimensions = ("row", "d")[: 1 + len(rest)]
    return ArrayLayout(dtype, (shard * 2, *rest), shard, chunk, fill, dimensions, {})


def written(values: np.ndarray, layout: ArrayLayout) -> bytes:
    sink = io.BytesIO()
    write_shard(sink, values, layout)
    return sink.getvalue()


def read_back(data: bytes, layout: ArrayLayout) -> np.ndarray:
    out = np.empty((layout.shard, *layout.shape[1:]), dtype=layout.dtype)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        index = read_index(file.fileno(), layout, name="f")
        for number, entry in enumerate(index):
            part = out[number * layout.chunk : (number + 1) * layout.chunk]
            read_chunk(file.fileno(), entry, layout, name="f", out=part)
    return out


@settings(deadline=None)
@given(
    st.sampled_from(["uint16", "float16", "float32", "int32", "uint8", "int8"]),
    st.integers(1, 40),
    st.integers(1, 6),
    st.sampled_from([(), (1,), (7,)]),
    st.data(),
)
def test_a_shard_file_returns_what_was_written_and_fill_elsewhere(
    dtype: str, chunk: int, chunks: int, rest: tuple[int, ...], data: st.DataObject
) -> None:
    layout = layout_of(dtype, chunk * chunks, chunk, rest, fill=3)
    used = data.draw(st.integers(0, layout.shard))
    values = np.random.default_rng(used).integers(0, 127, (used, *rest)).astype(dtype)
    back = read_back(written(values, layout), layout)
    assert back.dtype == values.dtype
    assert np.array_equal(back[:used], values)
    assert (back[used:] == 3).all()


def test_noise_that_cannot_be_compressed_comes_back() -> None:
    layout = layout_of("uint8", 5000, 1000, (7,))
    values = np.random.default_rng(0).integers(0, 256, (5000, 7), dtype=np.uint8)
    data = written(values, layout)
    assert len(data) > values.nbytes
    assert np.array_equal(read_back(data, layout), values)


LAYOUT = layout_of("uint16", 32, 8, (4,))


def shard_bytes() -> bytes:
    return written(np.arange(128, dtype=np.uint16).reshape(32, 4), LAYOUT)


def forged(change_chunk: bytes | None = None, index: list[tuple[int, int]] | None = None) -> bytes:
    """A shard file whose checksums are right though its contents were changed on purpose."""
    data = shard_bytes()
    table = np.frombuffer(data[-LAYOUT.index_bytes : -4], dtype="<u8").reshape(-1, 2).copy()
    if change_chunk is not None:
        end = int(table[0, 1])
        table[:, 0] += len(change_chunk) + 4 - end
        table[0] = 0, len(change_chunk) + 4
        data = change_chunk + struct.pack("<I", crc32c(change_chunk)) + data[end:]
    if index is not None:
        table[: len(index)] = index
    packed = table.tobytes()
    return data[: -LAYOUT.index_bytes] + packed + struct.pack("<I", crc32c(packed))


def first_chunk() -> bytearray:
    data = shard_bytes()
    return bytearray(data[: int.from_bytes(data[-LAYOUT.index_bytes + 8 :][:8], "little") - 4])


def refusal(data: bytes) -> str:
    with pytest.raises(CacheCorrupt) as caught:
        read_back(data, LAYOUT)
    return str(caught.value)


def test_forging_nothing_changes_nothing() -> None:
    assert forged(change_chunk=bytes(first_chunk())) == forged() == shard_bytes()


def test_a_file_shorter_than_its_index_is_called_cut_short() -> None:
    assert refusal(shard_bytes()[:20]) == "f is cut short: 20 bytes, fewer than its index takes (68)"


def test_a_changed_index_is_named() -> None:
    data = bytearray(shard_bytes())
    data[-30] ^= 1
    assert refusal(bytes(data)) == (
        "f is damaged: its index fails its checksum; `clvq cache verify` names what is whole"
    )


@pytest.mark.parametrize(
    "entry", [(0, 2**40), (2**64 - 2, 8), (2**63, 2**63), (10_000, 40), (2**64 - 1, 40), (0, 2**64 - 1)]
)
def test_an_index_that_points_outside_the_file_is_named(entry: tuple[int, int]) -> None:
    assert refusal(forged(index=[entry])) == "f is damaged: its index points outside the file"


@pytest.mark.parametrize("size", [0, 3, 19, 64 + 21])
def test_a_chunk_of_impossible_size_is_named(size: int) -> None:
    assert refusal(forged(index=[(0, size)])) == "f is damaged: its index gives a chunk a size that no chunk can have"


@pytest.mark.parametrize("order", [(0, 0), (1, 0), (0, 1)])
def test_chunks_that_share_bytes_are_named(order: tuple[int, int]) -> None:
    table = np.frombuffer(shard_bytes()[-LAYOUT.index_bytes : -4], dtype="<u8").reshape(-1, 2)
    start, size = table[0].tolist()
    entries = [(start, size), (start + (1 if order != (0, 0) else 0), size)]
    twisted = [entries[place] for place in order] if order[0] != order[1] else entries
    assert refusal(forged(index=twisted)) == "f is damaged: its index gives the same bytes to two chunks"


def test_chunks_in_another_order_than_their_places_are_read() -> None:
    data = shard_bytes()
    table = np.frombuffer(data[-LAYOUT.index_bytes : -4], dtype="<u8").reshape(-1, 2)
    (a, b), rest = (data[start : start + size] for start, size in table[:2].tolist()), int(table[2, 0])
    mixed = b + a + data[rest : -LAYOUT.index_bytes]
    changed = table.copy()
    changed[0], changed[1] = (len(b), len(a)), (0, len(b))
    packed = changed.tobytes()
    back = read_back(mixed + packed + struct.pack("<I", crc32c(packed)), LAYOUT)
    assert np.array_equal(back, np.arange(128).reshape(32, 4))


def test_a_changed_chunk_is_named() -> None:
    data = bytearray(shard_bytes())
    data[25] ^= 1
    assert refusal(bytes(data)) == "f is damaged: a chunk fails its checksum; `clvq cache verify` names what is whole"


def test_a_chunk_that_would_decode_to_another_size_is_refused_before_it_is_decoded() -> None:
    chunk = first_chunk()
    chunk[4:8] = (2**31 - 1).to_bytes(4, "little")
    assert refusal(forged(change_chunk=bytes(chunk))) == "f is damaged: a chunk decodes to another size than 64 bytes"


def test_a_chunk_whose_header_asks_for_bytes_beyond_it_is_refused() -> None:
    chunk = first_chunk()
    chunk[12:16] = (10**6).to_bytes(4, "little")
    assert refusal(forged(change_chunk=bytes(chunk))) == (
        "f is damaged: a chunk cannot be decompressed (its header gives another length)"
    )


def test_a_chunk_of_another_codec_is_refused() -> None:
    values = np.arange(32, dtype=np.uint16).reshape(8, 4)
    for codec in (b"lz4", b"blosclz", b"zlib"):
        chunk = blosc.compress(values, codec, 1, blosc.SHUFFLE, 64)
        assert refusal(forged(change_chunk=chunk)) == (
            "f is damaged: a chunk cannot be decompressed (its codec is not zstd)"
        )


def test_a_chunk_that_is_not_blosc_is_named() -> None:
    chunk = first_chunk()
    chunk[0] = 77
    assert refusal(forged(change_chunk=bytes(chunk))).startswith(
        "f is damaged: a chunk cannot be decompressed (error during blosc"
    )


SHAPES = layout_of("uint16", 32, 8, (500,))
WHOLE = np.arange(32_000, dtype=np.uint16).reshape(64, 500)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an array `a` of two shards that hold `WHOLE`."""
    for shard in range(2):
        file = tmp_path / array_file("a", shard, 2)
        file.parent.mkdir(parents=True)
        file.write_bytes(written(WHOLE[shard * 32 : shard * 32 + 32], SHAPES))
    return tmp_path


def opened(folder: Path, *, limit: int = 8) -> ShardFiles:
    return ShardFiles(lambda name: folder / name, limit=limit)


@settings(deadline=None)
@given(places=st.lists(st.integers(0, 63), max_size=200) | st.sets(st.integers(0, 63)).map(sorted))
def test_places_in_any_order_are_the_places_asked_for(
    tmp_path_factory: pytest.TempPathFactory, places: list[int]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "places"
    if not folder.exists():
        for shard in range(2):
            file = folder / array_file("a", shard, 2)
            file.parent.mkdir(parents=True)
            file.write_bytes(written(WHOLE[shard * 32 : shard * 32 + 32], SHAPES))
    wanted = np.array(places, dtype=np.int64)
    assert np.array_equal(opened(folder).read("a", SHAPES, wanted), WHOLE[wanted])


@pytest.mark.parametrize("places", [range(64), range(8, 24), range(3, 40), [5, 5, 5], range(7, 16), [0] * 8])
def test_reading_into_given_memory_changes_nothing_beside_it(folder: Path, places: list[int]) -> None:
    memory = np.full((100, 500), 60_000, dtype=np.uint16)
    wanted = np.array(places, dtype=np.int64)
    opened(folder).read("a", SHAPES, wanted, out=memory[10 : 10 + len(wanted)])
    assert np.array_equal(memory[10 : 10 + len(wanted)], WHOLE[wanted])
    assert (memory[:10] == 60_000).all()
    assert (memory[10 + len(wanted) :] == 60_000).all()


def files_open() -> int:
    return len(os.listdir("/proc/self/fd"))


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors by /proc")


@needs_proc
def test_only_so_many_files_stay_open_and_all_are_closed_in_the_end(folder: Path) -> None:
    before = files_open()
    files = opened(folder, limit=1)
    for _ in range(3):
        files.read("a", SHAPES, np.arange(64))
    assert files_open() == before + 1
    files.close()
    assert files_open() == before
    assert np.array_equal(files.read("a", SHAPES, np.arange(64)), WHOLE)
    del files
    assert files_open() == before


@needs_proc
def test_a_file_with_a_damaged_index_is_not_left_open(folder: Path) -> None:
    file = folder / array_file("a", 1, 2)
    file.write_bytes(file.read_bytes()[:-1])
    before = files_open()
    files = opened(folder)
    with pytest.raises(CacheCorrupt, match="its index fails its checksum"):
        files.read("a", SHAPES, np.array([40]))
    assert files_open() == before


def test_many_threads_with_few_files_open_all_read_the_right_rows(folder: Path) -> None:
    files = opened(folder, limit=1)
    generator = np.random.default_rng(0)
    wanted = [generator.integers(0, 64, 30) for _ in range(400)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda places: files.read("a", SHAPES, places), wanted))
    for places, values in zip(wanted, found, strict=True):
        assert np.array_equal(values, WHOLE[places])


def replaced(file: Path, data: bytes) -> None:
    aside = file.with_name("aside")
    aside.write_bytes(data)
    aside.replace(file)


@pytest.mark.parametrize(
    ("change", "kept"),
    [(replaced, True), (lambda file, data: file.write_bytes(data), False)],
    ids=["renamed", "in place"],
)
def test_a_file_changed_after_it_was_opened_never_gives_wrong_rows(
    folder: Path, change: Callable[[Path, bytes], object], kept: bool
) -> None:
    files = opened(folder)
    files.read("a", SHAPES, np.array([0]))
    # Compressed to another size, so that the chunks lie elsewhere.
    other = (WHOLE[:32] % 2 + 7).astype(np.uint16)
    change(folder / array_file("a", 0, 2), written(other, SHAPES))
    if kept:
        assert np.array_equal(files.read("a", SHAPES, np.arange(32)), WHOLE[:32])
    else:
        with pytest.raises(CacheCorrupt, match="a chunk fails its checksum"):
            files.read("a", SHAPES, np.arange(32))
    assert np.array_equal(opened(folder).read("a", SHAPES, np.arange(32)), other)


def test_a_file_that_vanishes_between_finding_and_opening_is_missing(folder: Path) -> None:
    (folder / array_file("a", 1, 2)).unlink()
    with pytest.raises(CacheCorrupt) as caught:
        opened(folder).read("a", SHAPES, np.array([63]))
    assert str(caught.value) == (
        f"{folder}/{array_file('a', 1, 2)} is missing; run `clvq cache verify` and get a whole copy of it"
    )


def test_decoding_lets_other_threads_run() -> None:
    # Were the interpreter's lock held, two threads would take as long as one after the other, and count nothing here.
    layout = layout_of("uint16", 1 << 22, 1 << 22, ())
    data = written(np.random.default_rng(0).integers(0, 1 << 12, 1 << 22).astype(np.uint16), layout)
    out = np.empty(1 << 22, dtype=np.uint16)
    done = threading.Event()

    def decode() -> None:
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            index = read_index(file.fileno(), layout, name="f")
            for _ in range(10):
                read_chunk(file.fileno(), index[0], layout, name="f", out=out)
        done.set()

    thread = threading.Thread(target=decode)
    thread.start()
    turns = 0
    while not done.wait(0.0005):
        turns += 1
    thread.join()
    assert turns > 10


def test_runs_of_a_chunk_end_where_the_chunk_ends() -> None:
    assert chunk_runs(np.array([0, 1, 7, 8, 8, 31]), 8) == [(0, 3), (3, 5), (5, 6)]
    assert chunk_runs(np.array([], dtype=np.int64), 8) == []
