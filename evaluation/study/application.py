"""The web application of a study: pages by personal link, and three requests that a page makes.

`GET state` tells how far a person is, `POST consent` begins, `POST answers` saves an answer and deals the next
question. Nothing else is served, and no GET changes anything.
"""

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from ...cache.frozen import Frozen
from ...errors import DiskFull, FolderInUse, MissingExtra
from ..guard import Guard, body_of
from .database import Database, Given, Standing
from .folder import DATA, INDEX, PAGES, SCRIPTS, STYLE, Study
from .pages import page_data, right_answer, script, shown

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
_HOME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Study</title><link rel="icon" href="data:,"><link rel="stylesheet" href="study.css"></head>
<body><main><h1>A personal link is needed</h1>
<p>This is the address of a study. To take part, open the link that you were sent, in full.</p></main></body></html>
"""
_NOTHING = "There is nothing here. If you were sent a link, please check that it is complete.\n"
_logger = logging.getLogger(__name__)


class AnswerBody(Frozen):
    """What a page sends as an answer."""

    model_config = ConfigDict(strict=True)

    place: Annotated[int, Field(ge=0, le=1_000_000)]
    item: Annotated[str, Field(max_length=32)]
    method: Annotated[str, Field(max_length=16)]
    answer: Annotated[int, Field(ge=0, le=1_000_000)]
    confidence: Annotated[int, Field(ge=1, le=4)]
    milliseconds: Annotated[int, Field(ge=0, le=86_400_000)]


def _now() -> datetime:
    return datetime.now(UTC)


def make_app(
    study: Study,
    database: Database,
    tokens: Collection[str],
    *,
    hosts: Collection[str],
    origins: Collection[str],
    now: Callable[[], datetime] = _now,
) -> "ASGIApp":
    """The application.

    Parameters
    ----------
    tokens
        The secrets of the annotators' links, from number 1 on.
    hosts, origins
        See `Guard`.

    Raises
    ------
    MissingExtra
    """
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise MissingExtra("serving a study needs starlette and uvicorn: pip install 'clvq[study]'") from error

    files = _files(study)
    # Looked up by digest, so that the time it takes says nothing about the secret.
    numbers = {_digest(token): number for number, token in enumerate(tokens, start=1)}

    def annotator_of(request: "Request") -> int:
        number = numbers.get(_digest(request.path_params["token"]))
        if number is None:
            raise HTTPException(404)
        return number

    def file(name: str) -> "Response":
        if name not in files:
            raise HTTPException(404)
        return Response(files[name], media_type=_TYPES[name[name.rindex(".") :]])

    async def home(request: "Request") -> "Response":
        return Response(_HOME, media_type=_TYPES[".html"])

    async def style(request: "Request") -> "Response":
        return file(STYLE)

    async def to_folder(request: "Request") -> "Response":
        annotator_of(request)
        # Relative: a proxy may serve the study under another path.
        return RedirectResponse(f"{request.path_params['token']}/", status_code=307)

    async def page(request: "Request") -> "Response":
        annotator_of(request)
        return file(request.path_params.get("name", INDEX))

    async def state(request: "Request") -> "Response":
        annotator = annotator_of(request)
        return JSONResponse(_standing(study, database.standing(annotator)))

    async def consent(request: "Request") -> "Response":
        annotator = annotator_of(request)
        await body_of(request)
        return JSONResponse(_standing(study, database.consent(annotator, now=now())))

    async def answers(request: "Request") -> "Response":
        annotator = annotator_of(request)
        try:
            sent = AnswerBody.model_validate(await body_of(request))
        except ValidationError as error:
            raise HTTPException(400) from error
        if sent.answer >= len(study.items.classes):
            raise HTTPException(400)
        question = database.answer(annotator, Given(**sent.model_dump()), now=now())
        if question is None:
            raise HTTPException(409)
        right = right_answer(question, study.item(question.item))
        return JSONResponse({"right": right, "standing": _standing(study, database.standing(annotator))})

    async def refused(request: "Request", error: Exception) -> "Response":
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers = error.headers if isinstance(error, HTTPException) else None
        text = _NOTHING if status == 404 else f"{status}\n"
        return PlainTextResponse(text, status_code=status, headers=headers)

    async def no_room(request: "Request", error: Exception) -> "Response":
        # The page keeps the answer and sends it again.
        _logger.error("%s", error)
        return PlainTextResponse("503\n", status_code=503)

    app = Starlette(
        routes=[
            Route("/", home),
            Route(f"/{STYLE}", style),
            Route("/a/{token}", to_folder),
            Route("/a/{token}/", page),
            Route("/a/{token}/state", state),
            Route("/a/{token}/consent", consent, methods=["POST"]),
            Route("/a/{token}/answers", answers, methods=["POST"]),
            Route("/a/{token}/{name}", page),
        ],
        exception_handlers={HTTPException: refused, DiskFull: no_room, FolderInUse: no_room},
    )
    app.router.redirect_slashes = False
    return Guard(app, hosts=hosts, origins=origins)


def _files(study: Study) -> Mapping[str, bytes]:
    """All that a browser may load, by name; read once, so that no request names a file of this machine."""
    folder = study.folder / PAGES
    files = {name: (folder / name).read_bytes() for name in (INDEX, STYLE, *SCRIPTS)}
    # Not the pages' own: that one holds all questions.
    files[DATA] = script(page_data(study.settings, study.items, study.digest))
    return files


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _standing(study: Study, standing: Standing) -> dict[str, Any]:
    """How far a person is, as the page is told."""
    told: dict[str, Any] = {"answered": standing.answered, "total": standing.total, "question": None}
    if standing.question is None or standing.place is None:
        return {**told, "stage": "done" if standing.consented else "consent"}
    practice = standing.question.kind == "training"
    before = len(study.items.of_kind("training"))
    question = {
        "place": standing.place,
        "item": standing.question.item,
        "method": standing.question.method,
        "practice": practice,
        "number": standing.place + 1 - (0 if practice else before),
        "of": before if practice else standing.total - before,
        **shown(standing.question, study.item(standing.question.item), study.settings, study.items),
    }
    return {**told, "stage": "question", "question": question}
