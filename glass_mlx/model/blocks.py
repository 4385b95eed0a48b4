"""The feed-forward blocks of a model, and which weights a call computes them with.

A block is a dense FFN, or the routed experts of a layer: then its neurons are those of all experts, expert by expert,
and as many of each are kept. Its projections are mlx-lm's ``SwitchLinear``, which take the experts that hidden vectors
belong to as a second argument: hidden vectors [..., 1, F / E] of experts [...].

A block's projections stay where they are in the model. Other weights, or hooks, are given to one call (``run_with``):
they live in a context variable, which belongs to that call and its thread. So no call sees another's weights, and
after an exception, wherever it came, the model is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..core.importance import energy, expert_energy
from ..core.slicing import (
    UNIT,
    ScatterLinear,
    fast_inputs,
    input_size,
    is_quantised,
    plain_class,
    slice_columns,
    slice_rows,
    unit_group,
)

# How a fused projection orders the 2F rows of its two halves. "" means that it is not fused.
HALVES, INTERLEAVED = "halves", "interleaved"

# In blocks with fewer, the step would be too coarse a choice of density.
FAST_STEPS = 16

Projection = Callable[..., mx.array]
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
        size: F, the number of neurons (intermediate_size), those of all experts together.
        fused: row order of a fused projection: ``""``, ``"halves"`` or ``"interleaved"``.
        experts: E, how many routed experts it has; 0 if it is dense.
        active: how many of them a token is sent to; 1 if it is dense.
    """

    path: str
    module: nn.Module
    inputs: tuple[str, ...]
    output: str
    size: int
    fused: str = ""
    experts: int = 0
    active: int = 1

    def __post_init__(self):
        for module in self._replaced:
            _set_class(module, _replaceable(plain_class(module)))

    @property
    def names(self) -> tuple[str, ...]:
        """All projections by name, the output projection last."""
        return (*self.inputs, self.output)

    @property
    def _replaced(self) -> list[nn.Module]:
        """What a call may replace: the projections, and the module of routed experts."""
        return [self.module[name] for name in self.names] + ([self.module] if self.experts else [])

    @property
    def width(self) -> int:
        """How many neurons each of its experts has, or it itself if it is dense."""
        return self.size // (self.experts or 1)

    @property
    def group(self) -> int:
        """How many neurons share a quantisation group of the output projection (``slicing.unit_group``)."""
        return unit_group(self.module[self.output])

    @property
    def step(self) -> int:
        """How many of its neurons are kept is a multiple of this: single neurons, units of a quantisation group, or as
        many as Metal's fastest matrix-vector product takes, in blocks with at least ``FAST_STEPS`` times as many; of
        each expert."""
        step = 1
        if self.group > 1:
            fast = fast_inputs(self.module[self.output].bits)
            step = fast if self.width >= FAST_STEPS * fast else UNIT
        return step * (self.experts or 1)

    @property
    def dtype(self) -> mx.Dtype:
        """What the block computes in, as far as its weights say; bfloat16 where they do not."""
        output = self.module[self.output]
        dtype = output.scales.dtype if is_quantised(output) else output.weight.dtype
        return dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16

    @property
    def input_size(self) -> int:
        """H, the inputs of the block."""
        return input_size(self.module[self.inputs[0]])

    @property
    def output_size(self) -> int:
        """How many outputs the block has."""
        return self.module[self.output].weight.shape[-2]

    def by_expert(self, values: mx.array) -> mx.array:
        """A value for each neuron [..., F] by expert, [..., E, F / E]; of a dense block [..., 1, F]."""
        return values.reshape(*values.shape[:-1], self.experts or 1, self.width)

    def joined(self, neurons: mx.array) -> mx.array:
        """Neurons within each expert [..., E, k], of a dense block [..., 1, k], as neurons of the block [..., E * k]
        int32."""
        first = mx.arange(0, self.size, self.width, dtype=mx.int32)[:, None]
        return (neurons + first).reshape(*neurons.shape[:-2], -1)

    def beside(self, values: mx.array, *routing: mx.array) -> mx.array:
        """A value for each neuron [F], beside hidden vectors of the given experts: [F], or [..., 1, F / E]."""
        return self.by_expert(values)[routing[0]][..., None, :] if routing else values

    def energy(
        self, h: mx.array, norms: mx.array | None, *routing: mx.array, weights: mx.array | None = None
    ) -> mx.array:
        """The energies [F] of hidden vectors, as a hook sees them. A token adds 1 in all, shared by its experts.

        Args:
            h (mx.array): the hidden vectors.
            norms (mx.array, optional): ``output_norms`` of the output projection, for the signal impact.
            routing: the experts that the hidden vectors belong to, if these are routed.
            weights (mx.array, optional): a weight for each token; with routed experts only by :func:`by_token`.
        """
        if not routing:
            return energy(h, norms, weights)
        if weights is not None:
            weights = mx.repeat(weights.reshape(-1), routing[0].size // weights.size)
        return expert_energy(h, routing[0], self.experts, norms, weights).reshape(-1) / self.active

    def rows(self, kept: mx.array) -> mx.array:
        """Rows of the input projections that belong to the kept neurons [k], or [E, k] within each expert."""
        if self.fused == HALVES:
            return mx.concatenate([kept, kept + self.width], axis=-1)
        if self.fused == INTERLEAVED:
            return mx.stack([2 * kept, 2 * kept + 1], axis=-1).reshape(*kept.shape[:-1], -1)
        return kept

    def compact(self, kept: mx.array) -> dict[str, nn.Module]:
        """The block's projections with only the kept neurons [k] (int32, as ``joined`` has them), by name."""
        if self.experts:
            kept = kept.reshape(self.experts, -1) % self.width
        rows = self.rows(kept)
        sliced = {name: slice_rows(self.module[name], rows) for name in self.inputs}
        return {**sliced, self.output: slice_columns(self.module[self.output], kept)}

    def first(self, k: int) -> mx.array:
        """Any k neurons that can be kept, [k] int32."""
        experts = self.experts or 1
        return self.joined(mx.broadcast_to(mx.arange(k // experts, dtype=mx.int32), (experts, k // experts)))

    @property
    def nbytes(self) -> int:
        """Size of its own weights."""
        return self._bytes(self.names)

    def _bytes(self, names: Iterable[str]) -> int:
        return sum(array.nbytes for name in names for _, array in tree_flatten(self.module[name].parameters()))

    def compact_bytes(self, k: int) -> tuple[int, int]:
        """Sizes of its compact weights for k neurons, and of the own ones that these do without. Nothing is
        evaluated."""
        compact = self.compact(self.first(k))
        replaced = [name for name, projection in compact.items() if not isinstance(projection, ScatterLinear)]
        arrays = (v for projection in compact.values() for v in projection.values() if isinstance(v, mx.array))
        return sum(array.nbytes for array in arrays), self._bytes(replaced)

    def replacing(self, projections: Mapping[str, Projection]) -> dict[int, Projection]:
        """Replacements that put these projections, by name, in the place of the block's own."""
        return {id(self.module[name]): projection for name, projection in projections.items()}

    def let_go(self) -> None:
        """Make the projections what they were before: plain layers of mlx-lm."""
        for module in self._replaced:
            _set_class(module, plain_class(module))

    def kind(self) -> tuple:
        """What two blocks must share for one check to speak for both."""
        projections = [self.module[name] for name in self.names]
        return (
            plain_class(self.module),
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
    """A projection that shows its input to ``observe`` first, and what experts it belongs to if these are routed.

    What ``observe`` returns, if anything, is projected instead.
    """

    def __init__(self, projection: nn.Module, observe: Callable[..., mx.array | None]):
        self.projection, self.observe = projection, observe

    def __call__(self, h: mx.array, *routing: mx.array, **kwargs: Any) -> mx.array:
        seen = self.observe(h, *routing)
        seen = h if seen is None else seen
        return plain_class(self.projection).__call__(self.projection, seen, *routing, **kwargs)


def hooked(blocks: list[Block], observe: Callable[..., mx.array | None]) -> dict[int, Projection]:
    """Replacements that show the hidden vectors of block i to ``observe(i, h)``, or those of routed experts to
    ``observe(i, h, experts)``; see :class:`Hook`."""
    outputs = [block.module[block.output] for block in blocks]
    return {id(output): Hook(output, partial(observe, i)) for i, output in enumerate(outputs)}


def by_token(
    blocks: list[Block],
    observe: Callable[..., mx.array | None],
    observe_input: Callable[[int, mx.array], None] = lambda i, x: None,
) -> dict[int, Projection]:
    """As :func:`hooked`, but what routed experts compute comes in the order of the tokens [...], each with a of its
    experts: ``observe(i, h, experts)`` with hidden vectors [..., a, 1, F / E] and experts [..., a]. mlx-lm sorts them
    by expert where there are many, and the order that it sorts them in is found again. Before that, each block's
    inputs are shown to ``observe_input(i, x)``, one [..., H] for each token."""

    def remember(i: int, x: mx.array, experts: mx.array) -> mx.array:
        observe_input(i, x)
        module = blocks[i].module
        carried()[id(blocks[i])] = experts
        return plain_class(module).__call__(module, x, experts)

    def show(i: int, h: mx.array, *routing: mx.array) -> mx.array | None:
        if not routing:
            return observe(i, h)
        experts = carried().pop(id(blocks[i]))
        order = mx.arange(experts.size)
        if routing[0].ndim == 1:
            order = mx.argsort(experts.flatten())
        rows = h.reshape(experts.size, -1)[mx.argsort(order)]
        seen = observe(i, rows.reshape(*experts.shape, 1, -1), experts)
        return None if seen is None else seen.reshape(rows.shape)[order].reshape(h.shape)

    routed = {id(block.module): partial(remember, i) for i, block in enumerate(blocks) if block.experts}
    dense = watching_inputs(blocks, lambda i, x, *routing: None if routing else observe_input(i, x))
    return routed | dense | hooked(blocks, show)


def watching_inputs(blocks: list[Block], observe: Callable[..., None]) -> dict[int, Projection]:
    """Replacements that show the input of block i, what gate and up read, to ``observe(i, x)``, or that of routed
    experts to ``observe(i, x, experts)``."""
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


@cache
def _replaceable(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a module's class that calls what the running call has put in its place."""

    class Replaceable(kind):
        plain = kind

        def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            other = _replacements.get().get(id(self))
            return kind.__call__(self, x, *args, **kwargs) if other is None else other(x, *args, **kwargs)

    Replaceable.__name__ = Replaceable.__qualname__ = kind.__name__
    return Replaceable


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", kind)  # nn.Module's own would take it for a parameter
