"""Reading shard files: kept open, their indexes checked once, chunks decoded straight to where they are wanted.

Nothing that a file says of itself is believed before it was checked: a chunk must match its checksum and be of the size
that the array's layout implies before Blosc, which allocates what a header asks for, sees it.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
from google_crc32c import value as crc32c
from jaxtyping import Int64, Shaped
from numcodecs import blosc

from ..errors import CacheCorrupt
from .encoding import ArrayLayout
from .layout import array_file

_MISSING = 2**64 - 1
_CRC_BYTES = 4
# What CRC-32C gives for any bytes that are followed by their own CRC-32C: no copy without the last four is needed.
_RESIDUE = 0x48674BC7
_BLOSC_HEADER_BYTES = 16
_BLOSC_CODEC, _BLOSC_ZSTD = 0b111 << 5, 4 << 5
# A cache of 10⁸ rows has some thousand files, and a process may open 1,024.
_FILES_OPEN = 128


def read_index(descriptor: int, layout: ArrayLayout, *, name: str) -> Shaped[np.ndarray, "chunk 2"]:
    """Where each inner chunk of a shard file lies: (offset, bytes), both 2⁶⁴ − 1 where it was never written.

    Raises
    ------
    CacheCorrupt
        Where the index fails its checksum, points outside the file, or gives chunks impossible sizes or shared bytes.
    """
    size = os.fstat(descriptor).st_size
    if size < layout.index_bytes:
        raise CacheCorrupt(f"{name} is cut short: {size} bytes, fewer than its index takes ({layout.index_bytes})")
    limit = size - layout.index_bytes
    table = os.pread(descriptor, layout.index_bytes, limit)
    if crc32c(table) != _RESIDUE:
        raise CacheCorrupt(f"{name} is damaged: its index fails its checksum; `clvq cache verify` names what is whole")
    index = np.frombuffer(table[:-_CRC_BYTES], dtype="<u8").reshape(-1, 2)
    used = index[(index != _MISSING).any(axis=1)]
    # The sums cannot overflow: they are only taken of numbers that lie in the file.
    if len(used) and (used.max() > limit or int((used[:, 0] + used[:, 1]).max()) > limit):
        raise CacheCorrupt(f"{name} is damaged: its index points outside the file")
    sizes = used[:, 1]
    frame = _BLOSC_HEADER_BYTES + _CRC_BYTES
    if len(used) and (sizes.min() < frame or sizes.max() > layout.chunk_bytes + frame):
        raise CacheCorrupt(f"{name} is damaged: its index gives a chunk a size that no chunk can have")
    used = used[np.argsort(used[:, 0], kind="stable")]
    if (used[1:, 0] < used[:-1, 0] + used[:-1, 1]).any():
        raise CacheCorrupt(f"{name} is damaged: its index gives the same bytes to two chunks")
    return index


def read_chunk(
    descriptor: int,
    entry: Shaped[np.ndarray, "2"],
    layout: ArrayLayout,
    *,
    name: str,
    out: Shaped[np.ndarray, "place *rest"],
) -> None:
    """Decode one inner chunk of a shard file into `out`, which is contiguous.

    Raises
    ------
    CacheCorrupt
        Where the chunk fails its checksum or would decode to another size than the array's.
    """
    if entry[0] == _MISSING:
        out[...] = layout.fill
        return
    size = int(entry[1])
    packed = os.pread(descriptor, size, int(entry[0]))
    if len(packed) != size or size < _BLOSC_HEADER_BYTES + _CRC_BYTES or crc32c(packed) != _RESIDUE:
        raise CacheCorrupt(f"{name} is damaged: a chunk fails its checksum; `clvq cache verify` names what is whole")
    if int.from_bytes(packed[4:8], "little") != layout.chunk_bytes or out.nbytes != layout.chunk_bytes:
        raise CacheCorrupt(f"{name} is damaged: a chunk decodes to another size than {layout.chunk_bytes} bytes")
    try:
        if int.from_bytes(packed[12:16], "little") != size - _CRC_BYTES:
            raise RuntimeError("its header gives another length")
        if packed[2] & _BLOSC_CODEC != _BLOSC_ZSTD:
            raise RuntimeError("its codec is not zstd")
        blosc.decompress(packed, out)
    except RuntimeError as error:
        raise CacheCorrupt(f"{name} is damaged: a chunk cannot be decompressed ({error})") from error


class _OpenFile:
    """A shard file and its index; closed when the last thread that reads it lets go of it."""

    def __init__(self, path: Path, descriptor: int, layout: ArrayLayout) -> None:
        self.name = str(path)
        self.descriptor = descriptor
        self.index = read_index(descriptor, layout, name=self.name)

    def __del__(self) -> None:
        os.close(self.descriptor)


class ShardFiles:
    """The shard files of a cache, opened as they are needed; may be used from several threads.

    A file replaced on disk after it was opened goes on giving its old contents, and one changed in place fails its
    checksums.

    Parameters
    ----------
    locate
        From a path inside the cache to the file; raises where there is none.
    limit
        Files kept open.
    """

    def __init__(self, locate: Callable[[str], Path], *, limit: int = _FILES_OPEN) -> None:
        self._locate = locate
        self._limit = limit
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the files; they are opened again when they are read again."""
        with self._lock:
            self._open.clear()

    def soon(self, name: str, layout: ArrayLayout, places: Int64[np.ndarray, " place"]) -> None:
        """Say which places of an array, ascending, will be read before long: the system then fetches their chunks."""
        if not hasattr(os, "posix_fadvise"):
            return
        for start, _ in chunk_runs(places, layout.chunk):
            file, (offset, size) = self._found(name, layout, int(places[start]) // layout.chunk)
            if offset != _MISSING:
                os.posix_fadvise(file.descriptor, int(offset), int(size), os.POSIX_FADV_WILLNEED)

    def read(
        self,
        name: str,
        layout: ArrayLayout,
        places: Int64[np.ndarray, " place"],
        *,
        out: Shaped[np.ndarray, "place *rest"] | None = None,
    ) -> Shaped[np.ndarray, "place *rest"]:
        """Places of an array in the order given, each chunk decoded once; a chunk wanted whole is decoded in place.

        Parameters
        ----------
        name
            Of the array, as `sites/hidden.8`.
        out
            Contiguous memory to read into; made where it is not given.

        Raises
        ------
        CacheCorrupt
            Where a chunk or index fails its checksum or a file is missing.
        IndexError
            Where a place lies outside the axis.
        """
        if len(places) and (places.min() < 0 or places.max() >= layout.shape[0]):
            raise IndexError(
                f"{name} has places 0 to {layout.shape[0] - 1}; places {places.min()} to {places.max()} were asked for"
            )
        if out is None:
            out = np.empty((len(places), *layout.shape[1:]), dtype=layout.dtype)
        ascending = bool(np.all(places[1:] >= places[:-1]))
        order = None if ascending else np.argsort(places, kind="stable")
        ordered = places if order is None else places[order]
        scratch = None
        for start, end in chunk_runs(ordered, layout.chunk):
            number = int(ordered[start]) // layout.chunk
            inside = ordered[start:end] - number * layout.chunk
            if order is None and end - start == layout.chunk and np.all(inside[1:] > inside[:-1]):
                self._chunk(name, layout, number, out=out[start:end])
                continue
            if scratch is None:
                scratch = np.empty((layout.chunk, *layout.shape[1:]), dtype=layout.dtype)
            self._chunk(name, layout, number, out=scratch)
            if order is None:
                # Checked above; with `clip` numpy writes straight into `out`.
                np.take(scratch, inside, axis=0, out=out[start:end], mode="clip")
            else:
                out[order[start:end]] = scratch[inside]
        return out

    def _chunk(self, name: str, layout: ArrayLayout, number: int, *, out: Shaped[np.ndarray, "place *rest"]) -> None:
        file, entry = self._found(name, layout, number)
        read_chunk(file.descriptor, entry, layout, name=file.name, out=out)

    def _found(self, array: str, layout: ArrayLayout, number: int) -> tuple[_OpenFile, Shaped[np.ndarray, "2"]]:
        shard, inner = divmod(number, layout.chunks_per_shard)
        name = array_file(array, shard, len(layout.shape))
        file = self._opened(name, layout)
        return file, file.index[inner]

    def _opened(self, name: str, layout: ArrayLayout) -> _OpenFile:
        with self._lock:
            file = self._open.get(name)
            if file is not None:
                self._open.move_to_end(name)
                return file
        # Finding a file may take long, and other threads read meanwhile; opened twice, one of the two is dropped.
        path = self._locate(name)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise CacheCorrupt(f"{path} is missing; run `clvq cache verify` and get a whole copy of it") from error
        file = _OpenFile(path, descriptor, layout)
        with self._lock:
            self._open[name] = file
            self._open.move_to_end(name)
            while len(self._open) > self._limit:
                self._open.popitem(last=False)
        return file


def chunk_runs(places: Int64[np.ndarray, " place"], chunk: int) -> list[tuple[int, int]]:
    """From ascending places, where those of each chunk of an axis start and end."""
    if len(places) == 0:
        return []
    cuts = np.flatnonzero(np.diff(places // chunk)) + 1
    bounds = [0, *cuts.tolist(), len(places)]
    return list(pairwise(bounds))
