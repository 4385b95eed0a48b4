"""Tests of the server with clients as people use them: the official openai package, and raw events over HTTP."""

from __future__ import annotations

import inspect
import json
import re
import signal
import socket
import sys
import threading
import time

import httpx
import mlx_lm.server
import openai
import pytest
from processes import environment, running
from servers import CHAT, QUESTION, answered, connect, raw, serving

import glass_mlx
from glass_mlx import server
from glass_mlx.serving import app as api
from glass_mlx.serving.app import Api, ApiOptions
from glass_mlx.serving.engine import Engine
from glass_mlx.serving.output_parser import OutputParser
from glass_mlx.serving.request import Chunk
from glass_mlx.serving.server import Server


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


@pytest.fixture(scope="module")
def served(tmp_path_factory, tiny_dir):
    with serving(ApiOptions(defaults={"max_tokens": 24}), allow_paths=(tiny_dir.parent,)) as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(served):
    with httpx.Client(base_url=served.url, timeout=60) as http:
        yield http


def events(http: httpx.Client, path: str = CHAT, **body) -> list[dict]:
    """The data of a stream's events."""
    with http.stream("POST", path, json={"stream": True, **body}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.fixture(scope="module")
def expected(demo) -> tuple[str, int, int]:
    """The answer, and the numbers of prompt and generated tokens."""
    return answered(*demo)


def test_chat(client, expected):
    answer = client.chat.completions.create(model="demo", messages=QUESTION)
    text, prompt, said = expected
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.object, answer.model, answer.choices[0].message.role) == ("chat.completion", "demo", "assistant")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, said, prompt + said)
    assert usage.glass["density"] == 0.5 and usage.glass["kept_neurons"] == usage.glass["total_neurons"] // 2
    assert usage.glass["cached_tokens"] == usage.prompt_tokens_details.cached_tokens


def test_chat_stream(client, expected):
    chunks = list(client.chat.completions.create(model="demo", messages=QUESTION, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected[0]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_usage(client, expected):
    stream = client.chat.completions.create(
        model="demo", messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert last.choices == [] and last.usage.completion_tokens == expected[2]
    assert last.usage.glass["generation_tps"] > 0


def test_a_verified_answer(client):
    options = {"density": 0.25, "verify": True}
    answer = client.chat.completions.create(model="demo", messages=QUESTION, extra_body=options)
    assert answer.usage.glass["verified"]
    dense = client.chat.completions.create(model="demo", messages=QUESTION, extra_body={"density": 1})
    assert answer.choices[0].message.content == dense.choices[0].message.content
    assert not dense.usage.glass["verified"]


def test_stop(client, expected):
    word = expected[0].split()[3]
    before = expected[0].partition(word)[0]
    answer = client.chat.completions.create(model="demo", messages=QUESTION, stop=[word])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (before, "stop")
    stream = client.chat.completions.create(model="demo", messages=QUESTION, stop=word, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == before


def test_length(client):
    answer = client.chat.completions.create(model="demo", messages=QUESTION, max_completion_tokens=3)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)


def test_seed(client):
    def said(seed: int) -> str:
        options = {"model": "tiny", "messages": QUESTION, "temperature": 1.5, "max_tokens": 4}
        return client.chat.completions.create(seed=seed, **options).choices[0].message.content

    assert said(1) == said(1)
    assert len({said(seed) for seed in range(3)}) > 1


def test_logprobs(client, expected):
    options = {"model": "demo", "messages": QUESTION, "logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(**options)
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content) == f" {expected[0]}"  # the template leaves the space to the model
    for token in content:
        assert len(token.top_logprobs) == 3 and bytes(token.bytes).decode() == token.token
        assert token.logprob == max(other.logprob for other in token.top_logprobs) <= 0
    chunks = client.chat.completions.create(**options, stream=True)
    streamed = [t for chunk in chunks if chunk.choices[0].logprobs for t in chunk.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in content]


def test_completion(client):
    answer = client.completions.create(model="demo", prompt="The old house", max_tokens=8, logprobs=2)
    assert (answer.object, answer.choices[0].finish_reason) == ("text_completion", "length")
    assert "".join(answer.choices[0].logprobs.tokens) == answer.choices[0].text
    stream = client.completions.create(model="demo", prompt="The old house", max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_several_prompts_and_answers(client):
    """Each is what it would be alone; together they cost what they cost alone, but for the prompts."""
    options = {"model": "tiny", "max_tokens": 3, "temperature": 1.0, "seed": 5}
    alone = [client.completions.create(prompt=p, **options) for p in ("The old house", "I want")]
    both = client.completions.create(prompt=["The old house", "I want"], n=2, **options)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices[::2]] == [one.choices[0].text for one in alone]
    assert both.choices[0].text != both.choices[1].text  # of another seed
    assert both.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
    assert both.usage.completion_tokens == 12
    said = [""] * 4
    for chunk in client.completions.create(prompt=["The old house", "I want"], n=2, stream=True, **options):
        said[chunk.choices[0].index] += chunk.choices[0].text
    assert said == [choice.text for choice in both.choices]


def test_several_answers_of_a_chat(client):
    options = {"model": "tiny", "messages": QUESTION, "max_tokens": 4, "n": 2, "temperature": 1.0, "seed": 1}
    answer = client.chat.completions.create(**options, logprobs=True)
    said = [choice.message.content for choice in answer.choices]
    assert said[0] != said[1] and all(len(choice.logprobs.content) == 4 for choice in answer.choices)
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
    for index in range(2):
        mine = [choice.delta for choice in chunks if choice.index == index]
        assert mine[0].role == "assistant" and "".join(delta.content or "" for delta in mine) == said[index]


def test_a_client_that_goes_gives_up_all_its_answers(served, http):
    body = {"model": "tiny", "prompt": ["a", "b", "c"], "n": 3, "max_tokens": 1_000_000}
    with connect(served) as connection:
        connection.sendall(raw("/v1/completions", body))
        until(lambda: served.engine.status().state == "generating")
    until(lambda: not served.api.pending and served.engine.status().state == "ready")
    assert served.engine.status().queued == 0


def test_echo(client):
    alone = client.completions.create(model="demo", prompt="The old house", max_tokens=3).choices[0].text
    for prompt in ("The old house", [1, 384, 1117, 1100]):
        echoed = client.completions.create(model="demo", prompt=prompt, max_tokens=3, echo=True).choices[0].text
        if isinstance(prompt, str):
            assert echoed == prompt + alone
        stream = client.completions.create(model="demo", prompt=prompt, max_tokens=3, echo=True, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == echoed


def test_a_text_and_its_continuation_are_one_text(client, demo):
    """The leading space is the model's."""
    for prompt in ("I want to", "The old house stood"):
        answer = client.completions.create(model="demo", prompt=prompt, max_tokens=6, logprobs=0).choices[0]
        tokens = demo[1].encode(prompt + answer.text)
        assert demo[1].decode(tokens, skip_special_tokens=True) == prompt + answer.text
        assert answer.text == "".join(answer.logprobs.tokens) and answer.text.startswith(" ")


def test_the_last_message_is_continued(client):
    """What comes is what would have come."""
    options = {"model": "demo", "extra_body": {"density": 1}}
    whole = client.chat.completions.create(messages=QUESTION, **options).choices[0].message.content
    begun = whole[: whole.index(" ", 6)]
    messages = [*QUESTION, {"role": "assistant", "content": begun}]
    answer = client.chat.completions.create(messages=messages, **options)
    assert begun + answer.choices[0].message.content == whole


def test_warnings(http, caplog):
    """They come in a header, streamed or not, and in the log."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for stream in (False, True):
        caplog.clear()
        body = {"messages": QUESTION, "max_tokens": 1, "stream": stream, "guided_json": {}, "tools": tools}
        response = http.post(CHAT, json=body)
        for told in ("guided_json is ignored", "chat template does not show them"):
            assert told in response.headers["x-glass-warning"] and told in caplog.text
    assert "x-glass-warning" not in http.post(CHAT, json={"messages": QUESTION, "max_tokens": 1}).headers
    refused = http.post(CHAT, json={"messages": QUESTION, "adapters": "x"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "adapters")


def test_the_context_ends_an_answer(model_copy):
    config = model_copy / "config.json"
    config.write_text(config.read_text().replace("{", '{"max_position_embeddings": 32, ', 1))
    with serving(model=str(model_copy), load={"stats": False}) as server:
        for given in ({"max_tokens": 150}, {"max_tokens": -1}):
            body = {"messages": QUESTION, "logit_bias": {"2": -100}, **given}
            answer = httpx.post(server.url + CHAT, json=body, timeout=60).json()
            assert answer["usage"]["total_tokens"] == 32 and answer["choices"][0]["finish_reason"] == "length"


def test_top_p_of_nothing_is_the_most_likely_token(client, expected):
    """And so is a temperature that rounding would make nonsense of."""
    for options in ({"temperature": 1.5, "top_p": 0}, {"temperature": 1e-30}):
        answer = client.chat.completions.create(model="demo", messages=QUESTION, **options)
        assert answer.choices[0].message.content == expected[0]


def test_settings_of_a_request(client, demo):
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, extra_body={"density": 0.25, "global_weight": 1, "signal": "activation"}
    )
    said = answer.usage.glass
    total = sum(block.size for block in demo[0].blocks)
    assert (said["density"], said["kept_neurons"], said["total_neurons"]) == (0.25, total // 4, total)
    assert (said["global_weight"], said["signal"]) == (1.0, "activation")


def test_models(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["demo", "tiny"]
    assert client.models.retrieve("demo").size_bytes > 1_000_000
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


def test_another_model(client, http):
    assert client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=2).model == "tiny"
    assert http.get("/v1/status").json()["model"] == "tiny"
    assert client.chat.completions.create(model="default_model", messages=QUESTION, max_tokens=2).model == "demo"


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_next_turn_pays_only_for_new_tokens(client, density):
    """And for the answer before it."""
    messages = [{"role": "user", "content": "I am looking for a cheap hotel in Cambridge. " * 6}]
    known = 0
    for _ in range(2):
        answer = client.chat.completions.create(model="demo", messages=messages, extra_body={"density": density})
        usage = answer.usage
        assert usage.prompt_tokens_details.cached_tokens >= known
        known = usage.prompt_tokens - 32  # calls end at messages, but are not shorter than that
        messages += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": "Is it near?"},
        ]


def test_status_and_unload(client, http):
    client.chat.completions.create(model="demo", messages=QUESTION)
    status = http.get("/v1/status").json()
    assert (status["state"], status["model"], status["has_ranks"], status["queued"]) == ("ready", "demo", True, 0)
    assert status["tokens_per_second"] > 0 and status["memory_bytes"] > 1_000_000
    status = http.post("/v1/unload").json()
    assert (status["state"], status["model"]) == ("unloaded", None)
    assert http.get("/health").json() == {"status": "ok"}


def test_openapi(http):
    document = http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1") and CHAT in document["paths"]


def test_errors_of_the_openai_client(client):
    with pytest.raises(openai.NotFoundError) as e:
        client.chat.completions.create(model="nope", messages=QUESTION)
    assert (e.value.code, e.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model="demo", messages=QUESTION, temperature=9)
    assert e.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="template|range"):
        client.chat.completions.create(model="demo", messages=QUESTION, logit_bias={"99999": 1})


def test_events(http, expected):
    """The second client: raw server-sent events."""
    got = events(http, messages=QUESTION, stream_options={"include_usage": True})
    deltas = [event["choices"][0]["delta"] for event in got[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == expected[0]
    assert got[-2]["choices"][0]["finish_reason"] == "stop"
    assert got[-1]["choices"] == [] and got[-1]["usage"]["total_tokens"] == sum(expected[1:])
    text = events(http, "/v1/completions", prompt="The old house", max_tokens=4)
    assert len(text) == 4 and text[-1]["choices"][0]["finish_reason"] == "length"


def test_keepalive_while_waiting(http, monkeypatch):
    monkeypatch.setattr(api, "KEEPALIVE", 0.02)
    endless = {"model": "tiny", "messages": QUESTION, "max_tokens": 1_000_000, "stream": True}
    with http.stream("POST", CHAT, json=endless) as first:
        answering = first.iter_lines()
        next(answering)
        with http.stream("POST", CHAT, json={**endless, "max_tokens": 1}) as second:
            lines = second.iter_lines()
            while not next(lines).startswith(": keepalive"):
                pass
            first.close()
            assert "data: [DONE]" in list(lines)


def test_an_error_within_a_stream(http, monkeypatch):
    """The status has been sent by then, so the error comes as an event."""
    monkeypatch.setattr(api, "KEEPALIVE", 0.0)
    with http.stream("POST", CHAT, json={"messages": QUESTION, "logit_bias": {"99999": 1}, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [True, False])
def test_tools_and_reasoning(client, monkeypatch, stream):
    """The demo knows neither; this is what a model that does would say."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}

    def feed(self, text: str) -> Chunk:
        self.has_tool_calls = True
        first, self.done = not hasattr(self, "done"), True
        return Chunk("Sure.", "hm", (call,)) if first else Chunk()

    monkeypatch.setattr(OutputParser, "feed", feed)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    answer = client.chat.completions.create(model="demo", messages=QUESTION, tools=tools, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        said = [choice.delta for choice in choices]
        called = [call for delta in said for call in delta.tool_calls or ()]
        assert called[0].index == 0
    else:
        choices = answer.choices
        said = [answer.choices[0].message]
        called = said[0].tool_calls
    assert choices[-1].finish_reason == "tool_calls"
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in said) == "hm"
    assert (called[0].function.name, called[0].function.arguments) == ("weather", '{"city": "Ulm"}')


def test_concurrent_clients_get_what_they_would_get_alone(served, client):
    questions = [f"Tell me of the {thing}." for thing in "sea hill road".split()]
    said: dict[str, str] = {}

    def ask(question: str, stream: bool) -> str:
        messages = [{"role": "user", "content": question}]
        answer = client.chat.completions.create(model="demo", messages=messages, max_tokens=8, stream=stream)
        if not stream:
            return answer.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)

    expected = {}
    for question in questions:
        expected[question] = ask(question, False)
        served.engine.unload().result()
    threads = [
        threading.Thread(target=lambda q=q, i=i: said.update({q: ask(q, i % 2 == 0)})) for i, q in enumerate(questions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == expected


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_stops_its_generation(served, http, stream):
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 1_000_000, "stream": stream}
    with connect(served) as connection:
        connection.sendall(raw(body=body))
        until(lambda: served.engine.status().state == "generating")
    until(lambda: served.engine.status().state == "ready")
    until(lambda: not served.api.pending)


def test_a_client_that_goes_while_waiting_gives_its_place_free(served, http):
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 1_000_000, "stream": True}
    with connect(served) as first, connect(served) as second:
        first.sendall(raw(body=body))
        until(lambda: served.engine.status().state == "generating")
        second.sendall(raw(body=body))
        until(lambda: served.engine.status().queued == 1)
        second.close()
        until(lambda: served.engine.status().queued == 0)


def test_queue_full(tiny_dir):
    body = {"messages": QUESTION, "max_tokens": 1_000_000, "stream": True}
    with serving(model=str(tiny_dir), load={"stats": False}, max_queue=1) as server:
        with connect(server) as first, connect(server) as second:
            first.sendall(raw(body=body))
            until(lambda: server.engine.status().state == "generating")
            second.sendall(raw(body=body))
            until(lambda: server.engine.status().queued == 1)
            refused = httpx.post(server.url + CHAT, json=body, timeout=60)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
            assert refused.json()["error"]["code"] == "queue_full"


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_page(served, http, tmp_path, monkeypatch):
    assert "/v1" in http.get("/").text
    (tmp_path / "index.html").write_text("<p>hello")
    (tmp_path / "page.js").write_text("1")
    monkeypatch.setattr(api, "PAGE", tmp_path)
    app = Api(served.engine).app
    with httpx.Client(transport=Bridge(app), base_url="http://localhost") as page:
        index = page.get("/")
        assert index.text == "<p>hello" and index.headers["content-type"].startswith("text/html")
        assert index.headers["content-security-policy"].startswith("default-src 'self'")
        assert page.get("/static/page.js").text == "1"
        for path in ("/static/../api.py", "/static/%2e%2e/api.py", "/static//etc/passwd", "/static/", "/static/x"):
            assert page.get(path).status_code in (404, 405)


class Bridge(httpx.BaseTransport):
    """An ASGI application without a socket."""

    def __init__(self, app):
        from starlette.testclient import TestClient

        self.client = TestClient(app, base_url="http://localhost")

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self.client.request(request.method, str(request.url), headers=dict(request.headers))
        return httpx.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)


def test_log(tiny_dir, caplog):
    """What was asked is in the log only if the operator wants it."""
    for wanted in (False, True):
        caplog.clear()
        options = ApiOptions(defaults={"max_tokens": 3}, log_prompts=wanted)
        with caplog.at_level("INFO"), serving(options, model=str(tiny_dir), load={"stats": False}) as server:
            for stream in (False, True):
                httpx.post(server.url + CHAT, json={"messages": QUESTION, "stream": stream}, timeout=60)
            httpx.post(server.url + CHAT, json={"messages": QUESTION, "temperature": "San Jose"}, timeout=60)
        assert caplog.text.count("3 generated") == 2
        assert caplog.text.count("San Jose") == (2 if wanted else 0)


def test_start_stop():
    engine = Engine()
    server = Server(engine, port=0).start()
    assert server.alive and httpx.get(server.url + "/health").status_code == 200
    with pytest.raises(glass_mlx.GlassError, match=f"127.0.0.1:{server.port}.*in use.*--port"):
        Server(engine, port=server.port).start()
    server.stop()
    assert not server.alive and engine.alive
    again = Server(engine, port=server.port).start()  # the engine is the caller's
    again.stop()
    engine.close()


def test_stop_ends_streams(tiny_dir):
    with serving(model=str(tiny_dir), load={"stats": False}) as server:
        body = {"messages": QUESTION, "max_tokens": 1_000_000, "stream": True}
        with httpx.stream("POST", server.url + CHAT, json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.stop()
            assert list(lines)[-2].endswith("[DONE]")


@pytest.mark.parametrize(("number", "new"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_command_line(number, new, tmp_path):
    options = ("--port", 0, "--model", "demo", "--density", 0.25, "--log-dir", tmp_path)
    command = ("-c", "from glass_mlx.server import main; main()", *options)
    with running(tmp_path, command, environment(), new=new) as server:
        line = server.until(lambda so_far: so_far.out.endswith("\n")).out
        url = line.split()[3].removesuffix("/v1")
        assert str(tmp_path / "server.log") in line
        assert httpx.get(f"{url}/v1/status", timeout=60).json()["state"] == "ready"
        answer = httpx.post(url + CHAT, json={"messages": QUESTION, "max_tokens": 2}, timeout=60).json()
        assert answer["usage"]["glass"]["density"] == 0.25
        server.process.send_signal(number)
        ended = server.ended()
    assert ended.code == 0 and "Traceback" not in ended.err
    assert "2 generated" in (tmp_path / "server.log").read_text()


def test_port_in_use(invoke, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = invoke(server.main, "--port", other.getsockname()[1], "--log-dir", tmp_path)
    assert done.code == 1 and done.out == ""
    assert done.err.splitlines()[-1].startswith("error: Cannot listen on 127.0.0.1:") and "Traceback" not in done.err


def test_a_model_that_is_not_there(invoke, tmp_path):
    done = invoke(server.main, "--port", 0, "--model", tmp_path / "none", "--log-dir", tmp_path)
    assert done.code == 1 and "Unknown model" in done.err.splitlines()[-1]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "mac.local"])
def test_other_machines_need_a_key(invoke, host, monkeypatch):
    done = invoke(server.main, "--host", host)
    assert done.code == 2 and "lets other machines in: give --api-key" in done.err
    started = []
    monkeypatch.setattr(server, "serve", started.append)
    monkeypatch.setenv("GLASS_API_KEY", "secret")
    assert invoke(server.main, "--host", host).code == 0
    assert started[0].api_key == "secret"


@pytest.mark.parametrize("host", ["0.0.0.0", "", "192.168.1.5", "mac.local"])
def test_nor_are_they_let_in_without_a_key_by_other_ways(served, host):
    for options in (None, ApiOptions(), ApiOptions(api_key="")):
        with pytest.raises(glass_mlx.GlassError, match="API key"):
            Server(served.engine, host, 0, options)
    assert Server(served.engine, host, 0, ApiOptions(api_key="secret")).url


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        *((f"--{name}", "0", "at least 1") for name in ("max-queue", "max-tokens", "prompt-cache-size", "kv-bits")),
        *((f"--{name}", "-1", "at least 0") for name in ("temp", "top-k", "idle-timeout")),
        *(("--port", "99999", "0 to 65535"), ("--port", "-1", "0 to 65535"), ("--top-p", "5", "0 to 1")),
        *(("--min-p", "nan", "0 to 1"), ("--temp", "inf", "at least 0")),
    ],
)
def test_bad_options(invoke, option, value, told):
    done = invoke(server.main, option, value)
    assert done.code == 2 and f"{option} must be {told}" in done.err


def test_options_of_mlx_lms_server(invoke):
    """Each is taken, or refused with the reason."""
    known = set(re.findall(r'"(--[a-z-]+)"', inspect.getsource(mlx_lm.server.main)))
    ours = {option for action in server.setup_arg_parser()._actions for option in action.option_strings}
    assert len(known) > 20 and known <= ours
    for option, reason in server.NOT_SERVED.items():
        for value in ((), ("2",)):
            done = invoke(server.main, option, *value)
            assert done.code == 2 and f"{option}: {reason}" in done.err


def test_an_adapter_that_is_not_there(invoke, tmp_path):
    for path, missing in ((tmp_path / "none", "adapter_config.json"), (tmp_path, "adapters.safetensors")):
        (tmp_path / "adapter_config.json").touch()
        done = invoke(server.main, "--adapter-path", path)
        assert done.code == 2 and "--adapter-path" in done.err and missing in done.err


def test_settings_that_do_not_fit_the_model(invoke, tmp_path):
    """They are found out at the start, also of the model that is otherwise loaded at the first request."""
    done = invoke(server.main, "--port", 0, "--kv-bits", 4, "--log-dir", tmp_path)
    assert done.code == 1 and "--kv-group-size" in done.err.splitlines()[-1]


def test_options():
    glass = "--dense --low-memory --max-session-memory 1MB"
    serving = "--idle-timeout 0 --prompt-cache-bytes 1.5GiB --allowed-origins http://a,http://b"
    args = server.setup_arg_parser().parse_args(f"{glass} {serving} --kv-bits 8 --temp 0.7".split())
    engine, api_ = server.engine_options(args), server.api_options(args)
    assert (engine.config.density, engine.idle_timeout, engine.max_cache_bytes) == (1.0, None, 3 << 29)
    assert (engine.load["low_memory"], engine.load["max_session_memory"]) == (False, 1_000_000)  # dense needs them all
    assert engine.kv == {"kv_bits": 8, "kv_group_size": 64, "quantized_kv_start": 5000}
    assert (api_.defaults["temperature"], api_.origins) == (0.7, ("http://a", "http://b"))


@pytest.mark.parametrize(
    ("text", "origins"),
    [("*", ("*",)), ("http://a:1/,https://b", ("http://a:1", "https://b")), ("http://a,nonsense", None), ("", None)],
)
def test_allowed_origins(invoke, monkeypatch, text, origins):
    started = []
    monkeypatch.setattr(server, "serve", started.append)
    done = invoke(server.main, "--allowed-origins", text)
    if origins is None:
        assert done.code == 2 and "is not a web origin" in done.err.splitlines()[-1]
    else:
        assert server.api_options(started[0]).origins == origins


def test_without_the_libraries(monkeypatch, invoke):
    monkeypatch.delitem(sys.modules, "glass_mlx.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = invoke(server.main)
    assert (done.code, done.err) == (1, "error: the server needs uvicorn: pip install 'glass_mlx[server]'\n")
