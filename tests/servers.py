"""Servers for the tests: a real one on a free port, and its raw connections."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

from glass_mlx import stream_generate
from glass_mlx.serving.app import ApiOptions
from glass_mlx.serving.engine import Engine, EngineOptions
from glass_mlx.serving.server import Server

CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "I want to find a restaurant in San Jose."}]


def answered(model: Any, tokenizer: Any, messages: list[dict[str, str]] = QUESTION) -> tuple[str, int, int]:
    """What the package itself answers to the question: the text, and the numbers of prompt and generated tokens."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    responses = list(stream_generate(model, tokenizer, prompt, 512))
    return "".join(response.text for response in responses), len(prompt), len(responses)


@contextlib.contextmanager
def serving(options: ApiOptions | None = None, host: str = "127.0.0.1", **engine) -> Iterator[Server]:
    """A server on a free port, stopped in the end."""
    made = Engine(EngineOptions(**engine))
    server = Server(made, host, 0, options)
    try:
        yield server.start()
    finally:
        server.stop()
        made.close()


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


def raw(path: str = CHAT, body: dict | None = None, method: str = "POST") -> bytes:
    """A request as it goes over the wire."""
    data = json.dumps(body or {}).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data
