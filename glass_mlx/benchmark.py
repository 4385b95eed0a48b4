"""Speed and memory of GLASS against the same model in plain mlx-lm.

    python -m glass_mlx.benchmark --model demo --density 0.3,0.5,0.7
    python -m glass_mlx.benchmark --shape mistral-7b --bits 4

Dense and sparse runs alternate in one process, on the same random prompts; medians and ranges are shown. The byte
ceiling is the speed-up that a decoder limited by memory bandwidth alone would see: bytes that a dense decode step
reads over those of a sparse one, weights and KV cache.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

from .cli import add_verbose, density, global_weight, list_of, refresh, run
from .importance import SIGNALS
from .loading import DEFAULT_MODEL, load
from .memory import model_bytes
from .model import GlassModel
from .plot import plot_benchmark
from .ranks import write_atomically
from .session import GlassConfig
from .shapes import BITS, SHAPES, random_model
from .slicing import Spread


def measure(model: nn.Module, prompt: mx.array, tokens: int, cache: list[Any], step_size: int = 2048) -> dict:
    """Time one run of mlx-lm's generation loop.

    Args:
        model (nn.Module): a GlassModel or an mlx-lm model.
        prompt (mx.array): tokens [n].
        tokens (int): how many to generate, at least 3.
        cache (list): a new prompt cache of the model.
        step_size (int): tokens in a prefill call.

    Returns:
        dict: ``prompt_seconds`` to the first token, without ``select_seconds`` for choosing neurons and slicing;
        ``step_seconds`` of a decode step, refreshes included; ``peak_memory`` in bytes.
    """
    session = model.session(cache) if isinstance(model, GlassModel) else None
    if session is not None:
        session.begin_prompt(prompt.size)
    mx.clear_cache()
    mx.reset_peak_memory()
    times, select = [], 0.0
    with wired_limit(model, [generation_stream]):
        tic = time.perf_counter()
        for _ in generate_step(prompt, model, max_tokens=tokens, prompt_cache=cache, prefill_step_size=step_size):
            times.append(time.perf_counter())
            if len(times) == 1 and session is not None:
                select = session.selection_time  # mlx-lm's loop has begun the second token by now
    return {
        "prompt_seconds": times[0] - tic - select,
        "select_seconds": select,
        "step_seconds": (times[-1] - times[1]) / (tokens - 2),
        "peak_memory": mx.get_peak_memory(),
    }


def bytes_per_token(model: GlassModel, cache: list[Any], sparse: bool) -> int:
    """Bytes that a decode step reads: all weights once, but of an embedding that is no output head only a row, and
    the KV cache. Routed experts count in full."""
    total = model_bytes(model.dense) - _unread_embedding(model.dense)
    total += sum(a.nbytes for entry in cache[:-1] for _, a in tree_flatten(entry.state) if isinstance(a, mx.array))
    if sparse:
        model.prepare(cache)  # the last token may have been one to refresh at
        for block, projections in zip(model.blocks, model.session(cache).compact):
            for name, compact in projections.items():
                read = model_bytes(compact.projection if isinstance(compact, Spread) else compact)
                total += read - model_bytes(block.module[name])
    return total


def _unread_embedding(dense: nn.Module) -> int:
    """Bytes of the token embedding where the model has an output head of its own."""
    leaves = [leaf for _, leaf in tree_flatten(dense.leaf_modules(), is_leaf=nn.Module.is_module)]
    tables = [m for m in leaves if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding))]
    heads = {m.weight.shape[0] for m in leaves if isinstance(m, (nn.Linear, nn.QuantizedLinear))}
    return sum(model_bytes(table) for table in tables if table.weight.shape[0] in heads)


def compare(
    model: GlassModel,
    densities: list[float],
    prompt_tokens: int,
    tokens: int,
    trials: int,
    seed: int = 0,
    step_size: int = 2048,
    delay: float = 0,
) -> dict[str, Any]:
    """Alternate dense and sparse runs, each density in every trial.

    Returns:
        dict: ``dense`` and, by density, ``glass`` with medians over the trials, and under ``range`` their lowest and
        highest; ``speedup``, ``ceiling`` and ``fraction_of_ceiling`` by density. Tokens a second, milliseconds,
        bytes; ``prefill_overhead`` is recording's share of the dense prefill; ``break_even_tokens`` says after
        how many generated tokens a new conversation is ahead of the dense model, prefill and selection
        included (None: never).
    """
    mx.random.seed(seed)
    vocabulary = model(mx.array([[0]])).shape[-1]
    dense_runs: list[dict] = []
    runs: dict[float, list[dict]] = {d: [] for d in densities}
    ceilings: dict[float, float] = {}
    for trial in tqdm(range(trials + 1), unit="trial", file=sys.stderr, disable=None):
        prompt = mx.random.randint(0, vocabulary, (prompt_tokens,))
        dense = measure(model.dense, prompt, tokens, make_prompt_cache(model.dense), step_size)
        if trial:  # the first one warms up
            dense_runs.append(dense)
        for d in densities:
            time.sleep(delay)
            cache = model.make_cache(density=d)
            sparse = measure(model, prompt, tokens, cache, step_size)
            ceilings[d] = bytes_per_token(model, cache, False) / bytes_per_token(model, cache, d < 1)
            sparse["compact_bytes"] = model.session(cache).compact_bytes
            if trial:
                runs[d].append(_against(dense, sparse))
            del cache  # and its compact weights, before the next run's peak is measured
    summaries = {d: _summary(rows, prompt_tokens) for d, rows in runs.items()}
    for summary, rows in zip(summaries.values(), runs.values()):
        summary["break_even_tokens"] = _break_even(rows)
    speedups = {f"{d:g}": statistics.median(r["speedup"] for r in rows) for d, rows in runs.items()}
    return {
        "machine": machine(),
        "backend": backend(),
        "runs": trials,
        "prompt_tokens": prompt_tokens,
        "generation_tokens": tokens,
        "dense": _summary(dense_runs, prompt_tokens),
        "glass": {f"{d:g}": summary for d, summary in summaries.items()},
        "speedup": speedups,
        "ceiling": {f"{d:g}": ceilings[d] for d in densities},
        "fraction_of_ceiling": {f"{d:g}": speedups[f"{d:g}"] / ceilings[d] for d in densities},
    }


def machine() -> str:
    """This machine in words."""
    chip = mx.device_info().get("device_name", platform.machine())
    return f"{platform.system()} {platform.machine()}, {chip}, {os.cpu_count()} cores"


def backend() -> str:
    """MLX's version and the backend that it runs on."""
    if mx.default_device() == mx.Device(mx.cpu):
        name = "CPU"
    else:
        name = "Metal" if mx.metal.is_available() else "CUDA"
    return f"mlx {mx.__version__}, {name}"


def _against(dense: dict, sparse: dict) -> dict:
    """A sparse run with what compares it to the dense run of its trial."""
    extra = sparse["prompt_seconds"] + sparse["select_seconds"] - dense["prompt_seconds"]
    return {
        **sparse,
        "speedup": dense["step_seconds"] / sparse["step_seconds"],
        "prefill_overhead": sparse["prompt_seconds"] / dense["prompt_seconds"] - 1,
        "select_steps": sparse["select_seconds"] / dense["step_seconds"],
        "extra_seconds": extra,
        "gain_seconds": dense["step_seconds"] - sparse["step_seconds"],
    }


def _break_even(rows: list[dict]) -> int | None:
    extra = statistics.median(r["extra_seconds"] for r in rows)
    gain = statistics.median(r["gain_seconds"] for r in rows)
    if extra <= 0:
        return 0
    return math.ceil(extra / gain) if gain > 0 else None


def _summary(rows: list[dict], prompt_tokens: int) -> dict[str, Any]:
    columns = {
        "prompt_tps": [prompt_tokens / r["prompt_seconds"] for r in rows],
        "generation_tps": [1 / r["step_seconds"] for r in rows],
        "peak_memory": [r["peak_memory"] for r in rows],
    }
    if "speedup" in rows[0]:
        columns |= {
            "select_ms": [1e3 * r["select_seconds"] for r in rows],
            **{key: [r[key] for r in rows] for key in ("select_steps", "prefill_overhead", "speedup", "compact_bytes")},
        }
    medians = {key: statistics.median(values) for key, values in columns.items()}
    return {**medians, "range": {key: [min(values), max(values)] for key, values in columns.items()}}


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's options for benchmark, and GLASS's."""
    parser = argparse.ArgumentParser(prog="glass_mlx.benchmark", description="Speed of GLASS against plain mlx-lm.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help=f"directory, Hub repository or alias (default: {DEFAULT_MODEL})")
    what.add_argument("--shape", choices=SHAPES, help="random weights of this model's shape, without a download")
    parser.add_argument("--layers", type=int, help="with --shape: so many layers, for small machines")
    parser.add_argument("--bits", type=int, choices=BITS, default=4, help="with --shape: of a weight (default: 4)")
    parser.add_argument("--density", type=list_of(density), default=[0.3, 0.5, 0.7], metavar="X[,X...]")
    parser.add_argument("--global-weight", type=global_weight, default=GlassConfig.global_weight, metavar="WEIGHT")
    parser.add_argument("--signal", choices=SIGNALS, default=GlassConfig.signal)
    parser.add_argument("--refresh", type=refresh, default=GlassConfig.refresh, metavar="TOKENS")
    parser.add_argument("--prompt-tokens", "-p", type=int, default=512, help="length of the prompt")
    parser.add_argument("--generation-tokens", "-g", type=int, default=256, help="tokens to generate")
    parser.add_argument("--num-trials", "-n", type=int, default=5, help="runs after a warm-up")
    parser.add_argument("--prefill-step-size", type=int, default=2048, help="tokens in a prefill call")
    parser.add_argument("--delay", type=float, default=0, help="seconds to wait before each run, to cool down")
    parser.add_argument("--seed", type=int, default=0, help="PRNG seed")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file; - prints them and nothing else")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw a picture (PNG)")
    add_verbose(parser)
    return parser


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if args.prompt_tokens < 2 or args.generation_tokens < 3 or args.num_trials < 1:
        parser.error("-p must be at least 2, -g at least 3, -n at least 1")
    if args.prefill_step_size < 1 or (args.layers is not None and args.layers < 1) or args.delay < 0:
        parser.error("--prefill-step-size and --layers must be at least 1, --delay not negative")
    if args.layers is not None and args.shape is None:
        parser.error("--layers goes with --shape")
    run(lambda: _benchmark(args), args.verbose)


def _benchmark(args: argparse.Namespace) -> None:
    choice = {"global_weight": args.global_weight, "signal": args.signal, "refresh": args.refresh}
    if args.shape:
        model = random_model(args.shape, args.layers, args.bits, args.seed)
        model.config = model.config.updated(**choice)
        name = f"{args.shape} shape, {len(model.dense.layers)} layers, {args.bits} bits, random weights"
    else:
        name = args.model or DEFAULT_MODEL
        model, _ = load(name, trust_remote_code=args.trust_remote_code, **choice)
    result = compare(
        model,
        args.density,
        args.prompt_tokens,
        args.generation_tokens,
        args.num_trials,
        args.seed,
        args.prefill_step_size,
        args.delay,
    )
    result = {"model": name, **result}
    if args.json == "-":
        print(json.dumps(result))
    else:
        print(table(result))
        if args.json:
            write_atomically(Path(args.json), lambda temporary: temporary.write_text(json.dumps(result, indent=1)))
    if args.plot:
        plot_benchmark(result, args.plot)


def table(result: dict[str, Any]) -> str:
    """The figures of ``compare``, for people."""
    lines = [
        f"{result['model']} on {result['machine']}, {result['backend']}",
        f"prompt {result['prompt_tokens']} tokens, {result['generation_tokens']} generated; "
        f"median [lowest, highest] of {result['runs']} runs",
        f"{'density':>8} {'prompt tok/s':>20} {'decode tok/s':>20} {'speed-up':>18} {'ceiling':>8} {'of it':>6} "
        f"{'recording':>20} {'select ms':>10} {'(steps)':>8} {'even at':>8} {'peak GB':>8}",
    ]
    for name, row in [("dense", result["dense"]), *result["glass"].items()]:
        cells = f"{name:>8} {_cell(row, 'prompt_tps'):>20} {_cell(row, 'generation_tps'):>20}"
        if name in result["speedup"]:
            even = row["break_even_tokens"]
            cells += (
                f" {_cell(row, 'speedup', '.2f'):>18} {result['ceiling'][name]:>8.2f}"
                f" {result['fraction_of_ceiling'][name]:>6.0%} {_cell(row, 'prefill_overhead', '.1%'):>20}"
                f" {row['select_ms']:>10.1f} {row['select_steps']:>8.2f} {'never' if even is None else even:>8}"
            )
        else:
            cells += " " * 85
        lines.append(f"{cells} {row['peak_memory'] / 1e9:>8.3f}")
    return "\n".join(lines)


def _cell(row: dict[str, Any], key: str, form: str = ".4g") -> str:
    low, high = row["range"][key]
    return f"{row[key]:{form}} [{low:{form}}, {high:{form}}]"


if __name__ == "__main__":
    main()
