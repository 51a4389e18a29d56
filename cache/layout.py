"""What a cache consists of: names, the manifest and the shards' records.

The manifest is written last, and its SHA-256 is the cache's id. Nothing in it depends on when, where, by whom or with
how many workers the cache was made. It is sealed: it holds the SHA-256 of itself, so that no flipped bit in it passes.

A manifest may come from a stranger. What it claims is checked before anything is read or made because of it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import nan
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from ..errors import CacheCorrupt, CacheIncomplete, CacheNotFound, FormatVersion
from .frozen import SOON_REFUSED, Count, Frozen, Positive, Text
from .statistics import EncodingLoss, SiteStatistics
from .unfinished import NOTE_BYTES, unfinished

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
# What a partial copy was asked to hold; absent from a whole one.
SELECTION = "selection.json"
# Hides the texts' hashes in copies made without texts. It stays here: nothing shares or lists it.
SALT = "salt"

Encoding = Literal["bf16", "fp16", "fp32", "int8"]

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
# What a copy made without its texts leaves out, for texts can be put together from it.
TEXTUAL_COLUMNS = ("token", "word", "char_start", "char_end")
# What a cache with saliency has besides: both or neither.
SALIENCY_COLUMNS: dict[str, tuple[str, float]] = {"saliency": ("float32", nan), "saliency_max": ("float32", nan)}
ALL_COLUMNS: dict[str, tuple[str, int | float]] = {**ROW_COLUMNS, **SALIENCY_COLUMNS}

LOGITS = "texts/logits"
# There where the saliency columns are.
CONVERGENCE = "texts/convergence_delta"

# Limits on what a stranger's manifest may make us read or decode at once.
MANIFEST_BYTES = 64 << 20
CHUNK_BYTES = 256 << 20
_IDENTITY_BYTES = 4 << 20
_PLACES = 2**31

# Caches come from strangers: no name in a manifest may lead out of the folder.
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
FileName = Annotated[str, StringConstraints(pattern=rf"^{_PART}(/{_PART})*$", max_length=255)]
SiteName = Annotated[str, StringConstraints(pattern=rf"^{_PART}$", max_length=100)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# Stands where a seal is still to be computed.
UNSEALED = "0" * 64
_SEAL = re.compile(rb'"checksum": "([0-9a-f]{64})"')


class Geometry(Frozen):
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


class SiteLayout(Frozen):
    """How the vectors of one site are stored."""

    width: Positive
    encoding: Encoding


class FileEntry(Frozen):
    """A file as it was when it was written."""

    bytes: Count
    sha256: Sha256


Files = Annotated[dict[FileName, FileEntry], SOON_REFUSED]


class ShardRecord(Frozen):
    """Proof that a shard is whole: written after its files, created exclusively."""

    checksum: Sha256 = UNSEALED
    """Seal of the record's file; see `sealed_json`."""
    shard: Count
    rows: Count
    texts: Count
    files: Files
    """Path inside the cache → what was written there."""
    statistics: Annotated[dict[SiteName, SiteStatistics], SOON_REFUSED]
    losses: Annotated[dict[SiteName, EncodingLoss], SOON_REFUSED]
    """What encoding did to the values of each site."""


class SiteEntry(SiteLayout):
    """A site in the manifest."""

    statistics: SiteStatistics
    loss: EncodingLoss
    """What encoding did to the values, as far as it was measured when they were written."""


class ShardEntry(Frozen):
    """A shard in the manifest."""

    rows: Count
    texts: Count
    files: Files


class SplitEntry(Frozen):
    """How much of the cache belongs to one split of the data."""

    texts: Count
    rows: Count


class Convergence(Frozen):
    """How far the saliencies of texts miss what they should add up to: magnitudes of `texts/convergence_delta`."""

    texts: Positive
    """Texts that have one."""
    median: Annotated[float, Field(ge=0)]
    quantile_95: Annotated[float, Field(ge=0)]


class Manifest(Frozen):
    """`manifest.json`."""

    checksum: Sha256 = UNSEALED
    """Seal of the file; see `sealed_json`."""
    format: Literal["clvq-cache"]
    version: Literal[1]
    parent: Sha256 | None
    """Id of the cache that this one was made from, where it was not extracted."""
    identity: dict[str, JsonValue]
    """Everything that the stored values follow from: model, tokenizer, data, sites, rows rule, lengths, dtype."""
    geometry: Geometry
    sites: Annotated[dict[SiteName, SiteEntry], SOON_REFUSED]
    columns: Annotated[tuple[str, ...], Field(max_length=len(ALL_COLUMNS))]
    """Columns of the row axis that are there, in the order of `ALL_COLUMNS`."""
    splits: Annotated[dict[Text, SplitEntry], SOON_REFUSED]
    class_names: Annotated[list[Text], SOON_REFUSED] | None
    """Names of the labels 0, 1, …; `None` where the data has no labels."""
    classes: Positive | None
    """Width of `texts/logits`; `None` where it is not there."""
    convergence: Convergence | None = None
    """Of integrated gradients; `None`, and not in the file, where there are none."""
    counts: Annotated[dict[Text, int], SOON_REFUSED]
    """What happened to the texts: truncated ones, empty ones, words left out."""
    files: Files
    """Every file that belongs to no shard, this manifest excepted."""
    shards: Annotated[list[ShardEntry], SOON_REFUSED]

    @property
    def predictions(self) -> bool:
        """Whether `texts/logits` is there."""
        return self.classes is not None

    @property
    def saliency(self) -> bool:
        """Whether the columns of `SALIENCY_COLUMNS` are there."""
        return bool(SALIENCY_COLUMNS.keys() & set(self.columns))

    @property
    def vectors_id(self) -> str:
        """SHA-256 of what a run follows from: vectors, their places and predictions, but no texts and no saliency.

        A cache and its copies without texts have it in common.
        """
        left_out = (CONVERGENCE, *(f"rows/{column}" for column in (*TEXTUAL_COLUMNS, *SALIENCY_COLUMNS)))
        prefixes = tuple(f"{ARRAYS}/{array}/" for array in left_out)
        arrays = {
            name: entry.sha256
            for name, entry in self.entries.items()
            if name.startswith(f"{ARRAYS}/") and "/c/" in name and not name.startswith(prefixes)
        }
        return hashlib.sha256(to_json({"geometry": self.geometry.model_dump(), "arrays": arrays})).hexdigest()

    @property
    def entries(self) -> dict[str, FileEntry]:
        """Every file of the cache but the manifest."""
        return dict(self.files) | {name: entry for shard in self.shards for name, entry in shard.files.items()}

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: Callable[["Manifest"], dict[str, Any]]) -> dict[str, Any]:
        plain = handler(self)
        # Manifests of caches without it stay, byte for byte, what they were before it was there.
        if plain["convergence"] is None:
            del plain["convergence"]
        return plain

    @field_validator("identity")
    @classmethod
    def _writable(cls, identity: dict[str, Any]) -> dict[str, Any]:
        size = 0
        for part in json.JSONEncoder(ensure_ascii=False).iterencode(identity):
            # Half a character, which JSON can name and nothing can write, is an error here already.
            size += len(part.encode())
            if size > _IDENTITY_BYTES:
                raise ValueError(f"more than {_IDENTITY_BYTES} bytes of settings: no extraction has so many")
        return identity

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        geometry = self.geometry
        if len(self.shards) != geometry.shards:
            raise ValueError(f"{len(self.shards)} shards are listed and {geometry.shards} are laid out")
        without_texts = tuple(column for column in ROW_COLUMNS if column not in TEXTUAL_COLUMNS)
        rest = SALIENCY_COLUMNS if self.saliency else ()
        if self.columns not in ((*ROW_COLUMNS, *rest), (*without_texts, *rest)):
            raise ValueError("the columns are neither all columns nor those of a cache without its texts")
        if self.convergence is not None and not (self.saliency and self.convergence.texts <= geometry.texts):
            raise ValueError("it tells of more saliencies that converge than there are")
        if "zarr.json" in self.sites:
            raise ValueError("a site has the name of a file, zarr.json")
        for name, site in self.sites.items():
            if not len(site.statistics.mean) == len(site.statistics.squares) == site.width:
                raise ValueError(f"the statistics of {name} have another width than its {site.width} channels")
            if site.statistics.count != geometry.rows:
                raise ValueError(f"the statistics of {name} are of {site.statistics.count} rows, not {geometry.rows}")
        for what, places in (("rows", geometry.shard_rows), ("texts", geometry.shard_texts)):
            used = [getattr(shard, what) for shard in self.shards]
            if sum(used) != getattr(geometry, what) or max(used) > places:
                raise ValueError(f"the {what} of the shards do not add up to {getattr(geometry, what)}, or do not fit")
        self._bounded()
        arrays = array_axes(self.sites, self.columns, predictions=self.predictions)
        if self.files.keys() != set(common_files(arrays, geometry.shards)):
            raise ValueError("its files are not those that its sites and columns imply")
        for number, shard in enumerate(self.shards):
            if shard.files.keys() != set(shard_files(arrays, number)):
                raise ValueError(f"the files of shard {number} are not those that its sites and columns imply")
        return self

    def _bounded(self) -> None:
        """No claim may make a reader allocate more than a chunk of `CHUNK_BYTES` or axes of ever so many places."""
        geometry = self.geometry
        # Two shards side by side hold more rows than one has places for, or their texts would lie in one.
        if geometry.row_places > 2 * geometry.rows + geometry.shard_rows:
            raise ValueError(f"{geometry.row_places} places for {geometry.rows} rows: no extraction makes so many")
        if geometry.shard_texts > max(1, *(shard.texts for shard in self.shards)):
            raise ValueError("no shard has as many texts as shards have places for")
        if geometry.text_places >= _PLACES:
            raise ValueError(f"{geometry.text_places} places for texts are more than text ids can name")
        # The texts are shuffled, so that shards hold about as many; a small cache may be uneven.
        if geometry.text_places > 2**24 + 4 * geometry.texts:
            raise ValueError(f"{geometry.text_places} places for {geometry.texts} texts: no extraction makes so many")
        stored = sum(entry.bytes for shard in self.shards for entry in shard.files.values())
        # The logits of a text and, where there is saliency, one number more.
        of_text = max(self.classes or 0, int(self.saliency))
        for what, cells in (("rows", geometry.row_places), ("logits", geometry.texts * of_text)):
            if cells > max(2**25, stored):
                raise ValueError(f"{cells} {what} in {stored} bytes: no extraction packs so many")
        chunks = [4 * geometry.shard_rows, 4 * geometry.shard_texts * of_text]
        chunks += [4 * geometry.chunk_rows * site.width for site in self.sites.values()]
        if max(chunks) > CHUNK_BYTES:
            raise ValueError(f"a chunk of {max(chunks)} bytes is larger than any extraction makes ({CHUNK_BYTES})")


def to_json(value: BaseModel | Mapping[str, Any]) -> bytes:
    """JSON with sorted keys, so that equal values give equal bytes."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return (json.dumps(plain, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sealed_json(value: BaseModel) -> bytes:
    """JSON as of `to_json` of a model with `checksum`, sealed.

    The checksum is the SHA-256 of these very bytes with 64 zeros in its place; it is the first member.
    """
    open_ = to_json(value.model_copy(update={"checksum": UNSEALED}))
    return open_.replace(UNSEALED.encode(), hashlib.sha256(open_).hexdigest().encode(), 1)


def is_sealed(data: bytes) -> bool:
    """Whether the bytes are as `sealed_json` made them, to the last bit."""
    seal = _SEAL.search(data)
    if seal is None:
        return False
    start, end = seal.span(1)
    digest = hashlib.sha256(data[:start])
    digest.update(UNSEALED.encode())
    digest.update(data[end:])
    return digest.hexdigest().encode() == seal[1]


def array_axes(sites: Mapping[str, SiteLayout], columns: Iterable[str], *, predictions: bool) -> dict[str, int]:
    """Names of all arrays of a cache, and the number of axes of each."""
    axes = {f"sites/{name}": 2 for name in sites}
    for name, site in sites.items():
        if site.encoding == "int8":
            axes |= {f"scales/{name}": 1, f"channel_scale/{name}": 1}
    axes |= {f"rows/{column}": 1 for column in columns}
    if predictions:
        axes[LOGITS] = 2
    if f"rows/{next(iter(SALIENCY_COLUMNS))}" in axes:
        axes[CONVERGENCE] = 1
    return axes


def in_shards(array: str) -> bool:
    """Whether an array is cut into shards; a channel scale is one file that all shards share."""
    return not array.startswith("channel_scale/")


def shard_files(arrays: Mapping[str, int], shard: int) -> Iterator[str]:
    """Paths of the files of one shard."""
    return (array_file(name, shard, axes) for name, axes in arrays.items() if in_shards(name))


def group_names(arrays: Iterable[str]) -> list[str]:
    """The Zarr groups that hold the arrays; the empty name is the root."""
    return sorted({"", *(name.split("/")[0] for name in arrays)})


def metadata_file(name: str) -> str:
    """Path of the `zarr.json` of a group or array."""
    return f"{ARRAYS}/{name}/zarr.json" if name else f"{ARRAYS}/zarr.json"


def common_files(arrays: Mapping[str, int], shards: int) -> Iterator[str]:
    """Paths of the files that belong to no shard, but for the manifest."""
    yield from (CARD, TEXTS)
    yield from map(record_file, range(shards))
    yield from map(metadata_file, [*group_names(arrays), *arrays])
    yield from (array_file(name, 0, axes) for name, axes in arrays.items() if not in_shards(name))


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
            with open(path / UNFINISHED, "rb") as note:
                raise CacheIncomplete(unfinished(path, note.read(NOTE_BYTES)))
        what = f"has no {MANIFEST}" if path.is_dir() else "does not exist"
        raise CacheNotFound(f"{path} is not a clvq cache: it {what}; make one with `clvq extract … --out {path}`")
    if file.stat().st_size > MANIFEST_BYTES:
        raise CacheCorrupt(f"{file} has {file.stat().st_size:,} bytes; a manifest has at most {MANIFEST_BYTES:,}")
    data = file.read_bytes()
    return parse_manifest(data, path), hashlib.sha256(data).hexdigest()


def parse_manifest(data: bytes, path: Path | str) -> Manifest:
    """Read a manifest's bytes; `path` is named in errors.

    Raises
    ------
    FormatVersion
        Where another version of the format wrote it.
    CacheCorrupt
        Where it is no manifest.
    """
    file = f"{path}/{MANIFEST}"
    if len(data) > MANIFEST_BYTES:
        raise CacheCorrupt(f"{file} has {len(data):,} bytes; a manifest has at most {MANIFEST_BYTES:,}")
    # A parser makes up to 200 bytes of two: more brackets or commas than any manifest has would cost gigabytes.
    if data.count(b"{") + data.count(b"[") > 1_000 + len(data) // 64 or data.count(b",") > 10**6 + len(data) // 32:
        raise CacheCorrupt(f"{file} is not a manifest: it is nothing but brackets or commas")
    try:
        plain = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise CacheCorrupt(f"{file} is not JSON ({error}); get a whole copy of the cache") from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise CacheCorrupt(f'{file} is not the manifest of a clvq cache: it has no "format": "{FORMAT}"')
    version = plain.get("version")
    if isinstance(version, int) and version != VERSION:
        raise FormatVersion(
            f"{path} is a cache of format version {version}; this clvq reads version {VERSION}: "
            "use the clvq that wrote it, or extract again"
        )
    if not is_sealed(data):
        raise CacheCorrupt(
            f"{file} is damaged: its bytes do not have the checksum that it holds; get a whole copy of it"
            if "checksum" in plain
            else f"{file} holds no checksum of itself: it was made before caches had one, or is damaged; extract again"
        )
    try:
        return Manifest.model_validate(plain)
    except ValidationError as error:
        where, what = _first(error)
        raise CacheCorrupt(f"{file} is damaged at {where!r}: {what}; get a whole copy") from error


def _no_number(name: str) -> None:
    raise ValueError(f"it holds {name}")


def _first(error: ValidationError) -> tuple[str, str]:
    first = error.errors(include_url=False, include_input=False)[0]
    return ".".join(map(str, first["loc"])), first["msg"]


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
