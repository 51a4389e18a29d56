"""Every error that a user can cause, in one tree.

ClvqError
├── ConfigError (ValueError)            settings that cannot work together
├── ModelNotFound (FileNotFoundError)   no such model, here or on the Hub
├── ModelError (ValueError)             a model or tokenizer that cannot be used this way
├── DataNotFound (FileNotFoundError)    no such data set, split or file
├── DataError (ValueError)              data that cannot be read or lacks what was asked for
├── CacheNotFound (FileNotFoundError)   the folder is not a cache
├── CacheIncomplete (ValueError)        the extraction has not finished
├── CacheCorrupt (ValueError)           bytes differ from what was recorded
├── FormatVersion (ValueError)          written by another version of the format
├── ResumeMismatch (ValueError)         the folder holds work with other settings
├── RepairMismatch (ValueError)         a file that cannot be made again as it was
├── FolderInUse (BlockingIOError)       another process is writing there
├── DiskFull (OSError)                  not enough room
├── RemoteNotFound (FileNotFoundError)  no such bucket, repository or revision
├── RemoteDenied (PermissionError)      no credentials, or not enough of them
├── RemoteUnreachable (ConnectionError) a server that cannot be reached or fails
├── RemoteUnsafe (ValueError)           a server on which two writers could overwrite each other
├── RunNotFound (FileNotFoundError)     the folder is not a finished run
├── RunMismatch (ValueError)            the run belongs to another cache
├── RanksDiffer (RuntimeError)          processes that train together have drifted apart
├── MissingExtra (ImportError)          an optional package is not installed
└── Interrupted                         Ctrl-C or SIGTERM, after everything was saved

Each error also inherits the built-in that callers would expect, so that their `except` clauses work. A message
names the thing, what was found, what was expected and what to do.
"""


class ClvqError(Exception):
    """Base of all errors raised on purpose; the command line prints its message as one line."""

    def __str__(self) -> str:
        # OSError's own __str__ shows the message only when it was given as errno and strerror.
        return str(self.args[0]) if self.args else ""


class ConfigError(ClvqError, ValueError):
    """Settings that cannot work, alone or together."""


class ModelNotFound(ClvqError, FileNotFoundError):
    """No model folder and no Hub model of that name."""


class ModelError(ClvqError, ValueError):
    """A model or tokenizer that cannot be used in the way that was asked."""


class DataNotFound(ClvqError, FileNotFoundError):
    """No such data set, file or split."""


class DataError(ClvqError, ValueError):
    """Data that cannot be read, or that lacks a field that was asked for."""


class CacheNotFound(ClvqError, FileNotFoundError):
    """The folder does not exist or is not a cache."""


class CacheIncomplete(ClvqError, ValueError):
    """The folder holds an extraction that has not finished."""


class CacheCorrupt(ClvqError, ValueError):
    """Bytes on disk differ from what was recorded when they were written."""


class FormatVersion(ClvqError, ValueError):
    """The cache or run was written in a version of the format that this version does not read."""


class ResumeMismatch(ClvqError, ValueError):
    """The folder holds work that was begun with other settings."""


class RepairMismatch(ClvqError, ValueError):
    """A damaged file comes out with other bytes when it is made again."""


class FolderInUse(ClvqError, BlockingIOError):
    """Another process is writing to the folder."""


class DiskFull(ClvqError, OSError):
    """The disk has not enough room."""


class RemoteNotFound(ClvqError, FileNotFoundError):
    """The server has no such bucket, repository or revision."""


class RemoteDenied(ClvqError, PermissionError):
    """The server refuses: there are no credentials, or they do not allow it."""


class RemoteUnreachable(ClvqError, ConnectionError):
    """The server cannot be reached, or fails."""


class RemoteUnsafe(ClvqError, ValueError):
    """The server ignores conditions on writing, so that two writers could overwrite each other."""


class RunNotFound(ClvqError, FileNotFoundError):
    """The folder does not exist or is not a finished run."""


class RunMismatch(ClvqError, ValueError):
    """The run was trained on another cache than the one given."""


class RanksDiffer(ClvqError, RuntimeError):
    """Processes that train one model together no longer hold the same one."""


class MissingExtra(ClvqError, ImportError):
    """An optional package is needed; the message names the extra to install."""


class Interrupted(ClvqError):
    """The user or the system asked to stop; everything that was finished is saved.

    Attributes
    ----------
    signal_number : int
        The signal received; the command line exits with 128 plus this number.
    """

    def __init__(self, message: str, *, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
