"""Confidence intervals over prompts, and the stretches that a continuation is looked at in."""

from __future__ import annotations

import numpy as np

_RESAMPLES = 2000
_WINDOWS = 8


def interval(values: np.ndarray) -> list[float]:
    """The 95 % confidence interval of the mean of values [prompts], by bootstrap with fixed resamples."""
    picks = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
    return [float(x) for x in np.quantile(values[picks].mean(axis=1), (0.025, 0.975))]


def windows(tokens: int) -> list[int]:
    """The ends of at most eight windows that divide a continuation; all but the last have the same length."""
    step = -(-tokens // _WINDOWS)
    return [*range(step, tokens, step), tokens]


def window_means(values: np.ndarray) -> list[float]:
    """The mean of values [prompts, tokens] in each of the windows."""
    ends = windows(values.shape[1])
    return [float(values[:, a:b].mean()) for a, b in zip([0, *ends], ends)]
