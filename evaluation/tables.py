"""From outcomes by text to the tables of an ablation: lines, groups of seeds, contrasts of methods, curves."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64

from ..trainer.run import Run
from .bootstrap import Estimate, column_means, interval, resampled_means, resampled_over_seeds
from .controls import MATCHED, OWN, PARTNERED, Subject
from .curves import effect_at, mean_effect
from .outcome import NOTHING, Condition, Outcome
from .removal import Removal
from .significance import holm, sign_flip_p

ReadOut = Literal["model", "probe"]
OWN_EFFECT = "own code"
OVER_MATCHED = "own code − matched code"
UP_TO_EQUAL_NORM = "own code up to equal norm"

_MEASURES = ("correct", "flipped", "norm_removed", "probability_lost")
# A matched control removes the own norm but for rounding.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Line:
    """One line of the table: one condition, with estimates over the texts of its read-out that take part in it."""

    run: str
    read_out: ReadOut
    removal: Removal | None
    removed: Subject
    strength: float
    texts: int
    accuracy: Estimate
    drop: Estimate
    """Accuracy lost against the unchanged vectors."""
    drop_to_chance: Estimate
    """That, as a share of what lies between the unchanged accuracy and the share of the most frequent label."""
    flipped: Estimate
    probability_lost: Estimate
    norm_removed: Estimate
    own_minus_this: Estimate | None
    """For controls: probability lost by removing the own code, less that lost here; paired by text."""
    p: float | None
    """Of `own_minus_this` at the largest strength, by sign flips, Holm-adjusted over the controls of all runs."""


@dataclass(frozen=True)
class GroupLine:
    """A condition over runs that differ in their seed alone; intervals over texts and seeds."""

    group: str
    seeds: int
    read_out: ReadOut
    removal: Removal
    removed: Subject
    strength: float
    accuracy: Estimate
    flipped: Estimate
    probability_lost: Estimate
    norm_removed: Estimate
    own_minus_this: Estimate | None


@dataclass(frozen=True)
class Contrast:
    """Probability lost with the first group of seeds less that with the second, paired by text."""

    first: str
    second: str
    read_out: ReadOut
    removal: Removal
    what: str
    """Which probability lost: by the own code; that less the matched code's; by the own code on the average up to the
    norm that all groups remove at least."""
    difference: Estimate
    p: float | None
    """By sign flips of the texts, Holm-adjusted over the pairs of groups."""


@dataclass(frozen=True)
class Curve:
    """Effect against norm removed, from (0, 0) through one point for each strength."""

    group: str
    read_out: ReadOut
    removal: Removal
    removed: Subject
    strengths: list[float]
    norm_removed: list[Estimate]
    probability_lost: list[Estimate]
    flipped: list[Estimate]
    common_norm: float
    """The smallest mean norm that removing own codes removes in any group, at the largest strength."""
    at_common_norm: Estimate | None
    """Probability lost there, by linear interpolation; `None` where the curve ends before, and for a single strength:
    effects rise late, so that a straight line from (0, 0) would flatter what removes much."""
    mean_to_common_norm: Estimate | None
    """Probability lost on the average of all norms up to there; `None` for the same reasons."""
    mean_flipped_to_common_norm: Estimate | None
    own_minus_this: Estimate | None
    """For controls, where own codes have several strengths: probability lost by own codes less that lost by this, at
    the smaller of the norms that the two remove at the largest strength."""


@dataclass(frozen=True)
class Tables:
    """All tables but that of concepts."""

    lines: list[Line] = field(default_factory=list)
    groups: list[GroupLine] = field(default_factory=list)
    contrasts: list[Contrast] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)


def seed_groups(runs: Mapping[str, Run]) -> dict[str, list[str]]:
    """Names of runs that differ in their seed alone, by what their names have in common."""
    by_settings: dict[tuple[str, int], list[str]] = {}
    seen: Counter[str] = Counter()
    for name, run in runs.items():
        # A second run of one seed is no second seed.
        seen[run.config.model_dump_json()] += 1
        settings = run.config.model_copy(update={"seed": 0}).model_dump_json()
        by_settings.setdefault((settings, seen[run.config.model_dump_json()]), []).append(name)
    groups: dict[str, list[str]] = {}
    for members in by_settings.values():
        stem = members[0] if len(members) == 1 else re.sub(r"[\W_]*(seed[\W_]*\d*)?[\W_]*$", "", _beginning(members))
        groups[stem if stem and stem not in groups and stem not in runs else " + ".join(members)] = members
    return groups


def _beginning(names: Sequence[str]) -> str:
    """What all names begin with."""
    first, last = min(names), max(names)
    equal = [a == b for a, b in zip(first, last, strict=False)]
    return first[: equal.index(False) if False in equal else len(equal)]


def common_texts(outcomes: Mapping[Condition, Outcome]) -> Bool[np.ndarray, " text"]:
    """Texts that take part in all conditions, those that need a partner apart."""
    parts = [np.isfinite(outcome.flipped) for key, outcome in outcomes.items() if key.subject not in PARTNERED]
    found: Bool[np.ndarray, " text"] = np.logical_and.reduce(parts)
    return found


def tabulate(
    read_out: ReadOut,
    clean: Outcome,
    outcomes: Mapping[Condition, Outcome],
    labels: Float64[np.ndarray, " text"],
    groups: Mapping[str, Sequence[str]],
    *,
    seed: int,
) -> Tables:
    """All tables of one read-out, over the texts that take part in all of it."""
    part = common_texts(outcomes)
    mine = {key: outcome.only(part) for key, outcome in outcomes.items()}
    tables = Tables()
    tables.lines.extend(_lines(read_out, clean.only(part), mine, labels[part], seed))
    for removal in dict.fromkeys(key.removal for key in mine if key.removal not in (None, "mean")):
        if removal is None:
            continue
        there = {
            name: [run for run in runs if any(key.run == run and key.removal == removal for key in mine)]
            for name, runs in groups.items()
        }
        view = _View(read_out, removal, mine, {name: runs for name, runs in there.items() if runs}, seed)
        tables.groups.extend(view.group_lines())
        tables.contrasts.extend(view.contrasts())
        curves, differences = view.curves()
        tables.curves.extend(curves)
        tables.contrasts.extend(differences)
    return tables


def _lines(
    read_out: ReadOut,
    clean: Outcome,
    outcomes: Mapping[Condition, Outcome],
    labels: Float64[np.ndarray, " text"],
    seed: int,
) -> list[Line]:
    known = labels[~np.isnan(labels)]
    chance = float(np.unique(known, return_counts=True)[1].max() / len(known)) if len(known) else np.nan
    room = clean.correct - chance
    columns: list[Float64[np.ndarray, " text"]] = []
    gaps: dict[Condition, Float64[np.ndarray, " text"]] = {}
    for key, outcome in outcomes.items():
        drop = clean.correct - outcome.correct
        gap = np.full(len(labels), np.nan)
        if key.subject not in (NOTHING.subject, "whole row", OWN):
            gap = outcomes[key._replace(subject=OWN)].probability_lost - outcome.probability_lost
            gaps[key] = gap
        paired = np.where(np.isnan(drop), np.nan, room)
        values = (outcome.correct, drop, outcome.flipped, outcome.probability_lost, outcome.norm_removed, gap, paired)
        columns += values
    stacked = np.stack(columns, axis=1)
    again = resampled_means(stacked, seed=seed)
    found = [interval(float(mean), column) for mean, column in zip(column_means(stacked), again.T, strict=True)]
    p = _adjusted(gaps, max((key.strength for key in outcomes), default=1.0), seed)
    lines = []
    for place, (key, outcome) in enumerate(outcomes.items()):
        at = 7 * place
        accuracy, drop, flipped, lost, norm, over = found[at : at + 6]
        lines.append(
            Line(
                run=key.run,
                read_out=read_out,
                removal=key.removal,
                removed=key.subject,
                strength=key.strength,
                texts=int(np.isfinite(outcome.flipped).sum()),
                accuracy=accuracy,
                drop=drop,
                drop_to_chance=_share(drop.value, found[at + 6].value, again[:, at + 1], again[:, at + 6]),
                flipped=flipped,
                probability_lost=lost,
                norm_removed=norm,
                own_minus_this=over if key in gaps else None,
                p=p.get(key),
            )
        )
    return lines


def _share(
    value: float, whole: float, again: Float64[np.ndarray, " resample"], wholes: Float64[np.ndarray, " resample"]
) -> Estimate:
    """A ratio of two means; NaN where there is nothing to be a share of."""
    shares = np.divide(again, wholes, out=np.full_like(again, np.nan), where=wholes > 0)
    return interval(value / whole if whole > 0 else float("nan"), shares)


def _adjusted(
    gaps: Mapping[Condition, Float64[np.ndarray, " text"]], strongest: float, seed: int
) -> dict[Condition, float]:
    """Holm-adjusted p of the strongest conditions, each removal a family."""
    result: dict[Condition, float] = {}
    for removal in dict.fromkeys(key.removal for key in gaps):
        family = [key for key in gaps if key.removal == removal and key.strength == strongest]
        if family:
            raw = sign_flip_p(np.stack([gaps[key] for key in family], axis=1), seed)
            result |= zip(family, holm(raw).tolist(), strict=True)
    return {key: p for key, p in result.items() if not np.isnan(p)}


class _View:
    """One removal of one read-out, by groups of seeds."""

    def __init__(
        self,
        read_out: ReadOut,
        removal: Removal,
        outcomes: Mapping[Condition, Outcome],
        groups: Mapping[str, Sequence[str]],
        seed: int,
    ) -> None:
        self._read_out, self._removal, self._groups, self._seed = read_out, removal, groups, seed
        self._outcomes = {key: outcome for key, outcome in outcomes.items() if key.removal == removal}
        self._subjects = list(dict.fromkeys(key.subject for key in self._outcomes))
        self._strengths = {
            subject: sorted({key.strength for key in self._outcomes if key.subject == subject})
            for subject in self._subjects
        }

    def _values(self, group: str, subject: Subject, strength: float, name: str) -> Float64[np.ndarray, "seed text"]:
        keys = [Condition(run, self._removal, subject, strength) for run in self._groups[group]]
        return np.stack([getattr(self._outcomes[key], name) for key in keys])

    def group_lines(self) -> list[GroupLine]:
        """Lines of the groups of several seeds."""
        lines = []
        for group in (group for group, runs in self._groups.items() if len(runs) > 1):
            conditions = [(subject, strength) for subject in self._subjects for strength in self._strengths[subject]]
            columns = []
            for subject, strength in conditions:
                columns += [self._values(group, subject, strength, name) for name in _MEASURES]
                columns.append(self._values(group, OWN, strength, "probability_lost") - columns[-1])
            found = self._estimates(np.stack(columns, axis=-1))
            for subject, strength in conditions:
                accuracy, flipped, norm, lost, gap = (next(found) for _ in range(len(_MEASURES) + 1))
                lines.append(
                    GroupLine(
                        group=group,
                        seeds=len(self._groups[group]),
                        read_out=self._read_out,
                        removal=self._removal,
                        removed=subject,
                        strength=strength,
                        accuracy=accuracy,
                        flipped=flipped,
                        probability_lost=lost,
                        norm_removed=norm,
                        own_minus_this=None if subject == OWN else gap,
                    )
                )
        return lines

    def _estimates(self, values: Float64[np.ndarray, "seed text column"]) -> Iterator[Estimate]:
        again = resampled_over_seeds(values, seed=self._seed)
        for column in range(values.shape[-1]):
            yield interval(_mean(values[..., column]), again[:, column])

    def contrasts(self) -> list[Contrast]:
        """Each pair of groups, at the largest strength."""
        effects: dict[str, dict[str, Float64[np.ndarray, "seed text"]]] = {OWN_EFFECT: {}}
        strongest = self._strengths[OWN][-1]
        for group in self._groups:
            own = self._values(group, OWN, strongest, "probability_lost")
            effects[OWN_EFFECT][group] = own
            if MATCHED in self._subjects:
                control = self._values(group, MATCHED, strongest, "probability_lost")
                effects.setdefault(OVER_MATCHED, {})[group] = own - control
        found = []
        pairs = _pairs(list(self._groups))
        for what, values in effects.items() if pairs else ():
            gaps = [values[first].mean(axis=0) - values[second].mean(axis=0) for first, second in pairs]
            p = holm(sign_flip_p(np.stack(gaps, axis=1), self._seed))
            again = {
                group: resampled_over_seeds(one[..., None], seed=self._seed)[:, 0] for group, one in values.items()
            }
            for (first, second), adjusted in zip(pairs, p.tolist(), strict=True):
                difference = interval(_mean(values[first]) - _mean(values[second]), again[first] - again[second])
                found.append(self._contrast(first, second, what, difference, None if np.isnan(adjusted) else adjusted))
        return found

    def curves(self) -> tuple[list[Curve], list[Contrast]]:
        """Effect against norm for each group and subject, and the groups' own curves against each other."""
        names = ("norm_removed", "probability_lost", "flipped")
        means: dict[tuple[str, Subject], list[Float64[np.ndarray, " strength"]]] = {}
        again: dict[tuple[str, Subject], list[Float64[np.ndarray, "resample strength"]]] = {}
        for group in self._groups:
            for subject in self._subjects:
                values = np.stack(
                    [
                        self._values(group, subject, strength, name)
                        for name in names
                        for strength in self._strengths[subject]
                    ],
                    axis=-1,
                )
                middle = np.array([_mean(values[..., column]) for column in range(values.shape[-1])])
                means[group, subject] = np.split(middle, len(names))
                again[group, subject] = np.split(resampled_over_seeds(values, seed=self._seed), len(names), axis=1)
        limit = np.array(min(means[group, OWN][0][-1] for group in self._groups))
        limits = np.min([again[group, OWN][0][:, -1] for group in self._groups], axis=0)
        curves = []
        at: dict[str, tuple[float, Float64[np.ndarray, " resample"]]] = {}
        for (group, subject), (norms, lost, flipped) in means.items():
            norms_again, lost_again, flipped_again = again[group, subject]
            several = len(norms) > 1
            reached = bool(limit > 0 and norms[-1] >= limit * (1 - _ROUNDING))
            heights = (float(effect_at(norms, lost, limit)), effect_at(norms_again, lost_again, limits))
            areas = (float(mean_effect(norms, lost, limit)), mean_effect(norms_again, lost_again, limits))
            flips = (float(mean_effect(norms, flipped, limit)), mean_effect(norms_again, flipped_again, limits))
            if subject == OWN and reached and several:
                at[group] = areas
            columns = [
                [interval(float(value), column) for value, column in zip(middle, samples.T, strict=True)]
                for middle, samples in ((norms, norms_again), (lost, lost_again), (flipped, flipped_again))
            ]
            curves.append(
                Curve(
                    group=group,
                    read_out=self._read_out,
                    removal=self._removal,
                    removed=subject,
                    strengths=self._strengths[subject],
                    norm_removed=columns[0],
                    probability_lost=columns[1],
                    flipped=columns[2],
                    common_norm=float(limit),
                    at_common_norm=interval(*heights) if reached and several else None,
                    mean_to_common_norm=interval(*areas) if reached and several else None,
                    mean_flipped_to_common_norm=interval(*flips) if reached and several else None,
                    own_minus_this=_over(
                        means[group, OWN], again[group, OWN], means[group, subject], again[group, subject]
                    )
                    if subject != OWN and len(self._strengths[OWN]) > 1
                    else None,
                )
            )
        differences = []
        for first, second in _pairs(list(at)):
            difference = interval(at[first][0] - at[second][0], at[first][1] - at[second][1])
            differences.append(self._contrast(first, second, UP_TO_EQUAL_NORM, difference, None))
        return curves, differences

    def _contrast(self, first: str, second: str, what: str, difference: Estimate, p: float | None) -> Contrast:
        return Contrast(first, second, self._read_out, self._removal, what, difference, p)


def _over(
    own: Sequence[Float64[np.ndarray, " _own"]],
    own_again: Sequence[Float64[np.ndarray, "resample _own"]],
    this: Sequence[Float64[np.ndarray, " _this"]],
    this_again: Sequence[Float64[np.ndarray, "resample _this"]],
) -> Estimate:
    """The own curve less another one where the shorter of the two ends; of each the norms, then the effects."""
    gaps = []
    for first, second in ((own, this), (own_again, this_again)):
        limit = np.asarray(np.minimum(first[0][..., -1], second[0][..., -1]))
        gaps.append(effect_at(first[0], first[1], limit) - effect_at(second[0], second[1], limit))
    return interval(float(gaps[0]), gaps[1])


def _mean(values: Float64[np.ndarray, "seed text"]) -> float:
    """The mean over seeds of the means over texts."""
    return float(column_means(values.T).mean())


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(first, second) for place, first in enumerate(names) for second in names[place + 1 :]]
