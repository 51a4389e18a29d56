"""The folder of a site: what stands in it, who may replace it, and how it is read.

```
my-site/
  index.html …     pages; the page's scripts and style
  vendor/          libraries that they use
  data/            what they show; see `data_files`
  site.json        what the site was made from; the pages never read it
```

`site.json` is written first, and again when everything else is there: an unfinished site never claims to be whole.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import Field, JsonValue, ValidationError

from ..cache.files import make_folder, write_file
from ..cache.frozen import Frozen
from ..cache.layout import differences, to_json
from ..errors import ConfigError, DataError, DataNotFound, FormatVersion, ResumeMismatch
from .data_files import DATA, rounded, script

SITE, INDEX = "site.json", "index.html"
FORMAT: Final = "clvq-explorer"
VERSION: Final = 1
ASSETS = Path(__file__).parent / "assets"
# What a builder writes below `data`, and a later one may delete.
_OURS = re.compile(r"(site|flow|r\d{1,4}/overview|r\d{1,4}/concepts/\d{2,9}|texts/(list|\d{3,9}))\.js")

AssetName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$", max_length=200)
]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class SiteFile(Frozen):
    """`site.json`."""

    format: Literal["clvq-explorer"] = FORMAT
    version: Literal[1] = VERSION
    settings: dict[str, JsonValue]
    assets: dict[AssetName, Sha256]
    """Files of the pages."""
    texts: tuple[int, ...] | None = None
    """`text_id` of each text that can be opened; `None` while the site is unfinished."""


@dataclass(frozen=True)
class Site:
    """A finished site."""

    path: Path
    settings: dict[str, JsonValue]
    assets: Mapping[str, str]
    text_ids: tuple[int, ...]

    @classmethod
    def read(cls, path: Path) -> "Site":
        """The site in a folder.

        Raises
        ------
        DataNotFound
            Where there is none, or an unfinished one.
        DataError, FormatVersion
        """
        found = _read(path)
        if found is None:
            raise DataNotFound(f"{path} is no site: it has no {SITE}; make one with `clvq explore … --out {path}`")
        if found.texts is None:
            raise DataNotFound(f"{path} is unfinished: run the `clvq explore` command that began it again")
        return cls(path, found.settings, found.assets, found.texts)

    def files(self) -> list[str]:
        """Paths inside the folder of all that a browser may load."""
        data = [f"{DATA}/{name}" for name in _own_data(self.path)]
        return sorted(self.assets.keys() & set(_below(self.path))) + data


class Writer:
    """Writes a site's files."""

    def __init__(self, out: Path, file: SiteFile) -> None:
        self._out, self._file = out, file

    def write(self, name: str, value: Any) -> None:
        """One script of data."""
        file = self._out / DATA / f"{name}.js"
        make_folder(file.parent)
        write_file(file, script(name, rounded(value)))

    def finish(self, text_ids: list[int]) -> None:
        """Everything is there."""
        write_file(self._out / SITE, to_json(self._file.model_copy(update={"texts": tuple(text_ids)})))


def take_over(out: Path, settings: dict[str, Any], *, force: bool) -> Writer | None:
    """Make `out` the folder of the site; `None` where the same one stands there. The pages are in it afterwards.

    Files that no builder wrote are left alone.

    Raises
    ------
    ConfigError
        Where the folder holds something else.
    ResumeMismatch
        Where it holds a site of other settings.
    """
    wanted = SiteFile(settings=settings, assets=_assets())
    try:
        found = _read(out)
    except (DataError, FormatVersion):
        if not force:
            raise
        found = SiteFile(settings={}, assets={})
    if found is None:
        strange = sorted(entry.name for entry in out.iterdir() if not entry.name.endswith(".aside"))
        if strange:
            raise ConfigError(
                f"{out} is not empty and is no site of `clvq explore` (it holds {strange[0]!r}): give another --out"
            )
    same = found is not None and found.settings == wanted.settings
    if found is not None and not same and not force:
        lines = differences(found.settings, wanted.settings)
        raise ResumeMismatch(
            f"{out} holds a site with other settings ({'; '.join(lines[:6])}): give another --out, or --force"
        )
    whole = found is not None and same and found.texts is not None
    if not whole:
        # From here on the folder claims to be unfinished, whatever it holds.
        write_file(out / SITE, to_json(wanted))
        for name in _own_data(out):
            (out / DATA / name).unlink()
    if not whole or found is None or found.assets != wanted.assets:
        for name in set() if found is None else found.assets.keys() - wanted.assets.keys():
            (out / name).unlink(missing_ok=True)
        for name in wanted.assets:
            make_folder((out / name).parent)
            write_file(out / name, (ASSETS / name).read_bytes())
    if not whole:
        return Writer(out, wanted)
    if found is not None and found.assets != wanted.assets:
        write_file(out / SITE, to_json(wanted.model_copy(update={"texts": found.texts})))
    return None


def _read(path: Path) -> SiteFile | None:
    file = path / SITE
    try:
        plain = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file} is not JSON ({error}): give another --out, or --force to build the site again"
        ) from error
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise ConfigError(f"{file} is not that of a site of `clvq explore`: it lacks the format {FORMAT!r}")
    if plain.get("version") != VERSION:
        raise FormatVersion(f"{file} has version {plain.get('version')!r}, and this clvq reads {VERSION}")
    try:
        return SiteFile.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"{file} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}; give another --out, or --force"
        ) from error


def _assets() -> dict[str, str]:
    """Path inside the site → SHA-256 of each file of the pages."""
    names = sorted(_below(ASSETS))
    return {name: hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() for name in names}


def _own_data(out: Path) -> list[str]:
    """Paths below `data` of the files that builders write."""
    return sorted(name for name in _below(out / DATA) if _OURS.fullmatch(name))


def _below(folder: Path) -> Iterator[str]:
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            yield str(PurePosixPath(file.relative_to(folder)))
