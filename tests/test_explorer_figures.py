"""The explorer's figures: what they draw is what the site says, in any font, twice the same."""

import json
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from clvq.cache.files import sha256_of
from clvq.errors import DataNotFound
from clvq.explorer.build import ExploreConfig, explore
from clvq.explorer.data_files import read_script, script
from clvq.explorer.figures import concept_map, effect_bars, flow_figure, purity_against_use, write_figures

from .study_maker import HOSTILE
from .worded import make_worded, train


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Two runs of one cache, the first with effects."""
    folder = tmp_path_factory.mktemp("figures")
    made = make_worded(folder / "cache")
    runs = {f"run{seed}": train(made.cache, folder / f"run{seed}", seed=seed) for seed in (0, 1)}
    lines = [
        {
            "run": "run0", "concept": code, "texts": 9, "probability_lost": 0.1 - 0.02 * code, "flipped": 0.5,
            "lost": None if code == 1 else {"low": 0.05 - 0.02 * code, "high": 0.2 - 0.02 * code},
        }
        for code in range(12)
    ]  # fmt: skip
    weights = {"run0": sha256_of(runs["run0"] / "model.safetensors")}
    (folder / "ablation").mkdir()
    settings = {"version": 3, "runs": weights, "config": {"removals": ["centred"]}}
    (folder / "ablation" / "ablation.json").write_text(json.dumps({"settings": settings, "concepts": lines}))
    explore(made.cache, runs, folder / "site", ExploreConfig(), ablation=folder / "ablation")
    return folder / "site"


def test_each_chart_is_written_as_svg_and_png_twice_the_same(site, tmp_path):
    files = write_figures(site, tmp_path / "a")
    assert [file.stem for file in files[::2]] == [
        "r0-map", "r0-purity", "r0-effects", "r1-map", "r1-purity", "flow-r0-r1"
    ]  # fmt: skip
    for file, again in zip(files, write_figures(site, tmp_path / "b"), strict=True):
        assert file.read_bytes() == again.read_bytes(), file.name
        if file.suffix == ".svg":
            assert ElementTree.parse(file).getroot().tag.endswith("svg")
        else:
            assert file.read_bytes().startswith(b"\x89PNG")


def test_the_map_and_purity_draw_every_concept_at_its_place_with_its_label(site):
    columns, classes = read_script(site, "r0/overview"), read_script(site, "site")["classes"]
    for figure, x, y in (
        (concept_map(columns, classes), columns["x"], columns["y"]),
        (purity_against_use(columns, classes), columns["uses"], columns["purity"]),
    ):
        (axes,) = figure.axes
        drawn = {one.get_label(): one.get_offsets() for one in axes.collections}
        for number, name in enumerate(classes):
            mine = [place for place, label in enumerate(columns["label"]) if label == number]
            wanted = np.array([[x[place], y[place]] for place in mine])
            assert np.allclose(np.asarray(drawn[name]), wanted)
        # Told apart without colours, too.
        outlines = {one.get_label(): one.get_paths()[0].vertices.shape for one in axes.collections}
        assert len(set(outlines.values())) == len(classes)
    sizes = np.concatenate([one.get_sizes() for one in concept_map(columns, classes).axes[0].collections])
    order = [place for number in range(2) for place, label in enumerate(columns["label"]) if label == number]
    assert (np.argsort(np.array(columns["uses"])[order], kind="stable") == np.argsort(sizes, kind="stable")).all()


def test_effects_are_bars_with_their_intervals_the_largest_first(site):
    columns = read_script(site, "r0/overview")
    (axes,) = effect_bars(columns).axes
    known = sorted(effect for effect in columns["effect"] if effect is not None)[::-1]
    assert [bar.get_width() for bar in axes.patches] == known
    # The line at nothing goes from top to bottom.
    ends = [tuple(one.get_xdata()) for one in axes.lines if len(set(one.get_ydata())) == 1]
    wanted = [
        (columns["effect_low"][place], columns["effect_high"][place])
        for place in sorted(range(len(columns["code"])), key=lambda place: -(columns["effect"][place] or 0))
        if columns["effect_low"][place] is not None
    ]
    assert ends == wanted
    labels = [label.get_text() for label in axes.get_yticklabels()]
    first = columns["effect"].index(known[0])
    assert labels[0].startswith(f"{columns['code'][first]}: {columns['words'][first][0]}")


def test_no_more_than_twenty_effects_are_drawn_and_they_are_the_largest():
    effects = [0.01 * number - 0.2 for number in range(41)]
    columns = {"code": list(range(41)), "words": [["w"]] * 41, "effect": effects}
    columns |= {name: [None] * 41 for name in ("effect_low", "effect_high", "effect_texts")}
    (axes,) = effect_bars(columns).axes
    drawn = [bar.get_width() for bar in axes.patches]
    assert len(drawn) == 20
    assert min(map(abs, drawn)) >= 0.1
    assert drawn == sorted(drawn, reverse=True)
    assert "interval" not in axes.get_xlabel()


def test_an_effect_on_a_few_texts_is_left_out_where_there_are_others():
    columns = {"code": [0, 1, 2], "words": [["w"]] * 3, "effect": [0.9, 0.2, 0.1], "effect_texts": [1, 5, 40]}
    columns |= {"effect_low": [None, 0.1, None], "effect_high": [None, 0.3, None]}
    (axes,) = effect_bars(columns).axes
    assert [bar.get_width() for bar in axes.patches] == [0.2, 0.1]
    assert "95 % interval" in axes.get_xlabel()
    (axes,) = effect_bars(columns | {"effect_texts": [1, 1, 1]}).axes
    assert len(axes.patches) == 3


def test_bands_are_as_wide_as_the_rows_that_have_both_concepts():
    overview = {"code": [3, 5, 7], "words": [["a"], ["b"], ["c"]]}
    flow = {"lower": "r0", "upper": "r1", "links": [[3, 7, 60], [3, 5, 30], [7, 5, 10]], "rows": 100, "nmi": 0.5}
    runs = {"r0": {"name": "one"}, "r1": {"name": "other"}}
    (axes,) = flow_figure(flow, runs, {"r0": overview, "r1": overview}).axes
    bands = [one for one in axes.patches if len(one.get_path().vertices) == 9]
    widths = [float(np.ptp(one.get_path().vertices[[0, 7], 1])) for one in bands]
    assert widths == pytest.approx([0.6, 0.3, 0.1])
    boxes = [one.get_height() for one in axes.patches if len(one.get_path().vertices) != 9]
    assert sorted(boxes) == pytest.approx([0.1, 0.4, 0.6, 0.9])
    assert "100% of 100 rows" in axes.get_title()


def test_a_site_without_labels_effects_or_other_runs_has_a_map_alone(site, tmp_path):
    copy = tmp_path / "site"
    shutil.copytree(site, copy)
    about, columns = read_script(copy, "site"), read_script(copy, "r0/overview")
    nothing = [None] * len(columns["code"])
    columns |= dict.fromkeys(("label", "purity", "effect", "effect_low", "effect_high"), nothing)
    about |= {"runs": about["runs"][:1], "classes": []}
    for name, value in (("site", about), ("r0/overview", columns), ("flow", [])):
        (copy / "data" / f"{name}.js").write_bytes(script(name, value))
    assert [file.name for file in write_figures(copy, tmp_path / "figures")] == ["r0-map.svg", "r0-map.png"]


def test_hostile_names_are_drawn_as_they_are(site, tmp_path):
    copy = tmp_path / "site"
    shutil.copytree(site, copy)
    about = read_script(copy, "site")
    for place, odd in enumerate(HOSTILE):
        about["classes"] = [odd, f"$x_{place}$ {odd}"]
        about["runs"][0]["name"] = odd
        (copy / "data" / "site.js").write_bytes(script("site", about))
        if place in (0, 5, 6, 8):
            write_figures(copy, tmp_path / str(place))
            # Well formed, whatever was in the names.
            ElementTree.parse(tmp_path / str(place) / "r0-map.svg")


def test_what_is_no_site_has_no_figures(tmp_path):
    with pytest.raises(DataNotFound, match="is no site"):
        write_figures(tmp_path, tmp_path / "figures")
