"""What a dense call records of its tokens, as one vector: it adds up over calls, fades, and is saved as a whole.

energies of all neurons | sums of the hidden vectors | sums of the blocks' inputs | how many tokens these are of
     [sum of F]                 [sum of F]                  [sum of H]                      [blocks]
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx

from ..core.compensation import Sums


@dataclass(frozen=True)
class EvidenceLayout:
    """How the evidence of a model is laid out.

    Attributes:
        sizes: F of each block.
        inputs: H of each block.
    """

    sizes: list[int]
    inputs: list[int]

    @property
    def neurons(self) -> int:
        """How many neurons all blocks have; as many energies come first."""
        return sum(self.sizes)

    @property
    def size(self) -> int:
        """The length of the vector."""
        return 2 * self.neurons + sum(self.inputs) + len(self.sizes)

    def sums(self, evidence: mx.array) -> list[Sums]:
        """For each block what its tokens add up to, of evidence [size]."""
        blocks = len(self.sizes)
        widths = [self.neurons, *self.sizes, *self.inputs]
        _, *parts, tokens = mx.split(evidence, list(accumulate(widths)))
        return [Sums(parts[i], parts[blocks + i], tokens[i]) for i in range(blocks)]
