"""Compact copies of linear layers that hold only the kept neurons.

A copy keeps its original's class (or, for a quantised output projection, becomes a plain ``nn.Linear``) and
everything else about it, so the family's own forward code runs on it unchanged.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .importance import dense_weight

# Sub-classes may compute something else with their weights: only these exact classes are sliced.
SLICEABLE = (nn.Linear, nn.QuantizedLinear)

_PER_ROW = ("weight", "scales", "biases", "bias")


def slice_rows(linear: nn.Module, rows: mx.array) -> nn.Module:
    """An input projection (gate, up) for the given output rows only.

    Rows are whole groups of codes, scales and offsets, so this is exact for every quantisation.

    Args:
        linear (nn.Module): ``nn.Linear`` or ``nn.QuantizedLinear`` with weight [F, D].
        rows (mx.array): [k] integer indices into the rows.

    Returns:
        nn.Module: the same kind of layer with weight [k, D]; a bias is sliced along.
    """
    return _copy(linear, {name: linear[name][rows] for name in _PER_ROW if linear.get(name) is not None})


def slice_columns(linear: nn.Module, columns: mx.array, dtype: mx.Dtype | None = None) -> nn.Module:
    """An output projection (down) for the given input columns only; its bias is kept whole.

    A quantised projection is dequantised first, since columns cut through its groups.

    Args:
        linear (nn.Module): ``nn.Linear`` or ``nn.QuantizedLinear`` with weight [D, F].
        columns (mx.array): [k] integer indices into the columns.
        dtype (mx.Dtype, optional): of the model's activations. Default: as the weights are dequantised.

    Returns:
        nn.Module: an ``nn.Linear`` with weight [D, k].
    """
    compact = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(compact)
    weight = mx.take(dense_weight(linear), columns, axis=1)
    quantised = isinstance(linear, nn.QuantizedLinear)
    compact.weight = weight.astype(dtype) if quantised and dtype is not None else weight
    if linear.get("bias") is not None:
        compact.bias = linear.bias
    return compact


def _copy(module: nn.Module, changed: dict) -> nn.Module:
    copy = type(module).__new__(type(module))
    copy.__dict__.update(module.__dict__)
    dict.update(copy, {**module, **changed})
    return copy
