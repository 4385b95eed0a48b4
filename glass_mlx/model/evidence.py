"""What a dense call records of its tokens, as one vector: it adds up over calls, fades, and is saved as a whole.

energies of all neurons | sums of the hidden vectors | sums of the blocks' inputs | how many tokens these are of
     [sum of F]                 [sum of F]                  [sum of H]                      [blocks]

The sums are those that dropped neurons are answered for by (``core/compensation.py``). Routed experts have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx

from ..core.compensation import Sums
from .blocks import Block


@dataclass(frozen=True)
class EvidenceLayout:
    """How the evidence of a model is laid out.

    Attributes:
        sizes: F of each block, of all its experts.
        hidden: F of each block with sums, 0 of the others.
        inputs: H of each block with sums, 0 of the others.
    """

    sizes: list[int]
    hidden: list[int]
    inputs: list[int]

    @classmethod
    def of(cls, blocks: list[Block]) -> EvidenceLayout:
        """The layout for a model's blocks."""
        answered = [(0, 0) if block.experts else (block.size, block.input_size) for block in blocks]
        return cls([block.size for block in blocks], *map(list, zip(*answered)))

    @property
    def neurons(self) -> int:
        """How many neurons all blocks have; as many energies come first."""
        return sum(self.sizes)

    @property
    def size(self) -> int:
        """The length of the vector."""
        return self.neurons + sum(self.hidden) + sum(self.inputs) + len(self.sizes)

    def sums(self, evidence: mx.array) -> list[Sums | None]:
        """For each block what its tokens add up to, of evidence [size]; None where it has no sums."""
        blocks = len(self.sizes)
        widths = [self.neurons, *self.hidden, *self.inputs]
        _, *parts, tokens = mx.split(evidence, list(accumulate(widths)))
        return [Sums(parts[i], parts[blocks + i], tokens[i]) if self.hidden[i] else None for i in range(blocks)]
