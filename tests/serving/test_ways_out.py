"""Every way out of a request: where the client leaves, or the engine closes, by endpoint and form of the answer.

After each, the engine is free, the queue is empty, the next request is answered as if nothing had been, nothing was
logged as wrong, and no thread is left.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPResponse
from itertools import count

import httpx
import pytest
from servers import CHAT, QUESTION, connect, raw, serving

from glass_mlx.model.glass_model import GlassModel
from glass_mlx.serving import model_loading, operations, worker
from glass_mlx.serving.app import ApiOptions
from glass_mlx.serving.errors import EngineFailed
from glass_mlx.serving.openapi import document
from glass_mlx.serving.request import Request

ASKED = {
    CHAT: {"messages": QUESTION},
    "/v1/completions": {"prompt": "I want to find a restaurant in San Jose, and a hotel that is not too far from it."},
    "/v1/responses": {"input": "I want to find a restaurant in San Jose."},
}
PATHS = [path for path in ASKED if path in document()["paths"]]
PLACES = ["queue", "load", "prefill", "decode", "last chunk"]
OPTIONS = {"load": {"stats": False}, "prefill_step_size": 4}


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


class Gate:
    """Holds the engine's thread the first time that it comes by."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()

    def hold(self) -> None:
        if not self.reached.is_set():
            self.reached.set()
            assert self.open.wait(60), "nobody opened the gate"


@pytest.fixture(scope="module", autouse=True)
def no_reading_ahead():
    """Reading the last test's answer ahead also prefills, and may go on into the next test."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(worker.Worker, "read_ahead", lambda self, _: setattr(self, "answered", None))
        yield


@pytest.fixture
def gate(request, monkeypatch):
    """A gate at the place that the test names."""
    gate, place = Gate(), request.getfixturevalue("place")
    load, prefill, stream = model_loading.load, GlassModel.prefill, operations.stream_generate

    def held_load(*args, **options):
        gate.hold()
        return load(*args, **options)

    def held_prefill(*args, **options):
        gate.hold()
        return prefill(*args, **options)

    def held_stream(*args, **options):
        with closing(stream(*args, **options)) as responses:
            for number, response in zip(count(), responses):
                if number == 2 if place in ("queue", "decode") else response.finish_reason:
                    gate.hold()
                yield response

    if place == "load":
        monkeypatch.setattr(model_loading, "load", held_load)
    elif place == "prefill":
        monkeypatch.setattr(GlassModel, "prefill", held_prefill)
    else:
        monkeypatch.setattr(operations, "stream_generate", held_stream)
    yield gate
    gate.open.set()


@pytest.fixture(scope="module")
def served(tiny_dir):
    with serving(ApiOptions(defaults={"max_tokens": 6}), model=str(tiny_dir), **OPTIONS) as server:
        yield server


@pytest.fixture(scope="module")
def answers(served) -> dict[str, str]:
    """What is answered where nobody leaves."""
    return {path: answer(served, path) for path in PATHS}


def answer(server, path: str) -> str:
    # with a seed it depends on the request alone
    response = httpx.post(server.url + path, json={**ASKED[path], "seed": 1}, timeout=60)
    assert response.status_code == 200
    body = response.json()
    return json.dumps(body.get("choices") or body["output"][0]["content"])


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def threads() -> set[str]:
    """All but the pools of event loops, whose threads wait for the next work, and tqdm's."""
    pools = ("asyncio_", "AnyIO worker", "tqdm_monitor")
    return {thread.name for thread in threading.enumerate() if not thread.name.startswith(pools)}


def reach(server, gate: Gate, place: str, path: str, **body) -> list[socket.socket]:
    """Ask, and wait until the request is at its place; for the queue, behind another one. Returns the connections."""
    connections = [connect(server)]
    connections[0].sendall(raw(path, {**ASKED[path], **body}))
    assert gate.reached.wait(60)
    if place == "queue":
        connections.append(connect(server))
        connections[1].sendall(raw(path, {**ASKED[path], **body}))
        until(lambda: server.engine.status().queued == 1)
    return connections


@pytest.mark.few(10)  # each place twice, and each path
@pytest.mark.parametrize(("path", "stream"), [*((path, True) for path in PATHS), (CHAT, False)])
@pytest.mark.parametrize("place", PLACES)
def test_the_client_leaves(served, answers, gate, place, path, stream, caplog):
    engine = served.engine
    if place == "load":
        engine.unload().result()
    before = threads()
    with caplog.at_level(logging.WARNING):
        connections = reach(served, gate, place, path, stream=stream)
        connections[-1].close()
        if place == "queue":
            until(lambda: engine.status().queued == 0)  # before the other one is done
            assert len(served.api.pending) == 1 and engine.status().state == "generating"
            connections[0].close()
        until(lambda: all(pending.cancelled for pending in set(served.api.pending)))
        gate.open.set()
        until(lambda: not served.api.pending and engine.status().state == "ready" and engine._current is None)
        assert engine.status().queued == 0 and engine.status().error is None
        assert answer(served, path) == answers[path]
    assert not caplog.records, caplog.text
    until(lambda: threads() == before)  # a thread that was told to end needs a moment


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_the_engine_closes(tiny_dir, gate, place, stream, caplog):
    """The client gets an answer that ends, and the server says that it is not available."""
    before = threads()
    with caplog.at_level(logging.WARNING), serving(model=str(tiny_dir), **OPTIONS) as server:
        connections = reach(server, gate, place, CHAT, stream=stream, max_tokens=6)
        closer = threading.Thread(target=server.engine.close)
        closer.start()
        until(lambda: not server.engine.alive)
        gate.open.set()
        closer.join(60)
        for connection, waited in zip(connections, (False, True)):
            with connection:
                response = HTTPResponse(connection)
                response.begin()
                body = response.read()
            assert response.status == (500 if waited else 200) and (b"was closed" in body) == waited
        assert httpx.get(server.url + "/health").status_code == 503
        with pytest.raises(EngineFailed, match="closed"):
            server.engine.submit(Request(prompt="x"))
        until(lambda: not server.api.pending)
        assert server.engine.status().queued == 0 and server.engine.status().state == "unloaded"
    assert not caplog.records, caplog.text
    until(lambda: threads() == before)  # a thread that was told to end needs a moment


@pytest.mark.parametrize("path", PATHS)
def test_little_is_sent_after_the_client_has_left(served, path):
    """Also where many events are sent at once: asyncio warns of what goes to a lost connection."""
    body = json.dumps({**ASKED[path], "stream": True, "seed": 1, "max_tokens": 12}).encode()
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": path, "query_string": b""}
    scope |= {"headers": headers, "client": ("127.0.0.1", 5), "scheme": "http", "server": ("127.0.0.1", 80)}

    async def ask(leaves_after: float) -> int:
        left, sent, messages = asyncio.Event(), [], [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            if message["type"] == "http.response.body" and message.get("more_body"):
                sent.append(message)
                if len(sent) == leaves_after:
                    left.set()

        await served.api.app(scope, receive, send)
        return len(sent)

    whole = asyncio.run(ask(math.inf))
    assert whole > 8
    assert asyncio.run(ask(1)) <= 4
