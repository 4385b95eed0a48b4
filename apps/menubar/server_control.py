"""Starts and stops the app's server, and explains why its port cannot be used."""

from __future__ import annotations

import errno
import http.client
import json
import logging
import threading
from typing import Any

from glass_mlx.errors import GlassError
from glass_mlx.serving.app import ApiOptions
from glass_mlx.serving.engine import Engine
from glass_mlx.serving.server import Server

from .state import ServerView

logger = logging.getLogger("glass_mlx")

PORTS_TO_TRY = 50


class ServerControl:
    """A server for this machine only, which may be running or not. All methods may be called from any thread.

    Attributes:
        defaults: fields for requests that leave them out. Changes hold from the next request on.
        server: the running server, or the one that ended unexpectedly.
    """

    def __init__(self, defaults: dict[str, Any]):
        self.defaults = defaults
        self.server: Server | None = None
        self._problem: ServerView | None = None
        self._lock = threading.RLock()  # held while the server starts or stops

    def start(self, engine: Engine, port: int) -> None:
        """Serve an engine, unless it is being served. A port in use becomes a state."""
        with self._lock:
            if not (self.server and self.server.alive):
                self._problem = self._listen(engine, port)

    def stop(self) -> bool:
        """Stop serving. Returns whether there was a server."""
        with self._lock:
            server, self.server, self._problem = self.server, None, None
            if server is not None:
                server.stop()
            return server is not None

    def start_elsewhere(self, engine: Engine, port: int) -> int | None:
        """Serve on the first free port after this one, and return it."""
        with self._lock:
            for other in range(port + 1, min(port + 1 + PORTS_TO_TRY, 65536)):
                self._problem = self._listen(engine, other)
                if self._problem is None:
                    return other
        return None

    def view(self, port: int) -> ServerView:
        """The server's state; ``port`` is where it would be started."""
        server = self.server
        if self._problem is not None:
            return self._problem
        if server is None:
            return ServerView(port=port)
        if not server.alive:
            return ServerView("failed", server.port, detail="It stopped unexpectedly. See the log.")
        return ServerView("running", server.port, server.url)

    def _listen(self, engine: Engine, port: int) -> ServerView | None:
        """Serve on a port. Returns the problem, if there is one."""
        try:
            server = Server(engine, port=port, options=ApiOptions(defaults=self.defaults)).start()
        except GlassError as e:
            logger.warning("the server does not start: %s", e)
            cause = e.__cause__
            if not isinstance(cause, OSError):  # not about the port
                return ServerView("failed", port, detail=str(e))
            detail = f"The system reports: {cause.strerror}."
            if cause.errno == errno.EADDRINUSE:
                program = "glass_mlx" if _is_glass_mlx(port) else "program"
                detail = f"Another {program} on this machine uses it."
            return ServerView("no port", port, detail=detail)
        self.server = server
        logger.info("serving at %s", server.url)
        return None


def _is_glass_mlx(port: int) -> bool:
    """Whether another glass_mlx listens on this port."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=0.5)
    try:
        connection.request("GET", "/v1/status")
        return "has_ranks" in json.loads(connection.getresponse().read(100_000))
    except (OSError, ValueError, TypeError, http.client.HTTPException):
        return False
    finally:
        connection.close()
