"""Tests of compact layers: exact in every quantisation."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.nn.layers.distributed import shard_linear
from mlx.utils import tree_flatten

from glass_mlx.core.importance import dense_weight
from glass_mlx.core.ranking import kept_count, select
from glass_mlx.core.slicing import (
    SLICEABLE,
    UNIT,
    ScatterLinear,
    adding,
    in_float32,
    own_part,
    slice_columns,
    slice_rows,
    take_codes,
    unit_group,
)

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


@pytest.mark.few(22)
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


def chosen(layer: nn.Module, density: float = 0.5, seed: int = 5) -> mx.array:
    """Columns as ``select`` keeps them for random scores."""
    scores, group = mx.random.permutation(INPUTS, key=mx.random.key(seed)), unit_group(layer)
    return select(scores, kept_count(density, INPUTS, group), group)


@pytest.mark.few(59)
@pytest.mark.parametrize("density", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("quantisation", "bias"), layers)
def test_columns(quantisation, bias, density):
    """The compact layer gives what the whole one gives with the other inputs zeroed, and its codes are the same."""
    layer, x = make(quantisation, bias)
    columns, before = chosen(layer, density), snapshot(layer)
    sliced = slice_columns(layer, columns)
    if isinstance(sliced, ScatterLinear):
        assert unit_group(layer) == 1 and quantisation[0] != "affine" or quantisation[2] == UNIT
        assert all(sliced.projection[name] is array for name, array in layer.items())  # not copied
    else:
        assert type(sliced) is type(layer)
        assert mx.array_equal(dense_weight(sliced), dense_weight(layer)[:, columns])
        assert "bias" not in sliced or mx.array_equal(sliced.bias, layer.bias)
    if quantisation and not isinstance(sliced, ScatterLinear):
        assert (sliced.bits, sliced.group_size) == (layer.bits, UNIT)
        assert sliced.weight.nbytes * INPUTS == layer.weight.nbytes * columns.size  # still packed
    mask = mx.zeros((INPUTS,)).at[columns].add(1)
    np.testing.assert_allclose(sliced(x[..., columns]), layer(x * mask), rtol=1e-4, atol=1e-4)
    assert snapshot(layer) == before and layer(x).shape[-1] == OUTPUTS


@given(bits=st.sampled_from([2, 3, 4, 5, 6, 8]), data=st.data())
@settings(max_examples=examples(20, 60), deadline=None)
def test_codes_against_a_plain_reading_of_the_bits(bits, data):
    rows, blocks = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    taken = data.draw(st.lists(st.integers(0, 32 * blocks - 1), min_size=32, max_size=32))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    codes = rng.integers(0, 2**bits, (rows, 32 * blocks))

    def packed(codes: np.ndarray) -> np.ndarray:
        strings = ((codes[..., None] >> np.arange(bits)) & 1).reshape(rows, -1).astype(np.uint8)
        return np.packbits(strings, axis=-1, bitorder="little").view(np.uint32)

    got = take_codes(mx.array(packed(codes)), mx.array(taken), bits)
    assert np.array_equal(np.array(got), packed(codes[:, taken]))


def test_spread_leaves_no_trace_of_what_is_not_finite():
    """The places of dropped neurons are filled with zeros, not with a kept neuron's value times zero."""
    layer, _ = make(("mxfp4", 4, 32), False)
    h = mx.full((1, 2), mx.inf)
    spread = ScatterLinear(layer, mx.array([3, 200]))
    spread.projection = lambda x: x
    assert mx.isinf(spread(h)).sum().item() == 2 and not mx.any(mx.isnan(spread(h)))


def test_order_is_the_indices():
    layer, x = make(("affine", 4, 64), True)
    backwards = mx.arange(OUTPUTS - 1, -1, -1)
    assert mx.array_equal(slice_rows(layer, backwards).weight, layer.weight[::-1])
    columns = mx.arange(INPUTS - 1, -1, -1)  # whole groups backwards, and each backwards in itself
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
    x, columns = mx.random.normal((1, INPUTS)).astype(dtype), chosen(layer)
    assert slice_columns(layer, columns)(x[:, columns]).dtype == layer(x).dtype == dtype
    assert slice_rows(layer, some(OUTPUTS))(x).dtype == dtype


@pytest.mark.parametrize("group_size", [None, 32, 64], ids=["plain", "scattered", "in units"])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_that_machines_share(group_size, bias):
    """They are sliced as the plain ones are; what a machine adds comes before their sums, and the bias after, once."""
    plain_in, plain_out = nn.Linear(64, 128, bias), nn.Linear(128, 64, bias)
    if group_size:
        plain_in, plain_out = (nn.QuantizedLinear.from_linear(p, group_size, 4) for p in (plain_in, plain_out))
    shared_in, shared_out = shard_linear(plain_in, "all-to-sharded"), shard_linear(plain_out, "sharded-to-all")
    assert type(shared_in) in SLICEABLE and type(shared_out) in SLICEABLE
    kept = mx.concatenate([mx.arange(32, 64), mx.arange(64, 96)])
    x, h = mx.random.normal((3, 64)), mx.random.normal((3, 64))
    assert mx.allclose(slice_rows(shared_in, kept)(x), slice_rows(plain_in, kept)(x), atol=1e-5)
    compact, expected = slice_columns(shared_out, kept), slice_columns(plain_out, kept)(h)
    assert mx.allclose(compact(h), expected, atol=1e-5)
    before = []

    def more(y):
        before.append(y)
        return y + 1

    assert mx.allclose(adding(compact, more)(h), expected + 1, atol=1e-5)
    without = expected - plain_out.bias if bias else expected
    assert mx.allclose(before[0], without, atol=1e-5)
    own = own_part(shared_out)
    assert type(own) is type(plain_out) and type(shared_out) is not type(own)
    assert mx.allclose(in_float32(shared_out)(mx.ones((1, 128))), plain_out(mx.ones((1, 128))), atol=1e-4)
