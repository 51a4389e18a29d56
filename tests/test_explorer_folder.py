"""The folder of a site, and the effects beside it: what is left alone, replaced, refused, and by what it goes."""

import json

import pytest
from clvq.cache.files import sha256_of
from clvq.errors import ConfigError, DataError, DataNotFound, FormatVersion, ResumeMismatch
from clvq.explorer import build
from clvq.explorer.build import CONCEPTS_PER_FILE, ExploreConfig, explore
from clvq.explorer.data_files import read_script
from clvq.explorer.folder import Site

from .worded import make_worded, train


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache with two runs."""
    folder = tmp_path_factory.mktemp("made")
    cache = make_worded(folder / "cache").cache
    return cache, {f"run{seed}": train(cache, folder / f"run{seed}", seed=seed) for seed in (0, 1)}


def test_other_settings_are_refused_by_name_and_replaced_by_force(made, tmp_path):
    cache, runs = made
    one = {"run0": runs["run0"]}
    explore(cache, one, tmp_path, ExploreConfig(sentences=2))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ResumeMismatch, match=r"other settings \(config.sentences: 2 there, 1 now\)"):
        explore(cache, one, tmp_path, ExploreConfig(sentences=1))
    explore(cache, {"run1": runs["run1"]}, tmp_path, ExploreConfig(max_texts=3), force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [file.name for file in (tmp_path / "data" / "texts").iterdir()].count("001.js") == 0
    assert read_script(tmp_path, "site")["runs"][0]["name"] == "run1"


def test_a_folder_with_something_else_is_left_alone(made, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"is not empty and is no site of `clvq explore` \(it holds 'thesis.tex'\)"):
        explore(*made, tmp_path, ExploreConfig(), force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unfinished_site_is_no_site_and_is_finished_by_the_same_command(made, tmp_path, monkeypatch):
    cache, runs = made
    one = {"run0": runs["run0"]}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(build, "flows", killed)
        with pytest.raises(KeyboardInterrupt):
            explore(cache, one, tmp_path, ExploreConfig())
    with pytest.raises(DataNotFound, match="is unfinished: run the `clvq explore` command"):
        Site.read(tmp_path)
    assert not explore(cache, one, tmp_path, ExploreConfig()).unchanged
    assert Site.read(tmp_path).files()


def test_damaged_files_are_named(made, tmp_path):
    explore(*made, tmp_path, ExploreConfig())
    file = tmp_path / "data" / "flow.js"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"flow\.js is damaged"):
        read_script(tmp_path, "flow")
    with pytest.raises(DataNotFound, match=r"it has no data/r7/overview\.js"):
        read_script(tmp_path, "r7/overview")
    about = json.loads((tmp_path / "site.json").read_bytes())
    (tmp_path / "site.json").write_text(json.dumps(about | {"version": 9}))
    with pytest.raises(FormatVersion, match="has version 9, and this clvq reads 1"):
        Site.read(tmp_path)
    (tmp_path / "site.json").write_text(json.dumps(about | {"assets": {"../escaped": "0" * 64}}))
    with pytest.raises(DataError, match="is damaged: assets"):
        Site.read(tmp_path)


def ablation(folder, runs: dict, lines: list, *, version: int = 3):
    """A folder as `clvq ablate` leaves it."""
    folder.mkdir()
    settings = {"version": version, "runs": runs, "config": {"removals": ["centred", "mean"]}}
    (folder / "ablation.json").write_text(json.dumps({"settings": settings, "concepts": lines}))
    return folder


def line(run: str, concept: int, **changes) -> dict:
    lost = {"value": 0.25, "low": 0.125, "high": 0.5}
    told = {"run": run, "concept": concept, "texts": 9, "probability_lost": 0.25, "flipped": 0.5, "lost": lost}
    return {**told, "removal": "projection", "class_changes": [-0.25, 0.25], **changes}


def test_effects_go_by_the_weights_of_a_run_whatever_it_was_called(made, tmp_path):
    weights = sha256_of(made[1]["run0"] / "model.safetensors")
    lines = [line("then", 3), line("then", 4, lost=None, class_changes=None, removal=None)]
    folder = ablation(tmp_path / "ablation", {"then": weights, "run1": "0" * 64}, [*lines, line("run1", 3)])
    result = explore(*made, tmp_path / "site", ExploreConfig(), ablation=folder)
    assert [run.effects for run in result.runs] == [2, 0]
    assert [run["effects"] for run in read_script(tmp_path / "site", "site")["runs"]] == [True, False]
    columns = read_script(tmp_path / "site", "r0/overview")
    names = ("effect", "effect_low", "effect_high", "flipped", "effect_texts")
    assert [columns[name][columns["code"].index(3)] for name in names] == [0.25, 0.125, 0.5, 0.5, 9]
    assert [columns[name][columns["code"].index(4)] for name in names] == [0.25, None, None, 0.5, 9]
    assert [columns[name][columns["code"].index(5)] for name in names] == [None] * 5
    told = {}
    for start in range(0, len(columns["code"]), CONCEPTS_PER_FILE):
        told |= read_script(tmp_path / "site", f"r0/concepts/{start // CONCEPTS_PER_FILE:02d}")
    assert told["3"]["effect"] == {
        "texts": 9, "lost": [0.25, 0.125, 0.5], "flipped": 0.5, "by_class": [-0.25, 0.25], "removal": "projection"
    }  # fmt: skip
    # As the ablation's settings have it, where the line is silent.
    assert told["4"]["effect"]["removal"] == "centred"
    assert told["4"]["effect"]["by_class"] is None
    assert told["5"]["effect"] is None


def test_of_runs_with_equal_weights_the_one_of_the_same_name_counts(made, tmp_path):
    weights = sha256_of(made[1]["run0"] / "model.safetensors")
    lines = [line("copy", 3, flipped=0.125), line("run0", 3)]
    folder = ablation(tmp_path / "ablation", {"copy": weights, "run0": weights}, lines)
    explore(*made, tmp_path / "site", ExploreConfig(), ablation=folder)
    columns = read_script(tmp_path / "site", "r0/overview")
    assert columns["flipped"][columns["code"].index(3)] == 0.5


def test_an_ablation_that_cannot_be_read_is_refused_in_one_line(made, tmp_path):
    with pytest.raises(DataNotFound, match=r"holds no ablation\.json: give the folder"):
        explore(*made, tmp_path / "site", ExploreConfig(), ablation=tmp_path)
    old = ablation(tmp_path / "old", {}, [], version=1)
    with pytest.raises(FormatVersion, match="has version 1, and this clvq reads 3"):
        explore(*made, tmp_path / "site", ExploreConfig(), ablation=old)
    broken = ablation(tmp_path / "broken", {}, [{"run": 7}])
    with pytest.raises(DataError, match="is damaged: at /concepts/0"):
        explore(*made, tmp_path / "site", ExploreConfig(), ablation=broken)
