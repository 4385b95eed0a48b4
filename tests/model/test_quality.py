"""Tests of the density for a quality."""

from __future__ import annotations

import pytest

from glass_mlx import GlassError
from glass_mlx.model.quality import QUALITIES, QualityPoint, agreement_at, costs_more_than, density_for

POINTS = [
    QualityPoint(0.3, 1.0, 0.5),
    QualityPoint(0.5, 0.4, 0.7),
    QualityPoint(0.7, 0.1, 0.8),
    QualityPoint(0.9, 0.01, 0.9),
]


def test_qualities_are_in_order():
    assert list(QUALITIES) == ["high", "balanced", "fast"]
    assert QUALITIES["high"] < QUALITIES["balanced"] < QUALITIES["fast"]


@pytest.mark.parametrize("limit, density", [(0.1, 0.7), (0.01, 0.9), (0.009, 1.0), (0.2, 0.6), (2.0, 0.3), (1.0, 0.3)])
def test_density(limit, density, monkeypatch):
    """log KL is linear between the points; what no measured density reaches is dense."""
    monkeypatch.setitem(QUALITIES, "fast", limit)
    assert density_for("fast", POINTS) == density


def test_more_neurons_that_seem_worse_do_not_count(monkeypatch):
    monkeypatch.setitem(QUALITIES, "fast", 0.1)
    points = [*POINTS[:3], QualityPoint(0.8, 0.12, 0.8)]
    assert density_for("fast", [*points, POINTS[3]]) == 0.7


def test_agreement():
    assert [agreement_at(d, POINTS) for d in (0.2, 0.3, 0.6, 1.0)] == [None, 0.5, 0.75, 1.0]
    assert agreement_at(0.95, POINTS) == pytest.approx(0.95)
    assert agreement_at(0.5, []) is None and agreement_at(1.0, []) == 1.0


@pytest.mark.parametrize("quality, points, reason", [("best", POINTS, "one of high"), ("fast", [], "not known")])
def test_errors(quality, points, reason):
    with pytest.raises(GlassError, match=reason):
        density_for(quality, points)


def test_a_density_that_costs_much(monkeypatch):
    monkeypatch.setitem(QUALITIES, "fast", 0.2)
    assert costs_more_than("fast", 0.5, POINTS) and not costs_more_than("fast", 0.7, POINTS)
    assert not costs_more_than("fast", 0.1, [])
