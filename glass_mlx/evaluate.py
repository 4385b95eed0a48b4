"""How far sparse decoding is from the dense model, for different ways to select neurons.

    python -m glass_mlx.evaluate --model demo
    python -m glass_mlx.evaluate --density 0.3,0.5,0.7 --global-weight 0,0.25,0.5,0.75,1 --plot fidelity.png
    python -m glass_mlx.evaluate --prompt-tokens 4,16,64 --arms griffin,glass
    python -m glass_mlx.evaluate --exact recall,facts --density 0.5,0.7

The dense model samples a continuation of each prompt. For every selector (``--arms``), the prompt is read densely,
neurons are selected, and the continuation is fed to the sparse model. The figures, over all tokens of the
continuations, are the perplexity, KL(dense || sparse), how often both find the same token the most likely, and the
overlap of the kept neurons with the oracle's, which selects by the continuation itself. Confidence intervals of 95 %
are over prompts.

``--exact`` and ``--tasks`` measure answers to tasks instead.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .cli import checks
from .cli.options import add_choice_options, add_float32, add_trust, add_verbose
from .cli.output import print_result
from .cli.parser import Parser
from .cli.running import run
from .cli.values import density, global_weight, list_of, one_of, positive
from .evaluation.names import DEFAULT_PROMPTS, GLOBAL, PROMPT_SETS, SELECTORS
from .evaluation.questions import TASKS, read_questions
from .hub.names import DEFAULT_MODEL

if TYPE_CHECKING:
    from .model.glass_model import GlassModel

IDLE = (
    checks.Idle("prompts count prompt_tokens tokens temp free plot", beside="exact tasks"),
    checks.Idle("seed", beside="exact"),
    checks.Idle("arms global_weight", beside="tasks"),
    checks.Idle("global_weight", without="arms=glass-a arms=glass-i"),
    checks.Idle("limit", without="exact tasks"),
    checks.Idle("include_path", without="tasks"),
)

# What answers are compared for, if nothing else is asked for.
_EXACT_SELECTORS = ("griffin", "glass-i", "glass")


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = Parser("glass_mlx.evaluate", description="Measure how far sparse decoding is from the dense model.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="an alias, a Hub repository or a directory")
    parser.add_argument(
        "--density", type=list_of(density), default=[0.5], metavar="X[,X...]", help="share of the neurons to keep"
    )
    parser.add_argument(
        "--arms",
        type=list_of(one_of(SELECTORS)),
        metavar="ARM[,ARM...]",
        help=f"selectors to compare: {', '.join(SELECTORS)} (default: all)",
    )
    parser.add_argument(
        "--global-weight",
        type=list_of(global_weight),
        default=[0.5],
        metavar="W[,W...]",
        help="of glass-a and glass-i (default: 0.5); glass uses auto",
    )
    add_choice_options(parser, "experts")
    parser.add_argument("--stats", metavar="FILE", help="file of global ranks (default: looked up)")
    _add_text_options(parser)
    add_float32(parser)
    add_trust(parser)
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or else to standard output"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG (pip install 'glass_mlx[plot]')")
    _add_task_options(parser)
    add_verbose(parser)
    return parser


def _add_text_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        default=DEFAULT_PROMPTS,
        metavar="SET[,SET...]|FILE",
        help=f"bundled sets ({', '.join(PROMPT_SETS)}); or a file with a prompt in each line; or .jsonl with text or "
        "messages; or null: BOS alone (default: %(default)s)",
    )
    parser.add_argument("--count", type=positive, help="use the first COUNT prompts (default: all; of null: 32)")
    parser.add_argument(
        "--prompt-tokens",
        type=list_of(positive),
        default=[None],
        metavar="N[,N...]",
        help="cut prompts to this length; the dense model continues shorter ones (default: their own length)",
    )
    parser.add_argument("--tokens", type=positive, default=256, help="length of the continuations (default: 256)")
    parser.add_argument("--temp", type=float, default=1.0, help="sampling temperature of the continuations")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers")
    parser.add_argument("--free", action="store_true", help="also let each sparse model write continuations of its own")


def _add_task_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tasks, instead of prompts")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--exact",
        type=list_of(one_of(TASKS)),
        metavar="TASK[,TASK...]",
        help=f"bundled tasks, whose answers are checked by rules: {', '.join(TASKS)}",
    )
    kind.add_argument(
        "--tasks",
        type=list_of(str),
        metavar="TASK[,TASK...]",
        help="generation tasks of lm-evaluation-harness (pip install 'glass_mlx[eval]')",
    )
    group.add_argument("--include-path", metavar="DIR", help="directory with the YAML files of further tasks")
    group.add_argument("--limit", type=positive, help="use at most LIMIT questions of each task")


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if args.tokens < 2:
        parser.error("--tokens must be at least 2")
    if args.temp < 0:
        parser.error("--temp must not be negative")
    checks.check_together(parser, args, IDLE)
    run(lambda: _evaluate(args), args.verbose)


def _evaluate(args: argparse.Namespace) -> None:
    from .evaluation.machine import mlx_backend
    from .loading import load

    tic = time.perf_counter()
    model, tokenizer = load(
        args.model, stats=args.stats, experts=args.experts, trust_remote_code=args.trust_remote_code
    )
    if args.float32:
        model.dense.set_dtype(mx.float32)
    measure = _exact if args.exact else _tasks if args.tasks else _fidelity
    figures, table = measure(args, model, tokenizer)
    about = {"model": args.model, "backend": mlx_backend(), "float32": args.float32, "seed": args.seed}
    result = {**about, "seconds": round(time.perf_counter() - tic, 1), **figures}
    if args.plot is not None and "arms" in result:
        from .evaluation.plot import plot_fidelity

        plot_fidelity(result, args.plot)
    print_result(result, table, args.json)


Figures = tuple[dict[str, Any], Callable[[dict[str, Any]], str]]


def _fidelity(args: argparse.Namespace, model: GlassModel, tokenizer: Any) -> Figures:
    from tqdm import tqdm

    from .evaluation import fidelity
    from .evaluation.free_running import fit_length
    from .evaluation.intervals import windows
    from .evaluation.prompts import read_prompts
    from .evaluation.selectors import choose_selectors

    selectors = choose_selectors(args.arms, args.global_weight, model.global_ranks is not None)
    if args.arms is None and model.global_ranks is None:
        print(f"There are no global ranks for this model: without {', '.join(GLOBAL)}.", file=sys.stderr)
    prompts = read_prompts(args.prompts, tokenizer, args.count)
    by_length = {}
    with tqdm(total=len(prompts) * len(args.prompt_tokens), unit="prompt", file=sys.stderr, disable=None) as bar:
        for length in args.prompt_tokens:
            by_length["own" if length is None else f"{length}"] = fidelity.measure_fidelity(
                model,
                fit_length(model, prompts, length, args.temp, args.seed),
                selectors,
                args.density,
                args.tokens,
                args.temp,
                args.seed,
                args.free,
                bar.update,
            )
    figures = {
        "prompt_set": args.prompts,
        "prompts": len(prompts),
        "tokens": args.tokens,
        "temperature": args.temp,
        "windows": windows(args.tokens),
        "arms": next(iter(by_length.values())),  # scripts read this name
        "prompt_tokens": by_length,
    }
    return figures, fidelity.table


def _exact(args: argparse.Namespace, model: GlassModel, tokenizer: Any) -> Figures:
    from tqdm import tqdm

    from .evaluation import exact
    from .evaluation.selectors import choose_selectors

    has_statistics = model.global_ranks is not None
    names = args.arms or [name for name in _EXACT_SELECTORS if has_statistics or name not in GLOBAL]
    selectors = choose_selectors(names, args.global_weight, has_statistics)
    questions = {task: read_questions(task, args.limit) for task in args.exact}
    rows = {}
    with tqdm(total=sum(map(len, questions.values())), unit="question", file=sys.stderr, disable=None) as bar:
        for task, some in questions.items():
            how = TASKS[task]
            rows[task] = exact.measure_task(model, tokenizer, how, some, selectors, args.density, bar.update)
    return {"questions": {task: len(some) for task, some in questions.items()}, "exact": rows}, exact.table


def _tasks(args: argparse.Namespace, model: GlassModel, tokenizer: Any) -> Figures:
    from .evaluation import lm_eval_tasks

    configs = lm_eval_tasks.standard_configs(args.density, args.experts)
    rows = lm_eval_tasks.run_tasks(model, tokenizer, args.tasks, configs, args.include_path, args.limit, args.seed)
    return {"tasks": rows}, lm_eval_tasks.table


if __name__ == "__main__":
    main()
