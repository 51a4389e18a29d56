"""Two figures of a run, each as SVG and PNG: how it learnt, and how it uses its codebook."""

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
from jaxtyping import Float, Float32, Int64

from ..cache.files import write_file
from .config import TrainConfig
from .folder import CODEBOOK, LEARNING_CURVES, METRICS, MODEL, NETWORK, REPORT, read_config
from .measure import perplexity
from .run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe & Ito (2008): told apart with every common colour blindness.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555",
)  # fmt: skip
_SIDES = {"held_out": BLUE, "train": VERMILION, "": GREY}
# For several lines of a side: none of the sides' colours.
_NAMES = (PURPLE, ORANGE, SKY, GREY)

_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
    "legend.fontsize": 7,
    "legend.handlelength": 1.5,
    "legend.borderaxespad": 0.3,
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "lines.linewidth": 1.3,
    "lines.markersize": 3,
    # Fixed, so that the same run gives the same bytes.
    "svg.hashsalt": "clvq",
}
_BEFORE, _DEAD = "#EFEFEF", "#F3D9C9"

_IN_USE = "codes in use"
# A logarithmic axis pays from this ratio of the largest to the smallest value on.
_WIDE = 20.0
# Concepts whose nearest neighbour is sought; all the others are searched for each of them.
_SAMPLE = 4096
_BLOCK = 256


@dataclass(frozen=True)
class Place:
    """Where a figure of `metrics.jsonl` belongs."""

    group: str
    """`loss`, `fvu`, `codebook`, `optimizer`, `time` or `other`."""
    side: str
    """`train`, `held_out`, or empty."""
    name: str
    """What is left of the figure's own name."""

    @classmethod
    def of(cls, figure: str) -> "Place":
        """The place of a figure, by the pattern of its name."""
        side = next((side for side in ("train", "held_out") if figure.startswith(f"{side}_")), "")
        name = figure.removeprefix(f"{side}_")
        if name.startswith("loss_"):
            return cls("loss", side, name.removeprefix("loss_"))
        if "fvu" in name.split("_"):
            return cls("fvu", side, "_".join(word for word in name.split("_") if word != "fvu") or "all")
        if "code" in name or "perplexity" in name:
            return cls("codebook", side, name)
        if name == "lr" or name.startswith("lr_"):
            return cls("optimizer", side, name)
        if name == "seconds" or name.endswith(("_seconds", "_per_second", "_share")):
            return cls("time", side, name)
        return cls("other", side, name)


@dataclass(frozen=True)
class Concepts:
    """What a finished run knows of its concepts."""

    counts: Int64[np.ndarray, " code"]
    """Training rows of each."""
    means: Mapping[str, Float32[np.ndarray, "code _"]]
    """Site → the mean of each concept's training rows there."""
    codes: Float32[np.ndarray, "code d"] | None = None
    """The codebook, where the run has one."""

    @classmethod
    def of(cls, path: Path) -> "Concepts":
        """Those of the finished run in a folder.

        Raises
        ------
        RunNotFound, FormatVersion
        """
        run, name = Run.from_pretrained(path), f"{NETWORK}quantizer.codebook"
        with safetensors.safe_open(path / MODEL, framework="numpy") as file:
            codes = file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 — not a mapping
        # One site may be both.
        means = {run.config.upper: run.upper_table} | {run.config.lower: run.concept_means}
        return cls(run.counts, dict(reversed(means.items())), codes)


def write_figures(out: Path) -> None:
    """Write the learning curves and the codebook of the finished run in `out` there, as SVG and PNG.

    The same run gives the same bytes where matplotlib is the same.

    Raises
    ------
    RunNotFound
        Where the folder is not a run, or an unfinished or damaged one.
    FormatVersion, DiskFull
    """
    config, concepts = read_config(out).config, Concepts.of(out)
    report = json.loads((out / REPORT).read_bytes())
    lines = (out / METRICS).read_bytes().splitlines() if (out / METRICS).is_file() else []
    name = config.preset if isinstance(config, TrainConfig) and config.method == "clvq-vae" else config.method
    title = f"{name}, {config.lower} → {config.upper}, {len(concepts.counts):,} codes, seed {config.seed}"
    metrics, codes = [json.loads(line) for line in lines], len(concepts.counts)
    # Some methods have no epochs.
    if metrics:
        curves = learning_curves(metrics, best_epoch=report.get("best_epoch"), codes=codes, title=title)
        save_figure(out, LEARNING_CURVES, curves)
    save_figure(out, CODEBOOK, codebook_health(concepts, title=title))


@contextmanager
def style() -> Iterator[None]:
    """Draw in the style of all of clvq's figures, whatever the person's own is."""
    import matplotlib

    with matplotlib.rc_context():
        # A figure does not depend on who makes it: a person's own matplotlibrc is put aside for the while.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


@style()
def learning_curves(
    metrics: Sequence[Mapping[str, Any]], *, best_epoch: int | None = None, codes: int | None = None, title: str = ""
) -> "Figure":
    """A panel for each part of the loss, for the FVUs, for the codes in use, for the rate, and for what else is there.

    Parameters
    ----------
    metrics
        The lines of `metrics.jsonl`. Which figures they hold is theirs to say; `time` is left to other displays.
    best_epoch
        Marked in every panel, as are the phases before `train`.
    codes
        Size of the codebook, to which the codes in use are compared.
    """
    panels = _panels(metrics)
    figure, grid = new_figure(max(len(panels), 1), columns=3, height=1.75, title=title)
    epochs = np.array([line["epoch"] for line in metrics], dtype=np.float64)
    before = [line for line in metrics if line.get("phase", "train") != "train"]
    for axes, (heading, series) in zip(grid, panels.items(), strict=False):
        _curves(axes, epochs, series, heading=heading, codes=codes)
        if before:
            first, last = before[0]["epoch"], before[-1]["epoch"]
            axes.axvspan(first - 0.5, last + 0.5, color=_BEFORE, linewidth=0, zorder=0)
        if best_epoch is not None:
            axes.axvline(best_epoch, color=GREEN, linestyle=":", linewidth=1.2, zorder=1)
        axes.set(title=heading, xlabel="epoch", xlim=(epochs.min() - 0.5, epochs.max() + 0.5))
        _whole(axes.xaxis)
    if not panels:
        nothing(grid[0], "no epoch was measured")
    _key(figure, before=list(dict.fromkeys(line["phase"] for line in before)), best_epoch=best_epoch)
    return figure


@style()
def codebook_health(concepts: Concepts, *, title: str = "") -> "Figure":
    """Use of the codes by rank, norms of the codes, and spread and nearest neighbours of the concepts' centred means.

    A mean is centred by the mean of all training rows. Where there are more than 4,096 used concepts, the
    neighbours of a seeded sample of so many are shown, sought among all.
    """
    figure, (use, norms, spread, near) = new_figure(4, columns=2, height=2.4, title=title)
    _use(use, concepts.counts)
    used = concepts.counts > 0
    if concepts.codes is None:
        nothing(norms, "the model has no codebook")
    else:
        lengths = np.linalg.norm(concepts.codes, axis=1)
        _histogram(norms, {"used codes": lengths[used], "dead codes": lengths[~used]})
    deviations = {site: _centred(means, concepts.counts) for site, means in concepts.means.items()}
    _histogram(spread, {site: np.linalg.norm(rows, axis=1) for site, rows in deviations.items()})
    _histogram(near, {site: nearest_cosines(rows) for site, rows in deviations.items()}, cosines=True)
    norms.set(title="norms of the codes", xlabel="norm, in the space that is quantised", ylabel="codes")
    spread.set(title="distance of concepts from the mean row", xlabel="distance, in the site's units")
    sample = f" ({_SAMPLE:,} sampled)" if used.sum() > _SAMPLE else ""
    near.set(title=f"nearest other concept{sample}", xlabel="cosine of the centred means")
    for axes in (spread, near):
        axes.set_ylabel("concepts")
    return figure


def nearest_cosines(deviations: Float[np.ndarray, "concept d"], *, seed: int = 0) -> Float32[np.ndarray, " sample"]:
    """The cosine of each concept with the one that is nearest to it in direction, itself excepted.

    Of at most 4,096 concepts, sampled where there are more; of none where there are fewer than two.
    A concept that lies on the mean has no direction and is left out.
    """
    lengths = np.linalg.norm(deviations, axis=1)
    kept = np.isfinite(lengths) & (lengths > 0)
    units = (deviations[kept] / lengths[kept, None]).astype(np.float32)
    picked = np.arange(len(units))
    if len(units) > _SAMPLE:
        picked = np.sort(np.random.default_rng(seed).choice(len(units), _SAMPLE, replace=False))
    nearest = np.empty(len(picked) if len(units) > 1 else 0, dtype=np.float32)
    for start in range(0, len(nearest), _BLOCK):
        own = picked[start : start + _BLOCK]
        cosines = units[own] @ units.T
        cosines[np.arange(len(own)), own] = -np.inf
        nearest[start : start + len(own)] = cosines.max(axis=1)
    return nearest.clip(-1, 1)


def _centred(
    means: Float32[np.ndarray, "code d"], counts: Int64[np.ndarray, " code"]
) -> Float32[np.ndarray, "concept d"]:
    """Means of the used concepts less the mean of all rows."""
    used = counts > 0
    mean = np.einsum("c,cd->d", counts[used] / max(counts.sum(), 1), means[used])
    deviations: Float32[np.ndarray, "concept d"] = means[used] - mean.astype(np.float32)
    return deviations


def _panels(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[Place, list[float]]]]:
    """Heading → the figures drawn under it, each with its value in every epoch; NaN where it has none."""
    names = dict.fromkeys(name for line in metrics for name in line if name not in ("epoch", "phase"))
    panels: dict[tuple[int, str], list[tuple[Place, list[float]]]] = {}
    for name in names:
        place = Place.of(name)
        values = [float(line[name]) if _is_number(line.get(name)) else math.nan for line in metrics]
        if place.group != "time":
            panels.setdefault(_heading(place), []).append((place, values))
    return {heading: panels[order, heading] for order, heading in sorted(panels, key=lambda key: key[0])}


def _heading(place: Place) -> tuple[int, str]:
    """A panel's place among the others, and what stands above it."""
    if place.group == "loss":
        return (0 if place.name == "total" else 1), f"loss: {_words(place.name)}"
    if place.group == "fvu":
        return 2, "variance unexplained (FVU)"
    if place.group == "codebook" and (place.name.endswith("codes") or "perplexity" in place.name):
        return 3, _IN_USE
    if place.group == "optimizer":
        return 5, "learning rate" if place.name == "lr" else _words(place.name)
    return 4, _words(place.name)


def _curves(
    axes: "Axes",
    epochs: Float[np.ndarray, " epoch"],
    series: list[tuple[Place, list[float]]],
    *,
    heading: str,
    codes: int | None,
) -> None:
    everything = np.array([values for _, values in series])
    if not np.isfinite(everything).any():
        nothing(axes, "no finite values")
        return
    names = list(dict.fromkeys(place.name for place, _ in series))
    for place, values in series:
        train = place.side == "train"
        colour = _SIDES[place.side] if len(names) == 1 else _NAMES[names.index(place.name) % len(_NAMES)]
        label = f"{_words(place.name)}{' (train)' if train else ''}"
        marker = "o" if len(epochs) <= 30 else ""
        axes.plot(epochs, values, color=colour, linestyle="--" if train else "-", marker=marker, label=label)
    group, counted = series[0][0].group, heading == _IN_USE
    if counted and codes is not None:
        axes.axhline(codes, color=GREY, linestyle=(0, (1, 1)), linewidth=1, label=f"all {codes:,}")
        everything = np.append(everything, codes)
    _scale(axes, everything, wide=1.0 if group == "optimizer" else _WIDE, from_zero=counted or group == "fvu")
    axes.set_ylabel({"loss": "mean over rows", "fvu": "share", "codebook": "codes" if counted else ""}.get(group, ""))
    if len(names) > 1 or counted:
        axes.legend(loc="best")


def _scale(axes: "Axes", values: Float[np.ndarray, "..."], *, wide: float, from_zero: bool) -> None:
    """A logarithmic axis where values are positive and at least `wide` times apart."""
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(finite.max())
    if low > 0 and high >= wide * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.6, high * 1.6)
        _few_ticks(axes.yaxis)
    elif from_zero and low >= 0:
        axes.set_ylim(0, high * 1.08 or 1)


def _whole(axis: "Axis") -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _few_ticks(axis: "Axis") -> None:
    """Plain numbers on a logarithmic axis, at 1, 2 and 5 where powers of ten alone are too few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if high < 200 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if 1 <= value < 1e6 else f"{value:g}"))


def _use(axes: "Axes", counts: Int64[np.ndarray, " code"]) -> None:
    """Training rows of each code, by rank."""
    axes.set(title="use of the codes", xlabel="code, by rank", ylabel="training rows")
    ordered = np.sort(counts[counts > 0])[::-1]
    dead, rows = len(counts) - len(ordered), int(counts.sum())
    if rows == 0:
        nothing(axes, f"none of the {len(counts):,} codes has a training row")
        return
    # A thousand points are a smooth curve; each code a point would make the file as large as the codebook.
    ranks = np.unique(np.geomspace(1, len(ordered), 1000).round().astype(np.int64))
    axes.plot(ranks, ordered[ranks - 1], color=BLUE, marker="o" if len(ranks) <= 30 else "", label="rows of a code")
    axes.axhline(rows / len(counts), color=GREY, linestyle="--", linewidth=1, label="all codes used equally")
    if dead:
        label = f"{dead:,} dead ({dead / len(counts):.1%})"
        axes.axvspan(len(ordered) + 0.5, len(counts) + 0.5, color=_DEAD, linewidth=0, zorder=0, label=label)
    axes.set(xscale="log", yscale="log", xlim=(0.8, len(counts) * 1.25))
    axes.set_ylim(min(ordered[-1], rows / len(counts)) / 1.6, ordered[0] * 1.6)
    _few_ticks(axes.xaxis)
    _few_ticks(axes.yaxis)
    dead_note = "" if dead else ", none dead"
    axes.set_title(f"use of the codes: perplexity {perplexity(counts):,.1f} of {len(counts):,}{dead_note}")
    axes.legend(loc="best")


def _histogram(axes: "Axes", series: Mapping[str, Float[np.ndarray, " _"]], *, cosines: bool = False) -> None:
    """Overlaid histograms with common bins, medians in the legend."""
    from matplotlib.ticker import MaxNLocator

    finite = {label: values[np.isfinite(values)].astype(np.float64) for label, values in series.items()}
    finite = {label: values for label, values in finite.items() if len(values)}
    if not finite:
        nothing(axes, "no finite values")
        return
    edges, logarithmic = _edges(list(finite.values()), cosines=cosines)
    highest = 0
    for colour, (label, values) in zip((BLUE, VERMILION), finite.items(), strict=False):
        # The outermost edges may round to just inside the values.
        found, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        axes.stairs(found, edges, color=colour, fill=True, alpha=0.25)
        axes.stairs(found, edges, color=colour, linewidth=1.2, label=f"{label}: median {np.median(values):.3g}")
        highest = max(highest, int(found.max()))
    if logarithmic:
        axes.set_xscale("log")
        _few_ticks(axes.xaxis)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    _whole(axes.yaxis)
    # Room for the legend above the highest bar.
    axes.set_ylim(0, highest * (1.1 + 0.1 * len(finite)))
    axes.legend(loc="upper left")


def _edges(series: list[Float[np.ndarray, " _"]], *, cosines: bool) -> tuple[Float[np.ndarray, " edge"], bool]:
    """Edges of common bins, by the rule of Freedman & Diaconis (1981) for the narrowest series; whether logarithmic."""
    together = np.concatenate(series)
    low, high = float(together.min()), float(together.max())
    # Beyond four decades the smallest are as good as 0, and all the others would share a few bins.
    logarithmic = not cosines and 0 < 10 * low <= high <= 1e4 * low
    if cosines:
        low, high = min(low, 0.0), 1.0
    scale = np.log if logarithmic else np.asarray
    widths = [
        2 * float(np.subtract(*np.percentile(scale(values), [75, 25]))) / np.cbrt(len(values)) for values in series
    ]
    narrowest = min((width for width in widths if width > 0), default=math.inf)
    bins = int(np.clip((scale(high) - scale(low)) / narrowest, 10, 100))
    return (
        np.geomspace(low, high, bins + 1) if logarithmic else np.histogram_bin_edges([low, high], bins)
    ), logarithmic


def nothing(axes: "Axes", why: str) -> None:
    """Say in an empty panel why it is empty."""
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.tick_params(which="both", left=False, bottom=False, labelleft=False, labelbottom=False)
    axes.grid(visible=False)


def _key(figure: "Figure", *, before: list[str], best_epoch: int | None) -> None:
    """What lines and shades mean in every panel, below all of them."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Line2D([], [], color=BLUE, label="held out"),
        Line2D([], [], color=VERMILION, linestyle="--", label="train"),
    ]
    if before:
        handles.append(Patch(color=_BEFORE, label=f"{' and '.join(before)}, before the codebook"))
    if best_epoch is not None:
        handles.append(Line2D([], [], color=GREEN, linestyle=":", label=f"best epoch ({best_epoch}), kept"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def new_figure(panels: int, *, columns: int, height: float, title: str) -> tuple["Figure", list["Axes"]]:
    """A figure with so many axes; `height` is a row's, in inches."""
    from matplotlib.figure import Figure

    rows, columns = -(-panels // columns), min(columns, panels)
    figure = Figure(figsize=(2.5 * columns if columns == 3 else 7.5, 0.7 + height * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    figure.suptitle(title, fontsize=9)
    for axes in grid[panels:]:
        axes.remove()
    return figure, grid[:panels]


def save_figure(out: Path, name: str, figure: "Figure") -> None:
    """Both files of a figure, without a date or a version in them."""
    svg, png = io.BytesIO(), io.BytesIO()
    with style():
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", metadata={"Software": None}, dpi=150)
    write_file(out / f"{name}.svg", svg.getvalue())
    write_file(out / f"{name}.png", png.getvalue())


def _words(name: str) -> str:
    return name.replace("_", " ")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
