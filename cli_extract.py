"""`clvq extract`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import ConfigError
from .options import Device, Force, Json, Seed, device_of, names, set_threads, settings_of
from .terminal import progress_bars, say, show

if TYPE_CHECKING:
    import torch

    from .pipeline.extract import ExtractResult
    from .pipeline.plan import Plan


def extract(
    model: Annotated[str, typer.Argument(help="A Hugging Face model: a local folder, or a name on the Hub.")],
    data: Annotated[
        str, typer.Argument(help="A .jsonl, .csv, .parquet or .txt file, a folder of them, or a Hub name.")
    ],
    sites: Annotated[str, typer.Option(help="Layers to read, such as 8,12; 0 is the embeddings.")],
    out: Annotated[Path, typer.Option(help="The cache to write.")],
    rows: Annotated[str, typer.Option(help="What a row is: token or word.")] = "token",
    pool: Annotated[str, typer.Option(help="A word's vector: its last sub-word's (last) or their mean.")] = "last",
    split: Annotated[str, typer.Option(help="Splits to read, such as train,dev; all where not given.")] = "",
    train_split: Annotated[str, typer.Option(help="The split that the word filters apply to.")] = "train",
    text_field: Annotated[str, typer.Option(help="Field with the text.")] = "text",
    label_field: Annotated[str | None, typer.Option(help="Field with the label; 'label' where there is one.")] = None,
    keep_fields: Annotated[str, typer.Option(help="Other fields to keep, such as evidence,doc.")] = "",
    subset: Annotated[str | None, typer.Option(help="Configuration of a Hub data set.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    max_texts: Annotated[int | None, typer.Option(min=1, help="A seeded sample of so many texts per split.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens at which texts are cut; the window.")] = None,
    min_count: Annotated[int, typer.Option(min=1, help="Keep words seen so often in the training split.")] = 1,
    max_occurrences: Annotated[int | None, typer.Option(min=1, help="Keep so many occurrences of a word.")] = None,
    occurrences: Annotated[str, typer.Option(help="Which occurrences: random, or first (as published).")] = "random",
    encoding: Annotated[str, typer.Option(help="bf16, fp16, fp32 or int8.")] = "bf16",
    task: Annotated[str, typer.Option(help="Predictions to store: none, classify (by the head), prompt.")] = "none",
    prompt: Annotated[Path | None, typer.Option(help="File with the prompt; {text} stands for the text.")] = None,
    answers: Annotated[str, typer.Option(help="What to choose from: negative,positive or neg=bad,pos=good.")] = "",
    chat: Annotated[bool | None, typer.Option(help="Use the model's chat template; where it has one.")] = None,
    special: Annotated[str, typer.Option(help="Special tokens: mark their rows, keep them as text, or drop.")] = "mark",
    instruction: Annotated[str, typer.Option(help="The same for the prompt around the text.")] = "mark",
    saliency: Annotated[str, typer.Option(help="What predictions rest on: none, ig (captum), gradient.")] = "none",
    saliency_site: Annotated[str | None, typer.Option(help="At which layer; the lowest of --sites.")] = None,
    saliency_steps: Annotated[int, typer.Option(min=1, help="Steps of integrated gradients.")] = 50,
    saliency_baseline: Annotated[str, typer.Option(help="Where they begin: pad, zero or published.")] = "pad",
    dtype: Annotated[str, typer.Option(help="Type to compute in: auto, float32, bfloat16, float16.")] = "auto",
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Token slots in a batch; 1024, or 16384 on a GPU.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Make the shards in so many processes.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Make them on a Dask cluster, such as tcp://host:8786.")] = None,
    shard_range: Annotated[str | None, typer.Option(help="Make part i of n, such as 2/8, beside others.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch, in each worker.")] = None,
    worker_ttl: Annotated[float, typer.Option(min=5, help="Seconds after which a silent worker is replaced.")] = 60,
    seed: Seed = 0,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the plan: rows, bytes, free disk.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Run a model once and write its activations into a cache. Run again to resume."""
    from .pipeline.config import ExtractConfig
    from .pipeline.data import read_texts
    from .pipeline.extract import check_disk
    from .pipeline.extract import extract as run_extract
    from .pipeline.forward import load_model
    from .pipeline.plan import make_plan
    from .pipeline.saliency import saliency_settings
    from .pipeline.source import find_model
    from .pipeline.wording import prompt_settings

    part = _part(shard_range)
    if sum(way is not None for way in (workers, scheduler, part)) > 1:
        raise ConfigError("--workers, --scheduler and --shard-range are three ways to share the work: give one of them")
    where = _device(device, scheduler)
    if threads is not None and workers is None and scheduler is None:
        set_threads(threads)
    source = find_model(model, revision=revision)
    chosen = source.sites(names(sites))
    config = settings_of(
        ExtractConfig,
        sites=tuple(chosen),
        rows=rows,
        pool=pool,
        min_count=min_count,
        max_occurrences=max_occurrences,
        occurrences=occurrences,
        train_split=train_split,
        max_length=max_length or source.window,
        encoding=encoding,
        task=task,
        **prompt_settings(source, task=task, prompt=prompt, answers=answers, chat=chat),
        special=special,
        instruction=instruction,
        **saliency_settings(
            source, chosen, kind=saliency, site=saliency_site, steps=saliency_steps, baseline=saliency_baseline
        ),
        dtype=("float32" if where.type == "cpu" else "bfloat16") if dtype == "auto" else dtype,
        batch_tokens=batch_tokens or (1024 if where.type == "cpu" else 16384),
        seed=seed,
    )
    texts = read_texts(
        data,
        splits=names(split),
        text_field=text_field,
        label_field=label_field,
        keep_fields=names(keep_fields),
        max_texts=max_texts,
        subset=subset,
        seed=seed,
    )
    with progress_bars() as progress:
        plan = make_plan(source, texts, config, progress=progress)
        if dry_run:
            figures = _plan_figures(plan, out)
        elif workers is not None or scheduler is not None:
            from .pipeline.cluster import Cluster, extract_on

            result = extract_on(
                plan,
                out,
                Cluster(workers=workers, scheduler=scheduler, threads=threads, worker_ttl=worker_ttl),
                model=str(Path(model).expanduser().absolute()) if source.commit is None else model,
                revision=source.commit,
                device=where.type,
                progress=progress,
                force=force,
            )
            figures = _figures(result)
        else:
            result = run_extract(
                plan,
                out,
                lambda: load_model(source, config, device=where),
                progress=progress,
                force=force,
                part=part,
            )
            figures = _figures(result)
    show(figures, as_json=as_json, title="plan" if dry_run else "cache")
    if dry_run:
        check_disk(plan, out)
    elif result.cache_id is None:
        say(
            f"{result.shards_left} of {result.shards} shards are still to be made; "
            f"whoever makes the last one finishes {out}"
        )


def _part(shard_range: str | None) -> tuple[int, int] | None:
    if shard_range is None:
        return None
    number, slash, parts = shard_range.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal()):
        raise ConfigError(f"--shard-range {shard_range}: write it as i/n, such as 2/8")
    return int(number), int(parts)


def _device(name: str, scheduler: str | None) -> "torch.device":
    if scheduler is None:
        return device_of(name)
    # What this machine has says nothing of what the workers have, and the type to compute in follows from it.
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: with --scheduler say what the workers have, --device cpu or --device cuda")
    import torch

    return torch.device(name)


def _figures(result: "ExtractResult") -> dict[str, Any]:
    figures = asdict(result)
    figures |= figures.pop("counts")
    whole = result.shards_done_before == 0 and result.shards_left == 0
    return figures | {"rows_per_second": result.rows / result.seconds if whole else None}


def _plan_figures(plan: "Plan", out: Path) -> dict[str, Any]:
    from .cache.files import free_bytes

    geometry = plan.placement.geometry
    return {
        "sites": list(plan.config.sites),
        "rows": geometry.rows,
        "shards": geometry.shards,
        "rows_per_shard": geometry.shard_rows,
        **plan.counts,
        "bytes_at_most": plan.bytes_at_most(),
        "bytes_expected": plan.bytes_expected(),
        "bytes_free": free_bytes(out),
    }
