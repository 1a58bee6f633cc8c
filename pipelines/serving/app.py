"""The HTTP side: paths, bodies, server-sent events, clients that go away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from base.errors import DamagedError
from pipelines.serving.guard import Guard
from pipelines.serving.metrics import CONTENT_TYPE
from pipelines.serving.protocol import ApiError, ChatRequest, CompletionRequest, DrawingFields, parse
from pipelines.serving.service import Answering, Service, state_body, state_error
from pipelines.serving.states import StateError

logger = logging.getLogger(__name__)
MAX_BODY_BYTES = 32 << 20
Handler = Callable[[Request], Awaitable[Response]]


def make_app(service: Service, host: str, key: str | None) -> Starlette:
    """The application of a server that is bound to `host`."""
    endpoints = _Endpoints(service)
    routes = [
        Route("/health", endpoints.health),
        Route("/metrics", endpoints.metrics),
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{model:path}", endpoints.model),
        Route("/v1/completions", endpoints.completions, methods=["POST"]),
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/states", endpoints.states),
        Route("/v1/states/{state}", endpoints.state, methods=["GET"]),
        Route("/v1/states/{state}", endpoints.delete_state, methods=["DELETE"]),
    ]

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await asyncio.to_thread(service.engine.close)

    def failed(request: Request, error: Exception) -> Response:
        problem = _as_api_error(error)
        service.metrics.answered(_path(request), problem.status)
        headers = {"Retry-After": "1"} if problem.status == 429 else {}
        return JSONResponse(problem.body(), problem.status, headers)

    kinds: list[Any] = [ApiError, HTTPException, ClientDisconnect, Exception]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, host=host, key=key)],
        exception_handlers=dict.fromkeys(kinds, failed),
        lifespan=lifespan,
    )


class _Endpoints:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, request: Request) -> Response:
        """Whether the engine works. Of no effect on metrics."""
        engine = self._service.engine
        load = engine.load()
        body = {
            "status": "ok" if engine.is_alive else "stopped",
            "batch_rows": load.num_rows,
            "answers_running": load.num_drawing,
            "answers_waiting": load.num_waiting,
        }
        return JSONResponse(body, 200 if engine.is_alive else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type=CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        return self._answer(request, {"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["model"] != self._service.model_id:
            raise ApiError(404, f"There is no model {request.path_params['model']!r} here.", code="model_not_found")
        return self._answer(request, self._model())

    async def completions(self, request: Request) -> Response:
        fields: CompletionRequest = parse(CompletionRequest, await _json_of(request))
        return await self._answering(request, fields, await self._service.complete(fields))

    async def chat(self, request: Request) -> Response:
        fields: ChatRequest = parse(ChatRequest, await _json_of(request))
        return await self._answering(request, fields, await self._service.chat(fields))

    async def states(self, request: Request) -> Response:
        found = await asyncio.to_thread(self._service.store.all)
        return self._answer(request, {"object": "list", "data": [state_body(facts) for facts in found]})

    async def state(self, request: Request) -> Response:
        facts = await self._of_store(self._service.store.facts, request)
        return self._answer(request, state_body(facts))

    async def delete_state(self, request: Request) -> Response:
        await self._of_store(self._service.store.delete, request)
        state_id = request.path_params["state"]
        return self._answer(request, {"id": state_id, "object": "state", "deleted": True})

    async def _of_store(self, function: Callable[[str], Any], request: Request) -> Any:
        try:
            return await asyncio.to_thread(function, request.path_params["state"])
        except (StateError, DamagedError) as error:
            raise state_error(error) from error

    async def _answering(self, request: Request, fields: DrawingFields, answering: Answering) -> Response:
        """The response, whole or streamed. The request is cancelled when the client goes away."""
        if fields.stream:
            chunks = self._events(request, answering)
            self._service.metrics.answered(_path(request), 200)
            return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        gone = asyncio.create_task(_gone(request))
        whole = asyncio.create_task(answering.whole())
        try:
            await asyncio.wait([gone, whole], return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                raise ClientDisconnect
            return self._answer(request, whole.result())
        finally:
            gone.cancel()
            whole.cancel()
            answering.close()

    async def _events(self, request: Request, answering: Answering) -> AsyncIterator[str]:
        """Server-sent events. Starlette closes this when the client goes away."""
        try:
            async for chunk in answering.stream():
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        except ApiError as error:
            yield f"data: {json.dumps(error.body(), ensure_ascii=False)}\n\n"
        finally:
            answering.close()
        yield "data: [DONE]\n\n"

    def _model(self) -> dict[str, Any]:
        service = self._service
        return {"id": service.model_id, "object": "model", "created": service.created, "owned_by": "bmojo"}

    def _answer(self, request: Request, body: dict[str, Any]) -> Response:
        self._service.metrics.answered(_path(request), 200)
        return JSONResponse(body)


async def _gone(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _json_of(request: Request) -> Any:
    """The body. Only JSON that is declared as such: a page of another site cannot send it without asking first."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, f"The Content-Type is {content_type!r}; expected application/json.")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"The body is over {MAX_BODY_BYTES >> 20} MiB. Read long texts in parts, by states.")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not JSON: {error}.") from error


def _path(request: Request) -> str:
    """The path as the routes have it, so that metrics have few labels."""
    route = request.scope.get("route")
    return route.path if isinstance(route, Route) else "other"


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        advice = {404: " The paths are in the guide, at Serving.", 405: " Another method is needed."}
        return ApiError(error.status_code, f"{error.detail}.{advice.get(error.status_code, '')}")
    if isinstance(error, ClientDisconnect):
        return ApiError(499, "The client went away.")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "The server failed; its log has the details.", kind="server_error")
