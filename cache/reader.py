"""Reading a cache: rows of any site in any order, columns of the row axis, the texts."""

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int64, Shaped

from ..errors import CacheCorrupt, ConfigError
from .chosen import ChosenRows
from .chosen import Special as Special
from .encoding import array_layouts
from .layout import ALL_COLUMNS, CONVERGENCE, LOGITS, SALIENCY_COLUMNS, TEXTS, FileEntry, read_manifest
from .selection import read_selection
from .shards import ShardFiles
from .texts_file import read_texts_table
from .widen import Widening

# Places of the row axis that memory is taken for at once, whatever the files hold.
_PLACES_BELIEVED = 2**25


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
        self.layouts = array_layouts(
            self.manifest.geometry,
            self.manifest.sites,
            classes=self.manifest.classes,
            columns=self.manifest.columns,
        )
        # Weak, so that the files are closed with the last reference to the cache.
        me = weakref.proxy(self)
        self.files = ShardFiles(lambda name: me.local(name))
        self.selection = read_selection(self.path, self.id)
        """What a partial copy was asked to hold; `None` for a whole cache."""
        here = range(self.manifest.geometry.shards)
        self.absent_shards = frozenset(here).difference(here if self.selection is None else self.selection.shards)
        """Shards that a partial copy was not asked to hold."""

    def close(self) -> None:
        """Close the files that are open; reading opens them again."""
        self.files.close()

    def local(self, name: str) -> Path:
        """The file at a path inside the cache; every file but the manifest is opened through this.

        Raises
        ------
        CacheCorrupt
            Where it is missing, or a link on the way could lead out of the cache.
        ConfigError
            Where this partial copy was not asked to hold it.
        """
        if self.selection is not None:
            self.selection.require_file(self.path, name)
        file = self.path
        for part in PurePosixPath(name).parts:
            file /= part
            if file.is_symlink():
                raise CacheCorrupt(f"{file} is a symbolic link, and a cache holds none: get a whole copy of it")
        if not file.is_file():
            raise CacheCorrupt(f"{file} is missing; run `clvq cache verify` and get a whole copy of it")
        # Chunks carry checksums of themselves, but not of which shard they are: this sees most swaps.
        entry, size = self._entries.get(name), file.stat().st_size
        if entry is not None and size != entry.bytes:
            raise CacheCorrupt(
                f"{file} has {size:,} bytes instead of {entry.bytes:,}; `clvq cache verify` names what is whole"
            )
        return file

    @cached_property
    def _entries(self) -> dict[str, FileEntry]:
        return self.manifest.entries

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
        if self.selection is not None:
            self.selection.require(self.path, sites=[full])
        return full

    def width(self, site: str) -> int:
        """Channels of a site's vectors."""
        return self.manifest.sites[site].width

    def row_bytes(self, sites: Sequence[str]) -> int:
        """Bytes that one row takes in memory as it is stored, at all the sites together."""
        layouts = [
            self.layouts[f"{kind}/{site}"]
            for site in sites
            for kind in ("sites", "scales")
            if f"{kind}/{site}" in self.layouts
        ]
        return sum(layout.chunk_bytes // layout.chunk for layout in layouts)

    @cached_property
    def texts(self) -> pa.Table:
        """`texts.parquet`: one row per text, sorted by `text_id`.

        Raises
        ------
        CacheCorrupt
            Where the file is missing, is not the one that was written, or was made to take far more memory than it is
            long.
        """
        file, entry = self.local(TEXTS), self.manifest.files.get(TEXTS)
        try:
            # Parquet's pages carry no checksums: a flipped bit could pass for another label.
            if entry is None or file.stat().st_size != entry.bytes:
                raise CacheCorrupt(f"{file} has other bytes than were written; get a whole copy of it")
            data = file.read_bytes()
        except OSError as error:
            raise CacheCorrupt(f"{file} cannot be read ({error}); get a whole copy of it") from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise CacheCorrupt(f"{file} has other bytes than were written; get a whole copy of it")
        return read_texts_table(data, self.manifest.geometry, name=str(file))

    @cached_property
    def text_index(self) -> Int64[np.ndarray, " text_place"]:
        """Text id → its row in `texts`; −1 for places not in use."""
        index = np.full(self.manifest.geometry.text_places, -1, dtype=np.int64)
        ids = np.asarray(self.texts["text_id"])
        index[ids] = np.arange(len(ids))
        return index

    def column(self, name: str) -> Shaped[np.ndarray, " row_place"]:
        """A column of the row axis, unused places included (there `text` is −1). One of `ALL_COLUMNS`.

        Shards that a partial copy lacks are unused too.

        Raises
        ------
        ConfigError
            Where the cache was extracted without saliency, or shared without its texts, and the column with them.
        """
        if name not in self._columns:
            self._require_bytes()
            geometry, (dtype, fill) = self.manifest.geometry, ALL_COLUMNS[name]
            column = np.full(geometry.row_places, fill, dtype=dtype)
            for shard in sorted(set(range(geometry.shards)) - self.absent_shards):
                start = shard * geometry.shard_rows
                self.read_column(
                    name, np.arange(start, start + geometry.shard_rows), out=column[start : start + geometry.shard_rows]
                )
            self._columns[name] = column
        return self._columns[name]

    def _require_bytes(self) -> None:
        """Take no memory for rows that only a manifest claims: some files must be there, of as many bytes as rows."""
        left = self.manifest.geometry.row_places
        if left <= _PLACES_BELIEVED:
            return
        for name in self.manifest.entries:
            file = self.path / name
            left -= file.stat().st_size if file.is_file() else 0
            if left <= 0:
                return
        raise CacheCorrupt(
            f"{self.path} claims places for {self.manifest.geometry.row_places:,} rows, and its files have fewer bytes "
            "than that; run `clvq cache verify` and get a whole copy of it"
        )

    @cached_property
    def _columns(self) -> dict[str, Shaped[np.ndarray, " row_place"]]:
        return {}

    def read_column(
        self, name: str, rows: Int64[np.ndarray, " row"], *, out: Shaped[np.ndarray, " row"] | None = None
    ) -> Shaped[np.ndarray, " row"]:
        """A column at some rows, read from the disk and not kept; into `out` where that is given.

        Raises
        ------
        ConfigError, CacheCorrupt
        """
        if name in SALIENCY_COLUMNS:
            self._require_saliency()
        elif name not in self.manifest.columns:
            raise ConfigError(f"{self.path} was shared without its texts, and `{name}` stayed behind: use a whole copy")
        return self.files.read(f"rows/{name}", self.layouts[f"rows/{name}"], rows, out=out)

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
        if self.selection is not None:
            self.selection.require(self.path, splits=names)
        return np.isin(np.asarray(self.texts["split"].to_pylist(), dtype=str), list(names))

    def chosen(self, texts: Bool[np.ndarray, " text"], *, special: Special = "all") -> ChosenRows:
        """The rows of the chosen texts.

        Raises
        ------
        ConfigError
            Where one of the texts is not in this partial copy.
        """
        picked = np.flatnonzero(texts)
        geometry = self.manifest.geometry

        def read_special(shard: int) -> Shaped[np.ndarray, " place"]:
            return self.read_column(
                "special", np.arange(shard * geometry.shard_rows, (shard + 1) * geometry.shard_rows)
            )

        first, count = (np.asarray(self.texts[name])[picked].astype(np.int64) for name in ("first_row", "row_count"))
        self._require(first[count > 0])
        return ChosenRows(
            str(self.path),
            geometry,
            text=picked,
            first_row=first,
            row_count=count,
            special=special,
            read_special=read_special,
        )

    def rows_of(self, texts: Bool[np.ndarray, " text"], *, special: Special = "all") -> Int64[np.ndarray, " row"]:
        """The rows of the chosen texts, in the order in which they lie on disk."""
        return self.chosen(texts, special=special).places()

    def _require(self, rows: Int64[np.ndarray, " row"]) -> None:
        if self.absent_shards:
            shards = np.unique(rows // self.manifest.geometry.shard_rows)
            absent = self.absent_shards.intersection(shards.tolist())
            if absent:
                raise ConfigError(
                    f"shard {min(absent)} is not in this partial copy of a cache, {self.path}: "
                    "pull the split that needs it, or choose texts that are there"
                )

    def widening(self, site: str) -> Widening:
        """How the stored rows of a site become float32."""
        encoding, scale = self.manifest.sites[site].encoding, None
        if encoding == "int8":
            name = f"channel_scale/{site}"
            scale = self.files.read(name, self.layouts[name], np.arange(self.width(site)))
        return Widening(encoding, scale)

    def vectors(self, site: str, rows: Int64[np.ndarray, " row"]) -> Float32[np.ndarray, "row d"]:
        """Vectors of the rows, in the order given.

        Raises
        ------
        CacheCorrupt
            Where a chunk or index fails its checksum or a file is missing.
        ConfigError
            Where a row is not in this partial copy.
        IndexError
            Where a row lies outside the row axis, as the −1 of a batch's padding does.
        """
        stored, scale = self.bits(site, rows), None
        if self.manifest.sites[site].encoding == "int8":
            scale = self.files.read(f"scales/{site}", self.layouts[f"scales/{site}"], rows)
        out = np.empty(stored.shape, dtype=np.float32)
        self.widening(site).into(stored, scale, out)
        return out

    def bits(self, site: str, rows: Int64[np.ndarray, " row"]) -> Shaped[np.ndarray, "row d"]:
        """Vectors of the rows as stored, for int8 without their scales."""
        self._require(rows)
        return self.files.read(f"sites/{site}", self.layouts[f"sites/{site}"], rows)

    def blocks(
        self, sites: Sequence[str], rows: Int64[np.ndarray, " row"], *, size: int = 8_192
    ) -> Iterator[tuple[Int64[np.ndarray, " block"], dict[str, Float32[np.ndarray, "block d"]]]]:
        """The rows in blocks of at most `size`, with their vectors at each site."""
        for start in range(0, len(rows), size):
            block = rows[start : start + size]
            yield block, {site: self.vectors(site, block) for site in sites}

    def logits(self) -> Float32[np.ndarray, "text class"]:
        """The model's logits of each row of `texts`; NaN where the model could not be run, or a partial copy ends.

        Raises
        ------
        ConfigError
            Where the cache was extracted without a task.
        """
        if not self.manifest.predictions:
            raise ConfigError(f"{self.path} holds no predictions; extract with `--task classify`")
        return self._of_texts(LOGITS)

    def convergence_delta(self) -> Float32[np.ndarray, " text"]:
        """By how much the saliencies of each row of `texts` miss what they should add up to, in units of the logit.

        NaN where the model could not be run, a partial copy ends, or saliency was not computed by integrated gradients.

        Raises
        ------
        ConfigError
            Where the cache was extracted without saliency.
        """
        self._require_saliency()
        return self._of_texts(CONVERGENCE)

    def _require_saliency(self) -> None:
        if not self.manifest.saliency:
            raise ConfigError(f"{self.path} holds no saliency; extract with `--task classify --saliency ig`")

    def _of_texts(self, array: str) -> Float32[np.ndarray, "text *rest"]:
        texts, layout = np.asarray(self.texts["text_id"]), self.layouts[array]
        values = np.full((len(texts), *layout.shape[1:]), np.nan, dtype=np.float32)
        there = ~np.isin(texts // self.manifest.geometry.shard_texts, list(self.absent_shards))
        values[there] = self.files.read(array, layout, texts[there])
        return values
