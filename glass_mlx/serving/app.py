"""The HTTP endpoints: OpenAI's, status, unloading, and the files of the chat page."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from .catalogue import DEFAULT_NAME
from .engine import Engine
from .errors import RequestError, UnknownModel
from .fields import warning_header
from .http_errors import EXCEPTION_HANDLERS, error_body
from .openapi import document
from .request import Chunk, PendingCompletion, Usage, total
from .responses import ResponseBody
from .schema import Body, ChatBody, CompletionBody, parse
from .security import SecurityMiddleware, SharingMiddleware, read_body
from .sockets import parse_origin
from .writers import Health, Model, ModelList

logger = logging.getLogger("glass_mlx")

PAGE = Path(__file__).parent / "page"
NO_CACHE = {"Cache-Control": "no-cache"}  # browsers must ask whether a file has changed, or old scripts run new pages
KEEPALIVE = 10.0  # seconds; proxies and clients give up on a stream that is silent for long


@dataclass(frozen=True)
class ApiOptions:
    """What the server adds to the engine.

    Attributes:
        defaults: fields of :class:`request.Request` for requests that leave them out.
        api_key: the bearer token that clients must send, if any.
        hosts: names of the server that clients use, besides localhost and IP addresses.
        origins: web origins whose pages may use the API; ``*`` for all.
        max_body_bytes: larger bodies are refused.
        body_timeout: seconds that a body may take to arrive.
        log_prompts: whether prompts and answers are written to the log.
    """

    defaults: dict[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    max_body_bytes: int = 8 << 20
    body_timeout: float = 30.0
    log_prompts: bool = False


class Api:
    """The endpoints of one engine.

    Attributes:
        app: the ASGI application.
        pending (set[PendingCompletion]): what clients are waiting for.
    """

    def __init__(self, engine: Engine, options: ApiOptions | None = None):
        self.engine, self.options = engine, options or ApiOptions()
        self.pending: set[PendingCompletion] = set()
        app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/responses", self.respond, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{id:path}", self.model),
                Route("/v1/status", self.status),
                Route("/v1/unload", self.unload, methods=["POST"]),
                Route("/v1/measure", self.measure, methods=["POST"]),
                Route("/v1/measure", self.stop_measuring, methods=["DELETE"]),
                Route("/health", self.health),
                Route("/openapi.json", self.openapi),
                Route("/", self.page),
                Mount("/static", PageFiles(directory=PAGE, check_dir=False)),
            ],
            exception_handlers=EXCEPTION_HANDLERS,
        )
        # around all of Starlette, whose answer to an unexpected error comes from outside of its own middleware
        origins = [parse_origin(origin) for origin in self.options.origins]
        secured = SecurityMiddleware(app, self.options.api_key, self.options.hosts, origins)
        self.app = SharingMiddleware(secured, origins)

    async def chat(self, request: Request) -> Response | EventStream:
        return await self._complete(request, ChatBody)

    async def complete(self, request: Request) -> Response | EventStream:
        return await self._complete(request, CompletionBody)

    async def respond(self, request: Request) -> Response | EventStream:
        return await self._complete(request, ResponseBody)

    async def models(self, request: Request) -> Response:
        return _json(ModelList(data=await self._models()))

    async def model(self, request: Request) -> Response:
        name = request.path_params["id"]
        found = next((model for model in await self._models() if model.id == name), None)
        if found is None:
            raise UnknownModel(f"The model {name!r} does not exist; GET /v1/models lists the models.")
        return _json(found)

    async def status(self, request: Request) -> Response:
        host = request.client.host if request.client else ""
        return JSONResponse(asdict(self.engine.status(f"{host} {request.query_params.get('user', '')}")))

    async def measure(self, request: Request) -> Response:
        self.engine.measure(request.query_params.get("model", DEFAULT_NAME))
        return await self.status(request)

    async def stop_measuring(self, request: Request) -> Response:
        self.engine.stop_measuring()
        return await self.status(request)

    async def unload(self, request: Request) -> Response:
        return JSONResponse(asdict(await asyncio.wrap_future(self.engine.unload())))

    async def health(self, request: Request) -> Response:
        alive = self.engine.alive
        return _json(Health(status="ok" if alive else "unavailable"), 200 if alive else 503)

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(document())

    async def page(self, request: Request) -> Response:
        index = PAGE / "index.html"
        if index.is_file():
            return FileResponse(index, headers=NO_CACHE)
        return PlainTextResponse("glass_mlx: the API is at /v1, its description at /openapi.json\n")

    async def _models(self) -> list[Model]:
        found = await asyncio.to_thread(self.engine.models)
        return [Model(**asdict(model)) for model in found]

    async def _complete(self, request: Request, body_type: type[Body]) -> Response | EventStream:
        try:
            data = await read_body(request, self.options.max_body_bytes, self.options.body_timeout)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        client = request.client.host if request.client else ""

        def submit() -> tuple[Any, list[str], list[PendingCompletion]]:
            body = parse(body_type, data)
            warnings = body.warnings()
            return body, warnings, self.engine.submit_all(body.requests(client, self.options.defaults))

        body, warnings, pending = await asyncio.to_thread(submit)  # a large body takes a while
        writer = body.writer(pending[0].source.id, len(pending))
        delivery = _Delivery(self, pending, request.receive)
        try:
            # Most failures come before the first chunk, when a status code can still be sent.
            chunks = delivery.chunks(KEEPALIVE if body.stream else None)
            first = await anext(chunks)
            headers = delivery.warn(warnings)
            if body.stream:
                return EventStream(_events(delivery, writer, first, chunks, body), delivery, headers)
            writer.add(first[1], first[0])
            async for index, chunk in chunks:
                writer.add(chunk, index)
            answer = _dump(writer.response(delivery.usage(body)))
        except BaseException:
            delivery.close()
            raise
        delivery.close()
        return Response(answer, media_type="application/json", headers=headers)


class PageFiles(StaticFiles):
    """The files of the chat page."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(NO_CACHE)
        return response


class _Delivery:
    """Completions of one request on their way to a client. They are cancelled when the client disconnects, and logged
    when they end.

    The connection must not be read by anything else: the request's body was read before, and :class:`EventStream` does
    not read.
    """

    def __init__(self, api: Api, pending: list[PendingCompletion], receive: Callable[[], Awaitable[dict[str, Any]]]):
        self.api, self.pending = api, pending
        self.client_left = False
        self._usages: list[Usage] = []
        self._text: list[str] = []
        api.pending.update(pending)
        self._watch = asyncio.create_task(self._cancel_on_disconnect(receive))

    async def chunks(self, timeout: float | None) -> AsyncIterator[tuple[int, Chunk | None]]:
        """All chunks, each with the number of its choice; None where none came in time. A chunk counts as delivered
        once the next one is asked for."""
        for index, pending in enumerate(self.pending):
            last = None
            while last is None:
                chunk = await pending.get(timeout)
                yield index, chunk
                if chunk is not None:
                    last = self._record(index, chunk)

    def warn(self, warnings: list[str]) -> dict[str, str]:
        """Log what the client should know of its request; returns the header that says it."""
        header = warning_header([*warnings, *self.pending[0].warnings])
        for text in header.values():
            logger.warning("%s: %s", self.pending[0].request.client, text)
        return header

    def usage(self, body: Body) -> Usage:
        """What all of them cost."""
        return total(self._usages, getattr(body, "n", None) or 1)

    def close(self) -> None:
        """End the delivery, whether it is complete or not."""
        self._watch.cancel()
        self.api.pending.difference_update(self.pending)
        for pending in self.pending[len(self._usages) :]:
            pending.cancel()
        if self.api.options.log_prompts:
            request = self.pending[0].request
            texts = {"prompt": request.messages or request.prompt, "answer": "".join(self._text)}
            logger.info("%s", json.dumps(texts, ensure_ascii=False))

    def _record(self, index: int, chunk: Chunk) -> str | None:
        """Note a chunk that was delivered; returns why the completion has ended, if it has."""
        if self.api.options.log_prompts:
            self._text.append(chunk.reasoning + chunk.text)
        if chunk.finish_reason:
            pending, usage = self.pending[index], chunk.usage
            self._usages.append(usage)
            logger.info(
                "%s for %s: %d prompt tokens (%d cached), %d generated, %.1f tok/s, %s",
                pending.source.id,
                pending.request.client,
                usage.prompt_tokens,
                usage.cached_tokens,
                usage.completion_tokens,
                usage.generation_tps,
                chunk.finish_reason,
            )
        return chunk.finish_reason

    async def _cancel_on_disconnect(self, receive: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.client_left = True
        for pending in self.pending:
            pending.cancel()


class EventStream:
    """A response of server-sent events. Starlette's own would read the connection, which the delivery does here."""

    def __init__(self, events: AsyncIterator[bytes], delivery: _Delivery, headers: dict[str, str]):
        self.events, self.delivery = events, delivery
        sent = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **headers}
        self.headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in sent.items()]

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.headers})
            async for event in self.events:
                if not self.delivery.client_left:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                    await asyncio.sleep(0)  # what this one found out of the connection is heard before the next
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.delivery.close()


async def _events(
    delivery: _Delivery, writer: Any, first: tuple[int, Chunk | None], others: AsyncIterator, body: Body
) -> AsyncIterator[bytes]:
    """The events of a stream: those of the first chunk, of the others, and the end."""

    async def chunks() -> AsyncIterator[tuple[int, Chunk | None]]:
        yield first
        async for item in others:
            yield item

    begun = -1
    try:
        async for index, chunk in chunks():
            if index > begun:
                begun = index
                for event in writer.first_events(index):
                    yield writer.frame(event)
            if chunk is None:
                yield b": keepalive\n\n"
            else:
                for event in writer.events(chunk, index):
                    yield writer.frame(event)
        for event in writer.last_events(delivery.usage(body), body.include_usage):
            yield writer.frame(event)
        yield writer.end
    except RequestError as e:
        yield writer.failure(error_body(e))


def _json(model: BaseModel, status: int = 200) -> Response:
    return Response(model.model_dump_json(), status, media_type="application/json")


def _dump(model: BaseModel) -> bytes:
    return model.model_dump_json(exclude_unset=True).encode()
