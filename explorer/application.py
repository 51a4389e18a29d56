"""The web application of a site: its files, and two questions to the model that a page asks.

`POST /api/remove` takes concepts out of a text, `POST /api/text` reads a typed one. No GET changes anything, and
nothing is served but what the site was built of.
"""

import asyncio
from collections.abc import Collection
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from ..cache.frozen import Frozen
from ..errors import ClvqError, MissingExtra
from ..evaluation.guard import Guard, body_of
from .data_files import read_script, script
from .folder import INDEX, Site
from .live import Live

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "font-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
_LONGEST_TYPED = 12_000
# In bytes: four for a character, and as many again where it is escaped.
_LARGEST_BODY = 100_000


class RemoveBody(Frozen):
    """What a page asks of `api/remove`."""

    model_config = ConfigDict(strict=True)

    run: Annotated[str, Field(max_length=16)]
    text: Annotated[int, Field(ge=0, le=2**31)] | None = None
    typed: Annotated[str, Field(max_length=_LONGEST_TYPED)] | None = None
    codes: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(max_length=1_000)]
    removal: Literal["centred", "projection"] = "centred"
    rows: Literal["all"] | Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(max_length=5_000)] = "all"

    @model_validator(mode="after")
    def _one_text(self) -> "RemoveBody":
        if (self.text is None) == (self.typed is None):
            raise ValueError("give text or typed, one of them")
        return self


class TextBody(Frozen):
    """What a page asks of `api/text`."""

    model_config = ConfigDict(strict=True)

    text: Annotated[str, Field(max_length=_LONGEST_TYPED)]


def make_app(site: Site, live: Live | None, *, hosts: Collection[str], origins: Collection[str]) -> "ASGIApp":
    """The application.

    Parameters
    ----------
    live
        Answers about the model; without it the pages are served alone.
    hosts, origins
        See `Guard`.

    Raises
    ------
    MissingExtra
    """
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise MissingExtra("serving a site needs starlette and uvicorn: pip install 'clvq[explore]'") from error

    # Listed once, so that no request can name another file of this machine.
    names = frozenset(site.files())
    about = "data/site.js"
    told = script("site", read_script(site.path, "site") | {"live": live is not None})

    async def file(request: "Request") -> "Response":
        name = request.path_params["name"] or INDEX
        if name not in names:
            raise HTTPException(404)
        kind = _TYPES.get(PurePosixPath(name).suffix, "text/plain; charset=utf-8")
        if name == about:
            return Response(told, media_type=kind)
        return FileResponse(site.path / name, media_type=kind)

    async def remove(request: "Request") -> "Response":
        if live is None:
            raise HTTPException(404)
        sent = RemoveBody.model_validate(await body_of(request, largest=_LARGEST_BODY))
        text: int | str = sent.text if sent.text is not None else str(sent.typed)
        rows = None if sent.rows == "all" else sent.rows
        return JSONResponse(await asyncio.to_thread(live.remove, sent.run, text, sent.codes, sent.removal, rows))

    async def read(request: "Request") -> "Response":
        if live is None:
            raise HTTPException(404)
        sent = TextBody.model_validate(await body_of(request, largest=_LARGEST_BODY))
        return JSONResponse(await asyncio.to_thread(live.read, sent.text))

    async def refused(request: "Request", error: Exception) -> "Response":
        status = error.status_code if isinstance(error, HTTPException) else 500
        said = {404: "there is nothing here", 413: "that is too long", 408: "that took too long"}
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": said.get(status, "this cannot be read")}, status_code=status)
        return PlainTextResponse(f"{said.get(status, status)}\n", status_code=status)

    async def wrong(request: "Request", error: Exception) -> "Response":
        return JSONResponse({"error": _line(error)}, status_code=422)

    app = Starlette(
        routes=[
            Route("/api/remove", remove, methods=["POST"]),
            Route("/api/text", read, methods=["POST"]),
            Route("/{name:path}", file),
        ],
        exception_handlers={HTTPException: refused, ClvqError: wrong, ValidationError: wrong},
    )
    app.router.redirect_slashes = False
    return Guard(app, hosts=hosts, origins=origins, policy=POLICY, served="explorer", hint="", largest=_LARGEST_BODY)


def _line(error: Exception) -> str:
    """One line for the page; of what was sent, no more than where it is wrong."""
    if isinstance(error, ValidationError):
        first: Any = error.errors(include_url=False, include_input=False, include_context=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the request'}: {first['msg']}"
    return " ".join(str(error).split())
