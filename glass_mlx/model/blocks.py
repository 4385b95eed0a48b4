"""Find the feed-forward blocks of any mlx-lm model and swap their projections.

Nearly every family writes its FFN as projections around an elementwise activation, so a block works on any subset of
its neurons once its projections are sliced: no family needs code of its own here, only its projection names in
``PROJECTIONS``. What the names promise is checked on each distinct kind of block (``check``) before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..core.slicing import slice_columns, slice_rows, unit_group

# How a fused projection orders the 2F rows of its two halves. "" means that it is not fused.
HALVES, INTERLEAVED = "halves", "interleaved"


@dataclass
class Block:
    """One feed-forward block: a module and the names of its projections.

    Attributes:
        path: the module's path in the model, such as ``model.layers.0.mlp``.
        module: the module that holds the projections and whose forward code uses them.
        inputs: names of the projections to the neurons (gate, up, or a fused one).
        output: name of the projection from the neurons.
        size: F, the number of neurons (intermediate_size).
        fused: row order of a fused projection: ``""``, ``"halves"`` or ``"interleaved"``.
    """

    path: str
    module: nn.Module
    inputs: tuple[str, ...]
    output: str
    size: int
    fused: str = ""

    @property
    def group(self) -> int:
        """In how large groups its neurons can be kept (``slicing.unit_group``)."""
        return unit_group(self.module[self.output])

    def rows(self, kept: mx.array) -> mx.array:
        """Rows of the input projections that belong to the kept neurons [k]."""
        if self.fused == HALVES:
            return mx.concatenate([kept, kept + self.size])
        if self.fused == INTERLEAVED:
            return mx.stack([2 * kept, 2 * kept + 1], axis=1).reshape(-1)
        return kept

    def compact(self, kept: mx.array) -> dict[str, nn.Module]:
        """The block's projections with only the kept neurons [k] (int32, as ``select`` keeps them), by name."""
        rows = self.rows(kept)
        sliced = {name: slice_rows(self.module[name], rows) for name in self.inputs}
        return {**sliced, self.output: slice_columns(self.module[self.output], kept)}

    def kind(self) -> tuple:
        """What two blocks must share for one check to speak for both."""
        projections = [self.module[name] for name in (*self.inputs, self.output)]
        return (
            type(self.module),
            self.inputs,
            self.output,
            tuple((type(p), p.weight.shape, p.weight.dtype, "bias" in p) for p in projections),
            tuple(
                (k, v if isinstance(v, (bool, int, float, str)) else getattr(v, "__name__", ""))
                for k, v in sorted(vars(self.module).items())
                if not k.startswith("_") and not k.startswith("layer")
            ),
        )


class Tap:
    """Stands in for an output projection and shows its input, the hidden vectors, to ``observe``;
    what ``observe`` returns, if anything, is projected in their place."""

    def __init__(self, projection: nn.Module, observe: Callable[[mx.array], mx.array | None]):
        self.projection, self.observe = projection, observe

    def __call__(self, h: mx.array) -> mx.array:
        seen = self.observe(h)
        return self.projection(h if seen is None else seen)

    def __getattr__(self, name):  # some families read the projection's weight (its dtype, say)
        return getattr(self.projection, name)


@contextmanager
def swapped(blocks: list[Block], projections: list[dict[str, nn.Module]]) -> Iterator[None]:
    """Run the model with other projections in its blocks, and put the model's own back afterwards."""
    own = [{name: block.module[name] for name in new} for block, new in zip(blocks, projections)]
    try:
        for block, new in zip(blocks, projections):
            dict.update(block.module, new)
        yield
    finally:
        for block, old in zip(blocks, own):
            dict.update(block.module, old)
