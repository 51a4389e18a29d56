"""What `unfinished.json` says while a push or a pull is under way, in a folder or in a store.

An extraction writes the same name with its own contents; see `writer.Extraction`.
"""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["push", "pull"]

# More is nobody's note.
NOTE_BYTES = 1 << 20
_ID = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True)
class Transfer:
    """A push into the place where the note stands, or a pull into it."""

    kind: Kind
    cache_id: str
    source: str | None = None
    """From where a pull comes."""

    def note(self) -> bytes:
        """The contents of `unfinished.json`; equal transfers have equal notes."""
        plain = {"format": "clvq-cache", "version": 1, self.kind: {"cache": self.cache_id, "from": self.source}}
        return (json.dumps(plain, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def of(cls, note: bytes) -> "Transfer | None":
        """What a note says; `None` where it is no note of a transfer."""
        plain: Any = None
        with suppress(ValueError, RecursionError):
            plain = json.loads(note[:NOTE_BYTES])
        kinds: tuple[Kind, ...] = ("push", "pull")
        for kind in kinds:
            inner = plain.get(kind) if isinstance(plain, dict) else None
            if not isinstance(inner, dict):
                continue
            cache_id, source = inner.get("cache"), inner.get("from")
            if isinstance(cache_id, str) and _ID.match(cache_id) and (source is None or isinstance(source, str)):
                return cls(kind, cache_id, source)
        return None


def unfinished(place: object, note: bytes) -> str:
    """What to tell somebody who wants to read a place where work is unfinished."""
    transfer = Transfer.of(note)
    if transfer is None:
        return f"{place} is an unfinished extraction; run the `clvq extract` command that began it again to finish it"
    if transfer.kind == "push":
        return (
            f"{place} holds an unfinished push of the cache {transfer.cache_id[:12]}; run the `clvq cache push` "
            "command that began it again to finish it"
        )
    return (
        f"{place} holds an unfinished pull of the cache {transfer.cache_id[:12]}; run `clvq cache pull "
        f"{transfer.source} {place}` again to finish it"
    )
