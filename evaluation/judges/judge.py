"""`clvq judge`: several judges over one item file, each asked all questions, and what their answers say together."""

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...cache.files import only_writer, write_file
from ...cache.layout import differences, to_json
from ...errors import ConfigError, DataError, ResumeMismatch
from ...progress import SILENT, Progress
from ..results import plain
from ..study.items import Items, Key, read_items
from ..study.score import StudyScore, score
from .analysis import JudgeAnalysis, analyse
from .asking import Judge, Outcome, ask_all, from_disk, meet, outcome_of
from .calls import Call, Calls
from .config import CallConfig, JudgeConfig
from .endpoint import Endpoint, check_url
from .questions import Question, questions
from .said import (
    CALLS,
    JUDGEMENT_VERSION,
    JUDGES,
    RESULT,
    SETTINGS,
    Judges,
    comparisons_of,
    guesses_of,
    known_judges,
    ratings_of,
)

_LOG = logging.getLogger(__name__)
_FILES = (SETTINGS, JUDGES, CALLS, RESULT)
# Rough, for English and common tokenizers.
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class CallPlan:
    """What would be asked."""

    questions: int
    """Per judge."""
    judges: list[str]
    characters: int
    """Of all requests to one judge."""
    tokens: int
    """The same in tokens, roughly: a fourth of the characters."""
    cost: float | None
    """Of all judges' requests, at the price given; replies and repeated questions come on top."""


@dataclass(frozen=True)
class Tally:
    """How one judge answered, and what it took."""

    judge: str
    endpoint: str
    model: str
    json_schema: str
    """Whether its server keeps to a JSON schema: kept, ignored or refused."""
    json_object: str
    questions: int
    valid: int
    invalid: int
    """Without a valid reply after all attempts."""
    refused: int
    """That the server does not answer, such as too long ones."""
    unanswered: int
    """Without an answer as yet."""
    valid_at_once: int
    """With a valid first reply."""
    cut: int
    """Whose last reply ended for want of tokens."""
    invalid_share: float
    """Of the questions: without a valid reply, for whatever reason."""
    first_invalid_share: float
    """Of the questions answered: whose first reply was not valid."""
    calls: int
    prompt_tokens: int | None
    """As the server counts; `None` where it does not say."""
    completion_tokens: int | None
    cost: float | None
    seconds: float
    """Sum over calls."""


@dataclass(frozen=True)
class JudgeResult:
    """What all judges of a folder said."""

    path: Path
    items: str
    """Digest of the item file."""
    protocol: str
    tallies: list[Tally]
    analysis: JudgeAnalysis | None
    """For `rate` and `pairs`."""
    guesses: StudyScore | None
    """For `guess`: the judges as if they were people."""


@dataclass(frozen=True)
class Prices:
    """Of a million tokens, in any currency."""

    prompt: float
    completion: float


def plan_calls(items_path: Path, models: Sequence[str], config: JudgeConfig, prices: Prices | None) -> CallPlan:
    """What `judge` would ask; nothing is called.

    Raises
    ------
    DataNotFound, DataError, FormatVersion, ConfigError
    """
    items, _ = read_items(items_path)
    asked = questions(items, config)
    characters = sum(len(one.system) + len(one.request) for one in asked)
    tokens = characters // _CHARACTERS_PER_TOKEN
    return CallPlan(
        questions=len(asked),
        judges=list(models),
        characters=characters,
        tokens=tokens,
        cost=None if prices is None else len(models) * tokens * prices.prompt / 1e6,
    )


def judge(
    items_path: Path,
    out: Path,
    endpoint: str,
    models: Sequence[str],
    config: JudgeConfig,
    calls_config: CallConfig,
    *,
    key: str | None = None,
    names: Key | None = None,
    prices: Prices | None = None,
    progress: Progress = SILENT,
    force: bool = False,
) -> JudgeResult:
    """Ask the models whatever they have not been asked, then analyse all judges of the folder.

    Parameters
    ----------
    out
        Keeps every reply. Judges of other endpoints may be added to the same folder.
    key
        The endpoint's API key; in no file.
    names
        The key of the item file, for the methods' names.

    Raises
    ------
    DataNotFound, DataError, FormatVersion, ConfigError, MissingExtra
    ResumeMismatch
        Where `out` holds judgements of other items or settings; `force` replaces those, and keeps the replies.
    RemoteDenied, RemoteNotFound, RemoteUnreachable
    """
    items, digest = read_items(items_path)
    url = check_url(endpoint, with_key=key is not None)
    asked = questions(items, config)
    with only_writer(out):
        _check_settings(out, digest, config, force=force)
        calls = Calls(out / CALLS)
        try:
            judges = known_judges(out)
            stop = threading.Event()
            with Endpoint(url, key, calls_config, stop=stop) as server:
                for model in dict.fromkeys(models):
                    one = next((old for old in judges if (old.endpoint, old.model) == (url, model)), None)
                    if one is None:
                        one = meet(_name(model, url, judges), url, model, config, server)
                        judges.append(one)
                        write_file(out / JUDGES, to_json(Judges(judges=judges)))
                        _tell(one)
                    ask_all(one, asked, config, calls_config, server, calls, stop, progress)
            return _result(out, items, digest, asked, judges, calls, config, names, prices, seed=config.seed)
        finally:
            calls.close()


def _check_settings(out: Path, digest: str, config: JudgeConfig, *, force: bool) -> None:
    settings: Mapping[str, Any] = {
        "version": JUDGEMENT_VERSION, "items": digest, "config": config.model_dump(mode="json"),
    }  # fmt: skip
    file = out / SETTINGS
    if file.is_file():
        try:
            lines = differences(json.loads(file.read_bytes()), json.loads(to_json(settings)))
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{file} is damaged: give another --out, or take the file away") from error
        if lines and not force:
            raise ResumeMismatch(
                f"{out} holds judgements with other settings ({'; '.join(lines[:6])}): give another --out, or --force, "
                "which keeps the replies that serve again"
            )
        if not lines:
            return
    else:
        strange = sorted(
            entry.name for entry in out.iterdir() if entry.name not in _FILES and not entry.name.endswith(".aside")
        )
        if strange and not force:
            raise ConfigError(
                f"{out} is not empty and holds no judgements (it holds {strange[0]!r}): give another --out"
            )
    write_file(file, to_json(settings))


def _name(model: str, url: str, judges: Sequence[Judge]) -> str:
    """The model, with its server where the model alone is taken."""
    taken = {one.name for one in judges}
    if model not in taken:
        return model
    name = f"{model} at {urlsplit(url).netloc}"
    return name if name not in taken else f"{model} at {url}"


def _tell(one: Judge) -> None:
    found = one.capabilities
    if found.response_format is None:
        _LOG.warning(
            "%s keeps to no form of reply (JSON schema: %s, JSON object: %s); it is asked for JSON in words, and every "
            "reply is checked",
            one.name, found.json_schema, found.json_object,
        )  # fmt: skip


def _result(
    out: Path,
    items: Items,
    digest: str,
    asked: Sequence[Question],
    judges: Sequence[Judge],
    calls: Calls,
    config: JudgeConfig,
    names: Key | None,
    prices: Prices | None,
    *,
    seed: int,
) -> JudgeResult:
    outcomes = {one.name: [outcome_of(ask, one, config, from_disk(one, calls)) for ask in asked] for one in judges}
    analysis = guesses = None
    if config.protocol == "guess":
        guesses = score(items, guesses_of(items, outcomes), key=names, seed=seed, annotators_drawn=False)
    elif config.protocol == "pairs":
        analysis = analyse(items, comparisons_of(outcomes), key=names, seed=seed)
    else:
        analysis = analyse(items, ratings_of(outcomes), key=names, seed=seed)
    result = JudgeResult(
        path=out,
        items=digest,
        protocol=config.protocol,
        tallies=[tally_of(one, outcomes[one.name], calls.of_judge(one.name), prices) for one in judges],
        analysis=analysis,
        guesses=guesses,
    )
    stands = {
        "version": JUDGEMENT_VERSION,
        "clvq": version("clvq"),
        "config": config.model_dump(mode="json"),
        **{name: value for name, value in asdict(result).items() if name != "path"},
    }
    write_file(out / RESULT, to_json(plain(stands)))
    return result


def tally_of(one: Judge, outcomes: Sequence[Outcome], made: Sequence[Call], prices: Prices | None) -> Tally:
    """Counts of one judge's outcomes and calls."""
    status = [outcome.status for outcome in outcomes]
    replies = [call.reply for call in made if call.reply is not None]
    prompt, completion = (
        None if any(count is None for count in counts) else sum(count or 0 for count in counts)
        for counts in ([reply.prompt_tokens for reply in replies], [reply.completion_tokens for reply in replies])
    )
    at_once = sum(outcome.status == "valid" and outcome.attempts == 1 for outcome in outcomes)
    answered = len(status) - status.count("unanswered")
    cost = None
    if prices is not None and prompt is not None and completion is not None:
        cost = (prompt * prices.prompt + completion * prices.completion) / 1e6
    return Tally(
        judge=one.name,
        endpoint=one.endpoint,
        model=one.model,
        json_schema=one.capabilities.json_schema,
        json_object=one.capabilities.json_object,
        questions=len(status),
        valid=status.count("valid"),
        invalid=status.count("invalid"),
        refused=status.count("refused"),
        unanswered=status.count("unanswered"),
        valid_at_once=at_once,
        cut=sum(outcome.cut for outcome in outcomes),
        invalid_share=1 - status.count("valid") / len(status) if status else float("nan"),
        first_invalid_share=1 - at_once / answered if answered else float("nan"),
        calls=len(made),
        prompt_tokens=prompt,
        completion_tokens=completion,
        cost=cost,
        seconds=sum(reply.seconds for reply in replies),
    )
