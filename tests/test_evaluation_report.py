"""Reports of results that the commands really made: every printed number is found again where it is said to be from."""

import base64
import hashlib
import json
import re
import shlex
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import clvq
import numpy as np
import pytest
import torch
from clvq import cli
from clvq.cache.layout import to_json
from clvq.errors import ConfigError, DataError, DataNotFound, ResumeMismatch
from clvq.evaluation import report_ablation, report_quality
from clvq.evaluation.ablate import AblateConfig, ablate
from clvq.evaluation.quality import QualityConfig, quality
from clvq.evaluation.report import gather, plain, report
from clvq.evaluation.report_commands import sweep_words, train_words
from clvq.evaluation.report_document import Cell, LeftOut, shown
from clvq.evaluation.report_files import Node, Source, search
from clvq.evaluation.report_html import html
from clvq.evaluation.report_markdown import escaped, markdown, references
from clvq.trainer.config import with_overrides
from clvq.trainer.fit import fit
from clvq.trainer.methods import METHODS, method_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import t as student

from . import tiny
from .cache_maker import without_waiting

no_waiting = pytest.fixture(without_waiting, scope="module", autouse=True)

HOSTILE = "<script>alert(1)</script>|`$x_1$`"
RUNS = [f"{method}-{seed}" for method in ("kmeans", "pca") for seed in (0, 1)]
OF_CHANCE = "accuracy unchanged − accuracy lost / way to chance"
OF_RATIO = " of dead codes / codes"
VOID = {"meta", "img", "br", "hr", "link", "input"}


@dataclass(frozen=True)
class Made:
    """A folder of results, and the report of it."""

    folder: Path
    plain: Any
    markdown: str
    html: str
    left_out: list[LeftOut]


def _made(folder: Path, title: str = "Tiny") -> Made:
    """All of a report but its figures."""
    document = gather(folder, leave=folder / "report").document(title)
    data = json.loads(to_json(plain(document)))
    images = {chart.name: b"<svg/>" for chart in document.charts}
    return Made(folder, data, markdown(document, figures="figures"), html(document, images), list(document.left_out))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, two methods with two seeds each, CLVQ-VAE trained for a moment, an ablation and a measurement."""
    folder = tmp_path_factory.mktemp("study") / "results"
    folder.mkdir()
    names = ((0, "anger"), (1, "fear"), (2, "joy"))
    model = tiny.make_model(folder.parent / "model", "bert", classes=3, id2label=names)
    data = tiny.write_texts(folder.parent / "data", texts=120)
    plan = tiny.plan_of(model, data, rows="word", task="classify")
    tiny.run(plan, folder / "cache")
    cache = clvq.Cache(folder / "cache")
    for name in RUNS:
        method, seed = name.split("-")
        config = method_config(method, lower="hidden.1", upper="hidden.3", codes=8, held_out="dev", seed=int(seed))
        fit(cache, config, folder / "runs" / name, device=torch.device("cpu"))
    network = method_config("clvq-vae", lower="hidden.1", upper="hidden.3", codes=8, held_out="dev", seed=3)
    network = with_overrides(network, {"fit.epochs": "2", "encoder.epochs": "2", "decoder.heads": "4"})
    fit(cache, network, folder / "runs" / "network", device=torch.device("cpu"))
    runs = {name: folder / "runs" / name for name in RUNS}
    controls = ("random code", "matched code", "matched random")
    settings = AblateConfig(strengths=(0.5, 1.0), concepts=True, min_texts=2, controls=controls)
    ablate(cache, runs, folder / "ablation", lambda: tiny.load(plan.source, task="classify"), settings)
    quality(cache, runs, folder / "quality", QualityConfig())
    return folder


@pytest.fixture(scope="module")
def made(results: Path) -> Made:
    return _made(results)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["clvq", *map(str, words)])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


@pytest.fixture
def small(results: Path, tmp_path: Path) -> Path:
    """One run, the ablation and the quality measurement, to be damaged."""
    folder = tmp_path / "small"
    shutil.copytree(results / "runs" / "kmeans-0", folder / "kmeans-0")
    for part in ("ablation", "quality"):
        shutil.copytree(results / part, folder / part)
    return folder


def _edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


def _cells(plain: Any) -> Iterator[dict[str, Any]]:
    for section in plain["sections"]:
        yield from section["text"]
        for table in section["tables"]:
            for row in table["rows"]:
                yield from row
            yield from table["notes"]


def _numbers(plain: Any) -> Iterator[dict[str, Any]]:
    for cell in _cells(plain):
        yield from cell["numbers"]
    for section in plain["sections"]:
        for figure in section["figures"]:
            yield from figure["numbers"]


class _Files:
    """The files of a folder, each read once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._read = folder, dict[str, Any]()

    def look_up(self, source: dict[str, str]) -> Any:
        name = source["file"]
        if name not in self._read:
            data = (self._folder / name).read_bytes()
            lines = data.splitlines() if name.endswith(".jsonl") else []
            self._read[name] = [json.loads(line) for line in lines] if lines else json.loads(data)
        return _follow(self._read[name], source["pointer"])


def _follow(value: Any, pointer: str) -> Any:
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def _tables(made: Made) -> list[dict[str, Any]]:
    return [table for section in made.plain["sections"] for table in section["tables"]]


def _table(made: Made, beginning: str) -> dict[str, Any]:
    return next(table for table in _tables(made) if table["caption"].startswith(beginning))


def _column(table: dict[str, Any], name: str) -> list[str]:
    place = table["columns"].index(name)
    return [row[place]["text"] for row in table["rows"]]


def _half(text: str) -> float:
    """Half a unit of a number's last printed digit."""
    digits = text.rstrip("%").replace(",", "").lower()
    mantissa, _, exponent = digits.partition("e")
    places = len(mantissa.partition(".")[2])
    return 0.5000001 * 10 ** (int(exponent or 0) - places) / (100 if text.endswith("%") else 1)


def _printed(text: str) -> float:
    value = float(text.rstrip("%").replace(",", ""))
    return value / 100 if text.endswith("%") else value


def _student(values: tuple[float, ...], end: int) -> float:
    spread = np.std(values, ddof=1) / len(values) ** 0.5
    return float(
        np.mean(values) if not spread else student.interval(0.95, len(values) - 1, np.mean(values), spread)[end]
    )


RULES: dict[str, Callable[..., float]] = {
    "dead codes / codes": lambda dead, codes: dead / codes,
    "mean over seeds": lambda *values: float(np.mean(values)),
    "lower end of Student's 95 % interval over seeds": lambda *values: _student(values, 0),
    "upper end of Student's 95 % interval over seeds": lambda *values: _student(values, 1),
    "count": lambda *values: len(values),
    "last epoch's held-out loss / that of the epoch before − 1": lambda before, last: last / before - 1,
    OF_CHANCE: lambda clean, lost, way: clean - lost / way,
}


def _follows(rule: str, values: list[float]) -> float:
    if rule.endswith(OF_RATIO):
        shares = [RULES["dead codes / codes"](*pair) for pair in zip(values[::2], values[1::2], strict=True)]
        return RULES[rule.removesuffix(OF_RATIO)](*shares)
    return RULES[rule](*values)


def _check_numbers(made: Made) -> set[str]:
    """Every number is where it is said to be; returns the rules that were followed."""
    files, rules, seen = _Files(made.folder), set(), 0
    for number in _numbers(made.plain):
        values = [files.look_up(source) for source in number["sources"]]
        rules.add(number["rule"].removesuffix(OF_RATIO))
        if number["rule"]:
            assert number["value"] == pytest.approx(_follows(number["rule"], values), rel=1e-9, abs=1e-12)
        else:
            assert [number["value"]] == values
        assert abs(_printed(number["text"]) - number["value"]) <= _half(number["text"])
        seen += 1
    assert seen > 1000
    return rules


def test_every_number_is_found_where_it_is_said_to_stand(made: Made) -> None:
    # The tiny model is no better than chance, so that nothing says how far away chance is.
    assert _check_numbers(made) == {"", *RULES} - {OF_CHANCE}


def test_a_cell_prints_its_numbers_and_no_others(made: Made) -> None:
    for cell in _cells(made.plain):
        rest = cell["text"]
        for number in cell["numbers"]:
            before, found, rest = rest.partition(number["text"])
            assert found
            assert before in ("", " [", ", ") or not re.search(r"[0-9]\.[0-9]", before)
        assert not re.search(r"[0-9]\.[0-9]{2}", rest)
    intervals = [cell for cell in _cells(made.plain) if re.fullmatch(r"[^ ]+ \[[^ ]+, [^ ]+\]( †)?", cell["text"])]
    assert len(intervals) > 100
    assert all(len(cell["numbers"]) == 3 for cell in intervals)


def test_what_made_a_number_is_told_by_file_hash_cache_runs_and_command(made: Made) -> None:
    plain = made.plain
    entries = {entry["number"]: entry for entry in plain["sources"]}
    assert [entry["kind"] for entry in entries.values()] == ["cache", *["run"] * 5, "ablation", "quality"]
    for entry in entries.values():
        for file, sha256 in entry["files"].items():
            assert hashlib.sha256((made.folder / file).read_bytes()).hexdigest() == sha256
        assert entry["cache_id"] == clvq.Cache(made.folder / "cache").id
        assert entry["clvq"] == (None if entry["kind"] == "cache" else clvq.__version__)
    for section in plain["sections"]:
        for table in (*section["tables"], *section["figures"]):
            numbers = [*table["numbers"]] if "numbers" in table else []
            numbers += [number for row in table.get("rows", ()) for cell in row for number in cell["numbers"]]
            owners = {
                number
                for one in numbers
                for source in one["sources"]
                for number, entry in entries.items()
                if source["file"] in entry["files"]
            }
            assert owners <= set(table["sources"])
    run = next(entry for entry in entries.values() if entry["name"] == "runs/pca-1")
    sha256 = hashlib.sha256((made.folder / "runs/pca-1/model.safetensors").read_bytes()).hexdigest()
    assert run["runs"] == {"runs/pca-1": sha256[:12]}
    assert run["command"] == (
        "clvq train '$CACHE' --lower hidden.1 --upper hidden.3 --method pca --codes 8 --split train --held-out dev "
        "--seed 1 --out runs/pca-1"
    ).replace("'", "")
    ablation = next(entry for entry in entries.values() if entry["kind"] == "ablation")
    assert shlex.split(ablation["command"])[:7] == ["clvq", "ablate", "$CACHE", *(f"runs/{name}" for name in RUNS)]


def test_the_commands_make_the_same_again(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., int]
) -> None:
    model, cache = made.folder.parent / "model", made.folder / "cache"
    commands = {entry["name"]: entry["command"] for entry in made.plain["sources"]}
    copy = tmp_path / "copy"
    for part in ("runs", "ablation", "quality"):
        shutil.copytree(made.folder / part, copy / part)
    shutil.rmtree(copy / "runs" / "kmeans-1")
    monkeypatch.chdir(copy)
    # A finished result is read back where the settings are the same, and refused where one differs.
    for name, file in (
        ("runs/kmeans-1", "model.safetensors"),
        ("runs/network", "model.safetensors"),
        ("ablation", "ablation.json"),
        ("quality", "quality.json"),
    ):
        words = [{"$CACHE": cache, "$MODEL": model}.get(word, word) for word in shlex.split(commands[name])]
        assert command(*words[1:]) == 0
        assert (copy / name / file).read_bytes() == (made.folder / name / file).read_bytes()


def test_both_protocols_stand_side_by_side_with_the_matched_code(made: Made) -> None:
    table = _table(made, "Own code removed: ")
    assert _column(table, "run")[:2] == ["kmeans-0", "kmeans-0"]
    assert _column(table, "read-out, removal") == ["model, centred", "probe, projection (published)"] * 4
    assert set(_column(table, "method")) == {"kmeans", "pca"}
    lines = json.loads((made.folder / "ablation" / "ablation.json").read_bytes())["lines"]
    over = {
        (line["run"], line["read_out"], line["removal"]): line["own_minus_this"]["value"]
        for line in lines
        if line["removed"] == "matched code" and line["strength"] == 1
    }
    for run, where, text in zip(
        _column(table, "run"), _column(table, "read-out, removal"), _column(table, "own − matched code"), strict=True
    ):
        read_out, removal = where.removesuffix(" (published)").split(", ")
        assert text.startswith(f"{over[run, read_out, removal]:+.3f} [")
    seeds = _table(made, "Own code removed, over seeds")
    assert set(_column(seeds, "seeds")) == {"2"}


def test_an_accuracy_below_chance_is_called_an_inversion_where_it_occurs(small: Path, tmp_path: Path) -> None:
    plain = json.loads((small / "ablation" / "ablation.json").read_bytes())
    for line in plain["lines"]:
        published = (line["run"], line["read_out"], line["removal"]) == ("pca-1", "probe", "projection")
        share = 1.8 if published and line["removed"] == "own code" else 0.4
        line["drop_to_chance"] = {"value": share, "low": share - 0.1, "high": share + 0.1}
    (small / "ablation" / "ablation.json").write_text(json.dumps(plain))
    made = _made(small)
    assert OF_CHANCE in _check_numbers(made)
    clean, other = (
        next(line for line in plain["lines"] if line["removed"] == kind) for kind in ("nothing", "own code")
    )
    chance = clean["accuracy"]["value"] - other["drop"]["value"] / 0.4
    assert _column(_table(made, "Ablations"), "chance, model") == [f"{chance:.3f}"]
    for beginning in ("Own code removed: ", "Own code and controls: probe, projection (published)"):
        (note,) = _table(made, beginning)["notes"]
        assert note["text"].startswith("An accuracy below chance is an inversion of the class")
        assert "It occurs here (†): pca-1, probe, projection (published), own code: " in note["text"]
        assert len(note["numbers"]) == 3
    (note,) = _table(made, "Own code and controls: probe, projection (published)")["notes"]
    marked = [text for text in _column(_table(made, "Own code removed: "), "accuracy after") if "†" in text]
    assert len(marked) == 1
    assert marked[0] == f"{note['text'].rpartition('own code: ')[2].rstrip('.')} †"
    for line in plain["lines"]:
        line["drop_to_chance"] = {"value": 0.4, "low": 0.3, "high": 0.5}
    (small / "ablation" / "ablation.json").write_text(json.dumps(plain))
    made = _made(small)
    assert _table(made, "Own code and controls: probe, projection")["notes"][0]["text"].endswith(
        "nowhere in this table."
    )


def test_runs_caches_seeds_curves_contrasts_and_concepts_have_tables(made: Made) -> None:
    cache = clvq.Cache(made.folder / "cache")
    (row,) = _table(made, "Caches")["rows"]
    assert [cell["text"] for cell in row[:3]] == [cache.id[:12], "cache", "model"]
    runs = _table(made, f"Runs on cache {cache.id[:12]}, hidden.1 → hidden.3")
    assert _column(runs, "run") == [f"runs/{name}" for name in sorted([*RUNS, "network"])]
    assert re.fullmatch(
        r"encoder (yes|no) \([+-][0-9.]+%\); train (yes|no) \([+-][0-9.]+%\)",
        dict(zip(_column(runs, "run"), _column(runs, "loss still falling"), strict=True))["runs/network"],
    )
    assert _column(_table(made, "Means over seeds"), "runs") == [
        f"runs/{method}-0, runs/{method}-1" for method in ("kmeans", "pca")
    ]
    curves = _table(made, "Probability lost against norm removed: model, centred")
    assert {"lost at strength 0.5", "lost at strength 1", "common norm"} <= set(curves["columns"])
    contrasts = _table(made, "Runs against each other: model, centred")
    assert set(_column(contrasts, "first")) == {"kmeans"}
    concepts = _table(made, "Concepts that carry predictions")
    assert concepts["columns"][-3:] == ["anger", "fear", "joy"]
    assert all(text != "–" for text in _column(concepts, "main word"))
    agreement = _table(made, "Concepts against words")
    assert _column(agreement, "method").count("baseline") >= 3
    assert "word: AMI" in agreement["columns"]


class _Checker(HTMLParser):
    """Elements that open and close in order, ids, links, and what should not be there."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tables: list[list[int]] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given_attributes = dict(attrs)
        self.attributes.append((tag, given_attributes))
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [given_attributes["id"] or ""] if "id" in given_attributes else []
        self.links += [given_attributes["href"] or ""] if "href" in given_attributes else []
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append(0)
        if tag in ("td", "th"):
            self.tables[-1][-1] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _checked(html: str) -> _Checker:
    checker = _Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


def test_the_page_is_well_formed_needs_nothing_else_and_links_each_number_to_its_source(made: Made) -> None:
    page = _checked(made.html)
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert len(page.tables) == len(_tables(made))
    assert all(len(set(rows)) == 1 for rows in page.tables)
    tags = {tag for tag, _ in page.attributes}
    assert {"caption", "main", "nav", "figure", "figcaption"} <= tags
    assert "script" not in tags
    for tag, given_attributes in page.attributes:
        assert not any(name.startswith("on") for name in given_attributes)
        if tag == "th":
            assert given_attributes["scope"] in ("col", "row")
        if tag == "img":
            assert (given_attributes["src"] or "").startswith("data:image/svg+xml;base64,")
            assert given_attributes["alt"]
    assert "http:" not in made.html
    assert "https:" not in made.html
    values = [attributes for tag, attributes in page.attributes if tag == "a" and attributes.get("class") == "value"]
    files = {file: entry["number"] for entry in made.plain["sources"] for file in entry["files"]}
    assert len(values) > 500
    for attributes in values:
        place = (attributes["title"] or "").rpartition(": ")[2]
        file, _, pointer = place.partition("; ")[0].partition(" ")
        assert attributes["href"] == f"#source-{files[file]}"
        assert pointer.startswith("/")


def _markdown_tables(text: str) -> list[list[int]]:
    tables: list[list[int]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
            tables[-1].append(len(re.findall(r"(?<!\\)\|", line)) - 1)
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def test_tables_in_markdown_are_rectangular_and_name_their_sources(made: Made) -> None:
    tables = _markdown_tables(made.markdown)
    assert len(tables) == len(_tables(made))
    assert all(len(set(widths)) == 1 and len(widths) > 2 for widths in tables)
    captions = re.findall(r"^\*\*Table [0-9]+\.\*\* .*$", made.markdown, flags=re.MULTILINE)
    assert len(captions) == len(_tables(made))
    assert all(re.search(r"\. \[[0-9]+\](–|, |$)", caption) for caption in captions)
    for entry in made.plain["sources"]:
        assert f"**[{entry['number']}]** {entry['kind']} " in made.markdown


def test_figures_are_drawn_and_the_same_results_give_the_same_bytes_wherever_they_lie(
    small: Path, tmp_path: Path
) -> None:
    moved, one, two = tmp_path / "elsewhere" / "small", tmp_path / "one", tmp_path / "two"
    shutil.copytree(small, moved)
    # A font that lacks some signs of a name draws a box.
    for folder in (small, moved):
        for part in ("ablation/ablation.json", "quality/quality.json"):
            _edit(folder / part, '"pca-0"', '"_中文 $\\\\frac{$"')
    result = report(small, one)
    report(moved, two)
    assert (result.runs, result.ablations, result.qualities, result.sweeps, result.figures) == (1, 1, 1, 0, 3)
    names = ["ablation-1-effects", "ablation-1-curves", "quality-1"]
    files = sorted(str(file.relative_to(one)) for file in one.rglob("*") if file.is_file())
    figures = [f"figures/{name}.{kind}" for name in names for kind in ("svg", "png")]
    assert files == sorted([*figures, "report.html", "report.json", "report.md"])
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes()
    page = (one / "report.html").read_text(encoding="utf-8")
    assert str(tmp_path) not in page
    for number, name in enumerate(names, start=1):
        assert f"![Figure {number}](figures/{name}.svg)" in (one / "report.md").read_text(encoding="utf-8")
        svg = (one / "figures" / f"{name}.svg").read_bytes()
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert base64.b64encode(svg).decode() in page
        with Image.open(one / "figures" / f"{name}.png") as image:
            image.verify()
            assert min(image.size) > 200


def test_hostile_names_are_shown_and_do_nothing(small: Path, tmp_path: Path) -> None:
    for part in ("ablation/ablation.json", "quality/quality.json"):
        _edit(small / part, '"pca-1"', json.dumps(HOSTILE + "\u202e\x1b[31m"))
    _edit(small / "ablation" / "ablation.json", '"method": "pca"', '"method": "__<img src=x onerror=alert(1)>"')
    (small / "kmeans-0").rename(small / "_<b> $CACHE; rm -rf *")
    made = _made(small, "<h1>|&amp;")
    page = _checked(made.html)
    tags = {tag for tag, _ in page.attributes}
    assert "script" not in tags
    assert all("onerror" not in attributes for _, attributes in page.attributes)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in made.html
    assert "\u202e" not in made.html + made.markdown
    assert "\x1b" not in made.html + made.markdown
    assert "<script" not in re.sub(r"\\<", "", made.markdown)
    assert all(len(set(widths)) == 1 for widths in _markdown_tables(made.markdown))
    commands = {entry["kind"]: entry["command"] for entry in made.plain["sources"]}
    # No shell would get what it cannot be shown.
    assert commands["ablation"] is None
    command = commands["run"]
    assert shlex.split(command)[2] == "$CACHE"
    assert shlex.split(command)[-1] == "_<b> $CACHE; rm -rf *"
    assert "'_<b> $CACHE; rm -rf *'" in command


@pytest.mark.parametrize(
    ("file", "old", "new", "why"),
    [
        ("ablation/ablation.json", '"version": 3', '"version": 99', "it is of format version 99, and 3 is read"),
        ("ablation/ablation.json", '"lines": [', '"lines": ["x",', "should hold 'group'"),
        ("ablation/ablation.json", '"accuracy": {', '"accuracy": {"value": "high",', "damaged|should be a number"),
        ("ablation/ablation.json", "{", "", "it is damaged: "),
        ("ablation/ablation.json", '"sign_flips": ', '"sign_flips": NaN, "x": ', "NaN is no number of JSON"),
        ("ablation/ablation.json", '"pca-1"', '"\\ud800"', "surrogates not allowed"),
        ("quality/quality.json", '"version": 1', '"version": 2', "it is of format version 2, and 1 is read"),
        ("quality/quality.json", '"lines": [', '"lines": 3, "old": [', "at /lines it is a number out of range|list"),
        ("kmeans-0/report.json", '"own_code_fvu": ', '"own_code_fvu": "low", "x": ', "should be a number"),
        ("kmeans-0/config.json", '"version": 1', '"version": 7', "is a run of format version 7"),
        ("kmeans-0/config.json", '"lower"', '"lowest"', "is damaged at"),
    ],
)
def test_a_damaged_file_is_named_and_left_out(
    small: Path, tmp_path: Path, file: str, old: str, new: str, why: str
) -> None:
    text = (small / file).read_text(encoding="utf-8")
    assert old in text
    # A string once more would hide the first in JSON.
    (small / file).write_text(text.replace(old, new, 1) if old != '"accuracy": {' else _spoilt(text), encoding="utf-8")
    made = _made(small)
    (left,) = made.left_out
    assert left.path == (file if "report.json" not in file else "kmeans-0/config.json")
    assert re.search(why, left.why)
    assert made.plain["left_out"] == [{"path": left.path, "why": left.why}]
    assert str(tmp_path) not in left.why
    assert len(made.plain["sources"]) == 2


def _spoilt(text: str) -> str:
    plain = json.loads(text)
    plain["lines"][0]["accuracy"]["value"] = "high"
    return json.dumps(plain)


def test_damaged_concepts_leave_the_figures(small: Path, tmp_path: Path) -> None:
    (small / "quality" / "concepts.parquet").write_bytes(b"PAR1 nothing PAR1")
    made = _made(small)
    assert [left.path for left in made.left_out] == ["quality/concepts.parquet"]
    assert [entry["kind"] for entry in made.plain["sources"]] == ["run", "ablation", "quality"]


def test_an_unfinished_run_is_named(small: Path, tmp_path: Path) -> None:
    (small / "kmeans-0" / "model.safetensors").unlink()
    (left,) = _made(small).left_out
    assert left.why == "it has no model.safetensors: it is unfinished or damaged"


def test_links_lead_nowhere(small: Path, results: Path, tmp_path: Path) -> None:
    (small / "linked").symlink_to(results / "runs" / "pca-0")
    (small / "round").symlink_to(small)
    (small / "kmeans-0" / "metrics.jsonl").symlink_to("/etc/hosts")
    found = gather(small, leave=tmp_path / "out")
    assert [run.metrics for run in found.runs] == [()]
    assert [left.path for left in found.left_out] == ["linked", "round"]


def test_folders_are_searched_to_a_depth_and_the_report_itself_is_not(small: Path, tmp_path: Path) -> None:
    deep = small.joinpath(*"abcdefghij")
    shutil.copytree(small / "kmeans-0", deep)
    found = search(small, leave=tmp_path)
    assert [left.path for left in found.left_out] == ["a/b/c/d/e/f/g/h"]
    assert len(found.runs) == 1
    runs = tmp_path / "runs"
    shutil.copytree(small / "kmeans-0", runs / "kmeans-0")
    assert report(runs).runs == 1
    before = (runs / "report" / "report.json").read_bytes()
    # What looks like a run in the report's own folder is none.
    shutil.copytree(small / "kmeans-0", runs / "report" / "figures" / "kmeans-0")
    assert report(runs).runs == 1
    assert (runs / "report" / "report.json").read_bytes() == before


def test_a_folder_without_results_is_refused(tmp_path: Path, results: Path) -> None:
    with pytest.raises(DataNotFound, match="is no folder: give one that holds runs"):
        report(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataNotFound, match=r"holds no results that can be read: no finished run and no ablation\.json"):
        report(tmp_path / "empty")
    assert not (tmp_path / "empty" / "report").exists()
    (tmp_path / "broken" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "a" / "ablation.json").write_text("{")
    with pytest.raises(DataNotFound, match=r"; a/ablation\.json is left out: it is damaged"):
        report(tmp_path / "broken")


def test_another_report_and_other_files_are_kept(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.rmtree(small / "ablation")
    report(small, out)
    with pytest.raises(ResumeMismatch, match="of other results or with another title: give another --out, or --force"):
        report(small, out, title="Other")
    shutil.rmtree(small / "quality")
    (out / "figures" / "mine.png").write_bytes(b"mine")
    assert len(list((out / "figures").iterdir())) == 3
    report(small, out, force=True)
    assert [file.name for file in (out / "figures").iterdir()] == ["mine.png"]
    (out / "report.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no whole report"):
        report(small, out)
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds something that is no report \('thesis\.tex'\)"):
        report(small, out, force=True)


def test_results_whose_cache_and_runs_lie_elsewhere_are_reported(small: Path, tmp_path: Path) -> None:
    made = _made(small)
    (row,) = _table(made, "Caches")["rows"]
    assert [cell["text"] for cell in row[1:3]] == ["not in the folder", "model"]
    assert _table(made, "Concepts that carry predictions")["columns"][-1] == "class 2"
    ablation = next(entry for entry in made.plain["sources"] if entry["kind"] == "ablation")
    assert shlex.split(ablation["command"])[3:7] == RUNS


def test_two_measurements_of_one_cache_stand_in_one_table(small: Path, tmp_path: Path) -> None:
    other = json.loads((small / "quality" / "quality.json").read_bytes())
    renamed = json.loads(json.dumps(other).replace('"kmeans-', '"other-'))
    renamed["lines"][2]["figures"]["word purity"]["value"] += 0.1
    (small / "more").mkdir()
    (small / "more" / "quality.json").write_text(json.dumps(renamed))
    made = _made(small)
    names = _column(_table(made, "Concepts against words"), "concepts of")
    assert {"kmeans-0", "other-0", "pca-0 (more)", "pca-0 (quality)", "one concept"} <= set(names)
    assert len(names) == len(set(names))


def test_sweeps_are_reported_with_their_command(small: Path, results: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    rows = []
    for codes in (6, 8):
        runs = []
        for seed in (0, 1):
            name = f"codes={codes}-seed={seed}"
            config = method_config("kmeans", lower="hidden.1", upper="hidden.3", codes=codes, held_out="dev", seed=seed)
            fit(clvq.Cache(results / "cache"), config, sweep / "s" / name, device=torch.device("cpu"))
            runs.append(name)
        figure = {"mean": 0.5 + codes / 100, "low": 0.4, "high": 0.7, "seeds": 2}
        rows.append(
            {
                "settings": {"codes": codes},
                "runs": runs,
                "figures": {"own_code_fvu": figure},
                "directions": {"mean": 0.9, "low": 0.9, "high": 0.9, "pairs": [0.9]},
                "assignments": None,
            }
        )
    cache_id = clvq.Cache(results / "cache").id
    (sweep / "s" / "sweep.json").write_text(json.dumps({"cache_id": cache_id, "rows": rows, "failed": {}}))
    made = _made(sweep)
    table = _table(made, "Sweep s: ")
    assert _column(table, "own-code FVU") == ["0.5600 [0.4000, 0.7000]", "0.5800 [0.4000, 0.7000]"]
    assert _column(table, "AMI of assignments") == ["–", "–"]
    command = next(entry["command"] for entry in made.plain["sources"] if entry["kind"] == "sweep")
    assert command == (
        "clvq train $CACHE --lower hidden.1 --upper hidden.3 --method kmeans --split train --held-out dev "
        "--sweep codes=6,8 --seed 0 --seeds 2 --out s"
    )
    assert sweep_words([], [{"codes": 6}], "s", members=1) is None


@pytest.mark.parametrize("method", METHODS)
def test_the_command_of_a_run_names_every_setting_that_is_not_the_methods_own(method: str) -> None:
    classes = {"classes": 3} if method == "mean-difference" else {"codes": 12}
    config = method_config(method, lower="hidden.1", upper="hidden.3", seed=7, split=("train", "dev"), **classes)
    words = train_words(config)
    assert words is not None
    assert "--set" not in words
    changed = with_overrides(config, {"special": '"none"', "upper": '"hidden.2"'})
    words = train_words(changed)
    assert words is not None
    assert words[words.index("--set") + 1] == 'special="none"'
    assert words[words.index("--upper") + 1] == "hidden.2"


def test_the_command_prints_one_line_for_what_is_left_out(
    results: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(results / "runs" / "pca-0", folder / "pca-0")
    (folder / "quality.json").write_text("{")
    assert command("report", folder, "--out", tmp_path / "out", "--json") == 0
    said = capsys.readouterr()
    assert said.err.startswith("left out: quality.json: it is damaged")
    assert said.err.count("\n") == 1
    assert json.loads(said.out)["runs"] == 1
    assert command("report", folder, "--out", tmp_path / "out", "--title", "Other", "--force") == 0
    assert f"{tmp_path / 'out'} holds a report of 1 runs, 0 ablations" in capsys.readouterr().out
    assert command("report", tmp_path / "nowhere") == 1
    assert capsys.readouterr().err.startswith("error: ")


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(any_json, any_json)
def test_any_json_is_a_result_or_an_error_and_nothing_else(first: Any, second: Any) -> None:
    for value in (first, {"settings": {"version": 2, "runs": first}, "lines": second, "rows": [first]}):
        for read in (report_ablation.read_ablation, report_quality.read_quality, report_quality.read_sweep):
            with pytest.raises((DataError, clvq.ClvqError)):
                read("folder", Node(Source("file", ""), value))


@given(any_json)
def test_a_pointer_leads_back_to_its_value(value: Any) -> None:
    def walk(node: Node) -> Iterator[Node]:
        yield node
        inner = node.each() if isinstance(node.value, list) else []
        inner = list(node.members().values()) if isinstance(node.value, dict) else inner
        for one in inner:
            yield from walk(one)

    for node in walk(Node(Source("file", ""), value)):
        assert _follow(value, node.source.pointer) is node.value


@given(st.text())
def test_text_is_one_line_of_printable_signs(text: str) -> None:
    assert all(sign.isprintable() for sign in shown(text))
    assert len(shown(text)) <= 160
    shown(text).encode()
    assert not re.search(r"(?<!\\)(\\\\)*[|<>`]", escaped(shown(text)))


def test_references_that_follow_each_other_are_a_range() -> None:
    assert references([1, 2, 3, 5, 7, 8]) == "[1]–[3], [5], [7]–[8]"
    assert references([]) == ""
    assert Cell(()).text == ""
