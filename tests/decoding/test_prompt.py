"""Tests of rendering prompts: what users may set of a chat template, in requests and on command lines."""

from __future__ import annotations

import inspect
import json

import mlx.core as mx
import numpy as np
import pytest

from glass_mlx import GlassConfig, GlassError, server, stream_generate
from glass_mlx.decoding.prompt import RESERVED, as_tokens, check_template_args, render
from glass_mlx.serving.errors import BadRequest
from glass_mlx.serving.schema import ChatBody, parse

NAMES = ["messages", "conversation", "tools", "tokenize", "add_generation_prompt", "return_tensors", "return_dict"]
NAMES += ["continue_final_message", "chat_template", "tokenizer_kwargs", "padding", "truncation", "max_length", "self"]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_of_rendering(name, invoke, monkeypatch):
    """Told in words: by a request, and by the command lines at their start."""
    with pytest.raises(GlassError, match=f"'{name}' cannot be set"):
        check_template_args({"a": 1, name: None})
    body = f'{{"messages": [{{"role": "user", "content": "x"}}], "chat_template_kwargs": {{"{name}": true}}}}'
    with pytest.raises(BadRequest, match=f"chat_template_kwargs.*'{name}' cannot be set") as e:
        parse(ChatBody, body.encode())
    assert e.value.param == "chat_template_kwargs"
    commands = {"server": (server.main, "--chat-template-args"), "generate": (_main(), "--chat-template-config")}
    for main, option in commands.values():
        done = invoke(main, option, f'{{"{name}": true}}')
        assert done.code == 2 and f"argument {option}: " in done.err.splitlines()[-1]
        assert f"'{name}' cannot be set" in done.err.splitlines()[-1]


def _main():
    from glass_mlx.generate import main  # the package's attribute of this name is the function

    return main


@pytest.mark.parametrize("text", ["[1]", "{", "3", "[" * 100_000])
def test_no_object(text, invoke):
    done = invoke(server.main, "--chat-template-args", text)
    assert done.code == 2 and "is not a JSON object" in done.err.splitlines()[-1] and len(done.err) < 3000


def test_every_parameter_is_reserved(demo):
    """But for documents, which are a template's own."""
    parameters = inspect.signature(demo[1]._tokenizer.apply_chat_template).parameters.keys()
    assert parameters - RESERVED == {"documents"}


def test_what_a_template_may_be_told(demo):
    told = {"enable_thinking": False, "documents": [], "bos_token": "<s>", "x": [1]}
    assert check_template_args(told) == told
    assert render(demo[1], [{"role": "user", "content": "x"}], add_generation_prompt=True, **told)


def test_what_a_prompt_may_be(demo):
    """A text, token ids of whatever library, and messages, which make the same answers."""
    tokenizer, messages = demo[1], [{"role": "user", "content": "Hello"}]
    ids = as_tokens(tokenizer, "Hello").tolist()
    for prompt in (ids, tuple(ids), np.array(ids), list(np.array(ids)), mx.array(ids), mx.array(ids, mx.uint32)):
        tokens = as_tokens(tokenizer, prompt)
        assert tokens.tolist() == ids and mx.issubdtype(tokens.dtype, mx.integer)
    assert as_tokens(tokenizer, messages).tolist() == render(tokenizer, messages, add_generation_prompt=True)
    assert as_tokens(tokenizer, []).size == 0


WRONG = [
    "a text and a text".split(),
    [[1, 2], [3]],
    [[1, 2]],
    mx.array([[1]]),
    np.array([1.5]),
    [1.5],
    None,
    3,
    Ellipsis,
]


@pytest.mark.parametrize("prompt", WRONG, ids=str)
def test_what_is_no_prompt(demo, prompt):
    with pytest.raises(GlassError, match="A prompt is a text"):
        as_tokens(demo[1], prompt)
    with pytest.raises(GlassError, match="A prompt is a text"):
        stream_generate(*demo, prompt)


def test_wrong_arguments(demo):
    with pytest.raises(GlassError, match="The model comes first"):
        stream_generate(*demo[::-1], "x")
    for bad in (0, -2, 2.5, "3"):
        with pytest.raises(GlassError, match="max_tokens must be"):
            stream_generate(*demo, "x", max_tokens=bad)


def test_numbers_of_numpy(demo):
    """They are as good as Python's."""
    numbers = {"density": np.float32(0.25), "compensation": np.True_}
    found = list(stream_generate(*demo, "Hello", max_tokens=np.int64(3), **numbers))
    assert len(found) == 3 and found[-1].density == 0.25
    config = GlassConfig(**numbers)
    assert config == GlassConfig(density=0.25, compensation=True) and json.dumps(vars(config))
