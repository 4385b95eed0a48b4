"""An OpenAI-compatible server.

python -m glass_mlx.server --model qwen3-4b
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from .cli import checks
from .cli.options import add_glass_options, add_trust, add_verbose, add_verify_options, glass_choice, verify_options
from .cli.output import say
from .cli.parser import Parser
from .cli.running import run
from .cli.values import adapter_directory, list_of, memory_size, template_args
from .errors import GlassError
from .group import PIPELINE, give_up, rank, size, together
from .hub.names import DEFAULT_MODEL
from .model.config import GlassConfig
from .serving.logs import log_to_file
from .serving.sockets import DEFAULT_HOST, DEFAULT_PORT, is_loopback, parse_origin

if TYPE_CHECKING:
    from .serving.app import ApiOptions
    from .serving.engine import Engine, EngineOptions

KEY_VARIABLE = "GLASS_API_KEY"

IDLE = (
    *checks.GLASS,
    checks.DENSE,
    checks.Idle("verify draft_tokens", beside="dense"),
    checks.Idle(checks.CHOICE, beside="dense", until="a request sets its density"),
    checks.Idle("draft_tokens", without="verify", until="a request asks to verify"),
    checks.KV,
    checks.Idle("log_prompts", beside="log_level=WARNING log_level=ERROR log_level=CRITICAL"),
)

# Options of mlx-lm's server, and why this one has them not.
NOT_SERVED = {
    "--draft-model": "there are no draft models; --verify drafts with the model itself",
    "--num-draft-tokens": "there are no draft models; see --verify and --draft-tokens",
    "--use-default-chat-template": "transformers no longer has default templates; give one with --chat-template",
    "--decode-concurrency": "answers are given one at a time; clients take turns",
    "--prompt-concurrency": "prompts are read one at a time; clients take turns",
}


def setup_arg_parser() -> argparse.ArgumentParser:
    """The options of mlx-lm's server, and GLASS's."""
    parser = Parser("glass_mlx.server", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model",
        help="the model that default_model stands for, loaded at the start: an alias, a Hub repository or a directory "
        "(default: demo, loaded at the first request)",
    )
    parser.add_argument("--adapter-path", type=adapter_directory, help="adapter weights to fuse into the default model")
    parser.add_argument("--host", default=DEFAULT_HOST, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port; 0: any free one (default: %(default)s)")
    add_trust(parser)
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
    parser.add_argument("--chat-template", default="", help="chat template to use instead of the model's own")
    parser.add_argument(
        "--chat-template-args", type=template_args, default={}, help="arguments of the chat template, as a JSON object"
    )
    for name, kind, default, what in (
        ("--temp", float, 0.0, "sampling temperature"),
        ("--top-p", float, 1.0, "sample from the likeliest tokens that add up to this probability"),
        ("--top-k", int, 0, "sample from this many of the likeliest tokens; 0: all"),
        ("--min-p", float, 0.0, "drop tokens less likely than this share of the likeliest; 0: off"),
        ("--max-tokens", int, 512, "maximum length of an answer in tokens"),
    ):
        parser.add_argument(
            name, type=kind, default=default, help=f"{what}; requests can set their own (default: %(default)s)"
        )
    _add_cache_options(parser)
    _add_serving_options(parser)
    add_glass_options(parser, build=False)
    add_verify_options(parser)
    parser.add_argument("--pipeline", action="store_true", help=PIPELINE)
    add_verbose(parser)
    for option, reason in NOT_SERVED.items():
        parser.add_argument(option, nargs="?", action=_Refuse, const=reason, help=argparse.SUPPRESS)
    return parser


class _Refuse(argparse.Action):
    """An option that the server knows and does not have."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.error(f"{self.option_strings[0]}: {self.const}")


def _add_cache_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefill-step-size", type=int, default=512, help="read prompts in calls of this many tokens")
    parser.add_argument(
        "--prompt-cache-size", type=int, default=10, help="number of conversations to keep (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-cache-bytes",
        type=memory_size,
        help="memory for kept conversations (default: a quarter of what the model leaves free)",
    )
    parser.add_argument("--kv-bits", type=int, help="quantise the KV cache to this many bits")
    parser.add_argument("--kv-group-size", type=int, default=64, help="with --kv-bits: group size")
    parser.add_argument(
        "--quantized-kv-start", type=int, default=5000, help="with --kv-bits: quantise from this token on"
    )


def _add_serving_options(parser: argparse.ArgumentParser) -> None:
    serving = parser.add_argument_group("serving")
    serving.add_argument(
        "--idle-timeout", type=float, default=600, metavar="S", help="unload the model after S idle seconds; 0: never"
    )
    serving.add_argument(
        "--max-queue", type=int, default=64, help="number of requests that may wait; further ones get status 429"
    )
    serving.add_argument("--max-prompt-tokens", type=int, default=131072, help="maximum length of a prompt in tokens")
    serving.add_argument(
        "--max-body-bytes", type=memory_size, default=8 << 20, help="maximum size of a request (default: 8MiB)"
    )
    serving.add_argument(
        "--allow-download",
        action="store_true",
        help="download requested models that are not in the Hub cache (default: only --model is downloaded)",
    )
    serving.add_argument(
        "--allow-path",
        action="append",
        type=Path,
        default=[],
        metavar="DIR",
        help="also serve the models in DIR; can be repeated",
    )
    serving.add_argument(
        "--api-key", help=f"bearer token that clients must send (default: the environment's {KEY_VARIABLE})"
    )
    serving.add_argument(
        "--cors-origin",
        "--allowed-origins",
        type=list_of(_origin),
        action="append",
        default=[],
        metavar="ORIGINS",
        help="web origins whose pages may use the API, separated by commas; *: all (default: only the server's own)",
    )
    serving.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name of this machine that clients may use",
    )
    serving.add_argument(
        "--log-dir", type=Path, help="directory of the log file (default: the platform's log directory)"
    )
    serving.add_argument("--log-prompts", action="store_true", help="write prompts and answers to the log")


def _origin(text: str) -> str:
    try:
        return parse_origin(text)
    except GlassError as e:
        raise argparse.ArgumentTypeError(str(e).rstrip(".")) from e


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    args.api_key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    if not is_loopback(args.host) and not args.api_key:
        parser.error(
            f"--host {args.host} lets other machines in: give --api-key or {KEY_VARIABLE}, or listen on {DEFAULT_HOST}"
        )
    if args.max_tokens < 1:
        parser.error("--max-tokens must be at least 1")
    checks.check_numbers(parser, args)
    checks.check_together(parser, args, IDLE)
    run(together(lambda: serve(args)), args.verbose)


def serve(args: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM. Under ``mlx.launch`` the first process does, and the others do what it says."""
    try:
        from .serving.operations import end, follow
        from .serving.server import Server  # noqa: F401  only to see that it can be
    except ModuleNotFoundError as e:
        if e.name not in ("uvicorn", "starlette", "pydantic", "h11"):
            raise
        raise GlassError(f"the server needs {e.name}: pip install 'glass_mlx[server]'") from e
    from .terminal.loading import check_group

    check_group(args)
    if rank() > 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to all processes; the first one says what next
        follow(engine_options(args))
        return
    try:
        _serve(args)
    except GlassError:
        give_up()
        raise
    end()


def _serve(args: argparse.Namespace) -> None:
    from .serving.engine import Engine
    from .serving.server import Server

    log = log_to_file(directory=args.log_dir, level=args.log_level)
    engine = Engine(engine_options(args))
    server = Server(engine, args.host, args.port, api_options(args))
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        server.start()
        if args.model is not None or args.adapter_path or args.kv_bits:  # these may not fit the model
            _preload(engine)
        say(f"glass_mlx is at {server.url}/v1 (log: {log or 'none'}). Ctrl-C stops it.")
        while not stopped.wait(1) and server.alive and engine.alive:
            pass
    finally:
        server.stop()
        engine.close(10 if size() == 1 else None)  # others would be left in the middle of an operation
    if not stopped.is_set():
        raise GlassError("The server has stopped unexpectedly. See its log.")


def _preload(engine: Engine) -> None:
    from .serving.errors import RequestError

    try:
        engine.load().result()
    except RequestError as e:
        raise GlassError(str(e.__cause__ or e)) from e


def engine_options(args: argparse.Namespace) -> EngineOptions:
    """The engine's options of a command line."""
    from .serving.engine_options import EngineOptions

    tokenizer = {"chat_template": args.chat_template} if args.chat_template else {}
    return EngineOptions(
        model=args.model or DEFAULT_MODEL,
        config=GlassConfig(**glass_choice(args)),
        verify={} if args.dense else verify_options(args),
        load={
            "quality": None if args.dense else args.quality,
            "tokenizer_config": tokenizer,
            "adapter_path": args.adapter_path,
            "trust_remote_code": args.trust_remote_code,
            "stats": args.stats,
            "stats_repo": args.stats_repo,
            "build": args.build,
            "max_session_memory": args.max_session_memory,
            "low_memory": False if args.dense else args.low_memory,
        },
        pipeline=args.pipeline,
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
    """The server's options of a command line."""
    from .serving.app import ApiOptions

    defaults = {"temperature": args.temp, "top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p}
    return ApiOptions(
        defaults={**defaults, "max_tokens": args.max_tokens},
        api_key=args.api_key,
        hosts=(*args.allowed_host, args.host),
        origins=tuple(origin for origins in args.cors_origin for origin in origins),
        max_body_bytes=args.max_body_bytes,
        log_prompts=args.log_prompts,
    )


if __name__ == "__main__":
    main()
