"""Tests of the store of prompt caches: what is reused, what it is worth, what is dropped."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import RotatingKVCache

from glass_mlx import stream_generate
from glass_mlx.serving.cache_store import ConversationStore, StoredConversation, prompt_call_ends

PROMPT = [1, *range(10, 40)]


@pytest.fixture
def store():
    return ConversationStore(max_bytes=1 << 30, max_conversations=4)


def read(model, tokenizer, store, prompt, client="a", exact=False, max_tokens=5, step=2048):
    """What an answer does to the store; returns (reused tokens, generated tokens)."""
    ends = prompt_call_ends(len(prompt), 0, step)
    conversation = store.take(prompt, ends, client, "impact", exact, model.make_cache)
    reused = conversation.session.offset
    stream = stream_generate(
        model, tokenizer, prompt[reused:], max_tokens, prompt_cache=conversation.cache, prefill_step_size=step
    )
    said = [response.token for response in stream]
    conversation.note_dense_calls(reused, ends, len(prompt))
    assert conversation.settle([*prompt, *said])
    store.put(conversation)
    return reused, said


@pytest.mark.parametrize(
    "length, shared, step, ends",
    [
        (1, 0, 8, [1]),
        (2, 0, 8, [1, 2]),
        (20, 0, 8, [8, 16, 19, 20]),
        (17, 0, 8, [8, 16, 17]),
        (20, 5, 8, [5, 13, 19, 20]),
        (20, 10, 8, [8, 10, 18, 19, 20]),
        (20, 19, 8, [8, 16, 19, 20]),
        (20, 20, 8, [8, 16, 19, 20]),
    ],
)
def test_calls_that_read_a_prompt(length, shared, step, ends):
    assert prompt_call_ends(length, shared, step) == ends


def test_next_turn_reads_what_is_new(tiny, store):
    _, said = read(*tiny, store, PROMPT)
    reused, _ = read(*tiny, store, [*PROMPT, *said, 50, 51])
    assert reused == len(PROMPT) + len(said)
    assert len(store) == 1


def test_the_same_prompt_again(tiny, store):
    """All but the last token, whose call ends the prompt; the first answer's cache stays for its own next turn."""
    _, said = read(*tiny, store, PROMPT)
    assert read(*tiny, store, PROMPT) == (len(PROMPT) - 1, said)
    assert len(store) == 2


def test_evidence_after_going_back(tiny, store):
    """A repeated prompt chooses the same neurons as when it was new."""
    model, tokenizer = tiny
    cold = ConversationStore(1 << 30, 4)
    for s in (store, cold):
        read(model, tokenizer, s, PROMPT)
    read(model, tokenizer, store, PROMPT)
    energies = [s._conversations[-1].session.energy for s in (store, cold)]
    assert mx.array_equal(*energies)


def test_no_evidence_from_within_a_call(tiny, store):
    """Half of a stretch that was read in one call has left evidence of its own, but nobody knows which."""
    read(*tiny, store, PROMPT)
    assert read(*tiny, store, [*PROMPT[:20], 99, 98])[0] == 0


def test_a_long_prompt_is_shared_up_to_a_whole_call(tiny, store):
    read(*tiny, store, PROMPT, step=8)
    assert read(*tiny, store, [*PROMPT[:20], 99, 98], client="b", exact=True, step=8)[0] == 16


@pytest.mark.parametrize("client, exact", [("b", False), ("a", True), ("b", True)])
def test_what_was_written_sparsely_is_the_clients_own(tiny, store, client, exact):
    """Nor is it for an answer with a seed, which depends on its request alone."""
    _, said = read(*tiny, store, PROMPT)
    assert read(*tiny, store, [*PROMPT, *said, 50], client=client, exact=exact)[0] == 0
    assert read(*tiny, store, PROMPT, client=client, exact=exact) == (len(PROMPT) - 1, said)


def test_signals_do_not_mix(tiny, store):
    model, _ = tiny
    read(*tiny, store, PROMPT)
    conversation = store.take(PROMPT, prompt_call_ends(len(PROMPT), 0, 8), "a", "activation", False, model.make_cache)
    assert conversation.session.offset == 0


def test_two_branches_do_not_disturb_each_other(tiny, store):
    _, said = read(*tiny, store, PROMPT)
    one, other = [*PROMPT, *said, 60, 61], [*PROMPT, *said, 70, 71]
    _, first = read(*tiny, store, one)
    read(*tiny, store, other)
    alone = ConversationStore(1 << 30, 4)
    read(*tiny, alone, PROMPT)
    assert read(*tiny, alone, one)[1] == first
    reused, _ = read(*tiny, store, [*one, *first, 80])
    assert reused == len(one) + len(first)


def test_a_cache_that_cannot_go_back(tiny, store):
    """It serves what goes on from its end, and nothing else."""
    model, tokenizer = tiny

    def make():
        return [*(RotatingKVCache(max_size=16) for _ in model.layers), model.make_cache()[-1]]

    conversation = StoredConversation([], make(), "a")
    said = [r.token for r in stream_generate(model, tokenizer, PROMPT, 5, prompt_cache=conversation.cache)]
    assert conversation.settle([*PROMPT, *said])
    conversation.note_dense_calls(0, prompt_call_ends(len(PROMPT), 0, 2048), len(PROMPT))
    store.put(conversation)
    assert store.take(PROMPT, conversation.dense_ends, "a", "impact", False, make).session.offset == 0
    whole = [*PROMPT, *said, 50]
    assert store.take(whole, [], "a", "impact", False, make) is conversation


def test_cut():
    class Stub:
        def __init__(self):
            self.offset = 9
            self.nbytes = 0

        def is_trimmable(self):
            return True

        def trim(self, n):
            self.offset -= n
            return n

    conversation = StoredConversation(list(range(9)), [Stub()], "a", [3, 4, 8])
    assert conversation.cut(5)
    assert (conversation.tokens, conversation.dense_ends) == ([0, 1, 2, 3, 4], [3, 4])


def test_the_least_recently_used_goes(tiny):
    store = ConversationStore(1 << 30, 2)
    for first in (100, 200):
        read(*tiny, store, [first, *PROMPT])
    read(*tiny, store, [100, *PROMPT, 5])  # used again
    read(*tiny, store, [300, *PROMPT])
    assert [conversation.tokens[0] for conversation in store._conversations] == [100, 300]


def test_budget_in_bytes(tiny):
    probe = ConversationStore(1 << 30, 100)
    read(*tiny, probe, PROMPT)
    store = ConversationStore(int(probe.nbytes * 2.5), 100)
    for first in range(100, 106):
        read(*tiny, store, [first, *PROMPT])
        assert store.nbytes <= store.max_bytes
    assert [conversation.tokens[0] for conversation in store._conversations] == [104, 105]


def test_one_that_is_larger_than_the_budget(tiny):
    store = ConversationStore(10, 4)
    read(*tiny, store, PROMPT)
    assert len(store) == 0


def test_compact_weights_are_not_kept(tiny, store):
    """The next turn reads something and chooses anew."""
    read(*tiny, store, PROMPT)
    assert store._conversations[0].session.compact is None
