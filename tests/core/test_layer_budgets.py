"""Tests of how the neurons of a density are shared out among the blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from glass_mlx.core.layer_budgets import FLOOR, POWER, measured_budgets, uniform_budgets
from glass_mlx.core.slicing import UNIT


def loss(energies, sensitivity, counts):
    """The cost of keeping the best ``counts`` neurons of each block, by its definition."""
    total = 0.0
    for energy, s, k in zip(energies, sensitivity, counts):
        ordered = np.sort(energy)[::-1]
        lost, half = ordered[k:].sum() / energy.sum(), ordered[len(energy) // 2 :].sum() / energy.sum()
        total += s * lost**POWER / half ** (POWER - 1)
    return total


@settings(deadline=None, max_examples=examples(20, 60))
@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_no_other_budgets_lose_less(seed, density):
    rng = np.random.default_rng(seed)
    energies = [rng.dirichlet(np.full(10, 0.4)) for _ in range(3)]
    sensitivity = rng.exponential(size=3).tolist()
    counts = measured_budgets(density, energies, sensitivity, [1, 1, 1])
    floors = uniform_budgets(FLOOR * density, [10] * 3, [1] * 3)
    assert sum(counts) == max(round(density * 30), sum(floors))
    best = min(
        loss(energies, sensitivity, other)
        for other in itertools.product(range(1, 11), repeat=3)
        if sum(other) == sum(counts) and all(k >= f for k, f in zip(other, floors))
    )
    assert loss(energies, sensitivity, counts) == pytest.approx(best)


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.77, 1])
def test_in_units(density):
    rng = np.random.default_rng(0)
    energies = [rng.random(size) for size in (256, 384, 128)]
    counts = measured_budgets(density, energies, [1.0, 5.0, 0.2], [UNIT, UNIT, 1])
    assert all(count % UNIT == 0 and 0 < count <= len(e) for count, e in zip(counts[:2], energies))
    total = round(density * 768)
    assert total - UNIT < sum(counts) <= max(total, 2 * UNIT + 1)


def test_uniform_where_nothing_is_known():
    energies = [np.ones(8) / 8] * 2
    assert measured_budgets(0.5, energies, [0.0, 0.0], [1, 1]) == uniform_budgets(0.5, [8, 8], [1, 1]) == [4, 4]
    assert measured_budgets(1, energies, [1.0, 9.0], [1, 1]) == [8, 8]


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.7, 0.95])
def test_large_steps_are_shared_out_in_turn(density):
    """All of them together keep what the density says, and each is off by less than a step."""
    sizes, steps = [14336] * 32 + [9728] * 7, [512] * 39
    counts = uniform_budgets(density, sizes, steps)
    assert all(count % 512 == 0 and abs(count - density * size) <= 512 for count, size in zip(counts, sizes))
    assert abs(sum(counts) - density * sum(sizes)) <= 512
    assert abs(sum(counts[:16]) - sum(counts[16:32])) <= 512


def test_measured_in_large_steps():
    energies = [np.random.default_rng(i).dirichlet(np.full(8192, 0.3)) for i in range(4)]
    counts = measured_budgets(0.5, energies, [1.0, 4.0, 0.1, 1.0], [512] * 4)
    assert all(count % 512 == 0 for count in counts) and sum(counts) == 4 * 4096 and counts[1] > counts[0] > counts[2]
