"""Tests of what clients may send, and of the published description."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from glass_mlx.serving.errors import BadRequest
from glass_mlx.serving.openapi import document
from glass_mlx.serving.request import Chunk, Request, Token, Usage
from glass_mlx.serving.schema import ChatBody, CompletionBody, parse
from glass_mlx.serving.writers import ChatWriter, TextWriter

USER = {"role": "user", "content": "Hello"}


def chat(**fields) -> ChatBody:
    return parse(ChatBody, json.dumps({"messages": [USER], **fields}).encode())


def request(**fields) -> Request:
    (made,) = chat(**fields).requests("me", {"max_tokens": 99, "temperature": 0.5})
    return made


def test_defaults():
    assert request() == Request(messages=[USER], client="me", max_tokens=99, temperature=0.5)


def test_everything():
    sampling = {"temperature": 1, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "xtc_probability": 0.5, "xtc_threshold": 0.2}
    sampling |= {"repetition_penalty": 1.1, "presence_penalty": -1, "frequency_penalty": 2, "seed": -1}
    glass = {"density": 0.3, "global_weight": "auto", "signal": "activation", "layer_budgets": "uniform"}
    given = request(**sampling, **glass, stop=["a", "b"], logit_bias={"5": -100}, user="you", model="demo", n=1)
    assert {k: getattr(given, k) for k in (*sampling, *glass)} == sampling | glass
    assert (given.stop, given.logit_bias, given.client, given.model) == (("a", "b"), {5: -100.0}, "me you", "demo")


def test_null_is_as_if_left_out():
    fields = set(ChatBody.model_fields) - {"messages", "model"}
    assert request(**dict.fromkeys(fields)) == request()


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value, taken", [(7, 7), (7.0, 7), (-1, -1)])
def test_max_tokens(name, value, taken):
    assert request(**{name: value}).max_tokens == taken


@pytest.mark.parametrize(
    "given, taken",
    [
        ({"model": None}, {}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 40.0}, {"top_k": 40}),
        ({"seed": 42.0}, {"seed": 42}),
        ({"top_logprobs": 2.0, "logprobs": True}, {"top_logprobs": 2, "logprobs": True}),
        ({"n": 1.0}, {}),
        ({"stop": ""}, {}),
        ({"stop": ["", "a"]}, {"stop": ("a",)}),
        ({"tools": [], "tool_choice": "auto"}, {}),
        ({"response_format": {"type": "text"}}, {}),
    ],
)
def test_usual_values(given, taken):
    """Of clients that say "no limit", "off" or "default" so, or know one kind of number."""
    assert request(**given) == replace(request(), **taken)


def test_choices():
    made = chat(n=3, seed=5).requests("me", {})
    assert [r.seed for r in made] == [5, 6, 7] and len({r.messages[0]["content"] for r in made}) == 1
    assert [r.seed for r in chat(n=2).requests("me", {})] == [None, None]


def test_messages():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
    ]
    said = request(messages=messages).messages
    assert [m["role"] for m in said] == ["system", "user", "assistant", "tool"]
    assert [m["content"] for m in said] == ["Be brief.", "one two", "", "3"]
    assert said[2]["tool_calls"][0]["function"]["arguments"] == {"x": 1}


def test_tools():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}]
    assert request(tools=tools).tools == tools
    assert request(tools=tools, tool_choice="none").tools is None


@pytest.mark.parametrize(
    "choice, offered, forced",
    [
        (None, "fg", ()),
        ("auto", "fg", ()),
        ("required", "fg", ("f", "g")),
        ({"type": "function", "function": {"name": "g"}}, "fg", ("g",)),
        (("auto", "g"), "g", ()),
        (("required", "g"), "g", ("g",)),
    ],
)
def test_tool_choice(choice, offered, forced):
    def tool(name: str) -> dict:
        return {"type": "function", "function": {"name": name}}

    if isinstance(choice, tuple):
        allowed = {"mode": choice[0], "tools": [tool(choice[1])]}
        choice = {"type": "allowed_tools", "allowed_tools": allowed}
    made = request(tools=[tool("f"), tool("g")], tool_choice=choice)
    assert "".join(t["function"]["name"] for t in made.tools) == offered and made.forced_tools == forced


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "h"}}])
def test_a_choice_of_no_tool(choice):
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in ([], tools) if choice != "required" else ([],):
        with pytest.raises(BadRequest, match="tool_choice"):
            request(tools=given, tool_choice=choice)


OBJECT = {"type": "object"}


@pytest.mark.parametrize(
    "form, schema, strict",
    [
        ({"type": "text"}, None, False),
        ({"type": "json_object"}, OBJECT, False),
        ({"type": "json_schema", "json_schema": {"name": "r", "schema": {"type": "array"}}}, {"type": "array"}, False),
        ({"type": "json_schema", "json_schema": {"name": "r", "schema": {}, "strict": True}}, {}, True),
    ],
)
def test_response_format(form, schema, strict):
    made = request(response_format=form)
    assert (made.schema, made.strict_schema) == (schema, strict)


@pytest.mark.parametrize(
    "last, given, continued, prompted",
    [
        ("user", {}, False, True),
        ("assistant", {}, True, False),
        ("assistant", {"add_generation_prompt": True}, False, True),
        ("assistant", {"continue_final_message": False}, False, True),
        ("user", {"continue_final_message": True}, True, False),
        ("user", {"add_generation_prompt": False}, False, False),
    ],
)
def test_what_is_continued(last, given, continued, prompted):
    made = request(messages=[USER, {"role": last, "content": "Well"}], **given)
    assert (made.continue_final_message, made.add_generation_prompt, len(made.messages)) == (continued, prompted, 2)


def test_an_empty_answer_is_not_continued():
    made = request(messages=[USER, {"role": "assistant", "content": ""}])
    assert (made.messages, made.continue_final_message, made.add_generation_prompt) == ([USER], False, True)


def test_both_ways_to_go_on():
    with pytest.raises(BadRequest, match="continue_final_message"):
        request(continue_final_message=True, add_generation_prompt=True)


def test_answers_are_accepted_when_they_are_sent_back():
    """As the official client sends them; and what other servers write for a call that went wrong."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1'}, "index": 0}
    told = {"role": "assistant", "content": None, "refusal": None, "reasoning": "hm", "annotations": [], "audio": None}
    parts = [{"type": "refusal", "refusal": "No."}, {"type": "text", "text": "But"}]
    first, second = request(messages=[{**told, "tool_calls": [call]}, {"role": "assistant", "content": parts}]).messages
    assert (first["content"], first["reasoning_content"]) == ("", "hm")
    assert first["tool_calls"][0]["function"]["arguments"] == '{"x": 1'
    assert second["content"] == "No.But"


@pytest.mark.parametrize("stop, words", [("a", ("a",)), (["a"], ("a",)), ([], ()), (None, ())])
def test_stop(stop, words):
    assert request(stop=stop).stop == words


@pytest.mark.parametrize(
    "field, values",
    [
        ("messages", [None, [], {}, "hi", [1], [{}], [{"role": "king", "content": "x"}]]),
        ("messages", [[{"role": "user", "content": 1}], [{"role": "user", "content": [{"type": "image_url"}]}]]),
        ("messages", [[{**USER, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]]),
        ("model", [1, [], "x" * 301]),
        ("max_tokens", [0, 0.0, -2, 1.5, "9", True, 2**40]),
        ("temperature", [-0.1, 2.1, "1", True, [], float("nan"), float("inf")]),
        ("top_p", [-0.1, 1.1, "1", float("nan")]),
        ("min_p", [-0.1, 1.1]),
        ("top_k", [-2, 1.5, "1", float("inf")]),
        ("seed", ["1", 1.5, 2**64, -(2**64)]),
        ("stop", [1, [1], ["a"] * 17, {}]),
        ("stream", ["true", 1]),
        ("stream_options", [[], {"include_usage": "yes"}]),
        ("n", [0, 129, "1"]),
        ("logprobs", [1, "true"]),
        ("top_logprobs", [-1, 21, "1", True]),
        ("logit_bias", [[], {"a": 1}, {"1": 101}, {"1": "1"}, {"-1": 1}, {"²": 1}, {"1": float("nan")}]),
        ("repetition_penalty", [-1, "1", 11]),
        ("presence_penalty", [-3, 3]),
        ("frequency_penalty", [-3, 3]),
        ("density", [0, -1, 1.1, "0.5", True, float("nan")]),
        ("global_weight", [-1, 2, "heavy", True]),
        ("signal", ["loud", 1]),
        ("layer_budgets", ["loud", 1]),
        ("tools", [{}, [{}], [{"type": "function", "function": {}}], [{"type": "web", "function": {"name": "f"}}]]),
        ("tool_choice", ["any", 1, {}, {"type": "custom"}, {"type": "function"}, {"type": "allowed_tools"}]),
        ("response_format", [{"type": "json_schema"}, {"type": "grammar"}, "text", {}]),
        ("response_format", [{"type": "json_schema", "json_schema": {"name": "r", "schema": "object"}}]),
        ("chat_template_kwargs", [[], {"tokenize": False}, {"chat_template": "{{ x }}"}]),
        ("user", [1, "x" * 1001]),
    ],
)
def test_bad_fields(field, values):
    for value in values:
        with pytest.raises(BadRequest) as e:
            chat(**{field: value})
        assert str(e.value).startswith(field) and e.value.param.startswith(field), value
        assert len(str(e.value)) <= 500 and "pydantic" not in str(e.value)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"\xff\xfe",
        b"{}",
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"tools": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"seed": ' + b"9" * 100_000 + b', "messages": [{"role": "user", "content": ""}]}',
    ],
)
def test_bad_bodies(body):
    for kind in (ChatBody, CompletionBody):
        with pytest.raises(BadRequest):
            parse(kind, body)


def completion(**fields) -> list[Request]:
    return parse(CompletionBody, json.dumps({"prompt": "x", **fields}).encode()).requests("me", {})


@pytest.mark.parametrize(
    "prompt, taken",
    [
        ("text", ["text"]),
        (["text"], ["text"]),
        ([1, 2], [[1, 2]]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_completion_prompts(prompt, taken):
    asked = completion(prompt=prompt, logprobs=3)
    assert [one.prompt for one in asked] == taken
    assert (asked[0].messages, asked[0].logprobs, asked[0].top_logprobs) == (None, True, 3)
    assert [one.prompt for one in completion(prompt=prompt, n=2)] == [p for one in taken for p in (one, one)]


@pytest.mark.parametrize(
    "given, wanted, top",
    [
        ({"logprobs": True}, True, 0),
        ({"logprobs": True, "top_logprobs": 4}, True, 4),
        ({"logprobs": False, "top_logprobs": 4}, False, 0),
        ({"logprobs": 0}, True, 0),
        ({"top_logprobs": -1}, False, 0),
    ],
)
def test_completion_logprobs(given, wanted, top):
    """OpenAI's number, and mlx-lm's two fields."""
    (asked,) = completion(**given)
    assert (asked.logprobs, asked.top_logprobs) == (wanted, top)


@pytest.mark.parametrize("prompt", [None, 1, [], [[]], [[1], "b"], ["a"] * 129, [1, "a"], [-1], [2**31], [True], {}])
def test_bad_completion_prompts(prompt):
    with pytest.raises(BadRequest, match="prompt"):
        parse(CompletionBody, json.dumps({"prompt": prompt}).encode())


@pytest.mark.parametrize(
    "field, fields",
    [
        ("echo", {"echo": 1}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": 1, "echo": True}),
        ("n", {"n": 65, "prompt": ["a", "b"]}),
    ],
)
def test_bad_completion_fields(field, fields):
    with pytest.raises(BadRequest, match=field):
        completion(**fields)


def test_a_stream_adds_up_to_the_whole():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    chunks = [
        Chunk(reasoning="hm", token=Token(1, "hm", -1.0, (Token(1, "hm", -1.0), Token(2, "\ufffd", float("-inf"))))),
        Chunk("a", token=Token(3, "a", -2.0)),
        Chunk(tool_calls=(call,)),
        Chunk("b", tool_calls=(call,), finish_reason="tool_calls", usage=Usage(prompt_tokens=3, completion_tokens=4)),
    ]
    writer = ChatWriter("demo", logprobs=True)
    events = [json.loads(writer.events(chunk)[0].model_dump_json(exclude_unset=True)) for chunk in chunks]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert [d.get("content") for d in deltas] == [None, "a", None, "b"]
    assert deltas[0]["reasoning"] == deltas[0]["reasoning_content"] == "hm"
    assert [d["tool_calls"][0]["index"] for d in deltas[2:]] == [0, 1]
    for chunk in chunks:
        writer.add(chunk)
    choice = json.loads(writer.response(Usage()).model_dump_json(exclude_unset=True))["choices"][0]
    assert choice["message"]["content"] == "ab" and len(choice["message"]["tool_calls"]) == 2
    assert choice["finish_reason"] == "tool_calls"
    first = choice["logprobs"]["content"][0]
    assert (first["token"], first["bytes"]) == ("hm", [104, 109])
    assert (first["top_logprobs"][1]["bytes"], first["top_logprobs"][1]["logprob"]) == (None, -9999.0)


def test_text_logprobs():
    writer = TextWriter("demo", logprobs=True)
    for text in ("one", " two"):
        writer.add(Chunk(text, token=Token(1, text, -1.0, (Token(1, text, -1.0),))))
    writer.add(Chunk(finish_reason="stop", usage=Usage()))
    said = writer.response(Usage()).choices[0]
    assert said.text == "one two"
    assert (said.logprobs.text_offset, said.logprobs.tokens) == ([0, 3], ["one", " two"])


def test_the_document_resolves():
    text = json.dumps(document())
    schemas = document()["components"]["schemas"]
    for reference in {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
        assert reference in schemas
    assert "density" in schemas["ChatBody"]["properties"]
