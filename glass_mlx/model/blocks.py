"""The feed-forward blocks of a model, and which weights a call computes them with.

A block's projections stay where they are in the model. Other weights, or hooks, are given to one call (``run_with``):
they live in a context variable, which belongs to that call and its thread. So no call sees another's weights, and
after an exception, wherever it came, the model is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..core.importance import energy
from ..core.slicing import plain_class, slice_columns, slice_rows, unit_group

# How a fused projection orders the 2F rows of its two halves. "" means that it is not fused.
HALVES, INTERLEAVED = "halves", "interleaved"

Projection = Callable[[mx.array], mx.array]
# What a call uses in place of projections, by the projection's id.
Replacements = Mapping[int, Projection]
_replacements: ContextVar[Replacements] = ContextVar("_replacements", default=MappingProxyType({}))


@dataclass
class Block:
    """One feed-forward block: a module and the names of its projections. Making one makes its projections replaceable.

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

    def __post_init__(self):
        for name in self.names:
            _set_class(self.module[name], _replaceable(plain_class(self.module[name])))

    @property
    def names(self) -> tuple[str, ...]:
        """All projections by name, the output projection last."""
        return (*self.inputs, self.output)

    @property
    def group(self) -> int:
        """How many neurons share a quantisation group of the output projection (``slicing.unit_group``)."""
        return unit_group(self.module[self.output])

    def rows(self, kept: mx.array) -> mx.array:
        """Rows of the input projections that belong to the kept neurons [k]."""
        if self.fused == HALVES:
            return mx.concatenate([kept, kept + self.size])
        if self.fused == INTERLEAVED:
            return mx.stack([2 * kept, 2 * kept + 1], axis=1).reshape(-1)
        return kept

    def compact(self, kept: mx.array) -> dict[str, nn.Module]:
        """The block's projections with only the kept neurons [k] (int32, as ``select`` orders them), by name."""
        rows = self.rows(kept)
        sliced = {name: slice_rows(self.module[name], rows) for name in self.inputs}
        return {**sliced, self.output: slice_columns(self.module[self.output], kept)}

    def replacing(self, projections: Mapping[str, Projection]) -> dict[int, Projection]:
        """Replacements that put these projections, by name, in the place of the block's own."""
        return {id(self.module[name]): projection for name, projection in projections.items()}

    def let_go(self) -> None:
        """Make the projections what they were before: plain layers of mlx-lm."""
        for name in self.names:
            _set_class(self.module[name], plain_class(self.module[name]))

    def kind(self) -> tuple:
        """What two blocks must share for one check to speak for both."""
        projections = [self.module[name] for name in self.names]
        return (
            type(self.module),
            self.inputs,
            self.output,
            tuple((plain_class(p), p.weight.shape, p.weight.dtype, "bias" in p) for p in projections),
            tuple(
                (k, v if isinstance(v, (bool, int, float, str)) else getattr(v, "__name__", ""))
                for k, v in sorted(vars(self.module).items())
                if not k.startswith("_") and not k.startswith("layer")
            ),
        )


@dataclass(frozen=True)
class CompactWeights:
    """The kept neurons' weights.

    Attributes:
        projections: for each block its compact projections by name.
        replacements: the same, as ``run_with`` takes them.
        nbytes: their size, without what a ``ScatterLinear`` only refers to.
    """

    projections: list[dict[str, nn.Module]]
    replacements: dict[int, Projection]
    nbytes: int

    @classmethod
    def of(cls, blocks: list[Block], projections: list[dict[str, nn.Module]]) -> CompactWeights:
        """For each block, compact projections by name."""
        replacements: dict[int, Projection] = {}
        for block, compact in zip(blocks, projections):
            replacements |= block.replacing(compact)
        modules = [module for compact in projections for module in compact.values()]
        arrays = [value for module in modules for value in module.values() if isinstance(value, mx.array)]
        return cls(projections, replacements, sum(array.nbytes for array in arrays))


class Hook:
    """An output projection that shows its input, the hidden vectors, to ``observe`` first.

    What ``observe`` returns, if anything, is projected instead.
    """

    def __init__(self, projection: nn.Module, observe: Callable[[mx.array], mx.array | None]):
        self.projection, self.observe = projection, observe

    def __call__(self, h: mx.array) -> mx.array:
        seen = self.observe(h)
        return plain_class(self.projection).__call__(self.projection, h if seen is None else seen)


def hooked(blocks: list[Block], observe: Callable[[int, mx.array], mx.array | None]) -> dict[int, Projection]:
    """Replacements that show the hidden vectors of block i to ``observe(i, h)``; see :class:`Hook`."""
    outputs = [block.module[block.output] for block in blocks]
    return {id(output): Hook(output, partial(observe, i)) for i, output in enumerate(outputs)}


def run_with(replacements: Replacements, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``call(*args, **kwargs)``, in which projections are replaced; nothing outside of this call sees it."""

    def replaced() -> Any:
        _replacements.set(replacements)
        return call(*args, **kwargs)

    return copy_context().run(replaced)


def recording(
    blocks: list[Block], norms: list[mx.array | None], call: Callable[..., mx.array], *args: Any, **kwargs: Any
) -> tuple[mx.array, list[mx.array]]:
    """``call(*args, **kwargs)``, with the energies of all neurons on the way.

    Args:
        blocks (list[Block]): whose hidden vectors are recorded.
        norms (list): for each block its output-weight norms [F] for impact, or None for activation.
        call: the dense model.

    Returns:
        tuple: what ``call`` returns, and for each block the energies [F] float32, neither evaluated.
    """
    energies = [mx.zeros((block.size,)) for block in blocks]

    def observe(i: int, h: mx.array) -> mx.array:
        energies[i] = energies[i] + energy(h, norms[i])
        # Recorded before it is projected: else every layer's hidden vectors wait for the end of the prefill.
        return mx.depends(h, energies[i])

    return run_with(hooked(blocks, observe), call, *args, **kwargs), energies


@cache
def _replaceable(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a linear layer that calls what the running call has put in its place."""

    class Replaceable(kind):
        plain = kind

        def __call__(self, x: mx.array) -> mx.array:
            other = _replacements.get().get(id(self))
            return kind.__call__(self, x) if other is None else other(x)

    Replaceable.__name__ = Replaceable.__qualname__ = kind.__name__
    return Replaceable


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", kind)  # nn.Module's own would take it for a parameter
