"""Tests of a server whose model two processes share: the same answers, in step whatever happens, one end."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from launching import launched
from mlx_lm.models import qwen3_moe
from processes import Ended, Running
from servers import CHAT
from sharded_server import LACKED, POISON, PROMPT, TOKENS, WRONG
from test_sharded_loading import MOE, livelier, written

import glass_mlx

PROGRAM = Path(__file__).parent / "sharded_server.py"
TEXT = "/v1/completions"
OPENING = {"role": "user", "content": "Tell me of the sea and of the hill, and of all the ships that went by."}


def url(first: Ended) -> str:
    return "".join(re.findall(r"is at (http\S+)/v1", first.out))


@dataclass
class Served:
    """A server of two processes."""

    client: httpx.Client
    processes: list[Running]

    def ask(self, path: str = CHAT, **body) -> dict:
        body = {"max_tokens": TOKENS} | ({"messages": [OPENING]} if path == CHAT else {"prompt": PROMPT}) | body
        response = self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def text(self, path: str = CHAT, **body) -> str:
        (choice,) = self.ask(path, **body)["choices"]
        return choice["text"] if path == TEXT else choice["message"]["content"]


@pytest.fixture(scope="module")
def served(lively_dir, tmp_path_factory) -> Iterator[Served]:
    """All processes end with the first one in good order, also if a terminal's Ctrl-C reaches every one."""
    directory = tmp_path_factory.mktemp("served")
    options = ("--density", 0.5, "--allow-path", lively_dir.parent.parent)
    with (
        launched(directory, PROGRAM, "generate", lively_dir, *options, until=url) as processes,
        httpx.Client(base_url=url(processes[0].so_far), timeout=300) as client,
    ):
        yield Served(client, processes)
        processes[1].process.send_signal(signal.SIGINT)
        processes[0].process.send_signal(signal.SIGTERM)
        ended = [process.ended() for process in processes]
        assert [(process.code, process.errors) for process in ended] == [(0, []), (0, [])]


def in_one_process(path: Path) -> str:
    """The dense answer of a whole model."""
    model, tokenizer = glass_mlx.load(path, stats=False)
    return glass_mlx.generate(model, tokenizer, PROMPT, max_tokens=TOKENS, density=1.0).strip()


def test_the_dense_answer_is_one_machines(served, lively_dir):
    expected = in_one_process(lively_dir)
    assert served.text(TEXT, density=1.0).strip() == expected != ""
    assert served.text(TEXT, verify=True).strip() == expected


def test_the_sparse_answer_is_the_commands(served):
    """As the same processes have generated it before."""
    generated = json.loads(served.processes[0].so_far.out.splitlines()[0])
    answer = served.ask(TEXT)
    assert answer["choices"][0]["text"].strip() == generated["text"].strip()
    assert answer["usage"]["glass"]["kept_neurons"] == generated["kept_neurons"]
    assert served.ask(TEXT, density=0.25)["usage"]["glass"]["kept_neurons"] < generated["kept_neurons"]


def test_a_sampled_answer_is_its_seeds(served):
    """The first process samples; others in another state, or with other logits, follow."""
    options = {"temperature": 1.0, "seed": 7, "repetition_penalty": 1.3}
    assert served.text(**options) == served.text(**options) != served.text(**(options | {"seed": 8}))
    assert served.text(**options, verify=True)


def test_the_form_of_an_answer(served):
    schema = {"type": "object", "properties": {"n": {"enum": [3]}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    assert json.loads(served.text(response_format=form, max_tokens=60)) == {"n": 3}


def test_words_that_end_an_answer(served):
    whole = served.text(max_tokens=10)
    assert served.text(max_tokens=10, stop=whole[4:7]) == whole[: whole.index(whole[4:7])]
    (choice,) = served.ask(logprobs=True, top_logprobs=2, max_tokens=2)["choices"]
    assert all(token["logprob"] <= 0 and len(token["top_logprobs"]) == 2 for token in choice["logprobs"]["content"])


def test_the_next_turn_goes_on_with_what_was_read(served):
    """It answers as if it had read all itself."""
    opening = OPENING | {"content": 2 * OPENING["content"]}  # long enough to be kept, whether the answer is read or not
    answer = served.text(messages=[opening])
    turns = [opening, {"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
    again = served.ask(messages=turns)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    served.client.post("/v1/unload")
    afresh = served.ask(messages=turns)
    assert afresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["choices"] == afresh["choices"]


def test_streams_and_responses(served):
    body = {"messages": [OPENING], "max_tokens": TOKENS, "stream": True}
    with served.client.stream("POST", CHAT, json=body) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    said = "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])
    assert said == served.text()
    answer = served.client.post("/v1/responses", json={"input": OPENING["content"], "max_output_tokens": 16}).json()
    assert answer["output"][0]["content"][0]["text"].startswith(said[:8])


def test_a_client_that_leaves(served):
    """While it is answered, and while its long prompt is read; the next one finds all processes in step."""
    expected = served.text()
    endless = {"max_tokens": 100_000, "stream": True, "logit_bias": {"2": -100}}
    with served.client.stream("POST", CHAT, json={"messages": [OPENING], **endless}) as response:
        next(response.iter_lines())
    assert served.text() == expected
    with suppress(httpx.TimeoutException):
        served.client.post(TEXT, json={"prompt": [5] * 5000, **endless}, timeout=0.5)
    assert served.text() == expected


def test_errors(served):
    """In all processes, in one only, and of the request."""
    expected = served.text(max_tokens=2)
    told = []
    for path, body, status in (
        (TEXT, {"prompt": [1, POISON, 5]}, 500),
        (CHAT, {"messages": [OPENING], "logprobs": True, "top_logprobs": WRONG}, 500),
        (CHAT, {"messages": [OPENING], "model": "not-there"}, 404),
        (CHAT, {"messages": [OPENING], "model": LACKED}, 500),
        (TEXT, {"prompt": [1, 99999]}, 400),
    ):
        response = served.client.post(path, json={"max_tokens": 2} | body)
        assert response.status_code == status
        told.append(response.json()["error"]["message"])
        assert served.text(max_tokens=2) == expected
    assert told[3] == "demo cannot be loaded: rank 1: It is not here."
    refused = served.client.post("/v1/measure")
    assert refused.status_code == 400 and "on one machine" in refused.text


def test_other_models(served, tiny_dir):
    """Each process loads its part of them."""
    served.client.post("/v1/unload")
    name = str(tiny_dir.relative_to(tiny_dir.parent.parent))
    assert served.ask(model=name)["usage"]["glass"]["total_neurons"] == 192
    facts = served.client.get("/v1/status").json()["facts"]
    assert facts["group"] == "2 ranks, tensor parallel"
    assert served.text(model="default_model")


def test_layers_by_machine_and_a_process_that_dies(lively_dir, tmp_path):
    """With --pipeline. The first process says in one line that another one has ended, also while it waits."""
    model = livelier(qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(MOE)))
    written(tmp_path / "moe", lively_dir, MOE, model)
    with launched(tmp_path, PROGRAM, "serve", tmp_path / "moe", "--pipeline", until=url) as processes:
        with httpx.Client(base_url=url(processes[0].so_far), timeout=300) as client:
            served = Served(client, processes)
            assert served.text(TEXT, density=1.0).strip() == in_one_process(tmp_path / "moe") != ""
            assert served.text(TEXT, density=0.5, stop="zzz") == served.text(TEXT, density=0.5)
        processes[1].process.kill()
        first = processes[0].ended()
    assert first.code == 1
    assert [line[:38] for line in first.errors] == ["error: rank 1 has ended or cannot be r"]
