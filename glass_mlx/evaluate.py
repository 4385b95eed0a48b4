"""How far sparse decoding strays from the dense model, by what chooses the neurons.

    python -m glass_mlx.evaluate --model demo
    python -m glass_mlx.evaluate --density 0.3,0.5,0.7 --global-weight 0,0.25,0.5,0.75,1 --plot fidelity.png
    python -m glass_mlx.evaluate --prompt-tokens 4,16,64 --arms griffin,glass
    python -m glass_mlx.evaluate --recall

The dense model samples a continuation of each prompt. Every arm reads the prompt densely, chooses its neurons from it,
and is fed that continuation while decoding sparsely. Reported are, over all tokens of it, the perplexity,
KL(dense || sparse), how often both find the same token the most likely, and how many neurons an arm has in common with
the oracle, which chooses from the continuation itself; with 95 % confidence intervals over prompts.

`--recall` and `--tasks` measure the answers to tasks instead.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from .cli import add_verbose, density, global_weight, list_of, run
from .evaluation import lm_eval_tasks as tasks
from .evaluation import recall
from .evaluation.fidelity import choose_arms, evaluate
from .evaluation.free_running import cut
from .evaluation.intervals import table, windows
from .evaluation.machine import backend
from .evaluation.plot import plot_fidelity
from .evaluation.prompts import PROMPTS, read_prompts
from .evaluation.selectors import ARMS
from .files import write_atomically
from .loading import DEFAULT_MODEL, load
from .model.glass_model import GlassModel
from .ranks.format import GlobalStatistics
from .ranks.lookup import find_statistics


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _arm(text: str) -> str:
    if text not in ARMS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(ARMS)}")
    return text


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glass_mlx.evaluate", description="Fidelity of sparse decoding to the dense model."
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="directory, Hub repository or alias")
    parser.add_argument("--density", type=list_of(density), default=[0.5], metavar="X[,X...]")
    parser.add_argument(
        "--arms", type=list_of(_arm), metavar="ARM[,ARM...]", help=f"of {', '.join(ARMS)} (default: all)"
    )
    parser.add_argument(
        "--global-weight",
        type=list_of(global_weight),
        default=[0.5],
        metavar="W[,W...]",
        help="of glass-a and glass-i (default: 0.5); glass is auto",
    )
    parser.add_argument("--stats", metavar="FILE", help="global ranks (default: looked up)")
    parser.add_argument(
        "--prompts",
        default=str(PROMPTS),
        metavar="FILE",
        help="a text a line, or .jsonl with text or messages; or null: BOS alone",
    )
    parser.add_argument("--count", type=_positive, help="only so many prompts (default: all of the file; null: 32)")
    parser.add_argument(
        "--prompt-tokens",
        type=list_of(_positive),
        default=[None],
        metavar="N[,N...]",
        help="cut prompts to this length; the dense model goes on with shorter ones",
    )
    parser.add_argument("--tokens", type=_positive, default=256, help="length of the continuations (default: 256)")
    parser.add_argument("--temp", type=float, default=1.0, help="sampling temperature of the continuations")
    parser.add_argument("--seed", type=int, default=0, help="PRNG seed")
    parser.add_argument("--free", action="store_true", help="also let each arm speak by itself")
    parser.add_argument(
        "--float32",
        action=argparse.BooleanOptionalAction,
        default=mx.default_device() == mx.Device(mx.cpu),
        help="compute in float32, much faster than 16 bits on a CPU (default: on a CPU)",
    )
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON, to standard output by default"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG (pip install 'glass_mlx[plot]')")
    group = parser.add_argument_group("tasks, instead")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument("--recall", action="store_true", help="does an answer repeat the city, time or name it was told?")
    kind.add_argument(
        "--tasks",
        type=list_of(str),
        metavar="TASK[,TASK...]",
        help="generation tasks of lm-evaluation-harness (pip install 'glass_mlx[eval]')",
    )
    group.add_argument("--include-path", metavar="DIR", help="a folder with YAML files of further tasks")
    group.add_argument("--limit", type=_positive, help="only so many questions of each task")
    add_verbose(parser)
    return parser


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if args.tokens < 2:
        parser.error("--tokens must be at least 2")
    if args.temp < 0:
        parser.error("--temp must not be negative")
    run(lambda: _evaluate(args), args.verbose)


def _evaluate(args: argparse.Namespace) -> None:
    tic = time.perf_counter()
    model, tokenizer = load(args.model, stats=args.stats, trust_remote_code=args.trust_remote_code)
    ranks = find_statistics(model, args.stats)
    if args.float32:
        model.dense.set_dtype(mx.float32)
    about = {"model": args.model, "backend": backend(), "float32": args.float32, "seed": args.seed}
    if args.recall or args.tasks:
        _answer(args, model, tokenizer, ranks, about)
        return
    arms = choose_arms(args.arms, args.global_weight, ranks is not None)
    prompts = read_prompts(args.prompts, tokenizer, args.count)
    about |= {"prompts": len(prompts), "tokens": args.tokens, "temperature": args.temp, "windows": windows(args.tokens)}
    by_length = {}
    with tqdm(total=len(prompts) * len(args.prompt_tokens), unit="prompt", file=sys.stderr, disable=None) as bar:
        for length in args.prompt_tokens:
            by_length["own" if length is None else f"{length}"] = evaluate(
                model,
                cut(model, prompts, length, args.temp, args.seed),
                arms,
                args.density,
                args.tokens,
                args.temp,
                args.seed,
                args.free,
                bar.update,
            )
    result = {
        **about,
        "seconds": round(time.perf_counter() - tic, 1),
        "arms": next(iter(by_length.values())),
        "prompt_tokens": by_length,
    }
    _report(args, result, table)


def _answer(
    args: argparse.Namespace, model: GlassModel, tokenizer: Any, ranks: GlobalStatistics | None, about: dict[str, Any]
) -> None:
    """Measure the answers to tasks."""
    if args.recall:
        questions = recall.read_questions(args.limit)
        arms = choose_arms(args.arms or ["griffin", "glass"], args.global_weight, ranks is not None)
        rows = recall.evaluate(model, tokenizer, arms, args.density, questions)
        _report(args, {**about, "questions": len(questions), "recall": rows}, recall.table)
        return
    configs = tasks.standard_configs(args.density)
    rows = tasks.evaluate(model, tokenizer, args.tasks, configs, args.include_path, args.limit, args.seed)
    _report(args, {**about, "tasks": rows}, tasks.table)


def _report(args: argparse.Namespace, result: dict[str, Any], table: Callable[[dict[str, Any]], str]) -> None:
    """Write, draw and print a result, as far as asked for."""
    if args.plot is not None and "arms" in result:
        plot_fidelity(result, args.plot)
    if args.json == "-":
        print(json.dumps(result))
        return
    if args.json is not None:
        write_atomically(args.json, lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
    print(table(result))


if __name__ == "__main__":
    main()
