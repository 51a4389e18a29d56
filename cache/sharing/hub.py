"""Caches in data set repositories of the Hugging Face Hub.

A commit is atomic, so what a batch of shards holds appears at once. Reading is bound to one commit.
"""

import errno
import hashlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from ...errors import CacheCorrupt, ClvqError, ConfigError, RemoteDenied, RemoteNotFound, RemoteUnreachable
from ..layout import MANIFEST, UNFINISHED
from .stores import Upload, missing, require_limit, require_size
from .transfer import in_parallel

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
_REVISION = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$")
# The Hub counts commits by the hour and files by the commit.
_FILES_PER_COMMIT = 128
_BYTES_PER_COMMIT = 1 << 30
# Smaller files are held in memory while they travel, so that what was checked is what is sent.
_SMALL = 4 << 20
_TRIES = 20
# Digits of the hash that the Hub lists for large files; small ones have git's.
_SHA256 = 64
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)

Result = TypeVar("Result")


def repository_of(rest: str) -> tuple[str, str | None]:
    """Repository and revision of what follows `hf://`.

    Raises
    ------
    ConfigError
    """
    name, at, revision = rest.partition("@")
    parts = name.split("/")
    if parts[0] in ("models", "spaces") and len(parts) == 3:
        raise ConfigError(f"hf://{rest} is a {parts[0][:-1]}: caches live in data set repositories, hf://user/name")
    if parts[0] == "datasets" and len(parts) == 3:
        parts = parts[1:]
    if len(parts) != 2 or not all(map(_NAME.match, parts)) or (at and not _REVISION.match(revision)):
        raise ConfigError(f"hf://{rest} does not name a data set repository: give hf://user/name or …/name@revision")
    return "/".join(parts), revision or None


class HubStore:
    """A revision of a data set repository. The server and the token are those of `HF_ENDPOINT` and `HF_TOKEN`."""

    def __init__(self, repository: str, revision: str | None) -> None:
        from huggingface_hub import HfApi

        self.name = f"hf://{repository}" + (f"@{revision}" if revision else "")
        self._repository = repository
        self._revision = revision or "main"
        self._token = os.environ.get("HF_TOKEN")
        # False: not even the token that a login left on this machine.
        self._api = HfApi(token=self._token or False, library_name="clvq")
        self._known: tuple[str, dict[str, tuple[int, str]]] | None = None
        self._lock = threading.Lock()

    @property
    def commit(self) -> str:
        """The commit that is read."""
        return self._files()[0]

    def _files(self) -> tuple[str, dict[str, tuple[int, str]]]:
        """The commit that is read, and size and hash of each of its files."""
        with self._lock:
            if self._known is None:
                self._known = self._plainly(self._listed)
            return self._known

    def _listed(self) -> tuple[str, dict[str, tuple[int, str]]]:
        info = self._api.repo_info(self._repository, repo_type="dataset", revision=self._revision)
        commit = str(info.sha)
        tree: Any = self._api.list_repo_tree(self._repository, recursive=True, repo_type="dataset", revision=commit)
        # Folders have neither size nor blob.
        files = {
            entry.path: (entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
            for entry in tree
            if hasattr(entry, "blob_id")
        }
        return commit, files

    def read(self, file: str, *, limit: int) -> bytes | None:
        """See `Store`."""
        if file not in self._files()[1]:
            return None
        require_limit(f"{self.name}/{file}", self._files()[1][file][0], limit)
        with TemporaryDirectory(prefix="clvq-") as folder:
            return self._download(file, Path(folder)).read_bytes()

    def fetch(self, file: str, target: Path, *, size: int) -> None:
        """See `Store`."""
        if file not in self._files()[1]:
            raise missing(self, file)
        require_size(f"{self.name}/{file}", self._files()[1][file][0], size)
        folder = target.with_name(f"{target.name}.hub")
        try:
            os.replace(self._download(file, folder), target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _download(self, file: str, folder: Path) -> Path:
        commit = self.commit

        def download() -> str:
            return self._api.hf_hub_download(
                self._repository, file, repo_type="dataset", revision=commit, local_dir=folder
            )

        return Path(self._plainly(download))

    def compare(self, uploads: Sequence[Upload], *, check: Callable[[], None]) -> dict[str, bool]:
        """See `Store`. The Hub lists the hashes, so nothing is downloaded."""
        listed = self._files()[1]
        return {
            upload.name: listed[upload.name][1] in (_git_hash(upload.read()), upload.entry.sha256)
            for upload in uploads
            if upload.name in listed
        }

    @contextmanager
    def writing(self, *, public: bool) -> Iterator[None]:
        """See `Store`. A repository that is created is private unless `public`; one that is there stays as it is."""
        if not self._token:
            raise RemoteDenied(f"{self.name}: the environment holds no token: set HF_TOKEN to one that may write there")

        def create() -> None:
            self._api.create_repo(self._repository, repo_type="dataset", private=not public, exist_ok=True)
            if self._revision != "main":
                self._api.create_branch(self._repository, branch=self._revision, repo_type="dataset", exist_ok=True)

        self._plainly(create)
        self._known = None
        yield

    def create(self, file: str, data: bytes) -> bool:
        """See `Store`."""
        return self._create(file, data, f"Begin a cache: {file}") is not None

    def _create(self, file: str, data: bytes, message: str, *, instead_of: str | None = None) -> str | None:
        """Commit a file unless it is there, and remove another one; the commit, or `None` where the file is there."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        for _ in range(_TRIES):
            self._known = None
            commit, files = self._files()
            if file in files:
                return None
            operations: list[Any] = [CommitOperationAdd(file, data)]
            if instead_of in files:
                operations.append(CommitOperationDelete(instead_of))
            made = self._commit(operations, message, parent=commit)
            if made is not None:
                return made
        raise RemoteUnreachable(f"{self.name}: others commit there all the time: run the same command again later")

    def _commit(self, operations: list[Any], message: str, *, parent: str | None = None) -> str | None:
        """The commit's id; `None` where somebody else committed since `parent`."""
        from huggingface_hub.errors import HfHubHTTPError

        def commit() -> str | None:
            try:
                info = self._api.create_commit(
                    self._repository,
                    operations,
                    commit_message=message,
                    repo_type="dataset",
                    revision=self._revision,
                    parent_commit=parent,
                )
            except HfHubHTTPError as error:
                if parent is not None and error.response.status_code in (409, 412):
                    return None
                raise
            return str(info.oid)

        made = self._plainly(commit)
        self._known = None
        return made

    def put(
        self,
        units: Sequence[Sequence[Upload]],
        *,
        check: Callable[[], None],
        done: Callable[[Sequence[Upload]], None],
    ) -> None:
        """See `Store`. Several units go into one commit."""

        def commit(batch: list[Sequence[Upload]], stopped: Callable[[], bool]) -> None:
            uploads = [upload for unit in batch for upload in unit]
            self._commit([_operation(upload) for upload in uploads], f"Add {len(uploads)} files of a cache")

        def batch_done(batch: list[Sequence[Upload]]) -> None:
            for unit in batch:
                done(unit)

        in_parallel(commit, list(_batches(units)), check=check, done=batch_done, threads=1)
        # A .gitignore in the repository makes the Hub leave files out without a word.
        listed = self._files()[1]
        for upload in (upload for unit in units for upload in unit):
            size, digest = listed.get(upload.name, (-1, ""))
            if size != upload.entry.bytes or (len(digest) == _SHA256 and digest != upload.entry.sha256):
                raise CacheCorrupt(
                    f"{self.name} does not hold {upload.name} after it was sent: look whether a .gitignore there "
                    "leaves it out, and push again"
                )

    def publish(self, manifest: bytes, *, tag: str) -> None:
        """See `Store`."""
        made = self._create(MANIFEST, manifest, f"Finish the cache {tag}", instead_of=UNFINISHED)
        if made is None:
            self.delete(UNFINISHED)

        def name_it() -> None:
            self._api.create_tag(
                self._repository, tag=tag, revision=made or self.commit, repo_type="dataset", exist_ok=True
            )

        self._plainly(name_it)

    def delete(self, file: str) -> None:
        """See `Store`."""
        from huggingface_hub import CommitOperationDelete

        if file in self._files()[1]:
            self._commit([CommitOperationDelete(file)], f"Remove {file}")

    def _plainly(self, call: Callable[[], Result]) -> Result:
        """Call the Hub's client; its errors become ours, without its text, which may hold signed addresses."""
        try:
            with _QUIET:
                return call()
        except ClvqError:
            raise
        # The client lets the errors of its HTTP library through, which is another one from version to version.
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
                raise
            problem = self._problem(error)
        # Outside of the handler, so that no traceback shows the original.
        raise problem

    def _problem(self, error: Exception) -> ClvqError:
        from huggingface_hub import errors

        # Uploads wrap the server's answer.
        if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        if isinstance(error, errors.OfflineModeIsEnabled):
            return RemoteUnreachable(f"{self.name}: HF_HUB_OFFLINE is set: unset it to reach the Hub")
        if isinstance(error, errors.RevisionNotFoundError):
            return RemoteNotFound(f"{self.name}: the repository has no revision {self._revision!r}: see its branches")
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if status in (401, 403) or isinstance(error, errors.RepositoryNotFoundError):
            with_token = "the token in HF_TOKEN" if self._token else "without a token in HF_TOKEN"
            if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
                return RemoteNotFound(
                    f"{self.name}: there is no such data set repository, or it cannot be seen "
                    f"{'with ' if self._token else ''}{with_token}: correct the URL, or set another token"
                )
            return RemoteDenied(
                f"{self.name}: the Hub denied access {'to ' if self._token else ''}{with_token}: set one that may"
            )
        if status is not None:
            return RemoteUnreachable(f"{self.name}: the Hub failed ({status}): run the same command again later")
        return RemoteUnreachable(
            f"{self.name}: the Hub cannot be reached or broke off ({type(error).__name__}): check the network and "
            "HF_ENDPOINT, and run the same command again"
        )


def _operation(upload: Upload) -> Any:
    from huggingface_hub import CommitOperationAdd

    upload.require_size()
    if upload.entry.bytes <= _SMALL:
        return CommitOperationAdd(upload.name, upload.read())
    operation = CommitOperationAdd(upload.name, upload.source)
    # The hash by which the Hub stores it.
    upload.require(operation.upload_info.sha256.hex())
    return operation


def _batches(units: Sequence[Sequence[Upload]]) -> Iterator[list[Sequence[Upload]]]:
    batch: list[Sequence[Upload]] = []
    files = size = 0
    for unit in units:
        own = sum(upload.entry.bytes for upload in unit)
        if batch and (files + len(unit) > _FILES_PER_COMMIT or size + own > _BYTES_PER_COMMIT):
            yield batch
            batch, files, size = [], 0, 0
        batch.append(unit)
        files += len(unit)
        size += own
    if batch:
        yield batch


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class _Quiet:
    """Keeps the client's progress bars and log lines off the terminal while anything is under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._before: tuple[bool, int] = (True, 0)

    def __enter__(self) -> None:
        from huggingface_hub.utils.logging import get_verbosity, set_verbosity
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars

        with self._lock:
            if self._depth == 0:
                self._before = are_progress_bars_disabled(), get_verbosity()
                if not self._before[0]:
                    disable_progress_bars()
                set_verbosity(logging.ERROR)
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        from huggingface_hub.utils.logging import set_verbosity
        from huggingface_hub.utils.tqdm import enable_progress_bars

        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                if not self._before[0]:
                    enable_progress_bars()
                set_verbosity(self._before[1])


_QUIET = _Quiet()
