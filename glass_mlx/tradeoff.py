"""Speed against fidelity: the dense model, GLASS, verified decoding, GRIFFIN.

    python -m glass_mlx.tradeoff --model demo --density 0.3,0.5,0.7 --plot tradeoff.png
    python -m glass_mlx.tradeoff --ways glass --global-weight 0.5 --layer-budgets uniform  # rank fusion
    python -m glass_mlx.tradeoff --shape mistral-7b --layers 2 --bits 4 --acceptance 0.7,0.9

Every decoder (``--ways``) answers the same prompts, in turn with the dense model and in one process. *Speed* is in
tokens per second from the first token on, with selection and slicing. An end token does not end an answer, so that all
have the same length.

*Strays* is the disagreement rate, a measure of fidelity that fits all decoders: the share of tokens in a decoder's own
answer that the dense model, given the same text so far and the same random numbers, would not have chosen. The dense
model has none, and neither has verified decoding, up to rounding. The random numbers are Gumbel noise, so equal
distributions never disagree and close ones rarely do; at temperature 0, the rate is the share of tokens that are not
the dense model's most likely ones. *KL* is KL(dense || decoder) in nats per token, with the dense model's continuation
fed to a decoder as in ``evaluate``. *Own PPL* is the perplexity of a decoder's answer under the dense model.

Random weights (``--shape``) run at true speed but generate nothing meaningful: there is no fidelity, and
``--acceptance`` is the simulated share of drafted tokens that verification accepts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .cli import checks
from .cli.options import (
    add_choice_options,
    add_densities,
    add_float32,
    add_model_or_shape,
    add_trust,
    add_verbose,
)
from .cli.output import print_result
from .cli.parser import Parser
from .cli.running import run
from .cli.values import list_of, one_of
from .evaluation.names import DECODERS, DEFAULT_PROMPTS, PROMPT_SETS
from .evaluation.shape_configs import SHAPES
from .evaluation.tables import text_table
from .hub.names import DEFAULT_MODEL

if TYPE_CHECKING:
    from .evaluation.decoders import Decoders
    from .model.glass_model import GlassModel

IDLE = (
    checks.SHAPE,
    checks.Idle("acceptance", without="shape"),
    checks.Idle(
        "draft_tokens ways global_weight layer_budgets stats prompts float32 trust_remote_code", beside="shape"
    ),
    checks.Idle("draft_tokens", without="ways=verified"),
    checks.Idle("global_weight layer_budgets", without="ways=glass ways=verified"),
)

_HEADS = ("", "density", "tok/s", "speed-up", "strays", "KL", "last third", "own PPL", "accepted", "a pass")
_SPEEDS = (("tps", ".1f"), ("speedup", ".2f"))


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = Parser("glass_mlx.tradeoff", description="Compare the speed and fidelity of all ways to decode.")
    add_model_or_shape(parser)
    parser.add_argument(
        "--acceptance",
        type=list_of(_share),
        default=[0.7],
        metavar="A[,A...]",
        help="with --shape: simulated share of drafted tokens that are accepted (default: 0.7)",
    )
    add_densities(parser)
    parser.add_argument(
        "--draft-tokens", type=int, metavar="K", help="always draft K tokens (default: as many as pay off)"
    )
    parser.add_argument(
        "--ways",
        type=list_of(one_of(DECODERS)),
        default=DECODERS,
        metavar="WAY[,WAY...]",
        help=f"decoders to compare: {', '.join(DECODERS)} (default: all)",
    )
    add_choice_options(parser, "global_weight", "layer_budgets", "experts")
    parser.add_argument("--stats", metavar="FILE", help="file of global ranks (default: looked up)")
    _add_text_options(parser)
    add_float32(parser)
    add_trust(parser)
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file; - prints them and nothing else")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG (pip install 'glass_mlx[plot]')")
    add_verbose(parser)
    return parser


def _add_text_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        default=DEFAULT_PROMPTS,
        metavar="SET[,SET...]|FILE",
        help=f"bundled sets ({', '.join(PROMPT_SETS)}), or a file with a prompt in each line (default: %(default)s)",
    )
    parser.add_argument(
        "--count", type=int, default=8, help="number of prompts, taken from all parts of the file (default: 8)"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="cut prompts to this length (default: their own)"
    )
    parser.add_argument("--tokens", type=int, default=256, help="length of the answers (default: 256)")
    parser.add_argument("--temp", type=float, default=1.0, help="sampling temperature (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers")


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return float(text)


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if args.tokens < 3 or args.count < 1 or args.temp < 0 or (args.prompt_tokens or 1) < 1:
        parser.error("--tokens must be at least 3, --count and --prompt-tokens at least 1, --temp not negative")
    checks.check_together(parser, args, IDLE)
    run(lambda: _compare(args), args.verbose)


def _compare(args: argparse.Namespace) -> None:
    from .evaluation.decoders import measure_decoders
    from .evaluation.machine import machine, mlx_backend

    name, model, prompts, decoders = _of_shape(args) if args.shape else _of_model(args)
    model.config = model.config.updated(experts=args.experts)
    found = measure_decoders(model, prompts, decoders, args.tokens, args.temp, args.seed, fidelity=not args.shape)
    result = {
        "model": name,
        "machine": machine(),
        "backend": mlx_backend(),
        "float32": args.float32 and not args.shape,
        "simulated_acceptance": bool(args.shape),
        "prompt_set": None if args.shape else args.prompts,
        "prompts": len(prompts),
        "prompt_tokens": args.prompt_tokens,
        "tokens": args.tokens,
        "temperature": args.temp,
        "seed": args.seed,
        "ways": found,  # scripts read this name
    }
    if args.plot:
        from .evaluation.plot import plot_tradeoff

        plot_tradeoff(result, args.plot)
    print_result(result, table, args.json)


def _of_shape(args: argparse.Namespace) -> tuple[str, GlassModel, list[list[int]], Decoders]:
    """What to compare with random weights."""
    import numpy as np

    from .evaluation.decoders import simulated_decoders
    from .evaluation.shapes import random_model, shape_label

    model = random_model(args.shape, args.layers, args.bits, args.seed)
    rng = np.random.default_rng(args.seed)
    prompts = rng.integers(0, SHAPES[args.shape]["vocab_size"], (args.count, args.prompt_tokens or 16)).tolist()
    return shape_label(args.shape, model, args.bits), model, prompts, simulated_decoders(args.density, args.acceptance)


def _of_model(args: argparse.Namespace) -> tuple[str, GlassModel, list[list[int]], Decoders]:
    """What to compare with a model's own weights."""
    from .evaluation.decoders import standard_decoders
    from .evaluation.free_running import fit_length
    from .evaluation.prompts import read_prompts
    from .loading import load

    name = args.model or DEFAULT_MODEL
    model, tokenizer = load(name, stats=args.stats, trust_remote_code=args.trust_remote_code)
    if args.float32:
        model.dense.set_dtype(mx.float32)
    prompts = read_prompts(args.prompts, tokenizer)
    prompts = [prompts[i * len(prompts) // args.count] for i in range(min(args.count, len(prompts)))]
    prompts = fit_length(model, prompts, args.prompt_tokens, args.temp, args.seed)
    decoders = standard_decoders(args.density, args.global_weight, args.draft_tokens, args.ways, args.layer_budgets)
    return name, model, prompts, decoders


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"{result['model']} on {result['machine']}, {result['backend']}",
        f"{result['prompts']} prompts of {result['prompt_tokens'] or 'their own number of'} tokens, {result['tokens']} "
        f"generated at temperature {result['temperature']:g}; speed: median [lowest, highest]",
    ]
    rows = [_row(name, d, row) for name, by_density in result["ways"].items() for d, row in by_density.items()]
    return "\n".join([*lines, *text_table(_HEADS, rows, names=2)])


def _row(name: str, d: str, row: dict[str, Any]) -> list[str]:
    ranges = [f"{row[k]:{f}} [{row['range'][k][0]:{f}}, {row['range'][k][1]:{f}}]" for k, f in _SPEEDS]
    strays = f"{row['strays']:.1%} ± {row['strays_error']:.1%}" if "strays" in row else ""
    kl = f"{row['kl']:.3f} ± {row['kl_error']:.3f}" if "kl" in row else ""
    last = f"{row['kl_last_third']:.3f}" if "kl" in row else ""
    ppl = f"{row['own_ppl']:.1f}" if "own_ppl" in row else ""
    accepted, a_pass = row.get("acceptance"), row.get("tokens_per_pass")
    drafts = ["" if accepted is None else f"{accepted:.1%}", "" if a_pass is None else f"{a_pass:.2f}"]
    return [name, d, *ranges, strays, kl, last, ppl, *drafts]


if __name__ == "__main__":
    main()
