"""From evidence to kept neurons: rank, fuse, select.

All of it is exact integer arithmetic on the device, so every backend chooses the same neurons from the same energies.
Rank 1 is the most important neuron; ties go to the lower index everywhere.
"""

from __future__ import annotations

import mlx.core as mx

# Global weights are resolved to a millionth, which makes fused ranks integers and their ties exact.
_WEIGHT_STEPS = 1_000_000


def rank(importance: mx.array) -> mx.array:
    """Rank neurons by importance.

    Args:
        importance (mx.array): [F] float32, non-negative (an energy or its root; both rank alike).

    Returns:
        mx.array: ranks [F] int64, a permutation of 1..F; 1 = most important, ties by index.
    """
    n = importance.shape[0]
    # The bits of non-negative floats order like the floats; index in the low half makes keys unique.
    bits = importance.astype(mx.float32).view(mx.uint32).astype(mx.int64)
    keys = -bits * (1 << 20) + mx.arange(n, dtype=mx.int64)
    return _invert(mx.argsort(keys))


def fuse(local_rank: mx.array, global_rank: mx.array, global_weight: float) -> mx.array:
    """Weighted rank aggregation R_j = (1 - w) local_j + w global_j (GLASS, arXiv 2508.14302).

    Args:
        local_rank (mx.array): [F] integer ranks from the prompt.
        global_rank (mx.array): [F] integer ranks of the model.
        global_weight (float): w in [0, 1]; 0 is the prompt alone (GRIFFIN), 1 the model alone (static).

    Returns:
        mx.array: [F] int64, R in millionths; smaller is more important.
    """
    w = round(global_weight * _WEIGHT_STEPS)
    return local_rank.astype(mx.int64) * (_WEIGHT_STEPS - w) + global_rank.astype(mx.int64) * w


def select(scores: mx.array, k: int) -> mx.array:
    """The k neurons with the smallest scores, ties by index.

    Args:
        scores (mx.array): [F] integers (ranks or fused ranks).
        k (int): how many to keep, 1..F.

    Returns:
        mx.array: neuron indices [k] int32, ascending.
    """
    n = scores.shape[0]
    keys = scores.astype(mx.int64) * n + mx.arange(n, dtype=mx.int64)
    return mx.sort(mx.argsort(keys)[:k].astype(mx.int32))


def kept_count(density: float, n: int) -> int:
    """How many of n neurons a density keeps: density * n rounded to the nearest, at least 1."""
    return max(1, round(density * n))


def auto_global_weight(local_tokens: int) -> float:
    """The default global weight after ``local_tokens`` prompt tokens: the fewer of them, the more the
    model's own ranks count: 0.8 at 4 tokens, 0.5 from 16 on; with at most one token, the ranks decide alone.
    """
    if local_tokens <= 1:
        return 1.0
    return max(0.5, 16 / (16 + local_tokens))


def _invert(order: mx.array) -> mx.array:
    """Ranks 1..F from a sorting order."""
    n = order.shape[0]
    ranks = mx.zeros((n,), dtype=mx.int64)
    ranks[order] = mx.arange(1, n + 1, dtype=mx.int64)
    return ranks
