"""Conversations recognised by their tokens: a small store of prompt caches, the least recently used dropped first.

A next turn's prompt begins with the tokens of the turn before, so it takes that turn's cache and pays only for what is
new. What may be reused follows from what the answer is to depend on:

- A conversation goes on from what its own client's turns left, the sparsely written answer included. It goes back only
  to where its evidence is known exactly: not into the middle of a stretch that was read in one call.
- A request with a seed, and one that finds another client's cache, reuses only what it would have computed itself, to
  the bit: densely read, in the same calls from the first token on.

So an answer with a seed depends on nothing but its request, and one without on its own client's turns only (and on
whether they are still in the store: if not, all is read densely).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..model.session import Session


@dataclass
class Entry:
    """A prompt cache and how its contents came about.

    Attributes:
        tokens (list[int]): the tokens in the cache.
        cache (list): the prompt cache; its last element is the session.
        client (str): whose conversation it is.
        bounds (list[int]): where the dense calls ended that read it from its first token on, as for a new prompt.
    """

    tokens: list[int]
    cache: list[Any]
    client: str
    bounds: list[int] = field(default_factory=list)

    @property
    def session(self) -> Session:
        return self.cache[-1]

    @property
    def nbytes(self) -> int:
        return sum(c.nbytes for c in self.cache)

    def cut(self, length: int) -> bool:
        """Go back to the first ``length`` tokens; False if the cache cannot."""
        surplus = self.session.offset - length
        if surplus and not (can_trim_prompt_cache(self.cache) and trim_prompt_cache(self.cache, surplus) == surplus):
            return False
        self.tokens = self.tokens[:length]
        self.bounds = [b for b in self.bounds if b <= length]
        return True


class Conversations:
    """The store. Used by the engine's thread only."""

    def __init__(self, max_bytes: int, max_entries: int):
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self._entries: list[Entry] = []  # least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries)

    def clear(self) -> None:
        self._entries.clear()

    def take(
        self, prompt: list[int], bounds: list[int], client: str, signal: str, exact: bool, new: Callable[[], list[Any]]
    ) -> Entry:
        """An entry for a prompt, with the longest reusable beginning of it, at most all but the last token.

        Args:
            prompt (list[int]): the tokens to be read.
            bounds (list[int]): where the calls end that would read the prompt from nothing.
            client (str): whose request it is.
            signal (str): what the evidence must be of.
            exact (bool): reuse only what the request would compute itself.
            new (callable): makes an empty prompt cache.

        Returns:
            Entry: the caller's own: taken out of the store, or a copy where the stored one has more that others may
            want.
        """
        fits = [e for e in self._entries if e.session.config.signal == signal]
        lengths = [_reusable(e, prompt, bounds, exact or e.client != client) for e in fits]
        for length, entry in sorted(zip(lengths, fits), key=lambda pair: -pair[0]):
            if length == 0:
                break
            self._touch(entry)
            if length == entry.session.offset and entry.client == client:
                self._entries.remove(entry)
                return entry
            branch = copy.deepcopy(entry)
            branch.client = client
            if branch.cut(length):
                return branch
        return Entry([], new(), client)

    def put(self, entry: Entry) -> None:
        """Keep a conversation for its next turn. That one reads at least one token and then chooses anew, so the
        compact weights are let go; then the oldest entries, as far as the budget demands."""
        entry.session.drop_choice()
        mx.eval([c.state for c in entry.cache])
        self._entries.append(entry)
        while len(self._entries) > self.max_entries or self.nbytes > self.max_bytes:
            self._entries.pop(0)
            if not self._entries:
                return

    def _touch(self, entry: Entry) -> None:
        self._entries.remove(entry)
        self._entries.append(entry)


def read_bounds(length: int, shared: int, step: int) -> list[int]:
    """Where the calls end that read a prompt from nothing: its first ``shared`` tokens (the system prompt) and the
    others in steps, and the last token by itself, as mlx-lm does."""
    stops = [*range(step, shared, step), shared] if 0 < shared < length - 1 else [0]
    stops += [*range(stops[-1] + step, length - 1, step), length - 1, length]
    return sorted({b for b in stops if b > 0})


def _reusable(entry: Entry, prompt: list[int], bounds: list[int], exact: bool) -> int:
    """How many tokens of an entry a prompt can go on from."""
    common = 0
    for ours, theirs in zip(entry.tokens, prompt[:-1]):
        if ours != theirs:
            break
        common += 1
    if exact:
        same = takewhile(lambda pair: pair[0] == pair[1], zip(entry.bounds, bounds))
        common = max((bound for bound, _ in same if bound <= common), default=0)
    # the session's evidence up to a point within a stretch that was read in one call is not known
    for mark in reversed(entry.session.spans):
        if mark.start < common < mark.end:
            return 0 if exact else mark.start
    return common
