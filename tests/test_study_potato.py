"""A study for Potato: the deal of the study, nothing of the predictions, text as text, and answers read back."""

import json
import re

import pytest
from clvq.errors import ConfigError, DataError, DataNotFound
from clvq.evaluation.study.answers import Answer
from clvq.evaluation.study.deal import booklets, make_pool
from clvq.evaluation.study.potato import export_potato, read_potato
from clvq.evaluation.study.settings import StudySettings

from .study_maker import make_items

SETTINGS = StudySettings(annotators=3, show=("words", "sentences", "labels"), contact="Ask <us> & {{ them }}.")


def exported(tmp_path, **items):
    made = make_items(tmp_path / "items.json", **{"items": 6, "methods": 3, **items})
    result = export_potato(tmp_path / "items.json", tmp_path / "potato", SETTINGS)
    config = json.loads((tmp_path / "potato" / "config.yaml").read_text())
    lines = [json.loads(line) for line in (tmp_path / "potato" / "data" / "questions.jsonl").read_text().splitlines()]
    return made, result, config, lines


def test_each_booklet_is_the_batch_of_one_user(tmp_path):
    items, result, config, lines = exported(tmp_path)
    groups = config["batch_assignment"]["groups"]
    assert config["assignment_strategy"] == "batch"
    assert [group["annotators"] for group in groups] == [["annotator-1"], ["annotator-2"], ["annotator-3"]]
    wanted = [
        [f"{one.item}_{one.method}".removesuffix("_") for one in booklet if one.kind != "training"]
        for booklet in booklets(make_pool(items, SETTINGS), 3)
    ]
    assert [group["instances"] for group in groups] == wanted
    assert {line["id"] for line in lines} == {name for group in wanted for name in group}
    assert (result.questions, result.annotators, result.per_annotator) == (len(lines), 3, 8)


def test_nothing_of_texts_and_predictions_is_written(tmp_path):
    _, _, config, lines = exported(tmp_path)
    assert all(set(line) == {"id", "text"} for line in lines)
    assert "secret" not in json.dumps([config, lines])
    assert "prediction" not in json.dumps([config, lines])


def test_all_text_is_escaped(tmp_path):
    _, _, config, lines = exported(tmp_path, hostile=True, classes=4, items=10)
    shown = [line["text"] for line in lines]
    shown += [label for scheme in config["annotation_schemes"] for label in scheme["labels"]]
    shown.append(config["annotation_instructions"])
    for text in shown:
        tags = set(re.findall(r"<[^>]*>?", text))
        assert tags <= {"<p>", "</p>", "<ul>", "</ul>", "<li>", "</li>", "<h3>", "</h3>", "<mark>", "</mark>"}
        assert not {"{", "}", "\u202e", "\x00", "\x1b", "\u2028"} & set(text)
        assert text.count("\u2068") == text.count("\u2069")
    assert "Ask &lt;us&gt; &amp; &#123;&#123; them &#125;&#125;." in config["annotation_instructions"]


def test_an_attention_check_says_what_to_answer(tmp_path):
    items, _, _, lines = exported(tmp_path)
    check = items.of_kind("attention")[0]
    text = next(line["text"] for line in lines if line["id"] == check.id)
    assert f"“\u2068{items.classes[check.prediction]}\u2069” and “certain”" in text


def test_a_folder_that_is_not_empty_is_written_over_by_force_alone(tmp_path):
    exported(tmp_path)
    with pytest.raises(ConfigError, match="is not empty: give another --out, or --force"):
        export_potato(tmp_path / "items.json", tmp_path / "potato", SETTINGS)
    export_potato(tmp_path / "items.json", tmp_path / "potato", SETTINGS, force=True)


def state(names: list[str], *, answer: str = "2. positive", confidence: str = "4. certain") -> dict:
    """As Potato 2.12 keeps it, but for what is not read."""
    return {
        "user_id": "annotator-1",
        "instance_id_ordering": names,
        "instance_id_to_behavioral_data": {
            name: {
                "session_start": 1_795_725_095.5,
                "annotation_changes": [
                    {"timestamp": 1_795_725_097.0, "schema_name": "answer"},
                    {"timestamp": 1_795_725_098.75, "schema_name": "confidence"},
                ],
            }
            for name in names[:2]
        },
        "instance_id_to_label_to_value": {
            names[1]: [
                [{"schema": "answer", "name": answer}, answer],
                [{"schema": "confidence", "name": confidence}, confidence],
            ],
            # Not finished.
            names[0]: [[{"schema": "answer", "name": answer}, answer]],
        },
    }


def kept(tmp_path, content: object) -> None:
    folder = tmp_path / "potato" / "annotation_output" / "annotator-1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "user_state.json").write_text(json.dumps(content))


def test_answers_are_read_back(tmp_path):
    _, _, config, _ = exported(tmp_path)
    names = config["batch_assignment"]["groups"][0]["instances"]
    with pytest.raises(DataNotFound, match="nothing was answered with Potato yet"):
        read_potato(tmp_path / "potato", tmp_path / "items.json")
    kept(tmp_path, state(names))
    item, _, method = names[1].partition("_")
    assert read_potato(tmp_path / "potato", tmp_path / "items.json") == [
        Answer("annotator-1", 1, item, method, "main", 1, 4, 3_250, "2026-11-26T20:31:38.750+00:00")
    ]


def test_a_state_of_another_study_is_refused(tmp_path):
    _, _, config, _ = exported(tmp_path)
    names = config["batch_assignment"]["groups"][0]["instances"]
    for damaged in ([], {}, state(["x", "y_z"]), state(names, answer="3. other"), state(names, confidence="sure")):
        kept(tmp_path, damaged)
        with pytest.raises(DataError, match=r"user_state\.json is damaged, or of another study than"):
            read_potato(tmp_path / "potato", tmp_path / "items.json")
