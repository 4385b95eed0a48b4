"""How many tokens to draft before the dense model checks them."""

from __future__ import annotations

from collections import deque

MAX_DRAFT = 8
# Where drafting does not pay, this many tokens are decoded densely before it is tried again; twice as many each time.
_STRETCH, MAX_STRETCH = 64, 1024
# Recent measurements of a time. The least of them counts, because warming up and interruptions only add to it.
_RECENT = 5

# Neurons are chosen again after so many tokens of an answer, after three times as many, and then every _CHOICE_GAP.
_FIRST_CHOICE, _CHOICE_GAP = 32, 128


def next_choice(generated: int) -> int:
    """After how many generated tokens neurons are chosen again, at or after ``generated``."""
    due = _FIRST_CHOICE
    while due < generated:
        due = min(3 * due, due + _CHOICE_GAP)
    return due


def tokens_per_pass(drafted: int, acceptance: float) -> float:
    """How many tokens a pass emits on average if each drafted one is accepted with this probability (Leviathan et al.,
    arXiv 2211.17192)."""
    return sum(acceptance**i for i in range(drafted + 1))


class DraftScheduler:
    """How many tokens to draft: a cost model of measured times and of the acceptance so far.

    A pass with k drafted tokens emits ``tokens_per_pass`` tokens on average in the time of k sparse steps and one dense
    call over k + 1 tokens.

    Attributes:
        accepted, tried: drafted tokens, the older ones counting less.
        stretch: how many tokens to decode densely where drafting does not pay.
    """

    def __init__(self, max_draft: int = MAX_DRAFT):
        self.max_draft = max_draft
        self.accepted, self.tried = 3.0, 4.0
        self.stretch = _STRETCH // 2
        self._sparse: deque[float] = deque(maxlen=_RECENT)  # seconds a step
        self._dense: dict[int, deque[float]] = {}  # seconds a call by the number of drafted tokens in it
        self._probe = True

    @property
    def acceptance(self) -> float:
        return self.accepted / self.tried

    def choose(self) -> int:
        """The number of tokens to draft next; 0 decodes a stretch densely, because drafting does not pay."""
        if self._probe or not self.measured:
            return min(2, self.max_draft)
        return max(range(self.max_draft + 1), key=self._speed)

    def observe(self, drafted: int, accepted: int, draft_seconds: float, dense_seconds: float) -> None:
        """What a pass took and brought; with nothing drafted, a dense step."""
        self._dense.setdefault(drafted, deque(maxlen=_RECENT)).append(dense_seconds)
        self._probe = drafted == 0
        if not drafted:
            return
        self._sparse.append(draft_seconds / drafted)
        keep = 0.97**drafted
        # tokens after the first rejection were not tried
        self.accepted = keep * self.accepted + accepted
        self.tried = keep * self.tried + min(drafted, accepted + 1)
        self.stretch = _STRETCH if self.choose() else min(2 * self.stretch, MAX_STRETCH)

    @property
    def measured(self) -> bool:
        """Whether the time of a dense step is known."""
        return 0 in self._dense

    def _speed(self, k: int) -> float:
        """Tokens a second with k drafted ones in a pass."""
        return tokens_per_pass(k, self.acceptance) / (k * min(self._sparse) + self._dense_seconds(k))

    def _dense_seconds(self, k: int) -> float:
        """Seconds of a dense call over k + 1 tokens: measured, or on the line through the step and the nearest."""
        if k in self._dense:
            return min(self._dense[k])
        near = min((n for n in self._dense if n), key=lambda n: abs(n - k))
        step = min(self._dense[0])
        return max(step, step + (min(self._dense[near]) - step) * k / near)
