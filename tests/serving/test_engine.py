"""Tests of the engine: answers, turns, the queue, loading and unloading, and what happens when things go wrong."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import shutil
import threading
import time
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import mlx.core as mx
import pytest

import glass_mlx
from glass_mlx.model.quality import density_for
from glass_mlx.serving import model_loading, operations, worker
from glass_mlx.serving.engine import Engine, EngineOptions
from glass_mlx.serving.errors import BadRequest, EngineFailed, QueueFull, UnknownModel
from glass_mlx.serving.queue import RoundRobinQueue
from glass_mlx.serving.request import Chunk, PendingCompletion, Request

USER = {"role": "user", "content": "I want to find a restaurant in San Jose."}
ENDLESS = 1_000_000  # tokens: the random model never stops by itself


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


def ask(text: str, **fields) -> Request:
    return Request(messages=[{"role": "user", "content": text}], **{"max_tokens": 6, **fields})


def text(pending: PendingCompletion) -> str:
    return "".join(chunk.text for chunk in pending)


def last(pending: PendingCompletion) -> Chunk:
    return list(pending)[-1]


@pytest.fixture
def make(request):
    """Make engines that are closed in the end."""

    def make(**options) -> Engine:
        made = Engine(EngineOptions(**options))
        request.addfinalizer(made.close)
        return made

    return make


@pytest.fixture
def demo_engine(make):
    return make()


@pytest.fixture
def tiny_engine(make, tiny_dir):
    return make(model=str(tiny_dir), load={"stats": False})


@pytest.fixture
def make_lively(make, lively_dir):
    """Make engines with a small model that says something else to everything it is asked."""
    return partial(make, model=str(lively_dir), load={"stats": False})


@pytest.fixture
def lively_engine(make_lively):
    return make_lively()


def busy(engine: Engine, **fields) -> PendingCompletion:
    """A request that is being answered until it is cancelled."""
    pending = engine.submit(Request(prompt=[1, 2, 3], max_tokens=ENDLESS, **fields))
    next(iter(pending))
    return pending


def test_an_answer_is_what_the_package_generates(demo_engine, demo):
    model, tokenizer = demo
    prompt = tokenizer.apply_chat_template([USER], add_generation_prompt=True)
    pending = demo_engine.submit(Request(messages=[USER], max_tokens=40))
    assert text(pending) == glass_mlx.generate(model, tokenizer, prompt, max_tokens=40)


def test_chunks(demo_engine, demo):
    chunks = list(demo_engine.submit(Request(messages=[USER], max_tokens=3, logprobs=True, top_logprobs=2)))
    assert [chunk.finish_reason for chunk in chunks] == [None, None, "length"]
    assert "".join(chunk.token.text for chunk in chunks).strip() == "".join(chunk.text for chunk in chunks)
    for chunk in chunks:
        assert chunk.token.logprob == chunk.token.top[0].logprob > chunk.token.top[1].logprob
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (13, 3, 0)
    total = sum(block.size for block in demo[0].blocks)
    assert (usage.density, usage.kept_neurons, usage.total_neurons) == (0.5, total // 2, total)
    assert usage.prompt_tps > 0 and usage.generation_tps > 0 and usage.selection_ms > 0


def test_settings_of_a_request(demo_engine, demo):
    total = sum(block.size for block in demo[0].blocks)
    usage = last(demo_engine.submit(ask("Hello", density=0.25, global_weight=1.0, signal="activation"))).usage
    assert (usage.density, usage.kept_neurons, usage.global_weight, usage.signal) == (
        0.25,
        total // 4,
        1.0,
        "activation",
    )
    last(demo_engine.submit(ask("Hello " * 40, layer_budgets="uniform")))
    kept = demo_engine.call(lambda *_: demo_engine._worker.store._conversations).result()  # once it is stored
    assert kept[-1].session.config.layer_budgets == "uniform"
    fast = demo_engine.call(lambda model, tokenizer: density_for("fast", model.quality)).result()
    assert last(demo_engine.submit(ask("Hello", quality="fast"))).usage.density == fast != 0.5
    usage = last(demo_engine.submit(ask("Hello", density=1.0))).usage
    assert (usage.kept_neurons, usage.selection_ms) == (total, 0)
    assert last(demo_engine.submit(ask("Hello"))).usage.density == 0.5  # the next one has the engine's again


def test_sampling(demo_engine):
    greedy = text(demo_engine.submit(Request(messages=[USER], max_tokens=12)))
    word = greedy.split()[0]
    banned = demo_engine.call(lambda model, tokenizer: tokenizer.encode(word, add_special_tokens=False)[0]).result()
    unlike = text(demo_engine.submit(Request(messages=[USER], logit_bias={banned: -100.0}, max_tokens=4)))
    assert unlike and not unlike.startswith(word)
    options = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "xtc_probability": 0.1}
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    assert last(demo_engine.submit(ask("Hello", **options, **penalties))).finish_reason
    assert last(demo_engine.submit(ask("Hello", temperature=1.0, top_k=1_000_000))).finish_reason


def test_stop(demo_engine):
    whole = text(demo_engine.submit(Request(messages=[USER], max_tokens=12)))
    word = whole.split()[2]
    chunks = list(demo_engine.submit(Request(messages=[USER], stop=(word,))))
    assert "".join(chunk.text for chunk in chunks) == whole[: whole.index(word)]
    assert chunks[-1].finish_reason == "stop"


def test_text_and_tokens(lively_engine):
    tokens = lively_engine.call(lambda model, tokenizer: tokenizer.encode("The old house")).result()
    said = [text(lively_engine.submit(Request(prompt=p, max_tokens=9))) for p in ("The old house", tokens)]
    assert said[0] == said[1]


def test_a_seed_gives_the_same_answer_whatever_else_runs(lively_engine, make_lively):
    """Before, between and after: a conversation that the answer could have gone on from, and another one's samples."""
    seeded = ask("Where is the sea?", seed=7, temperature=1.0)
    alone = text(lively_engine.submit(seeded))
    turn = [*seeded.messages, {"role": "assistant", "content": alone}, USER]
    following = Request(messages=turn, seed=7, temperature=1.0, max_tokens=12)
    first = text(lively_engine.submit(following))
    for other in (Request(messages=turn, max_tokens=5), ask("Where is the", temperature=2.0), ask("Where is the sea?")):
        text(lively_engine.submit(other))
        assert text(lively_engine.submit(seeded)) == alone
        assert text(lively_engine.submit(following)) == first
    assert text(make_lively().submit(following)) == first


def test_without_a_seed_answers_differ(lively_engine):
    """Also after a request with one."""
    said = set()
    for _ in range(4):
        text(lively_engine.submit(ask("Hello", seed=1)))
        said.add(text(lively_engine.submit(ask("Hello", temperature=1.5))))
    assert len(said) > 1


def turns(*said: str) -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(said)]


def test_next_turn_pays_only_for_new_tokens(tiny_engine):
    """The answer is among them: the sparse model wrote it."""
    question = " ".join(["a ship on the sea"] * 12)
    chunks = list(tiny_engine.submit(Request(messages=turns(question), max_tokens=8)))
    answer = "".join(chunk.text for chunk in chunks)
    usage = last(tiny_engine.submit(Request(messages=turns(question, answer, "Where?"), max_tokens=5))).usage
    assert usage.cached_tokens == chunks[-1].usage.prompt_tokens - 1  # all but the token that opens the answer
    assert tiny_engine.status().conversations == 1


def test_an_answer_depends_on_its_request_alone(make, tiny_dir):
    """Whatever was asked before, evicted or verified: conversations of three turns with settings of all kinds, one
    after the other and all mixed up, with room for 2 and 7 of them."""
    settings = [
        {"density": 0.5},
        {"density": 1.0},
        {"density": 0.3, "layer_budgets": "uniform"},
        {"density": 0.5, "verify": True},
        {"density": 0.5, "signal": "activation"},
        {"density": 0.5, "seed": 3, "temperature": 1.0},
    ]
    sea, hill = (f"{'Read this first. ' * 5} What of the {thing}?" for thing in ("sea", "hill"))
    conversations = [(sea, options) for options in settings] + [(hill, settings[0]), (hill, settings[3])]
    conversations += [("one two three four " * 15, settings[0])]
    kinds = {"model": str(tiny_dir), "load": {"stats": False}, "prefill_step_size": 32}

    def answer(engine: Engine, i: int, said: list[str]) -> tuple:
        opening, options = conversations[i]
        follow_ups = [opening, "And then?", "Go on, tell me more of it."]
        messages = turns(*[text for pair in zip(follow_ups, said) for text in pair], follow_ups[len(said)])
        chunks = list(engine.submit(Request(messages=messages, max_tokens=2, logprobs=True, **options)))
        return "".join(c.text for c in chunks), [c.token.logprob for c in chunks if c.token is not None]

    engine = make(**kinds, max_conversations=0)
    alone = [[] for _ in conversations]
    for i, answers in enumerate(alone):
        for _ in range(3):
            answers.append(answer(engine, i, [text for text, _ in answers]))
    for room in (2, 7):
        engine = make(**kinds, max_conversations=room)
        mixed = [[] for _ in conversations]
        order = [i for i in range(len(conversations)) for _ in range(3)]
        random.Random(room).shuffle(order)
        for i in order:
            mixed[i].append(answer(engine, i, [text for text, _ in mixed[i]]))
        assert mixed == alone, f"with room for {room}"


def test_an_answer_is_read_while_nobody_waits(make_lively):
    """The next turn reads its own message only, and its answer is what it would be without."""
    engine, fresh = (make_lively(prefill_step_size=32, max_conversations=room) for room in (10, 0))
    opening = "Tell me of the sea, of the hill, and of the road that goes from one to the other."
    chunks = list(engine.submit(Request(messages=turns(opening), max_tokens=60)))
    answer = "".join(chunk.text for chunk in chunks)
    deadline = time.monotonic() + 60
    while not engine.status().conversations and time.monotonic() < deadline:  # the prompt alone is too short to be kept
        time.sleep(0.005)
    follow_up = Request(messages=turns(opening, answer, "And then?"), max_tokens=20, logprobs=True)
    ours, theirs = (list(each.submit(follow_up)) for each in (engine, fresh))
    assert [c.token for c in ours if c.token] == [c.token for c in theirs if c.token]
    before, usage = chunks[-1].usage, ours[-1].usage
    assert before.prompt_tokens < usage.cached_tokens < usage.prompt_tokens
    assert usage.cached_tokens >= usage.prompt_tokens - 40  # a call has 32 tokens and may end where a message begins
    assert theirs[-1].usage.cached_tokens == 0


def test_whoever_comes_goes_before_reading_ahead(make_lively, monkeypatch):
    """What is not read by then is left to the next turn."""
    engine = make_lively(prefill_step_size=32)
    opening, reading = "Tell me of the sea and of the hill.", threading.Event()
    inner, calls = worker.Worker.read, []

    def slow(self, conversation, prompt, call_ends, stop):
        def asked() -> bool:
            calls.append(len(conversation.tokens))
            reading.set()
            deadline = time.monotonic() + 60
            while not stop() and time.monotonic() < deadline:  # until there is a reason
                time.sleep(0.002)
            return stop()

        ahead = stop.__qualname__.startswith("Engine")
        return inner(self, conversation, prompt, call_ends, asked if ahead else stop)

    monkeypatch.setattr(worker.Worker, "read", slow)
    answer = text(engine.submit(Request(messages=turns(opening), max_tokens=60)))
    assert reading.wait(60)
    follow_up = ask("Hello", max_tokens=4)
    expected = text(make_lively().submit(follow_up))
    assert text(engine.submit(follow_up)) == expected
    usage = last(engine.submit(Request(messages=turns(opening, answer, "Why?"), max_tokens=4))).usage
    assert len(calls) >= 1 and usage.cached_tokens < usage.prompt_tokens - 40


@pytest.mark.parametrize("fields", [{"prompt": "The old house"}, {"messages": [USER], "max_tokens": 1_000_000}])
def test_nothing_is_read_ahead_of_what_has_no_next_turn(tiny_engine, fields):
    """A text to continue, and an answer that was cancelled."""
    pending = tiny_engine.submit(Request(**{"max_tokens": 3, **fields}))
    next(iter(pending))
    pending.cancel()
    list(pending)
    assert tiny_engine._worker.answered is None


def test_verified_answers_are_the_dense_models(lively_engine):
    options = {"max_tokens": 24, "temperature": 0.0, "client": "v"}
    dense = text(lively_engine.submit(ask("I need a hotel.", density=1.0, **options)))
    *_, end = chunks = list(lively_engine.submit(ask("I need a hotel.", verify=True, **options)))
    assert "".join(chunk.text for chunk in chunks) == dense
    assert end.usage.verified and 0 < end.usage.density < 1
    for request in (ask("Hi", density=1.0, verify=True), ask("Hi", verify=False)):
        assert not last(lively_engine.submit(request)).usage.verified


def test_a_retired_field_changes_nothing(tiny_engine):
    assert text(tiny_engine.submit(ask("Hello", refresh=16))) == text(tiny_engine.submit(ask("Hello")))


def test_drafting(make_lively):
    """Whatever it costs."""
    engine = make_lively(verify={"draft_tokens": 3})
    usage = last(engine.submit(ask("Hello", max_tokens=30, logit_bias={2: -100.0}, verify=True))).usage
    assert usage.verified and usage.completion_tokens == 30
    assert usage.drafted_tokens > 0


def test_a_verified_answer_with_a_seed(lively_engine):
    """It does not depend on how much was drafted, which goes by measured times."""
    options = {"verify": True, "seed": 5, "temperature": 0.8, "max_tokens": 24}
    assert len({text(lively_engine.submit(ask("Tell me of the sea.", **options))) for _ in range(3)}) == 1


def test_a_system_prompt_is_shared(tiny_engine):
    system = {"role": "system", "content": "You are a clerk in a book shop. Be kind, be brief. " * 12}

    def turn(content: str, client: str) -> Request:
        return Request(messages=[system, {"role": "user", "content": content}], client=client, max_tokens=8)

    text(tiny_engine.submit(turn("Good morning!" * 8, "a")))
    assert last(tiny_engine.submit(turn("Have you a map?", "b"))).usage.cached_tokens > 0


@pytest.fixture
def tool_model(model_copy):
    """The random model with a template by which mlx-lm knows that it calls tools."""
    template = model_copy / "chat_template.jinja"
    shown = "{% if tools %}{{ tools[0]['function']['name'] }}{% endif %}{# <tool_call> tool_call.name #}"
    template.write_text(shown + template.read_text())
    return model_copy


def test_tool_calls(make, tool_model, monkeypatch):
    """The tools reach the template, and what the model then says of them is told from its text."""
    said = ["Well. <tool", '_call>{"name": "weather", "argu', 'ments": {"city": "Ulm"}}</tool_call>', "", ""]
    inner = operations.stream_generate

    def scripted(*args, **kwargs):
        for text, response in zip(said, inner(*args, **kwargs)):
            yield replace(response, text=text)
        yield replace(response, text="", finish_reason="stop")

    engine = make(model=str(tool_model), load={"stats": False})
    without = last(engine.submit(ask("x"))).usage.prompt_tokens
    monkeypatch.setattr(operations, "stream_generate", scripted)
    tools = [{"type": "function", "function": {"name": "weather"}}]
    chunks = list(engine.submit(ask("x", tools=tools)))
    assert chunks[-1].usage.prompt_tokens > without
    assert "".join(chunk.text for chunk in chunks) == "Well. "
    (call,) = [call for chunk in chunks for call in chunk.tool_calls]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}
    assert chunks[-1].finish_reason == "tool_calls"


def test_penalties_see_what_was_cached(lively_engine):
    """mlx-lm shows its processors only what is read now."""
    request = ask("one two one two one two", repetition_penalty=1.5, repetition_context_size=50, max_tokens=8)
    assert text(lively_engine.submit(request)) == text(lively_engine.submit(request))


def test_concurrent_clients_get_what_they_would_get_alone(lively_engine, make_lively):
    questions = [f"Tell me of the {thing}." for thing in "sea hill road mill".split()]
    fresh = make_lively(max_conversations=0)
    expected = [text(fresh.submit(ask(question))) for question in questions]
    assert len(set(expected)) == len(questions)
    said = [""] * len(questions)

    def client(i: int) -> None:
        for _ in range(2):
            said[i] = text(lively_engine.submit(ask(questions[i], client=str(i))))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == expected


def test_budget(make_lively):
    engine = make_lively(max_cache_bytes=200_000)
    for i in range(6):
        text(engine.submit(ask(f"{i} " * 40, client=str(i))))
        assert engine.status().cache_bytes <= 200_000
    assert 0 < engine.status().conversations < 6


def test_clients_take_turns():
    queue = RoundRobinQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.push(item[0], item)
    assert queue.remove("a", "a2") and not queue.remove("a", "a2") and not queue.remove("z", "a1")
    assert [queue.pop() for _ in range(len(queue))] == ["a1", "b1", "c1", "a3", "b2"]
    assert queue.pop() is None
    queue.push("a", "a4")
    assert queue.clear() == ["a4"] and len(queue) == 0


def test_busy(make, tiny_dir):
    engine = make(model=str(tiny_dir), load={"stats": False}, max_queue=2)
    first = busy(engine)
    waiting = [engine.submit(ask("x")) for _ in range(2)]
    assert engine.status().queued == 2
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        engine.submit(ask("x"))
    waiting[0].cancel()
    assert last(waiting[0]).finish_reason == "cancelled"
    engine.submit(ask("x"))  # there is a place again
    first.cancel()
    assert last(first).finish_reason == "cancelled"
    assert last(waiting[1]).finish_reason == "length"


def test_cancel_while_generating(tiny_engine):
    pending = busy(tiny_engine)
    assert tiny_engine.status().state == "generating"
    pending.cancel()
    assert last(pending).finish_reason == "cancelled"
    assert last(tiny_engine.submit(ask("x"))).finish_reason == "length"


def test_cancel_while_reading(make, tiny_dir, monkeypatch):
    """Between two calls; what was read serves the next request."""
    engine = make(model=str(tiny_dir), load={"stats": False}, prefill_step_size=64)
    engine.load().result()
    pending = None
    inner = worker._Completion._read_beginning

    def cancelled(self):
        pending.cancel()
        return inner(self)

    prompt = [1, *range(3, 1000)]
    monkeypatch.setattr(worker._Completion, "_read_beginning", cancelled)
    with engine._condition:  # keep the engine waiting until the request is known
        pending = engine.submit(Request(prompt=prompt, max_tokens=3))
    assert last(pending).finish_reason == "cancelled"
    monkeypatch.undo()
    assert last(engine.submit(Request(prompt=prompt, max_tokens=3))).finish_reason == "length"


def test_async(tiny_engine):
    async def read() -> list[Chunk]:
        pending = tiny_engine.submit(ask("x"))
        assert await tiny_engine.submit(Request(prompt=[1], client="b", max_tokens=1)).get(60)
        return [chunk async for chunk in pending]

    chunks = asyncio.run(read())
    assert len(chunks) == 6 and chunks[-1].finish_reason == "length"


def test_async_patience(tiny_engine):
    async def read() -> Chunk | None:
        pending = busy(tiny_engine)
        waiting = tiny_engine.submit(ask("x"))
        chunk = await waiting.get(0.05)
        pending.cancel()
        return chunk

    assert asyncio.run(read()) is None


def test_models_change_places(make, tiny_dir):
    """One is dropped before the next is loaded, so that the peak is not the sum."""
    engine, before = make(allow_paths=(tiny_dir.parent,)), mx.get_active_memory()
    text(engine.submit(ask("Hello")))
    assert (engine.status().state, engine.status().model) == ("ready", "demo")
    large = engine.status().memory_bytes - before
    text(engine.submit(ask("Hello", model="tiny")))
    assert engine.status().model == "tiny"
    assert engine.status().memory_bytes - before < 1.5 * large
    text(engine.submit(ask("Hello", model="demo")))
    assert engine.status().model == "demo"


def test_idle_unload_frees_memory(make):
    before = mx.get_active_memory()
    engine = make(idle_timeout=0.3)
    text(engine.submit(ask("Hello")))
    loaded = engine.call(lambda *_: mx.get_active_memory()).result()  # on its thread, where it is loaded for certain
    deadline = time.monotonic() + 60
    while engine.status().state != "unloaded" and time.monotonic() < deadline:
        time.sleep(0.05)
    status = engine.status()
    assert (status.state, status.model, status.conversations, status.cache_bytes) == ("unloaded", None, 0, 0)
    assert mx.get_active_memory() - before < (loaded - before) / 100
    assert mx.get_cache_memory() == 0
    assert text(engine.submit(ask("Hello")))  # and back again


def test_requests_leave_nothing_behind(make, tiny_dir):
    """The store of conversations is full after five of them; from then on memory is flat."""
    engine = make(model=str(tiny_dir), load={"stats": False}, max_conversations=5)
    held = []

    def count(*_) -> tuple[int, int]:
        """On the engine's thread, while it does nothing else."""
        gc.collect()
        return len(gc.get_objects()), mx.get_active_memory()

    for requests in (6, 12, 12):
        for i in range(requests):
            options = {"seed": i, "temperature": 0.7, "logprobs": True} if i % 3 == 0 else {}
            list(engine.submit(ask(f"I need {i} hotels.", client=str(i % 7), max_tokens=3, **options)))
        held.append(engine.call(count).result())
    assert abs(held[2][0] - held[1][0]) < 12  # less than one object for each request
    assert abs(held[2][1] - held[1][1]) < 100_000


def test_load_unload(demo_engine, demo):
    assert demo_engine.status().state == "unloaded"
    assert demo_engine.load().result().state == "ready"
    assert demo_engine.status().has_ranks
    assert demo_engine.unload().result().state == "unloaded"
    assert demo_engine.call(lambda model, tokenizer: len(model.blocks)).result() == len(demo[0].blocks)


def test_unknown_models(demo_engine):
    for refused in (demo_engine.load, lambda name: demo_engine.submit(ask("x", model=name))):
        with pytest.raises(UnknownModel):
            refused("../secret")


def test_a_model_that_cannot_be_loaded(make, model_copy, caplog):
    """The clients' message has no paths; the log has what they need not know."""
    (model_copy / "model.safetensors").write_bytes(b"rubbish")
    engine = make(allow_paths=(model_copy.parent,))
    with pytest.raises(EngineFailed) as e, caplog.at_level(logging.ERROR, "glass_mlx"):
        text(engine.submit(ask("x", model="model")))
    assert str(model_copy.parent) not in str(e.value)
    assert str(model_copy) in caplog.text
    assert engine.status().state == "failed" and "model cannot be loaded" in engine.status().error
    assert text(engine.submit(ask("Hello")))
    assert (engine.status().state, engine.status().error) == ("ready", None)


def test_a_crash_fails_its_request_only(demo_engine, monkeypatch):
    def crash(*args, **kwargs):
        yield from list(inner(*args, **kwargs))[:2]
        raise RuntimeError("[metal] /Users/me/secret out of memory")

    inner = operations.stream_generate
    monkeypatch.setattr(operations, "stream_generate", crash)
    with pytest.raises(EngineFailed, match="^Generation failed: RuntimeError. See the log.$"):
        text(demo_engine.submit(ask("Hello")))
    monkeypatch.undo()
    assert demo_engine.status().state == "ready" and demo_engine.status().error
    assert demo_engine.status().conversations == 0
    assert text(demo_engine.submit(ask("Hello")))
    assert demo_engine.status().error is None


@pytest.fixture(scope="module")
def small_prompts(tiny_dir):
    engine = Engine(EngineOptions(model=str(tiny_dir), load={"stats": False}, max_prompt_tokens=64))
    yield engine
    engine.close()


@pytest.mark.parametrize(
    "request_, reason",
    [
        (Request(prompt=[]), "no tokens"),
        (Request(prompt=[1, 4096]), "out of range"),
        (Request(prompt=[1], logit_bias={5000: 1.0}), "out of range"),
        (Request(prompt=[1] * 65), "65 tokens; at most 64"),
        (Request(prompt="word " * 100), "at most 64"),
        (ask("x", density=2.0), "density must be"),
        (ask("x", template_args={"documents": 3, "eos_token": None}), "template"),
        (ask("x", template_args={"tokenize": False}), "'tokenize' cannot be set"),
    ],
)
def test_bad_requests(small_prompts, request_, reason):
    with pytest.raises(BadRequest, match=reason):
        text(small_prompts.submit(request_))


def test_a_model_without_a_chat_template(make, model_copy):
    (model_copy / "chat_template.jinja").unlink()
    engine = make(model=str(model_copy), load={"stats": False})
    with pytest.raises(BadRequest, match="no chat template"):
        text(engine.submit(ask("x")))
    assert text(engine.submit(Request(prompt="x", max_tokens=3)))


def test_the_models_own_context_is_the_limit(make, model_copy):
    config = model_copy / "config.json"
    config.write_text(config.read_text().replace("{", '{"max_position_embeddings": 16, ', 1))
    engine = make(model=str(model_copy), load={"stats": False})
    with pytest.raises(BadRequest, match="at most 16"):
        text(engine.submit(Request(prompt=[1] * 17)))


@pytest.mark.parametrize("start", [0, 30, 50])
def test_quantised_kv(make, start):
    """The next turn is the same with a cache of the last one, wherever quantising began."""
    kinds = {"kv": {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": start}}
    engine, fresh = make(**kinds), make(**kinds, max_conversations=0)
    question = "Hello, I need a train. " * 5
    answer = text(engine.submit(ask(question)))
    options = {"max_tokens": 3, "logprobs": True, "logit_bias": {2: -100.0}}
    following = Request(messages=turns(question, answer, "To London."), **options)
    chunks, expected = list(engine.submit(following)), list(fresh.submit(following))
    assert chunks[-1].usage.cached_tokens > 0
    assert [c.token.logprob for c in chunks] == [c.token.logprob for c in expected]


@pytest.mark.parametrize("kv", [{"kv_bits": 4, "kv_group_size": 64}, {"kv_bits": 7, "kv_group_size": 32}])
def test_a_kv_cache_that_cannot_be_quantised_so(make, kv):
    """It is found out by loading, not by the first request."""
    engine = make(kv={**kv, "quantized_kv_start": 0})
    with pytest.raises(EngineFailed, match="cannot be loaded") as e:
        engine.load().result()
    assert "KV cache cannot be quantised so (--kv-bits, --kv-group-size)" in str(e.value)
    assert engine.status().state == "failed" and engine.status().error == str(e.value)


def test_close(make, tiny_dir):
    engine = make(model=str(tiny_dir), load={"stats": False})
    pending, waiting = busy(engine), engine.submit(ask("x"))
    loading = engine.load()
    engine.close()
    assert last(pending).finish_reason == "cancelled"
    with pytest.raises(EngineFailed, match="closed"):
        text(waiting)
    with pytest.raises((CancelledError, EngineFailed)):
        loading.result(60)
    for refused in (engine.load, engine.unload, lambda: engine.submit(ask("x"))):
        with pytest.raises(EngineFailed, match="closed"):
            refused()
    assert not engine.alive
    engine.close()  # again does no harm


def test_the_process_ends_cleanly_and_needs_no_server_libraries(python):
    """MLX aborts a process in which a thread has left streams behind: of two engines, one is closed before."""
    code = (
        "import sys; from glass_mlx.serving.engine import *; engines = Engine(), Engine()\n"
        "for engine in engines: list(engine.submit(Request(prompt='x', max_tokens=2)))\n"
        "engines[0].close()\n"
        "print({'starlette', 'pydantic', 'uvicorn'} & set(sys.modules))"
    )
    done = python("-c", code)
    assert (done.code, done.out) == (0, "set()\n"), done.err


def test_the_engines_models(make, tiny_dir):
    models = make(allow_paths=(tiny_dir.parent,)).models()
    assert [(m.id, m.kind) for m in models] == [("demo", "demo"), ("tiny", "local")]


def test_names_of_one_model_do_not_load_it_again(make, model_copy, monkeypatch):
    loads = []
    monkeypatch.setattr(model_loading, "load", lambda path, **k: loads.append(path) or glass_mlx.load(path, **k))
    served = make(model=str(model_copy), load={"stats": False}, allow_paths=(model_copy.parent,))
    for name in ("default_model", "model", str(model_copy)):
        text(served.submit(ask("x", model=name)))
    assert len(loads) == 1
    shutil.rmtree(model_copy)


def test_memory_is_given_back_after_each_answer_and_wired_while_a_model_is_loaded(tiny_dir, monkeypatch):
    """On a Mac what is not wired is paged out while the server waits."""
    held = []

    @contextmanager
    def wired(model, streams):
        held.append(model)
        yield
        held.remove(model)

    monkeypatch.setattr(model_loading, "wired_limit", wired)
    engine = Engine(EngineOptions(str(tiny_dir), load={"stats": False}))
    try:
        assert not held
        list(engine.submit(Request(prompt="The old house", max_tokens=3)))
        assert len(held) == 1 and mx.get_cache_memory() == 0
        engine.unload().result()
        assert not held
    finally:
        engine.close()
