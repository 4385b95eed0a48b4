"""Keeps the prompt caches of past conversations, and finds the one that a new prompt can go on from.

The rule: an answer is a function of its request, whatever was asked before. So a cache is reused only where it holds,
bit by bit, what reading the prompt with an empty cache would write. Two things make that hold and keep it cheap:

- Where the calls end that read a prompt (``prompt_call_ends``) follows from its tokens from the first on, so two
  prompts with a common beginning are read in the same calls up to there. Calls end where messages end, because that is
  where conversations branch.
- A conversation is kept as it was at the last of these ends. Its answer, which the sparse model wrote, is not kept: the
  next turn reads it like any other message, densely and recorded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from ..decoding.control_tokens import template_tokens
from ..decoding.conversation import CachedConversation
from ..group import all_of, decided, share
from ..model.session import Session

_SHORTEST_CALL = 32  # tokens; a message below that is read together with the next one


class ConversationStore:
    """Holds the most recently used conversations within limits of memory and number. Not safe to share between threads:
    only the engine's thread uses it."""

    def __init__(self, max_bytes: int, max_conversations: int, quantized_kv_start: int = 0):
        """
        Args:
            max_bytes, max_conversations (int): the limits.
            quantized_kv_start (int): keys and values are quantised from this length on, where they are.
        """
        self.max_bytes, self.max_conversations = max_bytes, max_conversations
        self.quantized_kv_start = quantized_kv_start
        self._conversations: list[CachedConversation] = []  # the least recently used first

    def __len__(self) -> int:
        return len(self._conversations)

    @property
    def nbytes(self) -> int:
        return sum(conversation.nbytes for conversation in self._conversations)

    def take(
        self, prompt: list[int], call_ends: list[int], signal: str, make_cache: Callable[[], list[Any]]
    ) -> CachedConversation:
        """Find the conversation that holds the most of a prompt, and cut it to that.

        Args:
            prompt (list[int]): the tokens to read.
            call_ends (list[int]): its ``prompt_call_ends``.
            signal (str): the signal that the evidence must be of.
            make_cache (callable): makes an empty prompt cache.

        Returns:
            CachedConversation: the caller's own. It was taken out of the store; or copied, where the stored one has
            more that another request may want; or it is new.
        """
        same_signal = [c for c in self._conversations if c.session.config.signal == signal]
        lengths = [_reusable_length(c, prompt, call_ends) for c in same_signal]
        lengths = share(mx.array(lengths, mx.int32)).tolist() if lengths else []
        for length, conversation in sorted(zip(lengths, same_signal), key=lambda pair: -pair[0]):
            if length == 0:
                break
            self._conversations.remove(conversation)
            if length == conversation.session.offset:
                return conversation
            self._conversations.append(conversation)  # it was used just now
            if not all_of(length >= self.quantized_kv_start or not _is_quantized(conversation.cache)):
                continue
            branch = copy.deepcopy(conversation)
            if all_of(branch.cut(length)):
                return branch
        return CachedConversation([], make_cache())

    def put(self, conversation: CachedConversation) -> None:
        """Keep a conversation that ends where a call ends. The next turn chooses its neurons anew, so the compact
        weights are freed. The oldest conversations go until the rest is within the limits."""
        conversation.session.drop_choice()
        mx.eval([c.state for c in conversation.cache])
        self._conversations.append(conversation)
        while self._conversations and decided(self._exceeds_limits()):
            self._conversations.pop(0)

    def _exceeds_limits(self) -> bool:
        return len(self) > self.max_conversations or self.nbytes > self.max_bytes


def message_marks(tokenizer: Any) -> frozenset[int]:
    """The control tokens by which the chat template tells messages apart, and EOS."""
    marks = set(tokenizer.eos_token_ids)
    if tokenizer.has_chat_template:
        marks |= template_tokens(tokenizer, tokenizer.apply_chat_template)
    return frozenset(marks)


def prompt_call_ends(prompt: list[int], marks: Container[int], step: int) -> list[int]:
    """Where the calls end that read a prompt before its last tokens: before a mark, and after a step.

    Args:
        prompt (list[int]): its tokens.
        marks (container): tokens between messages, as of ``message_marks``.
        step (int): the most tokens in one call.

    Returns:
        list[int]: ascending, all below the prompt's length. Whether one is at a place depends on the tokens up to there
        alone, so prompts with a common beginning have the same ones within it.
    """
    ends, start = [], 0
    for end in range(1, len(prompt)):
        length = end - start
        if length == step or (length >= _SHORTEST_CALL and prompt[end] in marks):
            ends.append(end)
            start = end
    return ends


def stays_cuttable(cache: list[Any], kv_bits: int | None) -> bool:
    """Whether a prompt cache can be cut to its present length later, whatever is decoded until then, and is then the
    same as now. Windows and recurrent states forget, and keys that are not quantised yet may be."""
    kinds = (QuantizedKVCache,) if kv_bits else (KVCache, QuantizedKVCache)
    return all(type(entry) in kinds for entry in cache if not isinstance(entry, Session))


def _is_quantized(cache: list[Any]) -> bool:
    return any(isinstance(entry, QuantizedKVCache) for entry in cache)


def _reusable_length(conversation: CachedConversation, prompt: list[int], call_ends: list[int]) -> int:
    """How many tokens of a conversation a prompt can go on from: up to the end of a call whose evidence is known."""
    common = conversation.common_prefix(prompt)
    known = {span.end for span in conversation.session.spans}
    return max((end for end in call_ends if end <= common and end in known), default=0)
