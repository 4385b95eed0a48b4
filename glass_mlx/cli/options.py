"""Options that several commands have, by groups, and what they say."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import mlx.core as mx

from ..core.importance import SIGNALS
from ..evaluation.shape_configs import BITS, SHAPES
from ..hub.names import DEFAULT_MODEL
from ..model.config import LAYER_BUDGETS, GlassConfig
from ..model.quality import QUALITIES
from .values import density, global_weight, memory_size, positive, text


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


def sampler_maker(args: argparse.Namespace) -> Callable[..., Callable]:
    """The function that makes the sampler: mlx-lm's, or its like for verified decoding."""
    from mlx_lm import sample_utils

    from ..decoding import sampling

    make = sampling.make_sampler if args.verify else sample_utils.make_sampler

    def maker(temp: float, top_p: float, *others: Any, **named: Any) -> Callable:
        return make(sampling.effective_temperature(temp, top_p), top_p, *others, **named)

    return maker


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


def glass_choice(args: argparse.Namespace) -> dict[str, Any]:
    """What the options of :func:`add_glass_options` say of how neurons are chosen: the fields of ``GlassConfig``."""
    chosen = {field.name: getattr(args, field.name) for field in fields(GlassConfig)}
    return chosen | ({"density": 1.0} if args.dense else {})


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


def add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
