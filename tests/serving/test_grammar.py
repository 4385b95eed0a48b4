"""Tests of answers of a given form: schemas, forced calls, and what a client may get wrong in them."""

from __future__ import annotations

import json
import shutil
import sys
from functools import cache, partial

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer

from glass_mlx.loading import DEMO_PATH
from glass_mlx.serving.engine import Engine, EngineOptions
from glass_mlx.serving.errors import BadRequest
from glass_mlx.serving.grammar import Grammars
from glass_mlx.serving.request import Request

# Everything in it is bounded, so a model that cannot write JSON ends.
SCHEMA = {
    "type": "object",
    "properties": {
        "size": {"enum": ["small", "large"]},
        "nights": {"type": "integer", "minimum": 1, "maximum": 30},
        "rooms": {"type": "array", "items": {"$ref": "#/$defs/room"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["size", "nights", "rooms"],
    "additionalProperties": False,
    "$defs": {"room": {"type": "string", "maxLength": 4}},
}
FUNCTIONS = [{"name": "book", "parameters": SCHEMA}, {"name": "leave"}]
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]
PROMPT = [{"role": "user", "content": "I want to find a hotel."}]


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


def fits(text: str) -> bool:
    value = json.loads(text)
    rooms = value["rooms"]
    return (
        list(value) == ["size", "nights", "rooms"]
        and value["size"] in ("small", "large")
        and type(value["nights"]) is int
        and 1 <= value["nights"] <= 30
        and 1 <= len(rooms) <= 2
        and all(len(room) <= 4 for room in rooms)
    )


@pytest.fixture(scope="module")
def grammars(demo):
    return Grammars(demo[1])


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """The demo's tokenizer as that of a model which reasons, and calls tools between markers."""
    path = shutil.copytree(DEMO_PATH, tmp_path_factory.mktemp("marked") / "model")
    (path / "tokenizer.model").unlink()
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    for i, text in enumerate(("<think>", "</think>", "<tool_call>", "</tool_call>")):
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": 4096 + i, "content": text, "special": i > 1, **plain})
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = path / "chat_template.jinja"
    template.write_text("{# <tool_call> tool_call.name #}" + template.read_text())
    return Grammars(load_tokenizer(path))


def written(grammars: Grammars, request: Request, *pieces: str, prompt: str = "") -> list[bool]:
    """Whether each piece of an answer can follow the ones before it, token by token, and then whether it can end."""
    tokenizer = grammars.tokenizer
    encode = partial(tokenizer.encode, add_special_tokens=False)
    processor = grammars.processor(request, encode(prompt) if prompt else [1])
    tokens, can = [1], []
    for piece in pieces:
        possible = True
        for token in grammars._vocabulary.tokenize_str(piece, parse_special=True):
            possible = possible and token in allowed(processor, tokens, len(tokenizer))
            tokens.append(token)
        can.append(possible)
        if not possible:
            return can
    return [*can, bool(tokenizer.eos_token_ids & allowed(processor, tokens, len(tokenizer)))]


def allowed(processor, tokens: list[int], size: int) -> set[int]:
    logits = processor(mx.array(tokens, mx.int32), mx.zeros((1, size)))
    return set(np.flatnonzero(np.array(logits[0] > -1)).tolist())


def asking(schema: dict, strict: bool = True) -> Request:
    return Request(messages=PROMPT, schema=schema, strict_schema=strict)


@pytest.mark.parametrize(
    "text, can",
    [
        ('{"size": "large", "nights": 3, "rooms": ["a"]}', [True, True]),
        ('\n{\n  "size": "large",\n  "nights": 3,\n  "rooms": [\n    "a"\n  ]\n}', [True, True]),
        ('{"size": "large", "nights": 3', [True, False]),
        ('{"size": "medium"', [False]),
        ('{"size": "large", "nights": 31', [False]),
        ("Well, ", [False]),
        ("\n\n\n", [False]),  # or a model could write line breaks for ever
        ('{"size": "large", "nights": 3, "rooms": ["a"]} ', [False]),
    ],
)
def test_what_a_schema_lets_through(grammars, text, can):
    assert written(grammars, asking(SCHEMA), text) == can


def test_drafts_that_are_taken_back(grammars, demo):
    """Whatever was tried before, the next token depends on the answer alone."""
    size, start = len(demo[1]), [7, 8]
    processor = grammars.processor(asking(SCHEMA), start)
    allowed(processor, start, size)
    answer = grammars._vocabulary.tokenize_str('{"size": "large", "nights": 3, "rooms": ["a"]}')
    other = grammars._vocabulary.tokenize_str('{"size": "small", "nights": 29')
    for tried in (answer[:5], other[:6], answer[:3], [*answer, 2, 2], other, answer[:-1], [], answer):
        fresh = grammars.processor(asking(SCHEMA), start)
        allowed(fresh, start, size)
        assert allowed(processor, start + tried, size) == allowed(fresh, start + tried, size)
    assert allowed(processor, start + answer, size) == demo[1].eos_token_ids


@pytest.mark.parametrize("prompt, said", [("<think>", "hm, {</think>"), ("", "<think>hm, {</think>"), ("", "")])
def test_reasoning_may_be_anything(marked, prompt, said):
    """Whether the template has begun it, or the model begins it, or not."""
    pieces = [said, '\n\n{"size": "large", "nights": 3, "rooms": []'] if said else ['{"size": "tiny']
    assert written(marked, asking(SCHEMA), *pieces, prompt=prompt) == ([True, False] if said else [False])
    if said:
        assert written(marked, asking(SCHEMA), said, prompt=prompt) == [True, False]


CALL = '{"name": "leave", "arguments": {}}'


def test_a_forced_call_has_the_models_markers(marked):
    request = Request(messages=PROMPT, tools=TOOLS, forced_tools=("book", "leave"))
    assert not marked.forces_bare_call(request)
    assert written(marked, request, f"<tool_call>\n{CALL}\n</tool_call>") == [True, True]
    assert written(marked, request, CALL) == [False]
    assert written(marked, request, '<tool_call>{"name": "stay') == [False]
    only = Request(messages=PROMPT, tools=TOOLS, forced_tools=("book",))
    assert written(marked, only, '<tool_call>{"name": "leave') == [False]


def test_a_forced_call_without_markers(grammars):
    request = Request(messages=PROMPT, tools=TOOLS, forced_tools=("book", "leave"))
    assert grammars.forces_bare_call(request)
    assert written(grammars, request, CALL) == [True, True]
    assert written(grammars, request, '{"name": "leave", "arguments": {"when": 1}') == [False]  # it takes none
    assert written(grammars, request, '{"name": "book", "arguments": {"size": "huge') == [False]


def test_strict_tools_need_not_be_called(marked):
    strict = [{"type": "function", "function": {**FUNCTIONS[0], "strict": True}}]
    request = Request(messages=PROMPT, tools=strict)
    good = '{"name": "book", "arguments": {"size": "large", "nights": 3, "rooms": ["a"]}}'
    assert written(marked, request, "Which size?") == [True, True]
    assert written(marked, request, "Well. <tool_call>", good, "</tool_call>", " So.") == [True, True, True, True, True]
    assert written(marked, request, "<tool_call>", '{"name": "book", "arguments": {"size": "huge') == [True, False]
    assert marked.processor(Request(messages=PROMPT, tools=TOOLS), [1]) is None


def test_a_schema_and_tools(marked, grammars):
    """Either an answer or a call."""
    request = Request(messages=PROMPT, tools=TOOLS, schema=SCHEMA)
    assert written(marked, request, f"<tool_call>{CALL}</tool_call>") == [True, True]
    assert written(marked, request, '{"size": "large"') == [True, False]
    assert written(grammars, request, '{"size": "large"') == [True, False]


NUMBER = {"type": "integer", "maximum": 9, "minimum": 0}


@pytest.mark.parametrize(
    "schema, text, can",
    [
        ({"type": "object", "properties": {"a": NUMBER}}, '{"a": 1, "b"', False),
        ({"type": "object", "properties": {"a": NUMBER}, "additionalProperties": NUMBER}, '{"a": 1, "b": 2', True),
        ({"type": "array", "items": {"type": "object", "properties": {"a": NUMBER}}}, '[{"b"', False),
        (
            {"type": "object", "properties": {"properties": {"properties": {"a": NUMBER}}}},
            '{"properties": {"a": 1',
            True,
        ),
        ({"const": {"properties": {"a": 1}}}, '{"properties": {"a": 1}}', True),
        ({"allOf": [{"properties": {"a": NUMBER}}, {"properties": {"b": NUMBER}}]}, '{"a": 1, "b": 2', True),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "object", "properties": {"a": NUMBER}}}}, '{"b"', False),
        ({"type": "object"}, '{"b": [1, {}]', True),
    ],
)
def test_objects_have_the_properties_that_are_listed(grammars, schema, text, can):
    assert written(grammars, asking(schema, strict=False), text)[0] == can


DEEP: dict = {"type": "string"}
for _ in range(180):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


@pytest.mark.parametrize(
    "schema, told",
    [
        ({"type": "objekt"}, "objekt"),
        ({"type": 5}, "type"),
        ({"$ref": "#"}, "cannot be used"),
        ({"$ref": "#/nope"}, "nope"),
        ({"$ref": "https://example.com/x"}, "not present"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "cannot be used"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"enum": [f"{i}x" for i in range(100_000)]}, "too big"),
        ({"allOf": [{"anyOf": [{"required": [f"{j}{i}"]} for j in "ab"]} for i in range(20)]}, "cannot be used"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        (DEEP, "limit"),
    ],
)
def test_bad_schemas(grammars, schema, told):
    """Malformed, endless, contradictory, huge: each is refused at once, in a line."""
    with pytest.raises(BadRequest, match=told) as e:
        grammars.processor(asking(schema), [1])
    assert e.value.param == "response_format" and "\n" not in str(e.value) and len(str(e.value)) < 300
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}]
    with pytest.raises(BadRequest, match="^tools"):
        request = Request(messages=PROMPT, tools=tools, forced_tools=("f",))
        written(grammars, request, '{"name": "f", "arguments": ', *[" "] * 99)


def test_a_schema_that_ends_nowhere(grammars, demo):
    """Within an answer it is found out only when it gets there."""
    inner = {"a": {"$ref": "#/$defs/b"}}
    schema = {"type": "object", "properties": inner, "required": ["a"], "$defs": {"b": {"$ref": "#/$defs/b"}}}
    with pytest.raises(BadRequest, match="response_format") as e:
        written(grammars, asking(schema), '{"a":', *[" "] * 99)
    assert e.value.param == "response_format" and "\n" not in str(e.value)


def test_what_cannot_be_enforced_is_left_out_unless_it_must_be(grammars):
    processor = grammars.processor(asking({"type": "array", "uniqueItems": True}, strict=False), [1])
    assert "uniqueItems" in " ".join(processor.warnings)


def test_without_the_library(demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(BadRequest, match=r"pip install 'glass_mlx\[server\]'"):
        Grammars(demo[1]).processor(asking(SCHEMA), [1])
    assert Grammars(demo[1]).processor(Request(messages=PROMPT), [1]) is None


@pytest.fixture(scope="module")
def engine(lively_dir):
    """It drafts whatever that costs."""
    engine = Engine(EngineOptions(model=str(lively_dir), load={"stats": False}, verify={"draft_tokens": 3}))
    yield engine
    engine.close()


@cache
def blanks(engine: Engine) -> dict[int, float]:
    """So that the random model writes none where JSON may have any number of them."""
    tokenizer = engine.call(lambda _, tokenizer: tokenizer).result()
    return {i: -100.0 for i in range(len(tokenizer)) if tokenizer.decode([i]).isspace()}


def ask(engine: Engine, **fields) -> list:
    given = {"messages": PROMPT, "max_tokens": 200, "logit_bias": blanks(engine), **fields}
    return list(engine.submit(Request(**given)))


@cache
def fitting(engine: Engine, **options) -> list:
    """An answer that fits the schema."""
    return ask(engine, schema=SCHEMA, logprobs=True, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"density": 1.0},
        {"density": 0.5, "temperature": 1.0, "top_p": 0.9, "seed": 3},
        {"density": 0.5, "verify": True},
        {"density": 0.5, "verify": True, "temperature": 1.0, "top_p": 0.9, "seed": 3},
    ],
    ids=str,
)
def test_answers(engine, options):
    chunks = fitting(engine, **options)
    assert fits("".join(chunk.text for chunk in chunks)) and chunks[-1].finish_reason == "stop"
    assert all(chunk.token.logprob > -100 for chunk in chunks if chunk.token is not None)
    assert chunks[-1].usage.verified == bool(options.get("verify"))


def test_a_verified_answer_is_the_dense_models(engine):
    said = fitting(engine, density=1.0), fitting(engine, density=0.5, verify=True)
    assert said[1][-1].usage.drafted_tokens > 0
    assert len({"".join(chunk.text for chunk in chunks) for chunks in said}) == 1


def test_calls(engine):
    chunks = ask(engine, tools=TOOLS, forced_tools=("book",))
    (call,) = [call for chunk in chunks for call in chunk.tool_calls]
    assert call["function"]["name"] == "book" and fits(call["function"]["arguments"])
    assert chunks[-1].finish_reason == "tool_calls" and not any(chunk.text for chunk in chunks)


def test_the_next_request_is_free_again(engine):
    with pytest.raises(BadRequest, match="response_format"):
        ask(engine, schema={"type": "objekt"}, strict_schema=True)
    free = ask(engine, seed=1, max_tokens=20)
    ask(engine, schema=SCHEMA)
    assert [c.text for c in ask(engine, seed=1, max_tokens=20)] == [c.text for c in free]
