"""What a cache consists of: names, the manifest and the shards' records.

The manifest is written last, and its SHA-256 is the cache's id. Nothing in it depends on when, where, by whom or with
how many workers the cache was made.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from ..errors import CacheCorrupt, CacheIncomplete, CacheNotFound, FormatVersion
from .statistics import SiteStatistics

FORMAT = "clvq-cache"
VERSION = 1

MANIFEST = "manifest.json"
CARD = "README.md"
TEXTS = "texts.parquet"
RECORDS = "records"
ARRAYS = "activations.zarr"
# Stands in the folder while an extraction is unfinished: what is being extracted, and how it is laid out.
UNFINISHED = "unfinished.json"
# Files on their way into the folder; emptied when an extraction starts and ends.
STAGING = "staging"

Encoding = Literal["bf16", "fp16", "fp32"]

# name → (numpy type, value of unused rows)
ROW_COLUMNS: dict[str, tuple[str, int]] = {
    "text": ("int32", -1),
    "position": ("int32", -1),
    "subwords": ("int32", 0),
    "token": ("int32", -1),
    "word": ("int32", -1),
    "char_start": ("int32", -1),
    "char_end": ("int32", -1),
    "special": ("uint8", 0),
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Geometry(_Frozen):
    """How rows and texts lie in shards. Both axes have unused places at the end of each shard."""

    shards: int
    shard_rows: int
    """Places for rows in a shard; row `r` lies in shard `r // shard_rows`."""
    chunk_rows: int
    """Rows in one compressed inner chunk of a site."""
    shard_texts: int
    """Places for texts in a shard; text `t` lies in shard `t // shard_texts`."""
    rows: int
    """Rows in use."""
    texts: int
    """Texts in use."""

    @property
    def row_places(self) -> int:
        """Length of the row axis."""
        return self.shards * self.shard_rows

    @property
    def text_places(self) -> int:
        """Length of the text axis."""
        return self.shards * self.shard_texts


class SiteLayout(_Frozen):
    """How the vectors of one site are stored."""

    width: int
    encoding: Encoding


class FileEntry(_Frozen):
    """A file as it was when it was written."""

    bytes: int
    sha256: str


class ShardRecord(_Frozen):
    """Proof that a shard is whole: written after its files, created exclusively."""

    shard: int
    rows: int
    texts: int
    files: dict[str, FileEntry]
    """Path inside the cache → what was written there."""
    statistics: dict[str, SiteStatistics]


class SiteEntry(SiteLayout):
    """A site in the manifest."""

    statistics: SiteStatistics


class ShardEntry(_Frozen):
    """A shard in the manifest."""

    rows: int
    texts: int
    files: dict[str, FileEntry]


class SplitEntry(_Frozen):
    """How much of the cache belongs to one split of the data."""

    texts: int
    rows: int


class Manifest(_Frozen):
    """`manifest.json`."""

    format: Literal["clvq-cache"]
    version: Literal[1]
    identity: dict[str, JsonValue]
    """Everything that the stored values follow from: model, tokenizer, data, sites, rows rule, lengths, dtype."""
    geometry: Geometry
    sites: dict[str, SiteEntry]
    splits: dict[str, SplitEntry]
    class_names: list[str] | None
    """Names of the labels 0, 1, …; `None` where the data has no labels."""
    predictions: bool
    """Whether `texts/logits` is there."""
    counts: dict[str, int]
    """What happened to the texts: truncated ones, empty ones, words left out."""
    files: dict[str, FileEntry]
    """Every file that belongs to no shard, this manifest excepted."""
    shards: list[ShardEntry]


def to_json(value: BaseModel | JsonValue) -> bytes:
    """JSON with sorted keys, so that equal values give equal bytes."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return (json.dumps(plain, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def array_file(array: str, shard: int, axes: int) -> str:
    """Path, inside the cache, of the file that holds one shard of an array of `axes` axes."""
    return f"{ARRAYS}/{array}/c/{shard}" + "/0" * (axes - 1)


def record_file(shard: int) -> str:
    """Path, inside the cache, of a shard's record."""
    return f"{RECORDS}/{shard:06d}.json"


def read_manifest(path: Path) -> tuple[Manifest, str]:
    """The manifest of the cache at `path`, and the cache's id.

    Raises
    ------
    CacheNotFound, CacheIncomplete, FormatVersion, CacheCorrupt
    """
    file = path / MANIFEST
    if not file.is_file():
        if (path / UNFINISHED).is_file():
            raise CacheIncomplete(
                f"{path} is an unfinished extraction; run the `clvq extract` command that began it again to finish it"
            )
        what = f"has no {MANIFEST}" if path.is_dir() else "does not exist"
        raise CacheNotFound(f"{path} is not a clvq cache: it {what}; make one with `clvq extract … --out {path}`")
    data = file.read_bytes()
    return parse_manifest(data, path), hashlib.sha256(data).hexdigest()


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """Read a manifest's bytes; `path` is named in errors.

    Raises
    ------
    FormatVersion
        Where another version of the format wrote it.
    CacheCorrupt
        Where it is no manifest.
    """
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CacheCorrupt(f"{path / MANIFEST} is not JSON ({error}); get a whole copy of the cache") from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise CacheCorrupt(f"{path / MANIFEST} is not the manifest of a clvq cache: it has no \"format\": \"{FORMAT}\"")
    if plain.get("version") != VERSION:
        raise FormatVersion(
            f"{path} is a cache of format version {plain.get('version')!r}; this clvq reads version {VERSION}: "
            "use the clvq that wrote it, or extract again"
        )
    try:
        return Manifest.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CacheCorrupt(f"{path / MANIFEST} is damaged at {where!r}: {first['msg']}; get a whole copy") from error


def differences(found: JsonValue, wanted: JsonValue, name: str = "") -> list[str]:
    """Where two JSON values differ, as `name: found → wanted`, nested names joined by dots."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for key in sorted(found.keys() | wanted.keys())
            for line in differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
        ]
    if found == wanted:
        return []
    return [f"{name}: {_short(found)} there, {_short(wanted)} now"]


def _short(value: JsonValue) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
