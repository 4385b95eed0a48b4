"""Tests of the cost model: its bytes are those that real sessions hold, and its sums add up."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

from glass_mlx import GlassConfig, GlassError, GlassModel
from glass_mlx.decoding.costs import (
    DEVICES,
    LINKS,
    DeviceClass,
    LinkClass,
    StepCosts,
    cache_bytes,
    exchanges,
    plan,
    sharing_plan,
    step_costs,
)
from glass_mlx.decoding.draft_scheduler import tokens_per_pass
from glass_mlx.evaluation.shapes import SHAPES, empty_dense, empty_model, random_model
from glass_mlx.evaluation.tiny_models import tiny_model


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A small shape, whose embedding is no matter."""
    small = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 1536}
    monkeypatch.setitem(SHAPES, "small", SHAPES["qwen3-0.6b"] | small)


def ffn_bytes(block) -> int:
    return sum(a.nbytes for name in block.names for _, a in tree_flatten(block.module[name].parameters()))


def answered(model, tokens: int = 8) -> list:
    """A prompt cache in which an answer has begun."""
    cache = model.make_cache()
    model.prefill(mx.arange(1, tokens + 1)[None] % 8, cache)
    model.select(cache)
    return cache


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_cache(tied):
    """Counted by hand for a model whose embedding is its head, and one with a head of its own."""
    dense = tiny_model("llama")
    dense.args.tie_word_embeddings = tied
    if tied:
        dense.pop("lm_head", None)
    elif "lm_head" not in dense:
        dense.lm_head = nn.Linear(64, dense.args.vocab_size, bias=False)
    model = GlassModel(dense)
    cache = answered(model, 256)
    weights = sum(a.nbytes for _, a in tree_flatten(dense.parameters()))
    unread = 0 if tied else dense.model.embed_tokens.weight.nbytes
    costs = step_costs(model, model.config.density, 256)
    assert costs.dense == weights - unread
    assert costs.sparse == weights - unread - sum(map(ffn_bytes, model.blocks)) + model.session(cache).compact_bytes
    assert costs.cache == sum(a.nbytes for e in cache[:-1] for a in e.state if isinstance(a, mx.array))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "recurrent_gemma", "granitemoehybrid"])
def test_cache_bytes(family):
    """As many as a cache holds that is full: keys and values, windows, and states."""
    model = GlassModel(tiny_model(family))
    cache = model.make_cache()[:-1]
    model.dense(mx.ones((1, 240), mx.int32), cache=cache)
    for _ in range(16):
        model.dense(mx.array([[1]]), cache=cache)
    held = sum(a.nbytes for entry in cache for _, a in tree_flatten(entry.state) if isinstance(a, mx.array))
    assert cache_bytes(model, 256) == held


def test_a_projection_that_stays_whole_is_read_whole():
    dense = tiny_model("llama")
    nn.quantize(dense, group_size=32, bits=4)
    model = GlassModel(dense)
    cache = answered(model)
    costs = step_costs(model, 0.5, 8)
    inputs = sum(a.nbytes for b in model.blocks for n in b.inputs for a in b.module[n].parameters().values())
    answers = sum(a.nbytes for answer in model.session(cache).compact.answers for a in answer.arrays)
    assert costs.dense - costs.sparse == inputs / 2 - answers
    assert costs.compacting == inputs  # half of them, read and written


def test_measured_answers_count():
    """What a session reads to answer for dropped neurons is what the costs have, and less without it."""
    model = random_model("small", layers=1, bits=4)
    read = sum(a.nbytes for answer in answered(model)[-1].compact.answers for a in answer.arrays)
    costs = step_costs(model, 0.5, 8)
    model.config = model.config.updated(compensation=False)
    without = step_costs(model, 0.5, 8)
    assert costs.sparse - without.sparse == read
    assert (costs.answer_rows, without.answering) == (model.responses[0].rank + 1, 0)


def test_compacting_by_hand():
    """4-bit codes in groups of 64: rows are read and written; of columns all is read, and octets go to and fro."""
    costs = step_costs(empty_model("small", layers=1), 0.5, 8)
    hidden, size = 512, 1536
    k = size // 2
    row = hidden // 2 + hidden // 64 * 4  # codes, and a scale and a bias of 2 bytes for each group
    whole = hidden * (size // 2 + size // 64 * 4)
    compact = hidden * (k // 2 + k // 32 * 4)
    assert costs.compacting == 2 * 2 * k * row + whole + compact + 2 * hidden * k


def test_nothing_need_be_evaluated():
    empty, full = (make("small", layers=1) for make in (empty_model, random_model))
    full.dense.set_dtype(mx.bfloat16)
    full = GlassModel(full.dense)
    full.set_global_ranks(None, responses=empty.responses)
    assert step_costs(empty, 0.3, 100) == step_costs(full, 0.3, 100)


def test_density_1_costs_a_dense_step():
    costs = step_costs(GlassModel(tiny_model("llama")), 1.0, 8)
    assert costs.sparse_step() == costs.dense_step()
    assert all(costs.choice(device) == 0 for device in DEVICES)


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_rows(device):
    """What was measured is kept, more rows never cost less, and above a tile each tile costs the same."""
    assert device.cost(1) == 1
    assert all(device.cost(rows) == cost for rows, cost in device.rows.items())
    by_rows = [device.cost(rows) for rows in range(1, 200)]
    assert by_rows == sorted(by_rows)
    assert device.cost(64) == 2 * device.cost(32) and device.cost(65) == 3 * device.cost(32)


def test_tokens_per_pass():
    assert tokens_per_pass(0, 0.7) == 1
    assert tokens_per_pass(3, 1.0) == 4
    assert tokens_per_pass(3, 0.5) == pytest.approx((1 - 0.5**4) / 0.5)


@given(st.integers(0, 8), st.floats(0, 1), st.sampled_from(DEVICES))
def test_verified(drafted, acceptance, device):
    """Drafting nothing is a dense step; and never is it faster than the sparse model alone."""
    costs = StepCosts(dense=1000, sparse=600, cache=10, compacting=0, answering=0, answer_rows=0)
    assert costs.verified(0, acceptance, device) == costs.dense_step()
    assert costs.verified(drafted, acceptance, device) > costs.sparse_step()


def test_plan():
    model = empty_model("small", layers=1)
    rows = plan(model, [0.3, 1.0], context=64)
    assert [(row["density"], row["device"]) for row in rows] == [(d, c.name) for d in (0.3, 1.0) for c in DEVICES]
    for row in rows:
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["sparse_ms"])
        assert all(v["speedup"] >= 1 for v in row["verified"].values())  # drafting nothing is among the choices
        if row["density"] == 1:
            assert row["speedup"] == 1 and row["break_even_tokens"] is None


@pytest.mark.parametrize("shape", ["small", "routed"])
def test_sharing_plan(monkeypatch, shape):
    """Machines read what adds up to the whole model's bytes but for what each has whole; and links cost time only."""
    routed = {
        "vocab_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "hidden_size": 512,
    }
    monkeypatch.setitem(SHAPES, "routed", SHAPES["qwen3-30b-a3b"] | routed)
    model = empty_model(shape, layers=1)
    parts = {count: empty_dense(shape, layers=1) for count in (2, 4)}
    links = [LinkClass("none", 0.0, ""), *LINKS]
    rows = sharing_plan(model, parts, [1.0, 0.5], 64, DEVICES[:1], links)
    assert len(rows) == 2 * 2 * len(links)
    norms = sum(m.weight.nbytes for m in model.dense.modules() if isinstance(m, nn.RMSNorm))
    embedding = sum(a.nbytes for a in model.dense.model.embed_tokens.values() if isinstance(a, mx.array))
    for row in rows:
        costs, count = step_costs(model, row["density"], 64), row["machines"]
        extra = row["bytes"] * count - costs.sparse_step()  # read by more than one
        routers = 4 * 512 * 2 if shape == "routed" else 0  # at 16 bits at most
        everywhere = norms + costs.answers + (embedding if shape == "small" else 2 * embedding) + routers
        assert 0 < extra <= (count - 1) * everywhere + count
        assert row["exchange_ms"] == 2e3 * next(link.seconds for link in links if link.name == row["link"])
        if row["link"] == "none" and row["density"] == 1:
            assert 1 < row["speedup"] <= count and row["speedup_here"] == 1


@pytest.mark.parametrize("shape, count", [("gemma-3-4b", 2), ("small", 3)])
def test_what_cannot_be_shared(monkeypatch, shape, count):
    monkeypatch.setitem(SHAPES, "small", SHAPES["small"] | SHAPES[shape] | {"vocab_size": 64, "intermediate_size": 512})
    with pytest.raises(GlassError, match=f"between {count} machines"):
        sharing_plan(empty_model("small", layers=1), {count: empty_dense("small", layers=1)}, [1.0], 64)


def test_one_process_exchanges_nothing():
    assert exchanges(empty_model("small", layers=1)) == {}


def test_routed_experts_are_read_as_far_as_a_token_is_sent_to_them():
    """Two of four experts a step, dense and sparse; all of them are compacted. A call over many tokens reads all."""
    dense = tiny_model("mixtral")
    nn.quantize(dense, group_size=64, bits=4, class_predicate=lambda _, m: isinstance(m, SwitchLinear))
    model = GlassModel(dense, GlassConfig(experts="sparse"))
    cache = answered(model)
    weights = sum(a.nbytes for _, a in tree_flatten(dense.parameters())) - dense.model.embed_tokens.weight.nbytes
    experts, compact = sum(map(ffn_bytes, model.blocks)), model.session(cache).compact_bytes
    costs = step_costs(model, 0.5, 8)
    assert (costs.dense, costs.routed, costs.share) == (weights - experts / 2, experts / 2, 0.5)
    assert costs.sparse == weights - experts + compact / 2
    assert costs.compacting > compact and costs.answering == 0  # without responses dropped neurons add nothing
    once, many = costs.dense_call(1, FLAT), costs.dense_call(32, FLAT)
    assert once == costs.dense_step() and many == pytest.approx(weights + costs.cache, rel=1e-6)


FLAT = DeviceClass("as fast for any rows", 1e9, {1: 1, 32: 1}, "")
