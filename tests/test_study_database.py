"""Answers in SQLite: once each, in order, bound to their study, balanced whoever stops; and answers as files."""

import csv
import json
import random
import sqlite3
import stat
from collections import Counter
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from clvq.errors import ConfigError, DataError, DataNotFound, DiskFull, FolderInUse, FormatVersion
from clvq.evaluation.study import database_file
from clvq.evaluation.study.answer_files import export, read_answer_files
from clvq.evaluation.study.answers import Answer
from clvq.evaluation.study.build import build
from clvq.evaluation.study.database import Database, Given
from clvq.evaluation.study.database_file import read_answers
from clvq.evaluation.study.deal import make_pool
from clvq.evaluation.study.folder import read_study
from clvq.evaluation.study.settings import StudySettings

from .study_maker import make_items

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
DIGEST = "a" * 64


@pytest.fixture
def pool(tmp_path):
    return make_pool(make_items(tmp_path / "items.json", items=6, methods=3), StudySettings())


@pytest.fixture
def opened(tmp_path, pool):
    database = Database(tmp_path / "answers.sqlite", DIGEST, pool, idle=timedelta(hours=1))
    database.tokens(3)
    yield database
    database.close()


def given(standing, *, answer: int = 1, confidence: int = 3) -> Given:
    return Given(standing.place, standing.question.item, standing.question.method, answer, confidence, 1_234)


def test_a_person_goes_from_consent_through_all_questions(opened, tmp_path):
    before = opened.standing(2)
    assert (before.consented, before.total, before.question) == (False, 0, None)
    standing = opened.consent(2, now=NOW)
    assert (standing.consented, standing.answered, standing.total, standing.place) == (True, 0, 10, 0)
    asked = []
    while standing.question:
        asked.append(standing.question)
        later = NOW + timedelta(seconds=len(asked))
        assert opened.answer(2, given(standing), now=later) == standing.question
        standing = opened.standing(2)
    assert (standing.answered, standing.place) == (10, None)
    found = read_answers(tmp_path / "answers.sqlite")
    assert [(one.item, one.method, one.kind) for one in found] == [(one.item, one.method, one.kind) for one in asked]
    assert found[3] == Answer("2", 3, asked[3].item, asked[3].method, asked[3].kind, 1, 3, 1_234, found[3].answered_at)
    assert found[3].answered_at == "2026-01-02T03:04:09.000+00:00"


def test_the_first_answer_stays(opened, tmp_path):
    standing = opened.consent(1, now=NOW)
    first = given(standing, answer=0)
    for again in (first, first, given(standing, answer=1)):
        assert opened.answer(1, again, now=NOW) == standing.question
    assert [one.answer for one in read_answers(tmp_path / "answers.sqlite")] == [0]
    assert opened.standing(1).place == 1


def test_what_was_not_asked_cannot_be_answered(opened, tmp_path):
    standing = opened.consent(1, now=NOW)
    question = standing.question
    for wrong in (
        Given(1, question.item, question.method, 0, 1, 1),
        Given(0, "item-999", question.method, 0, 1, 1),
        Given(0, question.item, "other", 0, 1, 1),
    ):
        assert opened.answer(1, wrong, now=NOW) is None
    assert opened.answer(2, given(standing), now=NOW) is None
    assert read_answers(tmp_path / "answers.sqlite") == []


def test_consent_twice_begins_once(opened):
    standing = opened.consent(1, now=NOW)
    opened.answer(1, given(standing), now=NOW)
    assert opened.consent(1, now=NOW).answered == 1


def test_all_is_there_when_the_file_is_opened_again(opened, tmp_path, pool):
    tokens = opened.tokens()
    opened.answer(1, given(opened.consent(1, now=NOW)), now=NOW)
    standing = opened.standing(1)
    opened.close()
    again = Database(tmp_path / "answers.sqlite", DIGEST, pool, idle=timedelta(hours=1))
    assert again.tokens() == tokens
    assert again.standing(1) == standing
    again.close()


def test_links_are_added_and_never_removed(opened):
    three = opened.tokens()
    five = opened.tokens(5)
    assert five[:3] == three
    assert opened.tokens(1) == five
    assert len(set(five)) == 5
    assert all(len(token) == 32 for token in five)


def test_answers_are_for_their_owner_alone(opened, tmp_path):
    opened.consent(1, now=NOW)
    for path in tmp_path.glob("answers.sqlite*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name


def test_answers_survive_a_power_cut(opened):
    # What stands in the file before an answer is acknowledged was forced to the disk.
    assert opened._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert opened._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert opened._connection.execute("PRAGMA foreign_keys").fetchone() == (1,)


def test_another_studys_answers_are_refused(opened, tmp_path, pool):
    opened.close()
    with pytest.raises(DataError, match=r"holds answers to the study aaaaaaaaaaaa…, and this one is bbbbbbbbbbbb…"):
        Database(tmp_path / "answers.sqlite", "b" * 64, pool, idle=timedelta(hours=1))


def test_a_newer_file_is_refused(opened, tmp_path, pool):
    opened._connection.execute("PRAGMA user_version = 2")
    opened.close()
    with pytest.raises(FormatVersion, match="has version 2, and this clvq reads 1"):
        Database(tmp_path / "answers.sqlite", DIGEST, pool, idle=timedelta(hours=1))


def test_another_database_is_refused(tmp_path, pool):
    path = tmp_path / "answers.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE recipes (name)")
    connection.commit()
    connection.close()
    with pytest.raises(DataError, match="none with a study's answers"):
        Database(path, DIGEST, pool, idle=timedelta(hours=1))


def test_damage_is_told_with_what_to_do(opened, tmp_path, pool):
    for annotator in (1, 2, 3):
        opened.consent(annotator, now=NOW)
    opened.close()
    path = tmp_path / "answers.sqlite"
    whole = path.read_bytes()
    for damaged in (b"no database at all" * 100, whole[:4_200], whole[:4_096] + b"\xff" * (len(whole) - 4_096)):
        path.write_bytes(damaged)
        for action in (
            lambda: Database(path, DIGEST, pool, idle=timedelta(hours=1)),
            lambda: read_answers(path),
        ):
            with pytest.raises(DataError, match=r"is damaged .*copy it .* \.recover"):
                action()
    assert path.read_bytes() == damaged


def test_a_full_disk_loses_no_answer(opened, tmp_path):
    standing = opened.consent(1, now=NOW)
    pages = opened._connection.execute("PRAGMA page_count").fetchone()[0]
    opened._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DiskFull, match=r"no room left .* acknowledged before is kept"):
        opened.tokens(5_000)
    assert len(opened.tokens()) == 3
    opened._connection.execute("PRAGMA max_page_count = 100000")
    opened.answer(1, given(standing), now=NOW)
    assert len(read_answers(tmp_path / "answers.sqlite")) == 1


def test_a_file_that_another_process_locks_is_waited_for_and_then_refused(opened, tmp_path, pool, monkeypatch):
    opened._connection.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(database_file, "_BUSY_MILLISECONDS", 20)
    other = Database(tmp_path / "answers.sqlite", DIGEST, pool, idle=timedelta(hours=1))
    with pytest.raises(FolderInUse, match="is locked by another process"):
        other.tokens(9)
    # Reading is never in the way.
    assert read_answers(tmp_path / "answers.sqlite") == []
    other.close()
    opened._connection.execute("ROLLBACK")


def played(tmp_path, *, people: int, stopping: int, seed: int, idle: int, per_annotator: int | None = None):
    """People answer in a random order; some stop halfway. Answers, and who finished."""
    items = make_items(tmp_path / "items.json", items=30, methods=5, training=1, attention=1)
    pool = make_pool(items, StudySettings(per_annotator=per_annotator, seed=seed))
    path = tmp_path / f"{people}-{stopping}-{seed}.sqlite"
    database = Database(path, DIGEST, pool, idle=timedelta(minutes=idle))
    database._connection.execute("PRAGMA synchronous = OFF")
    everyone = range(1, people + stopping + 1)
    database.tokens(len(everyone))
    dice, now = random.Random(seed), NOW
    stop_at = {one: dice.randrange(2, pool.questions) for one in dice.sample(everyone, stopping)}
    waiting, there = list(everyone), []
    while waiting or there:
        now += timedelta(seconds=30)
        if waiting and (not there or dice.random() < 0.1):
            there.append(waiting.pop(0))
            database.consent(there[-1], now=now)
        one = dice.choice(there)
        standing = database.standing(one)
        if standing.question is None or standing.answered >= stop_at.get(one, 1_000):
            there.remove(one)
            continue
        database.answer(one, given(standing), now=now)
    database.close()
    main = [answer for answer in read_answers(path) if answer.kind == "main"]
    cells = Counter((answer.item, answer.method) for answer in main)
    counts = np.array([[cells[item, method] for method in pool.methods] for item in pool.main])
    own = Counter((answer.annotator, answer.method) for answer in main)
    finished = [str(one) for one in everyone if one not in stop_at]
    return counts, [own[one, method] for one in finished for method in pool.methods]


@pytest.mark.parametrize("seed", range(2))
def test_people_who_come_and_answer_in_any_order_give_each_cell_equally_many(tmp_path, seed: int):
    counts, own = played(tmp_path, people=12, stopping=0, seed=seed, idle=60)
    assert set(counts.ravel()) == {2, 3}
    assert set(own) == {6}


@pytest.mark.parametrize("seed", range(3))
def test_those_who_go_on_fill_the_gaps_of_those_who_stop(tmp_path, seed: int):
    counts, own = played(tmp_path, people=10, stopping=6, seed=seed, idle=30)
    # Of an item's methods; how many people saw the item at all depends on when they stopped.
    spread = np.ptp(counts, axis=1)
    assert np.mean(spread <= 2) >= 0.95
    assert spread.max() <= 3
    assert set(own) == {6}


def test_fewer_questions_than_items_stay_balanced_when_people_stop(tmp_path):
    counts, own = played(tmp_path, people=12, stopping=4, seed=0, idle=30, per_annotator=10)
    assert np.ptp(counts) <= 2
    assert set(own) == {2}


def test_a_person_who_returns_goes_on_with_the_open_question(opened):
    standing = opened.consent(1, now=NOW)
    days = NOW + timedelta(days=9)
    opened.consent(2, now=days)
    assert opened.standing(1) == standing
    assert opened.answer(1, given(standing), now=days) == standing.question
    assert opened.standing(1).place == 1


@pytest.fixture
def study(tmp_path):
    make_items(tmp_path / "items.json", items=6, methods=3)
    build(tmp_path / "items.json", tmp_path / "study", StudySettings(annotators=3))
    return read_study(tmp_path / "study")


def saved_by_page(study, *, booklet: int = 2, person: str = "0123456789abcdef01234567", answers: int = 10) -> dict:
    return {
        "format": "clvq-answers",
        "version": 1,
        "study": study.digest,
        "booklet": booklet,
        "id": person,
        "answers": [
            {
                "place": place,
                "item": question.item,
                "method": question.method,
                "answer": place % 2,
                "confidence": 1 + place % 4,
                "milliseconds": 100 * place,
                "answered_at": "2026-01-02T03:04:05.678Z",
            }
            for place, question in enumerate(study.booklets[booklet - 1][:answers])
        ],
    }


def test_a_file_that_the_page_saved_is_read(study, tmp_path):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(saved_by_page(study, answers=7)))
    found = read_answer_files([path], study)
    assert len(found) == 7
    question = study.booklets[1][5]
    assert found[5] == Answer(
        "2-0123456789abcdef01234567", 5, question.item, question.method, question.kind, 1, 2, 500,
        "2026-01-02T03:04:05.678Z",
    )  # fmt: skip


def test_two_people_with_one_booklet_are_two_and_one_person_twice_is_refused(study, tmp_path):
    paths = [tmp_path / name for name in ("one.json", "two.json", "again.json")]
    for path, person in zip(paths, ("1" * 24, "2" * 24, "1" * 24), strict=True):
        path.write_text(json.dumps(saved_by_page(study, person=person)))
    assert {answer.annotator for answer in read_answer_files(paths[:2], study)} == {f"2-{'1' * 24}", f"2-{'2' * 24}"}
    with pytest.raises(DataError, match=r"again\.json and .*one\.json hold the answers of the same person \(2-1{24}\)"):
        read_answer_files(paths, study)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "lacks the format 'clvq-answers'"),
        ({"version": 2}, "has version 2, and this clvq reads 1"),
        ({"study": "f" * 64}, "holds answers to the study ffffffffffff…"),
        ({"booklet": 4}, "is of booklet 4, and .* has 3"),
        ({"id": "../../x"}, "is damaged: id"),
        ({"answers": [{}]}, "is damaged: answers"),
        ({"more": 1}, "is damaged: more"),
    ],
)
def test_a_file_from_a_stranger_is_refused_by_what_is_wrong(study, tmp_path, change, said):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps({**saved_by_page(study), **change}))
    with pytest.raises((DataError, FormatVersion), match=said):
        read_answer_files([path], study)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"place": 4}, "its answer 3 is not to what booklet 2 asks there"),
        ({"method": "mzzz"}, "its answer 3 is not to what booklet 2 asks there"),
        ({"answer": 2}, "its answer 3 is class 2 of 2"),
        ({"confidence": 5}, "confidence"),
        ({"milliseconds": 10**9}, "milliseconds"),
        ({"answered_at": "=1+1"}, "answered_at"),
    ],
)
def test_an_answer_from_a_stranger_is_refused_by_what_is_wrong(study, tmp_path, change, said):
    saved = saved_by_page(study)
    saved["answers"][3] |= change
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(saved))
    with pytest.raises(DataError, match=said):
        read_answer_files([path], study)


def test_more_answers_than_the_booklet_asks_are_refused(study, tmp_path):
    saved = saved_by_page(study)
    saved["answers"].append({**saved["answers"][-1], "place": 10})
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(saved))
    with pytest.raises(DataError, match="its answer 10 is not to what"):
        read_answer_files([path], study)


def test_what_is_no_file_of_answers_is_refused(study, tmp_path):
    path = tmp_path / "answers.json"
    with pytest.raises(DataNotFound, match="is not there"):
        read_answer_files([path], study)
    for data, said in ((b"{", "is not JSON"), (b"[" * 200_000, "is not JSON"), (b"3", "lacks the format")):
        path.write_bytes(data)
        with pytest.raises(DataError, match=said):
            read_answer_files([path], study)
    with open(path, "wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(DataError, match="17,825,792 bytes, and a file of answers at most 16,777,216"):
        read_answer_files([path], study)


@pytest.fixture
def answered(study):
    database = Database(study.folder / "answers.sqlite", study.digest, study.pool, idle=timedelta(hours=1))
    database.tokens(2)
    standing = database.consent(2, now=NOW)
    while standing.answered < 5:
        database.answer(2, given(standing), now=NOW)
        standing = database.standing(2)
    yield study
    database.close()


def test_answers_are_exported_as_json_lines_and_csv_while_the_study_is_open(answered, tmp_path):
    wanted = read_answers(answered.folder / "answers.sqlite")
    assert export(answered.folder, tmp_path / "out.jsonl") == 5
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [Answer(**json.loads(line)) for line in lines] == wanted
    assert export(answered.folder, tmp_path / "out.csv") == 5
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["item"] for row in rows] == [one.item for one in wanted]
    assert [int(row["milliseconds"]) for row in rows] == [one.milliseconds for one in wanted]


def test_an_export_overwrites_by_force_alone_and_needs_a_known_suffix(answered, tmp_path):
    with pytest.raises(ConfigError, match=r"ends in neither .csv nor .jsonl"):
        export(answered.folder, tmp_path / "out.xlsx")
    export(answered.folder, tmp_path / "out.csv")
    with pytest.raises(ConfigError, match="is there already: give another --out, or --force"):
        export(answered.folder, tmp_path / "out.csv")
    assert export(answered.folder, tmp_path / "out.csv", force=True) == 5


def test_a_study_that_was_never_served_has_nothing_to_export(study, tmp_path):
    with pytest.raises(DataNotFound, match="nothing was answered yet; serve the study with `clvq study serve`"):
        export(study.folder, tmp_path / "out.csv")
