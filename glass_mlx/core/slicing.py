"""Compact copies of linear layers that hold only the kept neurons, exactly, in every quantisation.

A copy keeps its original's class and everything else about it, so the family's own forward code runs on it unchanged.

Input projections (gate, up) hold a neuron as a row: weight, scales and biases of a row are taken along. An output
projection (down) holds it as a column, and quantisation groups of 32, 64 or 128 columns share a scale and a bias, so
columns cannot be taken from it one by one. But any 32 columns of one group of 64 or 128, with that group's scale
and bias, are a valid group of 32. These units (*half-groups*) are what ``ranking.select`` keeps where ``unit`` says
so: the codes stay the same to the bit. Where a group is 32 or smaller there is no smaller one to make: the
projection stays whole, and the hidden values are scattered to their places for it (``ScatterLinear``).

The projections of routed experts (mlx-lm's ``SwitchLinear``) are the same with a leading axis of E experts: weight
[E, F, D]. As many neurons of every expert are kept, so indices are [E, k], and what is copied has that axis too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers import distributed

from .repacking import take_on_metal

# The layers of a model that several machines share, and those that compute one machine's own part. What goes from all
# inputs to some neurons has whole rows; what goes from them to all outputs has columns, and adds up what all machines
# computed.
SHARDED = {
    distributed.AllToShardedLinear: nn.Linear,
    distributed.ShardedToAllLinear: nn.Linear,
    distributed.QuantizedAllToShardedLinear: nn.QuantizedLinear,
    distributed.QuantizedShardedToAllLinear: nn.QuantizedLinear,
}
_ADDED_UP = (distributed.ShardedToAllLinear, distributed.QuantizedShardedToAllLinear)

# Sub-classes may compute something else with their weights: only these exact classes are sliced.
SLICEABLE = (nn.Linear, nn.QuantizedLinear, *SHARDED)

# The smallest quantisation group of MLX's affine mode, and so the smallest piece to cut others into.
UNIT = 32

_PER_ROW = ("weight", "scales", "biases", "bias")


def unit_group(output: nn.Module) -> int:
    """In how large groups an output projection lets its neurons be kept: 1 if each can be chosen for itself, 64 or 128
    if units of ``UNIT`` neurons of one such group can."""
    if is_quantised(output) and output.mode == "affine" and output.group_size > UNIT:
        return output.group_size
    return 1


def is_quantised(linear: nn.Module) -> bool:
    """Whether a linear layer's weight is packed."""
    return "scales" in linear


def fast_inputs(bits: int) -> int:
    """Of how many inputs a quantised layer must have a multiple for Metal's fastest matrix-vector product, ``qmv_fast``
    (mlx/backend/metal/quantized.cpp)."""
    return 256 if bits in (6, 8) else 512


def input_size(linear: nn.Module) -> int:
    """How many inputs a linear layer has."""
    width = linear.weight.shape[-1]
    return width * 32 // linear.bits if is_quantised(linear) else width


def slice_experts(linear: nn.Module, experts: slice) -> nn.Module:
    """A projection of routed experts for some of them only."""
    return _copy(linear, {name: array[experts] for name, array in linear.items() if isinstance(array, mx.array)})


def slice_rows(linear: nn.Module, rows: mx.array) -> nn.Module:
    """An input projection (gate, up) for the given output rows only.

    Args:
        linear (nn.Module): ``nn.Linear`` or ``nn.QuantizedLinear`` with weight [F, D], or routed experts [E, F, D].
        rows (mx.array): [k] integer indices into the rows, [E, k] into those of each expert.

    Returns:
        nn.Module: the same kind of layer with weight [k, D] or [E, k, D]; a bias is sliced along.
    """
    index = rows if rows.ndim == 1 else (mx.arange(len(rows))[:, None], rows)
    return _copy(linear, {name: linear[name][index] for name in _PER_ROW if linear.get(name) is not None})


def slice_columns(linear: nn.Module, columns: mx.array) -> nn.Module:
    """An output projection (down) for the given input columns only; its bias is kept whole.

    Args:
        linear (nn.Module): ``nn.Linear`` or ``nn.QuantizedLinear`` with weight [D, F], or routed experts [E, D, F].
        columns (mx.array): [k] integer indices into the columns, [E, k] into those of each expert. Where
            ``unit_group`` is not 1, each stretch of ``UNIT`` of them must lie in one quantisation group, which is so
            for ascending indices of whole units.

    Returns:
        nn.Module: takes [..., k]: the same kind of layer with weight [D, k] or [E, D, k], or a ``ScatterLinear``.
    """
    if not is_quantised(linear):
        return _copy(linear, {"weight": _take_columns(linear.weight, columns)})
    if unit_group(linear) == 1:
        return ScatterLinear(linear, columns)
    groups = columns[..., ::UNIT] // linear.group_size
    compact = _copy(
        linear,
        {
            "weight": _packed(linear.weight, columns, linear.bits),
            "scales": _take_columns(linear.scales, groups),
            "biases": _take_columns(linear.biases, groups),
        },
    )
    compact.group_size = UNIT
    return compact


class ScatterLinear(nn.Module):
    """A whole output projection that takes the hidden values of the kept neurons: zeros fill the other places.

    It costs no memory but the indices; the projection's bytes are read in full.
    """

    def __init__(self, projection: nn.Module, columns: mx.array):
        """
        Args:
            projection (nn.Module): with F inputs.
            columns (mx.array): [k] or [E, k] integer indices of the inputs that are given.
        """
        super().__init__()
        shape = (*columns.shape[:-1], input_size(projection))
        order = mx.broadcast_to(mx.arange(columns.shape[-1], dtype=mx.int32), columns.shape)
        self.projection = _copy(projection, {})
        # of each input its place among those given, any for the others
        self.place = mx.put_along_axis(mx.zeros(shape, mx.int32), columns, order, axis=-1)
        self.given = mx.put_along_axis(mx.zeros(shape, mx.bool_), columns, mx.array(True), axis=-1)

    def __call__(self, h: mx.array, *routing: mx.array, **kwargs: Any) -> mx.array:
        return self.projection(self.scatter(h, *routing), *routing, **kwargs)

    def scatter(self, h: mx.array, experts: mx.array | None = None) -> mx.array:
        """Hidden values [..., k] of the kept neurons in their places among all, [..., F], the others zero.

        Args:
            h (mx.array): the values; of routed experts [..., 1, k].
            experts (mx.array, optional): the expert [...] that each row belongs to.
        """
        if experts is None:
            return mx.where(self.given, mx.take(h, self.place, axis=-1), mx.array(0, h.dtype))
        place, given = self.place[experts][..., None, :], self.given[experts][..., None, :]
        return mx.where(given, mx.take_along_axis(h, place, axis=-1), mx.array(0, h.dtype))


def _packed(weight: mx.array, columns: mx.array, bits: int) -> mx.array:
    """``take_codes``, in one pass where there is a kernel for it."""
    packed = take_on_metal(weight, columns, bits, take_codes)
    return take_codes(weight, columns, bits) if packed is None else packed


def take_codes(weight: mx.array, columns: mx.array, bits: int) -> mx.array:
    """Columns of a packed weight, their codes unchanged.

    MLX packs a row's codes as one little-endian string of bits, ``bits`` of them for each column. They are gathered as
    octets, not as words, which moves a quarter of the bytes.

    Args:
        weight (mx.array): [..., D, F * bits / 32] uint32.
        columns (mx.array): [..., k] integer indices, k a multiple of 32.
        bits (int): of a code: 2, 3, 4, 5, 6 or 8.

    Returns:
        mx.array: [..., D, k * bits / 32] uint32.
    """
    octets = weight.view(mx.uint8)
    bit = columns.astype(mx.int32) * bits
    octet, shift = bit // 8, (bit % 8).astype(mx.uint8)
    cycle = 8 // math.gcd(8, bits)  # as many codes as fill whole octets
    places = [octet[..., i::cycle] for i in range(cycle)]  # of the i-th code of every cycle
    found = [_take_columns(octets, place) for place in places]
    rest = []
    if 8 % bits:  # a code may go on in the next octet; the last of a row has no next one, and does not
        rest = [_take_columns(octets, mx.minimum(place + 1, octets.shape[-1] - 1)) for place in places]
    packed = mx.stack(_pack(found, rest, [shift[..., None, i::cycle] for i in range(cycle)], bits), axis=-1)
    return packed.reshape(*weight.shape[:-1], -1).view(mx.uint32)  # [..., D, cycles, octets in a cycle]


def _take_columns(array: mx.array, columns: mx.array) -> mx.array:
    """``mx.take`` along the last axis of [..., D, F], which MLX's CPU backend does six times slower than this; each
    matrix has indices [..., k] of its own."""
    shape = (*array.shape[:-1], columns.shape[-1])
    return mx.take_along_axis(array, mx.broadcast_to(columns[..., None, :], shape), axis=-1)


@mx.compile
def _pack(found: list[mx.array], rest: list[mx.array], shifts: list[mx.array], bits: int) -> list[mx.array]:
    """The octets that each cycle of codes fills. A code begins ``shift`` bits into its octet and may end in the next,
    which is in ``rest`` then."""
    codes = [octet >> shift for octet, shift in zip(found, shifts)]
    if rest:  # in two steps: a shift by 8 is undefined
        codes = [code | ((octet << 1) << (7 - shift)) for code, octet, shift in zip(codes, rest, shifts)]
    packed = []
    for j in range(len(codes) * bits // 8):
        octet = None
        for i, code in enumerate(codes):
            up = i * bits - 8 * j  # how far the code's first bit lies above the octet's
            if -bits < up < 8:
                code = code & (2**bits - 1)
                part = code << up if up >= 0 else code >> -up
                octet = part if octet is None else octet | part
        packed.append(octet)
    return packed


def in_float32(linear: nn.Module, everything: bool = False) -> nn.Module:
    """A copy of a layer; a quantised one computes in float32, for float32 inputs, and others with ``everything``. Of a
    layer that machines share it computes this one's part (``own_part``)."""
    own = own_part(linear)
    if not (is_quantised(linear) or everything):
        return own
    floats = {k: v for k, v in linear.items() if isinstance(v, mx.array) and mx.issubdtype(v.dtype, mx.floating)}
    return _copy(own, {name: array.astype(mx.float32) for name, array in floats.items()})


def own_part(linear: nn.Module) -> nn.Module:
    """A copy of a layer, which computes this machine's part of it and asks no other: a plain layer, with the bias."""
    if isinstance(linear, ScatterLinear):
        return _copy(linear, {"projection": own_part(linear.projection)})
    return _copy(linear, {}, SHARDED.get(plain_class(linear)))


def adding(linear: nn.Module, more: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """An output projection that adds something of this machine's own to what it computes: ``more`` is called with that
    and, of routed experts, with what else the projection is, and returns both. Where machines share the layer, their
    sums are added up after it, and then the bias, once."""
    shared = linear.projection if isinstance(linear, ScatterLinear) else linear
    if not isinstance(shared, _ADDED_UP):
        return lambda h, *routing, **kwargs: more(linear(h, *routing, **kwargs), *routing, **kwargs)
    own, bias = own_part(linear), shared.get("bias")
    dict.pop(own.projection if isinstance(own, ScatterLinear) else own, "bias", None)

    def project(h: mx.array) -> mx.array:
        y = mx.distributed.all_sum(more(own(h)), group=shared.group)
        return y if bias is None else y + bias

    return project


def plain_class(module: nn.Module) -> type[nn.Module]:
    """MLX's own class of a linear layer, also where a block has made the layer replaceable."""
    return getattr(type(module), "plain", type(module))


def _copy(module: nn.Module, changed: dict, kind: type[nn.Module] | None = None) -> nn.Module:
    """A copy with some of its items changed, of its own class or another one."""
    kind = kind or plain_class(module)
    copy = kind.__new__(kind)
    copy.__dict__.update(module.__dict__)
    dict.update(copy, {**module, **changed})
    return copy
