"""Evidence while it is being measured: summed up, split to tell how stable it is, and saved to go on later."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..core.importance import SIGNALS
from ..files import SMALL_HEADER, check_header, write_atomically
from ..model.glass_model import GlassModel
from .agreement import compare


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
        history: the stability after each batch, as (tokens, overlap, correlation).
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
        """How well the two halves agree (:func:`agreement.compare`) on the neurons of a layer, or of each of its
        experts: means over the layers, of the worse signal.

        Each half has read half of the tokens, so all of them together are more stable than this says.
        """
        worst = {"correlation": 1.0, "overlap": 1.0}
        for signal in SIGNALS:
            halves = ([_within(*pair) for pair in zip(self.by_block(signal, half), self.experts)] for half in (0, 1))
            layers = [compare(a, b) for a, b in zip(*halves)]
            for key in worst:
                worst[key] = min(worst[key], float(np.mean([layer[key] for layer in layers])))
        return worst

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
            and all(
                len(row) == 3 and all(type(x) in (int, float) and -1 <= x < 2**40 for x in row) for row in self.history
            )
            and self.total > 0
            and self._sums_fit()
        )

    def _sums_fit(self) -> bool:
        """Whether no block has more energy than the tokens read: each adds at most 1."""
        blocks = np.split(self.sums, np.cumsum(self.sizes)[:-1], axis=-1)
        most = np.array(self.tokens, np.float64) * (1 + 1e-3)  # rounding
        with np.errstate(over="ignore"):
            return all((block.sum(axis=-1) <= most).all() for block in blocks)


def _within(energies: np.ndarray, experts: int) -> np.ndarray:
    """What orders the neurons [F] of routed experts by their energies within each expert, all experts alike."""
    if not experts:
        return energies
    rows = energies.reshape(experts, -1)
    order = np.argsort(-rows, axis=1, kind="stable")
    places = np.empty(rows.shape)
    np.put_along_axis(places, order, np.broadcast_to(np.arange(rows.shape[1]), rows.shape), axis=1)
    return -places.reshape(-1)
