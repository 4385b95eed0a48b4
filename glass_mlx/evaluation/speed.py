"""Speed and memory of sparse decoding against the same model in plain mlx-lm."""

from __future__ import annotations

import math
import statistics
import sys
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

from ..decoding.costs import DeviceClass, step_costs
from ..decoding.stream import PhasedModel
from ..model.glass_model import GlassModel
from ..model.memory import model_bytes
from .machine import machine, mlx_backend

# How many rows to time, and in how many layers in a row: more than fit into a processor's caches.
_ROWS, _PROJECTIONS = (1, 2, 3, 4, 6, 8, 10, 16, 32), 8


def time_run(model: nn.Module, prompt: mx.array, tokens: int, cache: list[Any], step_size: int = 2048) -> dict:
    """Time one run of mlx-lm's generation loop.

    Args:
        model (nn.Module): a GlassModel or an mlx-lm model.
        prompt (mx.array): tokens [n].
        tokens (int): number of tokens to generate, at least 3.
        cache (list): a new prompt cache of the model.
        step_size (int): tokens in a prefill call.

    Returns:
        dict: ``prompt_seconds`` to the first token, without ``select_seconds`` for choosing neurons and slicing;
        ``step_seconds`` of a decode step; ``peak_memory`` in bytes.
    """
    session = model.session(cache) if isinstance(model, GlassModel) else None
    driven = model if session is None else PhasedModel(model, prompt.size)
    mx.clear_cache()
    mx.reset_peak_memory()
    times, select = [], 0.0
    with wired_limit(model, [generation_stream]):
        tic = time.perf_counter()
        for _ in generate_step(prompt, driven, max_tokens=tokens, prompt_cache=cache, prefill_step_size=step_size):
            times.append(time.perf_counter())
            if len(times) == 1 and session is not None:
                select = session.selection_time  # mlx-lm's loop has begun the second token by now
    return {
        "prompt_seconds": times[0] - tic - select,
        "select_seconds": select,
        "step_seconds": (times[-1] - times[1]) / (tokens - 2),
        "peak_memory": mx.get_peak_memory(),
    }


def measure_device(model: GlassModel, calls: int = 5) -> DeviceClass:
    """This machine as a class of device, by the model's own input projections: what more rows in a call cost, and the
    bandwidth that reading the weights for one row reaches.

    Args:
        model (GlassModel): its first blocks' weights are read.
        calls (int): of which the fastest counts, after one to warm up.
    """
    blocks = [block for block in model.blocks if not block.experts][:_PROJECTIONS] or model.blocks[:_PROJECTIONS]
    projections = [block.module[block.inputs[0]] for block in blocks]
    # of routed experts the first one: all rows are its
    read = sum(model_bytes(p) // (block.experts or 1) for block, p in zip(blocks, projections))
    seconds = {}
    for rows in _ROWS:
        x = mx.random.normal((rows, blocks[0].input_size)).astype(blocks[0].dtype)
        routing = (mx.zeros((1,), mx.uint32),) if blocks[0].experts else ()
        seconds[rows] = min(_time([projection(x, *routing) for projection in projections]) for _ in range(calls + 1))
    bandwidth = read / seconds[1]
    relative = {rows: max(1.0, value / seconds[1]) for rows, value in seconds.items()}
    return DeviceClass(machine(), bandwidth, relative, f"measured, {mlx_backend()}")


def _time(arrays: list[mx.array]) -> float:
    start = time.perf_counter()
    mx.eval(arrays)
    return time.perf_counter() - start


def compare_speed(
    model: GlassModel,
    densities: list[float],
    prompt_tokens: int,
    tokens: int,
    trials: int,
    seed: int = 0,
    step_size: int = 2048,
    delay: float = 0,
) -> dict[str, Any]:
    """Compare speeds in alternating dense and sparse runs, with every density in every trial.

    Args:
        model (GlassModel): the model.
        densities (list[float]): to decode at.
        prompt_tokens (int): length of the random prompts.
        tokens (int): number of tokens to generate, at least 3.
        trials (int): runs after a warm-up.
        seed (int): of the prompts.
        step_size (int): tokens in a prefill call.
        delay (float): seconds to wait before each sparse run.

    Returns:
        dict: ``dense`` and, by density, ``glass`` with medians over the trials in tokens per second, milliseconds and
        bytes, and their lowest and highest under ``range``; ``speedup``, ``ceiling`` and ``fraction_of_ceiling`` by
        density. ``prefill_overhead`` is recording's share of the dense prefill; ``break_even_tokens`` is after how many
        tokens a new conversation is ahead of the dense model, prefill and selection included (None: never).
    """
    mx.random.seed(seed)
    vocabulary = model(mx.array([[0]])).shape[-1]
    dense_runs: list[dict] = []
    runs: dict[float, list[dict]] = {d: [] for d in densities}
    for trial in tqdm(range(trials + 1), unit="trial", file=sys.stderr, disable=None):
        prompt = mx.random.randint(0, vocabulary, (prompt_tokens,))
        dense = time_run(model.dense, prompt, tokens, make_prompt_cache(model.dense), step_size)
        if trial:  # the first trial warms up
            dense_runs.append(dense)
        for d in densities:
            time.sleep(delay)
            sparse = _sparse_run(model, d, prompt, tokens, step_size)
            if trial:
                runs[d].append(_against(dense, sparse))
    by_density = {f"{d:g}": rows for d, rows in runs.items()}
    speedups = {d: statistics.median(r["speedup"] for r in rows) for d, rows in by_density.items()}
    ceilings = {d: rows[-1]["ceiling"] for d, rows in by_density.items()}
    return {
        "machine": machine(),
        "backend": mlx_backend(),
        "runs": trials,
        "prompt_tokens": prompt_tokens,
        "generation_tokens": tokens,
        "dense": _summary(dense_runs, prompt_tokens),
        "glass": {
            d: {**_summary(rows, prompt_tokens), "break_even_tokens": break_even(rows)}
            for d, rows in by_density.items()
        },
        "speedup": speedups,
        "ceiling": ceilings,
        "fraction_of_ceiling": {d: speedups[d] / ceilings[d] for d in by_density},
    }


def _sparse_run(model: GlassModel, density: float, prompt: mx.array, tokens: int, step_size: int) -> dict:
    """Time a run at a density; the cache and its compact weights are freed before the next run's peak is measured."""
    cache = model.make_cache(density=density)
    run = time_run(model, prompt, tokens, cache, step_size)
    costs = step_costs(model, density, prompt.size + tokens)
    run["ceiling"] = costs.dense_step() / costs.sparse_step()
    run["compact_bytes"] = model.session(cache).compact_bytes
    return run


def _against(dense: dict, sparse: dict) -> dict:
    """A sparse run's figures, with those that compare it to the dense run of its trial."""
    extra = sparse["prompt_seconds"] + sparse["select_seconds"] - dense["prompt_seconds"]
    return {
        **sparse,
        "speedup": dense["step_seconds"] / sparse["step_seconds"],
        "prefill_overhead": sparse["prompt_seconds"] / dense["prompt_seconds"] - 1,
        "select_steps": sparse["select_seconds"] / dense["step_seconds"],
        "extra_seconds": extra,
        "gain_seconds": dense["step_seconds"] - sparse["step_seconds"],
    }


def break_even(rows: list[dict]) -> int | None:
    """After how many generated tokens runs are ahead of the dense model in the median; None: never."""
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
