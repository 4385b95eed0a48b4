"""Tests of which neurons are chosen where it is known what follows from a block's input."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from glass_mlx.model.config import GlassConfig
from glass_mlx.model.selection import BlockShape, Measured, NeuronSelector

SIZES = (12, 8)
RNG = np.random.default_rng(3)
ENERGIES = [RNG.random(size).astype(np.float32) for size in SIZES]
SHARES = [RNG.random(size).astype(np.float32) for size in SIZES]


def selector(shares: list[np.ndarray | None] | None) -> NeuronSelector:
    domains = {"impact": [mx.array((e / e.sum())[None]) for e in ENERGIES]}
    ranks = {"impact": [mx.array(np.argsort(np.argsort(-e)) + 1) for e in ENERGIES]}
    known = shares and [None if share is None else mx.array(share) for share in shares]
    return NeuronSelector([BlockShape(size) for size in SIZES], Measured(ranks, domains, None, known))


def chosen(by: NeuronSelector, **choice) -> list[list[int]]:
    config = GlassConfig(density=0.5, layer_budgets="uniform", **choice)
    return [kept.tolist() for kept in by.choose(config, None, 0)]


def best(scores: list[np.ndarray]) -> list[list[int]]:
    return [sorted(np.argsort(-s, kind="stable")[: len(s) // 2].tolist()) for s in scores]


def test_by_the_energy_that_cannot_be_predicted():
    lost = [e * share for e, share in zip(ENERGIES, SHARES)]
    assert best(lost) != best(ENERGIES)
    assert chosen(selector(SHARES)) == best(lost)
    assert chosen(selector(SHARES).of(selector(None).shapes)) == best(lost)  # the same model with other weights


@pytest.mark.parametrize(
    "shares, choice",
    [
        (SHARES, {"compensation": False}),  # dropped neurons add nothing, so all of it is lost
        (None, {}),
        ([None, None], {}),
        (SHARES, {"global_weight": 1}),  # the published form goes by ranks
    ],
)
def test_by_all_of_the_energy(shares, choice):
    assert chosen(selector(shares), **choice) == best(ENERGIES)


def test_blocks_without_shares():
    assert chosen(selector([None, SHARES[1]])) == best([ENERGIES[0], ENERGIES[1] * SHARES[1]])
