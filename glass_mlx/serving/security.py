"""Keeps out web pages of other origins, rebound DNS names, clients without the key, and slow or endless requests; and
lets in the pages of origins that are allowed."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import BodyTimeout, BodyTooLarge, Forbidden, InvalidKey
from .fields import WARNING_HEADER
from .http_errors import error_response

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# The page must load before it can ask for a key. The others reveal nothing about anyone.
_PATHS_WITHOUT_KEY = ("/", "/health", "/openapi.json", "/favicon.ico")


class SharingMiddleware(CORSMiddleware):
    """ASGI middleware that lets pages of allowed origins read every answer, refusals too, and send any header.

    Clients send many: OpenAI's libraries alone have ten of their own. What is not allowed goes on, to be refused.
    """

    def __init__(self, app: Any, origins: Iterable[str] = ()):
        super().__init__(
            app,
            allow_origins=tuple(origins),
            allow_methods=("*",),
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=("Retry-After", WARNING_HEADER),
        )

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        if origin is not None and self.is_allowed_origin(origin):
            await super().__call__(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class SecurityMiddleware:
    """ASGI middleware that checks Host, Origin and the API key, and adds security headers.

    The Host must be an IP address, ``localhost`` or one of ``hosts``. A web page whose own domain name was made to
    point to this machine (DNS rebinding) still sends that name. Browsers also send an Origin, which must be this server
    or one of ``origins`` (``*`` allows all), and with requests that have none (pictures, scripts, links) how the asking
    page's site relates to this server. From another site only a link to the page is followed.
    """

    def __init__(self, app: Any, api_key: str | None = None, hosts: Iterable[str] = (), origins: Iterable[str] = ()):
        self.app, self.api_key = app, api_key
        self.hosts = {"localhost", *(host.lower() for host in hosts)}
        self.origins = set(origins)

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            self._check(scope)
        except (Forbidden, InvalidKey) as e:
            await error_response(e)(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    def _check(self, scope: dict[str, Any]) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_allowed_host(host):
            raise Forbidden("This Host is not allowed. Allow it with --allowed-host.", "host_not_allowed")
        if not self._is_allowed_page(headers, {*self.origins, f"http://{host}", f"https://{host}"}, path):
            raise Forbidden("This Origin is not allowed. Allow it with --cors-origin.", "origin_not_allowed")
        is_preflight = scope["method"] == "OPTIONS" and origin is not None  # browsers send it without the key
        if path in _PATHS_WITHOUT_KEY or path.startswith("/static/") or is_preflight:
            return
        if not self._has_key(headers.get("authorization", "")):
            raise InvalidKey("Send the server's API key as a bearer token.")

    def _is_allowed_page(self, headers: Headers, origins: set[str], path: str) -> bool:
        """Whether a request comes from a page of one of these origins, or from no page."""
        if "*" in origins:
            return True
        if (origin := headers.get("origin")) is not None:
            return origin in origins
        if headers.get("sec-fetch-site", "none") in ("same-origin", "none"):
            return True
        follows_link = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
        return follows_link and path == "/"

    def _has_key(self, authorization: str) -> bool:
        if self.api_key is None:
            return True
        scheme, _, key = authorization.partition(" ")
        # Header bytes come decoded as Latin-1; clients send characters beyond ASCII as UTF-8 or as Latin-1.
        expected = [self.api_key.encode().decode("latin-1"), self.api_key]
        sent = key.strip().encode()
        return scheme.lower() == "bearer" and any(hmac.compare_digest(sent, known.encode()) for known in expected)

    def _is_allowed_host(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self.hosts:
                return True
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


async def read_body(request: Request, limit: int, timeout: float) -> bytes:
    """Read the body of a request.

    Args:
        request (Request): the request.
        limit (int): bytes that the body may have.
        timeout (float): seconds that it may take to arrive.

    Raises:
        BodyTooLarge, BodyTimeout: the body exceeds a limit.
        ClientDisconnect: the client has disconnected.
    """
    too_large = BodyTooLarge(f"The body is larger than {limit:,} bytes.")
    if int(request.headers.get("content-length") or 0) > limit:  # h11 has checked that it is a number
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError as e:
        raise BodyTimeout("The body did not arrive in time.") from e
    return bytes(body)


class HeaderTimeoutProtocol(H11Protocol):
    """uvicorn's protocol with a deadline for a request's headers, for which uvicorn itself waits for ever."""

    HEADER_TIMEOUT = 15.0  # seconds
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._update_deadline()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._cancel_deadline()  # from here to the next request's first byte uvicorn's keep-alive timeout runs

    def _update_deadline(self) -> None:
        headers_are_missing = self.conn.their_state is h11.IDLE
        if not headers_are_missing:
            self._cancel_deadline()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.HEADER_TIMEOUT, self.transport.close)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
