"""Reading a cache: rows of any site in any order, columns of the row axis, the texts."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float32, Int64, Shaped

from ..errors import CacheCorrupt, ConfigError
from .encoding import LOGITS, ArrayLayout, array_layouts, from_bits, read_chunk, read_index
from .layout import TEXTS, array_file, read_manifest

Special = Literal["all", "leading", "none"]
"""Which special rows take part: all, only the first of a text (CLS, BOS), or none."""


class Cache:
    """A finished cache on disk.

    Parameters
    ----------
    path
        The cache's folder.

    Raises
    ------
    CacheNotFound, CacheIncomplete, FormatVersion, CacheCorrupt
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest, self.id = read_manifest(self.path)
        self._layouts = array_layouts(self.manifest.geometry, self.manifest.sites, classes=self.manifest.classes)

    def site(self, name: str) -> str:
        """The full name of a site given as `8` or `hidden.8`.

        Raises
        ------
        ConfigError
            Where the cache does not hold that site.
        """
        full = f"hidden.{name}" if name.isdigit() else name
        if full not in self.manifest.sites:
            held = ", ".join(self.manifest.sites)
            raise ConfigError(f"{self.path} holds no site {full!r}; it holds {held}")
        return full

    def width(self, site: str) -> int:
        """Channels of a site's vectors."""
        return self.manifest.sites[site].width

    @cached_property
    def texts(self) -> pa.Table:
        """`texts.parquet`: one row per text, sorted by `text_id`.

        Raises
        ------
        CacheCorrupt
            Where the file is missing or is not the one that was written.
        """
        file, entry = self.path / TEXTS, self.manifest.files.get(TEXTS)
        try:
            data = file.read_bytes()
            # Parquet's pages carry no checksums: a flipped bit could pass for another label.
            if entry is None or hashlib.sha256(data).hexdigest() != entry.sha256:
                raise CacheCorrupt(f"{file} has other bytes than were written; get a whole copy of it")
            # Arrow's threads would still hold a Python buffer when a short command ends, and abort the process.
            return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise CacheCorrupt(f"{file} cannot be read ({error}); get a whole copy of it") from error

    @cached_property
    def text_index(self) -> Int64[np.ndarray, " text_place"]:
        """Text id → its row in `texts`; −1 for places not in use."""
        index = np.full(self.manifest.geometry.text_places, -1, dtype=np.int64)
        ids = np.asarray(self.texts["text_id"])
        index[ids] = np.arange(len(ids))
        return index

    def column(self, name: str) -> Shaped[np.ndarray, " row_place"]:
        """A column of the row axis, unused places included (there `text` is −1). One of `ROW_COLUMNS`."""
        if name not in self._columns:
            places = self.manifest.geometry.row_places
            self._columns[name] = self.read_array(
                self.path, f"rows/{name}", self._layouts[f"rows/{name}"], np.arange(places)
            )
        return self._columns[name]

    @cached_property
    def _columns(self) -> dict[str, Shaped[np.ndarray, " row_place"]]:
        return {}

    def splits(self, names: Sequence[str]) -> Bool[np.ndarray, " text"]:
        """Which rows of `texts` belong to any of the splits.

        Raises
        ------
        ConfigError
            Where the cache does not hold a split.
        """
        for name in names:
            if name not in self.manifest.splits:
                held = ", ".join(self.manifest.splits)
                raise ConfigError(f"{self.path} holds no split {name!r}; it holds {held}")
        return np.isin(np.asarray(self.texts["split"].to_pylist(), dtype=str), list(names))

    def rows_of(self, texts: Bool[np.ndarray, " text"], *, special: Special = "all") -> Int64[np.ndarray, " row"]:
        """The rows of the chosen texts, in the order in which they lie on disk."""
        index = self.text_index[self.column("text")]
        chosen = (self.column("text") >= 0) & texts[index]
        if special != "all":
            chosen &= self.column("special") <= (1 if special == "leading" else 0)
        return np.flatnonzero(chosen)

    def vectors(self, site: str, rows: Int64[np.ndarray, " row"]) -> Float32[np.ndarray, "row d"]:
        """Vectors of the rows, in the order given.

        Raises
        ------
        CacheCorrupt
            Where a chunk or index fails its checksum or a file is missing.
        IndexError
            Where a row lies outside the row axis, as the −1 of a batch's padding does.
        """
        return from_bits(self.bits(site, rows), self.manifest.sites[site].encoding)

    def bits(self, site: str, rows: Int64[np.ndarray, " row"]) -> Shaped[np.ndarray, "row d"]:
        """Vectors of the rows as stored."""
        return self.read_array(self.path, f"sites/{site}", self._layouts[f"sites/{site}"], rows)

    def blocks(
        self, sites: Sequence[str], rows: Int64[np.ndarray, " row"], *, size: int = 32_768
    ) -> Iterator[tuple[Int64[np.ndarray, " block"], dict[str, Float32[np.ndarray, "block d"]]]]:
        """The rows in blocks of at most `size`, with their vectors at each site."""
        for start in range(0, len(rows), size):
            block = rows[start : start + size]
            yield block, {site: self.vectors(site, block) for site in sites}

    def logits(self) -> Float32[np.ndarray, "text class"]:
        """The model's logits of each row of `texts`; NaN where the model could not be run.

        Raises
        ------
        ConfigError
            Where the cache was extracted without a task.
        """
        if not self.manifest.predictions:
            raise ConfigError(f"{self.path} holds no predictions; extract with `--task classify`")
        return self.read_array(self.path, LOGITS, self._layouts[LOGITS], np.asarray(self.texts["text_id"]))

    @staticmethod
    def read_array(
        path: Path, name: str, layout: ArrayLayout, places: Int64[np.ndarray, " place"]
    ) -> Shaped[np.ndarray, "place *rest"]:
        """Places of an array in the order given; each chunk is decoded once."""
        if len(places) and (places.min() < 0 or places.max() >= layout.shape[0]):
            raise IndexError(
                f"{name} has places 0 to {layout.shape[0] - 1}; places {places.min()} to {places.max()} were asked for"
            )
        out = np.empty((len(places), *layout.shape[1:]), dtype=layout.dtype)
        order = np.arange(len(places)) if np.all(places[1:] >= places[:-1]) else np.argsort(places, kind="stable")
        ordered = places[order]
        ends = np.searchsorted(ordered, np.arange(layout.shape[0] // layout.shard + 1) * layout.shard)
        for shard in range(len(ends) - 1):
            if ends[shard] == ends[shard + 1]:
                continue
            file_name = array_file(name, shard, len(layout.shape))
            try:
                file = open(path / file_name, "rb")  # noqa: SIM115 — closed two lines below
            except FileNotFoundError as error:
                raise CacheCorrupt(
                    f"{path / file_name} is missing; run `clvq cache verify` and get a whole copy of it"
                ) from error
            with file:
                index = read_index(file, layout, name=str(path / file_name))
                inside = ordered[ends[shard] : ends[shard + 1]] - shard * layout.shard
                which = order[ends[shard] : ends[shard + 1]]
                cuts = np.searchsorted(inside, np.arange(layout.chunks_per_shard + 1) * layout.chunk)
                for chunk in np.flatnonzero(np.diff(cuts)):
                    values = read_chunk(file, index[chunk], layout, name=str(path / file_name))
                    part = slice(cuts[chunk], cuts[chunk + 1])
                    out[which[part]] = values[inside[part] - chunk * layout.chunk]
        return out
