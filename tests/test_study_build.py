"""The folder of a study: what stands in it, what a browser may see, and what is never overwritten."""

import json
import stat
from datetime import UTC, datetime, timedelta

import pytest
from clvq.errors import ConfigError, DataError, DataNotFound, FolderInUse, FormatVersion, ResumeMismatch
from clvq.evaluation.study.build import build
from clvq.evaluation.study.database import Database, Given
from clvq.evaluation.study.folder import read_study
from clvq.evaluation.study.items import read_items
from clvq.evaluation.study.pages import page_data, paragraphs, right_answer, script, shown
from clvq.evaluation.study.settings import CONSENT, StudySettings
from pydantic import ValidationError

from .study_maker import HOSTILE, make_items

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def items_path(tmp_path):
    make_items(tmp_path / "items.json", items=6, methods=3)
    return tmp_path / "items.json"


def page_json(folder) -> dict:
    text = (folder / "pages" / "study-data.js").read_text(encoding="ascii")
    return json.loads(text.removeprefix("window.studyData = ").removesuffix(";\n"))


def answered(folder) -> None:
    study = read_study(folder)
    database = Database(folder / "answers.sqlite", study.digest, study.pool, idle=timedelta(hours=1))
    database.tokens(1)
    standing = database.consent(1, now=NOW)
    question = standing.question
    database.answer(1, Given(0, question.item, question.method, 0, 1, 5), now=NOW)
    database.close()


def test_a_study_is_built_and_read_back(items_path, tmp_path):
    settings = StudySettings(annotators=4, seed=3)
    result = build(items_path, tmp_path / "study", settings)
    assert (result.main, result.training, result.attention, result.methods, result.questions) == (6, 2, 2, 3, 10)
    assert (result.annotators, result.fewest, result.most, result.unchanged) == (4, 1, 2, False)
    study = read_study(tmp_path / "study")
    assert study.settings == settings
    assert [len(booklet) for booklet in study.booklets] == [10] * 4
    assert {path.name for path in (tmp_path / "study").iterdir()} == {"study.json", "items.json", "pages"}


def test_the_item_file_is_for_its_owner_alone(items_path, tmp_path):
    build(items_path, tmp_path / "study", StudySettings())
    path = tmp_path / "study" / "items.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == items_path.read_bytes()


def test_pages_know_no_text_and_no_prediction_but_of_practice(tmp_path):
    items = make_items(tmp_path / "items.json", items=8, methods=3, training=2)
    build(tmp_path / "items.json", tmp_path / "study", StudySettings())
    written = b"".join(path.read_bytes() for path in (tmp_path / "study" / "pages").iterdir())
    assert b"secret" not in written
    assert b"prediction" not in written
    data = page_json(tmp_path / "study")
    assert data["right"] == {item.id: item.prediction for item in items.of_kind("training")}
    # Nor can it be read from how the parts are named and ordered: other predictions give the same pages.
    other = items.model_dump(mode="json")
    for item in other["items"]:
        if item["kind"] == "main":
            item["prediction"] = 1 - item["prediction"]
    (tmp_path / "other.json").write_text(json.dumps(other))
    build(tmp_path / "other.json", tmp_path / "other", StudySettings())
    theirs = page_json(tmp_path / "other")
    assert {**theirs, "study": ""} == {**data, "study": ""}


def test_settings_choose_what_is_shown(tmp_path):
    items = make_items(tmp_path / "items.json")
    item = items.of_kind("main")[0]
    study = build(tmp_path / "items.json", tmp_path / "study", StudySettings())
    question = next(one for one in read_study(study.path).booklets[0] if one.item == item.id)
    view = item.concepts[question.method]
    everything = StudySettings(show=("words", "sentences", "labels"))
    found = shown(question, item, everything, items)
    assert found["words"] == [[word.word, word.share] for word in view.words]
    assert found["sentences"] == [[one.before, one.word, one.after] for one in view.sentences]
    assert found["labels"] == list(view.labels)
    assert shown(question, item, StudySettings(), items)["labels"] == []
    assert shown(question, item, StudySettings(show=("sentences",)), items)["words"] == []
    assert right_answer(question, item) is None


def test_an_attention_check_says_what_to_answer(tmp_path):
    items = make_items(tmp_path / "items.json")
    build(tmp_path / "items.json", tmp_path / "study", StudySettings())
    study = read_study(tmp_path / "study")
    question = next(one for one in study.booklets[0] if one.kind == "attention")
    item = study.item(question.item)
    assert question.method == ""
    assert shown(question, item, study.settings, items) == {
        "check": item.prediction, "words": [], "sentences": [], "labels": [],
    }  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_can_end_the_script_that_carries_it(text: str):
    written = script({"text": text})
    assert written.isascii()
    assert not {*b"<>&"} & {*written}
    assert written.count(b"\n") == 1
    assert json.loads(written.removeprefix(b"window.studyData = ").removesuffix(b";\n")) == {"text": text}


def test_paragraphs_stand_between_empty_lines():
    assert paragraphs("One\ntwo.\n\n \nThree <b>.\n") == ["One two.", "Three <b>."]
    assert paragraphs(" \n") == []
    assert len(paragraphs(CONSENT)) == 3


def test_instructions_speak_of_practice_and_checks_where_there_are_any(tmp_path):
    plain = make_items(tmp_path / "plain.json", training=0, attention=0)
    full = make_items(tmp_path / "full.json")
    settings = StudySettings(instructions="Do it.")
    assert page_data(settings, plain, "")["instructions"] == ["Do it."]
    assert len(page_data(settings, full, "")["instructions"]) == 3


def test_building_again_keeps_answers(items_path, tmp_path):
    build(items_path, tmp_path / "study", StudySettings())
    answered(tmp_path / "study")
    before = (tmp_path / "study" / "answers.sqlite").read_bytes()
    assert build(items_path, tmp_path / "study", StudySettings(), force=True).unchanged
    assert (tmp_path / "study" / "answers.sqlite").read_bytes() == before


def test_answers_are_never_overwritten(items_path, tmp_path):
    build(items_path, tmp_path / "study", StudySettings())
    answered(tmp_path / "study")
    for force in (False, True):
        with pytest.raises(ResumeMismatch, match=r"1 answers were given; .* not with --force: give another --out"):
            build(items_path, tmp_path / "study", StudySettings(seed=1), force=force)
    assert read_study(tmp_path / "study").settings.seed == 0


def test_another_study_without_answers_is_replaced_by_force_alone(items_path, tmp_path, caplog):
    build(items_path, tmp_path / "study", StudySettings())
    study = read_study(tmp_path / "study")
    database = Database(tmp_path / "study" / "answers.sqlite", study.digest, study.pool, idle=timedelta(hours=1))
    database.tokens(2)
    database.close()
    with pytest.raises(ResumeMismatch, match="no answers: give another --out, or --force"):
        build(items_path, tmp_path / "study", StudySettings(seed=1))
    build(items_path, tmp_path / "study", StudySettings(seed=1), force=True)
    assert read_study(tmp_path / "study").settings.seed == 1
    assert not (tmp_path / "study" / "answers.sqlite").exists()
    assert "end to work" in caplog.text


def test_a_folder_of_something_else_is_left_alone(items_path, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("words")
    with pytest.raises(ConfigError, match=r"is no study and holds 'chapter.txt'"):
        build(items_path, tmp_path / "thesis", StudySettings(), force=True)
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


def test_a_build_that_was_cut_short_is_finished(items_path, tmp_path):
    build(items_path, tmp_path / "study", StudySettings())
    (tmp_path / "study" / "study.json").unlink()
    build(items_path, tmp_path / "study", StudySettings(seed=2))
    assert read_study(tmp_path / "study").settings.seed == 2


def test_a_study_in_use_is_not_built_over(items_path, tmp_path):
    from clvq.cache.files import only_writer

    build(items_path, tmp_path / "study", StudySettings())
    with only_writer(tmp_path / "study"), pytest.raises(FolderInUse, match="another process"):
        build(items_path, tmp_path / "study", StudySettings())


def test_what_is_no_study_is_refused(items_path, tmp_path):
    folder = tmp_path / "study"
    with pytest.raises(DataNotFound, match=r"is no study: it has no study.json; make one with `clvq study build`"):
        read_study(folder)
    build(items_path, folder, StudySettings())
    right = (folder / "study.json").read_text()
    for damaged, error, said in (
        ("{", DataError, "is not JSON"),
        ("[" * 100_000, DataError, "is not JSON"),
        ("[]", DataError, "lacks the format 'clvq-study'"),
        (right.replace('"version": 1', '"version": 2'), FormatVersion, "has version 2, and this clvq reads 1"),
        (right.replace('"seed"', '"sead"'), DataError, "is damaged: settings"),
        (right.replace(read_items(items_path)[1], "0" * 64), DataError, "not the item file that the study was built"),
    ):
        (folder / "study.json").write_text(damaged)
        with pytest.raises(error, match=said):
            read_study(folder)


def test_settings_that_make_no_sense_are_refused():
    for wrong in ({"show": ()}, {"show": ("texts",)}, {"annotators": 0}, {"title": ""}, {"per_annotator": 0}):
        with pytest.raises(ValidationError):
            StudySettings(**wrong)
