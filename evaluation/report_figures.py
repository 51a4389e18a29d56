"""The figures of a report: intervals by name, and effect against norm removed."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ..trainer.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, new_figure, style
from .report_document import Chart, Measured, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY, "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SHADE = "#F1F1F1"
_LONGEST = 36
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


@style()
def draw(chart: Chart) -> "Figure":
    """The figure of a chart; the same chart gives the same bytes where matplotlib is the same."""
    if all(series.labels for panel in chart.panels for series in panel.series):
        return _intervals(chart)
    return _curves(chart)


@contextmanager
def with_any_signs() -> Iterator[None]:
    """Names may have signs that the font lacks: a box stands for them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        yield


def _intervals(chart: Chart) -> "Figure":
    labels = list(dict.fromkeys(label for panel in chart.panels for series in panel.series for label in series.labels))
    shared = any(_overlap(panel.series) for panel in chart.panels)
    height = 0.75 + len(labels) * (0.3 if shared else 0.2)
    figure, grid = new_figure(len(chart.panels), columns=3, height=height, title=plain(chart.title, longest=100))
    for number, (axes, panel) in enumerate(zip(grid, chart.panels, strict=True)):
        for place, series in enumerate(panel.series):
            shift = 0.18 * (2 * place - 1) if shared else 0.0
            at = [labels.index(label) + shift for label in series.labels]
            colour, marker = (GREY, "D") if series.control else (BLUE, "o")
            axes.errorbar(
                _middles(series.x), at, xerr=_bars(series.x),
                fmt=marker, color=colour, markerfacecolor="white" if series.control else colour,
                markersize=4, elinewidth=1.2, capsize=2, label=plain(series.name),
            )  # fmt: skip
        axes.axvline(0, color=GREY, linewidth=0.8, zorder=0)
        axes.set(
            title=plain(panel.title, longest=60),
            xlabel=plain(panel.x_label, longest=60),
            ylim=(len(labels) - 0.4, -0.6),
        )
        axes.set_yticks(range(len(labels)), [plain(label) for label in labels] if number % 3 == 0 else [])
        axes.grid(visible=False, axis="y")
    _legend(figure, _once(grid))
    return figure


def _overlap(series: Sequence[Series]) -> bool:
    """Whether a name has points of several series."""
    together = [label for one in series for label in one.labels]
    return len(set(together)) < len(together)


def _curves(chart: Chart) -> "Figure":
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(series.name for panel in chart.panels for series in panel.series))
    figure, grid = new_figure(len(chart.panels), columns=2, height=2.6, title=plain(chart.title, longest=100))
    for axes, panel in zip(grid, chart.panels, strict=True):
        for series in panel.series:
            _curve(axes, series, names.index(series.name))
        if panel.marked_x is not None:
            axes.axvspan(0, panel.marked_x.value, color=_SHADE, linewidth=0, zorder=0)
            axes.axvline(panel.marked_x.value, color=GREY, linestyle=":", linewidth=1.2, zorder=1)
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
        axes.set(
            title=plain(panel.title, longest=60), xlabel=plain(panel.x_label, longest=60), ylabel=plain(panel.y_label)
        )
        axes.set_xlim(left=0)
    handles: list[Any] = [
        Line2D([], [], color=_colour(number), marker=_marker(number), label=plain(name))
        for number, name in enumerate(names)
    ]
    if any(series.control for panel in chart.panels for series in panel.series):
        handles += [
            Line2D([], [], color=GREY, label="own code"),
            Line2D([], [], color=GREY, linestyle="--", label="matched code"),
        ]
    marks = dict.fromkeys(panel.mark for panel in chart.panels if panel.marked_x is not None)
    handles += [Patch(color=_SHADE, label=plain(f"up to {mark}", longest=60)) for mark in marks]
    _legend(figure, handles)
    return figure


def _curve(axes: "Axes", series: Series, number: int) -> None:
    x, y = (np.array([0.0, *_middles(points)]) for points in (series.x, series.y))
    colour, line = _colour(number), "--" if series.control else "-"
    axes.plot(x, y, color=colour, linestyle=line, alpha=0.7 if series.control else 1.0)
    axes.errorbar(
        x[1:], y[1:], xerr=_bars(series.x), yerr=_bars(series.y),
        fmt=_marker(number), color=colour, markerfacecolor="white" if series.control else colour,
        markersize=4, elinewidth=0.9, capsize=2, alpha=0.7 if series.control else 1.0,
    )  # fmt: skip


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _marker(number: int) -> str:
    return _MARKERS[number % len(_MARKERS)]


def _middles(points: Sequence[Measured]) -> list[float]:
    return [float(point.value.value) for point in points]


def _bars(points: Sequence[Measured]) -> Any:
    """Lengths of the error bars below and above; 0 where there is no interval, or it leaves the value out."""
    ends = [(point.value.value if end is None else end.value) for point in points for end in (point.low, point.high)]
    low, high = np.array(ends, dtype=np.float64).reshape(-1, 2).T
    middle = np.array(_middles(points))
    return np.stack([(middle - low).clip(0), (high - middle).clip(0)])


def _once(grid: Sequence["Axes"]) -> list[Any]:
    found: dict[str, Any] = {}
    for axes in grid:
        handles, labels = axes.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            found.setdefault(label, handle)
    return list(found.values())


def _legend(figure: "Figure", handles: list[Any]) -> None:
    # The legend's font is about so wide, in inches; a handle stands before each label.
    width = 0.062 * max(len(handle.get_label()) for handle in handles) + 0.5
    columns = int(np.clip(figure.get_figwidth() // width, 1, len(handles)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def plain(text: str, *, longest: int = _LONGEST) -> str:
    """Text that is drawn as it is: no mathematics, and no sign at its front that hides it from a legend.

    Signs that XML forbids, and an SVG with them is none, are replaced.
    """
    text = _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
    short = text if len(text) <= longest else f"{text[: longest // 2]}…{text[1 - longest // 2 :]}"
    return f"{' ' if short.startswith('_') else ''}{short}".replace("$", r"\$")
