"""Tests of what the other processes of a group do: they carry out the first one's operations.

The processes are one here: what the first one says on the wire is played to the others afterwards.
"""

from __future__ import annotations

from collections import deque

import mlx.core as mx
import pytest

import glass_mlx
from glass_mlx import group
from glass_mlx.serving import cache_store, operations
from glass_mlx.serving.catalogue import Catalogue
from glass_mlx.serving.engine_options import EngineOptions
from glass_mlx.serving.operations import Operations, follow
from glass_mlx.serving.request import PendingCompletion, Request
from glass_mlx.serving.worker import Worker

OPENING = {"role": "user", "content": "Tell me of the sea and of the hill, and of all the ships that went by."}
OPTIONS = {
    "prefill_step_size": 16,
    "max_cache_bytes": 1 << 30,
    "verify": {"draft_tokens": 3},  # how many pay is a matter of time
}


class Wire:
    """What is exchanged: recorded while this is the first process, and then played to another one."""

    def __init__(self, monkeypatch):
        self.rank, self.exchanged = 0, deque()
        monkeypatch.setattr(group, "size", lambda: 2)
        monkeypatch.setattr(group, "rank", lambda: self.rank)
        monkeypatch.setattr(mx.distributed, "all_sum", self._exchange)
        monkeypatch.setattr(mx.distributed, "all_gather", lambda x, **_: mx.concatenate([self._exchange(x), x]))

    def _exchange(self, value: mx.array, **_) -> mx.array:
        if self.rank == 0:
            self.exchanged.append(value)
            return value
        first = self.exchanged.popleft()
        assert (first.shape, first.dtype) == (value.shape, value.dtype)
        return first


@pytest.fixture
def wire(monkeypatch, lively):
    monkeypatch.setattr(operations, "load_model", lambda *_: lively)
    return Wire(monkeypatch)


@pytest.fixture(scope="module")
def lively(lively_dir):
    return glass_mlx.load(lively_dir, stats=False)


@pytest.fixture
def first(wire) -> Worker:
    """The first process's worker, which has loaded the model."""
    return started()


def started(**options) -> Worker:
    options = EngineOptions(**{**OPTIONS, **options})
    made = Operations(Catalogue(), options)
    made.load("demo")
    return Worker(made, options)


def answer(worker: Worker, leave_at: int | None = None, **fields) -> list[int]:
    """The tokens of an answer, of which a client may want only some."""
    request = Request(**{"messages": [OPENING], "max_tokens": 8, "density": 0.5, **fields})
    pending, seen = PendingCompletion(request, None, lambda _: None), []

    def on_speed(_: float) -> None:
        seen.append(1)
        pending.cancelled = len(seen) == leave_at

    pending.put(worker.complete(pending, on_speed))
    return [chunk.token.id for chunk in pending if chunk.token is not None]


def followed(wire: Wire, monkeypatch, **options) -> Operations:
    """Another process, after it has heard all."""
    operations.end()
    operations.load_model()[0].draft_schedulers.clear()  # it has a model of its own
    wire.rank, made, init = 1, [], Operations.__init__

    def remembered(self, *arguments):
        made.append(self)
        init(self, *arguments)

    monkeypatch.setattr(Operations, "__init__", remembered)
    monkeypatch.setattr(group, "_messages", iter(range(1 << 30)))
    follow(EngineOptions(**{**OPTIONS, **options}))
    assert not wire.exchanged
    return made[0]


def contents(store) -> list:
    """What a store holds, to the last bit."""
    return [
        (c.tokens, c.session.offset, [[mx.array(part).tolist() for part in entry.state] for entry in c.cache[:-1]])
        for c in store._conversations
    ]


@pytest.fixture(autouse=True)
def from_the_first_message(monkeypatch):
    monkeypatch.setattr(group, "_messages", iter(range(1 << 30)))


def test_conversations_are_the_first_ones(wire, first, monkeypatch):
    """Whatever was asked, left, sampled, forced, or read ahead."""
    said = answer(first)
    text = first.tokenizer.decode(said)
    first.read_ahead(lambda: False)
    answer(first, messages=[OPENING, {"role": "assistant", "content": text}, {"role": "user", "content": "Why?"}])
    answer(first, leave_at=3, max_tokens=1000)
    answer(first, temperature=1.0, seed=5, density=0.25, signal="activation")
    answer(first, verify=True, temperature=0.7, seed=5, logit_bias={2: -100.0})
    answer(first, schema={"type": "integer"}, stop=("7",))
    assert contents(followed(wire, monkeypatch).store) == contents(first.store) != []


def test_no_token_is_another_processs(wire, first, monkeypatch):
    """It samples none, whatever its own random state."""
    answer(first, temperature=1.0, prompt="The sea", messages=None)
    mx.random.seed(99)
    followed(wire, monkeypatch)


def test_an_answer_that_is_left_goes_on_until_all_know(wire, first, lively):
    """And no longer."""
    whole = answer(first, max_tokens=30, logit_bias={2: -100.0})
    word = first.tokenizer.decode(whole[:4])[-3:]
    before = len(wire.exchanged)
    answer(first, max_tokens=30, logit_bias={2: -100.0}, stop=(word,))
    steps = sum(value.shape == (2,) and value.dtype == mx.uint32 for value in list(wire.exchanged)[before:])
    assert 4 <= steps <= 4 + 4


def test_limits_are_the_first_ones(wire, monkeypatch):
    first = started(max_conversations=1)
    for word in ("sea", "hill"):
        answer(first, messages=[OPENING | {"content": f"{word} {OPENING['content']}"}])
    assert contents(followed(wire, monkeypatch, max_conversations=5).store) == contents(first.store)
    assert len(first.store) == 1


def test_an_error_of_a_processor_or_a_sampler(wire, first, monkeypatch):
    """They are the first process's alone, and no reason to leave the others waiting."""
    said, processor, calls = answer(first), first.grammars.processor, []

    def failing(request, prompt):
        made = processor(request, prompt)

        def broken(tokens, logits):
            calls.append(1)
            if len(calls) == 3:
                raise ValueError("broken")
            return made(tokens, logits)

        broken.warnings = ()
        return broken

    monkeypatch.setattr(first.grammars, "processor", failing)
    with pytest.raises(ValueError, match="broken"):
        answer(first, schema={"type": "array", "items": {"type": "integer"}, "minItems": 40}, max_tokens=100)
    monkeypatch.setattr(first.grammars, "processor", processor)
    with pytest.raises(ValueError, match="threshold"):
        answer(first, temperature=1.0, xtc_probability=1.0, xtc_threshold=0.9)
    assert answer(first) == said
    assert contents(followed(wire, monkeypatch).store) == contents(first.store)


def test_an_error_in_all_processes(wire, first, monkeypatch):
    said, prefill = answer(first), first.model.prefill

    def failing(inputs, *arguments):
        if 3999 in inputs.tolist()[0]:
            raise RuntimeError("no memory")
        return prefill(inputs, *arguments)

    monkeypatch.setattr(type(first.model), "prefill", lambda self, *arguments: failing(*arguments))
    with pytest.raises(RuntimeError, match="no memory"):
        answer(first, messages=None, prompt=[5] * 50 + [3999] * 50)
    assert answer(first) == said
    assert contents(followed(wire, monkeypatch).store) == contents(first.store)


def test_what_one_process_cannot_cut_no_one_goes_on_with(first, monkeypatch):
    """Its layers may have windows that have forgotten."""
    said = answer(first)
    monkeypatch.setattr(cache_store, "all_of", lambda here: False)
    beginning = first.operations.take([1, 2, 3], [], vars(first.model.config))
    assert beginning.tokens == []
    assert answer(first) == said
