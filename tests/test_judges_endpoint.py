"""One endpoint: what its errors mean, what is tried again, what never leaves the process."""

import json
import logging
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from clvq.errors import ConfigError, RemoteDenied, RemoteNotFound
from clvq.evaluation.judges.config import CallConfig, JudgeConfig
from clvq.evaluation.judges.endpoint import Endpoint, NoAnswer, Refused, Stopped, _asked_wait, check_url
from clvq.evaluation.judges.probe import probe

from .judge_servers import Raw, Script, completion, scripted

BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
QUICK = CallConfig(first_wait=0.01, retries=2, timeout=2)


def _ask(script: Script, *, key: str | None = None, config: CallConfig = QUICK) -> Any:
    with scripted(script) as server, Endpoint(server.url, key, config, stop=threading.Event()) as endpoint:
        return endpoint.ask(BODY), server


def _in_turn(*answers: Raw | str) -> Script:
    left = iter(answers)
    return lambda body: next(left)


def test_a_reply_comes_with_its_tokens_and_its_end():
    reply, server = _ask(lambda body: completion("yes", finish="length", prompt=7, tokens=3))
    assert (reply.text, reply.finish, reply.model, reply.prompt_tokens, reply.completion_tokens) == (
        "yes", "length", "scripted", 7, 3,
    )  # fmt: skip
    assert reply.tries == 1
    assert server.bodies == [BODY]


@pytest.mark.parametrize(
    "junk",
    [
        Raw(200, b"<html>busy</html>"),
        Raw(200, b""),
        Raw(200, b"[]"),
        Raw(200, b'{"choices": []}'),
        Raw(200, b'{"choices": [{"message": "text"}]}'),
        Raw(200, b'{"choices": {"0": 1}}'),
        Raw(200, b"[" * 200_000),
        Raw(200, b"x" * (5 << 20)),
        Raw(200, b"\xff\xfe\x00"),
        Raw(500),
        Raw(503, b"{not json"),
        Raw(429, b'{"error": {"message": "slow down"}}'),
        Raw(408, b'{"error": "late"}'),
    ],
    ids=range(13),
)
def test_what_may_pass_is_tried_again(junk: Raw):
    reply, server = _ask(_in_turn(junk, junk, "fine"))
    assert (reply.text, reply.tries) == ("fine", 3)
    assert len(server.bodies) == 3


def test_what_does_not_pass_gives_no_answer_after_the_retries():
    with pytest.raises(NoAnswer, match="503: busy"):
        _ask(lambda body: Raw(503, b'{"error": {"message": "busy"}}'))


def test_a_server_that_stalls_is_given_up_after_the_timeout():
    release = threading.Event()
    stalled = Raw(200, completion("late").body, stall=release)
    try:
        reply, _ = _ask(_in_turn(stalled, "fine"), config=CallConfig(first_wait=0.01, retries=1, timeout=0.3))
    finally:
        release.set()
    assert reply.text == "fine"


def test_a_wait_that_the_server_asks_for_is_kept():
    limited = Raw(429, b"{}", {"retry-after": "0.3"})
    with scripted(_in_turn(limited, "fine")) as server:
        stop = threading.Event()
        waits: list[float] = []
        stop.wait = lambda timeout=None: waits.append(timeout) or False  # type: ignore[method-assign,func-returns-value]
        with Endpoint(server.url, None, QUICK, stop=stop) as endpoint:
            assert endpoint.ask(BODY).text == "fine"
    assert waits == [0.3]


def test_retry_after_may_be_a_date():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 28 <= (_asked_wait(soon) or 0) <= 30
    assert _asked_wait("soon") is None
    assert _asked_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_not_sent_again(status: int):
    with scripted(lambda body: Raw(status, b'{"error": {"message": "too long"}}')) as server:
        with (
            Endpoint(server.url, None, QUICK, stop=threading.Event()) as endpoint,
            pytest.raises(Refused, match=f"{status}: too long"),
        ):
            endpoint.ask(BODY)
        assert len(server.bodies) == 1


def test_no_call_can_succeed_without_a_valid_key():
    with pytest.raises(RemoteDenied, match=r"refuses the calls \(401: who\?\); give a valid key by the environment"):
        _ask(lambda body: Raw(401, b'{"error": {"message": "who?"}}'))


def test_an_account_without_money_is_not_asked_again():
    broke = Raw(429, b'{"error": {"message": "pay", "code": "insufficient_quota"}}')
    with pytest.raises(RemoteDenied, match="429: pay insufficient_quota"):
        _ask(_in_turn(broke))


def test_a_model_that_is_not_there_is_named_with_what_to_check():
    with pytest.raises(RemoteNotFound, match=r"404: no such model.*check --endpoint and --model"):
        _ask(lambda body: Raw(404, b'{"error": {"message": "no such model"}}'))


def test_a_redirect_is_not_followed():
    with scripted(lambda body: "stolen") as other:
        away = Raw(307, b"", {"location": f"{other.url}/chat/completions"})
        with pytest.raises(RemoteNotFound, match="redirects"):
            _ask(lambda body: away, key="secret-key")
        assert other.bodies == []


def test_the_key_is_sent_and_stands_in_no_message_or_log(caplog: pytest.LogCaptureFixture):
    echo = Raw(500, b'{"error": {"message": "bad key secret-key-123"}}')
    with caplog.at_level(logging.DEBUG), pytest.raises(NoAnswer) as caught:
        _ask(lambda body: echo, key="secret-key-123")
    assert "secret-key-123" not in caplog.text + str(caught.value)
    _, server = _ask(lambda body: "yes", key="secret-key-123")
    assert server.headers[0]["authorization"] == "Bearer secret-key-123"


def test_a_stop_ends_waiting_at_once():
    stop = threading.Event()
    with scripted(lambda body: Raw(503)) as server:
        with Endpoint(server.url, None, CallConfig(first_wait=60), stop=stop) as endpoint:
            threading.Timer(0.2, stop.set).start()
            with pytest.raises(Stopped):
                endpoint.ask(BODY)
        assert len(server.bodies) == 1


def test_a_server_that_is_not_there_gives_no_answer():
    with scripted(lambda body: "x") as server:
        url = server.url
    with Endpoint(url, None, QUICK, stop=threading.Event()) as endpoint, pytest.raises(NoAnswer, match="ConnectError"):
        endpoint.ask(BODY)


@pytest.mark.parametrize("url", ["", "127.0.0.1:80/v1", "ftp://a/v1", "http://", "http://a:0x/v1", "http://a:99999/v1"])
def test_a_url_that_is_none_is_refused(url: str):
    with pytest.raises(ConfigError, match="give the base URL of an API, such as"):
        check_url(url, with_key=False)


@pytest.mark.parametrize("url", ["https://me:pass@a/v1", "https://a/v1?api-key=pass", "https://a/v1?x=1&Token=pass"])
def test_a_secret_in_the_url_is_refused_and_not_repeated(url: str):
    with pytest.raises(ConfigError, match=r"the URL holds a secret.*--key-env NAME") as caught:
        check_url(url, with_key=False)
    assert "pass" not in str(caught.value)


def test_a_key_never_crosses_the_network_in_the_open():
    with pytest.raises(ConfigError, match="the key would go over the network in the open; use https"):
        check_url("http://example.org/v1", with_key=True)
    for fine in ("http://127.0.0.1:8080/v1/", "http://localhost/v1", "http://[::1]:80/v1", "https://example.org/v1"):
        assert check_url(fine, with_key=True) == fine.rstrip("/")
    assert check_url("http://example.org/v1", with_key=False)


@pytest.fixture
def quick_endpoint() -> Any:
    def probe_of(script: Script, *, enforce: bool) -> Any:
        with (
            scripted(script, enforce=enforce) as server,
            Endpoint(server.url, None, QUICK, stop=threading.Event()) as endpoint,
        ):
            found = probe("m", JudgeConfig(), endpoint.ask)
            return found, server.bodies

    return probe_of


def test_a_server_that_keeps_to_a_schema_is_found_out(quick_endpoint: Any):
    found, bodies = quick_endpoint(lambda body: "", enforce=True)
    assert (found.json_schema, found.json_object, found.response_format) == ("kept", "not tried", "json_schema")
    assert found.usage
    assert len(bodies) == 2


def test_a_server_that_accepts_a_schema_and_ignores_it_is_found_out(quick_endpoint: Any):
    found, bodies = quick_endpoint(lambda body: "", enforce=False)
    assert (found.json_schema, found.json_object, found.response_format) == ("ignored", "ignored", None)
    assert [body.get("response_format", {}).get("type") for body in bodies] == [None, "json_schema", "json_object"]


def test_a_server_that_knows_objects_alone_is_found_out(quick_endpoint: Any):
    def script(body: dict[str, Any]) -> Raw:
        kind = body.get("response_format", {}).get("type")
        if kind == "json_schema":
            return Raw(400, b'{"error": {"message": "response_format json_schema is not supported"}}')
        return completion('{"greeting": "Bonj' if kind else "Bonjour")

    found, _ = quick_endpoint(script, enforce=False)
    assert (found.json_schema, found.json_object, found.response_format) == ("refused", "kept", "json_object")


def test_parameters_that_a_server_refuses_are_left_out_or_renamed(quick_endpoint: Any):
    def script(body: dict[str, Any]) -> Raw:
        for name in ("max_tokens", "temperature"):
            if name in body:
                told = {"error": {"message": f"Unsupported parameter: '{name}' is not supported with this model."}}
                return Raw(400, json.dumps(told).encode())
        return completion('{"side": "right"}' if "response_format" in body else "Bonjour")

    found, bodies = quick_endpoint(script, enforce=False)
    assert found.changed == {"max_tokens": "max_completion_tokens", "temperature": None}
    assert found.json_schema == "kept"
    assert set(bodies[-1]) == {"model", "messages", "seed", "max_completion_tokens", "response_format"}
