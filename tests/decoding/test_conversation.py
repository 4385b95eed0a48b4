"""Tests of conversations: what the cache holds is what was said, whatever happened."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten

import glass_mlx.decoding.conversation
from glass_mlx import GlassError
from glass_mlx.decoding.conversation import CachedConversation, Conversation
from glass_mlx.loading import DEMO_PATH

TURNS = ["I want to find a restaurant in San Jose.", "Mexican food, please.", "Thank you!"]


@pytest.fixture(scope="module", autouse=True)
def demo(small_demo):
    return small_demo


def _say(conversation, text, tokens=6, **options) -> str:
    return "".join(r.text for r in conversation.reply(text, max_tokens=tokens, **options))


def _check(conversation):
    """The KV cache is the one that a fresh dense run over ``tokens`` fills (at density 1)."""
    tokens = conversation.tokens
    assert [c.offset for c in conversation.cache] == [len(tokens)] * len(conversation.cache)
    assert conversation.session.offset == len(tokens)
    if tokens and conversation.session.config.density == 1:
        fresh = conversation.model.make_cache(density=1.0)
        conversation.model(mx.array([tokens]), cache=fresh)
        for ours, theirs in zip(conversation.cache[:-1], fresh[:-1], strict=True):
            for a, b in zip(ours.state[0], theirs.state[0], strict=True):
                assert mx.allclose(a[:, : len(tokens)], b[:, : len(tokens)], atol=1e-3)


class Entry:
    """A cache entry of so many tokens."""

    def __init__(self, offset: int, trimmable: bool = True):
        self.offset, self.trimmable, self.nbytes = offset, trimmable, 10

    def is_trimmable(self) -> bool:
        return self.trimmable

    def trim(self, n: int) -> int:
        self.offset -= n
        return n


@pytest.mark.parametrize(
    "tokens, prompt, common",
    [
        ([], [1, 2], 0),
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3], [1, 2, 3], 2),  # the last token is always read
        ([1, 2, 3], [1, 2, 9, 9], 2),
        ([1, 2, 3], [9, 2, 3, 4], 0),
        ([1, 2, 3], [1], 0),
        ([1, 2, 3], [], 0),
    ],
)
def test_common_prefix(tokens, prompt, common):
    assert CachedConversation(tokens, []).common_prefix(prompt) == common


def test_cut():
    cached = CachedConversation([1, 2, 3, 4], [Entry(4), Entry(4)])
    assert cached.cut(3)
    assert (cached.tokens, [entry.offset for entry in cached.cache]) == ([1, 2, 3], [3, 3])
    fixed = CachedConversation([1, 2, 3, 4], [Entry(4, trimmable=False), Entry(4)])
    assert fixed.cut(4) and not fixed.cut(3)


def test_settle():
    """The cache holds fewer tokens than were generated, or more where it was interrupted."""
    cached = CachedConversation([1], [Entry(3)])
    assert cached.settle([1, 2, 3, 4]) and cached.tokens == [1, 2, 3]
    assert not cached.settle([1, 2])


@pytest.fixture
def dense(exact):
    """A conversation with the dense model, whose cache and answers can be made again."""
    conversation = Conversation(*exact)
    conversation.session.configure(density=1.0)
    return conversation


def test_turns(dense):
    """Every turn is answered as the whole rendered conversation is by mlx-lm."""
    for n, text in enumerate(TURNS):
        messages = [*dense.messages, {"role": "user", "content": text}]
        prompt = dense.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        answer = _say(dense, text)
        assert answer == mlx_lm.generate(dense.model.dense, dense.tokenizer, prompt, max_tokens=6)
        assert dense.tokens[: len(prompt)] == prompt
        assert dense.messages == [*messages, {"role": "assistant", "content": answer}]
        assert len(dense.messages) == 2 * n + 2
        _check(dense)


def test_a_turn_reads_only_what_is_new(demo):
    conversation, read = Conversation(*demo), []
    for text in TURNS:
        *_, last = conversation.reply(text, max_tokens=50)
        read.append(last.prompt_tokens)
        _check(conversation)
    assert len(conversation.tokens) > 30
    assert all(n < 20 for n in read)
    # what was said is read as well, but what was said last
    assert sum(read) <= conversation.session.prompt_tokens <= len(conversation.tokens)


def test_system_prompt(exact):
    conversation = Conversation(*exact, system_prompt="Be brief.")
    _say(conversation, "Hi")
    assert conversation.tokenizer.decode(conversation.tokens).startswith(
        "<s><|user|> Be brief.<|user|> Hi<|assistant|>"
    )
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize("n", [0, 1, 3])
def test_stopped_early(dense, n):
    stream = dense.reply(TURNS[0], max_tokens=8)
    read = "".join(next(stream).text for _ in range(n))
    stream.close()
    if n:  # what was read stays
        assert dense.messages[-1] == {"role": "assistant", "content": read}
        assert len(dense.messages) == 2
    _check(dense)
    _say(dense, TURNS[1])
    _check(dense)
    assert [m["role"] for m in dense.messages] == ["user", "assistant"] * (1 + (n > 0))


def test_interrupted_while_reading(dense):
    """Ctrl-C between two chunks of the prompt."""

    def stop(done, total):
        if done > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _say(dense, TURNS[0], prefill_step_size=4, prompt_progress_callback=stop)
    assert 0 < len(dense.tokens) < 12
    _check(dense)
    _say(dense, TURNS[1])
    _check(dense)


@pytest.mark.parametrize("after", [2, 5])
def test_interrupted_while_answering(dense, monkeypatch, after):
    """Ctrl-C once a token is decoded, before it is read: the cache holds more than was said."""
    original = glass_mlx.decoding.conversation.stream_generate

    def stream(*args, **kwargs):
        for n, response in enumerate(original(*args, **kwargs)):
            if n == after:
                raise KeyboardInterrupt
            yield response

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(glass_mlx.decoding.conversation, "stream_generate", stream)
        _say(dense, TURNS[0])
    assert dense.messages[-1]["content"]
    _say(dense, TURNS[1])
    _check(dense)


@pytest.mark.parametrize("call", [2, 6, 10, 14])
def test_interrupted_between_layers(dense, monkeypatch, call):
    """Ctrl-C with only some of the layers' caches updated."""
    kind, calls = type(dense.model.dense.layers[0]), []
    original = kind.__call__

    def layer(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == call * len(dense.model.dense.layers) // 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kind, "__call__", layer)
        _say(dense, TURNS[0])
    _say(dense, TURNS[1])
    _check(dense)


def test_rewritten_past(dense):
    """A template that shows the past otherwise than it was said, as those of thinking models do."""
    _say(dense, TURNS[0])
    before = list(dense.tokens)
    dense.messages[-1] = {"role": "assistant", "content": "What?"}
    _say(dense, TURNS[1])
    prompt = dense.tokenizer.apply_chat_template(dense.messages[:-1], add_generation_prompt=True)
    assert dense.tokens[: len(prompt)] == prompt and dense.tokens[: len(before)] != before
    _check(dense)


def test_trimming_keeps_the_common_prefix(demo):
    conversation = Conversation(*demo)
    _say(conversation, TURNS[0])
    recorded = conversation.session.prompt_tokens
    conversation.messages[-1] = {"role": "assistant", "content": "What?"}
    stream = conversation.reply(TURNS[1], max_tokens=3)
    turn = {"role": "user", "content": TURNS[1]}
    whole = conversation.tokenizer.apply_chat_template([*conversation.messages, turn], add_generation_prompt=True)
    assert next(stream).prompt_tokens < len(whole) / 2
    stream.close()
    assert conversation.session.prompt_tokens > recorded
    _check(conversation)


def test_cache_that_cannot_be_trimmed(dense, monkeypatch):
    """Then the conversation is read again, with the same configuration."""
    dense.session.configure(density=0.25)
    _say(dense, TURNS[0])
    dense.messages[-1] = {"role": "assistant", "content": "What?"}
    monkeypatch.setattr("glass_mlx.decoding.conversation.can_trim_prompt_cache", lambda cache: False)
    stream = dense.reply(TURNS[1], max_tokens=3)
    prompt = dense.tokenizer.apply_chat_template(
        [*dense.messages, {"role": "user", "content": TURNS[1]}], add_generation_prompt=True
    )
    first = next(stream)
    assert (first.prompt_tokens, first.density) == (len(prompt), 0.25)
    stream.close()
    _check(dense)


def test_same_message_again(dense):
    """A prompt that the cache holds already still has a last token to read."""
    _say(dense, TURNS[0])
    dense.messages.clear()
    assert _say(dense, TURNS[0]) == dense.messages[-1]["content"] != ""
    _check(dense)


def test_reset(exact):
    conversation = Conversation(*exact)
    first = _say(conversation, TURNS[0], density=0.25)
    _say(conversation, TURNS[1])
    conversation.reset()
    assert (conversation.messages, conversation.tokens, conversation.session.offset) == ([], [], 0)
    assert conversation.session.config.density == 0.25
    assert _say(conversation, TURNS[0]) == first


def test_errors_leave_the_conversation_usable(dense):
    _say(dense, TURNS[0])
    with pytest.raises(GlassError, match="density"):
        _say(dense, TURNS[1], density=2.0)
    _check(dense)
    assert _say(dense, TURNS[1])
    _check(dense)


def test_refusing_template(exact):
    tokenizer = mlx_lm.utils.load_tokenizer(DEMO_PATH)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    conversation = Conversation(exact[0], tokenizer)
    with pytest.raises(GlassError, match="roles must alternate"):
        _say(conversation, "Hi")
    assert conversation.messages == []


def test_no_chat_template(exact):
    tokenizer = mlx_lm.utils.load_tokenizer(DEMO_PATH)
    tokenizer.has_chat_template = False
    with pytest.raises(GlassError, match="no chat template"):
        Conversation(exact[0], tokenizer)


def test_two_conversations_on_one_model(exact):
    """They do not see each other."""
    alone = Conversation(*exact)
    expected = [_say(alone, text) for text in TURNS]
    first, second = Conversation(*exact), Conversation(*exact)
    said = []
    for text, other in zip(TURNS, reversed(TURNS)):
        said.append(_say(first, text))
        _say(second, other)
    assert said == expected
    assert not any("session" in name for name, _ in tree_flatten(exact[0].parameters()))


def test_the_answer_is_read_ahead_on_another_thread(exact):
    """Then the next message reads itself only, and is answered as it would be."""
    with ThreadPoolExecutor(1) as thread:
        answers = []
        for ahead in (False, True):
            conversation = Conversation(*exact)
            said = [_say(conversation, TURNS[0], 12)]
            if ahead:
                thread.submit(conversation.read_ahead).result()
                assert conversation.session.pending_reread == []
            waiting = sum(tokens.shape[1] for tokens in conversation.session.pending_reread)
            assert (waiting == 0) == ahead
            said += [_say(conversation, text, 12) for text in TURNS[1:]]
            _check(conversation)
            answers.append(said)
        assert answers[0] == answers[1]


def test_reading_ahead_that_fails_leaves_the_conversation_usable(dense, monkeypatch):
    _say(dense, TURNS[0])
    monkeypatch.setattr(type(dense.model), "reread", lambda model, cache: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dense.read_ahead()
    assert len(_say(dense, TURNS[1])) > 0
    _check(dense)
