"""Running the model over a plan, shard by shard, into a cache."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from ..cache.files import free_bytes
from ..cache.layout import MANIFEST, UNFINISHED, read_manifest
from ..cache.writer import CacheWriter
from ..errors import ConfigError, DataError, DiskFull
from ..progress import SILENT, Progress
from .forward import Made, channel_scales, make_shard
from .language_model import LanguageModel
from .plan import Plan
from .receipts import Receipt, Tally


@dataclass(frozen=True)
class ExtractResult:
    """What an extraction made."""

    path: Path
    cache_id: str | None
    """`None` where other shards are still to be made, by others or by a later run."""
    rows: int
    texts: int
    shards: int
    shards_done_before: int
    shards_left: int
    bytes: int
    """Of the whole cache, or of the shards written now where others are left."""
    real_share: float
    """Share of the token slots computed that were real tokens; NaN where nothing was computed."""
    seconds: float
    """Time spent on forward passes and writing; with workers, also on their start."""
    counts: dict[str, int]


def check_disk(plan: Plan, out: Path) -> None:
    """Refuse to begin what cannot be finished.

    Raises
    ------
    DiskFull
        Where the disk has less room than the cache takes at most.
    """
    need, free = plan.bytes_at_most(), free_bytes(out)
    if (out / MANIFEST).is_file() or (out / UNFINISHED).is_file():
        # What was written before is a part of the cache, or is deleted first.
        need -= min(need, _bytes_below(out))
    if free < need:
        raise DiskFull(
            f"{out} needs up to {need:,} more bytes and the disk has {free:,} free: "
            "free some room, choose another --out, fewer --sites, or --max-texts"
        )


def _bytes_below(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        # Another process may be writing there; who may write is settled later.
        with suppress(FileNotFoundError):
            total += file.lstat().st_size
    return total


def extract(
    plan: Plan,
    out: Path,
    load: Callable[[], LanguageModel],
    *,
    progress: Progress = SILENT,
    force: bool = False,
    part: tuple[int, int] | None = None,
) -> ExtractResult:
    """Extract what is missing of a plan into `out`, and finish the cache.

    Parameters
    ----------
    plan
        What to extract.
    out
        The cache's folder. An extraction with the same plan is continued; a finished one is left as it is.
    load
        Loads the model; called only where a shard is missing.
    part
        `(i, n)`: only the i-th of n parts of the shards, 1 ≤ i ≤ n, beside others that make the other parts at the same
        time. Whoever makes the last shard finishes the cache.

    Raises
    ------
    ResumeMismatch, FolderInUse, ConfigError, DiskFull
        See `CacheWriter`.
    DataError
        Where the model gives a value that is not a number; the text is named.
    Interrupted
        Where a stop was asked for; finished shards are kept.
    """

    def make_shards(missing: list[int], writer: CacheWriter, tally: Tally) -> None:
        model = load()
        tally.start()
        writer.fix_scales(lambda: channel_scales(plan.scale_work(), plan.config, model, progress))
        _make_here(plan, missing, model, writer, tally)

    return extract_by(make_shards, plan, out, progress=progress, force=force, part=part)


def extract_by(
    make_shards: Callable[[list[int], CacheWriter, Tally], None],
    plan: Plan,
    out: Path,
    *,
    progress: Progress = SILENT,
    force: bool = False,
    part: tuple[int, int] | None = None,
) -> ExtractResult:
    """What every way of extracting has in common: `make_shards` makes those that are missing, in whatever way."""
    extraction = plan.extraction()
    if force and part is not None:
        raise ConfigError("--force would delete what others are writing: delete the cache first, without --shard-range")
    if not (out / MANIFEST).is_file() or force:
        check_disk(plan, out)
    count = extraction.geometry.shards
    shards = part_of(count, *part) if part else range(count)
    with CacheWriter(out, extraction, force=force, shared=part is not None) as writer:
        missing = [] if writer.finished else [number for number in shards if number not in writer.done]
        before = count if writer.finished else len(writer.done)
        tally = Tally(len(missing), progress)
        if missing:
            progress.begin("extract", sum(map(plan.rows_in, missing)), "rows")
            make_shards(missing, writer, tally)
            tally.settle()
        if not writer.finished and not writer.missing() and writer.become_only_writer():
            writer.finish(texts_table(plan), class_names=plan.class_names, counts=plan.counts)
        left = 0 if writer.finished else len(writer.missing())
    result = ExtractResult(
        path=out,
        cache_id=None,
        rows=extraction.geometry.rows,
        texts=extraction.geometry.texts,
        shards=count,
        shards_done_before=before,
        shards_left=left,
        bytes=tally.bytes,
        real_share=tally.real / tally.slots if tally.slots else float("nan"),
        seconds=time.perf_counter() - tally.started,
        counts=plan.counts,
    )
    if not (out / MANIFEST).is_file():
        return result
    manifest, cache_id = read_manifest(out)
    return replace(result, cache_id=cache_id, bytes=sum(entry.bytes for entry in manifest.entries.values()))


def part_of(shards: int, number: int, parts: int) -> range:
    """The shards of the `number`-th of `parts` parts, counted from 1.

    Raises
    ------
    ConfigError
    """
    if not 1 <= number <= parts:
        raise ConfigError(f"--shard-range {number}/{parts}: give i/n with i from 1 to n, such as 1/4, 2/4, 3/4 and 4/4")
    return range((number - 1) * shards // parts, number * shards // parts)


def _make_here(plan: Plan, missing: list[int], model: LanguageModel, writer: CacheWriter, tally: Tally) -> None:
    """Extract shards; encoding and writing one overlaps with computing the next."""

    def commit(made: Made) -> Receipt:
        written = writer.commit(made.shard)
        return Receipt(made.shard.number, len(made.shard.rows["text"]), written, made.real, made.slots)

    pending: tuple[int, Future[Receipt]] | None = None

    def settle() -> None:
        if pending is not None:
            try:
                tally.add(pending[1].result())
            except DataError as error:
                tally.fail(pending[0], error)

    with ThreadPoolExecutor(1, thread_name_prefix="clvq-write") as writing:
        for number in missing:
            try:
                made = make_shard(plan.work(number), plan.config, model, tally.progress)
            except DataError as error:
                tally.fail(number, error)
                continue
            # One shard being written and one being computed: memory stays flat.
            settle()
            pending = number, writing.submit(commit, made)
        settle()


def texts_table(plan: Plan) -> pa.Table:
    """`texts.parquet` less its predictions."""
    import hashlib

    order = plan.order.tolist()
    texts = plan.texts
    columns = {
        "text_id": pa.array(plan.placement.text_id, pa.int64()),
        "source_row": pa.array([texts.source_row[number] for number in order], pa.int64()),
        "split": pa.array([texts.split[number] for number in order], pa.string()),
        "text": pa.array([texts.text[number] for number in order], pa.string()),
        "text_sha256": pa.array([hashlib.sha256(texts.text[number].encode()).hexdigest() for number in order]),
        "label": pa.array([texts.label[number] for number in order], pa.int32()),
        "truncated_tokens": pa.array(plan.truncated, pa.int32()),
        "first_row": pa.array(plan.placement.first_row, pa.int64()),
        "row_count": pa.array(plan.row_counts, pa.int32()),
    }
    for name, values in texts.kept.items():
        columns[name] = values.take(pa.array(plan.order))
    return pa.table(columns)
