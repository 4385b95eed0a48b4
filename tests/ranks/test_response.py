"""Tests of how a model's blocks respond to their inputs: measured in batches, it is what a plain regression gives."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from glass_mlx import GlassModel
from glass_mlx.core.compensation import RIDGE, UNRELATED
from glass_mlx.core.ranking import rank
from glass_mlx.evaluation.tiny_models import tiny_model
from glass_mlx.model.blocks import by_token, hooked, run_with, watching_inputs
from glass_mlx.ranks import response
from glass_mlx.ranks.response import measure_responses

RANK = 4
RNG = np.random.default_rng(2)
ROWS = [[1, *RNG.integers(2, 100, length).tolist()] for length in (40, 17, 60, 33, 60, 60, 5)]


def made_up(model: GlassModel) -> list[mx.array]:
    return [rank(mx.array(RNG.random(block.size))) for block in model.blocks]


def vectors(model: GlassModel) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each block the inputs and hidden vectors of all tokens but the first of each row, in float64."""
    found = [([], []) for _ in model.blocks]

    def keep(side: int, i: int, v: mx.array) -> None:
        found[i][side].append(np.array(v[0, 1:].astype(mx.float32), np.float64))

    hooks = watching_inputs(model.blocks, lambda i, x: keep(0, i, x)) | hooked(model.blocks, lambda i, h: keep(1, i, h))
    for row in ROWS:
        run_with(hooks, model.dense, mx.array([row]))
    return [(np.concatenate(x), np.concatenate(h)) for x, h in found]


@pytest.mark.few(2)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])  # plain, fused, and without a gate
def test_it_is_a_regression_of_low_rank(family, monkeypatch):
    """In batches of rows of several lengths, one block after the other."""
    monkeypatch.setattr(response, "_MAX_HIDDEN", 2**14)
    monkeypatch.setattr(response, "_MAX_COVARIANCES", 1)
    model = GlassModel(tiny_model(family))
    ranks, steps = made_up(model), []
    found = measure_responses(model, ROWS, ranks, RANK, lambda *done: steps.append(done))
    tokens = (len(model.blocks) + 1) * sum(map(len, ROWS))  # a pass for each block, and one more
    assert steps == sorted(steps) and len(steps) > len(model.blocks) + 1 and steps[-1] == (tokens, tokens)
    for block, order, own, (x, h) in zip(model.blocks, ranks, found, vectors(model)):
        assert own.rank == RANK and own.directions.dtype == own.coefficients.dtype == mx.float16
        np.testing.assert_allclose(own.input_mean, x.mean(axis=0), atol=1e-4)
        np.testing.assert_allclose(own.hidden_mean, h.mean(axis=0), atol=1e-4)
        weight = np.array(block.module[block.output].weight.astype(mx.float32), np.float64)
        weight = weight * (np.array(order) > block.size // 2)  # of the neurons that the ranks drop
        x, h = x - x.mean(axis=0), h - h.mean(axis=0)
        inputs = x.T @ x / len(x)
        solved = np.linalg.solve(inputs + RIDGE * np.trace(inputs) / len(inputs) * np.eye(len(inputs)), x.T @ h)
        y = solved @ weight.T  # [inputs, outputs], times the tokens
        _, vectors_ = np.linalg.eigh(weight @ h.T @ x @ y)
        z = x @ y @ vectors_[:, ::-1][:, :RANK]
        z /= z.std(axis=0)
        expected = z @ np.linalg.solve(z.T @ z + UNRELATED * np.eye(RANK), z.T @ h)
        got = x @ np.array(own.directions, np.float64) @ np.array(own.coefficients, np.float64)
        np.testing.assert_allclose(got, expected, atol=0.02 * np.abs(expected).max())
        energy = np.square(h + np.array(own.hidden_mean)).mean(axis=0)
        np.testing.assert_allclose(own.unpredictable, np.square(h - expected).mean(axis=0) / energy, atol=2e-3)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])  # without biases, and with
def test_experts_share_directions_and_have_regressions_of_their_own(family):
    model, seen = GlassModel(tiny_model(family)), [[], []]
    block, own = model.blocks[0], measure_responses(model, ROWS, made_up(model), 4 * RANK + 3)[0]

    def show(_: int, h: mx.array, experts: mx.array) -> None:
        seen[1].append([np.array(v).reshape(*experts.shape[1:], -1)[1:] for v in (h, experts)])

    for row in ROWS:
        hooks = by_token([block], show, lambda _, x: seen[0].append(np.array(x, np.float64)[0, 1:]))
        run_with(hooks, model.dense, mx.array([row]))
    x, h, experts = (np.concatenate(v) for v in (seen[0], *zip(*seen[1])))
    z = (x - np.array(own.input_mean)) @ np.array(own.directions, np.float64)
    assert own.directions.shape == (block.input_size, RANK) and own.coefficients.shape == (RANK, block.size)
    np.testing.assert_allclose(own.input_mean, np.repeat(x, block.active, 0).mean(axis=0), atol=1e-4)
    for expert in range(block.experts):
        sent = (experts[..., 0] == expert).sum(axis=1) > 0
        mine, neurons = h[experts[..., 0] == expert].astype(np.float64), slice(expert * block.width, None)
        centred = z[sent] - z[sent].mean(axis=0)
        squares = centred.T @ centred + UNRELATED * np.eye(RANK)
        c = np.linalg.solve(squares, centred.T @ (mine - mine.mean(axis=0)))
        atol = 0.02 * np.abs(c).max()
        np.testing.assert_allclose(np.array(own.coefficients)[:, neurons][:, : block.width], c, atol=atol)
        a = mine.mean(axis=0) - z[sent].mean(axis=0) @ c
        np.testing.assert_allclose(np.array(own.hidden_mean)[neurons][: block.width], a, atol=atol)
        left = np.square(mine - a - z[sent] @ c).mean(axis=0) / np.square(mine).mean(axis=0)
        np.testing.assert_allclose(np.array(own.unpredictable)[neurons][: block.width], left, atol=0.02)


def test_an_expert_that_no_token_is_sent_to():
    """It is expected to add nothing, and everything is finite."""
    model = GlassModel(tiny_model("mixtral"))
    own = measure_responses(model, [[1, 5]], made_up(model), RANK)[0]
    by_expert = np.array(own.coefficients).reshape(RANK, 4, -1)
    assert all(np.isfinite(np.array(v)).all() for v in (own.input_mean, own.directions, own.hidden_mean, by_expert))
    unused = ~np.array(own.hidden_mean).reshape(4, -1).any(axis=1)
    assert unused.sum() == 2 and not by_expert[:, unused].any()


def test_nothing_to_measure():
    model = GlassModel(tiny_model("llama"))
    assert measure_responses(model, [[1], []], made_up(model)) == []
    assert measure_responses(model, ROWS, made_up(model), rank=0) == []
