"""Tests of compact layers: exact in every quantisation."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from glass_mlx.importance import dense_weight
from glass_mlx.slicing import slice_columns, slice_rows

INPUTS, OUTPUTS = 256, 128
AFFINE = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
FORMATS = [None, *AFFINE, ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
layers = [
    pytest.param(quantisation, bias, id="-".join(map(str, quantisation or ["float"])) + "-bias" * bias)
    for quantisation in FORMATS
    for bias in (False, True)
]


def make(quantisation: tuple | None, bias: bool) -> tuple[nn.Module, mx.array]:
    """A layer and an input for it."""
    mx.random.seed(3)
    layer = nn.Linear(INPUTS, OUTPUTS, bias)
    if quantisation:
        mode, bits, group_size = quantisation
        layer = nn.QuantizedLinear.from_linear(layer, group_size, bits, mode=mode)
    return layer, mx.random.normal((2, 3, INPUTS))


def some(n: int) -> mx.array:
    """Every third of n indices and the last, which cut through all groups."""
    return mx.array([*range(0, n - 1, 3), n - 1], dtype=mx.int32)


def snapshot(layer: nn.Module) -> dict[str, int]:
    return {name: id(array) for name, array in tree_flatten(layer.parameters())}


@pytest.mark.parametrize(("quantisation", "bias"), layers)
def test_rows(quantisation, bias):
    layer, x = make(quantisation, bias)
    rows, before = some(OUTPUTS), snapshot(layer)
    sliced = slice_rows(layer, rows)
    assert type(sliced) is type(layer)
    for name, whole in layer.items():
        assert mx.array_equal(sliced[name], whole[rows])
    assert sliced.weight.dtype == (mx.uint32 if quantisation else mx.float32)  # still packed
    np.testing.assert_allclose(sliced(x), layer(x)[..., rows], rtol=1e-5, atol=1e-5)
    assert snapshot(layer) == before and layer(x).shape[-1] == OUTPUTS


@pytest.mark.parametrize(("quantisation", "bias"), layers)
def test_columns(quantisation, bias):
    layer, x = make(quantisation, bias)
    columns, before = some(INPUTS), snapshot(layer)
    sliced = slice_columns(layer, columns)
    assert type(sliced) is nn.Linear
    assert mx.array_equal(sliced.weight, dense_weight(layer)[:, columns])
    assert ("bias" in sliced) == bias and (not bias or mx.array_equal(sliced.bias, layer.bias))
    mask = mx.zeros((INPUTS,)).at[columns].add(1)
    np.testing.assert_allclose(sliced(x[..., columns]), layer(x * mask), rtol=1e-4, atol=1e-4)
    assert snapshot(layer) == before and layer(x).shape[-1] == OUTPUTS


def test_order_is_the_indices():
    layer, x = make(("affine", 4, 64), True)
    backwards = mx.arange(OUTPUTS - 1, -1, -1)
    assert mx.array_equal(slice_rows(layer, backwards).weight, layer.weight[::-1])
    columns = mx.arange(INPUTS - 1, -1, -1)
    np.testing.assert_allclose(slice_columns(layer, columns)(x[..., ::-1]), layer(x), rtol=1e-4, atol=1e-4)


def test_a_copy_keeps_what_else_the_layer_has():
    layer, x = make(("affine", 4, 64), False)
    layer.freeze()
    sliced = slice_rows(layer, some(OUTPUTS))
    assert (sliced.group_size, sliced.bits, sliced.mode) == (64, 4, "affine")
    assert not sliced.trainable_parameters()


@pytest.mark.parametrize(
    ("quantisation", "dtype"),
    [
        (q, dtype)
        for q in (None, ("affine", 4, 64), ("mxfp4", 4, 32))
        for dtype in (mx.float16, mx.bfloat16, mx.float32)
    ],
)
def test_the_models_dtype_is_kept(quantisation, dtype):
    """A residual stream must not change its dtype because a layer was sliced."""
    mx.random.seed(4)
    layer = nn.Linear(INPUTS, OUTPUTS, bias=False)
    layer.set_dtype(dtype)
    if quantisation:
        mode, bits, group_size = quantisation
        layer = nn.QuantizedLinear.from_linear(layer, group_size, bits, mode=mode)
    x, columns = mx.random.normal((1, INPUTS)).astype(dtype), some(INPUTS)
    assert slice_columns(layer, columns, dtype)(x[:, columns]).dtype == layer(x).dtype == dtype
    assert slice_rows(layer, some(OUTPUTS))(x).dtype == dtype
