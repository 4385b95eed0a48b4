"""Tests of how long a text a model was made for, and that it is held to."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

import glass_mlx
from glass_mlx import GlassError, stream_generate
from glass_mlx.decoding.conversation import Conversation
from glass_mlx.model.context import context_length

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "config, length",
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024, "n_ctx": 512}, 1024),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4}}, 16384),
        ({"max_position_embeddings": 40960, "rope_scaling": YARN}, 131072),
        (
            {"max_position_embeddings": 131072, "rope_scaling": YARN | {"original_max_position_embeddings": 4096}},
            131072,
        ),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        ({"max_position_embeddings": 9, "rope_scaling": None, "rope_parameters": {"rope_type": "default"}}, 9),
        ({"text_config": {"max_position_embeddings": 99}, "model_type": "gemma3"}, 99),
        *(({}, None), ({"max_position_embeddings": "many"}, None), ({"max_position_embeddings": 0}, None)),
        ({"max_position_embeddings": True, "max_seq_len": 7}, 7),
    ],
)
def test_configurations(config, length):
    assert context_length(config) == length


@pytest.fixture
def short(model_copy):
    """The random model, made for 40 tokens."""
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    model, tokenizer = glass_mlx.load(model_copy, stats=False)
    assert model.context_length == 40
    return model, tokenizer


def endless(tokens: mx.array, logits: mx.array) -> mx.array:
    """Never an end token."""
    return mx.where(mx.arange(logits.shape[-1]) == 2, -mx.inf, logits)


@pytest.mark.few(2)
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("max_tokens", [100, -1])
def test_an_answer_ends_with_the_context(short, max_tokens, verify):
    options = {"max_tokens": max_tokens, "verify": verify, "logits_processors": [endless]}
    cache = short[0].make_cache()
    first = list(stream_generate(*short, [5] * 10, max_tokens=5, prompt_cache=cache, logits_processors=[endless]))
    answer = list(stream_generate(*short, [5] * 10, prompt_cache=cache, **options))
    assert len(answer) == 40 - 10 - len(first) - 10
    assert answer[-1].finish_reason == "length"
    with pytest.raises(GlassError, match="has 41 tokens .* context is 40"):
        stream_generate(*short, [5] * 41, **options)
    for length in (39, 40):  # the last token of a full prompt still has one after it
        assert len(list(stream_generate(*short, [5] * length, **options))) == 1


def test_a_sliding_window_goes_on(short, monkeypatch):
    """It holds no more than its own size. The family's own cache has none."""
    monkeypatch.delattr(type(short[0].dense), "make_cache")
    answer = stream_generate(*short, [5] * 30, max_tokens=20, max_kv_size=16, logits_processors=[endless])
    assert len(list(answer)) == 20


def test_the_tokenizers_limit_where_the_config_says_nothing(tiny):
    limit = tiny[1].model_max_length
    assert tiny[0].context_length is None and limit == 2048
    with pytest.raises(GlassError, match="context is 2,048"):
        stream_generate(*tiny, [5] * (limit + 1))


def test_a_long_conversation_forgets_its_beginning(short):
    conversation = Conversation(*short, system_prompt="S")
    left_out = []
    for n in range(4):
        list(conversation.reply(f"message {n}", max_tokens=3))
        left_out.append(conversation.left_out)
    assert left_out == sorted(left_out) and left_out[0] == 0 < left_out[-1] and left_out[-1] % 2 == 0
    assert len(conversation.messages) == 1 + 8
    with pytest.raises(GlassError, match="context is 40"):
        list(conversation.reply("word " * 50))
    assert len(conversation.messages) == 1 + 8  # as it was
    assert list(conversation.reply("short", max_tokens=3))
