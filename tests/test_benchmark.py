"""Tests of the benchmark: that it runs what it says, and reports it; no figure is judged."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from glass_mlx.benchmark import main, plan_table, sharing_table, table
from glass_mlx.evaluation.shape_configs import SHAPES
from glass_mlx.evaluation.speed import break_even, compare_speed, measure_device, time_run

MEASURED = {"prompt_tps", "generation_tps", "peak_memory"}


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


@pytest.fixture
def shape(monkeypatch) -> str:
    """A shape with few words: making its random embeddings takes longer than all else."""
    monkeypatch.setitem(SHAPES, "qwen3-0.6b", SHAPES["qwen3-0.6b"] | {"vocab_size": 512})
    return "qwen3-0.6b"


def test_densities_are_decoded_as_asked(tiny, monkeypatch):
    model, _ = tiny
    widths = []
    decode = type(model).decode

    def spy(self, inputs, cache, **kwargs):
        widths.append(self.session(cache).compact.projections[0]["down_proj"].weight.shape[1])
        return decode(self, inputs, cache, **kwargs)

    monkeypatch.setattr(type(model), "decode", spy)
    result = compare_speed(model, [0.25, 0.5], prompt_tokens=8, tokens=4, trials=1, seed=0)
    assert set(widths) == {24, 48}
    assert set(result["glass"]) == {"0.25", "0.5"} == set(result["speedup"])
    for name, row in result["glass"].items():
        low, high = row["range"]["speedup"]
        assert low <= row["speedup"] <= high
        assert row["speedup"] == result["speedup"][name]
        assert result["fraction_of_ceiling"][name] == pytest.approx(row["speedup"] / result["ceiling"][name])
        answers = sum(4 * block.output_size for block in model.blocks)  # the mean of what is dropped
        assert row["compact_bytes"] == pytest.approx(float(name) * sum(map(ffn_bytes, model.blocks)) + answers)
    assert result["ceiling"]["0.25"] > result["ceiling"]["0.5"] > 1


def ffn_bytes(block) -> int:
    projections = [block.module[name] for name in (*block.inputs, block.output)]
    return sum(a.nbytes for p in projections for _, a in tree_flatten(p.parameters()))


def test_density_1_reads_what_the_dense_model_reads(tiny):
    model, _ = tiny
    result = compare_speed(model, [1.0], prompt_tokens=8, tokens=4, trials=1)
    assert result["ceiling"] == {"1": 1.0}
    assert result["glass"]["1"]["select_ms"] == result["glass"]["1"]["compact_bytes"] == 0


def test_measure_counts_tokens(tiny):
    model, _ = tiny
    cache = model.make_cache()
    run = time_run(model, mx.arange(1, 9), 5, cache, step_size=3)
    assert model.session(cache).offset == 8 + 5
    assert model.session(cache).prompt_tokens == 8
    assert run["select_seconds"] == model.session(cache).selection_time > 0
    assert run["peak_memory"] >= sum(a.nbytes for _, a in tree_flatten(model.dense.parameters()))


@pytest.mark.parametrize(
    ("extra", "gain", "expected"), [(1.0, 0.25, 4), (1.0, 0.3, 4), (1.0, -0.1, None), (-0.5, -0.1, 0), (1.0, 0.0, None)]
)
def testbreak_even(extra, gain, expected):
    assert break_even([{"extra_seconds": extra, "gain_seconds": gain}]) == expected


def test_the_command_line(invoke, tiny_dir, drawn, tmp_path):
    options = ["--model", tiny_dir, "-p", 8, "-g", 4, "-n", 2, "--density", "0.3,0.5"]
    outcome = invoke(main, *options, "--json", tmp_path / "figures.json", "--plot", tmp_path / "speed.png")
    assert outcome.code == 0
    result = json.loads((tmp_path / "figures.json").read_text())
    assert {"machine", "backend", "model", "runs", "dense", "glass", "speedup", "ceiling"} <= set(result)
    assert MEASURED <= set(result["dense"])
    extra = {"select_ms", "prefill_overhead", "break_even_tokens"}
    assert all(MEASURED | extra <= set(row) for row in result["glass"].values())
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"
    assert outcome.out.strip() == table(result).strip()
    assert [line.split()[0] for line in outcome.out.splitlines()[3:]] == ["dense", "0.3", "0.5"]
    printed = invoke(main, "--model", tiny_dir, "-p", 2, "-g", 3, "-n", 1, "--density", "0.5", "--json", "-")
    assert printed.code == 0 and MEASURED <= set(json.loads(printed.out)["dense"])


def test_a_plan_for_several_machines(invoke, shape):
    options = ["--shape", shape, "--layers", 1, "--density", "0.5", "--plan", "--machines", "2,4"]
    written = json.loads(invoke(main, *options, "--json", "-").out)
    assert written["predicted"] and {row["machines"] for row in written["plan"]} == {2, 4}
    shown = sharing_table(written)
    assert all(name in shown for name in written["links"]) and "PREDICTED" in shown


@pytest.mark.parametrize("options", [("--machines", "2"), ("--shape", "qwen3-0.6b", "--plan", "--machines", "1")])
def test_machines_are_for_plans(invoke, options):
    done = invoke(main, *options)
    assert done.code == 2 and "--machines" in done.err


def test_a_plan(invoke, shape, tmp_path):
    """It is labelled as predicted, needs no weights, and is the same as its JSON."""
    options = ["--shape", shape, "--layers", 1, "--density", "0.3,0.5", "--plan"]
    outcome = invoke(main, *options, "--json", tmp_path / "plan.json")
    assert outcome.code == 0
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["predicted"] and outcome.out.strip() == plan_table(written).strip()
    assert "PREDICTED" in outcome.out
    assert all(device["source"] for device in written["devices"].values())
    assert len(written["plan"]) == 2 * len(written["devices"])
    for memory in written["memory"].values():  # without the dense FFN weights less is held, and no more is needed
        assert memory["low_memory_decoding"] < memory["decoding"] <= memory["needed"] >= memory["low_memory_needed"]


def test_tables_fit_a_terminal(invoke, tiny_dir, shape, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("glass_mlx.evaluation.tables.sys.stdout.isatty", lambda: True)
    for options in (
        ["-p", 2, "-g", 3, "-n", 1, "--model", tiny_dir],
        ["--plan", "--shape", shape, "--layers", 1],
    ):
        outcome = invoke(main, *options, "--density", "0.5")
        assert outcome.code == 0 and max(map(len, outcome.out.splitlines())) <= 80


def test_this_machine_as_a_device(tiny):
    device = measure_device(tiny[0], calls=1)
    assert device.cost(1) == 1 and device.bandwidth > 0 and device.source.startswith("measured")


@pytest.mark.parametrize(
    "options",
    [
        ["--density", "0.5,0"],
        ["-g", "2"],
        ["-p", "1"],
        ["-n", "0"],
        ["--shape", "gpt-9"],
        ["--layers", "2"],
        ["--shape", "mistral-7b", "--layers", "0"],
        ["--shape", "mistral-7b", "--model", "demo"],
        ["--shape", "mistral-7b", "--bits", "5"],
        ["--delay", "-1"],
    ],
)
def test_usage_errors(invoke, options):
    outcome = invoke(main, *options)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err


def test_a_picture_that_cannot_be_written(invoke, tiny_dir, drawn):
    outcome = invoke(main, "--model", tiny_dir, "-p", 8, "-g", 4, "-n", 1, "--plot", tiny_dir / "config.json" / "a.png")
    assert outcome.code == 1 and len(outcome.err.strip().splitlines()) == 1
