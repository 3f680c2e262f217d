"""The addresses of a server: /v1/embeddings, /v1/models, /health, /metrics."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from koret.retrieval.encoder import TextEncoder
from koret.retrieval.microbatch import Closed, Encoded, QueueFull, TextBatcher
from koret.serving.guard import Guard
from koret.serving.metrics import Metrics
from koret.serving.requests import ApiError, EmbeddingRequest, format_answer, read_request, shorten

EMBEDDINGS = "/v1/embeddings"
GONE = 499  # nginx's number for a client that hung up: counted, never sent
log = logging.getLogger(__name__)


class Service:
    """A model being served: its encoder, its queue, its counters, its name."""

    def __init__(self, encoder: TextEncoder, name: str, max_queue: int = 4096) -> None:
        self.encoder, self.name, self.since = encoder, name, int(time.time())
        self.metrics = Metrics(name, lambda: self.batcher.waiting)
        self.batcher = TextBatcher(encoder, max_waiting=max_queue, watch=self.metrics.count_batch)

    async def embed(self, asked: EmbeddingRequest, request: Request) -> bytes:
        """The JSON answer to one request. Raises ApiError."""
        try:
            future = asyncio.wrap_future(self.batcher.submit(asked.texts, asked.kind))
        except QueueFull as error:
            raise ApiError(
                429, str(error), code="queue_full", kind="rate_limit_error",
                headers={"retry-after": str(error.retry_after)},
            ) from None  # fmt: skip
        except Closed as error:
            raise ApiError(503, str(error), code="stopping", kind="server_error") from None
        try:
            encoded = await _wait_while_connected(future, request)
            vectors = shorten(encoded.vectors, asked.dimensions)
        except FloatingPointError as error:
            raise ApiError(
                500, f"{error}: the model's weights are damaged or its precision is too low; nothing was answered",
                code="non_finite", kind="server_error",
            ) from None  # fmt: skip
        self._count(asked, encoded)
        return format_answer(vectors, int(encoded.tokens.sum()), self.name, asked.as_base64)

    def _count(self, asked: EmbeddingRequest, encoded: Encoded) -> None:
        self.metrics.texts.labels(asked.kind).inc(len(asked.texts))
        self.metrics.tokens.labels(asked.kind).inc(int(encoded.tokens.sum()))
        self.metrics.clipped.inc(int((encoded.tokens >= self.encoder.max_seq_length).sum()))


class _Gone(Exception):
    """The client hung up before its answer was ready."""


async def _wait_while_connected(future: asyncio.Future[Encoded], request: Request) -> Encoded:
    """The future's result; a client that hangs up cancels it, so that nobody's place in the queue outlives them."""
    hung_up = asyncio.ensure_future(request.receive())  # the body has been read: what comes next is the end
    try:
        await asyncio.wait((future, hung_up), return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            future.cancel()
            raise _Gone
        return future.result()
    finally:
        hung_up.cancel()


def make_app(
    service: Service, *, hosts: Iterable[str] = (), open_to_network: bool = False, key: str | None = None
) -> Guard:
    """The interface to a service behind its guard; ``hosts``, ``open_to_network`` and ``key`` as for ``Guard``."""
    app = FastAPI(title="koret", docs_url=None, redoc_url=None, openapi_url=None)
    models = [service.name, f"{service.name}-query", f"{service.name}-passage"]

    def count_refusal(path: str, status: int) -> None:
        if path == EMBEDDINGS:
            service.metrics.requests.labels(str(status)).inc()

    @app.post(EMBEDDINGS)
    async def create_embeddings(request: Request) -> Response:
        began, status = time.perf_counter(), 200
        try:
            asked = read_request(request.scope["koret.body"], service.name, service.encoder.dimensions)
            return Response(await service.embed(asked, request), media_type="application/json")
        except ApiError as error:
            status = error.status
            raise
        except _Gone:
            status = GONE
            return Response(status_code=GONE)
        except Exception:
            status = 500
            raise
        finally:
            service.metrics.requests.labels(str(status)).inc()
            service.metrics.seconds.observe(time.perf_counter() - began)

    @app.get("/v1/models")
    async def list_models() -> Response:
        own = {"object": "model", "created": service.since, "owned_by": "koret"}
        return _send({"object": "list", "data": [{"id": name, **own} for name in models]})

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Response:
        if name not in models:
            raise ApiError(
                404, f"no model '{name[:80]}' here: this server has '{service.name}'", code="model_not_found"
            )
        return _send({"id": name, "object": "model", "created": service.since, "owned_by": "koret"})

    @app.get("/health")
    async def show_health() -> Response:
        ready = service.batcher.is_alive
        return _send({"status": "ready" if ready else "stopping", "model": service.name}, 200 if ready else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(service.metrics.format(), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> Response:
        return Response(error.content, error.status, error.headers, "application/json")

    @app.exception_handler(HTTPException)
    async def say_http(request: Request, error: HTTPException) -> Response:
        word = "this address takes another method" if error.status_code == 405 else "there is nothing at this address"
        count_refusal(request.url.path, error.status_code)
        return await refuse(request, ApiError(error.status_code, word, code="not_found"))

    @app.exception_handler(Exception)
    async def say_failed(request: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        words = "the server failed at this request; its terminal says why"
        return await refuse(request, ApiError(500, words, code="failed", kind="server_error"))

    return Guard(app, hosts, open_to_network, key, count_refusal)


def _send(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")
