"""How far one next-token distribution is from another."""

from __future__ import annotations

import mlx.core as mx


def kl_divergence(dense: mx.array, sparse: mx.array) -> mx.array:
    """KL(dense || sparse) in nats, [...], between the distributions of two arrays of logits [..., vocabulary]."""
    normalisers = mx.logsumexp(sparse, axis=-1) - mx.logsumexp(dense, axis=-1)
    return mx.sum(mx.softmax(dense, axis=-1) * (dense - sparse), axis=-1) + normalisers
