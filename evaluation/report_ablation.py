"""The ablations of a folder, read from their `ablation.json`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..errors import FormatVersion
from .report_document import (
    Measured,
    Number,
    shown,
)
from .report_files import Node
from .report_runs import computed
from .results import ABLATION_VERSION

OWN, MATCHED, NOTHING = "own code", "matched code", "nothing"
_LOST = "+.3f"
# Whose answer says what a removal did, and in which order removals stand: evidence first.
READ_OUTS = ("model", "probe")
_REMOVALS = ("centred", "subspace", "offset", "mean", "projection")
PUBLISHED = ("probe", "projection")
_RUNS = "runs"
View = tuple[str, str]


@dataclass(frozen=True)
class Line:
    """One condition, of a run or of runs that differ in their seed alone."""

    run: str
    read_out: str
    removal: str | None
    removed: str
    strength: float
    texts: Number | None
    """`None` over seeds, as are `way` and `p`."""
    seeds: Number | None
    accuracy: Measured | None
    way: Measured | None
    """Accuracy lost, as a share of what lies between the unchanged one and chance."""
    drop: Measured | None
    flipped: Measured | None
    lost: Measured | None
    norm: Measured | None
    over: Measured | None
    p: Number | None


@dataclass(frozen=True)
class Contrast:
    """Two groups of runs against each other."""

    first: str
    second: str
    read_out: str
    removal: str
    what: str
    difference: Measured | None
    p: Number | None


@dataclass(frozen=True)
class Curve:
    """Effect against norm removed."""

    group: str
    read_out: str
    removal: str
    removed: str
    strengths: tuple[Number, ...]
    norm: tuple[Measured | None, ...]
    lost: tuple[Measured | None, ...]
    common: Number | None
    at_common: Measured | None
    to_common: Measured | None
    flipped_to_common: Measured | None
    over: Measured | None
    """The own code's curve above this one, where the shorter of the two ends."""


@dataclass(frozen=True)
class Concept:
    """What removing one concept did."""

    run: str
    concept: Number
    texts: Number
    removal: str | None
    flipped: Number
    lost: Number
    interval: Measured | None
    control: Measured | None
    over: Measured | None
    p: Number | None
    changes: tuple[Number, ...] | None


Viewed = TypeVar("Viewed", Contrast, Curve)


@dataclass(frozen=True)
class Ablation:
    """An `ablation.json`."""

    folder: str
    file: str
    cache_id: str
    model: Node | None
    """The model's identity."""
    clvq: str | None
    config: Node
    runs: Mapping[str, str]
    """Name → SHA-256 of the model, in the order in which the tables have them."""
    methods: Mapping[str, str]
    texts: Number
    trained_texts: Number
    self_check: Number | None
    resamples: Number | None
    lines: tuple[Line, ...]
    groups: tuple[Line, ...]
    contrasts: tuple[Contrast, ...]
    curves: tuple[Curve, ...]
    concepts: tuple[Concept, ...]
    left_out: tuple[str, ...]

    @property
    def asks(self) -> tuple[str, ...]:
        """What ablations must have in common to stand in one table: the cache, and which texts and rows are changed."""
        names = ("rows_changed", "saliency", "split", "max_texts", "seed")
        return (
            self.cache_id,
            *(repr(None if (node := self.config.find(name)) is None else node.value) for name in names),
        )

    @property
    def strongest(self) -> float:
        """The largest strength."""
        return max((line.strength for line in self.lines if line.removal is not None), default=1.0)

    def full(self, lines: Sequence[Line]) -> list[Line]:
        """Lines at the largest strength, and those where nothing is removed."""
        return [line for line in lines if line.removal is None or line.strength == self.strongest]

    def chance(self, read_out: str) -> Number | None:
        """The share of the most frequent label, as far as the lines tell it."""
        clean = next((line for line in self.lines if line.read_out == read_out and line.removal is None), None)
        for line in self.lines:
            drop, way = line.drop, line.way
            if line.read_out != read_out or clean is None or clean.accuracy is None or drop is None or way is None:
                continue
            if way.value.value:
                chance = clean.accuracy.value.value - drop.value.value / way.value.value
                rule = "accuracy unchanged − accuracy lost / way to chance"
                return computed(chance, ".3f", rule, clean.accuracy.value, drop.value, way.value)
        return None

    def inverted(self, line: Line) -> bool:
        """Whether accuracy lies below chance."""
        if line.way is not None:
            return line.way.value.value > 1
        chance = self.chance(line.read_out)
        return (
            line.seeds is not None
            and line.accuracy is not None
            and chance is not None
            and line.accuracy.value.value < chance.value
        )


def read_ablation(folder: str, root: Node) -> Ablation:
    """An `ablation.json`.

    Raises
    ------
    DataError
        Where it is damaged.
    FormatVersion
        Where another version of clvq wrote it.
    """
    version = root.at("settings").find("version")
    if version is None or version.value != ABLATION_VERSION:
        raise FormatVersion(
            f"it is of format version {None if version is None else version.value!r}, and {ABLATION_VERSION} is read: "
            "run `clvq ablate` again"
        )
    settings, origin = root.at("settings"), root.find("provenance")
    lines = tuple(_line(node) for node in root.at("lines").each())
    hashes = {name: node.text() for name, node in settings.at(_RUNS).members().items()}
    order = [line.run for line in lines if line.run in hashes]
    methods = (
        {} if origin is None else {name: node.at("method").text() for name, node in origin.at(_RUNS).members().items()}
    )
    clvq = None if origin is None else origin.find("clvq")
    return Ablation(
        folder=folder,
        file=root.source.file,
        cache_id=settings.at("cache_id").text(),
        model=None if origin is None else origin.find("model"),
        clvq=None if clvq is None else clvq.text(),
        config=settings.at("config"),
        runs={name: hashes[name] for name in dict.fromkeys([*order, *hashes])},
        methods=methods,
        texts=root.at("texts").number(","),
        trained_texts=root.at("trained_texts").number(","),
        self_check=root.maybe("self_check", ".1e"),
        resamples=root.maybe("bootstrap_resamples", ","),
        lines=lines,
        groups=tuple(_line(node) for node in root.at("groups").each()),
        contrasts=tuple(_contrast(node) for node in root.at("contrasts").each()),
        curves=tuple(_curve(node) for node in root.at("curves").each()),
        concepts=tuple(_concept(node) for node in root.at("concepts").each()),
        left_out=tuple(
            f"{shown(node.at('run').text())} is left out of the removal {shown(node.at('removal').text())}: "
            f"{shown(node.at('why').text())}."
            for node in root.at("left_out").each()
        ),
    )


def _line(node: Node) -> Line:
    group, removal = node.find("group"), node.find("removal")
    return Line(
        run=(node.at("run") if group is None else group).text(),
        read_out=node.at("read_out").text(),
        removal=None if removal is None else removal.text(),
        removed=node.at("removed").text(),
        strength=float(node.at("strength").number("g").value),
        texts=node.maybe("texts", ","),
        seeds=node.maybe("seeds", ","),
        accuracy=node.measured("accuracy", ".3f"),
        way=node.measured("drop_to_chance", ".2f"),
        drop=node.measured("drop", "+.3f"),
        flipped=node.measured("flipped", ".3f"),
        lost=node.measured("probability_lost", _LOST),
        norm=node.measured("norm_removed", ".3f"),
        over=node.measured("own_minus_this", _LOST),
        p=node.maybe("p", ".4f"),
    )


def _contrast(node: Node) -> Contrast:
    first, second, read_out, removal, what = (
        node.at(name).text() for name in ("first", "second", "read_out", "removal", "what")
    )
    return Contrast(first, second, read_out, removal, what, node.measured("difference", _LOST), node.maybe("p", ".4f"))


def _curve(node: Node) -> Curve:
    group, read_out, removal, removed = (node.at(name).text() for name in ("group", "read_out", "removal", "removed"))
    strengths = tuple(strength.number("g") for strength in node.at("strengths").each())
    points = []
    for name, form in (("norm_removed", ".3f"), ("probability_lost", _LOST)):
        points.append(tuple(point.estimate(form) for point in node.at(name).each()))
        if len(points[-1]) != len(strengths):
            node.at(name).fail(f"it has {len(points[-1])} points for {len(strengths)} strengths")
    return Curve(
        group=group,
        read_out=read_out,
        removal=removal,
        removed=removed,
        strengths=strengths,
        norm=points[0],
        lost=points[1],
        common=node.maybe("common_norm", ".3f"),
        at_common=node.measured("at_common_norm", _LOST),
        to_common=node.measured("mean_to_common_norm", _LOST),
        flipped_to_common=node.measured("mean_flipped_to_common_norm", ".3f"),
        over=node.measured("own_minus_this", _LOST),
    )


def _concept(node: Node) -> Concept:
    changes, removal = node.find("class_changes"), node.find("removal")
    return Concept(
        run=node.at("run").text(),
        concept=node.at("concept").number("d"),
        texts=node.at("texts").number(","),
        removal=None if removal is None else removal.text(),
        flipped=node.at("flipped").number(".3f"),
        lost=node.at("probability_lost").number(_LOST),
        interval=node.measured("lost", _LOST),
        control=node.measured("control_lost", _LOST),
        over=node.measured("own_minus_control", _LOST),
        p=node.maybe("p", ".4f"),
        changes=None if changes is None else tuple(change.number(_LOST) for change in changes.each()),
    )


@dataclass(frozen=True)
class Study:
    """Ablations of one cache that change the same rows of the same texts, and what is known about their concepts."""

    number: int
    ablations: tuple[Ablation, ...]
    class_names: Sequence[str] | None
    words: Mapping[tuple[str, int], str]
    """Main word of a concept, by the run's SHA-256 and the concept's number."""

    def called(self, ablation: Ablation, run: str) -> str:
        """A run's or group's name; with the ablation's where another one means something else by it."""
        for other in self.ablations:
            groups = {line.run for line in other.groups} | {curve.group for curve in other.curves}
            same = other.runs[run] == ablation.runs.get(run) if run in other.runs else other.runs == ablation.runs
            if (run in other.runs or run in groups) and not same:
                return f"{shown(run)} ({shown(ablation.folder)})"
        return shown(run)

    def picked(self, of: Callable[[Ablation], Sequence[Line]]) -> list[tuple[Ablation, Line]]:
        """Lines at the largest strength, each once: of the ablation with most controls, which adjusts p for most."""
        best: dict[tuple[object, ...], tuple[int, Ablation, Line]] = {}
        for ablation in self.ablations:
            lines = ablation.full(of(ablation))
            controls = len({line.removed for line in lines})
            for line in lines:
                name = self.called(ablation, line.run)
                key = (name, line.read_out, line.removal, line.removed, line.strength)
                if key not in best or controls > best[key][0]:
                    best[key] = (controls, ablation, line)
        return [(ablation, line) for _, ablation, line in best.values()]

    def line_views(self, of: Callable[[Ablation], Sequence[Line]]) -> dict[View, list[tuple[Ablation, Line]]]:
        """What `picked` gives, by read-out and removal; evidence first."""
        found: dict[View, list[tuple[Ablation, Line]]] = {}
        for ablation, line in self.picked(of):
            if line.removal is not None:
                found.setdefault((line.read_out, line.removal), []).append((ablation, line))
        return dict(sorted(found.items(), key=lambda item: order(*item[0])))

    def views(self, lines: Callable[[Ablation], Sequence[Viewed]]) -> dict[View, list[tuple[Ablation, list[Viewed]]]]:
        """What each ablation has of some kind of line, by read-out and removal; evidence first."""
        found: dict[View, list[tuple[Ablation, list[Viewed]]]] = {}
        for ablation in self.ablations:
            own = lines(ablation)
            for view in dict.fromkeys((line.read_out, line.removal) for line in own if line.removal is not None):
                mine = [line for line in own if (line.read_out, line.removal) == view]
                found.setdefault((view[0], str(view[1])), []).append((ablation, mine))
        return dict(sorted(found.items(), key=lambda item: order(*item[0])))


def studies(
    ablations: Sequence[Ablation], class_names: Mapping[str, Sequence[str]], words: Mapping[tuple[str, int], str]
) -> list[Study]:
    """The ablations that belong together; names of classes are by cache."""
    groups: dict[tuple[str, ...], list[Ablation]] = {}
    for ablation in ablations:
        groups.setdefault(ablation.asks, []).append(ablation)
    return [
        Study(number, tuple(members), class_names.get(members[0].cache_id), words)
        for number, members in enumerate(groups.values(), start=1)
    ]


def order(read_out: str, removal: str | None) -> tuple[int, int]:
    """Evidence first: by whose answer says what a removal did."""

    def place(name: str | None, known: Sequence[str]) -> int:
        return known.index(name) if name in known else len(known)

    return place(read_out, READ_OUTS), place(removal, _REMOVALS)
