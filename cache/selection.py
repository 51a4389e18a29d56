"""What a partial copy of a cache holds: some sites, some splits, or the manifest alone."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import CacheCorrupt, ConfigError
from .layout import ARRAYS, RECORDS, SELECTION, FileEntry, Manifest, Sha256

_BYTES = 1 << 20
# Groups of arrays that belong to a site.
_OF_SITES = ("sites", "scales", "channel_scale")


class Selection(BaseModel):
    """`selection.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cache: Sha256
    """Id of the cache that this is a part of."""
    source: str
    """Where it was pulled from, and where the rest is."""
    sites: tuple[str, ...]
    splits: tuple[str, ...]
    """None at all where only the manifest was pulled."""
    shards: tuple[Annotated[int, Field(ge=0)], ...]
    """Shards that hold a text of the splits, ascending."""

    @property
    def manifest_only(self) -> bool:
        """Whether there is nothing to read."""
        return not self.splits

    def require(self, path: Path, *, sites: Iterable[str] = (), splits: Iterable[str] = ()) -> None:
        """Make sure that the copy at `path` was asked to hold these sites and splits.

        Raises
        ------
        ConfigError
            Naming the first that it was not, and how to get it.
        """
        for what, option, wanted, held in (
            ("site", "--sites", sites, self.sites),
            ("split", "--split", splits, self.splits),
        ):
            for name in wanted:
                if self.manifest_only or name not in held:
                    lacks = "holds the manifest alone, no" if self.manifest_only else "is a partial copy without the"
                    raise ConfigError(
                        f"{path} {lacks} {what} {name!r}: pull it with `clvq cache pull {self.source} {path} "
                        f"{option} {name}`"
                    )

    def require_file(self, path: Path, name: str) -> None:
        """Make sure that the copy at `path` was asked to hold a file.

        Raises
        ------
        ConfigError
        """
        site = _of_site(name)
        if site is not None:
            self.require(path, sites=[site])
        elif self.manifest_only:
            raise ConfigError(
                f"{path} holds the manifest alone, no texts or vectors: pull them with `clvq cache pull {self.source} "
                f"{path}`"
            )


def read_selection(path: Path, cache_id: str) -> Selection | None:
    """The selection of a partial copy; `None` for a whole one.

    Raises
    ------
    CacheCorrupt
        Where it is damaged or belongs to another cache.
    """
    file = path / SELECTION
    if not file.is_file():
        return None
    advice = "remove it and pull again, or get a whole copy"
    try:
        if file.stat().st_size > _BYTES:
            raise CacheCorrupt(f"{file} has {file.stat().st_size:,} bytes: it is no selection; {advice}")
        found = Selection.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise CacheCorrupt(f"{file} is damaged: {error.error_count()} things are wrong in it; {advice}") from error
    if found.cache != cache_id:
        raise CacheCorrupt(f"{file} belongs to the cache {found.cache[:12]}, not to {cache_id[:12]}; {advice}")
    return found


def expected_files(manifest: Manifest, selection: Selection | None) -> tuple[dict[str, FileEntry], set[str]]:
    """The files that a copy should hold, and those that it was not asked to hold.

    Of a site that is left out, its `zarr.json` is left out too, so that no other library takes it for one of zeros.

    Raises
    ------
    CacheCorrupt
        Where the selection names what the cache does not have.
    """
    everything = manifest.entries
    if selection is None:
        return everything, set()
    shards = set(selection.shards)
    if not (
        set(selection.sites) <= manifest.sites.keys()
        and set(selection.splits) <= manifest.splits.keys()
        and max(shards, default=0) < manifest.geometry.shards
    ):
        raise CacheCorrupt(
            f"{SELECTION} names sites, splits or shards that the cache does not have: remove it and pull again"
        )
    if selection.manifest_only:
        return {}, set(everything)
    chosen = {
        name: entry for name, entry in manifest.files.items() if _of_record(name) is None or _of_record(name) in shards
    }
    for number in shards:
        chosen |= manifest.shards[number].files
    chosen = {name: entry for name, entry in chosen.items() if _of_site(name) in (None, *selection.sites)}
    return chosen, everything.keys() - chosen.keys()


def _of_site(name: str) -> str | None:
    """The site that a file belongs to."""
    parts = name.split("/")
    # The groups themselves have a zarr.json directly below them.
    return parts[2] if parts[0] == ARRAYS and len(parts) > 3 and parts[1] in _OF_SITES else None


def _of_record(name: str) -> int | None:
    """The shard whose record a file is."""
    folder, _, file = name.partition("/")
    return int(file.removesuffix(".json")) if folder == RECORDS else None


def named_sites(manifest: Manifest, names: Sequence[str], place: object) -> tuple[str, ...]:
    """Full names, in the manifest's order, of sites given as `8` or `hidden.8`.

    Raises
    ------
    ConfigError
        Where the cache does not hold one.
    """
    wanted = {f"hidden.{name}" if name.isdigit() else name for name in names}
    return _known("site", wanted, manifest.sites, place)


def named_splits(manifest: Manifest, names: Sequence[str], place: object) -> tuple[str, ...]:
    """Splits in the manifest's order; `ConfigError` where the cache does not hold one."""
    return _known("split", set(names), manifest.splits, place)


def _known(what: str, wanted: set[str], held: Iterable[str], place: object) -> tuple[str, ...]:
    held = list(held)
    for name in sorted(wanted):
        if name not in held:
            raise ConfigError(f"{place} holds no {what} {name!r}; it holds {', '.join(held)}")
    return tuple(name for name in held if name in wanted)
