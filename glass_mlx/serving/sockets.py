"""Addresses to listen on, and origins of web pages."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from ..errors import GlassError

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8080


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_origin(text: str) -> str:
    """The origin of a web page as browsers send it: ``https://my.app``, ``http://localhost:3000``, or ``*`` for any.

    Raises:
        GlassError: it is none.
    """
    origin = text.strip().rstrip("/").lower()
    if origin == "*":
        return origin
    try:
        parts = urlsplit(origin)
        is_origin = origin == f"{parts.scheme}://{parts.netloc}" and bool(parts.hostname) and "@" not in parts.netloc
        is_origin = is_origin and origin.isascii() and origin.isprintable() and not set(origin) & set(" *,\\")
        default = {"http": 80, "https": 443}.get(parts.scheme)
        if is_origin and parts.port != 0:
            return origin.removesuffix(f":{default}")  # browsers leave it out
    except ValueError:  # a port or an address that is none
        pass
    raise GlassError(f"{text!r} is not a web origin: give one such as https://my.app or http://localhost:3000, or *.")


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address; port 0 takes any free port.

    Raises:
        GlassError: the address is taken, not allowed, or not of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = found[0]
        listening = socket.socket(family, kind)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(128)
        except OSError:
            listening.close()
            raise
    except (OSError, OverflowError, UnicodeError) as e:
        reason = getattr(e, "strerror", None) or str(e)
        raise GlassError(f"Cannot listen on {host}:{port} ({reason}). Choose another with --port or --host.") from e
    return listening
