"""An HTTP server on a thread of its own, for the command line, the menu-bar app, or any other process.

server = Server(Engine()).start()
print(server.url)
server.stop()
"""

from __future__ import annotations

import threading

import uvicorn

from ..errors import GlassError
from .app import Api, ApiOptions
from .engine import Engine
from .security import HeaderTimeoutProtocol
from .sockets import DEFAULT_HOST, DEFAULT_PORT, is_loopback, listen


class Server:
    """Serves an engine over HTTP."""

    def __init__(
        self, engine: Engine, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT, options: ApiOptions | None = None
    ):
        """
        Args:
            engine (Engine): completes the requests. It belongs to the caller, and stays open when the server stops.
            host (str): the address to listen on.
            port (int): the port; 0 for any free one.
            options (ApiOptions, optional): keys, origins, limits.

        Raises:
            GlassError: other machines could reach the address, and no API key is set.
        """
        if not is_loopback(host) and not (options and options.api_key):
            raise GlassError(f"{host} lets other machines in. Set an API key, or listen on {DEFAULT_HOST}.")
        self.engine, self.host, self.port = engine, host, port
        self.api = Api(engine, options)
        self._uvicorn: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where this machine reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> Server:
        """Listen. Returns when requests are accepted.

        Raises:
            GlassError: the address cannot be used.
        """
        listening = listen(self.host, self.port)
        self.port = listening.getsockname()[1]
        config = uvicorn.Config(
            self.api.app,
            http=HeaderTimeoutProtocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # or clients could choose the address that the queue knows them by
            timeout_graceful_shutdown=3,
        )
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._uvicorn.run, args=([listening],), name="glass_mlx server", daemon=True
        )
        self._thread.start()
        while not self._uvicorn.started and self._thread.is_alive():
            self._thread.join(0.01)
        return self

    def stop(self) -> None:
        """Stop listening, and cancel all completions."""
        if self._uvicorn is None or self._thread is None:
            return
        self._uvicorn.should_exit = True
        for pending in list(self.api.pending):
            pending.cancel()
        self._thread.join(10)
