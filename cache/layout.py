"""What a cache consists of: names, the manifest and the shards' records.

The manifest is written last, and its SHA-256 is the cache's id. Nothing in it depends on when, where, by whom or with
how many workers the cache was made.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    model_validator,
)

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


# Caches come from strangers: no name in a manifest may lead out of the folder.
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
FileName = Annotated[str, StringConstraints(pattern=rf"^{_PART}(/{_PART})*$", max_length=255)]
SiteName = Annotated[str, StringConstraints(pattern=rf"^{_PART}$", max_length=100)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Geometry(_Frozen):
    """How rows and texts lie in shards. Both axes have unused places at the end of each shard."""

    shards: Positive
    shard_rows: Positive
    """Places for rows in a shard; row `r` lies in shard `r // shard_rows`."""
    chunk_rows: Positive
    """Rows in one compressed inner chunk of a site."""
    shard_texts: Positive
    """Places for texts in a shard; text `t` lies in shard `t // shard_texts`."""
    rows: Count
    """Rows in use."""
    texts: Count
    """Texts in use."""

    @model_validator(mode="after")
    def _whole_chunks(self) -> "Geometry":
        if self.shard_rows % self.chunk_rows:
            raise ValueError(f"shard_rows is {self.shard_rows}, no multiple of chunk_rows, {self.chunk_rows}")
        return self

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

    width: Positive
    encoding: Encoding


class FileEntry(_Frozen):
    """A file as it was when it was written."""

    bytes: Count
    sha256: str


class ShardRecord(_Frozen):
    """Proof that a shard is whole: written after its files, created exclusively."""

    shard: int
    rows: int
    texts: int
    files: dict[FileName, FileEntry]
    """Path inside the cache → what was written there."""
    statistics: dict[SiteName, SiteStatistics]


class SiteEntry(SiteLayout):
    """A site in the manifest."""

    statistics: SiteStatistics


class ShardEntry(_Frozen):
    """A shard in the manifest."""

    rows: int
    texts: int
    files: dict[FileName, FileEntry]


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
    sites: dict[SiteName, SiteEntry]
    splits: dict[str, SplitEntry]
    class_names: list[str] | None
    """Names of the labels 0, 1, …; `None` where the data has no labels."""
    classes: Positive | None
    """Width of `texts/logits`; `None` where it is not there."""
    counts: dict[str, int]
    """What happened to the texts: truncated ones, empty ones, words left out."""
    files: dict[FileName, FileEntry]
    """Every file that belongs to no shard, this manifest excepted."""
    shards: list[ShardEntry]

    @property
    def predictions(self) -> bool:
        """Whether `texts/logits` is there."""
        return self.classes is not None

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        if len(self.shards) != self.geometry.shards:
            raise ValueError(f"{len(self.shards)} shards are listed and {self.geometry.shards} are laid out")
        for name, site in self.sites.items():
            if not len(site.statistics.mean) == len(site.statistics.squares) == site.width:
                raise ValueError(f"the statistics of {name} have another width than its {site.width} channels")
        return self


def to_json(value: BaseModel | Mapping[str, Any]) -> bytes:
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
        raise CacheCorrupt(f'{path / MANIFEST} is not the manifest of a clvq cache: it has no "format": "{FORMAT}"')
    version = plain.get("version")
    if isinstance(version, int) and version != VERSION:
        raise FormatVersion(
            f"{path} is a cache of format version {version}; this clvq reads version {VERSION}: "
            "use the clvq that wrote it, or extract again"
        )
    try:
        return Manifest.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CacheCorrupt(f"{path / MANIFEST} is damaged at {where!r}: {first['msg']}; get a whole copy") from error


def differences(found: object, wanted: object, name: str = "") -> list[str]:
    """Where two JSON values differ, as `name: … there, … now`, nested names joined by dots."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for key in sorted(found.keys() | wanted.keys())
            for line in differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
        ]
    if found == wanted:
        return []
    return [f"{name}: {_short(found)} there, {_short(wanted)} now"]


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
