"""What the command lines share: GLASS's options, and errors as one line.

Nothing that takes long to import is imported before the options are parsed: what is mistyped is said at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any


def _excepthook(kind: type[BaseException], *error: Any) -> None:
    """Python's, but for Ctrl-C in the first moments, before ``run``: it ends the process without a traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, *error)


sys.excepthook = _excepthook

import mlx.core as mx

from ._version import __version__
from .core.importance import SIGNALS
from .errors import GlassError, printable, printable_lines
from .files import write_atomically
from .group import perform
from .hub.names import DEFAULT_MODEL, near_miss
from .model.config import LAYER_BUDGETS, GlassConfig
from .model.quality import QUALITIES
from .serving.logs import OneLineFormatter

if TYPE_CHECKING:
    from rich.table import Table


class _Formatter(argparse.HelpFormatter):
    """Help that ends with the default, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, argparse.SUPPRESS, (), [], "") or default is False or "default" in text:
            return text
        shown = ",".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{text} (default: {'on' if default is True else shown.replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """A command's options. ``--help`` says the defaults, and an error is a line after that of the usage."""

    def __init__(self, prog: str, **kwargs: Any):
        super().__init__(prog=prog, **{"formatter_class": _Formatter, **kwargs})
        if " " not in prog:  # not of a command's command
            self.add_argument("--version", action="version", version=f"glass_mlx {__version__}")

    def error(self, message: str) -> None:
        wrong = re.match(r"unrecognized arguments: (--[^ =]+)", message)
        close = near_miss(wrong[1], self._option_string_actions) if wrong else ""
        usage = f"usage: {self.prog} [options]; {self.prog} --help lists them"
        self.exit(2, f"{usage}\n{self.prog}: error: {printable(message)}{close and f'; {close}'}\n")


def density(text: str) -> float:
    """Parse a density; argparse reports the error."""
    try:
        return GlassConfig(density=float(text)).density
    except (GlassError, ValueError) as e:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1") from e


def global_weight(text: str) -> float | str:
    """Parse a global weight; argparse reports the error."""
    try:
        return GlassConfig(global_weight=text if text == "auto" else float(text)).global_weight
    except (GlassError, ValueError) as e:
        raise argparse.ArgumentTypeError(f'{text!r} is neither "auto" nor in 0 to 1') from e


def list_of(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """What parses several values with commas between them."""
    return lambda text: [parse(part) for part in text.split(",")]


def positive(text: str) -> int:
    """Parse a positive integer; argparse reports the error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """A parser of one of these names; argparse reports the error."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return parse


def text(argument: str) -> str:
    """A text from the command line, in which bytes that are no text of this machine's are replaced."""
    return argument.encode(errors="surrogateescape").decode(errors="replace")


def template_args(text: str) -> dict[str, Any]:
    """Parse arguments of the chat template, a JSON object; argparse reports the error."""
    from .decoding.prompt import check_template_args

    try:
        args = json.loads(text or "{}")
        if not isinstance(args, dict):
            raise ValueError("not an object")
        return check_template_args(args)
    except GlassError as e:
        raise argparse.ArgumentTypeError(str(e).rstrip(".")) from e
    except (ValueError, RecursionError) as e:
        raise argparse.ArgumentTypeError(f"{text[:100]!r} is not a JSON object: {e}") from e


# What the numbers on command lines may be.
_ANY = 2**31 - 1
_RANGES = {
    **dict.fromkeys(("top_p", "min_p", "xtc_probability"), (0, 1)),
    **dict.fromkeys(("temp", "top_k", "idle_timeout", "quantized_kv_start"), (0, _ANY)),
    **dict.fromkeys(("prefill_step_size", "max_kv_size", "min_tokens_to_keep", "kv_bits", "kv_group_size"), (1, _ANY)),
    **dict.fromkeys(("draft_tokens", "num_draft_tokens", "max_queue", "max_prompt_tokens"), (1, _ANY)),
    "prompt_cache_size": (1, _ANY),
    "xtc_threshold": (0, 0.5),
    "seed": (0, 2**64 - 1),
    "port": (0, 65535),
}


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Report a number on the command line that is out of its range, as argparse reports errors."""
    if getattr(args, "max_tokens", 1) < -1 or getattr(args, "max_tokens", 1) == 0:
        parser.error("--max-tokens must be positive, or -1 for no limit")
    for name, (low, high) in _RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:  # nor is it NaN
            parser.error(
                f"--{name.replace('_', '-')} must be {f'at least {low}' if high == _ANY else f'{low} to {high}'}"
            )


# Options that have no effect without another one.
_NEEDS = {"kv_group_size": "kv_bits", "quantized_kv_start": "kv_bits", "draft_tokens": "verify"}
_NOT_WITH_DENSE = ("density", "quality", "verify", "low_memory")


def warn_of_idle_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Log a warning for each option that was given and has no effect besides the others."""

    def given(name: str) -> bool:
        return getattr(args, name, None) not in (None, parser.get_default(name))

    def option(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    idle = [(name, f"without {option(needed)}") for name, needed in _NEEDS.items() if not given(needed)]
    if getattr(args, "dense", False):
        idle += [(name, "with --dense") for name in _NOT_WITH_DENSE]
    for name, why in idle:
        if given(name):
            logging.getLogger("glass_mlx").warning("%s has no effect %s", option(name), why)


def adapter_directory(text: str) -> str:
    """Parse the path of an adapter; argparse reports the error."""
    missing = [name for name in ("adapter_config.json", "adapters.safetensors") if not Path(text, name).is_file()]
    if missing:
        raise argparse.ArgumentTypeError(f"{text!r} has no {missing[0]}: give the directory of an adapter")
    return text


def memory_size(text: str) -> int:
    """Parse a size in bytes, such as 500MB or 2GB; argparse reports the error."""
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)(i?)B?", text.strip(), re.IGNORECASE)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 2GB")
    thousand = 1024 if match[3] else 1000
    return int(float(match[1]) * thousand ** " kmgt".index(match[2].lower() or " "))


def glass_choice(args: argparse.Namespace) -> dict[str, Any]:
    """What the options of :func:`add_glass_options` say of how neurons are chosen: the fields of ``GlassConfig``."""
    chosen = {field.name: getattr(args, field.name) for field in fields(GlassConfig)}
    return chosen | ({"density": 1.0} if args.dense else {})


def add_glass_options(parser: argparse.ArgumentParser, build: bool) -> None:
    """Add GLASS's options; ``build`` is whether ranks are measured at first use unless told otherwise."""
    group = parser.add_argument_group("GLASS")
    group.add_argument(
        "--density",
        type=density,
        default=GlassConfig.density,
        help=f"share of the FFN neurons to decode with, in (0, 1] (default: {GlassConfig.density})",
    )
    group.add_argument(
        "--quality",
        choices=QUALITIES,
        help="instead of --density: the one that costs about what quantising to 8, 4 or 3 bits does",
    )
    group.add_argument(
        "--global-weight",
        type=global_weight,
        default=GlassConfig.global_weight,
        metavar="WEIGHT",
        help="fuse ranks with this weight of the global ranks, 0 to 1; auto: rank by expected energy (default: auto)",
    )
    group.add_argument(
        "--layer-budgets",
        choices=LAYER_BUDGETS,
        default=GlassConfig.layer_budgets,
        help="give layers their neurons by how sensitive the model is to each, or all the same share",
    )
    group.add_argument(
        "--compensation",
        action=argparse.BooleanOptionalAction,
        default=GlassConfig.compensation,
        help="predict what the dropped neurons would add; without it they add nothing (default: on)",
    )
    group.add_argument("--signal", choices=SIGNALS, default=GlassConfig.signal, help="what neurons are ranked by")
    group.add_argument("--refresh", help=argparse.SUPPRESS)  # retired (model/config.py)
    group.add_argument("--stats", metavar="FILE", help="global ranks (default: looked up)")
    group.add_argument("--stats-repo", metavar="REPO", help="Hub repository of global ranks, owner/name[@revision]")
    group.add_argument(
        "--build",
        action=argparse.BooleanOptionalAction,
        default=build,
        help="where a model has no global ranks yet, measure them first (default: %(default)s)",
    )
    group.add_argument(
        "--max-session-memory",
        type=memory_size,
        metavar="SIZE",
        help="memory for the compact weights of all conversations, such as 2GB; idle ones give theirs up "
        "(default: half of what the model leaves)",
    )
    group.add_argument(
        "--low-memory",
        action=argparse.BooleanOptionalAction,
        help="decode without the dense FFN weights; each prompt reads them again (default: where memory is short)",
    )
    group.add_argument("--dense", action="store_true", help="decode with all neurons, as mlx-lm does")


def add_verify_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of verified decoding."""
    group = parser.add_argument_group("verified decoding")
    group.add_argument(
        "--verify",
        action="store_true",
        help="only draft sparsely, and check with the dense model: its answer, faster where drafts are mostly right",
    )
    group.add_argument(
        "--draft-tokens", type=int, metavar="K", help="draft always so many tokens (default: as many as pay)"
    )


def verify_options(args: argparse.Namespace) -> dict:
    """What they say, for ``stream_generate``."""
    return {"verify": args.verify, "draft_tokens": args.draft_tokens}


def sampler_maker(args: argparse.Namespace) -> Callable[..., Callable]:
    """The function that makes the sampler: mlx-lm's, or its like for verified decoding."""
    from mlx_lm import sample_utils

    from .decoding import sampling

    make = sampling.make_sampler if args.verify else sample_utils.make_sampler

    def maker(temp: float, top_p: float, *others: Any, **named: Any) -> Callable:
        return make(sampling.effective_temperature(temp, top_p), top_p, *others, **named)

    return maker


def add_generation_options(parser: argparse.ArgumentParser, max_tokens: int, seed: int | None) -> None:
    """Add those of mlx-lm's options that its chat and its generate share; arguments: what the defaults are."""
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="an alias, a Hub repository or a directory")
    add("--trust-remote-code", action="store_true", help="let tokenizers run code of their repository")
    add("--adapter-path", metavar="DIR", help="adapter weights to fuse into the model")
    add("--system-prompt", type=text, metavar="TEXT", help="what the model is told before the first message")
    add("--max-tokens", "-m", type=int, default=max_tokens, metavar="N", help="longest answer in tokens; -1: no limit")
    add("--temp", type=float, default=0.0, metavar="T", help="sampling temperature; 0: always the likeliest token")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens of this probability")
    add("--xtc-probability", type=float, default=0.0, metavar="P", help="how often to exclude the likeliest tokens")
    add("--xtc-threshold", type=float, default=0.1, metavar="P", help="of those, the ones above this probability")
    add("--seed", type=int, default=seed, metavar="N", help="of the sampling's random numbers")
    add("--max-kv-size", type=int, metavar="N", help="remember only so many tokens (default: all)")
    add("--prefill-step-size", type=int, default=2048, metavar="N", help="prompt tokens to read in one call")


def add_float32(parser: argparse.ArgumentParser) -> None:
    """Add the option to compute in float32."""
    parser.add_argument(
        "--float32",
        action=argparse.BooleanOptionalAction,
        default=mx.default_device() == mx.Device(mx.cpu),
        help="compute in float32, much faster than 16 bits on a CPU (default: on a CPU)",
    )


def add_model_or_shape(parser: argparse.ArgumentParser) -> None:
    """Add the options for what to measure: a model, or random weights of a model's shape."""
    from .evaluation.shapes import BITS, SHAPES

    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help=f"directory, Hub repository or alias (default: {DEFAULT_MODEL})")
    what.add_argument(
        "--shape",
        choices=SHAPES,
        metavar="MODEL",
        help=f"random weights of this model's shape, for speed only, without a download: {', '.join(SHAPES)}",
    )
    parser.add_argument("--layers", type=positive, help="with --shape: number of layers, for small machines")
    parser.add_argument("--bits", type=int, choices=BITS, default=4, help="with --shape: of a weight (default: 4)")


def print_result(result: dict[str, Any], table: Callable[[dict[str, Any]], str], json_file: str | None) -> None:
    """Print a result as a table and write it to a JSON file if one is given; ``-`` prints JSON and nothing else."""
    if json_file == "-":
        print(json.dumps(result))
        return
    if json_file is not None:
        write_atomically(json_file, lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
    say(table(result))


def print_table(table: Table) -> None:
    """Print a table, no wider than the terminal; files and pipes have room for whole names."""
    from rich.console import Console

    for column in table.columns:
        column.overflow = "fold"  # names are seen in whole
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def say(text: object) -> None:
    """Print what may have come out of anyone's file or request."""
    print(printable_lines(str(text)), flush=True)


def add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")


@contextlib.contextmanager
def _quiet_interrupts() -> Iterator[None]:
    """Ctrl-C ends the process without a word, whatever it is at: code that is being imported may not pass it on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run(command: Callable[[], None], verbose: bool = False) -> None:
    """Run a command line's work: a GlassError, or an error of MLX's backend, ends it with one line and exit code 1."""
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(OneLineFormatter("[%(levelname)s] %(message)s"))
    logging.basicConfig(handlers=[to_stderr])
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show, or has not sent as text, is replaced
            stream.reconfigure(errors="replace")
    with _quiet_interrupts():
        from . import loading  # noqa: F401  and with it mlx-lm, which takes seconds
    try:
        perform(command)
    except (GlassError, RuntimeError) as e:
        if verbose:
            raise
        if isinstance(e, GlassError):
            sys.exit(f"error: {e}")
        reason = printable((str(e).splitlines() or [type(e).__name__])[0])  # what MLX's backend cannot do
        sys.exit(f"error: MLX: {reason}. See what works here with: python -m glass_mlx doctor")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
