"""Tests of the formulas that predict what dropped neurons would add, against plain NumPy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from glass_mlx.core import compensation
from glass_mlx.core.compensation import (
    SHRINKAGE,
    Response,
    Sums,
    find_coefficients,
    find_directions,
    mean_hidden,
    unpredictable_share,
)

H, F, R = 12, 20, 3
RNG = np.random.default_rng(1)


def random_response(rank: int = R) -> Response:
    return Response(*(mx.array(RNG.normal(size=s).astype(np.float32)) for s in ((H,), (F,), (H, rank), (rank, F))))


def parts(response: Response) -> list[np.ndarray]:
    """mu, a, P and C in float64."""
    own = (response.input_mean, response.hidden_mean, response.directions, response.coefficients)
    return [np.array(part, np.float64) for part in own]


def random_sums(tokens: int) -> Sums:
    return Sums(*(mx.array((tokens * RNG.normal(size=s)).astype(np.float32)) for s in ((F,), (H,))), mx.array(tokens))


def test_prediction():
    response, x = random_response(), RNG.normal(size=(2, 5, H))
    mu, a, p, c = parts(response)
    np.testing.assert_allclose(response.predict(mx.array(x.astype(np.float32))), a + (x - mu) @ p @ c, atol=1e-4)


def test_reader():
    response, x = random_response(), RNG.normal(size=(4, H)).astype(np.float32)
    directions, offset = response.reader(mx.float32)
    z = np.array(mx.addmm(offset, mx.array(x), directions))
    expected = (x - np.array(response.input_mean)) @ np.array(response.directions)
    np.testing.assert_allclose(z, np.concatenate([expected, np.ones((4, 1))], axis=1), atol=1e-4)
    assert response.reader(mx.float32)[0] is directions and response.reader(mx.float16)[0].dtype == mx.float16


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_mean_of_a_prompt(tokens):
    response, sums = random_response(), random_sums(tokens)
    mu, a, p, c = parts(response)
    h, x = np.array(sums.hidden, np.float64), np.array(sums.inputs, np.float64)
    residual = h - tokens * a - (x - tokens * mu) @ p @ c
    np.testing.assert_allclose(mean_hidden(response, sums), a + residual / (tokens + SHRINKAGE), atol=1e-3)
    np.testing.assert_allclose(mean_hidden(None, sums), h / (tokens + SHRINKAGE), atol=1e-5)
    assert mx.array_equal(mean_hidden(response, None), response.hidden_mean)


def made_up_data(n: int = 4000, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Inputs whose coordinates differ widely, and outputs that follow from three directions of them."""
    x = RNG.normal(size=(n, H)) * np.geomspace(0.1, 10, H) + 5
    weights = RNG.normal(size=(H, R)) / np.geomspace(0.1, 10, H)[:, None]
    return x, (x - 5) @ weights @ RNG.normal(size=(R, H)) + noise * RNG.normal(size=(n, H))


@pytest.mark.parametrize("exact", [True, False])
def test_directions_are_the_best_of_their_rank(exact, monkeypatch):
    """They leave no more than the noise; the first ones of a truncated SVD of x would not."""
    monkeypatch.setattr(compensation, "_EXACT", 1024 if exact else 0)
    x, y = made_up_data()
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    cxx, cxy = x.T @ x / len(x), x.T @ y / len(x)
    directions = find_directions(cxx, cxy, R, ridge=1e-9)
    z = x @ directions
    np.testing.assert_allclose(z.var(axis=0), 1, rtol=1e-6)
    np.testing.assert_allclose(z.T @ z / len(x), np.eye(R), atol=1e-6)
    left = y - z @ find_coefficients(z.T @ z / len(x), z.T @ y / len(x))
    assert left.var() < 1.1 * 0.1**2
    fewer = x @ find_directions(cxx, cxy, R - 1, ridge=1e-9)
    left = y - fewer @ np.linalg.lstsq(fewer, y, rcond=None)[0]
    best = np.linalg.svd(x @ np.linalg.lstsq(x, y, rcond=None)[0], compute_uv=False)[R - 1] ** 2 / y.size
    assert left.var() == pytest.approx(best + 0.1**2, rel=0.05)


def test_more_directions_than_inputs():
    x, y = made_up_data(200)
    cxx, cxy = np.cov(x.T), (x - x.mean(axis=0)).T @ (y - y.mean(axis=0)) / 199
    assert find_directions(cxx, cxy, 100).shape == (H, H)


def test_inputs_that_never_change():
    """Nothing can be said by them, and nothing overflows."""
    directions = find_directions(np.zeros((H, H)), np.zeros((H, H)), R)
    coefficients = find_coefficients(np.zeros((R, R)), np.zeros((R, F)))
    assert np.isfinite(directions).all() and not coefficients.any()


@pytest.mark.parametrize("shrunk", [1.0, 0.5])
def test_unpredictable_share(shrunk):
    """Of each neuron's energy what its prediction leaves, also where the regression is not the best one."""
    z = RNG.normal(size=(500, R))
    h = z @ RNG.normal(size=(R, F)) + RNG.normal(size=(500, F)) * np.linspace(0, 3, F) + 1
    h[:, -1] = 0
    centred, residual = z - z.mean(axis=0), h - h.mean(axis=0)
    squares, cross = centred.T @ centred / 500, centred.T @ residual / 500
    c = shrunk * find_coefficients(squares, cross)
    got = unpredictable_share((h**2).mean(axis=0), h.mean(axis=0), squares, cross, c)
    left = ((residual - centred @ c) ** 2).mean(axis=0)
    np.testing.assert_allclose(got[:-1], left[:-1] / (h[:, :-1] ** 2).mean(axis=0), atol=1e-9)
    assert got[-1] == 1  # it never fired
