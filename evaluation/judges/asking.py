"""Asking one judge all questions: calls on several threads, each answer kept at once."""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal

from ...cache.frozen import Frozen, Text
from ...progress import Progress
from .calls import Call, Calls, call_key
from .config import CallConfig, JudgeConfig
from .endpoint import Endpoint, NoAnswer, Refused, Reply, Stopped, changed_body, unreachable
from .probe import Capabilities, probe, response_format
from .questions import Question
from .replies import InvalidReply, parse

_LOG = logging.getLogger(__name__)
_SHOWN_BACK = 2_000
_POLL = 0.25


class Judge(Frozen):
    """A model behind an endpoint."""

    name: Text
    endpoint: Text
    model: Text
    capabilities: Capabilities


@dataclass(frozen=True)
class Outcome:
    """What became of a question."""

    question: Question
    status: Literal["valid", "invalid", "refused", "unanswered"]
    value: dict[str, Any] | None
    """The fields of a valid reply."""
    why: str | None
    attempts: int
    """Replies asked for."""
    cut: bool
    """Whether the last reply ended for want of tokens."""


Ask = Callable[[dict[str, Any]], Call | None]


def outcome_of(question: Question, judge: Judge, config: JudgeConfig, ask: Ask) -> Outcome:
    """Ask until a reply is valid, at most `config.attempts` times.

    Parameters
    ----------
    ask
        The call of a request; `None` where there is none.
    """
    why: str | None = None
    said, cut, attempt = "", False, 0
    for attempt in range(1, config.attempts + 1):
        call = ask(_body(question, judge, config, attempt, said, why))
        if call is None:
            return Outcome(question, "unanswered", None, why, attempt - 1, cut)
        if call.reply is None:
            return Outcome(question, "refused", None, call.refused, attempt, False)
        said, cut = call.reply.text, call.reply.finish == "length"
        try:
            return Outcome(question, "valid", parse(said, question.schema), None, attempt, cut)
        except InvalidReply as error:
            why = str(error)
    return Outcome(question, "invalid", None, why, attempt, cut)


def _body(
    question: Question, judge: Judge, config: JudgeConfig, attempt: int, said: str, why: str | None
) -> dict[str, Any]:
    messages = [
        {"role": "system", "content": question.system},
        {"role": "user", "content": question.request},
    ]
    if why is not None:
        again = f"This reply is not valid: {why}. Answer with one JSON object and nothing else."
        # Some servers take no empty message.
        messages += [{"role": "assistant", "content": said[:_SHOWN_BACK] or "…"}, {"role": "user", "content": again}]
    body: dict[str, Any] = {
        "model": judge.model,
        "messages": messages,
        "temperature": config.temperature,
        "seed": config.seed + attempt - 1,
        "max_tokens": config.max_tokens,
    }
    kind = judge.capabilities.response_format
    if kind is not None:
        body["response_format"] = response_format(kind, question.schema)
    return changed_body(body, judge.capabilities.changed)


def from_disk(judge: Judge, calls: Calls) -> Ask:
    """Finds the calls that were made, and makes none."""
    return lambda body: calls.get(call_key(judge.endpoint, body))


def meet(name: str, url: str, model: str, config: JudgeConfig, endpoint: Endpoint) -> Judge:
    """Find out what a new judge can do.

    Raises
    ------
    RemoteDenied, RemoteNotFound, RemoteUnreachable
    """
    try:
        found = probe(model, config, endpoint.ask)
    except (Refused, NoAnswer) as error:
        raise unreachable(url, str(error)) from error
    return Judge(name=name, endpoint=url, model=model, capabilities=found)


def ask_all(
    judge: Judge,
    questions: Sequence[Question],
    config: JudgeConfig,
    call_config: CallConfig,
    endpoint: Endpoint,
    calls: Calls,
    stop: threading.Event,
    progress: Progress,
) -> None:
    """Make the calls that are missing; all that are answered are kept, whatever happens to others.

    Raises
    ------
    RemoteUnreachable
        Where several questions in a row had no answer after all retries.
    RemoteDenied, RemoteNotFound, DiskFull
    Interrupted
        By `progress`; calls under way are waited for and kept.
    """
    on_disk = from_disk(judge, calls)
    left = [one for one in questions if outcome_of(one, judge, config, on_disk).status == "unanswered"]
    progress.begin(f"ask {judge.name}", len(questions), "questions")
    progress.advance(len(questions) - len(left))
    asker = _Asker(judge, config, endpoint, calls, most_failures=max(3, call_config.concurrency))
    pool = ThreadPoolExecutor(call_config.concurrency)
    futures: set[Future[Outcome | None]] = {pool.submit(asker.answer, one) for one in left}
    done = invalid = 0
    try:
        while futures:
            finished, futures = wait(futures, timeout=_POLL, return_when=FIRST_COMPLETED)
            for outcome in _results(finished):
                done += 1
                invalid += outcome is not None and outcome.status != "valid"
                progress.advance(1, invalid=invalid / done)
            progress.check()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        stop.clear()


def _results(finished: Iterable[Future[Outcome | None]]) -> list[Outcome | None]:
    return [future.result() for future in finished]


class _Asker:
    """Answers questions over HTTP, from several threads."""

    def __init__(
        self, judge: Judge, config: JudgeConfig, endpoint: Endpoint, calls: Calls, *, most_failures: int
    ) -> None:
        self._judge, self._config, self._endpoint, self._calls = judge, config, endpoint, calls
        self._most_failures, self._failures = most_failures, 0
        self._lock = threading.Lock()

    def answer(self, question: Question) -> Outcome | None:
        """The outcome; `None` where the server gave no answer this time."""
        try:
            outcome = outcome_of(question, self._judge, self._config, self._ask)
        except Stopped:
            return None
        except NoAnswer as error:
            with self._lock:
                self._failures += 1
                many = self._failures >= self._most_failures
            _LOG.warning("%s: no answer about item %s (%s)", self._judge.name, question.item, error)
            if many:
                raise unreachable(self._judge.endpoint, str(error)) from error
            return None
        with self._lock:
            self._failures = 0
        return outcome

    def _ask(self, body: dict[str, Any]) -> Call:
        key = call_key(self._judge.endpoint, body)
        made = self._calls.get(key)
        if made is not None:
            return made
        reply: Reply | None = None
        refused: str | None = None
        try:
            reply = self._endpoint.ask(body)
        except Refused as error:
            refused = str(error)
        call = Call(key, self._judge.name, reply, refused)
        self._calls.add(call)
        return call
