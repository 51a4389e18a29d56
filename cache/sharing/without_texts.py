"""A cache for sharing from which the texts were left out.

Row columns from which words could be put together are left out as well, and hashes of texts are keyed with a secret
that stays here: equal texts still have equal hashes, so that they can be kept on one side of a split, but nobody can
try texts out. Vectors are not touched; they can be partly turned back into text.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...errors import CacheCorrupt, ConfigError
from ..card import card
from ..files import disk_full_names, fsync_folder, make_folder
from ..layout import (
    CARD,
    SALT,
    TEXTS,
    TEXTUAL_COLUMNS,
    FileEntry,
    Manifest,
    ShardEntry,
    ShardRecord,
    array_axes,
    common_files,
    record_file,
    sealed_json,
    shard_files,
)
from ..reader import Cache
from ..texts_file import texts_parquet

# Columns of texts.parquet that say nothing of a text but how long it is, what it is labelled and where it came from.
_KEPT = (
    "text_id", "source_row", "split", "text_sha256", "label", "prediction", "truncated_tokens", "first_row",
    "row_count",
)  # fmt: skip
_SALT_BYTES = 32
_DIGEST = re.compile(r"^[0-9a-f]{64}$")


def derive(cache: Cache, folder: Path) -> tuple[bytes, dict[str, Path]]:
    """Make the small files of a cache without texts in `folder`.

    Returns
    -------
    The manifest's bytes, and where each of the files that it lists lies: there, or in the cache itself.
    """
    salt = _salt(cache.path)
    manifest = cache.manifest
    columns = tuple(name for name in manifest.columns if name not in TEXTUAL_COLUMNS)
    arrays = array_axes(manifest.sites, columns, predictions=manifest.predictions)
    shards = manifest.geometry.shards
    made: dict[str, FileEntry] = {}

    def put(name: str, data: bytes) -> None:
        make_folder((folder / name).parent)
        (folder / name).write_bytes(data)
        made[name] = FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    with disk_full_names(folder):
        entries = []
        for number, entry in enumerate(manifest.shards):
            name = record_file(number)
            data = (cache.path / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != manifest.files[name].sha256:
                raise CacheCorrupt(f"{cache.path / name} has other bytes than were written: run `clvq cache repair`")
            files = {file: entry.files[file] for file in shard_files(arrays, number)}
            entries.append(ShardEntry(rows=entry.rows, texts=entry.texts, files=files))
            put(name, sealed_json(ShardRecord.model_validate_json(data).model_copy(update={"files": files})))
        put(TEXTS, texts_parquet(_without(cache.texts, salt)))
        derived = manifest.model_copy(
            update={
                # The id of the original is a hash of its texts: who can guess all of a few texts could test the guess.
                "parent": None,
                "identity": dict(manifest.identity) | {"data": _keyed(manifest.identity.get("data"), salt)},
                "columns": columns,
                "shards": entries,
            }
        )
        put(CARD, card(derived))
    listed = {name: made.get(name) or manifest.files[name] for name in common_files(arrays, shards)}
    derived = Manifest.model_validate(derived.model_copy(update={"files": listed}).model_dump())
    where = {name: folder / name if name in made else cache.path / name for name in derived.entries}
    return sealed_json(derived), where


def _without(texts: pa.Table, salt: bytes) -> pa.Table:
    kept = texts.select([name for name in _KEPT if name in texts.column_names])
    if "text_sha256" not in kept.column_names:
        return kept
    keyed = [_hmac(value, salt) for value in kept["text_sha256"].to_pylist()]
    return kept.set_column(kept.schema.get_field_index("text_sha256"), "text_sha256", pa.array(keyed, pa.string()))


# JSON in, JSON out; pydantic's recursive type for it cannot be checked at run time.
def _keyed(value: Any, salt: bytes) -> Any:
    """What an identity says of the data, with every hash keyed: a file of few texts could be guessed from its own."""
    if isinstance(value, Mapping):
        return {name: _keyed(inner, salt) for name, inner in value.items()}
    return _hmac(value, salt) if isinstance(value, str) and _DIGEST.match(value) else value


def _hmac(value: str, salt: bytes) -> str:
    return hmac.digest(salt, value.encode(), "sha256").hex()


def _salt(path: Path) -> bytes:
    """The cache's secret, made at the first need, so that a push that is repeated gives the same bytes."""
    file = path / SALT
    try:
        if not file.is_file():
            aside = path / f".{SALT}.{os.getpid()}.aside"
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with open(descriptor, "wb") as sink:
                sink.write(secrets.token_bytes(_SALT_BYTES))
                sink.flush()
                os.fsync(sink.fileno())
            try:
                os.link(aside, file)
            except FileExistsError:
                # Another push made it in the meantime: that one counts.
                pass
            finally:
                aside.unlink()
            fsync_folder(path)
        salt = file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be written ({error.strerror}): sharing without texts keeps a secret there; "
            "make the folder writable, or copy the cache to one that is"
        ) from error
    if len(salt) != _SALT_BYTES:
        raise CacheCorrupt(f"{file} has {len(salt)} bytes instead of {_SALT_BYTES}: delete it to have a new one made")
    return salt
