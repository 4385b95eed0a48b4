"""Speed and memory of GLASS against the same model in plain mlx-lm.

    python -m glass_mlx.benchmark --model demo --density 0.3,0.5,0.7
    python -m glass_mlx.benchmark --shape mistral-7b --bits 4
    python -m glass_mlx.benchmark --shape mistral-7b --plan  # predicted for Macs, without running anything

Dense and sparse runs alternate in one process, on the same random prompts. The figures are medians and ranges. The byte
ceiling is the speed-up of a decoder that is limited by memory bandwidth alone: the bytes that a dense decode step reads
divided by those of a sparse one, weights and KV cache.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .cli import checks
from .cli.options import add_choice_options, add_densities, add_model_or_shape, add_trust, add_verbose
from .cli.output import print_result
from .cli.parser import Parser
from .cli.running import run
from .cli.values import list_of, positive
from .evaluation.tables import text_table
from .group import gather, rank, size, together
from .hub.names import DEFAULT_MODEL

if TYPE_CHECKING:
    from .decoding.memory_plan import MemoryPlan
    from .model.glass_model import GlassModel

IDLE = (
    checks.SHAPE,
    checks.Idle("trust_remote_code", beside="shape"),
    checks.Idle("global_weight signal num_trials prefill_step_size delay seed plot", beside="plan"),
)

_HEADS = (
    *("density", "prompt tok/s", "decode tok/s", "peak GB", "speed-up", "ceiling", "of it", "recording"),
    *("select ms", "(steps)", "even at"),
)


def setup_arg_parser() -> argparse.ArgumentParser:
    """The options of mlx-lm's benchmark, and GLASS's."""
    parser = Parser("glass_mlx.benchmark", description="Measure the speed of GLASS against plain mlx-lm.")
    add_model_or_shape(parser)
    add_densities(parser)
    add_choice_options(parser, "global_weight", "signal", "experts")
    parser.add_argument("--prompt-tokens", "-p", type=int, default=512, help="length of the prompt")
    parser.add_argument("--generation-tokens", "-g", type=int, default=256, help="tokens to generate")
    parser.add_argument("--num-trials", "-n", type=int, default=5, help="runs after a warm-up")
    parser.add_argument(
        "--prefill-step-size", type=int, default=2048, help="read the prompt in calls of this many tokens"
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="measure nothing, but predict how fast each way to decode is on several Macs",
    )
    parser.add_argument(
        "--machines",
        type=list_of(positive),
        metavar="N[,N...]",
        help="with --plan and --shape: predict it for N machines that share the model",
    )
    parser.add_argument("--delay", type=float, default=0, help="seconds to wait before each run, to cool down")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers")
    add_trust(parser)
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file; - prints them and nothing else")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw a PNG (pip install 'glass_mlx[plot]')")
    add_verbose(parser)
    return parser


def main() -> None:
    parser = setup_arg_parser()
    args = parser.parse_args()
    if args.prompt_tokens < 2 or args.generation_tokens < 3 or args.num_trials < 1:
        parser.error("-p must be at least 2, -g at least 3, -n at least 1")
    if args.prefill_step_size < 1 or args.delay < 0:
        parser.error("--prefill-step-size must be at least 1, --delay not negative")
    checks.check_together(parser, args, IDLE)
    if args.machines is not None and (not args.plan or args.shape is None or min(args.machines) < 2):
        parser.error("--machines goes with --plan and --shape, and is at least 2")
    run(together(lambda: _benchmark(args)), args.verbose)


def _benchmark(args: argparse.Namespace) -> None:
    if args.plan:
        _plan(args)
        return
    from .evaluation.shapes import random_model, shape_label
    from .evaluation.speed import compare_speed
    from .loading import load
    from .sharded_loading import sharded_load

    shared = mx.distributed.init() if size() > 1 else None
    choice = {"global_weight": args.global_weight, "signal": args.signal, "experts": args.experts}
    if args.shape:
        model = random_model(args.shape, args.layers, args.bits, args.seed, shared)
        model.config = model.config.updated(**choice)
        name = shape_label(args.shape, model, args.bits)
    else:
        name = args.model or DEFAULT_MODEL
        load_it = load if shared is None else sharded_load
        model, _ = load_it(name, trust_remote_code=args.trust_remote_code, **choice)
    figures = compare_speed(
        model,
        args.density,
        args.prompt_tokens,
        args.generation_tokens,
        args.num_trials,
        args.seed,
        args.prefill_step_size,
        args.delay,
    )
    result = {"model": name, **figures}
    if shared is not None:
        result["group"] = _of_group(model, args.density, args.prompt_tokens + args.generation_tokens)
    if size() > 1 and rank() > 0:  # the first process writes the files
        return
    print_result(result, table, args.json)
    if args.plot:
        from .evaluation.plot import plot_benchmark

        plot_benchmark(result, args.plot)


def _of_group(model: GlassModel, densities: list[float], context: int) -> dict[str, Any]:
    """What the processes that share a model read and exchange for a token."""
    from .decoding.costs import exchanges, sent_bytes, step_costs

    costs = {f"{d:g}": step_costs(model, d, context) for d in densities}
    dense = next(iter(costs.values())).dense_step()
    everywhere = gather([dense, *(own.sparse_step() for own in costs.values())])
    return {
        "of": str(model.part.whole),
        "exchanges": exchanges(model),
        "sent_bytes": sent_bytes(model),
        "ranks": [
            {
                "dense_bytes": dense,
                "bytes": dict(zip(costs, own)),
                "ceiling": {d: dense / n for d, n in zip(costs, own)},
            }
            for dense, *own in everywhere
        ],
    }


def _plan(args: argparse.Namespace) -> None:
    if args.machines:
        _plan_sharing(args)
        return
    from .decoding.costs import DEVICES, plan
    from .decoding.memory_plan import plan_memory
    from .evaluation.machine import backend
    from .evaluation.shapes import empty_model, shape_label
    from .evaluation.speed import measure_device
    from .loading import load

    if args.shape:
        model = empty_model(args.shape, args.layers, args.bits)
        name = shape_label(args.shape, model, args.bits).removesuffix(", random weights")
    else:
        name = args.model or DEFAULT_MODEL
        model, _ = load(name, trust_remote_code=args.trust_remote_code)
    model.config = model.config.updated(experts=args.experts)
    context = args.prompt_tokens + args.generation_tokens // 2
    devices = [*DEVICES] if backend() == "cpu" else [*DEVICES, measure_device(model)]  # a CPU says nothing about Macs
    result = {
        "model": name,
        "predicted": True,
        "context": context,
        "devices": {d.name: {"bandwidth": d.bandwidth, "rows": d.rows, "source": d.source} for d in devices},
        "plan": plan(model, args.density, context, devices=devices),
        "memory": {f"{d:g}": _memory(plan_memory(model, context, d)) for d in args.density},
    }
    print_result(result, plan_table, args.json)


def _memory(plan: MemoryPlan) -> dict[str, int]:
    """Bytes at most and while decoding, as the dense FFN weights stay or not."""
    usual, low = (replace(plan, low_memory=low_memory) for low_memory in (False, True))
    return {
        "needed": usual.needed,
        "decoding": usual.decoding,
        "low_memory_needed": low.needed,
        "low_memory_decoding": low.decoding,
    }


def _plan_sharing(args: argparse.Namespace) -> None:
    from .decoding.costs import LINKS, sharing_plan
    from .evaluation.shapes import empty_dense, empty_model, shape_label

    model = empty_model(args.shape, args.layers, args.bits)
    model.config = model.config.updated(experts=args.experts)
    shared = {count: empty_dense(args.shape, args.layers, args.bits) for count in args.machines}
    context = args.prompt_tokens + args.generation_tokens // 2
    result = {
        "model": shape_label(args.shape, model, args.bits).removesuffix(", random weights"),
        "predicted": True,
        "context": context,
        "links": {link.name: link.source for link in LINKS},
        "plan": sharing_plan(model, shared, [1.0, *args.density], context),
    }
    print_result(result, sharing_table, args.json)


def sharing_table(result: dict[str, Any]) -> str:
    """A plan for several machines as text."""
    lines = [
        f"{result['model']}, {result['context']:,} tokens in the cache, tensor parallel",
        "PREDICTED from bytes at full memory bandwidth and published latencies, not measured",
        "",
        f"{'':43}{'GB on':>7} {'ms to':>7} {'ms to':>9} {'speed-up over':>18}",
        f"{'machines':8} {'link':34}{'each':>7} {'read':>7} {'exchange':>9} {'one dense':>10} {'as many':>7}",
    ]
    for (device, share), rows in itertools.groupby(result["plan"], lambda row: (row["device"], row["density"])):
        lines.append(f"{device}, density {share:g}")
        lines += [
            f"{row['machines']:>8} {row['link']:34}{row['bytes'] / 1e9:>7.2f} {row['read_ms']:>7.2f}"
            f" {row['exchange_ms']:>9.2f} {row['speedup']:>10.2f} {row['speedup_here']:>7.2f}"
            for row in rows
        ]
    return "\n".join([*lines, "", *(f"{name}: {source}" for name, source in result["links"].items())])


def plan_table(result: dict[str, Any]) -> str:
    """A plan as text."""
    here = [name for name, d in result["devices"].items() if d["source"].startswith("measured")]
    label = {name: "this one" if name in here else name for name in result["devices"]}
    heads = ("density", "device", "dense ms", "sparse ms", "speed-up", "choice", "even at", "reread")
    lines = [
        f"{result['model']}, {result['context']:,} tokens in the cache",
        "PREDICTED from bytes at full memory bandwidth, not measured",
        "",
        *text_table(
            (*heads, *(f"verified {accepted}" for accepted in result["plan"][0]["verified"])),
            [_plan_row(label[row["device"]], row) for row in result["plan"]],
            names=2,
        ),
        "",
        "dense ms, sparse ms: the time of a token",
        "choice: choosing neurons and compacting, in dense steps; even at: the tokens that make it good",
        "reread: what a token of an answer costs when the next prompt reads it again, in dense steps",
        "verified: by the probability that a draft is accepted, how many tokens to draft, and the speed-up",
        "",
        "memory in GB, at most and while decoding, and with --low-memory:",
        *text_table(
            ("density", "needed", "decoding", "--low-memory", "decoding"),
            [(d, *(f"{size / 1e9:.1f}" for size in sizes.values())) for d, sizes in result["memory"].items()],
        ),
        "",
        "the time of a call by its rows, relative to one row:",
    ]
    for name, d in result["devices"].items():
        rows = " ".join(f"{n}:{cost:.3g}" for n, cost in d["rows"].items())
        lines.append(f"{label[name]:10} {d['bandwidth'] / 1e9:.0f} GB/s  {rows}  ({d['source']})")
    return "\n".join(lines + [f"this one: {name}" for name in here])


def _plan_row(device: str, row: dict[str, Any]) -> list[str]:
    figures = (f"{row[key]:.2f}" for key in ("dense_ms", "sparse_ms", "speedup", "choice_steps"))
    even, verified = row["break_even_tokens"], row["verified"].values()
    return [
        *(f"{row['density']:g}", device, *figures, "never" if even is None else f"{even:.0f}"),
        *(f"{row['reread_steps']:.2f}", *(f"{v['draft']}: {v['speedup']:.2f}" for v in verified)),
    ]


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"{result['model']} on {result['machine']}, {result['backend']}",
        f"prompt {result['prompt_tokens']} tokens, {result['generation_tokens']} generated; "
        f"median [lowest, highest] of {result['runs']} runs",
    ]
    rows = [_row(name, row, result) for name, row in [("dense", result["dense"]), *result["glass"].items()]]
    return "\n".join([*lines, *text_table(_HEADS, rows), *(_group_lines(result["group"]) if "group" in result else [])])


def _group_lines(group: dict[str, Any]) -> list[str]:
    exchanges = ", ".join(f"{times} {name}" for name, times in group["exchanges"].items())
    lines = [f"shared: {group['of']}; each token {exchanges}; a rank sends {group['sent_bytes'] / 1e3:.4g} kB (ring)"]
    for i, own in enumerate(group["ranks"]):
        read = ", ".join(f"{own['bytes'][d] / 1e6:.4g} at {d} (ceiling {c:.2f})" for d, c in own["ceiling"].items())
        lines.append(f"rank {i} reads {own['dense_bytes'] / 1e6:.4g} MB a token dense, {read}")
    return lines


def _row(name: str, row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    cells = [name, _cell(row, "prompt_tps"), _cell(row, "generation_tps"), f"{row['peak_memory'] / 1e9:.3f}"]
    if name not in result["speedup"]:
        return cells + [""] * (len(_HEADS) - len(cells))
    even = row["break_even_tokens"]
    return [
        *(*cells, _cell(row, "speedup", ".2f"), f"{result['ceiling'][name]:.2f}"),
        *(f"{result['fraction_of_ceiling'][name]:.0%}", _cell(row, "prefill_overhead", ".1%")),
        *(f"{row['select_ms']:.1f}", f"{row['select_steps']:.2f}", "never" if even is None else f"{even}"),
    ]


def _cell(row: dict[str, Any], key: str, form: str = ".4g") -> str:
    low, high = row["range"][key]
    return f"{row[key]:{form}} [{low:{form}}, {high:{form}}]"


if __name__ == "__main__":
    main()
