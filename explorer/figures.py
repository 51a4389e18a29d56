"""The charts of a site for papers, as SVG and PNG, drawn without a browser from the site's own data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from ..cache.files import make_folder
from ..evaluation.report_figures import plain, with_any_signs
from ..trainer.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, new_figure, save_figure, style
from .data_files import read_script
from .folder import Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In the order of the pages. Shapes say which label is meant, too, for prints without colours.
_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, "#000000", "#F0E442")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_BARS = 20
# Texts without which an effect is left out of the bars.
_FEWEST = 5
_LINKS = 60
_GAP = 0.01
_WORDS = 3


def write_figures(site: Path, out: Path) -> list[Path]:
    """Write the map, the effects, purity against use, and the flow between runs into `out`; gives the files' paths.

    What the site has nothing of is not drawn. The same site gives the same bytes where matplotlib is the same.

    Raises
    ------
    DataNotFound, DataError, FormatVersion, ConfigError, DiskFull
    """
    Site.read(site)
    about = read_script(site, "site")
    overviews = {run["id"]: read_script(site, f"{run['id']}/overview") for run in about["runs"]}
    runs = {run["id"]: run for run in about["runs"]}
    figures: dict[str, Figure] = {}
    with with_any_signs():
        for name, columns in overviews.items():
            title = plain(f"{runs[name]['name']}, {runs[name]['lower']}", longest=100)
            figures[f"{name}-map"] = concept_map(columns, about["classes"], title=title)
            if any(purity is not None for purity in columns["purity"]):
                figures[f"{name}-purity"] = purity_against_use(columns, about["classes"], title=title)
            if any(effect is not None for effect in columns["effect"]):
                figures[f"{name}-effects"] = effect_bars(columns, title=title)
        for one in read_script(site, "flow"):
            lower, upper = one["lower"], one["upper"]
            figures[f"flow-{lower}-{upper}"] = flow_figure(one, runs, overviews)
        make_folder(out)
        for name, figure in figures.items():
            save_figure(out, name, figure)
    return [out / f"{name}.{kind}" for name in figures for kind in ("svg", "png")]


@style()
def concept_map(columns: Mapping[str, Any], classes: Sequence[str], *, title: str = "") -> "Figure":
    """Each concept at its place, sized by use, coloured by its most frequent label."""
    figure, (axes,) = new_figure(1, columns=2, height=5.5, title=title)
    _points(axes, np.array(columns["x"]), np.array(columns["y"]), columns, classes)
    axes.set(title="concepts by direction: near ones are alike; area is use", xlim=(-1.08, 1.08), ylim=(-1.08, 1.08))
    axes.set_xticks([])
    axes.set_yticks([])
    _legend(figure, axes)
    return figure


@style()
def purity_against_use(columns: Mapping[str, Any], classes: Sequence[str], *, title: str = "") -> "Figure":
    """Share of the most frequent label against training rows."""
    figure, (axes,) = new_figure(1, columns=2, height=3.6, title=title)
    purity = np.array([np.nan if one is None else one for one in columns["purity"]], dtype=np.float64)
    _points(axes, np.array(columns["uses"], dtype=np.float64), purity, columns, classes, size=14.0)
    axes.set(xlabel="training rows", ylabel="share of the most frequent label", xscale="log", ylim=(0, 1.03))
    if len(classes) > 1:
        axes.axhline(1 / len(classes), color=GREY, linestyle=":", linewidth=1.2, label="chance, equal classes")
    _legend(figure, axes)
    return figure


def _points(
    axes: "Axes",
    x: Float64[np.ndarray, " concept"],
    y: Float64[np.ndarray, " concept"],
    columns: Mapping[str, Any],
    classes: Sequence[str],
    *,
    size: float | None = None,
) -> None:
    uses = np.array(columns["uses"], dtype=np.float64)
    area = 6 + 250 * uses / max(1.0, uses.max(initial=1.0)) if size is None else np.full(len(uses), size)
    labels = np.array([-1 if one is None else one for one in columns["label"]], dtype=np.int64)
    for label in np.unique(labels).tolist():
        mine = labels == label
        colour = GREY if label < 0 else _COLOURS[label % len(_COLOURS)]
        axes.scatter(
            x[mine], y[mine], s=area[mine], c=colour, marker=_MARKERS[label % len(_MARKERS)] if label >= 0 else ".",
            alpha=0.6, linewidths=0.4, edgecolors="white",
            label="no label" if label < 0 else plain(str(classes[label])),
        )  # fmt: skip


@style()
def effect_bars(columns: Mapping[str, Any], *, title: str = "") -> "Figure":
    """The concepts whose removal costs the predicted class most, and those that it favours, with their intervals.

    Effects on fewer than five texts are left out, where there are others.
    """
    measured = [place for place, effect in enumerate(columns["effect"]) if effect is not None]
    known = [place for place in measured if (columns["effect_texts"][place] or _FEWEST) >= _FEWEST] or measured
    largest = sorted(known, key=lambda place: (-abs(columns["effect"][place]), place))[:_BARS]
    shown = sorted(largest, key=lambda place: -columns["effect"][place])
    figure, (axes,) = new_figure(1, columns=2, height=0.6 + 0.2 * len(shown), title=title)
    for row, place in enumerate(shown):
        value, low, high = (columns[name][place] for name in ("effect", "effect_low", "effect_high"))
        axes.barh(row, value, color=VERMILION if value > 0 else BLUE, height=0.7)
        if low is not None and high is not None:
            axes.plot([low, high], [row, row], color="black", linewidth=1, marker="|", markersize=4)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(shown)), [_called(columns, place) for place in shown])
    bounded = any(columns["effect_low"][place] is not None for place in shown)
    axes.set(
        xlabel="probability lost by the predicted class when removed" + (" (95 % interval)" if bounded else ""),
        ylim=(len(shown) - 0.4, -0.6),
    )
    axes.grid(visible=False, axis="y")
    return figure


@style()
def flow_figure(
    one: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]], overviews: Mapping[str, Mapping[str, Any]]
) -> "Figure":
    """Bands from the concepts of one run to those of another, as wide as the rows that have both."""
    links = one["links"][:_LINKS]
    called = [{code: place for place, code in enumerate(overviews[one[side]]["code"])} for side in ("lower", "upper")]
    total = max(1, sum(rows for *_, rows in links))
    most = max((len({link[side] for link in links}) for side in (0, 1)), default=0)
    title = plain(f"{runs[one['lower']]['name']} → {runs[one['upper']]['name']}", longest=100)
    figure, (axes,) = new_figure(1, columns=2, height=max(3.0, 0.13 * most), title=title)
    left = _stacked(links, 0, total)
    # Beside what they come from, so that few bands cross.
    ends = [left, _stacked(links, 1, total, beside=left)]
    for side, x, align in ((0, 0.0, "right"), (1, 1.0, "left")):
        for code, (start, length) in ends[side].items():
            axes.add_patch(_box(x, start, length))
            place = called[side].get(code)
            name = str(code) if place is None else _called(overviews[one["lower" if side == 0 else "upper"]], place)
            axes.text(x + (0.03 if side else -0.03), start + length / 2, name, ha=align, va="center", fontsize=6)
    filled = [{code: start for code, (start, _) in side.items()} for side in ends]
    for number, (first, second, rows) in enumerate(links):
        width = rows / total
        axes.add_patch(_band(filled[0][first], filled[1][second], width, _COLOURS[number % len(_COLOURS)]))
        filled[0][first] += width
        filled[1][second] += width
    height = max((start + length for side in ends for start, length in side.values()), default=1.0)
    shown, nmi = sum(rows for *_, rows in links), one["nmi"]
    axes.set(
        xlim=(-0.75, 1.75),
        ylim=(height + 0.02, -0.02),
        title=f"the {len(links)} largest links, {shown / max(1, one['rows']):.0%} of {one['rows']:,} rows"
        + ("" if nmi is None else f"; normalised mutual information {nmi:.2f}"),
    )
    axes.set_axis_off()
    return figure


def _stacked(
    links: Sequence[Sequence[int]], side: int, total: int, *, beside: Mapping[int, tuple[float, float]] | None = None
) -> dict[int, tuple[float, float]]:
    """Code → where its bands begin and how long they are together.

    The longest come first, or those whose bands come from the first ones on the other side.
    """
    lengths: dict[int, float] = {}
    middles: dict[int, float] = {}
    for link in links:
        length = link[2] / total
        lengths[link[side]] = lengths.get(link[side], 0.0) + length
        if beside is not None:
            start, whole = beside[link[1 - side]]
            middles[link[side]] = middles.get(link[side], 0.0) + length * (start + whole / 2)
    places, at = {}, 0.0
    for code in sorted(lengths, key=lambda code: (middles.get(code, 0.0) / lengths[code], -lengths[code], code)):
        places[code] = (at, lengths[code])
        at += lengths[code] + _GAP
    return places


def _box(x: float, start: float, length: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.015, start), 0.03, length, facecolor=GREY, linewidth=0)


def _band(left: float, right: float, width: float, colour: str) -> Any:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    points = [
        (0.015, left), (0.5, left), (0.5, right), (0.985, right),
        (0.985, right + width), (0.5, right + width), (0.5, left + width), (0.015, left + width), (0.015, left),
    ]  # fmt: skip
    curve, line = Outline.CURVE4, Outline.LINETO
    codes = [Outline.MOVETO, curve, curve, curve, line, curve, curve, curve, Outline.CLOSEPOLY]
    return PathPatch(Outline(points, codes), facecolor=colour, alpha=0.45, linewidth=0)


def _called(columns: Mapping[str, Any], place: int) -> str:
    words = " · ".join(columns["words"][place][:_WORDS])
    return plain(f"{columns['code'][place]}: {words}")


def _legend(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        made = figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(handles)))
        for handle in made.legend_handles:
            if handle is not None and hasattr(handle, "set_sizes"):
                handle.set_sizes([30])
