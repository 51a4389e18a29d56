"""Caches in S3-compatible storage.

Files are written with single requests, each of which is visible as a whole or not at all; so nothing half written is
left behind by a kill, and no unfinished multipart upload goes on costing money.
"""

import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from ...errors import (
    ClvqError,
    ConfigError,
    MissingExtra,
    RemoteDenied,
    RemoteNotFound,
    RemoteUnreachable,
    RemoteUnsafe,
)
from .stores import PlainStore, missing, require_limit, require_size

if TYPE_CHECKING:
    from obstore import GetResult

_BUCKET = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]$")
_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,64})</Code>")
_STATUS = re.compile(r"status code: (\d{3})\b")
_BLOCK = 8 << 20
# Any one of them says how to sign requests, or not to.
_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_METADATA_ENDPOINT",
    "AWS_SKIP_SIGNATURE",
)
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")

Result = TypeVar("Result")


class S3Store(PlainStore):
    """A prefix in a bucket. The server, the region and the credentials are those of the `AWS_…` variables.

    Raises
    ------
    ConfigError
        Where the bucket's name cannot be one.
    RemoteDenied
        Where the environment holds no credentials.
    MissingExtra
    """

    def __init__(self, bucket: str, prefix: str) -> None:
        super().__init__(f"s3://{bucket}/{prefix}".rstrip("/"))
        if not _BUCKET.match(bucket):
            raise ConfigError(f"{self.name}: {bucket!r} cannot be the name of a bucket: give s3://bucket/prefix")
        try:
            from obstore.store import S3Store as Obstore
        except ImportError as error:
            raise MissingExtra(f"{self.name} needs the package obstore: pip install 'clvq[s3]'") from error
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        # Without them, obstore would look for a cloud machine's own credentials on the network.
        if not any(os.environ.get(name) for name in _CREDENTIALS):
            raise RemoteDenied(
                f"{self.name}: the environment holds no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or AWS_SKIP_SIGNATURE=true to read a public bucket"
            )
        endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")
        self._server = _shown(endpoint)
        self._store = self._plainly(
            lambda: Obstore(
                bucket,
                # A slow connection may take long over a file, but not long over nothing.
                client_options={
                    "allow_http": endpoint.startswith("http://"),
                    "connect_timeout": "10s",
                    "timeout": "6h",
                    "read_timeout": "120s",
                },
                retry_config={"max_retries": 5},
                # Not every server deletes in bulk, and one object at a time is deleted here.
                disable_bulk_delete=True,
            )
        )

    def read(self, file: str, *, limit: int) -> bytes | None:
        """See `Store`."""
        return self._plainly(lambda: self._read(file, limit))

    def _read(self, file: str, limit: int) -> bytes | None:
        found = self._get(file)
        if found is None:
            return None
        require_limit(f"{self.name}/{file}", found.meta["size"], limit)
        data = b""
        for block in found.stream(min_chunk_size=_BLOCK):
            data += bytes(block)
            require_limit(f"{self.name}/{file}", len(data), limit)
        return data

    def fetch(self, file: str, target: Path, *, size: int) -> None:
        """See `Store`."""
        self._plainly(lambda: self._fetch(file, target, size))

    def _fetch(self, file: str, target: Path, size: int) -> None:
        found = self._get(file)
        if found is None:
            raise missing(self, file)
        require_size(f"{self.name}/{file}", found.meta["size"], size)
        written = 0
        with open(target, "wb") as sink:
            for block in found.stream(min_chunk_size=_BLOCK):
                written += sink.write(block)
                require_limit(f"{self.name}/{file}", written, size)
        require_size(f"{self.name}/{file}", written, size)

    def _get(self, file: str) -> "GetResult | None":
        import obstore

        try:
            return obstore.get(self._store, self._prefix + file)
        except FileNotFoundError as error:
            # A bucket that is not there answers in the same way as a file that is not.
            if "NoSuchBucket" in str(error):
                raise
            return None

    def write(self, file: str, data: bytes) -> None:
        """See `PlainStore`."""
        import obstore

        self._plainly(lambda: obstore.put(self._store, self._prefix + file, data, use_multipart=False))

    def create(self, file: str, data: bytes) -> bool:
        """See `Store`."""
        return self._plainly(lambda: self._create(file, data))

    def _create(self, file: str, data: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        try:
            obstore.put(self._store, self._prefix + file, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        return True

    def delete(self, file: str) -> None:
        """See `Store`."""
        self._plainly(lambda: self._delete(file))

    def _delete(self, file: str) -> None:
        import obstore

        try:
            obstore.delete(self._store, self._prefix + file)
        except FileNotFoundError:
            return

    @contextmanager
    def writing(self, *, public: bool) -> Iterator[None]:
        """See `Store`. Who may read is the bucket's business, so `public` changes nothing."""
        # Nothing is known of the bucket yet; a server may create one on the first write.
        probe, mine, other = f"clvq-probe-{secrets.token_hex(8)}", secrets.token_bytes(16), secrets.token_bytes(16)
        self.read(probe, limit=len(mine))
        try:
            self.create(probe, mine)
            safe = not self.create(probe, other) and self.read(probe, limit=len(mine)) == mine
        finally:
            self.delete(probe)
        if not safe:
            raise RemoteUnsafe(
                f"{self.name}: {self._server} ignores conditional writes (If-None-Match), so that two who push at once "
                "would overwrite each other: push to a server that heeds them, or to a folder"
            )
        yield

    def _plainly(self, call: Callable[[], Result]) -> Result:
        """Call obstore; its errors become ours, which repeat none of its text: servers put keys into what they say."""
        from obstore.exceptions import BaseError

        try:
            return call()
        except ClvqError:
            raise
        except (BaseError, FileNotFoundError, ValueError) as error:
            problem = self._problem(error)
        # Outside of the handler, so that no traceback shows the original.
        raise problem

    def _problem(self, error: Exception) -> ClvqError:
        text = str(error)
        code, status = _CODE.search(text), _STATUS.search(text)
        said = code[1] if code else status[1] if status else ""
        if said == "NoSuchBucket":
            return RemoteNotFound(
                f"{self.name}: {self._server} has no bucket {self._bucket!r}: create it, or correct the URL"
            )
        if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
            return RemoteDenied(
                f"{self.name}: {self._server} denied access ({said}): check AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, AWS_REGION, and what this key may do (list, get, put and delete)"
            )
        if said:
            return RemoteUnreachable(f"{self.name}: {self._server} failed ({said}): run the same command again later")
        return RemoteUnreachable(
            f"{self.name}: {self._server} cannot be reached: check AWS_ENDPOINT_URL, AWS_REGION and the network"
        )


def _shown(endpoint: str) -> str:
    """The server's address without what may be secret."""
    if not endpoint:
        return "Amazon S3"
    parts = urlsplit(endpoint)
    try:
        return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
    except ValueError:
        return "the server of AWS_ENDPOINT_URL"
