"""The HTTP endpoints: OpenAI's, status and unloading, and the files of the chat page."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from .engine import Engine
from .openapi import document
from .request import BadRequest, Busy, EngineError, Piece, Ticket, UnknownModel
from .schema import BadBody, ChatBody, CompletionBody, parse
from .security import Guard, TooLarge, error, gone, read_body
from .writers import ChatWriter, Health, Model, ModelList, TextWriter

logger = logging.getLogger("glass_mlx")

PAGE = Path(__file__).parent / "page"
FRESH = {"Cache-Control": "no-cache"}  # browsers must ask whether a file has changed, or old scripts run new pages
KEEPALIVE = 10.0  # seconds; proxies and clients give up on a stream that is silent for long


@dataclass(frozen=True)
class ApiOptions:
    """What the server adds to the engine.

    Attributes:
        defaults: fields of ``ticket.Request`` for requests that leave them out.
        api_key: what clients must send as a bearer token, if anything.
        hosts: names under which the server is called, besides localhost and IP addresses.
        origins: web origins whose pages may use the API.
        max_body_bytes, body_timeout: bodies that are larger, or take longer to arrive, are refused.
        log_prompts: write prompts and answers to the log.
    """

    defaults: dict[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    max_body_bytes: int = 8 << 20
    body_timeout: float = 30.0
    log_prompts: bool = False


class Api:
    """The endpoints of one engine; ``app`` is the ASGI application."""

    def __init__(self, engine: Engine, options: ApiOptions | None = None):
        self.engine, self.options = engine, options or ApiOptions()
        self.tickets: set[Ticket] = set()
        guard = {"api_key": self.options.api_key, "hosts": self.options.hosts, "origins": self.options.origins}
        middleware = [Middleware(Guard, **guard)]
        if self.options.origins:
            headers = ["Authorization", "Content-Type"]
            middleware.append(
                Middleware(
                    CORSMiddleware, allow_origins=self.options.origins, allow_methods=["*"], allow_headers=headers
                )
            )
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{id:path}", self.model),
                Route("/v1/status", self.status),
                Route("/v1/unload", self.unload, methods=["POST"]),
                Route("/health", self.health),
                Route("/openapi.json", self.openapi),
                Route("/", self.page),
                Mount("/static", PageFiles(directory=PAGE, check_dir=False)),
            ],
            middleware=middleware,
            exception_handlers={
                HTTPException: _http_error,
                EngineError: _engine_error,
                BadBody: lambda _, e: error(400, str(e), e.param),
                Exception: lambda _, e: error(500, "Something went wrong; the server's log says what."),
            },
        )

    async def chat(self, request: Request) -> Response | Stream:
        return await self._answer(request, ChatBody, ChatWriter)

    async def complete(self, request: Request) -> Response | Stream:
        return await self._answer(request, CompletionBody, TextWriter)

    async def models(self, request: Request) -> Response:
        return _json(ModelList(data=await self._models()))

    async def model(self, request: Request) -> Response:
        name = request.path_params["id"]
        found = next((model for model in await self._models() if model.id == name), None)
        if found is None:
            raise UnknownModel(f"The model {name!r} does not exist; GET /v1/models lists those that do.")
        return _json(found)

    async def status(self, request: Request) -> Response:
        return JSONResponse(asdict(self.engine.status()))

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
            return FileResponse(index, headers=FRESH)
        return PlainTextResponse("glass_mlx: the API is at /v1, its description at /openapi.json\n")

    async def _models(self) -> list[Model]:
        found = await asyncio.to_thread(self.engine.models)
        return [Model(**asdict(model)) for model in found]

    async def _answer(self, request: Request, kind: type, writer_of: type) -> Response | Stream:
        try:
            data = await read_body(request, self.options.max_body_bytes, self.options.body_timeout)
        except TooLarge:
            limit = f"The body is larger than {self.options.max_body_bytes:,} bytes."
            return error(413, limit, code="request_too_large", Connection="close")
        except TimeoutError:
            return error(408, "The body did not arrive in time.", Connection="close")
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        body = await asyncio.to_thread(parse, kind, data)  # large ones take a while
        client = request.client.host if request.client else ""
        asked = body.request(client, self.options.defaults)
        ticket = await asyncio.to_thread(self.engine.submit, asked)
        writer = writer_of(ticket.model, asked.logprobs)
        self.tickets.add(ticket)
        watch = asyncio.create_task(_cancel_when_gone(ticket, request.receive))
        ending = _Ending(self, ticket, watch)
        try:
            # Most of what can go wrong does so before the first piece: while it has a status code still.
            first = await ticket.get(KEEPALIVE if body.stream else None)
            if body.stream:
                return Stream(self._events(ticket, writer, first, body.include_usage), ending)
            while True:
                if first is not None:
                    writer.add(first)
                    ending.saw(first)
                    if first.finish_reason:
                        break
                first = await ticket.get()
        except BaseException:
            ending()
            raise
        ending()
        return Response(_dump(writer.whole()), media_type="application/json")

    async def _events(
        self, ticket: Ticket, writer: Any, piece: Piece | None, usage: bool
    ) -> AsyncIterator[bytes | Piece]:
        """The events of a stream, and after those of each piece the piece."""
        if (event := writer.begin()) is not None:
            yield _event(event)
        try:
            while True:
                if piece is None:
                    yield b": keepalive\n\n"
                else:
                    if (event := writer.event(piece)) is not None:
                        yield _event(event)
                    yield piece
                    if piece.finish_reason:
                        break
                piece = await ticket.get(KEEPALIVE)
            if usage:
                yield _event(writer.usage(piece.usage))
            yield b"data: [DONE]\n\n"
        except EngineError as e:
            yield b"data: " + _engine_error(None, e).body + b"\n\n"


class PageFiles(StaticFiles):
    """The files of the chat page."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(FRESH)
        return response


class _Ending:
    """What is done when an answer ends, however it does."""

    def __init__(self, api: Api, ticket: Ticket, watch: asyncio.Task):
        self.api, self.ticket, self.watch = api, ticket, watch
        self.last: Piece | None = None
        self.text: list[str] = []

    def saw(self, piece: Piece) -> None:
        self.last = piece
        if self.api.options.log_prompts:
            self.text.append(piece.reasoning + piece.text)

    def __call__(self) -> None:
        self.watch.cancel()
        self.api.tickets.discard(self.ticket)
        finish = self.last.finish_reason if self.last else None
        if finish is None:
            self.ticket.cancel()
        usage = self.last.usage if self.last else None
        if usage is not None:
            logger.info(
                "%s for %s: %d prompt tokens (%d cached), %d generated, %.1f tok/s, %s",
                self.ticket.model,
                self.ticket.request.client,
                usage.prompt_tokens,
                usage.cached_tokens,
                usage.completion_tokens,
                usage.generation_tps,
                finish,
            )
        if self.api.options.log_prompts:
            asked = self.ticket.request
            said = {"prompt": asked.messages or asked.prompt, "answer": "".join(self.text)}
            logger.info("%s", json.dumps(said, ensure_ascii=False))


class Stream:
    """A response of server-sent events. Starlette's own would read the connection, which :func:`gone` does here."""

    def __init__(self, events: AsyncIterator[bytes | Piece], ending: _Ending):
        self.events, self.ending = events, ending

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for event in self.events:
                if isinstance(event, Piece):
                    self.ending.saw(event)
                else:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.ending()


async def _cancel_when_gone(ticket: Ticket, receive: Callable) -> None:
    await gone(receive)
    ticket.cancel()


def _json(model: BaseModel, status: int = 200) -> Response:
    return Response(model.model_dump_json(), status, media_type="application/json")


def _event(model: BaseModel) -> bytes:
    return b"data: " + _dump(model) + b"\n\n"


def _dump(model: BaseModel) -> bytes:
    return model.model_dump_json(exclude_unset=True).encode()


def _http_error(_: Request, e: HTTPException) -> Response:
    return error(e.status_code, f"{e.detail}.", **{k.replace("-", "_"): v for k, v in (e.headers or {}).items()})


def _engine_error(_: Request | None, e: EngineError) -> JSONResponse:
    match e:
        case Busy():
            return error(429, str(e), code="queue_full", Retry_After="2")
        case UnknownModel():
            return error(404, str(e), "model", "model_not_found")
        case BadRequest():
            return error(400, str(e))
    return error(500, str(e))
