"""`clvq ablate`."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Device, Force, Json, Seed, device_of, model_loader, named, names, settings_of
from .terminal import interval, print_json, progress_bars, put, titled

if TYPE_CHECKING:
    from .evaluation.ablate import AblateResult
    from .evaluation.tables import GroupLine, Line

_CONCEPTS = 15


def ablate(
    cache: Annotated[str, typer.Argument(help="The cache that the runs were trained on: a folder, s3://… or hf://….")],
    runs: Annotated[list[Path], typer.Argument(help="One or more runs.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    model: Annotated[str | None, typer.Option(help="The model's folder; needed where it is not from the Hub.")] = None,
    read_out: Annotated[str, typer.Option(help="model, probe or both: model,probe.")] = "model,probe",
    removal: Annotated[
        str,
        typer.Option(
            help="projection (as published), centred, subspace (of active latents), offset, mean, or several."
        ),
    ] = "projection,centred",
    controls: Annotated[
        str, typer.Option(help="Some of them, with commas between, or nothing; all where it is not given.")
    ] = "random code,matched code,matched random,same label,other label,mean direction,gaussian",
    strengths: Annotated[str, typer.Option(help="Shares of what is removed; several give curves: 0.25,0.5,1.")] = "1",
    curves: Annotated[
        str, typer.Option(help="What has the weaker strengths too: all, or own codes alone (own).")
    ] = "all",
    rows_changed: Annotated[str, typer.Option(help="Rows that lose their concept: salient, cls or all.")] = "salient",
    saliency: Annotated[str, typer.Option(help="The salient row by gradient, or as stored in the cache.")] = "gradient",
    subspace_k: Annotated[
        int | None, typer.Option(min=1, help="Strongest active latents that `subspace` removes; else all.")
    ] = None,
    concepts: Annotated[
        bool, typer.Option("--concepts", help="Also remove each concept by itself, from all of its rows.")
    ] = False,
    min_texts: Annotated[int, typer.Option(min=2, help="Texts that a concept needs for an interval.")] = 5,
    split: Annotated[str, typer.Option(help="Splits to evaluate; else the texts that the runs held out.")] = "",
    max_texts: Annotated[int | None, typer.Option(min=1, help="Evaluate a seeded sample of so many texts.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Remove each text's concept and measure what becomes of the prediction, next to matched controls."""
    from .cache.sharing.remote import open_cache
    from .evaluation.ablate import AblateConfig
    from .evaluation.ablate import ablate as run_ablate

    opened = open_cache(cache)
    where = device_of(device)
    config = settings_of(
        AblateConfig,
        read_outs=tuple(names(read_out)),
        removals=tuple(names(removal)),
        controls=tuple(names(controls)),
        strengths=tuple(names(strengths)),
        curves=curves,
        rows_changed=rows_changed,
        saliency=saliency,
        subspace_k=subspace_k,
        concepts=concepts,
        min_texts=min_texts,
        split=tuple(names(split)),
        max_texts=max_texts,
        seed=seed,
    )
    load = model_loader(opened.manifest.identity, model, what=cache, device=where)
    labelled = named(runs)
    with progress_bars() as progress:
        result = run_ablate(opened, labelled, out, load, config, progress=progress, force=force)
    if as_json:
        print_json(asdict(result))
    else:
        print_ablation(result)


def print_ablation(result: "AblateResult") -> None:
    """The tables of an ablation, as far as there is something in them."""
    _print_lines(result)
    _print_groups(result)
    _print_curves(result)
    _print_contrasts(result)
    _print_concepts(result)
    for left in result.left_out:
        put(f"{left.run} is left out of the removal {left.removal}: {left.why}")
    if result.forwards.asked:
        put(
            f"{result.forwards.asked:,} texts asked about, {result.forwards.run:,} run through the upper blocks: "
            "the others were equal to one of them, or lost nothing"
        )
    put(f"{result.path} holds this table as JSON, and every text")
    if result.trained_texts:
        put(f"{result.trained_texts:,} of these texts were trained on: the figures flatter the runs.")


def _print_lines(result: "AblateResult") -> None:
    runs = {line.run for line in result.lines if line.run}
    columns = (
        "run,read-out,removal,removed,accuracy,way to chance,flipped,probability lost,norm removed,own code − this,p"
    )
    table = titled(
        columns.split(",")[len(runs) < 2 :], "means over texts with 95 % bootstrap intervals; p Holm-adjusted"
    )
    strongest = max((line.strength for line in result.lines if line.removal), default=1.0)
    texts = {line.read_out: line.texts for line in result.lines if line.removal is None}
    for line in result.lines:
        if line.removal is None or line.strength == strongest:
            if line.removed in ("nothing", "own code", "whole row"):
                table.add_section()
            table.add_row(*_cells(line, texts[line.read_out])[len(runs) < 2 :])
    put(table, whole=True)


def _cells(line: "Line", texts: int) -> list[str]:
    unchanged = line.removal is None
    fewer = unchanged or line.texts != texts
    return [
        line.run or "–",
        line.read_out,
        line.removal or "–",
        f"{line.removed} ({line.texts:,} texts)" if fewer else line.removed,
        interval(line.accuracy, ".3f"),
        "–" if unchanged or math.isnan(line.drop_to_chance.value) else f"{round(line.drop_to_chance.value, 2) + 0:.0%}",
        "–" if unchanged else interval(line.flipped, ".1%"),
        "–" if unchanged else interval(line.probability_lost, "+.3f"),
        "–" if unchanged else f"{line.norm_removed.value:.1%}",
        interval(line.own_minus_this, "+.3f"),
        _p(line.p),
    ]


def _print_groups(result: "AblateResult") -> None:
    if not result.groups:
        return
    columns = ["runs", "seeds", "read-out", "removal", "removed", "accuracy", "flipped", "probability lost"]
    table = titled([*columns, "norm removed", "own code − this"], "means over seeds and texts; intervals over both")
    strongest = max(line.strength for line in result.groups)
    for line in result.groups:
        if line.strength == strongest:
            if line.removed == "own code":
                table.add_section()
            table.add_row(*_group_cells(line))
    put(table, whole=True)


def _group_cells(line: "GroupLine") -> list[str]:
    return [
        line.group,
        str(line.seeds),
        line.read_out,
        line.removal,
        line.removed,
        interval(line.accuracy, ".3f"),
        interval(line.flipped, ".1%"),
        interval(line.probability_lost, "+.3f"),
        f"{line.norm_removed.value:.1%}",
        interval(line.own_minus_this, "+.3f"),
    ]


def _print_curves(result: "AblateResult") -> None:
    strengths = max((curve.strengths for curve in result.curves), key=len, default=[])
    if len(strengths) < 2:
        return
    table = titled(
        [
            "runs", "read-out", "removal", "removed",
            *(f"lost at {strength:g}" for strength in strengths),
            "norm at most", "common norm", "lost on the way there", "own code − this",
        ],
        "probability lost by strength, and on the average up to a norm that all own codes remove; own code − this: at "
        "the smaller norm of the two",
    )  # fmt: skip
    for curve in result.curves:
        at = dict(zip(curve.strengths, curve.probability_lost, strict=True))
        if curve.removed == "own code":
            table.add_section()
        table.add_row(
            curve.group,
            curve.read_out,
            curve.removal,
            curve.removed,
            *(f"{at[strength].value:+.3f}" if strength in at else "–" for strength in strengths),
            f"{curve.norm_removed[-1].value:.1%}",
            f"{curve.common_norm:.1%}",
            interval(curve.mean_to_common_norm, "+.3f"),
            interval(curve.own_minus_this, "+.3f"),
        )
    put(table, whole=True)


def _print_contrasts(result: "AblateResult") -> None:
    if not result.contrasts:
        return
    table = titled(
        ["first", "second", "read-out", "removal", "probability lost by", "first − second", "p"],
        "runs against each other, paired by text; up to equal norm on the curves, piecewise linear from (0, 0)",
    )
    for line in result.contrasts:
        difference = interval(line.difference, "+.3f")
        table.add_row(line.first, line.second, line.read_out, line.removal, line.what, difference, _p(line.p))
    put(table, whole=True)


def _print_concepts(result: "AblateResult") -> None:
    effects = [effect for effect in result.concepts if effect.class_changes is not None]
    if not effects:
        return
    classes = len(effects[0].class_changes or [])
    table = titled(
        [
            "run", "concept", "texts", "flipped", "probability lost", "by matched random", "own − random", "p",
            *(f"class {number}" for number in range(classes)),
        ],
        f"one concept removed from all its rows: the {min(_CONCEPTS, len(effects))} with the largest total effect, "
        "and how each class's probability changes",
    )  # fmt: skip
    for effect in effects[:_CONCEPTS]:
        table.add_row(
            effect.run,
            str(effect.concept),
            f"{effect.texts:,}",
            f"{effect.flipped:.1%}",
            f"{effect.probability_lost:+.3f}" if effect.lost is None else interval(effect.lost, "+.3f"),
            interval(effect.control_lost, "+.3f"),
            interval(effect.own_minus_control, "+.3f"),
            _p(effect.p),
            *(f"{change:+.3f}" for change in effect.class_changes or []),
        )
    put(table, whole=True)


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
