"""What the command lines share: GLASS's options, and errors as one line."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import sample_utils

from .core.importance import SIGNALS
from .decoding import sampling
from .decoding.prompt import check_template_args
from .errors import GlassError, printable, printable_lines
from .files import write_atomically
from .model.config import LAYER_BUDGETS, GlassConfig
from .model.quality import QUALITIES
from .serving.logs import OneLineFormatter


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


def template_args(text: str) -> dict[str, Any]:
    """Parse arguments of the chat template, a JSON object; argparse reports the error."""
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
    "port": (0, 65535),
}


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Report a number on the command line that is out of its range, as argparse reports errors."""
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
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None:
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
    make = sampling.make_sampler if args.verify else sample_utils.make_sampler

    def maker(temp: float, top_p: float, *others: Any, **named: Any) -> Callable:
        return make(sampling.effective_temperature(temp, top_p), top_p, *others, **named)

    return maker


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
    from .loading import DEFAULT_MODEL

    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help=f"directory, Hub repository or alias (default: {DEFAULT_MODEL})")
    what.add_argument("--shape", choices=SHAPES, help="random weights of this model's shape: speed only, no download")
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


def say(text: object) -> None:
    """Print what may have come out of anyone's file or request."""
    print(printable_lines(str(text)), flush=True)


def add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")


def run(command: Callable[[], None], verbose: bool = False) -> None:
    """Run a command line's work: a GlassError, or an error of MLX's backend, ends it with one line and exit code 1."""
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(OneLineFormatter("[%(levelname)s] %(message)s"))
    logging.basicConfig(handlers=[to_stderr])
    try:
        command()
    except GlassError as e:
        if verbose:
            raise
        sys.exit(f"error: {e}")
    except RuntimeError as e:  # what MLX's backend cannot do
        if verbose:
            raise
        reason = printable((str(e).splitlines() or [type(e).__name__])[0])
        sys.exit(f"error: MLX: {reason}. See what works here with: python -m glass_mlx doctor")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
