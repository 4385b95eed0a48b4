"""Tests of how far distributions are apart."""

from __future__ import annotations

import mlx.core as mx

from glass_mlx.core.metrics import kl_divergence


def test_divergence_of_the_same_is_zero():
    logits = 30 * mx.random.normal((5, 1000))
    assert not mx.any(kl_divergence(logits, logits)).item()
    assert mx.all(kl_divergence(logits, logits[::-1])[:2] > 0).item()
