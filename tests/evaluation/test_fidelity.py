"""Tests of the figures of fidelity."""

from __future__ import annotations

import numpy as np
import pytest

from glass_mlx.evaluation.fidelity import summarise
from glass_mlx.evaluation.teacher_forcing import Scores


def test_the_comparison_is_paired():
    """A small difference that is the same for every prompt is seen through what prompts differ by."""
    kl = np.linspace(0, 5, 20)[:, None] * np.ones((1, 3))
    scores = [Scores(kl, kl + shift, kl > 1, kl, []) for shift in (0.0, -0.01)]
    row = summarise(scores[1], scores[0])
    assert row["against_griffin"]["kl"] == pytest.approx(-0.01)
    assert row["against_griffin"]["ci"] == pytest.approx([-0.01, -0.01])
    assert row["ci"]["kl"][1] - row["ci"]["kl"][0] > 1
