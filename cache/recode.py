"""Writing a cache again with another encoding, without the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import ConfigError, DiskFull
from ..progress import SILENT, Progress
from .encoding import SCALE_ROWS, STORED_AS, array_layouts, channel_scale, scale_texts
from .extraction import Extraction, Shard
from .files import free_bytes
from .layout import MANIFEST, UNFINISHED, Encoding, SiteLayout
from .placement import Placement, place
from .reader import Cache
from .statistics import EncodingLoss
from .writer import CacheWriter


@dataclass(frozen=True)
class Recoding:
    """What a recoding made."""

    path: Path
    cache_id: str
    parent: str
    bytes_before: int
    bytes: int
    losses: Mapping[str, EncodingLoss]
    """Site → what the new encoding did to the values of the old one."""


def recode(
    cache: Cache, out: Path, encoding: Encoding, *, progress: Progress = SILENT, force: bool = False
) -> Recoding:
    """Write the cache into `out` with another encoding; goes on where an earlier run stopped.

    The shards are laid out anew, as an extraction with that encoding would lay them out. The losses are against the
    values of the old cache, whatever had been lost there.

    Raises
    ------
    ConfigError
        Where the cache has that encoding already, or `out` is the cache itself.
    ResumeMismatch, FolderInUse, DiskFull, Interrupted
        See `CacheWriter`.
    CacheCorrupt
        Where the old cache is damaged.
    """
    manifest = cache.manifest
    if out.resolve() == cache.path.resolve():
        raise ConfigError(f"{out} is the cache that is to be recoded: give another --out")
    if all(site.encoding == encoding for site in manifest.sites.values()):
        raise ConfigError(f"{cache.path} is stored as {encoding} already")
    if cache.absent_shards:
        raise ConfigError(f"{cache.path} is a partial copy: recode the whole cache, and pull a part of that")
    counts = np.asarray(cache.texts["row_count"]).astype(np.int64)
    starts = np.asarray(cache.texts["first_row"]).astype(np.int64)
    width = max(site.width for site in manifest.sites.values())
    placement = place(counts, row_bytes=width * np.dtype(STORED_AS[encoding]).itemsize)
    extraction = Extraction(
        identity=_identity(manifest.identity, encoding, {n: site.encoding for n, site in manifest.sites.items()}),
        geometry=placement.geometry,
        sites={name: SiteLayout(width=site.width, encoding=encoding) for name, site in manifest.sites.items()},
        classes=manifest.classes,
        columns=manifest.columns,
        parent=cache.id,
    )
    _check_disk(extraction, out)
    with CacheWriter(out, extraction, force=force) as writer:
        if not writer.finished:
            first = scale_texts(counts)
            rows = np.concatenate([starts[text] + np.arange(counts[text]) for text in first])[:SCALE_ROWS]
            writer.fix_scales(lambda: {site: channel_scale(cache.vectors(site, rows)) for site in manifest.sites})
            missing = [number for number in range(placement.geometry.shards) if number not in writer.done]
            progress.begin("recode", len(missing), "shards")
            for number in missing:
                writer.commit(_shard(cache, placement, number, starts, counts))
                progress.advance()
            writer.finish(_texts(cache, placement), class_names=manifest.class_names, counts=manifest.counts)
    made = Cache(out)
    return Recoding(
        path=out,
        cache_id=made.id,
        parent=cache.id,
        bytes_before=sum(entry.bytes for entry in manifest.entries.values()),
        bytes=sum(entry.bytes for entry in made.manifest.entries.values()),
        losses={name: site.loss for name, site in made.manifest.sites.items()},
    )


def _identity(identity: Mapping[str, Any], encoding: Encoding, before: Mapping[str, Encoding]) -> dict[str, Any]:
    return {**identity, "recoded": {"from": dict(before), "to": encoding}}


def _check_disk(extraction: Extraction, out: Path) -> None:
    layouts = array_layouts(
        extraction.geometry, extraction.sites, classes=extraction.classes, columns=extraction.columns
    )
    need = sum(layout.file_bytes_at_most for layout in layouts.values()) * extraction.geometry.shards
    free = free_bytes(out)
    if free < need and not (out / MANIFEST).is_file() and not (out / UNFINISHED).is_file():
        raise DiskFull(
            f"{out} needs up to {need:,} bytes and the disk has {free:,} free: free some room or give another --out"
        )


def _shard(
    cache: Cache,
    placement: Placement,
    number: int,
    starts: "np.ndarray[Any, np.dtype[np.int64]]",
    counts: "np.ndarray[Any, np.dtype[np.int64]]",
) -> Shard:
    texts = np.arange(*placement.shard_starts[number : number + 2])
    rows = np.concatenate([starts[text] + np.arange(counts[text]) for text in texts])
    columns = {name: cache.column(name)[rows] for name in cache.manifest.columns}
    columns["text"] = np.repeat(placement.text_id[texts], counts[texts]).astype(np.int32)
    return Shard(
        number=number,
        sites={site: cache.vectors(site, rows) for site in cache.manifest.sites},
        rows=columns,
        texts=len(texts),
        logits=cache.logits()[texts] if cache.manifest.predictions else None,
        convergence=cache.convergence_delta()[texts] if cache.manifest.saliency else None,
    )


def _texts(cache: Cache, placement: Placement) -> pa.Table:
    texts = cache.texts.drop_columns(["prediction"])
    for name, values in (("text_id", placement.text_id), ("first_row", placement.first_row)):
        texts = texts.set_column(texts.schema.get_field_index(name), name, pa.array(values, pa.int64()))
    return texts
