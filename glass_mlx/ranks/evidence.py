"""Evidence while it is being measured: summed up, split to tell how stable it is, and saved to go on later."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..core.importance import SIGNALS
from ..files import SMALL_HEADER, check_header, write_atomically
from ..model.glass_model import GlassModel
from .agreement import compare

# What the history has of the stability, in this order.
STABILITY = ("overlap", "correlation", "efficiency")


@dataclass
class SplitEvidence:
    """Energies summed so far, kept apart by domain and by the half that a sequence belongs to.

    Attributes:
        sizes: F of each block.
        sums: the energies, [signals, halves, domains, sum of F] float64.
        tokens: how many tokens were read, by half and domain.
        rows: for each domain the sequences that were read.
        sequences: how many sequences were read.
        batches: how many batches of the source were read.
        history: the stability after each batch, as (tokens, overlap, correlation, efficiency).
        experts: E of each block, 0 if it is dense.
    """

    sizes: list[int]
    sums: np.ndarray
    tokens: list[list[int]]
    rows: list[list[list[int]]]
    sequences: int = 0
    batches: int = 0
    history: list[list[float]] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)

    @classmethod
    def empty(cls, model: GlassModel, domains: int) -> SplitEvidence:
        """No evidence yet, for a model's blocks and a number of domains."""
        sizes = [block.size for block in model.blocks]
        sums = np.zeros((len(SIGNALS), 2, domains, sum(sizes)))
        experts = [block.experts for block in model.blocks]
        return cls(sizes, sums, [[0] * domains, [0] * domains], [[] for _ in range(domains)], experts=experts)

    @property
    def total(self) -> int:
        """How many tokens were read."""
        return sum(map(sum, self.tokens))

    def tokens_of(self, domain: int) -> int:
        """How many tokens of a domain were read."""
        return sum(tokens[domain] for tokens in self.tokens)

    def by_block(self, signal: str, half: int | None = None, domain: int | None = None) -> list[np.ndarray]:
        """The energies [F] of each block, of one half or both, and of one domain or all."""
        halves = slice(None) if half is None else slice(half, half + 1)
        domains = slice(None) if domain is None else slice(domain, domain + 1)
        values = self.sums[SIGNALS.index(signal), halves, domains].sum(axis=(0, 1))
        return np.split(values, np.cumsum(self.sizes)[:-1])

    def stability(self) -> dict[str, float]:
        """How well the two halves of the sequences agree on the better half of the neurons
        (:func:`agreement.compare`): means over the layers, of the worse signal.

        Each half has read half of the tokens, so all of them together are more stable than this says.
        """
        by_signal = []
        for signal in SIGNALS:
            halves = (self.by_block(signal, half) for half in (0, 1))
            layers = [compare(a, b, experts=max(1, experts)) for a, b, experts in zip(*halves, self.experts)]
            by_signal.append({key: float(np.mean([layer[key] for layer in layers])) for key in layers[0]})
        return {key: min(means[key] for means in by_signal) for key in by_signal[0]}

    def expected_tokens(self, efficiency: float, stable_at: float) -> float:
        """How many tokens will have been read at a wanted efficiency, given that of now. What is lost by choosing by
        half of them, 1 / efficiency - 1, falls as one over their number."""
        if self.total == 0 or stable_at == 1:
            return math.inf
        return self.total * (1 / max(efficiency, 1e-9) - 1) / (1 / stable_at - 1)

    def save(self, path: Path, identity: str) -> None:
        """Write everything to a file. ``identity`` says what was being measured, and how."""
        state = {"identity": identity, "sizes": self.sizes, "tokens": self.tokens, "rows": self.rows}
        state |= {"sequences": self.sequences, "batches": self.batches, "history": self.history}
        data = save({"sums": self.sums}, metadata={"state": json.dumps(state)})
        write_atomically(path, lambda temporary: temporary.write_bytes(data))

    @classmethod
    def load(cls, path: Path | None, identity: str, empty: SplitEvidence, vocabulary: int) -> SplitEvidence:
        """Read what an interrupted run of the same identity saved.

        Args:
            path (Path, optional): the file; anyone may have written it.
            identity (str): what is being measured, and how.
            empty (SplitEvidence): what to begin with where there is nothing usable.
            vocabulary (int): token ids are below this.

        Returns:
            SplitEvidence: what was saved, or ``empty``.
        """
        if path is None or not path.exists():
            return empty
        try:
            check_header(path, SMALL_HEADER)
            with safe_open(str(path), framework="numpy") as f:
                state = json.loads(f.metadata()["state"])
                if state.pop("identity") != identity:
                    return empty
                saved = cls(sums=f.get_tensor("sums"), **state, experts=empty.experts)
            return saved if saved._is_sound(empty, vocabulary) else empty
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return empty

    def _is_sound(self, empty: SplitEvidence, vocabulary: int) -> bool:
        """Whether all values are ones that measuring leaves."""
        domains = len(empty.rows)
        if not all(type(part) is list for part in (self.history, self.rows, *self.rows, self.tokens, *self.tokens)):
            return False
        counts = [*self.tokens[0], *self.tokens[1], self.sequences, self.batches]
        ids = [token for rows in self.rows for row in rows for token in row]
        return (
            self.sizes == empty.sizes
            and (self.sums.shape, self.sums.dtype) == (empty.sums.shape, empty.sums.dtype)
            and bool(np.isfinite(self.sums).all() and (self.sums >= 0).all())
            and len(self.tokens) == 2
            and len(self.tokens[0]) == len(self.tokens[1]) == len(self.rows) == domains
            and all(type(n) is int and 0 <= n < 2**40 for n in counts)
            and all(type(n) is int and 0 <= n < vocabulary for n in ids)
            and [sum(map(len, rows)) for rows in self.rows] == [self.tokens_of(d) for d in range(domains)]
            and all(len(row) == 1 + len(STABILITY) and all(map(_is_bounded, row)) for row in self.history)
            and self.total > 0
            and self._sums_fit()
        )

    def _sums_fit(self) -> bool:
        """Whether no block has more energy than the tokens read: each adds at most 1."""
        blocks = np.split(self.sums, np.cumsum(self.sizes)[:-1], axis=-1)
        most = np.array(self.tokens, np.float64) * (1 + 1e-3)  # rounding
        with np.errstate(over="ignore"):
            return all((block.sum(axis=-1) <= most).all() for block in blocks)


def _is_bounded(value: object) -> bool:
    return type(value) in (int, float) and -1 <= value < 2**40
