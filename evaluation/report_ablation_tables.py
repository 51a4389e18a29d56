"""The tables and figures of ablations: both protocols side by side, controls, curves, contrasts and concepts."""

from collections.abc import Callable, Iterator, Sequence

from .report_ablation import MATCHED, OWN, PUBLISHED, READ_OUTS, Ablation, Curve, Line, Study, View, order
from .report_document import MISSING, Cell, Chart, Panel, Section, Series, Table, cell, distinct, say, shown

_CONCEPTS = 15
_INVERTED = " †"


def ablation_section(study: Study) -> Section:
    """All tables and figures of a study."""
    first = study.ablations[0]
    rows, split = (_setting(first, name) for name in ("rows_changed", "split"))
    text = [
        say(
            f"Cache {shown(first.cache_id[:12])}. Rows that lose their concept: {rows}. Texts: ",
            f"the splits {split}." if split else "those that the runs held out.",
        ),
        *(
            say("Trained on: ", ablation.trained_texts, " of these texts. The figures flatter the runs.")
            for ablation in study.ablations
            if ablation.trained_texts.value
        ),
        *(say(left) for ablation in study.ablations for left in ablation.left_out),
    ]
    tables = [
        _asked(study),
        _protocols(study, lambda ablation: ablation.lines, "Own code removed"),
        _protocols(study, lambda ablation: ablation.groups, "Own code removed, over seeds"),
        *_controls(study),
        *_over_seeds(study),
        *_curve_tables(study),
        *_contrast_tables(study),
        *_concept_tables(study),
    ]
    return Section(
        f"Ablation {study.number}: {rows} rows",
        tuple(dict.fromkeys(text)),
        tuple(table for table in tables if table is not None),
        tuple(chart for chart in (_protocol_chart(study), _curve_chart(study)) if chart is not None),
    )


def _setting(ablation: Ablation, name: str) -> str:
    node = ablation.config.find(name)
    if node is None:
        return ""
    return ", ".join(map(str, node.value)) if isinstance(node.value, list) else shown(str(node.value))


def _asked(study: Study) -> Table:
    rows = tuple(
        (
            cell(shown(ablation.folder)),
            cell(ablation.texts),
            cell(ablation.trained_texts),
            *(cell(ablation.chance(read_out)) for read_out in READ_OUTS),
            cell(ablation.self_check),
            cell(ablation.resamples),
        )
        for ablation in study.ablations
    )
    columns = (
        "ablation", "texts", "of these trained on", "chance, model", "chance, probe",
        "most that a probability changes when nothing is removed", "bootstrap resamples",
    )  # fmt: skip
    return Table("Ablations. Chance: the share of the most frequent label among the texts of a read-out", columns, rows)


def _called(read_out: str, removal: str) -> str:
    published = " (published)" if (read_out, removal) == PUBLISHED else ""
    return f"{shown(read_out)}, {shown(removal)}{published}"


def _of_a_protocol(line: Line) -> bool:
    """Whether a line is of one of the two protocols: the model's own answer, or all that was published."""
    return (line.read_out == "model" and line.removal not in (None, "projection")) or (
        line.read_out,
        line.removal,
    ) == PUBLISHED


def _protocols(study: Study, of: Callable[[Ablation], Sequence[Line]], what: str) -> Table | None:
    """Each run's own code by the model read-out and by the published protocol, one below the other."""
    found: list[tuple[Ablation, Line, Line | None]] = []
    for ablation, line in study.picked(of):
        if line.removed == OWN and _of_a_protocol(line):
            matched = (other for other in of(ablation) if _same(other, line) and other.removed == MATCHED)
            found.append((ablation, line, next(matched, None)))
    if not found:
        return None
    names = list(dict.fromkeys(study.called(ablation, line.run) for ablation, line, _ in found))
    found.sort(key=lambda one: (names.index(study.called(one[0], one[1].run)), order(one[1].read_out, one[1].removal)))
    seeds = any(line.seeds is not None for _, line, _ in found)
    rows = []
    for ablation, line, over in found:
        clean = next((one for one in ablation.lines if one.read_out == line.read_out and one.removal is None), None)
        rows.append(
            (
                cell(study.called(ablation, line.run)),
                cell(
                    _called(line.read_out, str(line.removal)) + ("" if line.strength == 1 else f" × {line.strength:g}")
                ),
                cell(line.seeds if seeds else shown(ablation.methods.get(line.run, ""))),
                cell(None if clean is None else clean.accuracy),
                cell(line.accuracy, _INVERTED if ablation.inverted(line) else ""),
                *(() if seeds else (cell(line.way),)),
                cell(line.flipped),
                cell(line.lost),
                cell(line.norm),
                cell(None if over is None else over.over),
                *(() if seeds else (cell(None if over is None else over.p),)),
            )
        )
    columns = (
        "runs" if seeds else "run", "read-out, removal", "seeds" if seeds else "method", "accuracy before",
        "accuracy after", *(() if seeds else ("way to chance",)), "flipped", "probability lost", "norm removed",
        "own − matched code", *(() if seeds else ("p (Holm)",)),
    )  # fmt: skip
    caption = (
        f"{what}: the model's own upper layers and head, and the published protocol (probe, projection). "
        "Means over texts with 95 % intervals; own − matched code: of the probability lost"
    )
    notes = tuple(_inversions(study, [(ablation, line) for ablation, line, _ in found]))
    return Table(caption, columns, distinct(rows), heads=2, notes=notes)


def _same(one: Line, other: Line) -> bool:
    """Whether two lines differ in what is removed alone."""
    return (one.run, one.read_out, one.removal, one.strength) == (
        other.run,
        other.read_out,
        other.removal,
        other.strength,
    )


def _inversions(study: Study, drawn: Sequence[tuple[Ablation, Line]]) -> Iterator[Cell]:
    """What an accuracy below chance is, and where it occurs; nothing where no line is of the published protocol."""
    inverted = [(ablation, line) for ablation, line in drawn if ablation.inverted(line)]
    if not inverted and not any((line.read_out, line.removal) == PUBLISHED for _, line in drawn):
        return
    named: dict[str, Cell] = {}
    for ablation, line in inverted:
        run = study.called(ablation, line.run) or "all runs"
        where = f"{run}, {_called(line.read_out, str(line.removal))}, {shown(line.removed)}: "
        named.setdefault(where, cell(line.accuracy))
    said = [part for where, accuracy in named.items() for part in ("; ", where, accuracy)][1:]
    yield say(
        "An accuracy below chance is an inversion of the class, not a removed concept: what is removed leaves chance "
        "at best. It occurs ",
        *(["here (†): ", *said, "."] if said else ["nowhere in this table."]),
    )


def _controls(study: Study) -> Iterator[Table]:
    for (read_out, removal), drawn in study.line_views(lambda ablation: ablation.lines).items():
        owners = list(dict.fromkeys(ablation.folder for ablation, _ in drawn))
        unchanged = [
            (ablation, line)
            for ablation in study.ablations
            for line in ablation.lines
            if ablation.folder in owners and line.read_out == read_out and line.removal is None
        ]
        rows = [
            (
                cell(study.called(ablation, line.run)),
                cell(shown(line.removed)),
                cell(line.texts),
                cell(line.accuracy, _INVERTED if line.removal is not None and ablation.inverted(line) else ""),
                *(
                    cell(None if line.removal is None else figure)
                    for figure in (line.way, line.flipped, line.lost, line.norm, line.over, line.p)
                ),
            )
            for ablation, line in (*unchanged, *drawn)
        ]
        columns = (
            "run", "removed", "texts", "accuracy", "way to chance", "flipped", "probability lost", "norm removed",
            "own code − this", "p (Holm)",
        )  # fmt: skip
        caption = f"Own code and controls: {_called(read_out, removal)}. Own code − this: of the probability lost"
        yield Table(caption, columns, distinct(rows), heads=2, notes=tuple(_inversions(study, drawn)))


def _over_seeds(study: Study) -> Iterator[Table]:
    for (read_out, removal), drawn in study.line_views(lambda ablation: ablation.groups).items():
        rows = [
            (
                cell(study.called(ablation, line.run)),
                cell(shown(line.removed)),
                cell(line.seeds),
                cell(line.accuracy, _INVERTED if ablation.inverted(line) else ""),
                *(cell(figure) for figure in (line.flipped, line.lost, line.norm, line.over)),
            )
            for ablation, line in drawn
        ]
        columns = (
            "runs", "removed", "seeds", "accuracy", "flipped", "probability lost", "norm removed", "own code − this"
        )  # fmt: skip
        caption = f"Own code and controls over seeds: {_called(read_out, removal)}. Intervals over texts and seeds"
        yield Table(caption, columns, distinct(rows), heads=2, notes=tuple(_inversions(study, drawn)))


def _curve_tables(study: Study) -> Iterator[Table]:
    for (read_out, removal), found in study.views(_several).items():
        curves = [curve for _, lines in found for curve in lines]
        names = [study.called(ablation, curve.group) for ablation, lines in found for curve in lines]
        strengths = sorted({float(strength.value) for curve in curves for strength in curve.strengths})
        rows = []
        for name, curve in zip(names, curves, strict=True):
            at = {float(s.value): lost for s, lost in zip(curve.strengths, curve.lost, strict=True)}
            rows.append(
                (
                    cell(name),
                    cell(shown(curve.removed)),
                    *(cell(at.get(strength)) for strength in strengths),
                    cell(curve.norm[-1]),
                    cell(curve.common),
                    cell(curve.at_common),
                    cell(curve.to_common),
                    cell(curve.flipped_to_common),
                    cell(curve.over),
                )
            )
        columns = (
            "runs", "removed", *(f"lost at strength {strength:g}" for strength in strengths), "norm at most",
            "common norm", "lost at the common norm", "lost on the way there", "flipped on the way there",
            "own code − this at equal norm",
        )  # fmt: skip
        caption = (
            f"Probability lost against norm removed: {_called(read_out, removal)}. The common norm is one that all own "
            "codes remove; on the way there: the mean over all norms up to it; own code − this: where the shorter of "
            "the two curves ends"
        )
        yield Table(caption, columns, distinct(rows), heads=2)


def _several(ablation: Ablation) -> list[Curve]:
    return list(ablation.curves) if any(len(curve.strengths) > 1 for curve in ablation.curves) else []


def _contrast_tables(study: Study) -> Iterator[Table]:
    for (read_out, removal), found in study.views(lambda ablation: ablation.contrasts).items():
        rows = [
            (
                cell(study.called(ablation, line.first)),
                cell(study.called(ablation, line.second)),
                cell(shown(line.what)),
                cell(line.difference),
                cell(line.p),
            )
            for ablation, lines in found
            for line in lines
        ]
        columns = ("first", "second", "probability lost by", "first − second", "p (Holm)")
        yield Table(f"Runs against each other: {_called(read_out, removal)}", columns, distinct(rows), heads=3)


def _concept_tables(study: Study) -> Iterator[Table]:
    for ablation in study.ablations:
        known = [effect for effect in ablation.concepts if effect.changes is not None]
        chosen = (known or ablation.concepts)[:_CONCEPTS]
        if not chosen:
            continue
        classes = max((len(effect.changes or ()) for effect in chosen), default=0)
        names = list(study.class_names or ())
        if len(names) != classes:
            names = [f"class {number}" for number in range(classes)]
        rows = []
        for effect in chosen:
            word = study.words.get((ablation.runs.get(effect.run, ""), int(effect.concept.value)))
            rows.append(
                (
                    cell(shown(effect.run)),
                    cell(effect.concept),
                    cell(None if word is None else shown(word)),
                    cell(effect.texts),
                    cell(effect.flipped),
                    cell(effect.interval or effect.lost),
                    cell(effect.control),
                    cell(effect.over),
                    cell(effect.p),
                    *(cell(change) for change in effect.changes or ()),
                    *[cell(None)] * (classes - len(effect.changes or ())),
                )
            )
        columns = (
            "run", "concept", "main word", "texts", "flipped", "probability lost", "by matched random", "own − random",
            "p (Holm)", *names,
        )  # fmt: skip
        if known:
            how = f"each removed by itself from all its rows ({_called('model', str(known[0].removal))}). Columns of "
            how += "classes: how their probability changes"
        else:
            how = f"of the rows that lost them ({_called(*_first_view(ablation))})"
        named = any(row[2].text != MISSING for row in rows)
        yield Table(
            f"Concepts that carry predictions, {shown(ablation.folder)}: the largest total effects, {how}",
            columns,
            distinct(rows),
            heads=2,
            notes=(say("Main word: of the training rows, from the concepts.parquet of a quality measurement."),)
            * named,
        )


def _first_view(ablation: Ablation) -> View:
    """By which answers and by which removal an ablation's concepts are ordered."""
    own = [line for line in ablation.lines if line.removed == OWN]
    read_out = own[0].read_out if own else "model"
    return read_out, next((str(line.removal) for line in reversed(own) if line.read_out == read_out), "–")


def _protocol_chart(study: Study) -> Chart | None:
    panels = []
    for (read_out, removal), found in study.line_views(lambda ablation: ablation.lines).items():
        if removal != "mean" and any(_of_a_protocol(line) for _, line in found):
            series = [_named(study, found, subject) for subject in (OWN, MATCHED)]
            panels.append(
                Panel(_called(read_out, removal), "probability lost", "", tuple(one for one in series if one.x))
            )
    if not panels:
        return None
    return Chart(
        f"ablation-{study.number}-effects",
        f"Own code against matched code, {_setting(study.ablations[0], 'rows_changed')} rows",
        "Probability of the predicted class lost by removing the own code, and a code of another concept that removes "
        "as much; 95 % intervals",
        tuple(panels),
    )


def _named(study: Study, found: Sequence[tuple[Ablation, Line]], subject: str) -> Series:
    points = [
        (study.called(ablation, line.run), line.lost)
        for ablation, line in found
        if line.removed == subject and line.lost is not None
    ]
    return Series(subject, subject != OWN, tuple(name for name, _ in points), tuple(lost for _, lost in points), ())


def _curve_chart(study: Study) -> Chart | None:
    panels = []
    for (read_out, removal), found in study.views(_several).items():
        series: dict[tuple[str, ...], Series] = {}
        for ablation, curve in ((ablation, curve) for ablation, curves in found for curve in curves):
            points = [(x, y) for x, y in zip(curve.norm, curve.lost, strict=True) if x is not None and y is not None]
            # A single point is no curve.
            if curve.removed in (OWN, MATCHED) and len(points) > 1:
                x, y = zip(*points, strict=True)
                name = study.called(ablation, curve.group)
                key = (name, curve.removed, *(point.cell.text for point in (*x, *y)))
                series[key] = Series(name, curve.removed != OWN, (), x, y)
        common = [curve.common for _, curves in found for curve in curves if curve.common is not None]
        if series:
            panels.append(
                Panel(
                    _called(read_out, removal),
                    "norm removed, ‖h − h′‖ / ‖h‖",
                    "probability lost",
                    tuple(series.values()),
                    min(common, key=lambda number: number.value, default=None),
                    "a norm that all own codes remove",
                )
            )
    if not panels:
        return None
    return Chart(
        f"ablation-{study.number}-curves",
        f"Effect against norm removed, {_setting(study.ablations[0], 'rows_changed')} rows",
        "Probability of the predicted class lost against the norm removed, for growing strengths of the removal; "
        "solid: own code, dashed: matched code; bars: 95 % intervals; grey: up to the common norm",
        tuple(panels),
    )
