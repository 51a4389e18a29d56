"""`clvq judge` against servers on loopback: every reply is kept, and known judges are found to be as they are."""

import errno
import json
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clvq.cache.files import only_writer
from clvq.errors import ConfigError, DataError, DiskFull, FolderInUse, Interrupted, RemoteUnreachable, ResumeMismatch
from clvq.evaluation.judges.config import CallConfig, JudgeConfig
from clvq.evaluation.judges.judge import JudgeResult, judge, plan_calls
from clvq.evaluation.results import plain
from clvq.evaluation.study.items import (
    ConceptView,
    Items,
    Key,
    Sentence,
    Word,
    key_path,
    read_items,
    read_key,
    write_items,
)

from .commands import Command, command_of
from .judge_servers import Raw, Scripted, ScriptedJudge, asked, completion, real_server, scripted
from .study_maker import make_items

QUICK = CallConfig(first_wait=0.01, retries=1, timeout=10, concurrency=2)
SLOW = CallConfig(timeout=120, concurrency=2)


def _judge(
    path: Path, out: Path, server: Scripted | str, *models: str, calls: CallConfig = QUICK, **settings: Any
) -> JudgeResult:
    url = server if isinstance(server, str) else server.url
    names = {name: settings.pop(name) for name in ("key", "names", "prices", "progress", "force") if name in settings}
    return judge(path, out, url, models or ("one",), JudgeConfig(**settings), calls, **names)


def _fair(shown: Mapping[str, Any], concept: Mapping[str, Any]) -> float:
    """A concept whose first word is the predicted class explains it well."""
    return 4.5 if concept["words"][0].startswith(f"{shown['predicted class']} ") else 1.5


FAIR = ScriptedJudge(_fair, noise=0.0)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("items") / "items.json"
    make_items(path, items=6, methods=4, attention=2)
    return path


def _questions(server: Scripted) -> list[dict[str, Any]]:
    """Requests that are no probes."""
    return [body for body in server.bodies if "Marie" not in body["messages"][-1]["content"]]


def test_every_question_is_asked_once_and_never_again(items: Path, tmp_path: Path):
    with scripted(FAIR) as server:
        first = _judge(items, tmp_path, server)
        assert len(_questions(server)) == 16
        again = _judge(items, tmp_path, server)
        assert len(_questions(server)) == 16
    (tally,) = first.tallies
    assert (tally.questions, tally.valid, tally.calls, tally.prompt_tokens) == (16, 16, 16, 1600)
    assert plain(asdict(again)) == plain(asdict(first))
    stored = json.loads((tmp_path / "judgement.json").read_bytes())
    assert stored["tallies"][0]["valid"] == 16


def test_a_stop_keeps_what_was_answered_and_the_rest_is_asked_later(items: Path, tmp_path: Path):
    class Stops:
        """A progress that asks to stop after some answers."""

        def begin(self, task: str, total: int | None, unit: str) -> None:
            self.done = 0

        def advance(self, amount: int = 1, **figures: float) -> None:
            self.done += amount
            if self.done >= 5:
                raise Interrupted("stopped", signal_number=2)

        def check(self) -> None:
            """Never asks."""

    with scripted(FAIR) as server:
        with pytest.raises(Interrupted):
            _judge(items, tmp_path, server, progress=Stops())
        before = len(_questions(server))
        assert 5 <= before < 16
        kept = len((tmp_path / "calls.jsonl").read_bytes().splitlines())
        assert kept == before
        assert _judge(items, tmp_path, server).tallies[0].valid == 16
        sent = Counter(json.dumps(body) for body in _questions(server))
    assert set(sent.values()) == {1}


def test_a_line_that_a_kill_cut_off_is_asked_again_and_a_damaged_one_is_named(items: Path, tmp_path: Path):
    with scripted(FAIR) as server:
        whole = _judge(items, tmp_path, server)
        calls = tmp_path / "calls.jsonl"
        lines = calls.read_bytes().splitlines(keepends=True)
        calls.write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
        mended = _judge(items, tmp_path, server)
        assert len(_questions(server)) == 17
        assert plain(asdict(mended)["analysis"]) == plain(asdict(whole)["analysis"])
        calls.write_bytes(b"".join([*lines[:3], b"junk\n", *lines[4:]]))
        with pytest.raises(DataError, match=r"calls\.jsonl: line 4 is damaged; take it out, and run the command again"):
            _judge(items, tmp_path, server)


def test_other_settings_are_refused_by_name_and_force_keeps_the_replies(items: Path, tmp_path: Path):
    with scripted(FAIR) as server:
        _judge(items, tmp_path, server)
        with pytest.raises(ResumeMismatch, match=r"holds judgements with other settings \(.*orders.*\): give another"):
            _judge(items, tmp_path, server, orders=3)
        more = _judge(items, tmp_path, server, orders=3, force=True)
        # The first two orders of each item were there.
        assert len(_questions(server)) == 24
    assert more.tallies[0].questions == 24


def test_a_folder_with_something_else_in_it_is_left_alone(items: Path, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with (
        scripted(FAIR) as server,
        pytest.raises(ConfigError, match=r"not empty and holds no judgements \(it holds 'thesis.txt'\)"),
    ):
        _judge(items, tmp_path, server)


def test_two_runs_at_once_do_not_share_a_folder(items: Path, tmp_path: Path):
    with scripted(FAIR) as server, only_writer(tmp_path / "out"), pytest.raises(FolderInUse):
        _judge(items, tmp_path / "out", server)


def test_judges_of_other_endpoints_join_and_none_is_dropped(items: Path, tmp_path: Path):
    contrary = ScriptedJudge(lambda shown, concept: 6 - _fair(shown, concept), noise=0.0)
    with scripted(FAIR) as server, scripted(contrary) as other:
        _judge(items, tmp_path, server, "one", "two")
        result = _judge(items, tmp_path, other, "one")
        assert len(_questions(server)) == 32
        assert len(_questions(other)) == 16
    assert [tally.judge for tally in result.tallies] == ["one", "two", f"one at {other.url.split('/')[2]}"]
    assert result.analysis is not None
    assert [one.judge for one in result.analysis.judges] == sorted(tally.judge for tally in result.tallies)


def test_an_invalid_reply_is_asked_for_again_with_the_reason(items: Path, tmp_path: Path):
    def script(body: dict[str, Any]) -> str:
        return FAIR(body) if len(body["messages"]) > 2 else "They are all fine."

    with scripted(script) as server:
        result = _judge(items, tmp_path, server)
        second = next(body for body in _questions(server) if len(body["messages"]) > 2)
    said = [message["content"] for message in second["messages"][2:]]
    assert said == [
        "They are all fine.",
        "This reply is not valid: there is no JSON object in it. Answer with one JSON object and nothing else.",
    ]
    (tally,) = result.tallies
    assert (tally.valid, tally.valid_at_once, tally.invalid_share, tally.first_invalid_share) == (16, 0, 0, 1)


def test_a_judge_that_never_answers_in_form_is_reported_as_that(items: Path, tmp_path: Path):
    with scripted(lambda body: completion("Lorem ipsum", finish="length"), enforce=False) as server:
        result = _judge(items, tmp_path, server, attempts=2)
        assert len(_questions(server)) == 32
    (tally,) = result.tallies
    assert (tally.json_schema, tally.json_object) == ("ignored", "ignored")
    assert (tally.valid, tally.invalid, tally.cut, tally.invalid_share) == (0, 16, 16, 1)


def test_a_request_that_the_server_refuses_does_not_end_the_others(items: Path, tmp_path: Path):
    texts = [item.text for item in read_items(items)[0].of_kind("main")]

    def script(body: dict[str, Any]) -> str | Raw:
        if asked(body)["text"] == texts[2]:
            return Raw(400, b'{"error": {"message": "content filter"}}')
        return FAIR(body)

    with scripted(script) as server:
        (tally,) = _judge(items, tmp_path, server).tallies
        assert (tally.valid, tally.refused) == (14, 2)
        before = len(server.bodies)
        _judge(items, tmp_path, server)
        assert len(server.bodies) == before


def test_an_outage_ends_the_run_and_loses_nothing(items: Path, tmp_path: Path):
    answered = threading.Semaphore(6)

    def script(body: dict[str, Any]) -> str | Raw:
        return FAIR(body) if answered.acquire(blocking=False) else Raw(503, b'{"error": {"message": "down"}}')

    with scripted(script) as server:
        with pytest.raises(RemoteUnreachable, match=r"does not answer \(503: down\); every reply that came is saved"):
            _judge(items, tmp_path, server)
        assert len((tmp_path / "calls.jsonl").read_bytes().splitlines()) == 6
        answered.release(100)
        assert _judge(items, tmp_path, server).tallies[0].valid == 16


def test_a_full_disk_ends_the_run_and_leaves_whole_lines(items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written = []

    def fsync(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    with scripted(FAIR) as server:
        with monkeypatch.context() as full:
            full.setattr("clvq.evaluation.judges.calls.os.fsync", fsync)
            # The folder's own files are written by the same call.
            full.setattr("clvq.evaluation.judges.judge.write_file", lambda path, data: path.write_bytes(data))
            with pytest.raises(DiskFull, match=r"no room left on the disk while writing .*calls.jsonl"):
                _judge(items, tmp_path, server)
        kept = (tmp_path / "calls.jsonl").read_bytes()
        assert kept.endswith(b"}\n")
        assert _judge(items, tmp_path, server).tallies[0].valid == 16
    assert (tmp_path / "calls.jsonl").read_bytes().startswith(kept)


def test_a_server_of_junk_is_told_apart_from_a_judge(items: Path, tmp_path: Path):
    with (
        scripted(lambda body: Raw(200, b"<html>Welcome</html>"), enforce=False) as server,
        pytest.raises(RemoteUnreachable, match="the answer is no chat completion"),
    ):
        _judge(items, tmp_path, server)


def test_the_key_of_the_endpoint_stands_in_no_file(items: Path, tmp_path: Path):
    with scripted(FAIR) as server:
        _judge(items, tmp_path, server, key="secret-key-123")
    assert all("secret-key-123" not in file.read_text() for file in tmp_path.iterdir())


def test_a_plan_counts_what_would_be_asked(items: Path, tmp_path: Path):
    plan = plan_calls(items, ["a", "b"], JudgeConfig(protocol="pairs"), None)
    with scripted(FAIR) as server:
        _judge(items, tmp_path, server, protocol="pairs")
        sent = _questions(server)
    assert plan.questions == len(sent) == 6 * 12 + 2 * 2
    assert plan.characters == sum(len(message["content"]) for body in sent for message in body["messages"])


def _controlled(path: Path, *, items: int, seed: int = 0) -> tuple[Items, Key]:
    """Items of which a method points to the prediction in 95 %, another in 75 %, the duplicate as the first, the random
    control by chance; of lengths that say nothing."""
    made = make_items(path, items=items, methods=4, attention=3, training=0, seed=seed)
    key = read_key(key_path(path), read_items(path)[1])
    generator = np.random.default_rng(seed)
    blind = {method.name: own for own, method in key.methods.items()}
    shares = {"run-0": 0.95, "run-1": 0.75, "another text's concept": 0.5}
    changed = []
    for item in made.items:
        if item.kind == "attention":
            changed.append(item)
            continue
        views = {}
        for name, share in shares.items():
            points_to = item.prediction if generator.random() < share else 1 - item.prediction
            filler = "so " * int(generator.integers(5, 60))
            views[blind[name]] = ConceptView(
                words=(Word(word=made.classes[points_to], share=0.5),),
                sentences=(Sentence(before=filler, word=made.classes[points_to], after=f" {generator.random()}"),),
                labels=(),
            )
        views[blind["again"]] = views[blind["run-0"]]
        changed.append(item.model_copy(update={"concepts": views}))
    fresh = made.model_copy(update={"items": tuple(changed)})
    key_of = key.model_dump(exclude={"items_sha256"})
    return fresh, write_items(path, fresh, key_of)


@pytest.mark.parametrize("protocol", ["rate", "pairs"])
def test_scripted_judges_over_http_rank_the_random_control_last_and_tie_the_duplicate(protocol: str, tmp_path: Path):
    _, key = _controlled(tmp_path / "items.json", items=60 if protocol == "rate" else 30)
    judges = {
        "fair": ScriptedJudge(_fair, noise=0.4, seed=1),
        "first": ScriptedJudge(_fair, noise=0.4, first_bonus=1.5, seed=2),
        "sloppy": ScriptedJudge(_fair, noise=1.5, invalid=0.2, seed=3),
    }

    def script(body: dict[str, Any]) -> str:
        return judges[body["model"]](body)

    with scripted(script) as server:
        result = _judge(
            tmp_path / "items.json", tmp_path / "out", server, *judges, protocol=protocol, names=key, attempts=1,
            calls=CallConfig(concurrency=8),
        )  # fmt: skip
    assert result.analysis is not None
    roles = {method.method: method.role for method in result.analysis.pooled.methods}
    for table in [result.analysis.pooled, *(one.table for one in result.analysis.judges)]:
        ranked = sorted(table.methods, key=lambda method: method.figures.win_share.value)
        assert roles[ranked[0].method] == "random"
        (repeat,) = table.duplicates
        assert repeat.difference.win_share.low <= 0 <= repeat.difference.win_share.high
    assert [method.name for method in result.analysis.pooled.methods][2:] == ["run-1", "another text's concept"]
    invalid = {tally.judge: tally.invalid_share for tally in result.tallies}
    assert invalid["fair"] == invalid["first"] == 0
    assert 0.1 < invalid["sloppy"] < 0.3
    biases = {one.judge: one.biases for one in result.analysis.judges}
    assert biases["fair"].first_wins.low <= 0.5 <= biases["fair"].first_wins.high
    assert biases["first"].first_wins.low > 0.5


def test_a_judge_that_guesses_is_scored_as_a_person(tmp_path: Path):
    _, key = _controlled(tmp_path / "items.json", items=40)

    def script(body: dict[str, Any]) -> str:
        concept = asked(body)["concept"]
        said = " ".join(concept["sentences"])
        name = said.split("answer ")[1].split(" with")[0] if "attention" in said else concept["words"][0].split(" (")[0]
        return json.dumps({"class": name, "confidence": 4})

    with scripted(script) as server:
        result = _judge(tmp_path / "items.json", tmp_path / "out", server, protocol="guess", names=key)
    assert result.guesses is not None
    (person,) = result.guesses.annotators
    assert (person.attention_seen, person.attention_failed) == (3, 0)
    accuracy = {method.name: method.accuracy for method in result.guesses.all.methods}
    assert accuracy["run-0"].low <= 0.95 <= accuracy["run-0"].high
    assert accuracy["again"] == accuracy["run-0"]
    assert accuracy["run-1"].low <= 0.75 <= accuracy["run-1"].high


@pytest.mark.llm
def test_a_real_model_behind_a_real_server_judges_as_well_as_it_can(tmp_path: Path):
    make_items(tmp_path / "items.json", items=2, methods=2, attention=1)
    with real_server() as url:
        result = _judge(tmp_path / "items.json", tmp_path / "rate", url, "smollm2", calls=SLOW, orders=1, max_tokens=48)
        (tally,) = result.tallies
        assert tally.json_schema == "kept"
        assert tally.valid_at_once == tally.questions == 3
        assert (tally.prompt_tokens or 0) > 3 * 100
        guessed = _judge(
            tmp_path / "items.json", tmp_path / "guess", url, "smollm2", calls=SLOW, protocol="guess", max_tokens=48
        )
    assert guessed.guesses is not None
    assert guessed.guesses.all.answers == guessed.tallies[0].valid - 1 == 4


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_of(monkeypatch, capsys)


def test_the_command_shows_methods_biases_agreement_and_what_it_took(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _controlled(tmp_path / "items.json", items=12)
    monkeypatch.setenv("CLVQ_JUDGE_KEY", "secret-key-123")
    with scripted(FAIR) as server:
        words = ("judge", tmp_path / "items.json", "--endpoint", server.url, "--model", "one", "--model", "two")
        dry = command(*words, "--out", tmp_path / "out", "--dry-run", "--price", "1,2")
        assert dry.code == 0
        assert "30 questions to each of 2 judges: 60 calls" in dry.out
        assert server.bodies == []
        ended = command(*words, "--out", tmp_path / "out", "--price", "1,2")
        assert (ended.code, ended.err) == (0, "")
        assert server.headers[-1]["authorization"] == "Bearer secret-key-123"
        for part in ("run-0", "again", "duplicate", "random", "Bradley–Terry", "first wins", "Krippendorff", "cost"):
            assert part in ended.out
        assert "secret-key-123" not in ended.out
        found = json.loads(command(*words, "--out", tmp_path / "out", "--price", "1,2", "--json").out)
    assert found["tallies"][1]["valid"] == 30


def test_mistakes_of_the_command_are_one_line(command: Command, items: Path, tmp_path: Path):
    def line(*words: object) -> str:
        ended = command("judge", items, "--model", "m", "--out", tmp_path / "out", *words)
        assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)
        return ended.err

    assert "give the base URL of an API" in line("--endpoint", "localhost")
    assert "--price 1: give two numbers with a comma between" in line(
        "--endpoint", "http://127.0.0.1:1", "--price", "1"
    )
    assert "--key-env NO_SUCH: the environment has no such variable" in line(
        "--endpoint", "http://127.0.0.1:1", "--key-env", "NO_SUCH"
    )
    assert "--protocol vote: input should be 'rate', 'pairs' or 'guess'" in line(
        "--endpoint", "http://127.0.0.1:1", "--protocol", "vote"
    )
    refused = line("--endpoint", "http://127.0.0.1:1/v1", "--retries", "0")
    assert "http://127.0.0.1:1/v1 does not answer (no answer (ConnectError))" in refused
