"""Property tests of rank, fuse and select against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import mlx.core as mx
import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from glass_mlx.core.ranking import fuse, keep_order, kept_count, rank, select
from glass_mlx.core.slicing import UNIT

props = settings(deadline=None, max_examples=examples(30, 100))

# Few distinct values make ties; subnormal and huge ones, wrong orders.
importances = st.lists(
    st.one_of(
        st.sampled_from([0.0, 0.0, 1.0, 2.5, 1e-44, 3e38]),
        st.floats(0, width=32, allow_infinity=False, allow_nan=False),
    ),
    min_size=1,
    max_size=40,
)
millionths = st.integers(0, 10**6).map(lambda n: n / 10**6)


@st.composite
def two_rankings(draw):
    """Two rankings of the same neurons."""
    n = draw(st.integers(1, 30))
    return [draw(st.permutations(range(1, n + 1))) for _ in range(2)]


def smallest(scores: list, k: int) -> list[int]:
    """Indices of the k smallest scores, ties by index."""
    return sorted(sorted(range(len(scores)), key=lambda j: (scores[j], j))[:k])


@props
@given(importances)
def test_rank(values):
    order = np.argsort(-np.array(values, np.float32), kind="stable")
    ranks = np.array(rank(mx.array(values, dtype=mx.float32)))
    assert ranks[order].tolist() == list(range(1, len(values) + 1))


def test_rank_of_many():
    values = np.random.default_rng(0).integers(0, 50, 20_000).astype(np.float32)
    ranks = np.array(rank(mx.array(values)))
    assert np.array_equal(np.argsort(ranks), np.argsort(-values, kind="stable"))


@props
@given(two_rankings(), millionths, st.data())
def test_fuse_and_select(rankings, weight, data):
    k = data.draw(st.integers(1, len(rankings[0])))
    w = Fraction(round(weight * 10**6), 10**6)
    expected = [(1 - w) * l + w * g for l, g in zip(*rankings)]
    local, model = map(mx.array, rankings)
    scores = fuse(local, model, weight)
    assert scores.tolist() == [r * 10**6 for r in expected]
    kept = select(scores, k)
    assert kept.dtype == mx.int32
    assert kept.tolist() == smallest(expected, k)


@props
@given(two_rankings(), st.data())
def test_the_ends_are_one_ranking_alone(rankings, data):
    k = data.draw(st.integers(1, len(rankings[0])))
    local, model = map(mx.array, rankings)
    for weight, alone in enumerate(rankings):
        assert select(fuse(local, model, weight), k).tolist() == smallest(alone, k)


def test_fuse_takes_the_ranks_files_dtypes():
    """uint16 ranks must not wrap around."""
    ranks = mx.arange(60_000, 60_004)
    for dtype in (mx.uint16, mx.uint32, mx.int64):
        assert fuse(ranks, ranks.astype(dtype), 0.25).tolist() == [r * 10**6 for r in ranks.tolist()]


@props
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.data())
def test_select_breaks_ties_by_index(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    assert select(mx.array(scores), k).tolist() == smallest(scores, k)


@props
@given(st.floats(0, 1, exclude_min=True), st.integers(1, 30_000))
def test_kept_count(density, n):
    k = kept_count(density, n)
    assert 1 <= k <= n
    assert k == 1 or abs(k - density * n) <= 0.5
    assert kept_count(1, n) == n


@pytest.mark.parametrize(("density", "n", "k"), [(0.5, 14336, 7168), (0.3, 10, 3), (0.001, 10, 1)])
def test_kept_count_of(density, n, k):
    assert kept_count(density, n) == k


@pytest.mark.parametrize(
    ("density", "n", "k"), [(0.5, 14336, 7168), (0.3, 14336, 4288), (0.001, 128, 32), (0.99, 128, 128)]
)
def test_kept_count_in_units(density, n, k):
    assert kept_count(density, n, 64) == k


def best_units(scores: list[int], k: int, group: int) -> list[int]:
    """What ``select`` must keep in units of groups, written plainly."""
    units = []
    for start in range(0, len(scores), group):
        members = sorted(range(start, start + group), key=lambda j: (scores[j], j))
        units += [members[i : i + UNIT] for i in range(0, group, UNIT)]
    units.sort(key=lambda unit: sum(scores[j] for j in unit))  # stable: ties by group
    return sorted(j for unit in units[: k // UNIT] for j in unit)


@props
@given(
    st.sampled_from([64, 128]), st.integers(1, 4), st.integers(0, 99), st.sampled_from([2, 10**3, 10**11]), st.data()
)
def test_units_are_the_best_of_their_groups(group, groups, seed, highest, data):
    n = group * groups
    k = UNIT * data.draw(st.integers(1, n // UNIT))
    scores = np.random.default_rng(seed).integers(0, highest, n)
    kept = select(mx.array(scores), k, group)
    assert kept.dtype == mx.int32
    assert kept.tolist() == best_units(scores.tolist(), k, group)
    chunks = kept.reshape(-1, UNIT) // group
    assert mx.all(chunks == chunks[:, :1])  # what slice_columns relies on


@pytest.mark.parametrize("group", [1, 64])
def test_blocks_are_chosen_for_together_as_one_by_one(group):
    local, world = np.random.default_rng(1).random((2, 3, 256)).astype(np.float32)
    together = fuse(rank(mx.array(local)), rank(mx.array(world)), 0.3)
    alone = [fuse(rank(mx.array(l)), rank(mx.array(g)), 0.3) for l, g in zip(local, world)]
    assert mx.array_equal(together, mx.stack(alone))
    assert mx.array_equal(select(together, 96, group), mx.stack([select(scores, 96, group) for scores in alone]))


@pytest.mark.parametrize("group", [1, 64, 128])
def test_preference_holds_every_selection(group):
    """Its first k are what is selected, for any k, and all of it is every neuron once."""
    scores = rank(mx.array(np.random.default_rng(2).random((2, 256)).astype(np.float32)))
    order = keep_order(scores, group)
    assert np.array_equal(np.sort(order, axis=1), [range(256)] * 2)
    for k in range(UNIT, 257, UNIT):
        assert mx.array_equal(mx.sort(order[:, :k], axis=-1), select(scores, k, group))
