"""Tests of comparing two rankings, against a plain computation."""

from __future__ import annotations

import numpy as np
import pytest

from glass_mlx.ranks.agreement import compare


@pytest.mark.parametrize("n, share", [(1, 0.5), (2, 0.5), (7, 0.3), (100, 0.5), (100, 0.01), (100, 1.0)])
def test_compare(n, share):
    rng = np.random.default_rng(n)
    a = rng.permutation(n).astype(float)
    b = a + rng.normal(size=n)
    k = max(1, round(share * n))
    best = [set(sorted(range(n), key=lambda j: -v[j])[:k]) for v in (a, b)]
    places = [np.array([sum(w > v for w in x) for v in x]) for x in (a, b)]
    rho = 1 - 6 * float(((places[0] - places[1]) ** 2).sum()) / (n * (n * n - 1)) if n > 1 else 1.0
    a, b = a - min(a) + 1, b - min(b) + 1  # energies, ordered as before
    own, others = (
        sum(1 - sum(v[list(kept)]) / sum(v) for v, kept in zip((a, b), kept_by)) for kept_by in (best, best[::-1])
    )
    assert compare(a, b, share) == {
        "correlation": pytest.approx(rho),
        "overlap": pytest.approx(len(best[0] & best[1]) / k),
        "efficiency": pytest.approx(own / others if others > 1e-9 else 1.0),
    }


def test_compare_extremes():
    v = np.arange(10.0)
    assert compare(v, v) == {"correlation": pytest.approx(1), "overlap": 1.0, "efficiency": 1.0}
    worst = {"correlation": pytest.approx(-1), "overlap": 0.0, "efficiency": pytest.approx(10 / 35)}
    assert compare(v, v[::-1]) == worst
    assert compare(v, 0 * v)["efficiency"] <= 1  # a block that never fired
