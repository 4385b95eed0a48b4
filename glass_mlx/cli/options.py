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
from ..model.config import EXPERTS, LAYER_BUDGETS, GlassConfig
from ..model.quality import QUALITIES
from .values import density, global_weight, list_of, memory_size, positive, text


def add_generation_options(parser: argparse.ArgumentParser, max_tokens: int, seed: int | None) -> None:
    """Add those of mlx-lm's options that its chat and its generate share; arguments: what the defaults are."""
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="an alias, a Hub repository or a directory")
    add_trust(parser)
    add("--adapter-path", metavar="DIR", help="adapter weights to fuse into the model")
    add("--system-prompt", type=text, metavar="TEXT", help="instructions to the model, before the first message")
    add(
        "--max-tokens",
        "-m",
        type=int,
        default=max_tokens,
        metavar="N",
        help="maximum length of an answer in tokens; -1: no limit",
    )
    add("--temp", type=float, default=0.0, metavar="T", help="sampling temperature; 0: always take the likeliest token")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens that add up to this probability",
    )
    add(
        "--xtc-probability",
        type=float,
        default=0.0,
        metavar="P",
        help="XTC sampling: how often to exclude the likeliest tokens",
    )
    add(
        "--xtc-threshold",
        type=float,
        default=0.1,
        metavar="P",
        help="XTC sampling: exclude those above this probability, except for the last",
    )
    add("--seed", type=int, default=seed, metavar="N", help="seed of the random numbers")
    add("--max-kv-size", type=int, metavar="N", help="remember only the last N tokens (default: all)")
    add("--prefill-step-size", type=int, default=2048, metavar="N", help="read the prompt in calls of N tokens")


def sampler_maker(args: argparse.Namespace) -> Callable[..., Callable]:
    """The function that makes the sampler: mlx-lm's, or its like for verified decoding."""
    from mlx_lm import sample_utils

    from ..decoding import sampling

    make = sampling.make_sampler if args.verify else sample_utils.make_sampler

    def maker(temp: float, top_p: float, *others: Any, **named: Any) -> Callable:
        return make(sampling.effective_temperature(temp, top_p), top_p, *others, **named)

    return maker


# Options of the same names as fields of GlassConfig, which are their defaults.
_CHOICES: dict[str, dict[str, Any]] = {
    "global_weight": {
        "type": global_weight,
        "metavar": "WEIGHT",
        "help": "weight of the global ranks in rank fusion, 0 to 1; auto: rank by expected energy (default: auto)",
    },
    "layer_budgets": {
        "choices": LAYER_BUDGETS,
        "help": "measured: more neurons for the layers that matter more; uniform: the same share of every layer",
    },
    "signal": {"choices": SIGNALS, "help": "what to rank neurons by"},
    "experts": {
        "choices": EXPERTS,
        "help": "sparse: the density holds for routed experts too; dense: they keep all neurons (default: sparse)",
    },
}


def add_choice_options(parser: argparse._ActionsContainer, *names: str) -> None:
    """Add some of the options that say how neurons are chosen, each of one value."""
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", default=getattr(GlassConfig, name), **_CHOICES[name])


def add_densities(parser: argparse.ArgumentParser) -> None:
    """Add the option for several densities to compare."""
    parser.add_argument(
        "--density",
        type=list_of(density),
        default=[0.3, 0.5, 0.7],
        metavar="X[,X...]",
        help="shares of the neurons to keep",
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let tokenizers run code from their repository"
    )


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
        help="instead of --density: the density that costs about as much as quantising to 8, 4 or 3 bits",
    )
    add_choice_options(group, "global_weight", "layer_budgets", "signal", "experts")
    group.add_argument(
        "--compensation",
        action=argparse.BooleanOptionalAction,
        default=GlassConfig.compensation,
        help="predict what the dropped neurons would add, instead of nothing (default: on)",
    )
    group.add_argument("--refresh", help=argparse.SUPPRESS)  # retired (model/config.py)
    group.add_argument("--stats", metavar="FILE", help="file of global ranks (default: looked up)")
    group.add_argument("--stats-repo", metavar="REPO", help="Hub repository with global ranks: owner/name[@revision]")
    group.add_argument(
        "--build",
        action=argparse.BooleanOptionalAction,
        default=build,
        help=f"measure the global ranks first if the model has none (default: {'on' if build else 'off'})",
    )
    group.add_argument(
        "--max-session-memory",
        type=memory_size,
        metavar="SIZE",
        help="memory for the compact weights of all conversations, such as 2GB; idle conversations give up theirs "
        "(default: half of what the model leaves free)",
    )
    group.add_argument(
        "--low-memory",
        action=argparse.BooleanOptionalAction,
        help="keep no dense FFN weights while decoding: each prompt reads them from disk (default: if memory is short)",
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
        help="draft with the sparse model, check with the dense one: the dense answer, faster if most drafts are right",
    )
    group.add_argument(
        "--draft-tokens", type=int, metavar="K", help="always draft K tokens (default: as many as pay off)"
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
        help="compute in float32, which is much faster than 16 bits on a CPU (default: on a CPU)",
    )


def add_model_or_shape(parser: argparse.ArgumentParser) -> None:
    """Add the options for what to measure: a model, or random weights of a model's shape."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help=f"an alias, a Hub repository or a directory (default: {DEFAULT_MODEL})")
    what.add_argument(
        "--shape",
        choices=SHAPES,
        metavar="MODEL",
        help=f"random weights in this model's shape, to measure speed without a download: {', '.join(SHAPES)}",
    )
    parser.add_argument("--layers", type=positive, help="with --shape: use only this many layers, for small machines")
    parser.add_argument("--bits", type=int, choices=BITS, default=4, help="with --shape: bits per weight (default: 4)")


def add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verbose", action="store_true", help="show the tracebacks of errors")
