"""One OpenAI-compatible chat endpoint: a call, its retries, and what its errors mean.

Nothing of a key is ever in a message, a log or a file. Redirects are not followed: they would carry the key elsewhere.
"""

import json
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from ...errors import ConfigError, MissingExtra, RemoteDenied, RemoteNotFound, RemoteUnreachable
from .config import CallConfig

_LOG = logging.getLogger(__name__)
_MOST_BYTES = 4 << 20
_LONGEST_WAIT = 60.0
_LONGEST_ASKED_WAIT = 600.0
_PASSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_SECRETS = ("key", "token", "secret", "sig", "password")


class Refused(Exception):
    """The server does not answer this request (400, 413, 422); others it may."""


class NoAnswer(Exception):
    """No usable answer after all retries; it may come another time."""


class Stopped(Exception):
    """The caller asked to stop while a call waited."""


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    text: str
    finish: str | None
    """Why the reply ended: `stop`, `length`, …"""
    model: str | None
    """The model that the server says it was."""
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float
    tries: int
    """Calls made until this one, itself included."""


def check_url(url: str, *, with_key: bool) -> str:
    """The endpoint's base URL, such as `http://127.0.0.1:8080/v1`, without a slash at its end.

    Raises
    ------
    ConfigError
        Where it is no http(s) URL, holds a secret, or would send a key over the network in the open.
    """
    parts = urlsplit(url)
    try:
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fine = False
    if not fine:
        raise ConfigError(f"--endpoint {_plain(url)}: give the base URL of an API, such as http://127.0.0.1:8080/v1")
    hidden = [name for name, _ in parse_qsl(parts.query) if any(sign in name.lower() for sign in _SECRETS)]
    if parts.username or parts.password or hidden:
        raise ConfigError(
            f"--endpoint {_plain(url)}: the URL holds a secret, and URLs are written into results; "
            "give the key by the environment: --key-env NAME"
        )
    if with_key and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise ConfigError(f"--endpoint {_plain(url)}: the key would go over the network in the open; use https")
    return url.rstrip("/")


def _plain(url: str) -> str:
    """A URL without what may be secret in it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}" if parts.netloc else url.split("?")[0].split("@")[-1]


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Endpoint:
    """A server, open for calls from several threads.

    Parameters
    ----------
    url
        As `check_url` gives it.
    key
        Sent as a bearer token.
    stop
        Set by the caller to end waiting between retries.

    Raises
    ------
    MissingExtra
    """

    def __init__(self, url: str, key: str | None, config: CallConfig, *, stop: threading.Event) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise MissingExtra("judges are asked over HTTP with httpx2: pip install 'clvq[judge]'") from error
        self.url, self._config, self._stop, self._key = url, config, stop, key
        self._errors = httpx2.HTTPError
        parts = urlsplit(url)
        self._target = parts._replace(path=f"{parts.path.rstrip('/')}/chat/completions").geturl()
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(config.timeout, connect=min(config.timeout, 15.0)),
            limits=httpx2.Limits(max_connections=config.concurrency),
            follow_redirects=False,
            # A proxy of the environment has no way to this machine's own servers.
            trust_env=not is_loopback(parts.hostname or ""),
        )

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def ask(self, body: dict[str, Any]) -> Reply:
        """Call until there is an answer.

        Raises
        ------
        Refused, NoAnswer, Stopped
        RemoteDenied, RemoteNotFound
            Where no call to this endpoint can succeed.
        """
        for tried in range(self._config.retries + 1):
            if self._stop.is_set():
                raise Stopped
            outcome = self._once(body, tried + 1)
            if isinstance(outcome, Reply):
                return outcome
            why, asked = outcome
            if tried == self._config.retries:
                raise NoAnswer(why)
            wait = min(_LONGEST_WAIT, self._config.first_wait * 2**tried) * random.uniform(0.5, 1.5)
            wait = wait if asked is None else max(wait, min(asked, _LONGEST_ASKED_WAIT))
            _LOG.info("%s: %s; once more in %.1f s", self.url, why, wait)
            if self._stop.wait(wait):
                raise Stopped
        raise NoAnswer("no call was made")

    def _once(self, body: dict[str, Any], tries: int) -> Reply | tuple[str, float | None]:
        """A reply, or why there is none and how many seconds the server asks to wait."""
        begun = time.monotonic()
        try:
            with self._client.stream("POST", self._target, json=body) as answer:
                data = bytearray()
                for part in answer.iter_bytes():
                    data += part
                    late = time.monotonic() - begun > self._config.timeout
                    if late or len(data) > _MOST_BYTES:
                        return ("the answer did not end" if late else f"more than {_MOST_BYTES:,} bytes came"), None
                status, headers = answer.status_code, answer.headers
        except self._errors as error:
            return f"no answer ({type(error).__name__})", None
        if status != 200:
            return self._failed(status, bytes(data), _asked_wait(headers.get("retry-after")))
        try:
            return _reply(json.loads(bytes(data)), time.monotonic() - begun, tries)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError, AttributeError):
            return "the answer is no chat completion", None

    def _failed(self, status: int, data: bytes, wait: float | None) -> tuple[str, float | None]:
        said = self._said(data)
        if status in (401, 403) or (status == 429 and "insufficient_quota" in said):
            raise RemoteDenied(
                f"{self.url} refuses the calls ({status}: {said}); give a valid key by the environment: --key-env NAME"
            )
        if status in (404, 405):
            raise RemoteNotFound(
                f"{self.url}/chat/completions is not there, or the model is not ({status}: {said}); "
                "check --endpoint and --model"
            )
        if 300 <= status < 400:
            raise RemoteNotFound(f"{self.url} redirects ({status}), which is not followed: give the final URL")
        if status not in _PASSES:
            raise Refused(f"{status}: {said}")
        return f"{status}: {said}", wait

    def _said(self, data: bytes) -> str:
        """The server's message on one short line, without the key that it may repeat."""
        text = data[:20_000].decode("utf-8", "replace")
        try:
            plain = json.loads(text)
            error = plain.get("error", plain)
            parts = [error.get("message"), error.get("code")] if isinstance(error, dict) else [error]
            text = " ".join(str(part) for part in parts if part)
        except (ValueError, AttributeError, RecursionError):
            pass
        if self._key:
            text = text.replace(self._key, "…")
        return " ".join(text.split())[:200]


def _reply(plain: Any, seconds: float, tries: int) -> Reply:
    choice = plain["choices"][0]
    text = choice["message"].get("content")
    usage = plain.get("usage") or {}
    return Reply(
        # A refusal, or nothing but thoughts: an answer, though no valid one.
        text=text if isinstance(text, str) else "",
        finish=_text(choice.get("finish_reason")),
        model=_model(plain.get("model")),
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        seconds=seconds,
        tries=tries,
    )


def _text(value: Any) -> str | None:
    return value[:200] if isinstance(value, str) else None


def _model(value: Any) -> str | None:
    """The model's name; of a path on the server's disk, which is nobody's business, its last part."""
    name = _text(value)
    return name.rsplit("/", 1)[-1] if name is not None and name.startswith(("/", "~")) else name


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40 else None


def _asked_wait(header: str | None) -> float | None:
    """Seconds that `Retry-After` asks for, as a number or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def adapted(body: dict[str, Any], ask: Callable[[dict[str, Any]], Reply]) -> tuple[Reply, dict[str, str | None]]:
    """Call; where the server refuses a parameter by name, call without it, or with its newer name.

    Returns
    -------
    The reply, and the parameters changed: old name → new name, `None` where it was left out.

    Raises
    ------
    Refused
        Where that does not help.
    """
    changed: dict[str, str | None] = {}
    while True:
        try:
            return ask(body), changed
        except Refused as error:
            name = next(
                (one for one in ("max_tokens", "temperature", "seed") if one in body and one in str(error)), None
            )
            if name is None:
                raise
            changed[name] = "max_completion_tokens" if name == "max_tokens" else None
            body = changed_body(body, changed)


def changed_body(body: dict[str, Any], changed: dict[str, str | None]) -> dict[str, Any]:
    """The request with parameters left out or renamed."""
    fresh = {name: value for name, value in body.items() if name not in changed}
    return fresh | {new: body[old] for old, new in changed.items() if new is not None and old in body}


def unreachable(url: str, why: str) -> RemoteUnreachable:
    """The error for an endpoint that has stopped answering."""
    return RemoteUnreachable(
        f"{url} does not answer ({why}); every reply that came is saved: run the same command again when it does"
    )
