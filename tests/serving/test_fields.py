"""Tests of the tables of fields: they are complete, and what they say of a field is what becomes of it."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

import mlx_lm.server
import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params

from glass_mlx.serving.errors import BadRequest
from glass_mlx.serving.fields import CHAT, COMPLETIONS, HONOURED, IGNORED, REFUSED, RESPONSES, judge, warning_header
from glass_mlx.serving.responses import ResponseBody
from glass_mlx.serving.schema import Body, ChatBody, CompletionBody, parse

NEEDED = {
    ChatBody: {"messages": [{"role": "user", "content": "Hello"}]},
    CompletionBody: {"prompt": "Hello"},
    ResponseBody: {"input": "Hello"},
}
BODIES = {"chat": ChatBody, "completions": CompletionBody, "responses": ResponseBody}
OPENAI = {
    "chat": (CHAT, chat_params.CompletionCreateParamsBase),
    "completions": (COMPLETIONS, text_params.CompletionCreateParamsBase),
    "responses": (RESPONSES, response_params.ResponseCreateParamsBase),
}
# What a field may be besides a text, which is what most of the refused and ignored ones are
VALUES: dict[str, Any] = {"best_of": 2, "n": 2, "background": True, "store": True, "num_draft_tokens": 3}


def of_kind(kind: str) -> list:
    return [
        pytest.param(body, name, id=f"{where}-{name}")
        for where, body in BODIES.items()
        for name, rule in body.rules.items()
        if rule.kind == kind
    ]


def sent(body: type[Body], **fields: Any) -> Body:
    return parse(body, json.dumps(NEEDED[body] | fields).encode())


@pytest.mark.parametrize("where", OPENAI)
def test_every_field_of_openais_is_known(where):
    table, params = OPENAI[where]
    assert set(params.__annotations__) <= set(table)


def test_every_field_of_mlx_lms_server_is_known():
    """As its handler reads them out of the body."""
    source = inspect.getsource(mlx_lm.server.APIHandler)
    read = set(re.findall(r"body(?:\.get\(|\[)\s*\"(\w+)\"", source))
    assert len(read) > 20 and read <= set(CHAT) | set(COMPLETIONS)


@pytest.mark.parametrize("where", BODIES)
def test_the_honoured_fields_are_those_of_the_model(where):
    body = BODIES[where]
    honoured = {name for name, rule in body.rules.items() if rule.kind == HONOURED}
    assert honoured == {field.alias or name for name, field in body.model_fields.items()}
    assert all(rule.reason for rule in body.rules.values() if rule.kind != HONOURED)


@pytest.mark.parametrize("body, name", of_kind(REFUSED))
def test_refused_fields(body, name):
    with pytest.raises(BadRequest, match=name) as e:
        sent(body, **{name: VALUES.get(name, "x")}).warnings()
    assert e.value.param == name and body.rules[name].reason in str(e.value)


@pytest.mark.parametrize("body, name", of_kind(IGNORED))
def test_ignored_fields(body, name):
    asked = sent(body, **{name: VALUES.get(name, "x")})
    (warning,) = asked.warnings()
    assert warning.startswith(f"{name} is ignored: ")
    assert asked.requests("me", {}) == sent(body).requests("me", {})


@pytest.mark.parametrize("where", BODIES)
def test_what_asks_for_nothing_is_taken_without_a_word(where):
    body = BODIES[where]
    for name, rule in body.rules.items():
        for value in (None, *rule.neutral) if rule.kind != HONOURED else ():
            assert sent(body, **{name: value}).warnings() == []


def test_unknown_fields():
    (warning,) = sent(ChatBody, guided_json={"type": "object"}).warnings()
    assert warning == "guided_json is ignored: the server does not know it"
    assert sent(ChatBody, guided_json=None).warnings() == []


def test_the_header_can_be_sent_whatever_a_field_is_called():
    names = ["a\r\nSet-Cookie: x", "é€", "x" * 10_000, *(f"f{i}" for i in range(100))]
    (value,) = warning_header(judge(CHAT, dict.fromkeys(names, 1))).values()
    assert value.isascii() and value.isprintable() and len(value) < 4096
    assert warning_header([]) == {}


TOOL = {"type": "function", "function": {"name": "f"}}
HONOURED_VALUES: dict[str, Any] = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "top_k", "seed", "n", "top_logprobs"), 3),
    **dict.fromkeys(("repetition_context_size", "presence_context_size", "frequency_context_size"), 3),
    **dict.fromkeys(("temperature", "top_p", "min_p", "xtc_probability", "xtc_threshold", "density"), 0.25),
    **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty", "global_weight"), 0.5),
    **dict.fromkeys(("logprobs", "verify", "echo", "continue_final_message"), True),
    **dict.fromkeys(("compensation", "add_generation_prompt", "parallel_tool_calls"), False),
    **dict.fromkeys(("model", "user", "stop", "prompt"), "x"),
    "logit_bias": {"5": 1},
    "quality": "fast",
    "max_output_tokens": 3,
    "input": "Bye",
    "instructions": "Be kind.",
    "text": {"format": {"type": "json_object"}},
    "include": ["message.output_text.logprobs"],
    "signal": "activation",
    "layer_budgets": "uniform",
    "experts": "dense",
    "messages": [{"role": "user", "content": "Bye"}],
    "tools": [TOOL],
    "tool_choice": "required",
    "response_format": {"type": "json_object"},
    "chat_template_kwargs": {"enable_thinking": False},
}
WITH = {"tool_choice": {"tools": [TOOL]}, "top_logprobs": {"logprobs": True}}  # which mean nothing alone
WITH_INPUT = {"tool_choice": {"tools": [{"type": "function", "name": "f"}]}}
OF_THE_RESPONSE = {"stream", "stream_options"}


@pytest.mark.parametrize("body, name", of_kind(HONOURED))
def test_honoured_fields_reach_the_engine(body, name):
    if name in OF_THE_RESPONSE:
        assert sent(body, **{name: {"include_usage": True} if name == "stream_options" else True}).warnings() == []
        return
    others = WITH.get(name, {}) if body is not ResponseBody else WITH_INPUT.get(name, {})
    value = HONOURED_VALUES[name]
    if body is ResponseBody and name == "tools":
        value = [{"type": "function", "name": "f"}]
    asked = sent(body, **others, **{name: value})
    assert asked.requests("me", {}) != sent(body, **others).requests("me", {}) and asked.warnings() == []
