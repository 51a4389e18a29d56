"""Shuffled reading of row pairs as float32: the cache against a memory map, zarr-python alone and an Arrow data set.

The memory map holds the same rows as raw bf16 bits and is asked for the same batches, planned before. Each way is run
warm (all of it in the page cache) and cold (pages dropped before each run, everything opened anew), at a size that the
stream keeps decoded and at one that it decodes again each epoch. zarr-python visits chunks in random order and mixes no
two of them; Hugging Face `datasets` holds float32, for Arrow has no bf16.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import clvq
import datasets
import numpy as np
import torch
import zarr
from clvq.cache.encoding import from_bits
from clvq.cache.pools import THREADS
from clvq.cache.row_stream import RowStream
from clvq.cache.stream import TextStream
from common import alternated, header, report
from tiled import SITES, hidden_states, tiled

BATCH = 4096
EPOCHS = iter(range(1_000_000))


class Compared:
    """One cache, the same rows in other forms, and the ways to read them."""

    def __init__(self, folder: Path, cache: clvq.Cache) -> None:
        self.cache = cache
        self.everything = np.ones(len(cache.texts), dtype=bool)
        self.rows = cache.rows_of(self.everything)
        self.raw = {site: folder / f"{site}.raw" for site in SITES}
        for site, file in self.raw.items():
            with open(file, "wb") as sink:
                for start in range(0, len(self.rows), 65_536):
                    cache.bits(site, self.rows[start : start + 65_536]).tofile(sink)
        place = np.full(cache.manifest.geometry.row_places, -1)
        place[self.rows] = np.arange(len(self.rows))
        self.row_plan = [place[batch.row] for batch in self.row_stream().epoch(0)]
        self.text_plan = [(batch.mask, place[batch.row[batch.mask]]) for batch in self.text_stream().epoch(0)]
        os.sync()

    def row_stream(self) -> RowStream:
        """Ours, by rows."""
        return RowStream(self.cache, SITES, self.everything, special="all", seed=0, batch_rows=BATCH)

    def text_stream(self) -> TextStream:
        """Ours, by texts."""
        return TextStream(self.cache, SITES, self.everything, special="all", seed=0, slots_per_batch=BATCH)

    def maps(self) -> dict[str, np.ndarray]:
        """The memory maps."""
        return {
            site: np.memmap(file, dtype=np.int16, mode="c").reshape(-1, self.cache.width(site))
            for site, file in self.raw.items()
        }

    def numpy_rows(self, maps: dict[str, np.ndarray]) -> None:
        """Rows from the map by numpy."""
        for rows in self.row_plan:
            touch({site: from_bits(whole[rows].view(np.uint16), "bf16") for site, whole in maps.items()})

    def torch_rows(self, maps: dict[str, np.ndarray]) -> None:
        """Rows from the map by torch."""
        tensors = {site: torch.from_numpy(whole).view(torch.bfloat16) for site, whole in maps.items()}
        for rows in self.row_plan:
            index = torch.from_numpy(rows)
            touch({site: whole.index_select(0, index).float() for site, whole in tensors.items()})

    def numpy_texts(self, maps: dict[str, np.ndarray]) -> None:
        """Padded texts from the map by numpy."""
        for mask, rows in self.text_plan:
            values = {}
            for site, whole in maps.items():
                values[site] = np.zeros((*mask.shape, whole.shape[1]), dtype=np.float32)
                values[site][mask] = from_bits(whole[rows].view(np.uint16), "bf16")
            touch(values)

    def torch_texts(self, maps: dict[str, np.ndarray]) -> None:
        """Padded texts from the map by torch."""
        tensors = {site: torch.from_numpy(whole).view(torch.bfloat16) for site, whole in maps.items()}
        for mask, rows in self.text_plan:
            index, where, values = torch.from_numpy(rows), torch.from_numpy(mask), {}
            for site, whole in tensors.items():
                values[site] = torch.zeros(*mask.shape, whole.shape[1])
                values[site][where] = whole.index_select(0, index).float()
            touch(values)

    def zarr_rows(self) -> None:
        """Rows by zarr-python: chunks in random order, each shuffled."""
        group = zarr.open_group(self.cache.path / "activations.zarr", mode="r")
        arrays, size = {site: group[f"sites/{site}"] for site in SITES}, self.cache.manifest.geometry.chunk_rows
        generator = np.random.default_rng(0)
        for chunk in generator.permutation(np.unique(self.rows // size)).tolist():
            mixed = generator.permutation(size)
            bits = {site: array[chunk * size : (chunk + 1) * size] for site, array in arrays.items()}
            touch({site: from_bits(values[mixed], "bf16") for site, values in bits.items()})


def arrow(folder: Path, cache: clvq.Cache) -> datasets.Dataset:
    """The rows as an Arrow data set, shuffled."""
    rows = cache.rows_of(np.ones(len(cache.texts), dtype=bool))
    features = datasets.Features({s: datasets.List(datasets.Value("float32"), length=cache.width(s)) for s in SITES})

    def blocks() -> Iterator[dict[str, np.ndarray]]:
        for block, vectors in cache.blocks(SITES, rows, size=1000):
            yield from ({site: vectors[site][row] for site in SITES} for row in range(len(block)))

    made = datasets.Dataset.from_generator(blocks, features=features, cache_dir=str(folder / "arrow"))
    return made.with_format("numpy").shuffle(seed=0)


def touch(values: dict) -> None:
    """Use what was read, as little as can be."""
    for part in values.values():
        part[0, 0].sum()


def streamed(stream: RowStream | TextStream) -> Callable[[], None]:
    """An epoch of a stream."""

    def run() -> None:
        for batch in stream.epoch(next(EPOCHS)):
            touch(batch.values)

    return run


def times(count: int, run: Callable[[], object]) -> Callable[[], None]:
    """Run so many times, where once would be too short to measure."""

    def inner() -> None:
        for _ in range(count):
            run()

    return inner


def with_threads(threads: int, run: Callable[[], None]) -> Callable[[], None]:
    """Run with so many of torch's threads."""

    def inner() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        run()
        torch.set_num_threads(before)

    return inner


def dropped(folder: Path) -> None:
    """Drop the pages of all files, and use memory that was free: virtual machines give it back to their host, and what
    is used of it first then takes longer than what is measured."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    np.empty(2 << 30, dtype=np.uint8)[::4096] = 0


def cold(ways: dict[str, Callable[[], object]], folder: Path, *, repeats: int) -> dict[str, list[float]]:
    """Seconds of each way with nothing in the page cache, the ways taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            dropped(folder)
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_500_000])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    datasets.disable_progress_bars()
    print(header("clvq", "torch", "numpy", "numcodecs", "zarr", "datasets"))
    print(f"{THREADS} threads read for clvq, and whoever takes the batches does nothing else")
    with tempfile.TemporaryDirectory() as name:
        vectors, counts = hidden_states(Path(name))
        for rows in given.rows:
            compare(Path(name) / str(rows), vectors, counts, rows=rows, repeats=given.repeats)


def compare(folder: Path, vectors: dict, counts: np.ndarray, *, rows: int, repeats: int) -> None:
    """Measure one size."""
    cache = tiled(folder / "cache", vectors, counts, rows=rows)
    small = rows <= 200_000
    these, amount = Compared(folder, cache), cache.manifest.geometry.rows
    sizes = [
        sum(f.stat().st_size for f in cache.path.rglob("*") if f.is_file()),
        2 * these.raw[SITES[0]].stat().st_size,
    ]
    kept = "stays decoded" if these.row_stream()._fits else "is decoded anew each epoch"
    print(f"\n{amount:,} rows × {len(SITES)} sites of {cache.width(SITES[0])}; {kept}")
    print(f"  bytes: cache {sizes[0]:,}, raw bf16 {sizes[1]:,}: ratio {sizes[0] / sizes[1]:.3f}")
    maps, cores = these.maps(), os.cpu_count() or 1
    mapped = {
        "rows": {"numpy": these.numpy_rows, "torch": these.torch_rows},
        "texts": {"numpy": these.numpy_texts, "torch": these.torch_texts},
    }
    others: dict[str, Callable[[], None]] = {"zarr-python, chunk by chunk": these.zarr_rows}
    if small:
        shuffled = arrow(folder, cache)

        def arrow_rows() -> None:
            for batch in shuffled.iter(batch_size=BATCH):
                touch(batch)

        others["Hugging Face datasets, Arrow"] = arrow_rows
    for unit, make in (("rows", these.row_stream), ("texts", these.text_stream)):
        ways: dict[str, Callable[[], None]] = {"clvq": streamed(make())}
        for tool, run in mapped[unit].items():
            ways[f"memory map, {tool}, one thread"] = with_threads(1, lambda run=run: run(maps))
        ways[f"memory map, torch, {cores} threads"] = with_threads(cores, lambda unit=unit: mapped[unit]["torch"](maps))
        ways |= others if unit == "rows" else {}
        for way in ways.values():
            way()
        epochs = 1 + 500_000 // amount
        slow = others.keys()
        several = {name: way if name in slow else times(epochs, way) for name, way in ways.items()}
        seconds = alternated(several, repeats=repeats)
        once = {name: taken if name in slow else [s / epochs for s in taken] for name, taken in seconds.items()}
        report(f"shuffled {unit}, warm", once, ours="clvq", amount=amount, unit="rows")
    del maps
    for unit, make in (("rows", these.row_stream), ("texts", these.text_stream)):
        ways = {"clvq": lambda make=make: (cache.close(), streamed(make())())}
        for tool, run in mapped[unit].items():
            ways[f"memory map, {tool}, one thread"] = with_threads(1, lambda run=run: run(these.maps()))
        ways |= others if unit == "rows" else {}
        seconds = cold(ways, folder, repeats=min(3, repeats))
        report(f"shuffled {unit}, cold", seconds, ours="clvq", amount=amount, unit="rows")


if __name__ == "__main__":
    main()
