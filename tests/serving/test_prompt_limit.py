"""Tests of refusing prompts by their length: at once, by encoding little, and only those that are too long."""

from __future__ import annotations

import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import CHAT, serving

from glass_mlx.serving import prompt_limit
from glass_mlx.serving.engine import Engine, EngineOptions
from glass_mlx.serving.errors import BadRequest
from glass_mlx.serving.prompt_limit import PromptLimit
from glass_mlx.serving.request import Request
from glass_mlx.serving.schema import MAX_ITEMS, ChatBody, CompletionBody, parse

LONG = "The old house stood at the end of the street. " * 200_000  # 9 MB


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


class Counting:
    """A tokenizer that counts the characters it encodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.encoded = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode(self, text, **options):
        self.encoded += len(text)
        return self.tokenizer.encode(text, **options)


def chat(text: str) -> Request:
    return Request(messages=[{"role": "user", "content": text}])


@pytest.mark.parametrize("request_", [Request(prompt=LONG), chat(LONG), Request(prompt="x" * 10**7)])
def test_little_is_encoded(tiny, request_):
    counting = Counting(tiny[1])
    with pytest.raises(BadRequest, match="^The prompt has more than [0-9,]+ tokens; at most 200 are allowed.$"):
        PromptLimit(200, counting).check(request_)
    assert counting.encoded <= 2 * prompt_limit._PIECE


@pytest.mark.parametrize("request_", [Request(prompt="x" * 200), chat("x" * 196), Request(prompt=[1] * 200), Request()])
def test_what_may_fit_is_not_looked_at(tiny, request_):
    counting = Counting(tiny[1])
    PromptLimit(200, counting).check(request_)
    assert counting.encoded == 0


def test_tokens_are_counted_without_a_model():
    with pytest.raises(BadRequest, match="has 201 tokens; at most 200"):
        PromptLimit(200).check(Request(prompt=[1] * 201))
    PromptLimit(200).check(Request(prompt=LONG))


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(["the ", " ", "\n", "a", "é", "漢", "😀", "house", "<s>", "\x00", "0"]), max_size=400))
def test_what_fits_is_never_refused(tiny, monkeypatch, parts):
    monkeypatch.setattr(prompt_limit, "_PIECE", 200)
    monkeypatch.setattr(prompt_limit, "_SLACK", 16)
    text = "".join(parts)
    for request in (Request(prompt=text), chat(text)):
        limit = PromptLimit(10**9, tiny[1])
        tokens = len(tiny[1].encode(limit._text(request), add_special_tokens=False))
        PromptLimit(tokens, tiny[1]).check(request)


@pytest.fixture
def busy(tiny_dir):
    """A server with a request that goes on until the end."""
    with serving(model=str(tiny_dir), load={"stats": False}, max_prompt_tokens=200) as server:
        pending = server.engine.submit(Request(prompt=[1], max_tokens=1_000_000))
        next(iter(pending))
        yield server
        assert server.engine.status().state == "generating" and not pending.cancelled
        pending.cancel()


@pytest.mark.parametrize(("stream", "text"), [(True, "word " * 400), (False, LONG[: 7 << 20])], ids=["short", "long"])
def test_it_does_not_wait_for_the_engine(busy, stream, text):
    """A client hears of it while another one's answer is being made."""
    bodies = {CHAT: {"messages": [{"role": "user", "content": text}]}, "/v1/completions": {"prompt": text}}
    for path, body in bodies.items():
        answer = httpx.post(busy.url + path, json={**body, "stream": stream}, timeout=60)
        assert answer.status_code == 400 and "at most 200 are allowed" in answer.json()["error"]["message"]
    tokens = httpx.post(busy.url + "/v1/completions", json={"prompt": [1] * 201}, timeout=60)
    assert tokens.status_code == 400 and "201 tokens" in tokens.text
    assert busy.engine.status().queued == 0


def test_the_engine_is_not_held(tiny_dir, tiny, monkeypatch):
    """Nor is it by a long text for a model that is not loaded yet."""
    engine = Engine(EngineOptions(model=str(tiny_dir), load={"stats": False}, max_prompt_tokens=200))
    try:
        pending = engine.submit(Request(prompt=LONG))
        with pytest.raises(BadRequest, match="more than [0-9,]+ tokens"):
            list(pending)
        with pytest.raises(BadRequest):  # now it is
            engine.submit(Request(prompt=LONG))
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatBody, {"messages": [{"role": "user", "content": ""}] * (MAX_ITEMS + 1)}),
        (ChatBody, {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * (MAX_ITEMS + 1)}]}),
        (CompletionBody, {"prompt": [1] * (2**20 + 1)}),
        (CompletionBody, {"prompt": "x", "logit_bias": {str(i): 0 for i in range(MAX_ITEMS + 1)}}),
    ],
)
def test_lists_have_a_limit(kind, body):
    with pytest.raises(BadRequest, match="^(messages|messages.0.content|prompt|logit_bias): .* at most"):
        parse(kind, json.dumps(body).encode())
