"""The low-rank answer that stands in for a block's dropped neurons while a conversation decodes.

It rides along with the block's own projections: the first one to read the block's input also gives z = [x P - mu P, 1],
and the output projection adds z M, with M = [C_S W_S^T; W_S (a_S + e_S)] (``core/compensation.py``). Of routed experts
each has an M of its own. M is linear in the dropped neurons: where machines share a block, each answers for those that
it dropped itself, before their sums are added up.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..core.compensation import Response, Sums, mean_hidden
from ..core.slicing import adding, in_float32, is_quantised
from .blocks import Block, Projection, carried


class Answer:
    """A block's answer for the neurons that one conversation dropped.

    Attributes:
        matrix: M, [n, H], or [E, n, H] of E routed experts; where n is 1, it is the same for every input.
        directions: [P, 0], [H, n]; None where n is 1.
        offset: [-mu P, 1], [n].
    """

    def __init__(self, matrix: mx.array, directions: mx.array | None = None, offset: mx.array | None = None):
        self.matrix, self.directions, self.offset = matrix, directions, offset

    @classmethod
    def make(cls, block: Block, kept: mx.array, response: Response | None, sums: Sums | None) -> Answer | None:
        """The answer for all neurons but the kept ones [k]; None where nothing is known of them.

        Args:
            block (Block): the block, with its dense weights.
            kept (mx.array): [k] int32.
            response (Response, optional): measured on the model's own text.
            sums (Sums, optional): what the prompt's tokens add up to.
        """
        if response is None and sums is None:
            return None
        rows = mean_hidden(response, sums)[None]
        if response is not None:
            rows = mx.concatenate([response.coefficients.astype(mx.float32), rows])
        dropped = mx.ones((block.size,)).at[kept].multiply(0.0)
        matrix = _products(block, rows * dropped).astype(block.dtype)
        return cls(matrix) if response is None else cls(matrix, *response.reader(block.dtype))

    @property
    def nbytes(self) -> int:
        """Size of what is this conversation's own."""
        return self.matrix.nbytes

    @property
    def arrays(self) -> list[mx.array]:
        """Everything that it computes with."""
        return [a for a in (self.matrix, self.directions, self.offset) if a is not None]

    def replacing(self, block: Block, compact: dict[str, nn.Module]) -> dict[str, Projection]:
        """The block's compact projections, with the answer in what they compute."""
        if self.directions is None:
            constant = adding(compact[block.output], lambda y: y + self.matrix[0].astype(y.dtype))
            return {**compact, block.output: constant}
        first = block.inputs[0]
        return {
            **compact,
            first: partial(self._read, compact[first]),
            block.output: adding(compact[block.output], self._add),
        }

    def _read(self, projection: Projection, x: mx.array, *routing: mx.array, **kwargs: Any) -> mx.array:
        carried()[id(self)] = mx.addmm(self.offset.astype(x.dtype), x, self.directions.astype(x.dtype))
        return projection(x, *routing, **kwargs)

    def _add(self, y: mx.array, *routing: mx.array, **kwargs: Any) -> mx.array:
        z = carried().pop(id(self))
        if routing:
            return y + mx.gather_mm(z.astype(y.dtype), self.matrix.astype(y.dtype), rhs_indices=routing[0], **kwargs)
        return mx.addmm(y, z.reshape(*y.shape[:-1], -1).astype(y.dtype), self.matrix.astype(y.dtype))


def _products(block: Block, rows: mx.array) -> mx.array:
    """Hidden vectors [n, F] times the output weights, [n, H] float32, without a bias; of routed experts [E, n, H]."""
    output, routing = block.module[block.output], []
    if block.experts:
        rows, routing = block.by_expert(rows).swapaxes(0, 1), [mx.arange(block.experts)]
    dtype = mx.float32 if is_quantised(output) else output.weight.dtype
    made = in_float32(output)(rows.astype(dtype), *routing).astype(mx.float32)
    if "bias" in output:
        made = made - (mx.expand_dims(output.bias, -2) if routing else output.bias).astype(mx.float32)
    return made
