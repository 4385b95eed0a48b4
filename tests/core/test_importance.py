"""Tests of the evidence: energies and norms against plain NumPy in float64."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.switch_layers import SwitchLinear

from glass_mlx.core import importance
from glass_mlx.core.importance import dense_weight, energy, expert_energy, output_norms

props = settings(deadline=None, max_examples=examples(15, 40))
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


@st.composite
def hidden_vectors(draw, fewest=1):
    """Hidden vectors [T, F] of ordinary size: eps is for those that are all but zero."""
    shape = draw(st.integers(fewest, 6)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return (rng.normal(size=shape) * 10 ** rng.uniform(-2, 2, size=shape)).astype(np.float32)


def shares_by_hand(h: np.ndarray, norms: np.ndarray | None = None) -> np.ndarray:
    g = h.astype(np.float64) * (1 if norms is None else norms.astype(np.float64))
    length = np.maximum(np.linalg.norm(g, axis=-1, keepdims=True), 1e-6)
    return (g / length) ** 2


def random_norms(h: np.ndarray) -> np.ndarray:
    return np.random.default_rng(h.shape[-1]).uniform(0.1, 3, h.shape[-1]).astype(np.float32)


def to_mlx(*arrays: np.ndarray | None) -> list[mx.array | None]:
    return [None if a is None else mx.array(a) for a in arrays]


@pytest.mark.parametrize("impact", [False, True])
@props
@given(h=hidden_vectors())
def test_formula(impact, h):
    norms = random_norms(h) if impact else None
    expected = shares_by_hand(h, norms)
    np.testing.assert_allclose(energy(*to_mlx(h, norms)), expected.sum(0), rtol=1e-5, atol=1e-12)


@props
@given(h=hidden_vectors(fewest=2), data=st.data())
def test_energies_of_chunks_add_up(h, data):
    cut = data.draw(st.integers(1, len(h) - 1))
    norms = mx.array(random_norms(h))
    whole, first, rest = (energy(mx.array(part), norms) for part in (h, h[:cut], h[cut:]))
    np.testing.assert_allclose(first + rest, whole, rtol=1e-5, atol=1e-12)


@props
@given(h=hidden_vectors(), data=st.data())
def test_a_tokens_scale_does_not_count(h, data):
    scales = data.draw(st.lists(st.floats(1e-2, 1e2), min_size=len(h), max_size=len(h)))
    scaled = h * np.array(scales, np.float32)[:, None]
    np.testing.assert_allclose(energy(mx.array(scaled)), energy(mx.array(h)), rtol=1e-4, atol=1e-10)


@props
@given(h=hidden_vectors(), data=st.data())
def test_weights(h, data):
    """Weights count tokens; with 0 they are left out, and so is a token that is zero."""
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=len(h), max_size=len(h)))
    silent = data.draw(st.integers(0, len(h) - 1))
    h[silent] = 0
    expected = np.array(weights) @ shares_by_hand(h)
    got = energy(mx.array(h)[None], weights=mx.array(weights))  # as a batch of one, and flat
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-12)
    assert mx.array_equal(energy(mx.array(h[silent])), mx.zeros(h.shape[1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-4, 1.0, 6e4])
def test_half_precision(dtype, size):
    """Squares and sums of values near the limits of float16 neither overflow nor vanish."""
    h = (mx.random.uniform(0.5, 1, (2, 3, 64), key=mx.random.key(1)) * size).astype(dtype)
    whole = energy(h)
    assert whole.dtype == mx.float32 and whole.shape == (64,)
    expected = shares_by_hand(np.array(h.astype(mx.float32))).reshape(6, 64).sum(0)
    np.testing.assert_allclose(whole, expected, rtol=1e-5)
    np.testing.assert_allclose(energy(h, mx.full((64,), 1e3)).sum(), 6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_norms(dtype):
    linear = nn.Linear(32, 8)
    linear.weight = (linear.weight * 1e3).astype(dtype)  # squares of these overflow float16
    norms = output_norms(linear)
    expected = np.linalg.norm(np.array(linear.weight.astype(mx.float32), np.float64), axis=0)
    assert norms.dtype == mx.float32
    np.testing.assert_allclose(norms, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"), [("affine", 3, 64), ("affine", 4, 32), ("mxfp4", 4, 32), ("nvfp4", 4, 16)]
)
def test_output_norms_of_quantised(mode, bits, group_size):
    linear = nn.Linear(128, 8, bias=False)
    quantised = nn.QuantizedLinear.from_linear(linear, group_size, bits, mode=mode)
    weight = quantised(mx.eye(128)).T  # by what the layer computes
    np.testing.assert_allclose(dense_weight(quantised).astype(mx.float32), weight, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(output_norms(quantised), np.linalg.norm(weight, axis=0), rtol=1e-3)
    assert not np.allclose(output_norms(quantised), output_norms(linear), rtol=1e-3)


@pytest.mark.parametrize("impact", [False, True])
@props
@given(h=hidden_vectors(), data=st.data())
def test_each_expert_has_the_energy_of_its_own_vectors(impact, h, data):
    count = 3
    experts = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=len(h), max_size=len(h))))
    weights = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(h), max_size=len(h))))
    norms = np.stack([random_norms(h) * (e + 1) for e in range(count)]) if impact else None
    found = expert_energy(mx.array(h), mx.array(experts), count, *to_mlx(norms), mx.array(weights, mx.float32))
    for e in range(count):
        own = experts == e
        expected = energy(
            mx.array(h[own]), *to_mlx(norms if norms is None else norms[e]), mx.array(weights[own], mx.float32)
        )
        np.testing.assert_allclose(found[e], expected if own.any() else np.zeros(h.shape[1]), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("quantise", [False, True])
def test_output_norms_of_experts(quantise, monkeypatch):
    monkeypatch.setattr(importance, "_AT_ONCE", 2 * 16 * 64)  # two experts at once, of five
    layer = SwitchLinear(64, 16, 5)
    layer = layer.to_quantized(group_size=64, bits=4) if quantise else layer
    expected = np.linalg.norm(np.array(dense_weight(layer), np.float64), axis=1)
    np.testing.assert_allclose(output_norms(layer), expected, rtol=1e-5)
