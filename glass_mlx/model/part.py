"""The part of a model that this process has, where several processes share the model (``mlx.launch``).

Tensor parallel, each of them has a stretch of every block's neurons, or of those of every routed expert; pipeline
parallel, it has some of the blocks, whole. It chooses among its own neurons without asking the others. What was
measured on the whole model is cut to its part here, and layer budgets are the whole model's, divided by the processes
that share a block: so each keeps as many neurons as the others, and none waits for another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from ..core.compensation import Response
from ..core.ranking import rank_by_expert
from ..errors import GlassError
from .blocks import Block
from .config import GlassConfig
from .selection import BlockShape, Measured, NeuronSelector

_Any = TypeVar("_Any")


@dataclass(frozen=True)
class WholeBlock:
    """What is known of a block of the whole model.

    Attributes:
        path, size, experts, active, step, input_size: as of :class:`~glass_mlx.model.blocks.Block`.
        row: the first row of its output projection, as bytes: a value for every neuron, packed if it is quantised.
    """

    path: str
    size: int
    experts: int
    active: int
    step: int
    input_size: int
    row: np.ndarray

    @classmethod
    def of(cls, block: Block) -> WholeBlock:
        """What is known of a block. A row of its weights is read."""
        about = (getattr(block, name) for name in ("path", "size", "experts", "active", "step", "input_size"))
        return cls(*about, _first_row(block))

    @property
    def width(self) -> int:
        return self.size // (self.experts or 1)


@dataclass(frozen=True)
class WholeModel:
    """The model that the processes share, as one machine would have it.

    Attributes:
        rank: this process's place among them, from 0 on.
        count: how many they are.
        way: ``"tensor"`` or ``"pipeline"``.
        blocks: all FFN blocks that can decode sparsely.
        fingerprints: ``ranks.identity.fingerprints`` of the whole model; empty if its statistics are not asked for.
    """

    rank: int
    count: int
    way: str
    blocks: list[WholeBlock]
    fingerprints: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.count} ranks, {self.way} parallel"

    @property
    def neurons(self) -> int:
        """How many neurons all blocks have."""
        return sum(block.size for block in self.blocks)


@dataclass(frozen=True)
class _Place:
    """Where a block's neurons are in the whole model: the block's number there, and a stretch of each expert's."""

    block: int
    start: int
    stop: int


class ModelPart:
    """This process's part of a model.

    Attributes:
        whole: the model.
        blocks: the FFN blocks of the part.
    """

    def __init__(self, whole: WholeModel, blocks: list[Block]):
        """
        Raises:
            GlassError: a block is no stretch of one of the whole model's.
        """
        self.whole, self.blocks = whole, blocks
        numbers = {block.path: i for i, block in enumerate(whole.blocks)}
        self._places = [self._place(block, numbers.get(block.path)) for block in blocks]
        self._whole_counts = NeuronSelector(self._whole_shapes()).counts

    def selector(self, shapes: list[BlockShape], measured: Measured) -> NeuronSelector:
        """What chooses this part's neurons.

        Args:
            shapes (list[BlockShape]): of the part's blocks.
            measured (Measured): of the whole model.
        """

        def cut(values: dict[str, list[mx.array]] | None, one: Callable) -> dict[str, list[mx.array]] | None:
            return values and {signal: self._each(of_blocks, one) for signal, of_blocks in values.items()}

        own = Measured(
            ranks=cut(measured.ranks, self._cut_ranks),
            domains=cut(measured.domains, self._cut_shares),
            unpredictable=measured.unpredictable and self._each(measured.unpredictable, self._cut),
        )
        budgets_are_by = replace(measured.of("impact"), unpredictable=None)

        @cache  # made when it is first asked, and then for all configurations
        def whole() -> NeuronSelector:
            return NeuronSelector(self._whole_shapes(), budgets_are_by)

        def counts(config: GlassConfig) -> list[int]:
            all_of = whole().counts(config)
            return [all_of[place.block] // self._sharing(i) for i, place in enumerate(self._places)]

        self._whole_counts = lambda config: whole().counts(config)
        return NeuronSelector(shapes, own, counts)

    def responses(self, responses: list[Response | None] | None) -> list[Response | None] | None:
        """The whole model's responses, cut to this part's neurons."""
        return responses and self._each(responses, self._cut_response)

    def kept(self, config: GlassConfig) -> int:
        """How many neurons all processes keep together."""
        return sum(self._whole_counts(config))

    def _each(self, values: list[_Any], cut: Callable[[int, _Any], _Any]) -> list[_Any]:
        """Values of the whole model's blocks, cut to the part's."""
        return [cut(i, values[place.block]) for i, place in enumerate(self._places)]

    def _place(self, block: Block, number: int | None) -> _Place:
        whole = self.whole.blocks[number] if number is not None else None
        if whole is not None and whole.experts == block.experts:
            start = self.whole.rank * block.width if block.width * self.whole.count == whole.width else 0
            stop = start + block.width
            row = whole.row[len(whole.row) * start // whole.width : len(whole.row) * stop // whole.width]
            if np.array_equal(row, _first_row(block)):
                return _Place(number, start, stop)
        raise GlassError(
            f"{block.path or 'The model'} is not shared in a way that is known here: rank {self.whole.rank} has "
            f"{block.width} neurons that are no stretch of the whole block's. Decode densely: --dense."
        )

    def _sharing(self, i: int) -> int:
        """How many processes share a block of the part."""
        return self.whole.blocks[self._places[i].block].size // self.blocks[i].size

    def _whole_shapes(self) -> list[BlockShape]:
        """The whole model's blocks, in steps that can be divided by the processes that share them."""
        steps = {place.block: self.blocks[i].step * self._sharing(i) for i, place in enumerate(self._places)}
        return [
            BlockShape(b.size, 1, steps.get(i, b.step), b.experts or 1, b.active)
            for i, b in enumerate(self.whole.blocks)
        ]

    def _cut(self, i: int, values: mx.array | None) -> mx.array | None:
        """A value for each neuron of the whole block [..., F], for those of the part's block; None if there is none."""
        if values is None:
            return None
        place = self._places[i]
        rows = values.reshape(*values.shape[:-1], self.blocks[i].experts or 1, -1)
        return rows[..., place.start : place.stop].reshape(*values.shape[:-1], -1)

    def _cut_ranks(self, i: int, ranks: mx.array) -> mx.array:
        """Ranks among the part's neurons only."""
        return rank_by_expert(1 + mx.max(ranks) - self._cut(i, ranks), self.blocks[i].experts)

    def _cut_shares(self, i: int, domains: mx.array) -> mx.array:
        """The energies [K, F] of a domain's token, which sum to 1 here as the evidence of a token does."""
        shares = self._cut(i, domains)
        return shares / mx.maximum(mx.sum(shares, axis=-1, keepdims=True), 1e-12)

    def _cut_response(self, i: int, response: Response | None) -> Response | None:
        if response is None:
            return None
        by_neuron = ("hidden_mean", "coefficients", "unpredictable")
        return replace(response, **{name: self._cut(i, getattr(response, name)) for name in by_neuron})


def _first_row(block: Block) -> np.ndarray:
    weight: Any = block.module[block.output].weight
    return np.array((weight[0] if weight.ndim == 3 else weight)[:1].reshape(-1).view(mx.uint8))
