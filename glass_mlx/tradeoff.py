"""Speed against fidelity: the dense model, GLASS with and without refresh, verified decoding, GRIFFIN.

    python -m glass_mlx.tradeoff --model demo --density 0.3,0.5,0.7 --plot tradeoff.png
    python -m glass_mlx.tradeoff --ways glass,refresh --refresh 10,30,auto --tokens 1024
    python -m glass_mlx.tradeoff --ways glass,refresh --global-weight 0.5 --layer-budgets uniform  # rank fusion
    python -m glass_mlx.tradeoff --shape mistral-7b --layers 2 --bits 4 --acceptance 0.7,0.9

Every way of decoding answers the same prompts, in turn with the dense model and in one process. *Speed* is in tokens a
second from the first token on, with choosing neurons and slicing; an answer runs on over an end token, so that all are
of one length.

*Strays* are the fidelity that all ways have: the share of tokens of a way's own answer that the dense model, given the
same text so far and the same random numbers, would not have said in that place. The dense model has none, and neither
has verified decoding, up to rounding. (At temperature 0 it is the share that are not the dense model's most likely
ones. The random numbers are Gumbel noise, so two equal distributions have no strays and close ones few.) *KL* is
KL(dense || way) in nats per token, where the dense model's continuation is fed to a way as in `evaluate`. *Own PPL* is
the perplexity of a way's answer under the dense model.

Random weights (`--shape`) have true speed but say nothing true: there is no fidelity then, and `--acceptance` is the
simulated share of drafted tokens that the check accepts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .cli import add_verbose, density, global_weight, list_of, refresh, run
from .evaluation.decoders import KINDS, measure, simulated_ways, ways
from .evaluation.free_running import cut
from .evaluation.machine import backend, machine
from .evaluation.plot import plot_tradeoff
from .evaluation.prompts import PROMPTS, read_prompts
from .evaluation.shapes import BITS, SHAPES, random_model
from .files import write_atomically
from .loading import DEFAULT_MODEL, load
from .model.config import LAYER_BUDGETS, GlassConfig


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"{result['model']} on {result['machine']}, {result['backend']}",
        f"{result['prompts']} prompts of {result['prompt_tokens'] or 'their own number of'} tokens, {result['tokens']} "
        f"generated at temperature {result['temperature']:g}; speed: median [lowest, highest]",
        f"{'':>26} {'density':>7} {'tok/s':>22} {'speed-up':>20} {'strays':>14} {'KL':>14} "
        f"{'last third':>10} {'own PPL':>8} {'accepted':>9} {'a pass':>7}",
    ]
    for name, by_density in result["ways"].items():
        for d, row in by_density.items():
            ranges = [f"{row[k]:{f}} [{row['range'][k][0]:{f}}, {row['range'][k][1]:{f}}]" for k, f in _SPEEDS]
            strays = f"{row['strays']:.1%} ± {row['strays_error']:.1%}" if "strays" in row else ""
            kl = f"{row['kl']:.3f} ± {row['kl_error']:.3f}" if "kl" in row else ""
            last = f"{row['kl_last_third']:.3f}" if "kl" in row else ""
            ppl = f"{row['own_ppl']:.1f}" if "own_ppl" in row else ""
            accepted, a_pass = row.get("acceptance"), row.get("tokens_per_pass")
            lines.append(
                f"{name:>26} {d:>7} {ranges[0]:>22} {ranges[1]:>20} {strays:>14} {kl:>14} {last:>10} {ppl:>8} "
                f"{'' if accepted is None else f'{accepted:.1%}':>9} {'' if a_pass is None else f'{a_pass:.2f}':>7}"
            )
    return "\n".join(lines)


_SPEEDS = (("tps", ".1f"), ("speedup", ".2f"))


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return float(text)


def _kind(text: str) -> str:
    if text not in KINDS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(KINDS)}")
    return text


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glass_mlx.tradeoff", description="Speed against fidelity of all ways to decode."
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help=f"directory, Hub repository or alias (default: {DEFAULT_MODEL})")
    what.add_argument("--shape", choices=SHAPES, help="random weights of this model's shape: speed only")
    parser.add_argument("--layers", type=int, help="with --shape: so many layers, for small machines")
    parser.add_argument("--bits", type=int, choices=BITS, default=4, help="with --shape: of a weight (default: 4)")
    parser.add_argument(
        "--acceptance",
        type=list_of(_share),
        default=[0.7],
        metavar="A[,A...]",
        help="with --shape: simulated share of drafted tokens that are accepted (default: 0.7)",
    )
    parser.add_argument("--density", type=list_of(density), default=[0.3, 0.5, 0.7], metavar="X[,X...]")
    parser.add_argument(
        "--draft-tokens", type=int, metavar="K", help="draft always so many tokens (default: as many as pay)"
    )
    parser.add_argument(
        "--refresh", type=list_of(refresh), default=["auto"], metavar="TOKENS[,TOKENS...]", help="(default: auto)"
    )
    parser.add_argument(
        "--ways",
        type=list_of(_kind),
        default=KINDS,
        metavar="WAY[,WAY...]",
        help=f"of {', '.join(KINDS)} (default: all)",
    )
    parser.add_argument("--global-weight", type=global_weight, default=GlassConfig.global_weight, metavar="WEIGHT")
    parser.add_argument("--layer-budgets", choices=LAYER_BUDGETS, default=GlassConfig.layer_budgets)
    parser.add_argument("--stats", metavar="FILE", help="global ranks (default: looked up)")
    parser.add_argument("--prompts", default=str(PROMPTS), metavar="FILE", help="one prompt a line")
    parser.add_argument("--count", type=int, default=8, help="so many prompts, from all over the file (default: 8)")
    parser.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="cut prompts to this length (default: their own)"
    )
    parser.add_argument("--tokens", type=int, default=256, help="length of the answers (default: 256)")
    parser.add_argument("--temp", type=float, default=1.0, help="sampling temperature (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="PRNG seed")
    parser.add_argument(
        "--float32",
        action=argparse.BooleanOptionalAction,
        default=mx.default_device() == mx.Device(mx.cpu),
        help="compute in float32, much faster than 16 bits on a CPU (default: on a CPU)",
    )
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file; - prints them and nothing else")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG (pip install 'glass_mlx[plot]')")
    add_verbose(parser)
    return parser


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if args.tokens < 3 or args.count < 1 or args.temp < 0 or (args.prompt_tokens or 1) < 1:
        parser.error("--tokens must be at least 3, --count and --prompt-tokens at least 1, --temp not negative")
    if args.layers is not None and (args.shape is None or args.layers < 1):
        parser.error("--layers goes with --shape, and is at least 1")
    run(lambda: _compare(args), args.verbose)


def _compare(args: argparse.Namespace) -> None:
    if args.shape:
        model = random_model(args.shape, args.layers, args.bits, args.seed)
        name = f"{args.shape} shape, {len(model.dense.layers)} layers, {args.bits} bits, random weights"
        rng = np.random.default_rng(args.seed)
        prompts = rng.integers(0, SHAPES[args.shape]["vocab_size"], (args.count, args.prompt_tokens or 16)).tolist()
        made = simulated_ways(args.density, args.acceptance)
    else:
        name = args.model or DEFAULT_MODEL
        model, tokenizer = load(name, stats=args.stats, trust_remote_code=args.trust_remote_code)
        if args.float32:
            model.dense.set_dtype(mx.float32)
        prompts = read_prompts(args.prompts, tokenizer, None)
        prompts = [prompts[i * len(prompts) // args.count] for i in range(min(args.count, len(prompts)))]
        prompts = cut(model, prompts, args.prompt_tokens, args.temp, args.seed)
        made = ways(
            args.density,
            weight=args.global_weight,
            k=args.draft_tokens,
            refreshes=args.refresh,
            kinds=args.ways,
            layer_budgets=args.layer_budgets,
        )
    found = measure(model, prompts, made, args.tokens, args.temp, args.seed, fidelity=not args.shape)
    result = {
        "model": name,
        "machine": machine(),
        "backend": backend(),
        "float32": args.float32 and not args.shape,
        "simulated_acceptance": bool(args.shape),
        "prompts": len(prompts),
        "prompt_tokens": args.prompt_tokens,
        "tokens": args.tokens,
        "temperature": args.temp,
        "seed": args.seed,
        "ways": found,
    }
    if args.plot:
        plot_tradeoff(result, args.plot)
    if args.json == "-":
        print(json.dumps(result))
        return
    if args.json:
        write_atomically(Path(args.json), lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))
    print(table(result))


if __name__ == "__main__":
    main()
