"""The tables of a study, from the JSON files that its commands left. No figure is computed here: each stands in a file.

`results.json` names the file and the place of every figure; `results.md` shows them.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from study_cells import write_json
from study_methods import METHODS, read_lines, still_falling

NOTHING = "–"
OVERVIEW = "At a glance"
"""Title of a study's first table."""

_CONTROLS = ("matched code", "matched random", "random code", "same label", "other label", "mean direction", "gaussian")
_HONEST_CONTROLS = ("matched code", "same label")
_TOGETHER = {"salient": "the most salient row", "all": "all rows"}
_QUALITY = {
    "word purity": ("word purity", ".3f"),
    "label purity": ("label purity", ".3f"),
    "label AMI": ("label ami", ".3f"),
    "label beyond word, bits": ("label beyond word", "+.3f"),
}
_OVERLAP = {"token F1": "f1", "average precision": "average_precision", "concept's rows: F1": "set_f1"}


@dataclass(frozen=True)
class Source:
    """Where a figure stands: a file, seen from the study's folder, and the keys that lead to it there."""

    file: str
    at: tuple[str | int, ...]
    value: float | int | bool | str | None


@dataclass(frozen=True)
class Field:
    """One field of a table."""

    text: str
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Table:
    """One table."""

    title: str
    about: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Field, ...], ...]


class _File:
    """A JSON file, and fields from it."""

    def __init__(self, out: Path, name: str) -> None:
        self.name = name
        self.content: Any = json.loads((out / name).read_text(encoding="utf-8"))

    def get(self, *at: str | int) -> Source:
        value = self.content
        for key in at:
            value = value.get(key) if isinstance(value, dict) else value[key]
        return Source(self.name, at, value)

    def estimate(self, *at: str | int, form: str) -> Field:
        """A value with its interval."""
        found = self.get(*at).value
        if not isinstance(found, dict):
            return Field(NOTHING)
        middle = "mean" if "mean" in found else "value"
        parts = [self.get(*at, name) for name in (middle, "low", "high")]
        value, low, high = (_shown(part.value, form) for part in parts)
        if value == NOTHING:
            return Field(NOTHING)
        if NOTHING in (low, high):
            return Field(value, (parts[0],))
        return Field(f"{value} [{low}, {high}]", tuple(parts))

    def middle(self, *at: str | int, form: str) -> Field:
        """A value without its interval."""
        found = self.get(*at).value
        if not isinstance(found, dict):
            return Field(NOTHING)
        return _each([self.get(*at, "mean" if "mean" in found else "value")], form)


def write_tables(out: Path) -> list[Table]:
    """Write `results.json` and `results.md` from what stands in a study's folder, and give the tables."""
    study = json.loads((out / "study.json").read_text(encoding="utf-8"))
    methods = [name for name in METHODS if name in study["methods"]]
    runs = {
        name: [
            run
            for run in (f"{name}-seed={study['seed'] + number}" for number in range(study["seeds"]))
            if (out / "runs" / run / "model.safetensors").is_file()
        ]
        for name in methods
    }
    tables = [table for table in _tables(out, runs, study) if table.rows]
    plain = [asdict(table) for table in tables]
    write_json(out / "results.json", {"study": study, "tables": plain})
    text = "\n".join(["# Results", "", *(line for table in plain for line in _markdown(table))])
    (out / "results.md").write_text(text, encoding="utf-8")
    return tables


def _tables(out: Path, runs: Mapping[str, Sequence[str]], study: Mapping[str, Any]) -> Iterable[Table]:
    yield _overview(out, runs, study["upper"])
    yield _fits(out, runs)
    yield _budgets(out, runs)
    yield _published(out, runs)
    for evaluation, which in _TOGETHER.items():
        yield _honest(out, evaluation, which)
    yield _equal_norm(out)
    yield _contrasts(out)
    yield _quality(out, runs, study["upper"])
    yield _rationales(out, runs)
    yield _failures(out)


def _overview(out: Path, runs: Mapping[str, Sequence[str]], upper: str) -> Table:
    published = dict(_results(out, runs, "published"))
    quality = dict(_results(out, runs, "quality"))
    salient, whole = (_together_file(out, name) for name in ("salient", "all"))
    salient_lines, whole_lines = ({} if file is None else _methods_of(file) for file in (salient, whole))
    rows = []
    for name in runs:
        fields: list[Field] = []
        file = published.get(name)
        own = {} if file is None else _lines_of(file, "projection")
        for removed in ("own code", "same label", "other label"):
            at = own.get(removed)
            fields.append(Field(NOTHING) if file is None or at is None else file.middle(*at, "accuracy", form=".3f"))
        for file, lines, removed, figure in (
            (salient, salient_lines, "own code", "probability_lost"),
            (whole, whole_lines, "own code", "probability_lost"),
            (whole, whole_lines, "matched code", "own_minus_this"),
        ):
            at = lines.get(name, {}).get(removed)
            fields.append(Field(NOTHING) if file is None or at is None else file.estimate(*at, figure, form="+.3f"))
        curves = {} if whole is None else _curves_of(whole, name)
        for removed, figure in (("same label", "own_minus_this"), ("own code", "at_common_norm")):
            at = curves.get(removed)
            fields.append(Field(NOTHING) if whole is None or at is None else whole.estimate(*at, figure, form="+.3f"))
        file = quality.get(name)
        for key in ("word purity", "label purity", _r2(upper)):
            fields.append(Field(NOTHING) if file is None else file.middle(*_of_seeds(file), "figures", key, form=".2f"))
        if any(field.sources for field in fields):
            rows.append((Field(name), *fields))
    return Table(
        OVERVIEW,
        "From the other tables of the study, which say more. *Published*: accuracy of the probe when the text's "
        "own code, that of another text of the same label, or of another label is projected out. *Salient*, *all*: "
        "probability that the model loses with the own code taken out of the most salient row, of all rows; *− "
        "matched*: that less what a code of like norm and cosine costs; *− same label*: less what the code of "
        "another text of the same label costs, where both have removed as much. *Equal norm*: probability lost "
        "where all methods have removed as much. *R²*: of the upper rows, by concepts.",
        (
            *("method", "published: own", "same label", "other label", "salient: own"),
            *("all: own", "− matched", "− same label", "equal norm"),
            *("word purity", "label purity", f"R² {_site(upper)}"),
        ),
        tuple(rows),
    )


def _site(name: str) -> str:
    return name if "." in name else f"hidden.{name}"


def _r2(upper: str) -> str:
    """What `clvq quality` calls the share of the upper rows that concepts explain."""
    return f"r2 {_site(upper)}"


def _of_seeds(file: _File) -> tuple[str | int, ...]:
    """Where the figures of a method stand in its `quality.json`."""
    return ("seeds", 0) if file.content["seeds"] else ("lines", 0)


def _fits(out: Path, runs: Mapping[str, Sequence[str]]) -> Table:
    figures = {
        "concepts": ("codes", ",.0f"),
        "used": ("used_codes", ",.0f"),
        "perplexity": ("perplexity", ".1f"),
        "own-code FVU": ("own_code_fvu", ".4f"),
        "decoder FVU": ("decoder_fvu_codes_only", ".4f"),
        "latents' FVU": ("sae_fvu", ".4f"),
        "active latents": ("l0", ".1f"),
    }
    rows = []
    for name, own in runs.items():
        reports = [_File(out, f"runs/{run}/report.json") for run in own]
        records = [_File(out, f"cells/train/{run}.json") for run in own]
        if reports:
            fields = [_each([report.get(key) for report in reports], form) for key, form in figures.values()]
            times = _each([record.get("cpu_seconds") for record in records], ",.0f")
            rows.append((Field(name), *fields, times))
    return Table(
        "Fits",
        "One figure for each seed, where they differ; on the texts that measure. CPU s: seconds of processor time.",
        ("method", *figures, "CPU s"),
        tuple(rows),
    )


def _budgets(out: Path, runs: Mapping[str, Sequence[str]]) -> Table:
    rows = []
    for name, own in runs.items():
        if not own or not (out / "budgets" / f"{name}.json").is_file():
            continue
        file = _File(out, f"budgets/{name}.json")
        wanted, given = (
            [file.get(part, setting) for setting in file.content["epochs"]] for part in ("wanted", "epochs")
        )
        falling = [still_falling(read_lines(out / "runs" / run)) for run in own]
        said = {
            phase: ", ".join(dict.fromkeys(_yes(one.get(phase)) for one in falling)) for one in falling for phase in one
        }
        rows.append(
            (
                Field(name),
                _together(wanted, ".0f"),
                _together(given, ".0f"),
                _each([file.get("limited_by")], ""),
                Field("; ".join(f"{phase}: {text}" if len(said) > 1 else text for phase, text in said.items())),
                _each([file.get("at_most_epochs")], ".0f"),
                _each([file.get("at_most_cpu_seconds")], ",.0f"),
            )
        )
    return Table(
        "Length of the fits",
        "Epochs wanted and given (encoder + rest), and whether the held-out loss still fell at the end: the last epoch "
        "of a phase lowered it by more than 0.5 %.",
        ("method", "epochs wanted", "given", "limited by", "still falling", "at most epochs", "at most CPU s"),
        tuple(rows),
    )


def _published(out: Path, runs: Mapping[str, Sequence[str]]) -> Table:
    rows = []
    for name, file in _results(out, runs, "published"):
        clean = _clean(file)
        for removal, shown in (("projection", name), ("subspace", f"{name}, subspace")):
            own = _lines_of(file, removal)
            if clean is None or "own code" not in own:
                continue
            controls = [own.get(control) for control in _CONTROLS]
            rows.append(
                (
                    Field(shown),
                    file.estimate(*clean, "accuracy", form=".3f"),
                    file.estimate(*own["own code"], "accuracy", form=".3f"),
                    *(Field(NOTHING) if at is None else file.estimate(*at, "accuracy", form=".3f") for at in controls),
                    file.estimate(*own["own code"], "norm_removed", form=".1%"),
                )
            )
    return Table(
        "As published: accuracy of a probe after an uncentred projection",
        "Of the most salient row's concept, on one vector per text. Accuracy below chance is a class turned round "
        "by the common mean, no evidence of a removed concept. *Subspace*: of a sparse autoencoder, that of its active "
        "latents' encoder vectors, as in the paper's revision.",
        ("method", "nothing removed", "own code", *_CONTROLS, "norm removed"),
        tuple(rows),
    )


def _honest(out: Path, evaluation: str, which: str) -> Table:
    file = _together_file(out, evaluation)
    return Table(
        f"The model itself, concepts removed from {which}",
        "Centred removal at the lower site; the model's own upper blocks and head are run. *own − …*: probability lost "
        "by the own code less that lost by a control, paired by text; a control is beaten where the interval lies "
        "above 0. *Same label*: the code of another text of the same label, which removes less norm.",
        (
            *("method", "accuracy", "flipped", "probability lost", "norm removed"),
            *(f"own − {control}" for control in _HONEST_CONTROLS),
        ),
        () if file is None else tuple(_honest_rows(file)),
    )


def _honest_rows(file: _File) -> Iterable[tuple[Field, ...]]:
    """The unchanged model, then each method."""
    clean = _clean(file)
    before = Field(NOTHING) if clean is None else file.estimate(*clean, "accuracy", form=".3f")
    yield (Field("nothing removed"), before, *[Field(NOTHING)] * (3 + len(_HONEST_CONTROLS)))
    for name, own in _methods_of(file).items():
        at = own["own code"]
        yield (
            Field(name),
            file.estimate(*at, "accuracy", form=".3f"),
            file.estimate(*at, "flipped", form=".1%"),
            file.estimate(*at, "probability_lost", form="+.3f"),
            file.estimate(*at, "norm_removed", form=".1%"),
            *(
                file.estimate(*own[control], "own_minus_this", form="+.3f") if control in own else Field(NOTHING)
                for control in _HONEST_CONTROLS
            ),
        )


def _equal_norm(out: Path) -> Table:
    file = _together_file(out, "all")
    names = [] if file is None else [_method(curve["group"]) for curve in file.content["curves"]]
    rows = [] if file is None else [_curve(file, name) for name in dict.fromkeys(names)]
    return Table(
        "At equal norm removed",
        "Centred removal from all rows. *Curve*: norm removed → probability lost, by own codes, at several strengths. "
        "*Common norm*: the least that any method's own codes remove. *At it* and *mean up to it*: probability lost "
        "on the curve, piecewise linear through (0, 0); the mean is the area under it, divided by the norm. *Same "
        "label*: what the code of another text of the same label removes and costs; *own − same label*: the height of "
        "the own curve at that norm, less that cost.",
        (
            *("method", "curve", "common norm", "at it", "mean up to it"),
            *("same label: norm", "probability lost", "own − same label"),
        ),
        tuple(rows),
    )


def _curve(file: _File, name: str) -> tuple[Field, ...]:
    """How much a method's own codes cost by norm, and what the code of another text of the same label does."""
    at = _curves_of(file, name)
    own, same = at["own code"], at.get("same label")
    parts = [
        [file.get(*own, figure, point, "value") for figure in ("norm_removed", "probability_lost")]
        for point in range(len(file.get(*own, "strengths").value))
    ]
    shown = [f"{_shown(norm.value, '.0%')} → {_shown(lost.value, '+.3f')}" for norm, lost in parts]
    fields = [
        Field(name),
        Field(", ".join(shown), tuple(source for part in parts for source in part)),
        _each([file.get(*own, "common_norm")], ".1%"),
        file.estimate(*own, "at_common_norm", form="+.4f"),
        file.estimate(*own, "mean_to_common_norm", form="+.4f"),
    ]
    if same is None:
        return (*fields, *[Field(NOTHING)] * 3)
    return (
        *fields,
        file.middle(*same, "norm_removed", 0, form=".1%"),
        file.middle(*same, "probability_lost", 0, form="+.4f"),
        file.estimate(*same, "own_minus_this", form="+.4f"),
    )


def _contrasts(out: Path) -> Table:
    rows: list[tuple[Field, ...]] = []
    for evaluation, which in _TOGETHER.items():
        file = _together_file(out, evaluation)
        if file is None:
            continue
        for place, contrast in enumerate(file.content["contrasts"]):
            at = ("contrasts", place)
            names = [_method(contrast[side]) for side in ("first", "second")]
            if "clvq-vae" not in names:
                continue
            rows.append(
                (
                    Field(which),
                    Field(" − ".join(names)),
                    Field(contrast["what"]),
                    file.estimate(*at, "difference", form="+.4f"),
                    _each([file.get(*at, "p")], ".4f"),
                )
            )
    return Table(
        "CLVQ-VAE against each rival",
        "Differences in probability lost, paired by text, 95 % intervals over texts and seeds; p by sign flips, "
        "Holm-adjusted over all pairs of methods.",
        ("rows", "methods", "what", "difference", "p"),
        tuple(rows),
    )


def _curves_of(file: _File, name: str) -> dict[str, tuple[str | int, ...]]:
    """What is removed → where the curve of a method stands."""
    return {
        curve["removed"]: ("curves", place)
        for place, curve in enumerate(file.content["curves"])
        if _method(curve["group"]) == name
    }


def _method(group: str) -> str:
    """The method that a group of runs is of: runs are called `kmeans-seed=42`, their group by how the names begin."""
    return group.partition("-seed")[0]


def _together_file(out: Path, evaluation: str) -> _File | None:
    place = f"ablations/{evaluation}/ablation.json"
    return _File(out, place) if (out / place).is_file() else None


def _quality(out: Path, runs: Mapping[str, Sequence[str]], upper: str) -> Table:
    figures = {**_QUALITY, f"R² {_site(upper)}": (_r2(upper), ".3f")}
    rows: list[tuple[Field, ...]] = []
    baselines: dict[str, tuple[Field, ...]] = {}
    for name, file in _results(out, runs, "quality"):
        at = _of_seeds(file)
        rows.append((Field(name), *(file.estimate(*at, "figures", key, form=form) for key, form in figures.values())))
        for place, line in enumerate(file.content["lines"]):
            if line["method"] is None:
                found = [file.estimate("lines", place, "figures", key, form=form) for key, form in figures.values()]
                baselines.setdefault(line["name"], (Field(line["name"]), *found))
    return Table(
        "What concepts tell",
        "Means over seeds with 95 % intervals (Student's t; of one seed, over texts). Below the methods, "
        "baselines: those of the first method that has one of the name.",
        ("concepts", *figures),
        (*rows, *baselines.values()),
    )


def _rationales(out: Path, runs: Mapping[str, Sequence[str]]) -> Table:
    rows: list[tuple[Field, ...]] = []
    baselines: dict[str, tuple[Field, ...]] = {}
    for name, file in _results(out, runs, "quality"):
        overlap = file.content["overlap"]
        for place, line in enumerate([] if overlap is None else overlap["lines"]):
            at = ("overlap", "lines", place, "found")
            fields = tuple(file.estimate(*at, key, form=".3f") for key in _OVERLAP.values())
            if line["name"] in runs[name]:
                rows.append((Field(line["name"]), *fields))
            else:
                baselines.setdefault(line["name"], (Field(line["name"]), *fields))
    return Table(
        "Rows that concepts point to, against human rationales",
        "Means over texts with 95 % intervals. Below the runs, baselines.",
        ("rows by", *_OVERLAP),
        (*rows, *baselines.values()),
    )


def _failures(out: Path) -> Table:
    rows = []
    for path in sorted((out / "cells").rglob("*.json")):
        file = _File(out, path.relative_to(out).as_posix())
        if file.content["state"] != "done":
            rows.append(tuple(Field(str(file.content[key] or NOTHING)) for key in ("name", "state", "error")))
    return Table(
        "Not done", "Cells that failed, were stopped, or could not begin.", ("cell", "state", "why"), tuple(rows)
    )


def _results(out: Path, runs: Mapping[str, Sequence[str]], evaluation: str) -> Iterable[tuple[str, _File]]:
    """Method and file of each that is there."""
    for name, own in runs.items():
        place = (
            f"quality/{name}/quality.json"
            if evaluation == "quality"
            else f"ablations/{name}/{evaluation}/ablation.json"
        )
        if own and (out / place).is_file():
            yield name, _File(out, place)


def _clean(file: _File) -> tuple[str | int, ...] | None:
    """Where the line of the unchanged vectors stands."""
    for place, line in enumerate(file.content["lines"]):
        if line["removal"] is None:
            return ("lines", place)
    return None


def _lines_of(file: _File, removal: str) -> dict[str, tuple[str | int, ...]]:
    """What is removed → where its line stands; of a file about one method."""
    return next((own for own in _methods_of(file, removal).values()), {})


def _methods_of(file: _File, removal: str = "centred") -> dict[str, dict[str, tuple[str | int, ...]]]:
    """Method → what is removed, wholly → where its line stands: of all seeds together, or of the single run."""
    found: dict[str, dict[str, tuple[str | int, ...]]] = {}
    for table, key in (("lines", "run"), ("groups", "group")):
        for place, line in enumerate(file.content[table]):
            if line["removal"] == removal and line["strength"] == 1:
                found.setdefault(_method(line[key]), {})[line["removed"]] = (table, place)
    return found


def _each(sources: Sequence[Source], form: str) -> Field:
    """One figure for each source; one alone where all are shown alike."""
    texts = [_shown(source.value, form) for source in sources]
    if set(texts) == {NOTHING}:
        return Field(NOTHING)
    return Field(texts[0] if len(set(texts)) == 1 else ", ".join(texts), tuple(sources))


def _together(sources: Sequence[Source], form: str) -> Field:
    return Field(" + ".join(_shown(source.value, form) for source in sources), tuple(sources))


def _shown(value: Any, form: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NOTHING
    return value if isinstance(value, str) else f"{value:{form}}"


def _yes(value: bool | None) -> str:
    return "one epoch" if value is None else "yes" if value else "no"


def write_overview(out: Path, studies: Iterable[str]) -> None:
    """Write `results.md` into the folder of several studies: the first table of each, and where the others are."""
    lines = ["# Results", ""]
    about = ""
    for name in studies:
        file = out / name / "results.json"
        tables = json.loads(file.read_text(encoding="utf-8"))["tables"] if file.is_file() else []
        for table in tables:
            if table["title"] == OVERVIEW:
                lines += [f"## {name}", "", f"[All tables]({name}/results.md)", "", *_grid(table), ""]
                about = table["about"]
    (out / "results.md").write_text("\n".join([*lines[:2], about, "", *lines[2:]]), encoding="utf-8")


def _markdown(table: Mapping[str, Any]) -> Iterable[str]:
    yield from (f"## {table['title']}", "", table["about"], "", *_grid(table), "")


def _grid(table: Mapping[str, Any]) -> Iterable[str]:
    escape: Callable[[str], str] = lambda text: text.replace("|", "\\|")  # noqa: E731
    yield f"| {' | '.join(map(escape, table['columns']))} |"
    yield f"|{'---|' * len(table['columns'])}"
    for row in table["rows"]:
        yield f"| {' | '.join(escape(field['text']) for field in row)} |"
