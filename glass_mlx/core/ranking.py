"""From evidence to kept neurons: rank, fuse, select.

Everything is exact integer arithmetic on the device, so every backend chooses the same neurons from the same energies.
Rank 1 is the most important neuron. Ties always go to the lower index.
"""

from __future__ import annotations

import mlx.core as mx

from .slicing import UNIT

# Global weights are rounded to a millionth, which makes fused ranks integers and their ties exact.
_WEIGHT_STEPS = 1_000_000


def rank(importance: mx.array) -> mx.array:
    """Rank neurons by importance.

    Args:
        importance (mx.array): [..., F] float32, non-negative (an energy or its root: both give the same ranks).

    Returns:
        mx.array: ranks [..., F] int64, a permutation of 1..F; 1 = most important, ties by index.
    """
    n = importance.shape[-1]
    # The bits of non-negative floats sort like the floats; the index in the low bits makes the keys unique.
    bits = importance.astype(mx.float32).view(mx.uint32).astype(mx.int64)
    order = mx.argsort(-bits * (1 << 20) + mx.arange(n, dtype=mx.int64), axis=-1)
    # Metal cannot scatter 8-byte dtypes; ranks are below 2**31.
    places = mx.broadcast_to(mx.arange(1, n + 1, dtype=mx.int32), order.shape)
    return mx.put_along_axis(mx.zeros(order.shape, mx.int32), order, places, axis=-1).astype(mx.int64)


def rank_by_expert(importance: mx.array, experts: int) -> mx.array:
    """Ranks [F] (int64) of neurons within each of the experts that they belong to, in turn; 0 experts are one."""
    return rank(importance.reshape(experts or 1, -1)).reshape(-1)


def fuse(local_rank: mx.array, global_rank: mx.array, global_weight: float) -> mx.array:
    """Weighted rank aggregation R_j = (1 - w) local_j + w global_j (GLASS, arXiv 2508.14302).

    Args:
        local_rank (mx.array): [..., F] integer ranks from the prompt.
        global_rank (mx.array): [..., F] integer ranks of the model.
        global_weight (float): w in [0, 1]; 0 is the prompt alone (GRIFFIN), 1 the model alone (static).

    Returns:
        mx.array: [..., F] int64, R in millionths; a smaller value is more important.
    """
    w = round(global_weight * _WEIGHT_STEPS)
    return local_rank.astype(mx.int64) * (_WEIGHT_STEPS - w) + global_rank.astype(mx.int64) * w


def keep_order(scores: mx.array, group: int = 1) -> mx.array:
    """The order in which neurons are kept: for any k, the first k are the best k.

    A quantised projection may only allow whole units of one group to be kept (see ``slicing``). Then the neurons of
    each group are sorted and split into units of ``UNIT``, best first, and the units are sorted by the sum of their
    scores.

    Args:
        scores (mx.array): [..., F] integers (ranks or fused ranks); smaller is better, ties by index.
        group (int): neurons in a quantisation group, a multiple of ``UNIT``; 1 orders single neurons.

    Returns:
        mx.array: neuron indices [..., F] int32.
    """
    if group == 1:
        return _smallest(scores)
    shape = scores.shape[:-1]
    in_groups = scores.reshape(*shape, -1, group)
    order = _smallest(in_groups)
    units = mx.take_along_axis(in_groups, order, axis=-1).reshape(*shape, -1, UNIT)
    members = (order + mx.arange(0, scores.shape[-1], group, dtype=mx.int32)[:, None]).reshape(units.shape)
    best = _smallest(mx.sum(units.astype(mx.int64), axis=-1))
    return mx.take_along_axis(members, best[..., None], axis=-2).reshape(scores.shape)


def select(scores: mx.array, k: int, group: int = 1) -> mx.array:
    """The k best neurons by ``keep_order``; with groups, k must be a multiple of ``UNIT``.

    Returns:
        mx.array: neuron indices [..., k] int32, ascending. If several units of a group are kept, their neurons mix.
    """
    return mx.sort(keep_order(scores, group)[..., :k], axis=-1)


def kept_count(density: float, n: int, group: int = 1) -> int:
    """How many of n neurons a density keeps: density * n rounded to the nearest integer, at least 1.

    With groups it is rounded to the nearest multiple of ``UNIT``, and is at least one unit.
    """
    step = 1 if group == 1 else UNIT
    return max(step, step * round(density * n / step))


def _smallest(scores: mx.array) -> mx.array:
    """Indices [..., n] int32 in ascending order of the scores, ties by index."""
    n = scores.shape[-1]
    return mx.argsort(scores.astype(mx.int64) * n + mx.arange(n, dtype=mx.int64), axis=-1).astype(mx.int32)
