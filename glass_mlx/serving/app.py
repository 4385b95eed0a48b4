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
from .http_errors import EXCEPTION_HANDLERS, error_response
from .openapi import document
from .request import Chunk, PendingCompletion
from .schema import ChatBody, CompletionBody, parse
from .security import SecurityMiddleware, SharingMiddleware, read_body
from .sockets import parse_origin
from .writers import ChatWriter, Health, Model, ModelList, TextWriter

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
        return await self._complete(request, ChatBody, ChatWriter)

    async def complete(self, request: Request) -> Response | EventStream:
        return await self._complete(request, CompletionBody, TextWriter)

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

    async def _complete(self, request: Request, body_type: type, writer_type: type) -> Response | EventStream:
        try:
            data = await read_body(request, self.options.max_body_bytes, self.options.body_timeout)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        client = request.client.host if request.client else ""

        def submit() -> tuple[Any, PendingCompletion]:
            body = parse(body_type, data)
            return body, self.engine.submit(body.request(client, self.options.defaults))

        body, pending = await asyncio.to_thread(submit)  # a large body takes a while
        asked = pending.request
        writer = writer_type(pending.source.id, asked.logprobs)
        delivery = _Delivery(self, pending, request.receive)
        try:
            # Most failures come before the first chunk, when a status code can still be sent.
            chunk = await pending.get(KEEPALIVE if body.stream else None)
            if body.stream:
                return EventStream(_events(delivery, writer, chunk, body.include_usage), delivery)
            while True:
                if chunk is not None:
                    writer.add(chunk)
                    delivery.record(chunk)
                    if chunk.finish_reason:
                        break
                chunk = await pending.get()
        except BaseException:
            delivery.close()
            raise
        delivery.close()
        return Response(_dump(writer.response()), media_type="application/json")


class PageFiles(StaticFiles):
    """The files of the chat page."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(NO_CACHE)
        return response


class _Delivery:
    """A completion on its way to a client. It is cancelled when the client disconnects, and logged when it ends.

    The connection must not be read by anything else: the request's body was read before, and :class:`EventStream` does
    not read.
    """

    def __init__(self, api: Api, pending: PendingCompletion, receive: Callable[[], Awaitable[dict[str, Any]]]):
        self.api, self.pending = api, pending
        self._last: Chunk | None = None
        self._text: list[str] = []
        api.pending.add(pending)
        self._watch = asyncio.create_task(self._cancel_on_disconnect(receive))

    def record(self, chunk: Chunk) -> None:
        """Note a chunk that was delivered."""
        self._last = chunk
        if self.api.options.log_prompts:
            self._text.append(chunk.reasoning + chunk.text)

    def close(self) -> None:
        """End the delivery, whether it is complete or not."""
        self._watch.cancel()
        self.api.pending.discard(self.pending)
        if self._last is None or self._last.finish_reason is None:
            self.pending.cancel()
        self._log()

    def _log(self) -> None:
        request, usage = self.pending.request, self._last.usage if self._last else None
        if usage is not None:
            logger.info(
                "%s for %s: %d prompt tokens (%d cached), %d generated, %.1f tok/s, %s",
                self.pending.source.id,
                request.client,
                usage.prompt_tokens,
                usage.cached_tokens,
                usage.completion_tokens,
                usage.generation_tps,
                self._last.finish_reason,
            )
        if self.api.options.log_prompts:
            texts = {"prompt": request.messages or request.prompt, "answer": "".join(self._text)}
            logger.info("%s", json.dumps(texts, ensure_ascii=False))

    async def _cancel_on_disconnect(self, receive: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.pending.cancel()


class EventStream:
    """A response of server-sent events. Starlette's own would read the connection, which the delivery does here."""

    def __init__(self, events: AsyncIterator[bytes], delivery: _Delivery):
        self.events, self.delivery = events, delivery

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for event in self.events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.delivery.close()


async def _events(delivery: _Delivery, writer: Any, chunk: Chunk | None, include_usage: bool) -> AsyncIterator[bytes]:
    """The events of a stream, of which ``chunk`` is the first chunk. A chunk counts as delivered once the next event is
    asked for."""
    if (event := writer.first_event()) is not None:
        yield _event(event)
    try:
        while True:
            if chunk is None:
                yield b": keepalive\n\n"
            else:
                if (event := writer.event(chunk)) is not None:
                    yield _event(event)
                delivery.record(chunk)
                if chunk.finish_reason:
                    break
            chunk = await delivery.pending.get(KEEPALIVE)
        if include_usage:
            yield _event(writer.usage_event(chunk.usage))
        yield b"data: [DONE]\n\n"
    except RequestError as e:
        yield b"data: " + error_response(e).body + b"\n\n"


def _event(model: BaseModel) -> bytes:
    return b"data: " + _dump(model) + b"\n\n"


def _json(model: BaseModel, status: int = 200) -> Response:
    return Response(model.model_dump_json(), status, media_type="application/json")


def _dump(model: BaseModel) -> bytes:
    return model.model_dump_json(exclude_unset=True).encode()
