"""Make a study's folder from an item file."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...cache.files import make_folder, only_writer, write_file
from ...cache.layout import to_json
from ...errors import ConfigError, DataError, ResumeMismatch
from .database_file import count_answers, remove_database
from .deal import add_to, booklets, make_pool
from .folder import ANSWERS, DATA, INDEX, ITEMS, PAGES, SCRIPTS, STUDY, STYLE, Asked, StudyFile
from .items import read_items
from .pages import script, static_data
from .settings import StudySettings

ASSETS = Path(__file__).parent / "assets"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildResult:
    """What a study asks."""

    path: Path
    main: int
    """Main items."""
    training: int
    attention: int
    methods: int
    questions: int
    """Per person, of all kinds."""
    annotators: int
    """Planned."""
    fewest: int
    """Answers that the cell (item, method) with the fewest gets, where everyone planned answers everything."""
    most: int
    unchanged: bool
    """Whether the same study stood there before."""


def build(items_path: Path, out: Path, settings: StudySettings, *, force: bool = False) -> BuildResult:
    """Make the folder of a study: pages, and what its server needs.

    Where the same study stands there already, it and its answers are left as they are.

    Parameters
    ----------
    force
        Replace another study in `out`, unless something was answered there.

    Raises
    ------
    DataNotFound, DataError, FormatVersion
        The item file cannot be read.
    ConfigError
        More questions per person than items, or `out` holds something else.
    ResumeMismatch
        `out` holds another study.
    FolderInUse, DiskFull
    """
    items, items_digest = read_items(items_path)
    pool = make_pool(items, settings)
    dealt = booklets(pool, settings.annotators)
    file = StudyFile(
        items_sha256=items_digest,
        settings=settings,
        booklets=tuple(
            tuple(Asked(item=one.item, method=one.method, kind=one.kind) for one in questions) for questions in dealt
        ),
    )
    data = to_json(file)
    digest = hashlib.sha256(data).hexdigest()
    with only_writer(out):
        unchanged = _make_way(out, data, force=force)
        pages = out / PAGES
        make_folder(pages)
        # Without `study.json` the folder is no study, whatever else stands in it.
        if not unchanged:
            (out / STUDY).unlink(missing_ok=True)
        for name in (INDEX, STYLE, *SCRIPTS):
            write_file(pages / name, (ASSETS / name).read_bytes())
        write_file(pages / DATA, script(static_data(settings, items, digest, dealt)))
        _write_private(out / ITEMS, items_path.read_bytes(), items_digest)
        write_file(out / STUDY, data)
    asked = np.zeros((len(pool.main), len(pool.methods)), dtype=np.int64)
    for questions in dealt:
        add_to(asked, pool, questions)
    return BuildResult(
        path=out,
        main=len(pool.main),
        training=len(pool.training),
        attention=len(pool.attention),
        methods=len(pool.methods),
        questions=len(dealt[0]),
        annotators=settings.annotators,
        fewest=int(asked.min()),
        most=int(asked.max()),
        unchanged=unchanged,
    )


def _make_way(out: Path, data: bytes, *, force: bool) -> bool:
    """Refuse to touch what must not be lost; whether the same study stands there."""
    names = {path.name for path in out.iterdir()}
    foreign = {name for name in names - {STUDY, ITEMS, PAGES} if not name.startswith((ANSWERS, "."))}
    if foreign and STUDY not in names:
        raise ConfigError(f"{out} is no study and holds {sorted(foreign)[0]!r}: give an empty or a new folder as --out")
    if STUDY in names and (out / STUDY).read_bytes() == data:
        return True
    if ANSWERS in names and (answers := count_answers(out / ANSWERS)):
        raise ResumeMismatch(
            f"{out} holds another study, to which {answers:,} answers were given; they are never overwritten, also not "
            "with --force: give another --out"
        )
    if STUDY in names and not force:
        raise ResumeMismatch(
            f"{out} holds another study, with other items or settings, and no answers: give another --out, or --force "
            "to replace it; links made for it end to work"
        )
    if ANSWERS in names:
        _logger.warning("the links made for the study that %s held before end to work", out)
        remove_database(out / ANSWERS)
    return False


def _write_private(path: Path, data: bytes, digest: str) -> None:
    if hashlib.sha256(data).hexdigest() != digest:
        raise DataError("the item file has changed while the study was built from it: run the same command again")
    write_file(path, data)
    path.chmod(0o600)
