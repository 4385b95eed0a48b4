"""Tests of true shapes: their sizes are the models', and small ones of them run."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from glass_mlx.evaluation.shape_configs import BITS
from glass_mlx.evaluation.shapes import SHAPES, build, random_model

# In billions, as the models' cards have them.
PARAMETERS = {
    "mistral-7b": 7.248,
    "llama-3.1-8b": 8.030,
    "llama-3.2-1b": 1.236,
    "llama-3.2-3b": 3.213,
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.721,
    "qwen3-4b": 4.022,
    "qwen3-8b": 8.191,
    "qwen3-14b": 14.768,
    "gemma-3-4b": 3.880,
    "qwen3-30b-a3b": 30.532,
    "gpt-oss-20b": 20.915,
    "llama-3.3-70b": 70.554,
    "qwen3-235b-a22b": 235.094,
}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters(name):
    assert sum(a.size for _, a in tree_flatten(build(name).parameters())) / 1e9 == pytest.approx(
        PARAMETERS[name], abs=6e-4
    )


@pytest.fixture
def small(monkeypatch):
    config = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 64}
    config |= {"num_key_value_heads": 2, "head_dim": 32}
    monkeypatch.setitem(SHAPES, "small", {**SHAPES["qwen3-4b"], **config})


@pytest.mark.parametrize("bits", BITS)
def test_random_model(small, bits):
    model = random_model("small", layers=3, bits=bits)
    assert len(model.blocks) == 3
    down = model.blocks[0].module.down_proj
    if bits < 16:
        assert isinstance(down, nn.QuantizedLinear) and (down.bits, down.group_size) == (bits, 64)
    else:
        assert down.weight.dtype == {16: mx.bfloat16, 32: mx.float32}[bits]
    ranks = model.global_ranks["impact"][0]
    assert sorted(ranks.tolist()) == list(range(1, 257))
    logits = model(mx.arange(8)[None]).astype(mx.float32)
    assert 0.1 < mx.std(logits).item() < 10  # of about unit gain: nothing overflows in a deep model
    again = random_model("small", layers=3, bits=bits)
    assert mx.array_equal(again(mx.arange(8)[None]), model(mx.arange(8)[None]))
