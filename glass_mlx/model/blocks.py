"""The feed-forward blocks of a model, and which weights a call computes them with.

A block's projections stay where they are in the model. Other weights, or hooks, are given to one call (``run_with``):
they live in a context variable, which belongs to that call and its thread. So no call sees another's weights, and
after an exception, wherever it came, the model is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..core.importance import energy
from ..core.slicing import UNIT, fast_inputs, input_size, plain_class, slice_columns, slice_rows, unit_group

# How a fused projection orders the 2F rows of its two halves. "" means that it is not fused.
HALVES, INTERLEAVED = "halves", "interleaved"

# In blocks with fewer, the step would be too coarse a choice of density.
FAST_STEPS = 16

Projection = Callable[[mx.array], mx.array]
# What a call uses in place of projections, by the projection's id.
Replacements = Mapping[int, Projection]
_replacements: ContextVar[Replacements] = ContextVar("_replacements", default=MappingProxyType({}))
# What a call carries from one of its projections to another.
_carried: ContextVar[dict[int, mx.array]] = ContextVar("_carried")


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

    @property
    def step(self) -> int:
        """How many of its neurons are kept is a multiple of this: single neurons, units of a quantisation group, or as
        many as Metal's fastest matrix-vector product takes, in blocks with at least ``FAST_STEPS`` times as many."""
        if self.group == 1:
            return 1
        fast = fast_inputs(self.module[self.output].bits)
        return fast if self.size >= FAST_STEPS * fast else UNIT

    @property
    def dtype(self) -> mx.Dtype:
        """What the block computes in, as far as its weights say; bfloat16 where they do not."""
        output = self.module[self.output]
        dtype = output.scales.dtype if isinstance(output, nn.QuantizedLinear) else output.weight.dtype
        return dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16

    @property
    def input_size(self) -> int:
        """H, the inputs of the block."""
        return input_size(self.module[self.inputs[0]])

    @property
    def output_size(self) -> int:
        """How many outputs the block has."""
        return self.module[self.output].weight.shape[0]

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

    def compact_bytes(self, k: int) -> int:
        """Size of its compact weights for k neurons. Nothing is evaluated."""
        compact = self.compact(mx.arange(k, dtype=mx.int32)).values()
        return sum(v.nbytes for module in compact for v in module.values() if isinstance(v, mx.array))

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
    """What a conversation decodes with.

    Attributes:
        projections: for each block its compact projections by name.
        replacements: these, or what computes with them, as ``run_with`` takes it.
        nbytes: their size, without what a ``ScatterLinear`` only refers to.
        answers: for each block what answers for its dropped neurons (``dropped.Answer``), or None.
    """

    projections: list[dict[str, nn.Module]]
    replacements: dict[int, Projection]
    nbytes: int
    answers: list[Any] = field(default_factory=list)


class Hook:
    """A projection that shows its input to ``observe`` first.

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


def watching_inputs(blocks: list[Block], observe: Callable[[int, mx.array], None]) -> dict[int, Projection]:
    """Replacements that show the input of block i, what gate and up read, to ``observe(i, x)``."""
    first = [block.module[block.inputs[0]] for block in blocks]
    return {id(projection): Hook(projection, partial(observe, i)) for i, projection in enumerate(first)}


def run_with(replacements: Replacements, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``call(*args, **kwargs)``, in which projections are replaced; nothing outside of this call sees it."""

    def replaced() -> Any:
        _replacements.set(replacements)
        _carried.set({})
        return call(*args, **kwargs)

    return copy_context().run(replaced)


def carried() -> dict[int, mx.array]:
    """What the running call carries from one projection to another; each finds its own by an id."""
    return _carried.get()


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
        norms (list): for each block its output-weight norms [F] for impact, or None for activation.
        counted (mx.array): a weight for each token [B, L] in the sums of inputs and hidden vectors, float32.
        call: the dense model.

    Returns:
        tuple: what ``call`` returns, and the evidence (``EvidenceLayout``), neither evaluated.
    """
    counted = counted.reshape(-1)
    energies = [mx.zeros((block.size,)) for block in blocks]
    hidden = [mx.zeros((block.size,)) for block in blocks]
    inputs = [mx.zeros((block.input_size,)) for block in blocks]
    tokens = [mx.zeros((1,)) for _ in blocks]

    def weights(x: mx.array) -> mx.array:
        """Some families show a block other vectors than one for each token."""
        rows = x.size // x.shape[-1]
        return counted if rows == counted.size else mx.ones((rows,))

    def observe_input(i: int, x: mx.array) -> None:
        counts = weights(x)
        inputs[i] = inputs[i] + counts @ x.reshape(-1, x.shape[-1]).astype(mx.float32)
        tokens[i] = tokens[i] + mx.sum(counts)

    def observe(i: int, h: mx.array) -> mx.array:
        energies[i] = energies[i] + energy(h, norms[i])
        hidden[i] = hidden[i] + weights(h) @ h.reshape(-1, h.shape[-1]).astype(mx.float32)
        # Recorded before it is projected: else every layer's hidden vectors wait for the end of the prefill.
        return mx.depends(h, [energies[i], hidden[i], inputs[i]])

    result = run_with(watching_inputs(blocks, observe_input) | hooked(blocks, observe), call, *args, **kwargs)
    return result, mx.concatenate([*energies, *hidden, *inputs, *tokens])


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
