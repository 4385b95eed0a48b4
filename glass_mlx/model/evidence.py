"""What a dense call records of its tokens, as one vector: it adds up over calls, fades, and is saved as a whole.

energies of all neurons | sums of the hidden vectors | sums of the blocks' inputs | how many tokens these are of
     [sum of F]                 [sum of F]                  [sum of H]                      [blocks]

The sums are those that dropped neurons are answered for by (``core/compensation.py``). Routed experts have none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import mlx.core as mx

from ..core.compensation import Sums
from .blocks import Block, hooked, run_with, watching_inputs


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


def recording(
    blocks: list[Block],
    norms: list[mx.array | None],
    counted: mx.array,
    call: Callable[..., mx.array],
    *args: Any,
    **kwargs: Any,
) -> tuple[mx.array, mx.array]:
    """``call(*args, **kwargs)``, with the evidence of all neurons on the way.

    Args:
        blocks (list[Block]): whose hidden vectors are recorded.
        norms (list): for each block its output-weight norms (``output_norms``) for impact, or None for activation.
        counted (mx.array): a weight for each token [B, L] in the sums of inputs and hidden vectors, float32.
        call: the dense model.

    Returns:
        tuple: what ``call`` returns, and the evidence (``EvidenceLayout``), neither evaluated.
    """
    counted = counted.reshape(-1)
    everything = mx.sum(counted, keepdims=True)
    energies, hidden, inputs, tokens = ([None] * len(blocks) for _ in range(4))

    def add(sums: list[mx.array | None], i: int, value: mx.array) -> None:
        sums[i] = value if sums[i] is None else sums[i] + value  # a block may be called more than once

    def weighted_sum(x: mx.array) -> mx.array:
        """Of vectors [..., n] in float32. Some families show a block other ones than one for each token."""
        x = x.reshape(-1, x.shape[-1])
        return (counted if len(x) == counted.size else mx.ones((len(x),))) @ x

    def observe_input(i: int, x: mx.array, *routing: mx.array) -> None:
        if routing:
            return
        rows = x.size // x.shape[-1]
        add(inputs, i, weighted_sum(x.astype(mx.float32)))
        add(tokens, i, everything if rows == counted.size else mx.full((1,), float(rows)))

    def observe(i: int, h: mx.array, *routing: mx.array) -> mx.array:
        wide = h.astype(mx.float32)
        add(energies, i, blocks[i].energy(wide, norms[i], *routing))
        if not routing:
            add(hidden, i, weighted_sum(wide))
        # Recorded before it is projected: else every layer's hidden vectors wait for the end of the prefill.
        return mx.depends(h, [sums[i] for sums in (energies, hidden, inputs) if sums[i] is not None])

    result = run_with(watching_inputs(blocks, observe_input) | hooked(blocks, observe), call, *args, **kwargs)
    layout = EvidenceLayout.of(blocks)
    recorded = [
        mx.zeros((size,)) if value is None else value
        for sums, sizes in zip(
            (energies, hidden, inputs, tokens), (layout.sizes, layout.hidden, layout.inputs, [1] * len(blocks))
        )
        for value, size in zip(sums, sizes)
    ]
    return result, mx.concatenate(recorded)
