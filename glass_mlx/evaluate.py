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
import numpy as np
from tqdm import tqdm

from . import recall, tasks
from .arms import ARMS, GLOBAL, Arm, standard_arms
from .benchmark import backend
from .calibrate import start_tokens
from .cli import add_verbose, density, global_weight, list_of, run
from .continuation import readability, self_nll, speak
from .errors import GlassError
from .fidelity import Scores, measure
from .generate import render
from .loading import DEFAULT_MODEL, load
from .lookup import find_ranks
from .model import GlassModel
from .plot import plot_fidelity
from .ranks import GlobalRanks, write_atomically
from .summary import interval, summarise, table, windows

PROMPTS = Path(__file__).parent / "prompts.jsonl"

# Prompts whose continuations are sampled together.
_BATCH = 32


def evaluate(
    model: GlassModel,
    prompts: list[list[int]],
    arms: dict[str, Arm],
    densities: list[float],
    tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    free: bool = False,
    progress: Callable[[int], None] = lambda prompts: None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure arms on the dense model's own continuations.

    Args:
        model (GlassModel): the model.
        prompts (list[list[int]]): tokens.
        arms (dict): functions that choose neurons, by name.
        densities (list[float]): at which each arm is measured.
        tokens (int): length of a continuation.
        temperature (float): of its sampling.
        seed (int): of its sampling.
        free (bool): also let each arm speak by itself.
        progress: called with the number of prompts done since the last call.

    Returns:
        dict: for each arm, ``dense`` included, and each density the figures of :func:`summary.summarise`; with
        ``free`` under that name those of :func:`speak_freely`.
    """
    mx.random.seed(seed)
    said = _speak(model, prompts, tokens, temperature)
    scores = measure(model, prompts, said, arms, densities, progress)
    griffin = scores.get("griffin", {})
    result = {
        name: {
            f"{d:g}": summarise(row, griffin.get(d) if name not in ("dense", "griffin") else None)
            for d, row in rows.items()
        }
        for name, rows in scores.items()
    }
    if free:
        for name, rows in scores.items():
            for d, row in rows.items():
                mx.random.seed(seed)
                result[name][f"{d:g}"]["free"] = speak_freely(model, prompts, row, tokens, temperature)
    return result


def speak_freely(
    model: GlassModel, prompts: list[list[int]], scores: Scores, tokens: int, temperature: float
) -> dict[str, Any]:
    """Let an arm go on by itself from each prompt, with the neurons that it chose.

    Returns:
        dict: ``repetition``, ``distinct-1``, ``distinct-2`` (:func:`continuation.readability`), ``self_ppl``, the
        perplexity of what it says under the dense model; ``ci`` of each.
    """
    said = _speak(model, prompts, tokens, temperature, scores.kept)
    values = readability(said)
    nll = self_nll(model, prompts, said)
    return {
        **{name: float(v.mean()) for name, v in values.items()},
        "self_ppl": float(np.exp(nll.mean())),
        "ci": {name: interval(v) for name, v in values.items()} | {"self_ppl": np.exp(interval(nll)).tolist()},
    }


def _speak(
    model: GlassModel,
    prompts: list[list[int]],
    tokens: int,
    temperature: float,
    kept: list[np.ndarray] | None = None,
) -> list[list[int]]:
    said: list[list[int]] = []
    for i in range(0, len(prompts), _BATCH):
        masks = None if kept is None else [mx.array(rows[i : i + _BATCH]) for rows in kept]
        said += speak(model, prompts[i : i + _BATCH], tokens, temperature, masks)
    return said


def cut(
    model: GlassModel, prompts: list[list[int]], length: int | None, temperature: float, seed: int
) -> list[list[int]]:
    """Prompts of ``length`` tokens: the beginnings of longer ones; the dense model goes on with shorter ones."""
    if length is None:
        return prompts
    short = [p for p in prompts if len(p) < length]
    mx.random.seed(seed)
    more = iter(_speak(model, short, length - min(map(len, short)), temperature)) if short else iter(())
    return [(p if len(p) >= length else [*p, *next(more)])[:length] for p in prompts]


def read_prompts(source: str, tokenizer: Any, count: int | None) -> list[list[int]]:
    """Tokens of the prompts of a file, or for ``null`` of the BOS token alone, 32 times.

    A ``.jsonl`` file holds ``{"text": ...}`` or ``{"messages": [...]}`` in each line, another file one text a line.
    Models without a chat template are given what the messages say.
    """
    if source == "null":
        return [start_tokens(tokenizer)] * (count or 32)
    try:
        lines = [line.strip() for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise GlassError(f"Cannot read prompts from {source}: {e}") from e
    if not lines:
        raise GlassError(f"{source} has no prompts.")
    if not source.endswith(".jsonl"):
        return [tokenizer.encode(line) for line in lines[:count]]
    return [_prompt(line, f"{source}:{number}", tokenizer) for number, line in enumerate(lines[:count], 1)]


def _prompt(line: str, place: str, tokenizer: Any) -> list[int]:
    try:
        item = json.loads(line)
        messages = item.get("messages")
        text = item["text"] if messages is None else "\n\n".join([*(m["content"] for m in messages), ""])
        if messages is None or not tokenizer.has_chat_template:
            return list(tokenizer.encode(text))
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise GlassError(f'{place} has no "text" and no "messages".') from e
    return list(render(tokenizer, messages, add_generation_prompt=True))


def choose_arms(names: list[str] | None, weights: list[float | str], global_ranks: bool) -> dict[str, Arm]:
    """The arms asked for by name (default: all), as far as there are global ranks for them; a weight ``auto`` is
    ``glass``, which is one of them anyway.

    Raises:
        GlassError: an arm was asked for that needs global ranks.
    """
    standard = standard_arms([w for w in weights if w != "auto"])
    arms = {name: arm for name, arm in standard.items() if names is None or name.split()[0] in names}
    missing = [] if global_ranks else [name for name in arms if name.split()[0] in GLOBAL]
    if missing and names is not None:
        raise GlassError(f"There are no global ranks for this model, and {missing[0]} needs them: build some first.")
    if missing:
        print(f"There are no global ranks for this model: without {', '.join(missing)}.", file=sys.stderr)
    return {name: arm for name, arm in arms.items() if name not in missing}


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
    ranks = find_ranks(model, args.stats)
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
    args: argparse.Namespace, model: GlassModel, tokenizer: Any, ranks: GlobalRanks | None, about: dict[str, Any]
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
