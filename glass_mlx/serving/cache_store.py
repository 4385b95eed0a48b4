"""Keeps the prompt caches of past conversations, and finds the one that a new prompt can go on from.

The prompt of a next turn begins with the tokens of the turn before, so it takes over that turn's cache and pays only
for what is new. How much of a cache may be reused depends on who asks:

- A client's own conversation goes on from everything that its turns left, including what the sparse model wrote. It can
  go back only to a point where its evidence is known exactly, which is not in the middle of a stretch that was read in
  one call.
- A request with a seed, or one that finds another client's cache, reuses only what it would have computed itself, bit
  by bit: what was read densely, in the same calls from the first token on.

So an answer with a seed depends on its request alone. An answer without one also depends on its own client's earlier
turns, as long as they are in the store; after that, everything is read densely.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import mlx.core as mx

from ..decoding.conversation import CachedConversation


@dataclass(eq=False)
class StoredConversation(CachedConversation):
    """A cached conversation with its owner and the calls that filled it.

    Attributes:
        client (str): whose conversation it is.
        dense_ends (list[int]): where the calls ended that filled the cache as those of a new prompt would: densely,
            from the first token on.
    """

    client: str
    dense_ends: list[int] = field(default_factory=list)

    def cut(self, length: int) -> bool:
        self.dense_ends = [end for end in self.dense_ends if end <= length]
        return super().cut(length)

    def note_dense_calls(self, start: int, ends: list[int], length: int) -> None:
        """Note that a prompt was read from ``start`` to ``length`` in the calls of a new prompt, which end at ``ends``.
        If the cache held anything else before ``start``, it has nothing that a new prompt would compute."""
        if start == (self.dense_ends[-1] if self.dense_ends else 0):
            self.dense_ends += [end for end in ends if start < end <= length]


class ConversationStore:
    """Holds the most recently used conversations within limits of memory and number. Not safe to share between threads:
    only the engine's thread uses it."""

    def __init__(self, max_bytes: int, max_conversations: int):
        self.max_bytes, self.max_conversations = max_bytes, max_conversations
        self._conversations: list[StoredConversation] = []  # the least recently used first

    def __len__(self) -> int:
        return len(self._conversations)

    @property
    def nbytes(self) -> int:
        return sum(conversation.nbytes for conversation in self._conversations)

    def take(
        self,
        prompt: list[int],
        call_ends: list[int],
        client: str,
        signal: str,
        exact: bool,
        make_cache: Callable[[], list[Any]],
    ) -> StoredConversation:
        """Find the conversation that holds the most of a prompt that may be reused, and cut it to that.

        Args:
            prompt (list[int]): the tokens to read.
            call_ends (list[int]): where the calls end that would read the prompt with an empty cache.
            client (str): who asks.
            signal (str): the signal that the evidence must be of.
            exact (bool): reuse only what the request would compute itself.
            make_cache (callable): makes an empty prompt cache.

        Returns:
            StoredConversation: the caller's own. It was taken out of the store; or copied, where the stored one has
            more that another request may want; or it is new.
        """
        same_signal = [c for c in self._conversations if c.session.config.signal == signal]
        lengths = [_reusable_length(c, prompt, call_ends, exact or c.client != client) for c in same_signal]
        for length, conversation in sorted(zip(lengths, same_signal), key=lambda pair: -pair[0]):
            if length == 0:
                break
            self._conversations.remove(conversation)
            if length == conversation.session.offset and conversation.client == client:
                return conversation
            self._conversations.append(conversation)  # it was used just now
            branch = copy.deepcopy(conversation)
            branch.client = client
            if branch.cut(length):
                return branch
        return StoredConversation([], make_cache(), client)

    def put(self, conversation: StoredConversation) -> None:
        """Keep a conversation for its next turn. That turn reads at least one token and then chooses its neurons anew,
        so the compact weights are freed. The oldest conversations go until the rest is within the limits."""
        conversation.session.drop_choice()
        mx.eval([c.state for c in conversation.cache])
        self._conversations.append(conversation)
        while self._conversations and self._exceeds_limits():
            self._conversations.pop(0)

    def _exceeds_limits(self) -> bool:
        return len(self) > self.max_conversations or self.nbytes > self.max_bytes


def prompt_call_ends(length: int, shared: int, step: int) -> list[int]:
    """Where the calls end that read a prompt with an empty cache: its first ``shared`` tokens (the system prompt) in
    steps, the others in steps, and the last token by itself, as in mlx-lm."""
    ends = [*range(step, shared, step), shared] if 0 < shared < length - 1 else [0]
    ends += [*range(ends[-1] + step, length - 1, step), length - 1, length]
    return sorted({end for end in ends if end > 0})


def _reusable_length(conversation: StoredConversation, prompt: list[int], call_ends: list[int], exact: bool) -> int:
    """How many tokens of a conversation a prompt can go on from."""
    common = conversation.common_prefix(prompt)
    if exact:
        same = takewhile(lambda pair: pair[0] == pair[1], zip(conversation.dense_ends, call_ends))
        common = max((end for end, _ in same if end <= common), default=0)
    # the evidence is not known at a point within a stretch that was read in one call
    for mark in reversed(conversation.session.spans):
        if mark.start < common < mark.end:
            return 0 if exact else mark.start
    return common
