"""Tests of the memory plan: its parts are what real conversations hold, and its sum is their most."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from glass_mlx import GlassModel, load
from glass_mlx.core.slicing import ScatterLinear
from glass_mlx.decoding import memory_plan
from glass_mlx.decoding.memory_plan import MemoryPlan, plan_memory
from glass_mlx.evaluation.shapes import SHAPES, random_model
from glass_mlx.evaluation.tiny_models import tiny_config, tiny_model
from glass_mlx.model.memory import model_bytes


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_parts(density):
    model = GlassModel(tiny_model("llama"))
    model.config = model.config.updated(density=density, compensation=False)
    cache = model.make_cache()
    model.prefill(mx.ones((1, 256), mx.int32), cache)
    model.select(cache)
    plan = plan_memory(model, context=256)
    assert plan.model == model_bytes(model.dense)
    assert plan.compact == model.session(cache).compact_bytes * (density < 1)
    assert plan.cache == sum(a.nbytes for e in cache[:-1] for a in e.state if isinstance(a, mx.array))


def test_prefill_is_near_what_a_call_takes(monkeypatch):
    """An estimate: it is neither a small part of what a call takes here nor many times as much."""
    small = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 256}
    monkeypatch.setitem(SHAPES, "small", SHAPES["qwen3-0.6b"] | small)
    monkeypatch.setattr(memory_plan, "STEP", 64)
    model = random_model("small", bits=32)
    plan, cache = plan_memory(model, context=256), model.make_cache()
    model._plan.norms()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model.prefill(mx.ones((1, 64), mx.int32), cache)
    mx.eval([entry.state for entry in cache])
    took = mx.get_peak_memory() - before - plan.cache
    assert 0.4 * took < plan.prefill < 2.5 * took


@pytest.mark.parametrize("group", [32, 64])
def test_weights_that_stay_whole_are_not_let_go_of(group):
    """Output projections in groups of 32, which are read whole."""
    dense = tiny_model("mixtral")
    nn.quantize(dense, group, 4, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] >= 64)
    model = GlassModel(dense)
    cache = model.make_cache()
    model.prefill(mx.ones((1, 8), mx.int32), cache)
    model.select(cache)
    pairs = zip(model.blocks, model.session(cache).compact.projections)
    whole = sum(
        block.module[name].parameters()[key].nbytes
        for block, projections in pairs
        for name, projection in projections.items()
        if isinstance(projection, ScatterLinear)
        for key in block.module[name].parameters()
    )
    assert (whole > 0) == (group == 32)
    assert plan_memory(model).ffn == sum(block.nbytes for block in model.blocks) - whole


def test_the_sum():
    plan = MemoryPlan(model=100, ffn=60, compact=30, cache=5, prefill=10, context=8, available=120)
    assert plan.needed == 135 and not plan.fits
    saving = replace(plan, low_memory=True)
    assert saving.needed == 115 and saving.fits
    assert replace(saving, making=12).needed == 117  # before anything was let go of
    assert "--low-memory" in str(saving) and "--low-memory" not in str(plan)


@pytest.fixture
def lack(monkeypatch, tiny_dir):
    """Say how many bytes of what it needs a device has too few; returns the model that is loaded then."""

    def loaded(bytes_short: int, **options) -> GlassModel:
        needed = plan_memory(load(tiny_dir, stats=False, low_memory=False)[0]).needed
        monkeypatch.setattr(memory_plan, "available_memory", lambda: needed - bytes_short)
        return load(tiny_dir, stats=False, **options)[0]

    return loaded


@pytest.fixture
def no_prefill(monkeypatch):
    monkeypatch.setattr(memory_plan, "STEP", 0)


def test_enough_memory(lack, no_prefill, caplog):
    assert not lack(0).low_memory
    assert "WARNING" not in caplog.text


def test_dense_weights_are_let_go_of_where_memory_is_short(lack, no_prefill, caplog):
    model = lack(1)
    assert model.low_memory and "from disk" in caplog.text
    cache = model.make_cache()
    model.prefill(mx.array([[1, 2, 3]]), cache)
    model.select(cache)
    assert mx.all(mx.isfinite(model.decode(mx.array([[4]]), cache))).item()


def test_what_was_said_is_done(lack, no_prefill, caplog):
    assert not lack(1, low_memory=False).low_memory
    assert "smaller model" in caplog.text


def test_no_way_to_fit(lack, no_prefill, caplog):
    assert lack(10**9).low_memory and "smaller model" in caplog.text


def test_routed_experts_stay_dense_where_memory_is_short(model_copy, no_prefill, monkeypatch, caplog):
    """That comes first, and is enough where the model itself fits; only what is still missing is read from disk."""
    (model_copy / "config.json").write_text(json.dumps(tiny_config("mixtral")))
    weights = dict(tree_flatten(tiny_model("mixtral").parameters()))
    mx.save_safetensors(str(model_copy / "model.safetensors"), weights)
    whole, _ = load(model_copy, stats=False, low_memory=False)
    needed, compact = plan_memory(whole).needed, plan_memory(whole).compact
    assert compact > 0 and whole.config.experts == "sparse"
    for short, experts, told in ((0, "sparse", 0), (1, "dense", 1), (compact, "dense", 1), (compact + 1, "dense", 2)):
        caplog.clear()
        monkeypatch.setattr(memory_plan, "available_memory", lambda short=short: needed - short)
        model, _ = load(model_copy, stats=False)
        assert model.config.experts == experts and not model.low_memory and len(caplog.records) == told
    assert re.search(r"stay dense. With --low-memory a token would read [1-9]\d? % less", caplog.text)
    assert load(model_copy, stats=False, low_memory=True)[0].config.experts == "sparse"
