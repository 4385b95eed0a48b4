"""The app's server: starting it, stopping it, and what there is to say when its port cannot be had."""

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


class Serving:
    """A server that may be running, on this machine only. All methods may be called from any thread.

    Attributes:
        defaults: what requests leave open; read anew for each of them.
        server: the server, since it was started.
    """

    def __init__(self, defaults: dict[str, Any]):
        self.defaults = defaults
        self.server: Server | None = None
        self._trouble: ServerView | None = None
        self._acting = threading.RLock()  # held while it starts or stops

    def start(self, engine: Engine, port: int) -> None:
        """Serve an engine, unless that is done already; a taken port becomes a state."""
        with self._acting:
            if not (self.server and self.server.alive):
                self._trouble = self._listen(engine, port)

    def stop(self) -> bool:
        """Stop serving; returns whether there was something to stop."""
        with self._acting:
            server, self.server, self._trouble = self.server, None, None
            if server is not None:
                server.stop()
            return server is not None

    def start_elsewhere(self, engine: Engine, port: int) -> int | None:
        """Serve on the first port after this one that is free; returns it."""
        with self._acting:
            for other in range(port + 1, min(port + 1 + PORTS_TO_TRY, 65536)):
                self._trouble = self._listen(engine, other)
                if self._trouble is None:
                    return other
        return None

    def view(self, port: int) -> ServerView:
        """How it is; ``port`` is where it would be started."""
        server = self.server
        if self._trouble is not None:
            return self._trouble
        if server is None:
            return ServerView(port=port)
        if not server.alive:
            return ServerView("failed", server.port, words="It ended by itself. The log may say why.")
        return ServerView("running", server.port, server.url)

    def _listen(self, engine: Engine, port: int) -> ServerView | None:
        """Serve on a port; returns what is wrong, if anything."""
        try:
            server = Server(engine, port=port, options=ApiOptions(defaults=self.defaults)).start()
        except GlassError as e:
            logger.warning("the server does not start: %s", e)
            cause = e.__cause__
            if not isinstance(cause, OSError):  # the libraries for serving are missing
                return ServerView("failed", port, words=str(e))
            words = f"The system says: {cause.strerror}."
            if cause.errno == errno.EADDRINUSE:
                words = f"Another {'glass_mlx' if _is_ours(port) else 'program'} on this machine listens there."
            return ServerView("no port", port, words=words)
        self.server = server
        logger.info("serving at %s", server.url)
        return None


def _is_ours(port: int) -> bool:
    """Whether another glass_mlx listens on a port of this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=0.5)
    try:
        connection.request("GET", "/v1/status")
        return "has_ranks" in json.loads(connection.getresponse().read(100_000))
    except (OSError, ValueError, TypeError, http.client.HTTPException):
        return False
    finally:
        connection.close()
