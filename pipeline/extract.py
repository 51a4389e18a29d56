"""Running the model over a plan, shard by shard, into a cache."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from ..cache.encoding import SCALE_ROWS, channel_scale, scale_texts
from ..cache.files import free_bytes
from ..cache.layout import MANIFEST, ROW_COLUMNS, UNFINISHED, read_manifest
from ..cache.writer import CacheWriter, Shard
from ..errors import DataError, DiskFull
from ..progress import SILENT, Progress
from .language_model import LanguageModel
from .plan import Plan, batches
from .words import Rows


@dataclass(frozen=True)
class ExtractResult:
    """What an extraction made."""

    path: Path
    cache_id: str
    rows: int
    texts: int
    shards: int
    shards_done_before: int
    bytes: int
    real_share: float
    """Share of the token slots computed that were real tokens; NaN where nothing was computed."""
    seconds: float
    """Time spent on forward passes and writing, model loading left out."""
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

    Raises
    ------
    ResumeMismatch, FolderInUse, ConfigError, DiskFull
        See `CacheWriter`.
    DataError
        Where the model gives a value that is not a number; the text is named.
    Interrupted
        Where a stop was asked for; finished shards are kept.
    """
    extraction = plan.extraction()
    if not (out / MANIFEST).is_file() or force:
        check_disk(plan, out)
    with CacheWriter(out, extraction, force=force) as writer:
        before = len(writer.done) if not writer.finished else extraction.geometry.shards
        started, real, slots = time.perf_counter(), 0, 0
        if not writer.finished:
            missing = [number for number in range(extraction.geometry.shards) if number not in writer.done]
            if missing:
                model = load()
                started = time.perf_counter()
                writer.fix_scales(lambda: channel_scales(plan, model, progress))
                real, slots = _extract_shards(plan, missing, model, writer, progress)
            writer.finish(
                texts_table(plan),
                class_names=plan.class_names,
                counts=plan.counts,
            )
    manifest, cache_id = read_manifest(out)
    files = [*manifest.files.values(), *(entry for shard in manifest.shards for entry in shard.files.values())]
    return ExtractResult(
        path=out,
        cache_id=cache_id,
        rows=manifest.geometry.rows,
        texts=manifest.geometry.texts,
        shards=manifest.geometry.shards,
        shards_done_before=before,
        bytes=sum(entry.bytes for entry in files),
        real_share=real / slots if slots else float("nan"),
        seconds=time.perf_counter() - started,
        counts=manifest.counts,
    )


def _extract_shards(
    plan: Plan, missing: list[int], model: LanguageModel, writer: CacheWriter, progress: Progress
) -> tuple[int, int]:
    """Extract shards; encoding and writing one overlaps with computing the next. Returns real and computed slots."""
    progress.begin("extract", sum(int(plan.row_counts[plan.shard(number)].sum()) for number in missing), "rows")
    real = slots = 0
    pending: Future[None] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="clvq-write") as writing:
        for number in missing:
            shard, shard_real, shard_slots = run_shard(plan, number, model, progress)
            # One shard being written and one being computed: memory stays flat.
            if pending is not None:
                pending.result()
            pending = writing.submit(writer.commit, shard)
            real, slots = real + shard_real, slots + shard_slots
            progress.advance(len(shard.rows["text"]), real_share=real / max(slots, 1))
        if pending is not None:
            pending.result()
    return real, slots


@dataclass(frozen=True)
class _Read:
    """What the model gave for some texts, one after the other in the plan's order."""

    sites: dict[str, Float32[np.ndarray, "row d"]]
    rows: list[Rows]
    logits: Float32[np.ndarray, "text class"] | None
    real: int
    """Token slots computed that were real tokens."""
    slots: int


def run_shard(plan: Plan, number: int, model: LanguageModel, progress: Progress) -> tuple[Shard, int, int]:
    """The contents of a shard; how many token slots computed were real, and how many were computed."""
    places = plan.shard(number)
    read = _run_texts(plan, places, model, progress)
    columns = {name: np.concatenate([getattr(part, name) for part in read.rows]) for name in Rows.__slots__}
    columns["text"] = np.repeat(plan.placement.text_id[places], plan.row_counts[places])
    typed = {name: columns[name].astype(dtype) for name, (dtype, _) in ROW_COLUMNS.items()}
    shard = Shard(number=number, sites=read.sites, rows=typed, texts=len(places), logits=read.logits)
    return shard, read.real, read.slots


def channel_scales(plan: Plan, model: LanguageModel, progress: Progress) -> dict[str, Float32[np.ndarray, " _d"]]:
    """Scales of the channels for int8, from the plan's first texts."""
    places = scale_texts(plan.row_counts)
    read = _run_texts(plan, places, model, progress)
    return {name: channel_scale(values[:SCALE_ROWS]) for name, values in read.sites.items()}


def _run_texts(plan: Plan, places: Int64[np.ndarray, " text"], model: LanguageModel, progress: Progress) -> _Read:
    texts = [plan.texts.text[text] for text in plan.order[places].tolist()]
    tokens = plan.source.tokenize(texts, max_length=plan.config.max_length)
    rows = [plan.rows_of(int(place), part) for place, part in zip(places, tokens, strict=True)]
    counts = plan.row_counts[places]
    starts = np.cumsum(counts) - counts
    sites = {name: np.empty((int(counts.sum()), plan.source.width), dtype=np.float32) for name in plan.config.sites}
    numbers = {name: int(name.removeprefix("hidden.")) for name in plan.config.sites}
    classify = plan.config.task == "classify"
    logits = np.full((len(texts), len(plan.source.class_names)), np.nan, dtype=np.float32) if classify else None
    real = slots = 0
    for batch in batches(np.array([len(part.ids) for part in tokens]), slots=plan.config.batch_tokens):
        progress.check()
        ids, mask = model.pad([tokens[text].ids.tolist() for text in batch.tolist()])
        with torch.inference_mode():
            states, scores = model.read(ids, mask, list(numbers.values()), logits=classify)
            for name, site in numbers.items():
                vectors = pool(states[site], [rows[text] for text in batch.tolist()], mean=plan.config.pool == "mean")
                end = 0
                for text in batch.tolist():
                    begin, end = end, end + len(rows[text])
                    sites[name][starts[text] : starts[text] + len(rows[text])] = vectors[begin:end]
        if logits is not None and scores is not None:
            logits[batch] = scores.float().cpu().numpy()
        real += int(mask.sum())
        slots += mask.numel()
    _check_finite(plan, places, sites, starts)
    return _Read(sites=sites, rows=rows, logits=logits, real=real, slots=slots)


def pool(states: Float[Tensor, "batch seq d"], rows: list[Rows], *, mean: bool) -> Float32[np.ndarray, "row d"]:
    """The vectors of all rows of a batch: at each row's last sub-word, or the mean over its sub-words."""
    owner = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(part) for part in rows])).to(states.device)
    position = torch.from_numpy(np.concatenate([part.position for part in rows])).to(states.device)
    if not mean:
        return states[owner, position].float().cpu().numpy()
    subwords = torch.from_numpy(np.concatenate([part.subwords for part in rows])).to(states.device)
    total = torch.zeros((len(owner), states.shape[-1]), dtype=torch.float32, device=states.device)
    for back in range(int(subwords.max()) if len(subwords) else 0):
        inside = back < subwords
        total[inside] += states[owner[inside], position[inside] - back].float()
    return (total / subwords[:, None]).cpu().numpy()


def _check_finite(
    plan: Plan,
    places: Int64[np.ndarray, " text"],
    sites: dict[str, Float32[np.ndarray, "row d"]],
    starts: Int64[np.ndarray, " text"],
) -> None:
    for name, values in sites.items():
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            place = places[np.searchsorted(starts, bad[0], side="right") - 1]
            number = int(plan.order[place])
            raise DataError(
                f"{plan.source.name} gives values at {name} that are not finite numbers, for row "
                f"{plan.texts.source_row[number]} of split {plan.texts.split[number]!r}: "
                "try --dtype float32, or drop the text"
            )


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
