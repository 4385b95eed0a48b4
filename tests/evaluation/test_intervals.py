"""Tests of confidence intervals and windows."""

from __future__ import annotations

import numpy as np
import pytest

from glass_mlx.evaluation.intervals import interval, windows


def test_windows():
    assert windows(256) == [32, 64, 96, 128, 160, 192, 224, 256]
    assert windows(2) == [1, 2] and windows(17)[-1] == 17 and len(windows(17)) <= 8


def test_intervals():
    rng = np.random.default_rng(1)
    values = rng.normal(3, 1, 400)
    low, high = interval(values)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert interval(np.array([2.0])) == [2.0, 2.0]
