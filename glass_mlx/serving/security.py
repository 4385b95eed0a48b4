"""Keeps out web pages of other origins, rebound DNS names, clients without the key, slow and endless requests."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from .writers import Error, ErrorBody

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# The page must load before it can ask for a key; health and the document tell nothing about anyone.
_OPEN = ("/", "/health", "/openapi.json", "/favicon.ico")


def error(status: int, message: str, param: str | None = None, code: str | None = None, **headers: str) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = ErrorBody(error=Error(message=message, type=kind, param=param, code=code))
    return JSONResponse(body.model_dump(), status, {k.replace("_", "-"): v for k, v in headers.items()})


class Guard:
    """ASGI middleware that checks Host, Origin and the API key, and adds the security headers.

    Host must be an IP address, ``localhost`` or one of ``hosts``: a page that makes its own domain name point here
    (DNS rebinding) still says that name. An Origin, which browsers send, must be this server or one of ``origins``.
    """

    def __init__(self, app: Any, api_key: str | None = None, hosts: Iterable[str] = (), origins: Iterable[str] = ()):
        self.app, self.api_key = app, api_key
        self.hosts = {"localhost", *(host.lower() for host in hosts)}
        self.origins = set(origins)

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)

        async def send_guarded(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await (self._refusal(scope, headers) or self.app)(scope, receive, send_guarded)

    def _refusal(self, scope: dict[str, Any], headers: Headers) -> JSONResponse | None:
        host, origin, path = headers.get("host", ""), headers.get("origin"), scope["path"]
        if not self._knows(host):
            return error(403, "This Host is not served here; allow it with --allowed-host.", code="host_not_allowed")
        if origin is not None and origin not in self.origins and origin not in (f"http://{host}", f"https://{host}"):
            return error(403, "This Origin is not allowed; allow it with --cors-origin.", code="origin_not_allowed")
        preflight = scope["method"] == "OPTIONS" and origin is not None  # browsers send it without the key
        if self.api_key is None or path in _OPEN or path.startswith("/static/") or preflight:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
            return None
        return error(
            401, "Give the server's API key as a bearer token.", code="invalid_api_key", WWW_Authenticate="Bearer"
        )

    def _knows(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self.hosts:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class TooLarge(Exception):
    """The body is larger than allowed."""


async def read_body(request: Request, limit: int, timeout: float) -> bytes:
    """A request's body.

    Raises:
        TooLarge: it has more than ``limit`` bytes.
        TimeoutError: it was not complete after ``timeout`` seconds.
        ClientDisconnect: the client has gone.
    """
    if int(request.headers.get("content-length") or 0) > limit:  # h11 has checked that it is a number
        raise TooLarge
    body = bytearray()
    async with asyncio.timeout(timeout):
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise TooLarge
    return bytes(body)


async def gone(receive: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    """Return when the client has gone; to be awaited after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, which waits for a request's headers for ever, with a deadline for them."""

    HEADER_TIMEOUT = 15.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop_watching()  # from here to the next request's first byte uvicorn's keep-alive timeout runs

    def _watch(self) -> None:
        waiting = self.conn.their_state is h11.IDLE
        if waiting and self._deadline is None:
            self._deadline = self.loop.call_later(self.HEADER_TIMEOUT, self.transport.close)
        elif not waiting:
            self._stop_watching()

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
