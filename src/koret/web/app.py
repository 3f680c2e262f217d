"""The page's addresses: static files, and a read-only JSON interface."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from koret import __version__
from koret.web.batching import Busy
from koret.web.opening import Opened
from koret.web.protection import Protection, Refused
from koret.web.report import KINDS
from koret.web.words import explain

STATIC = Path(__file__).parent / "static"
QUERY_CHARACTERS = 2000
PASSAGES, PASSAGE_CHARACTERS = 100, 2000
MOST_SHOWN = 50
RANKINGS_AT_ONCE = 2  # pasted passages are encoded for so many people at a time; more are asked to wait


class Search(msgspec.Struct, forbid_unknown_fields=True):
    query: str
    columns: list[str]
    k: int = 10


class Ranking(msgspec.Struct, forbid_unknown_fields=True):
    query: str
    passages: list[str]
    columns: list[str]


Body = TypeVar("Body", Search, Ranking)


def make_app(
    opened: Opened, *, top_k: int = 10, hosts: tuple[str, ...] = (), open_to_network: bool = False
) -> Protection:
    """The page over what was opened, behind its protection; ``hosts`` as for ``Protection``."""
    app = FastAPI(title="koret", docs_url=None, redoc_url=None, openapi_url=None)
    desk, report = opened.desk, opened.report
    ranking = asyncio.Semaphore(RANKINGS_AT_ONCE)
    state = {
        "version": __version__,
        "corpus": {"name": desk.corpus, "passages": desk.passages},
        "columns": [msgspec.to_builtins(column) for column in desk.columns],
        "questions": len(desk.questions),
        "examples": desk.questions.pick_examples(),
        "report": report.run.name if report else None,
        "top_k": top_k,
        "limits": {"query": QUERY_CHARACTERS, "passages": PASSAGES, "passage": PASSAGE_CHARACTERS},
    }

    @app.get("/api/state")
    async def show_state() -> Response:
        return _send(state)

    @app.get("/api/questions")
    async def complete(text: str = "") -> Response:
        return _send({"questions": desk.questions.complete(text[:QUERY_CHARACTERS])})

    @app.post("/api/search")
    async def search(request: Request) -> Response:
        asked = _read(await request.body(), Search)
        _check_query(asked.query)
        columns = _check_columns(asked.columns)
        return _send(await desk.search(asked.query.strip(), columns, min(max(asked.k, 1), MOST_SHOWN)))

    @app.post("/api/rank")
    async def rank(request: Request) -> Response:
        asked = _read(await request.body(), Ranking)
        _check_query(asked.query)
        columns = _check_columns(asked.columns)
        passages = _check_passages(asked.passages)
        if ranking.locked():
            raise Refused(503, "busy")
        async with ranking:
            return _send(await desk.rank(asked.query.strip(), passages, columns))

    @app.get("/api/report")
    def show_report() -> Response:
        return _send(_require_report().describe())

    @app.get("/api/report/questions")
    def list_questions(kind: str = "wins", text: str = "", start: int = 0, count: int = 20) -> Response:
        if kind not in KINDS:
            raise Refused(400, "bad_json")
        count = min(max(count, 0), 100)
        return _send(_require_report().list_questions(kind, text[:QUERY_CHARACTERS], max(start, 0), count))

    @app.get("/")
    async def show_page() -> Response:
        return FileResponse(STATIC / "index.html")

    app.mount("/", StaticFiles(directory=STATIC))

    @app.exception_handler(Refused)
    async def refuse(request: Request, refusal: Refused) -> Response:
        return _send_error(refusal.status, refusal.reason, **refusal.values)

    @app.exception_handler(Busy)
    async def say_busy(request: Request, error: Busy) -> Response:
        return _send_error(503, "busy")

    @app.exception_handler(HTTPException)
    async def say_http(request: Request, error: HTTPException) -> Response:
        return _send_error(error.status_code, "method" if error.status_code == 405 else "missing")

    @app.exception_handler(RequestValidationError)
    async def say_unreadable(request: Request, error: RequestValidationError) -> Response:
        return _send_error(400, "bad_json")

    @app.exception_handler(Exception)
    async def say_failed(request: Request, error: Exception) -> Response:
        return _send_error(500, "failed")

    def _require_report():
        if report is None:
            raise Refused(404, "no_report")
        return report

    def _check_columns(wanted: list[str]) -> list[str]:
        known = [column.id for column in desk.columns if column.id in wanted]
        if not known:
            raise Refused(400, "columns")
        return known

    return Protection(app, hosts, open_to_network)


def _read(body: bytes, kind: type[Body]) -> Body:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, "bad_json") from error


def _check_query(query: str) -> None:
    if not query.strip():
        raise Refused(400, "empty_query")
    if len(query) > QUERY_CHARACTERS:
        raise Refused(400, "long_query", most=QUERY_CHARACTERS)
    _check_text(query)


def _check_passages(passages: list[str]) -> list[str]:
    found = [text.strip() for text in passages if text.strip()]
    if not found:
        raise Refused(400, "no_passages")
    if len(found) > PASSAGES:
        raise Refused(400, "many_passages", most=PASSAGES)
    for number, text in enumerate(found, 1):
        if len(text) > PASSAGE_CHARACTERS:
            raise Refused(400, "long_passage", number=number, most=PASSAGE_CHARACTERS)
        _check_text(text)
    return found


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair
        raise Refused(400, "bad_json") from error


def _send(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), status, media_type="application/json")


def _send_error(status: int, reason: str, **values: Any) -> Response:
    return _send({"error": {"code": reason, **explain(reason, **values)}}, status)
