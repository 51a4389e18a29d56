"""What the figures show, against the numbers they are made of; and that a person can read them."""

import itertools
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import clvq
import matplotlib
import numpy as np
import pytest
import torch
from clvq.trainer import figures
from clvq.trainer.config import preset_config, with_overrides
from clvq.trainer.figures import Concepts, codebook_health, learning_curves, nearest_cosines, write_figures
from clvq.trainer.fit import fit
from clvq.trainer.folder import FIGURES
from clvq.trainer.run import Run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from .caches import LOWER, UPPER


@pytest.fixture(scope="module", params=["default", "paper"])
def trained(request: pytest.FixtureRequest, small_cache: clvq.Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = with_overrides(
        preset_config(request.param, lower=LOWER, upper=UPPER, codes=14, held_out="dev"),
        {"decoder.layers": "1", "decoder.hidden": "8", "fit.epochs": "2"},
    )
    out = tmp_path_factory.mktemp("run") / request.param
    fit(small_cache, config, out, device=torch.device("cpu"))
    write_figures(out)
    return out


def _metrics(epochs: int, *, encoder: int = 0) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for epoch in range(epochs):
        line: dict[str, Any] = {"epoch": epoch, "phase": "encoder" if epoch < encoder else "train", "lr": 0.5**epoch}
        for part in ["predictor"] if epoch < encoder else ["own", "context", "commitment", "predictor"]:
            line |= {f"train_loss_{part}": math.exp(-epoch / 4), f"held_out_loss_{part}": 0.1 + math.exp(-epoch / 5)}
        if epoch < encoder:
            line["held_out_predictor_fvu"] = 0.2
        else:
            line |= {"held_out_own_code_fvu": 0.2, "held_out_decoder_fvu": 0.1 + 0.1 / (1 + epoch)}
            line |= {"held_out_perplexity": 300.0 + epoch, "held_out_used_codes": 380 + epoch % 3}
        lines.append(line | {"seconds": 3.0, "loader_wait_share": 0.1})
    return lines


def _concepts(codes: int, *, dead: int = 0, d: int = 6) -> Concepts:
    generator = np.random.default_rng(codes)
    counts = generator.zipf(1.3, codes).clip(max=100_000)
    counts[codes - dead :] = 0
    lower, upper = generator.normal(size=(2, codes, d)).astype(np.float32)
    codebook = np.where(counts[:, None] > 0, lower, 1e-3 * lower)
    return Concepts(counts, {"hidden.8": lower + 3, "hidden.12": 7 * upper}, codebook)


def _drawn(figure: Figure) -> dict[str, dict[str, np.ndarray]]:
    """Panel → line → its values, as drawn."""
    return {
        axes.get_title(): {str(line.get_label()): np.asarray(line.get_ydata()) for line in axes.get_lines()}
        for axes in figure.axes
    }


def _axes(figure: Figure, beginning: str) -> Axes:
    (axes,) = (axes for axes in figure.axes if axes.get_title().startswith(beginning))
    return axes


def _histograms(axes: Axes) -> list[Any]:
    """Outlines of the histograms."""
    return [patch.get_data() for patch in axes.patches if isinstance(patch, StepPatch) and not patch.get_fill()]


def test_a_run_leaves_both_figures_in_both_forms(trained: Path) -> None:
    assert set(FIGURES) == {"learning-curves.svg", "learning-curves.png", "codebook.svg", "codebook.png"}
    for name in FIGURES:
        if name.endswith("svg"):
            assert ElementTree.parse(trained / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        else:
            with Image.open(trained / name) as image:
                image.load()
                assert min(image.size) > 600
                assert len(np.unique(np.asarray(image.convert("L")))) > 50
    preset = Run.from_pretrained(trained).config.preset
    assert f"<!-- {preset}, {LOWER} → {UPPER}, 14 codes, seed 42 -->" in (trained / "codebook.svg").read_text()


def test_the_figures_of_a_run_have_the_same_bytes_whoever_draws_them_and_whenever(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: (trained / name).read_bytes() for name in FIGURES}
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20.0)
    monkeypatch.setitem(matplotlib.rcParams, "savefig.dpi", 30.0)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    write_figures(trained)
    assert {name: (trained / name).read_bytes() for name in FIGURES} == before
    assert matplotlib.rcParams["font.size"] == 20.0
    for name, data in before.items():
        assert matplotlib.__version__.encode() not in data
        assert b"dc:date" not in data
        if name.endswith("png"):
            with Image.open(trained / name) as image:
                assert set(image.info) == {"dpi"}


def test_the_figures_show_the_run_s_own_tables(trained: Path) -> None:
    run, concepts = Run.from_pretrained(trained), Concepts.of(trained)
    np.testing.assert_array_equal(concepts.counts, run.counts)
    assert list(concepts.means) == [LOWER, UPPER]
    np.testing.assert_array_equal(concepts.means[LOWER], run.concept_means)
    np.testing.assert_array_equal(concepts.means[UPPER], run.upper_table)
    assert concepts.codes is not None
    if run.config.preset == "paper":
        for code in range(14):
            unit = concepts.codes[code] / np.linalg.norm(concepts.codes[code])
            np.testing.assert_allclose(unit, run.published_direction(code), atol=1e-6)


def test_the_curves_are_the_metrics() -> None:
    metrics = _metrics(8, encoder=3)
    drawn = _drawn(learning_curves(metrics, codes=400))
    assert list(drawn) == [
        *(f"loss: {part}" for part in ("predictor", "own", "context", "commitment")),
        "variance unexplained (FVU)", "codes in use", "learning rate",
    ]  # fmt: skip

    def column(name: str) -> list[float]:
        return [line.get(name, math.nan) for line in metrics]

    own = drawn["loss: own"]
    np.testing.assert_array_equal(own["own"], column("held_out_loss_own"))
    np.testing.assert_array_equal(own["own (train)"], column("train_loss_own"))
    fvu = drawn["variance unexplained (FVU)"]
    assert list(fvu) == ["predictor", "own code", "decoder"]
    np.testing.assert_array_equal(fvu["own code"], column("held_out_own_code_fvu"))
    assert set(drawn["codes in use"]) == {"perplexity", "used codes", "all 400"}
    np.testing.assert_array_equal(drawn["learning rate"]["lr"], column("lr"))


@settings(max_examples=12)
@given(
    st.lists(
        st.dictionaries(
            st.from_regex(r"(train_|held_out_)?(loss_)?[a-z]{1,6}(_fvu|_codes|_share)?", fullmatch=True),
            st.none() | st.floats(0, 1e6) | st.just(math.inf) | st.integers(-5, 10**6) | st.text(max_size=3),
            max_size=4,
        ),
        min_size=1,
        max_size=4,
    )
)
@example([{"a": 0.0, "loss_a_share": 0.0, "held_out_loss_b_share": 1.0, "code_share": 0.5, "a_share": 0.5}])
def test_every_figure_is_drawn_once_whatever_its_name_is(given: list[dict[str, Any]]) -> None:
    metrics = [line | {"epoch": epoch, "phase": "train"} for epoch, line in enumerate(given)]
    figure = learning_curves(metrics)
    # A share is one of time, unless it is a loss, a FVU, a rate or one of codes.
    wanted = {
        name
        for line in given
        for name in line
        if name not in ("epoch", "phase", "seconds")
        and (not name.endswith("_share") or re.match(r"(train_|held_out_)?(loss_|fvu_|lr_)|.*code", name))
    }
    finite = {
        name
        for name in wanted
        if any(isinstance(line.get(name), int | float) and math.isfinite(line[name]) for line in given)
    }
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    assert len(finite) <= len(lines) <= len(wanted)
    empty = [axes for axes in figure.axes if any(text.get_text() == "no finite values" for text in axes.texts)]
    assert all(not axes.get_lines() for axes in empty)


def test_what_comes_before_the_codebook_and_the_best_epoch_are_marked_in_every_panel() -> None:
    figure = learning_curves(_metrics(9, encoder=3), best_epoch=7)
    for axes in figure.axes:
        assert [7, 7] in [list(line.get_xdata()) for line in axes.get_lines()]
        (shade,) = axes.patches
        assert (shade.get_x(), shade.get_x() + shade.get_width()) == (-0.5, 2.5)
    (key,) = figure.legends
    assert {text.get_text() for text in key.texts} == {
        "held out", "train", "encoder, before the codebook", "best epoch (7), kept",
    }  # fmt: skip


def test_values_far_apart_are_on_a_logarithmic_axis_and_near_ones_are_not() -> None:
    lines = [{"epoch": e, "train_loss_far": 10.0 ** (3 - e), "train_loss_near": 1.0 + e} for e in range(4)]
    figure = learning_curves(lines)
    assert _axes(figure, "loss: far").get_yscale() == "log"
    assert _axes(figure, "loss: near").get_yscale() == "linear"


def test_the_use_of_the_codes_is_their_sorted_counts() -> None:
    concepts = _concepts(200, dead=20)
    axes = _axes(codebook_health(concepts), "use of the codes")
    rows = dict(zip(["rows", "equal"], axes.get_lines(), strict=True))
    ordered = sorted(concepts.counts.tolist(), reverse=True)[:180]
    ranks = np.asarray(rows["rows"].get_xdata())
    np.testing.assert_array_equal(rows["rows"].get_ydata(), [ordered[rank - 1] for rank in ranks])
    assert (ranks[0], ranks[-1]) == (1, 180)
    assert list(rows["equal"].get_ydata()) == [sum(ordered) / 200] * 2
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "20 dead (10.0%)" in [text.get_text() for text in axes.get_legend().texts]


def test_a_large_codebook_makes_no_large_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_SAMPLE", 64)
    (rows, _) = _axes(codebook_health(_concepts(65_536, dead=9)), "use of the codes").get_lines()
    assert len(rows.get_xdata()) <= 1000
    assert (rows.get_xdata()[0], rows.get_xdata()[-1]) == (1, 65_527)


def test_the_histograms_count_every_used_concept_and_do_not_depend_on_a_common_mean() -> None:
    concepts = _concepts(50, dead=4)
    moved = Concepts(concepts.counts, {site: means + 2 for site, means in concepts.means.items()}, concepts.codes)
    first, second = codebook_health(concepts), codebook_health(moved)
    assert [data.values.sum() for data in _histograms(_axes(first, "norms of the codes"))] == [46, 4]
    for beginning in ("distance of concepts", "nearest other"):
        for one, other in zip(_histograms(_axes(first, beginning)), _histograms(_axes(second, beginning)), strict=True):
            assert one.values.sum() == 46
            np.testing.assert_array_equal(one.values, other.values)
            np.testing.assert_allclose(one.edges, other.edges, rtol=1e-4)


def test_distances_are_counted_from_the_mean_of_the_rows_not_of_the_concepts() -> None:
    # Three rows at 0 and one at 4: their mean is 1, so that the concepts lie 1 and 3 away from it.
    means = np.array([[0.0], [4.0]], dtype=np.float32)
    figure = codebook_health(Concepts(np.array([3, 1]), {"hidden.1": means}))
    (data,) = _histograms(_axes(figure, "distance of concepts"))
    assert (data.edges[0], data.edges[-1]) == (1, 3)


@pytest.mark.parametrize("sample", [1000, 40])
def test_nearest_cosines_are_scikit_learn_s(monkeypatch: pytest.MonkeyPatch, sample: int) -> None:
    monkeypatch.setattr(figures, "_SAMPLE", sample)
    monkeypatch.setattr(figures, "_BLOCK", 17)
    rows = np.random.default_rng(0).normal(size=(90, 5))
    distances, _ = NearestNeighbors(n_neighbors=2, metric="cosine", algorithm="brute").fit(rows).kneighbors(rows)
    expected = 1 - distances[:, 1]
    found = nearest_cosines(np.insert(rows, 30, 0, axis=0))
    assert len(found) == min(sample, 90)
    places = [int(np.abs(expected - value).argmin()) for value in found]
    np.testing.assert_allclose(found, expected[places], atol=1e-6)
    # Two concepts that are each other's nearest share a cosine; the order is kept all the same.
    assert sample < 90 or np.allclose(found, expected, atol=1e-6)


def test_one_concept_alone_has_no_neighbour() -> None:
    assert nearest_cosines(np.ones((1, 3))).shape == (0,)


def _texts(figure: Figure) -> list[tuple[str, Any]]:
    """What is written in a figure, with its place in pixels at 100 dpi."""
    figure.set_dpi(100)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    found = [figure._suptitle, *(text for legend in figure.legends for text in legend.texts)]  # type: ignore[attr-defined]
    for axes in figure.axes:
        found += [axes.title, axes.xaxis.label, axes.yaxis.label, axes.xaxis.offsetText, axes.yaxis.offsetText]
        found += [*axes.texts, *(axes.get_legend().texts if axes.get_legend() else [])]
        for axis, name in ((axes.xaxis, "x"), (axes.yaxis, "y")):
            low, high = sorted(axis.get_view_interval())
            if axis.get_tick_params()[{"x": "labelbottom", "y": "labelleft"}[name]]:
                found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    written = [text for text in found if text is not None and text.get_visible() and text.get_text()]
    return [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in written]


_NO_NUMBERS = [
    {name: value if name in ("epoch", "phase") else None for name, value in line.items()} for line in _metrics(3)
]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: learning_curves(_metrics(1), best_epoch=0, codes=400, title="t"), id="1 epoch"),
        pytest.param(lambda: learning_curves(_metrics(50, encoder=5), best_epoch=44, codes=65_536, title="t"), id="50"),
        pytest.param(lambda: learning_curves(_NO_NUMBERS, codes=400, title="t"), id="no numbers"),
        pytest.param(lambda: learning_curves([], title="t"), id="no epochs"),
        pytest.param(lambda: codebook_health(_concepts(2), title="t"), id="2"),
        pytest.param(lambda: codebook_health(_concepts(5), title="t"), id="5"),
        pytest.param(lambda: codebook_health(_concepts(65_536, dead=6000, d=2), title="t"), id="65536"),
        pytest.param(lambda: codebook_health(_concepts(9, dead=9), title="t"), id="all dead"),
    ],
)  # fmt: skip
def test_no_text_lies_over_another_or_beyond_the_edge(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_SAMPLE", 64)
    figure = make()
    texts = _texts(figure)
    width, height = figure.bbox.size
    for name, box in texts:
        assert box.x0 >= 0, name
        assert box.y0 >= 0, name
        assert box.x1 <= width, name
        assert box.y1 <= height, name
    for (one, first), (other, second) in itertools.combinations(texts, 2):
        overlap = (
            min(first.x1, second.x1) - max(first.x0, second.x0),
            min(first.y1, second.y1) - max(first.y0, second.y0),
        )
        assert min(overlap) < 1, (one, other)


def test_what_cannot_be_shown_is_said() -> None:
    means = np.full((5, 3), np.nan, dtype=np.float32)
    said = [
        text.get_text()
        for figure in (
            learning_curves([]),
            codebook_health(Concepts(np.ones(5, dtype=np.int64), {"hidden.1": means}, means)),
            codebook_health(Concepts(np.zeros(5, dtype=np.int64), {"hidden.1": means})),
        )
        for axes in figure.axes
        for text in axes.texts
    ]
    assert said == [
        "no epoch was measured",
        "no finite values", "no finite values", "no finite values",
        "none of the 5 codes has a training row", "the model has no codebook", "no finite values", "no finite values",
    ]  # fmt: skip


def test_nothing_is_imported_before_it_is_needed_and_pyplot_never() -> None:
    code = (
        "import sys, clvq.trainer.figures as figures\n"
        "assert 'matplotlib' not in sys.modules\n"
        "figures.learning_curves([{'epoch': 0, 'lr': 0.1}])\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
