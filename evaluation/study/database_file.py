"""The file that holds the answers: how it is made, checked, opened and read."""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from ...cache.files import free_bytes, fsync_folder
from ...errors import ConfigError, DataError, DataNotFound, DiskFull, FolderInUse, FormatVersion
from .answers import Answer

VERSION = 1
_APPLICATION = 0x636C7671
_BUSY_MILLISECONDS = 10_000
_TABLES = """
CREATE TABLE study (digest TEXT NOT NULL);
CREATE TABLE annotators (
    number INTEGER PRIMARY KEY,
    token TEXT NOT NULL UNIQUE,
    consented_at TEXT,
    active_at TEXT,
    planned_at TEXT,
    planned_for TEXT NOT NULL DEFAULT ''
);
CREATE TABLE questions (
    annotator INTEGER NOT NULL REFERENCES annotators (number),
    place INTEGER NOT NULL,
    item TEXT NOT NULL,
    method TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('main', 'training', 'attention')),
    dealt_at TEXT,
    answered_at TEXT,
    answer INTEGER,
    confidence INTEGER CHECK (confidence BETWEEN 1 AND 4),
    milliseconds INTEGER CHECK (milliseconds >= 0),
    PRIMARY KEY (annotator, place),
    UNIQUE (annotator, item),
    CHECK ((answered_at IS NULL) = (answer IS NULL)),
    CHECK (answered_at IS NULL OR dealt_at IS NOT NULL)
) WITHOUT ROWID;
"""
_OF_THE_ANSWER = "CAST(annotator AS TEXT), place, item, method, kind, answer, confidence, milliseconds, answered_at"


def open_database(path: Path, digest: str) -> sqlite3.Connection:
    """Open the file for writing; it is made where it is missing, for its owner's eyes only.

    Raises
    ------
    DataError
        It is damaged, or belongs to another study.
    FormatVersion, ConfigError, FolderInUse, DiskFull
    """
    with errors_of(path):
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            fsync_folder(path.parent)
        connection = _connect(path)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            # An empty file is what is left where making it was cut short.
            if not connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
                _make_tables(connection, digest)
            _check(connection, path)
            (found,) = connection.execute("SELECT digest FROM study").fetchone()
            if found != digest:
                raise DataError(
                    f"{path} holds answers to the study {found[:12]}…, and this one is {digest[:12]}…: they do not "
                    "belong together; put the folder's own file back, or build the study in a new folder"
                )
        except BaseException:
            connection.close()
            raise
    return connection


def read_answers(path: Path) -> list[Answer]:
    """All answers so far, by annotator and place; also while the study is served.

    Raises
    ------
    DataNotFound, DataError, FormatVersion
    """
    if not path.exists():
        raise DataNotFound(f"{path} is not there: nothing was answered yet; serve the study with `clvq study serve`")
    with errors_of(path), closing(_connect(path)) as connection:
        connection.execute("PRAGMA query_only = ON")
        _check(connection, path)
        found = connection.execute(
            f"SELECT {_OF_THE_ANSWER} FROM questions WHERE answered_at IS NOT NULL ORDER BY annotator, place"
        )
        return [Answer(*row) for row in found]


def count_answers(path: Path) -> int:
    """How many answers the file holds."""
    # Empty where making it was cut short.
    return len(read_answers(path)) if path.stat().st_size else 0


def remove_database(path: Path) -> None:
    """Remove the file and what SQLite keeps beside it."""
    for suffix in ("-wal", "-shm", ""):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, check_same_thread=False
    )
    connection.execute(f"PRAGMA busy_timeout = {_BUSY_MILLISECONDS}")
    return connection


def _make_tables(connection: sqlite3.Connection, digest: str) -> None:
    connection.execute("BEGIN IMMEDIATE")
    for statement in _TABLES.split(";"):
        connection.execute(statement)
    connection.execute("INSERT INTO study VALUES (?)", (digest,))
    connection.execute(f"PRAGMA application_id = {_APPLICATION}")
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def _check(connection: sqlite3.Connection, path: Path) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != _APPLICATION:
        raise DataError(f"{path} is a database, but none with a study's answers: put the study's own file there")
    if version != VERSION:
        raise FormatVersion(f"{path} has version {version}, and this clvq reads {VERSION}")
    (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if state != "ok":
        raise _damaged(path, state)


def _damaged(path: Path, what: object) -> DataError:
    said = " ".join(str(what).split())
    return DataError(
        f"{path} is damaged ({said}): copy it and the files beside it to a safe place before anything else; then put a "
        "backup there, or save what can be read with `sqlite3 answers.sqlite .recover`"
    )


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Turn what SQLite and the system report into errors that say what to do."""
    try:
        yield
    except sqlite3.Error as error:
        # The low byte is the kind; the rest says where it came up.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise DiskFull(
                f"no room left on the disk while writing {path}: {free_bytes(path.parent):,} bytes are free; every "
                "answer acknowledged before is kept; free some room"
            ) from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise FolderInUse(f"{path} is locked by another process: end it, and try again") from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
            raise _damaged(path, error) from error
        if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_IOERR):
            raise ConfigError(
                f"{path} cannot be read or written ({error}): the folder must be writable and on a disk of this machine"
            ) from error
        raise
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ConfigError(f"{path} cannot be written ({error.strerror}): give a folder that can be") from error
        raise
