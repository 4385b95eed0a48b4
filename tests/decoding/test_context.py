"""Tests of how long a conversation may be, and that generation keeps to it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from glass_mlx import GlassError, generate, stream_generate
from glass_mlx.decoding.prompt import context_length

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}


@pytest.mark.parametrize(
    ("config", "tokenizer", "length"),
    [
        ({"max_position_embeddings": 2048}, 512, 2048),
        ({"max_position_embeddings": 1000, "rope_scaling": YARN}, 512, 4000),
        ({"max_position_embeddings": 131072, "rope_scaling": {**YARN, "factor": 8.0}}, 512, 131072),  # is said already
        ({"max_position_embeddings": 1000, "rope_scaling": {"type": "linear", "factor": 2}}, 512, 2000),
        ({"max_position_embeddings": 1000, "rope_scaling": {"rope_type": "default"}}, 512, 1000),
        ({"text_config": {"max_position_embeddings": 300}}, 512, 300),
        ({}, 512, 512),
        ({}, int(1e30), None),
        ({}, None, None),
    ],
)
def test_context_length(config, tokenizer, length):
    model = SimpleNamespace(args=SimpleNamespace(**config))
    assert context_length(model, SimpleNamespace(model_max_length=tokenizer)) == length


@pytest.fixture
def short(tiny, monkeypatch):
    """The random model with room for 16 tokens."""
    model, tokenizer = tiny
    monkeypatch.setattr(model.args, "max_position_embeddings", 16, raising=False)
    return model, tokenizer


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(("prompt", "limit", "said"), [(10, 100, 6), (10, -1, 6), (10, 3, 3), (16, 100, 1)])
def test_generation_ends_with_the_context(short, verify, prompt, limit, said):
    """The last token of a full prompt still has one after it."""
    *_, last = stream_generate(*short, [1] * prompt, limit, verify=verify, logits_processors=[never_end])
    assert (last.generation_tokens, last.finish_reason) == (said, "length")


def never_end(tokens, logits):
    logits[..., 2] = -1e9
    return logits


def test_a_conversation_beyond_the_context(short):
    """What is in the cache counts."""
    with pytest.raises(GlassError, match="17 tokens, but the model's context only 16"):
        generate(*short, [1] * 17)
    cache = short[0].make_cache()
    generate(*short, [1] * 10, max_tokens=4, prompt_cache=cache, logits_processors=[never_end])
    with pytest.raises(GlassError, match="context"):
        generate(*short, [1] * 10, prompt_cache=cache)
    assert generate(*short, [1] * 10, max_tokens=12, max_kv_size=8) is not None  # this one forgets
