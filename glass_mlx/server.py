"""An OpenAI-compatible server.

python -m glass_mlx.server --model qwen3-4b

Within another process: ``Server(Engine()).start()``.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

from .cli import add_glass_options, add_verbose, add_verify_options, memory_size, run, verify_options
from .errors import GlassError
from .model.config import GlassConfig
from .serving.engine import DEFAULT_MODEL, Engine, EngineError, EngineOptions
from .serving.logs import log_to_file

_missing = None
try:
    import uvicorn

    from .serving.app import Api, ApiOptions
    from .serving.security import PatientProtocol
except ModuleNotFoundError as e:
    if e.name not in ("uvicorn", "starlette", "pydantic", "h11"):
        raise
    _missing = e.name


DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8080
KEY_VARIABLE = "GLASS_API_KEY"


class Server:
    """Serves an engine over HTTP on a thread of its own.

    Attributes:
        url: where it is reached.
    """

    def __init__(
        self, engine: Engine, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT, options: ApiOptions | None = None
    ):
        """
        Args:
            engine (Engine): what answers. It is the caller's, and stays open when the server stops.
            host (str): the address to listen on.
            port (int): the port; 0 for any that is free.
            options (ApiOptions, optional): keys, origins, limits.

        Raises:
            GlassError: the libraries for serving are not installed; or other machines could reach the address, and
                there is no key.
        """
        check_installed()
        if not is_loopback(host) and not (options and options.api_key):
            raise GlassError(f"{host} lets other machines in: set an API key, or listen on {DEFAULT_HOST}.")
        self.engine, self.host, self.port = engine, host, port
        self.api = Api(engine, options)
        self._uvicorn: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> Server:
        """Listen; returns when requests are accepted.

        Raises:
            GlassError: the address cannot be listened on.
        """
        listening = _listen(self.host, self.port)
        self.port = listening.getsockname()[1]
        config = uvicorn.Config(
            self.api.app,
            http=PatientProtocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # or clients could call themselves what they like
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
        """Stop listening and cancel what is being answered."""
        if self._uvicorn is None or self._thread is None:
            return
        self._uvicorn.should_exit = True
        for ticket in list(self.api.tickets):
            ticket.cancel()
        self._thread.join(10)


def check_installed() -> None:
    """Serving takes libraries that the package does without otherwise.

    Raises:
        GlassError: they are not installed.
    """
    if _missing is not None:
        raise GlassError(f"the server needs {_missing}: pip install 'glass_mlx[server]'")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    where = f"{host}:{port}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
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
        raise GlassError(f"Cannot listen on {where} ({reason}): choose another with --port or --host.") from e
    return listening


def setup_arg_parser() -> argparse.ArgumentParser:
    """The options of mlx-lm's server, and GLASS's."""
    parser = argparse.ArgumentParser("glass_mlx.server", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model",
        help="what default_model stands for, loaded at once: an alias, a Hub repository, a directory (default: demo, "
        "loaded when asked for)",
    )
    parser.add_argument("--adapter-path", help="adapter weights, fused into the default model")
    parser.add_argument("--host", default=DEFAULT_HOST, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port (default: %(default)s; 0: any free one)")
    parser.add_argument("--trust-remote-code", action="store_true", help="let tokenizers run code of their repository")
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
    parser.add_argument("--chat-template", default="", help="a chat template to use instead of the model's")
    parser.add_argument("--chat-template-args", type=_json_object, default={}, help="JSON object of template arguments")
    for name, kind, default, what in (
        ("--temp", float, 0.0, "sampling temperature"),
        ("--top-p", float, 1.0, "nucleus sampling"),
        ("--top-k", int, 0, "top-k sampling, 0 for none"),
        ("--min-p", float, 0.0, "min-p sampling, 0 for none"),
        ("--max-tokens", int, 512, "length of answers"),
    ):
        parser.add_argument(name, type=kind, default=default, help=f"default {what} (default: %(default)s)")
    parser.add_argument("--prefill-step-size", type=int, default=2048, help="prompt tokens in one call")
    parser.add_argument(
        "--prompt-cache-size", type=int, default=10, help="conversations to keep (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-cache-bytes", type=memory_size, default=2 << 30, help="and their memory (default: 2GiB)"
    )
    parser.add_argument("--kv-bits", type=int, help="quantise the KV cache to so many bits")
    parser.add_argument("--kv-group-size", type=int, default=64, help="in groups of this size")
    parser.add_argument("--quantized-kv-start", type=int, default=5000, help="from this token on")
    serving = parser.add_argument_group("serving")
    serving.add_argument(
        "--idle-timeout", type=float, default=600, metavar="S", help="unload the model after S idle seconds, 0: never"
    )
    serving.add_argument("--max-queue", type=int, default=64, help="requests that may wait; more get status 429")
    serving.add_argument("--max-prompt-tokens", type=int, default=131072, help="longer prompts are refused")
    serving.add_argument(
        "--max-body-bytes", type=memory_size, default=8 << 20, help="larger requests are refused (8MiB)"
    )
    serving.add_argument(
        "--allow-download",
        action="store_true",
        help="download models that are asked for and not in the Hub cache; else only --model is downloaded",
    )
    serving.add_argument(
        "--allow-path", action="append", type=Path, default=[], metavar="DIR", help="serve the models below DIR as well"
    )
    serving.add_argument(
        "--api-key", help=f"what clients must send as a bearer token (default: the environment's {KEY_VARIABLE})"
    )
    serving.add_argument(
        "--cors-origin",
        "--allowed-origins",
        action="append",
        default=[],
        help="web origins, with commas between, whose pages may use the API (default: only the server's own)",
    )
    serving.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="a name of this machine that clients use"
    )
    serving.add_argument("--log-dir", type=Path, help="where the log is kept (default: the platform's directory)")
    serving.add_argument("--log-prompts", action="store_true", help="write prompts and answers to the log")
    add_glass_options(parser, build=False)
    add_verify_options(parser)
    add_verbose(parser)
    return parser


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    args.api_key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    if not is_loopback(args.host) and not args.api_key:
        parser.error(
            f"--host {args.host} lets other machines in: give --api-key or {KEY_VARIABLE}, or listen on {DEFAULT_HOST}"
        )
    for name in ("max_tokens", "max_queue", "max_prompt_tokens", "prefill_step_size", "prompt_cache_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    run(lambda: serve(args), args.verbose)


def serve(args: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    check_installed()
    log = log_to_file(directory=args.log_dir, level=args.log_level)
    engine = Engine(engine_options(args))
    server = Server(engine, args.host, args.port, api_options(args))
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        server.start()
        if args.model is not None:
            _preload(engine)
        print(f"glass_mlx is at {server.url}/v1 (log: {log or 'none'}). Ctrl-C stops it.", flush=True)
        while not stopped.wait(1) and server.alive and engine.alive:
            pass
    finally:
        server.stop()
        engine.close()
    if not stopped.is_set():
        raise GlassError("The server has failed; its log says why.")


def _preload(engine: Engine) -> None:
    try:
        engine.load().result()
    except EngineError as e:
        raise GlassError(str(e.__cause__ or e)) from e


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """What the command line says of the engine."""
    tokenizer = {"chat_template": args.chat_template} if args.chat_template else {}
    return EngineOptions(
        model=args.model or DEFAULT_MODEL,
        config=GlassConfig(
            1.0 if args.dense else args.density, args.global_weight, args.signal, args.refresh, args.layer_budgets
        ),
        verify={} if args.dense else verify_options(args),
        load={
            "tokenizer_config": tokenizer,
            "adapter_path": args.adapter_path,
            "trust_remote_code": args.trust_remote_code,
            "stats": args.stats,
            "stats_repo": args.stats_repo,
            "build": args.build,
            "max_session_memory": args.max_session_memory,
            "low_memory": args.low_memory and not args.dense,
        },
        template_args=args.chat_template_args,
        allow_paths=tuple(args.allow_path),
        allow_download=args.allow_download,
        max_queue=args.max_queue,
        max_prompt_tokens=args.max_prompt_tokens,
        max_cache_bytes=args.prompt_cache_bytes,
        max_conversations=args.prompt_cache_size,
        idle_timeout=args.idle_timeout or None,
        prefill_step_size=args.prefill_step_size,
        kv={k: getattr(args, k) for k in ("kv_bits", "kv_group_size", "quantized_kv_start")} if args.kv_bits else {},
    )


def api_options(args: argparse.Namespace) -> ApiOptions:
    """What the command line says of the server."""
    defaults = {"temperature": args.temp, "top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p}
    return ApiOptions(
        defaults={**defaults, "max_tokens": args.max_tokens},
        api_key=args.api_key,
        hosts=(*args.allowed_host, args.host),
        origins=tuple(origin for text in args.cors_origin for origin in text.split(",")),
        max_body_bytes=args.max_body_bytes,
        log_prompts=args.log_prompts,
    )


if __name__ == "__main__":
    main()
