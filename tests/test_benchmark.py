"""Tests of the benchmark: that it runs what it says, and reports it; no figure is judged."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from glass_mlx.benchmark import compare, main, measure


def test_densities_are_decoded_as_asked(tiny, monkeypatch):
    model, _ = tiny
    widths = []
    decode = type(model)._decode

    def spy(self, session, *args):
        out = decode(self, session, *args)
        widths.append(session.compact[0]["down_proj"].weight.shape[1])
        return out

    monkeypatch.setattr(type(model), "_decode", spy)
    result = compare(model, [0.25, 0.5], prompt_tokens=8, tokens=4, trials=1, seed=0)
    assert set(widths) == {24, 48}
    assert set(result["glass"]) == {"0.25", "0.5"}
    for row in result["glass"].values():
        assert row["speedup"]["min"] <= row["speedup"]["median"] <= row["speedup"]["max"]


def test_measure_counts_tokens(tiny):
    model, _ = tiny
    cache = model.make_cache()
    measure(model, mx.arange(1, 9), 5, cache)
    assert model.session(cache).offset == 8 + 5
    assert model.session(cache).prompt_tokens == 8


def test_the_command_line(invoke, tiny_dir):
    outcome = invoke(main, "--model", tiny_dir, "-p", 8, "-g", 4, "-n", 1, "--density", "0.3,0.5", "--json")
    result = json.loads(outcome.out)
    assert outcome.code == 0
    assert {"machine", "backend", "model", "runs", "dense", "glass", "prefill_overhead"} <= set(result)
    assert {"prompt_tps", "generation_tps"} <= set(result["dense"])


@pytest.mark.parametrize("options", [["--density", "0.5,0"], ["-g", "2"], ["-p", "1"], ["-n", "0"]])
def test_usage_errors(invoke, options):
    outcome = invoke(main, *options)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
