"""How well two rankings of the same neurons agree."""

from __future__ import annotations

import numpy as np


def compare(a: np.ndarray, b: np.ndarray, share: float = 0.5) -> dict[str, float]:
    """Compare two importance vectors [F] of one layer.

    Returns:
        dict: ``correlation``, Spearman's of the ranks; ``overlap``, how much of the best ``share`` of the neurons the
        two have in common.
    """
    order_a, order_b = (np.argsort(-v, kind="stable") for v in (a, b))
    rank_a, rank_b = np.empty(len(a)), np.empty(len(b))
    rank_a[order_a] = rank_b[order_b] = np.arange(len(a))
    correlation = np.corrcoef(rank_a, rank_b)[0, 1] if len(a) > 1 else 1.0
    k = max(1, round(share * len(a)))
    overlap = len(np.intersect1d(order_a[:k], order_b[:k])) / k
    return {"correlation": float(correlation), "overlap": float(overlap)}
