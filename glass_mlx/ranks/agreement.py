"""How well two measurements of the same neurons agree."""

from __future__ import annotations

import numpy as np


def compare(a: np.ndarray, b: np.ndarray, share: float = 0.5, experts: int = 1) -> dict[str, float]:
    """Compare two measurements of a block's energies [F], if the best ``share`` of its neurons, or of each of its
    experts', were kept.

    Returns:
        dict: ``correlation``, Spearman's of the ranks; ``overlap``, how much of the best neurons they have in common;
        ``efficiency``, the energy that both drop by their own choice, as a share of what they drop by each other's.
    """
    sides = [np.asarray(v, np.float64).reshape(experts, -1) for v in (a, b)]
    orders = [np.argsort(-v, axis=1, kind="stable") for v in sides]
    ranks = [np.argsort(order, axis=1).reshape(-1) for order in orders]
    size = orders[0].shape[1]
    k = max(1, round(share * size))
    kept = [rank.reshape(experts, -1) < k for rank in ranks]
    shares = [v / (v.sum() or 1) for v in sides]
    own, others = (sum(v[~choice].sum() for v, choice in zip(shares, choices)) for choices in (kept, kept[::-1]))
    return {
        "correlation": float(np.corrcoef(*ranks)[0, 1]) if size > 1 else 1.0,
        "overlap": float((kept[0] & kept[1]).sum() / kept[0].sum()),
        "efficiency": float(own / others) if others > 0 else 1.0,
    }
