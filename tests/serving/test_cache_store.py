"""Tests of the store of prompt caches: what is reused, what it is worth, what is dropped."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from glass_mlx import stream_generate
from glass_mlx.decoding.conversation import CachedConversation
from glass_mlx.serving.cache_store import ConversationStore, message_marks, prompt_call_ends, stays_cuttable

EOS, ASSISTANT, STEP = 2, 4, 40
MARKS = frozenset({EOS, ASSISTANT})
QUESTION = [1, *range(10, 44), ASSISTANT]
PREFIX = 35  # where its first call ends


@pytest.fixture
def store():
    return ConversationStore(max_bytes=1 << 30, max_conversations=4)


def read(model, tokenizer, store, prompt, max_tokens=5, signal="impact"):
    """What an answer does to the store; returns (reused tokens, generated tokens)."""
    ends = prompt_call_ends(prompt, MARKS, STEP)
    conversation = store.take(prompt, ends, signal, lambda: model.make_cache(signal=signal))
    reused = conversation.session.offset
    for end in ends:
        if end > conversation.session.offset:
            model.prefill(mx.array([prompt[conversation.session.offset : end]]), conversation.cache)
            conversation.tokens = prompt[:end]
    rest = prompt[len(conversation.tokens) :]
    said = [r.token for r in stream_generate(model, tokenizer, rest, max_tokens, prompt_cache=conversation.cache)]
    if conversation.tokens:
        assert conversation.cut(len(conversation.tokens))
        store.put(conversation)
    return reused, said


def answered(said):
    return [*QUESTION, *said, EOS, *range(50, 90), ASSISTANT]


@pytest.mark.parametrize(
    "prompt, ends",
    [
        ([1], []),
        ([1, 5], []),
        ([5] * 90, [40, 80]),
        ([5] * 81, [40, 80]),
        ([5] * 80, [40]),
        (QUESTION, [PREFIX]),
        ([5] * 35 + [EOS], [35]),
        ([5] * 36, []),
        ([5] * 20 + [EOS] + [5] * 30, [40]),
        ([5] * 20 + [EOS] + [5] * 14 + [ASSISTANT, 5, 5], [35]),
        ([5] * 35 + [EOS] + [5] * 35 + [ASSISTANT] + [5] * 35, [35, 71]),
    ],
)
def test_calls_that_read_a_prompt(prompt, ends):
    """They end before a mark and after a step; not before 32 tokens, nor at the prompt's end."""
    assert prompt_call_ends(prompt, MARKS, STEP) == ends


TOKENS = st.lists(st.sampled_from([EOS, ASSISTANT, *[5] * 20]), max_size=200)


@given(TOKENS, TOKENS, TOKENS, st.integers(1, 64))
def test_prompts_with_a_common_beginning_are_read_in_the_same_calls(common, one, other, step):
    ends = [[e for e in prompt_call_ends(common + rest, MARKS, step) if e < len(common)] for rest in (one, other)]
    assert ends[0] == ends[1]


@given(TOKENS, st.integers(1, 64))
def test_no_call_is_longer_than_a_step(prompt, step):
    ends = [0, *prompt_call_ends(prompt, MARKS, step), len(prompt)]
    assert all(0 <= b - a <= step for a, b in zip(ends, ends[1:]))


def test_marks_of_a_chat_template(demo):
    _, tokenizer = demo
    assert {tokenizer.decode([mark]) for mark in message_marks(tokenizer)} == {
        "<s>",
        "</s>",
        "<|user|>",
        "<|assistant|>",
    }


def test_marks_without_a_usable_chat_template():
    def fail(*args, **options):
        raise ValueError("no such role")

    one = SimpleNamespace(has_chat_template=False, eos_token_ids={2})
    other = SimpleNamespace(
        has_chat_template=True, eos_token_ids={2}, apply_chat_template=fail, added_tokens_decoder={}
    )
    assert message_marks(one) == message_marks(other) == {2}


def test_next_turn_reads_what_is_new_and_the_answer(tiny, store):
    _, said = read(*tiny, store, QUESTION)
    assert read(*tiny, store, answered(said))[0] == PREFIX
    assert len(store) == 1


def test_the_same_prompt_again(tiny, store):
    _, said = read(*tiny, store, QUESTION)
    assert read(*tiny, store, QUESTION) == (PREFIX, said)
    assert len(store) == 1


def test_evidence_is_that_of_a_new_prompt(tiny, store):
    _, said = read(*tiny, store, QUESTION)
    read(*tiny, store, answered(said))
    cold = ConversationStore(1 << 30, 4)
    read(*tiny, cold, answered(said))
    energies = [s._conversations[-1].session.energy for s in (store, cold)]
    assert mx.array_equal(*energies)


def test_nothing_from_within_a_call(tiny, store):
    read(*tiny, store, QUESTION)
    assert read(*tiny, store, [*QUESTION[:20], 99, *range(100, 140)])[0] == 0


def test_a_long_prompt_is_shared_up_to_a_whole_call(tiny, store):
    prompt = list(range(10, 110))
    read(*tiny, store, prompt)
    assert read(*tiny, store, [*prompt[:60], 99, 98])[0] == 40
    assert len(store) == 2


def test_signals_do_not_mix(tiny, store):
    read(*tiny, store, QUESTION)
    assert read(*tiny, store, QUESTION, signal="activation")[0] == 0


def test_two_branches_do_not_disturb_each_other(tiny, store):
    _, said = read(*tiny, store, QUESTION)
    one, other = answered(said), answered([60, 61, 62])
    _, first = read(*tiny, store, one)
    assert read(*tiny, store, other)[0] == PREFIX
    assert read(*tiny, store, one)[1] == first


def test_stays_cuttable(tiny):
    session = tiny[0].make_cache()[-1]
    assert stays_cuttable([KVCache(), QuantizedKVCache(), session], None)
    assert not stays_cuttable([KVCache(), RotatingKVCache(8), session], None)
    assert stays_cuttable([QuantizedKVCache(), session], 4)
    assert not stays_cuttable([KVCache(), session], 4)  # it may be quantised while an answer is decoded


def test_a_cache_that_cannot_go_back(tiny, store):
    """It serves what goes on from its end, and nothing else."""
    model, _ = tiny

    def make():
        return [*(RotatingKVCache(max_size=16) for _ in model.layers), model.make_cache()[-1]]

    conversation = CachedConversation(list(range(80)), make())
    for start in (0, 40):
        model.prefill(mx.array([[*range(start, start + 40)]]), conversation.cache)
    store.put(conversation)
    assert store.take(list(range(60)), [40], "impact", make).session.offset == 0
    assert store.take(list(range(90)), [40, 80], "impact", make) is conversation


def test_quantised_keys_serve_what_a_new_prompt_would_quantise(demo):
    model, _ = demo
    store = ConversationStore(1 << 30, 4, quantized_kv_start=60)
    cache = model.make_cache()
    for start in (0, 40):
        model.prefill(mx.array([[*range(start, start + 40)]]), cache)
    cache[:-1] = [entry.to_quantized(group_size=32, bits=8) for entry in cache[:-1]]
    store.put(CachedConversation(list(range(80)), cache))
    assert store.take(list(range(50)), [40], "impact", model.make_cache).session.offset == 0
    assert store.take(list(range(90)), [40, 80], "impact", model.make_cache).session.offset == 80


def test_cut():
    class Stub:
        def __init__(self):
            self.offset = 9

        def is_trimmable(self):
            return True

        def trim(self, n):
            self.offset -= n
            return n

    conversation = CachedConversation(list(range(9)), [Stub()])
    assert conversation.cut(5)
    assert conversation.tokens == [0, 1, 2, 3, 4]


def test_the_least_recently_used_goes(tiny):
    store = ConversationStore(1 << 30, 2)
    for first in (100, 200):
        read(*tiny, store, [first, *QUESTION])
    read(*tiny, store, [100, *QUESTION, 5])  # used again
    read(*tiny, store, [300, *QUESTION])
    assert [conversation.tokens[0] for conversation in store._conversations] == [100, 300]


def test_budget_in_bytes(tiny):
    probe = ConversationStore(1 << 30, 100)
    read(*tiny, probe, QUESTION)
    store = ConversationStore(int(probe.nbytes * 2.5), 100)
    for first in range(100, 106):
        read(*tiny, store, [first, *QUESTION])
        assert store.nbytes <= store.max_bytes
    assert [conversation.tokens[0] for conversation in store._conversations] == [104, 105]


def test_one_that_is_larger_than_the_budget(tiny):
    store = ConversationStore(10, 4)
    read(*tiny, store, QUESTION)
    assert len(store) == 0


def test_compact_weights_are_not_kept(tiny, store):
    """The next turn reads something and chooses anew."""
    read(*tiny, store, QUESTION)
    assert store._conversations[0].session.compact is None


def test_a_copy_goes_its_own_way(tiny, store):
    read(*tiny, store, QUESTION)
    (stored,) = store._conversations
    branch = copy.deepcopy(stored)
    tiny[0].prefill(mx.array([[7, 8, 9]]), branch.cache)
    assert stored.session.offset == PREFIX
    assert {entry.offset for entry in stored.cache} == {PREFIX}
