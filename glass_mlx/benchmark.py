"""Decode and prefill speed of GLASS against the same model in plain mlx-lm.

    python -m glass_mlx.benchmark --model demo --density 0.3,0.5,0.7

Dense and sparse runs alternate in one process, on the same random prompts; medians and ranges are shown.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

from .cli import add_verbose, density, global_weight, run
from .importance import SIGNALS
from .loading import DEFAULT_MODEL, load
from .model import GlassModel
from .session import GlassConfig


def measure(model: nn.Module, prompt: mx.array, tokens: int, cache: list[Any]) -> dict[str, float]:
    """Time one run of mlx-lm's generation loop.

    Args:
        model (nn.Module): a GlassModel or an mlx-lm model.
        prompt (mx.array): tokens [n].
        tokens (int): how many to generate, at least 2.
        cache (list): a new prompt cache of the model.

    Returns:
        dict: prompt_tps and generation_tps in tokens/s, and first_ms, the time of the second token, which for
        GLASS has the selection and slicing in it.
    """
    tic = time.perf_counter()
    times = []
    for _ in generate_step(prompt, model, max_tokens=tokens, prompt_cache=cache):
        times.append(time.perf_counter())
    return {
        "prompt_tps": prompt.size / (times[0] - tic),
        "first_ms": 1e3 * (times[1] - times[0]),
        "generation_tps": (tokens - 2) / (times[-1] - times[1]),
    }


def prefill_seconds(model: nn.Module, prompt: mx.array, cache: list[Any]) -> float:
    """Time to read a prompt [n] in one call, every layer and logit computed."""
    tic = time.perf_counter()
    mx.eval(model(prompt[None], cache=cache), [c.state for c in cache])
    return time.perf_counter() - tic


def compare(
    model: GlassModel, densities: list[float], prompt_tokens: int, tokens: int, trials: int, seed: int
) -> dict[str, Any]:
    """Alternate dense and sparse runs; returns medians, [minimum, maximum] and paired speed-ups."""
    mx.random.seed(seed)
    vocabulary = model(mx.array([[0]])).shape[-1]
    dense_runs: list[dict[str, float]] = []
    runs: dict[float, list[dict[str, float]]] = {d: [] for d in densities}
    overheads = []
    for trial in tqdm(range(trials + 1), unit="trial", file=sys.stderr, disable=None):
        prompt = mx.random.randint(0, vocabulary, (prompt_tokens,))
        measured = [measure(model.dense, prompt, tokens, make_prompt_cache(model.dense))]
        for d in densities:
            measured.append(measure(model, prompt, tokens, model.make_cache(density=d)))
        plain = prefill_seconds(model.dense, prompt, make_prompt_cache(model.dense))
        recorded = prefill_seconds(model, prompt, model.make_cache(density=0.5))
        if trial == 0:
            continue  # warm-up
        overheads.append(recorded / plain - 1)
        dense_runs.append(measured[0])
        for d, run_ in zip(densities, measured[1:]):
            run_["speedup"] = run_["generation_tps"] / measured[0]["generation_tps"]
            runs[d].append(run_)
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "backend": str(mx.default_device()),
        "runs": trials,
        "prompt_tokens": prompt_tokens,
        "generation_tokens": tokens,
        "dense": _summary(dense_runs),
        "glass": {f"{d:g}": _summary(rs) for d, rs in runs.items()},
        "prefill_overhead": _spread(overheads),
    }


def _summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {key: _spread([r[key] for r in runs]) for key in runs[0]}


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _densities(text: str) -> list[float]:
    return [density(part) for part in text.split(",")]


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="glass_mlx.benchmark", description="Speed of GLASS against plain mlx-lm.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="directory, Hub repository or alias")
    parser.add_argument("--density", type=_densities, default=[0.5], metavar="X[,X...]")
    parser.add_argument("--global-weight", type=global_weight, default=GlassConfig.global_weight)
    parser.add_argument("--signal", choices=SIGNALS, default=GlassConfig.signal)
    parser.add_argument("--prompt-tokens", "-p", type=int, default=512, help="length of the prompt")
    parser.add_argument("--generation-tokens", "-g", type=int, default=256, help="tokens to generate")
    parser.add_argument("--num-trials", "-n", type=int, default=5, help="runs after a warm-up")
    parser.add_argument("--seed", type=int, default=0, help="PRNG seed")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_verbose(parser)
    return parser


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if args.prompt_tokens < 2 or args.generation_tokens < 3 or args.num_trials < 1:
        parser.error("-p must be at least 2, -g at least 3, -n at least 1")
    run(lambda: _benchmark(args), args.verbose)


def _benchmark(args: argparse.Namespace) -> None:
    model, _ = load(
        args.model,
        global_weight=args.global_weight,
        signal=args.signal,
        trust_remote_code=args.trust_remote_code,
    )
    result = compare(model, args.density, args.prompt_tokens, args.generation_tokens, args.num_trials, args.seed)
    result = {"model": args.model, **result}
    if args.json:
        print(json.dumps(result))
        return
    print(f"{args.model} on {result['machine']}, {result['backend']}; median [min, max] of {args.num_trials} runs")
    print(f"{'density':>8} {'prompt tok/s':>24} {'decode tok/s':>24} {'speed-up':>20} {'2nd token ms':>14}")
    for name, row in [("dense", result["dense"]), *result["glass"].items()]:
        speedup = _cell(row["speedup"], "{:.2f}") if "speedup" in row else ""
        print(
            f"{name:>8} {_cell(row['prompt_tps']):>24} {_cell(row['generation_tps']):>24} {speedup:>20} "
            f"{row['first_ms']['median']:>14.1f}"
        )
    print(f"recording makes prefill slower by {_cell(result['prefill_overhead'], '{:.1%}')}")


def _cell(spread: dict[str, float], form: str = "{:.0f}") -> str:
    median, low, high = (form.format(spread[k]) for k in ("median", "min", "max"))
    return f"{median} [{low}, {high}]"


if __name__ == "__main__":
    main()
