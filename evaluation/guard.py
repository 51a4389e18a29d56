"""What stands between the network and served pages: which requests get through, and what every response says."""

import asyncio
import json
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LARGEST_BODY = 16_000
_MOST_DRAINED, _DRAIN_SECONDS = 1 << 20, 2
_PATIENCE_SECONDS = 30
_HEADERS = [
    (name.encode(), value.encode())
    for name, value in {
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        # The secret of a link must not reach another site.
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-embedder-policy": "require-corp",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), microphone=(), geolocation=()",
        "x-robots-tag": "noindex",
    }.items()
]


class Guard:
    """Lets through what comes from the server's own pages.

    A page of another site can make a browser send requests here (DNS rebinding, cross-site requests); the Host and
    the Origin tell them apart.

    Parameters
    ----------
    hosts
        Allowed values of the Host header.
    origins
        Allowed values of the Origin header of requests that change something.
    policy
        The content security policy of every response.
    served
        What refusals call what is served.
    hint
        What the refusal of another Host says of what to do.
    largest
        Bytes that a body may have.
    """

    def __init__(
        self,
        app: "ASGIApp",
        *,
        hosts: Collection[str],
        origins: Collection[str],
        policy: str = POLICY,
        served: str = "study",
        hint: str = " (see --public-url)",
        largest: int = LARGEST_BODY,
    ) -> None:
        self._app, self._hosts, self._origins = app, frozenset(hosts), frozenset(origins)
        self._headers = [*_HEADERS, (b"content-security-policy", policy.encode())]
        self._served, self._hint, self._largest = served, hint, largest

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            return

        async def send_headed(message: "Message") -> None:
            if message["type"] == "http.response.start":
                ours = {name for name, _ in self._headers}
                theirs = [(name, value) for name, value in message["headers"] if name.lower() not in ours]
                message = {**message, "headers": [*theirs, *self._headers]}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send_headed)
            return
        await _drained(receive)
        status, text = refusal
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        await send_headed({"type": "http.response.start", "status": status, "headers": headers})
        await send_headed({"type": "http.response.body", "body": text.encode()})

    def _refusal(self, scope: "Scope") -> tuple[int, str] | None:
        """Status and text of the refusal of a request; `None` where it may pass."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        host = headers.get("host", [])
        if len(host) != 1 or host[0].lower() not in self._hosts:
            return 421, f"This name of the server is not one that the {self._served} is served under{self._hint}."
        if scope["method"] in ("GET", "HEAD"):
            return None
        if scope["method"] != "POST":
            return 405, "Only GET, HEAD and POST are answered."
        origin = headers.get("origin", [])
        if len(origin) != 1 or origin[0].lower() not in self._origins:
            return 403, f"This request does not come from a page of the {self._served}."
        kind = headers.get("content-type", [""])[0].split(";")[0].strip().lower()
        if kind != "application/json":
            return 415, "A change is sent as application/json."
        length = headers.get("content-length", ["0"])[0]
        if not length.isascii() or not length.isdigit() or len(length) > 9 or int(length) > self._largest:
            return 413, f"A body has at most {self._largest:,} bytes."
        return None


async def _drained(receive: "Receive") -> None:
    """Read what comes with a request that is refused, within bounds.

    Closed over what it has not read, a connection is reset, and whoever asked may never see the answer.
    """
    left = _MOST_DRAINED
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
                left -= len(message.get("body", b""))
    except TimeoutError:
        return


async def body_of(request: "Request", *, largest: int = LARGEST_BODY) -> Any:
    """The JSON of a request of bounded size, also where it does not say how long it is.

    Raises
    ------
    starlette.exceptions.HTTPException
        Where it is too long, too slow or no JSON.
    """
    from starlette.exceptions import HTTPException

    data, size = bytearray(), 0
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            async for part in request.stream():
                size += len(part)
                # Read on for a while, so that the refusal is seen.
                if size > largest + _MOST_DRAINED:
                    break
                if size <= largest:
                    data += part
        if size > largest:
            raise HTTPException(413)
        return json.loads(data)
    except TimeoutError as error:
        raise HTTPException(408) from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400) from error
