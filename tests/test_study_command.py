"""`clvq study …` as a user runs it: from items to a score, with scripted annotators over HTTP in between."""

import csv
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clvq.evaluation.study.items import Items, Key, key_path, read_items, read_key, write_items

from .commands import Command, command_of
from .judge_servers import ScriptedJudge, scripted
from .study_maker import make_items
from .study_processes import Server, an_answer, ask

TRUE_SHARE = 0.95
"""Of what a scripted annotator sees in the words that it answers by."""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_of(monkeypatch, capsys)


def _controlled(path: Path, *, items: int, seed: int = 0) -> tuple[Items, Key]:
    """Items whose first word names the prediction in 90 % (and the duplicate's the same), 70 %, or by chance."""
    made = make_items(path, items=items, methods=4, attention=3, training=2, seed=seed)
    key = read_key(key_path(path), read_items(path)[1])
    blind = {method.name: own for own, method in key.methods.items()}
    generator = np.random.default_rng(seed)
    changed = []
    for item in made.items:
        if item.kind != "attention":
            views = {}
            for name, share in (("run-0", 0.9), ("run-1", 0.7), ("another text's concept", 0.5)):
                points_to = item.prediction if generator.random() < share else 1 - item.prediction
                view = item.concepts[blind[name]]
                first = view.words[0].model_copy(update={"word": made.classes[points_to]})
                views[blind[name]] = view.model_copy(update={"words": (first, *view.words[1:])})
            item = item.model_copy(update={"concepts": {**views, blind["again"]: views[blind["run-0"]]}})
        changed.append(item)
    fresh = made.model_copy(update={"items": tuple(changed)})
    return fresh, write_items(path, fresh, key.model_dump(exclude={"items_sha256"}))


def _take_part(link: str, classes: tuple[str, ...], generator: np.random.Generator, *, attentive: bool) -> int:
    """Answer by the first word, most of the time; how many answers were given."""
    status, standing = ask(f"{link}consent", {})
    assert status == 200
    given = 0
    while standing["question"] is not None:
        question = standing["question"]
        if question["check"] is not None:
            answer = question["check"] if attentive else 1 - question["check"]
        else:
            answer = classes.index(question["words"][0][0])
            answer = answer if generator.random() < TRUE_SHARE else 1 - answer
        body = an_answer(standing, answer=answer, milliseconds=int(generator.integers(500, 9000)))
        status, saved = ask(f"{link}answers", body)
        assert status == 200
        standing = saved["standing"]
        given += 1
    return given


def _worth(shown: Mapping[str, Any], concept: Mapping[str, Any]) -> float:
    """What a judge makes of a concept that people answer by its first word."""
    return 5.0 if concept["words"][0].startswith(f"{shown['predicted class']} ") else 1.0


def test_a_study_of_scripted_annotators_finds_methods_and_controls_to_be_as_they_are(command: Command, tmp_path: Path):
    items = tmp_path / "items.json"
    made, _ = _controlled(items, items=60)
    built = command("study", "build", items, "--out", tmp_path / "study", "--annotators", "12")
    assert (built.code, built.err) == (0, "")
    assert "65 questions per person (with 2 for practice and 3 checks) of 60 items × 4 methods" in built.out
    with Server(tmp_path / "study") as server:
        assert len(server.links) == 12
        for number, link in enumerate(server.links):
            generator = np.random.default_rng(number)
            assert _take_part(link, made.classes, generator, attentive=number > 0) == 65
        meanwhile = command("study", "export", tmp_path / "study", "--out", tmp_path / "answers.csv")
        assert (meanwhile.code, meanwhile.out) == (0, f"{tmp_path / 'answers.csv'}: 780 answers\n")
    with open(tmp_path / "answers.csv", newline="") as file:
        assert len({(row["annotator"], row["item"]) for row in csv.DictReader(file)}) == 780
    words = ("study", "score", tmp_path / "study", "--key", key_path(items))
    found = json.loads(command(*words, "--json").out)
    methods = found["all"]["methods"]
    accuracy = {line["name"]: line["accuracy"] for line in methods}
    assert methods[-1]["role"] == "random"
    assert accuracy["another text's concept"]["low"] <= 0.5 <= accuracy["another text's concept"]["high"]
    (repeat,) = found["all"]["duplicates"]
    assert repeat["difference"]["low"] <= 0 <= repeat["difference"]["high"]
    assert accuracy["run-0"]["low"] > accuracy["another text's concept"]["high"]
    assert found["failed"] == ["1"]
    assert found["attentive"]["annotators"] == 11
    # The share of right answers that an annotator who sees all words of all methods alike is expected to give.
    first_words = {
        (item.id, method): item.concepts[method].words[0].word == made.classes[item.prediction]
        for item in made.of_kind("main")
        for method in made.methods
    }
    seen = {name: [] for name in (person["annotator"] for person in found["annotators"])}  # type: dict[str, list[bool]]
    with open(tmp_path / "answers.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["kind"] == "main":
                seen[row["annotator"]].append(first_words[row["item"], row["method"]])
    inside = 0
    for person in found["annotators"]:
        pointed = np.mean(seen[person["annotator"]])
        truth = TRUE_SHARE * pointed + (1 - TRUE_SHARE) * (1 - pointed)
        inside += person["accuracy"]["low"] <= truth <= person["accuracy"]["high"]
    assert inside == 12
    shown = command(*words)
    assert (shown.code, shown.err) == (0, "")
    for part in ("again", "duplicate", "random", "failed an attention item: 1", "Krippendorff", "Fleiss", "at chance"):
        assert part in shown.out
    with scripted(ScriptedJudge(_worth, noise=0.0)) as judges:
        asked = ("judge", items, "--endpoint", judges.url, "--model", "fair", "--out", tmp_path / "judged")
        assert command(*asked, "--concurrency", "8").code == 0
    both = json.loads(command(*words, "--judged", tmp_path / "judged", "--json").out)["judges"]
    assert both["items"] == 60
    assert both["spearman"]["low"] > 0.5
    assert "people and judges of" in command(*words, "--judged", tmp_path / "judged").out
    blind = command("study", "score", tmp_path / "study")
    assert "run-0" not in blind.out
    assert "methods go by their blind ids: give --key to see which is which" in blind.out


def test_the_command_serves_until_it_is_told_to_stop_and_gives_the_links_again(command: Command, tmp_path: Path):
    make_items(tmp_path / "items.json", items=3)
    command("study", "build", tmp_path / "items.json", "--out", tmp_path / "study", "--annotators", "2")
    code = "from clvq.cli import main; main()"
    started = subprocess.Popen(
        [sys.executable, "-c", code, "study", "serve", str(tmp_path / "study"), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = [started.stdout.readline() for _ in range(4)]  # type: ignore[union-attr]
    assert lines[0] == "personal links; whoever has one answers as that person:\n"
    shown = [line.split()[1] for line in lines[1:3]]
    assert ask(f"{shown[0]}state")[0] == 200
    base = shown[0].split("/a/")[0]
    again = command("study", "links", tmp_path / "study", "--url", base)
    assert [line.split()[1] for line in again.out.splitlines()] == shown
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=30)[1]
    assert started.returncode == 130
    assert "stopped by SIGINT; every answer is saved" in said


def test_files_saved_by_pages_without_a_server_are_scored_too(command: Command, tmp_path: Path):
    items = tmp_path / "items.json"
    make_items(items, items=4, methods=2, attention=0, training=0)
    command("study", "build", items, "--out", tmp_path / "study", "--annotators", "1")
    study = json.loads((tmp_path / "study" / "study.json").read_bytes())
    saved: dict[str, Any] = {
        "format": "clvq-answers",
        "version": 1,
        "study": hashlib.sha256((tmp_path / "study" / "study.json").read_bytes()).hexdigest(),
        "booklet": 1,
        "id": "0" * 24,
        "answers": [
            {
                "place": place, "item": one["item"], "method": one["method"], "answer": 0, "confidence": 3,
                "milliseconds": 800, "answered_at": "2030-01-01T00:00:00Z",
            }
            for place, one in enumerate(study["booklets"][0])
        ],
    }  # fmt: skip
    (tmp_path / "saved.json").write_text(json.dumps(saved))
    found = command("study", "score", tmp_path / "study", "--answers", tmp_path / "saved.json", "--json")
    assert (found.code, found.err) == (0, "")
    assert json.loads(found.out)["all"]["answers"] == 4


def test_mistakes_are_one_line(command: Command, tmp_path: Path):
    make_items(tmp_path / "items.json", items=3)

    def line(*words: object) -> str:
        ended = command("study", *words)
        assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)
        return ended.err

    out = tmp_path / "study"
    assert "is not there, or is a folder, and is to be an item file" in line(
        "build", tmp_path / "no.json", "--out", out
    )
    assert "--words picture: input should be 'cloud' or 'list'" in line(
        "build", tmp_path / "items.json", "--out", out, "--words", "picture"
    )
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    assert "latin.txt is not text in UTF-8" in line(
        "build", tmp_path / "items.json", "--out", out, "--consent", tmp_path / "latin.txt"
    )
    assert "is no study: it has no study.json; make one with `clvq study build`" in line("score", tmp_path)
    assert command("study", "build", tmp_path / "items.json", "--out", out).code == 0
    assert "has no answers yet: serve it, or give the files that its pages saved" in line("score", out)
    assert "has no links yet: they are made when it is first served" in line("links", out)
    assert "--controls twice: 'twice' is none; give duplicate, random, or both" in line(
        "items", tmp_path, tmp_path, "--out", tmp_path / "i.json", "--controls", "twice"
    )
