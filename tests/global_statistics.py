"""What tests of global statistics share."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from glass_mlx.core.importance import SIGNALS
from glass_mlx.ranks.format import GlobalStatistics


def same(a: GlobalStatistics, b: GlobalStatistics) -> bool:
    """Whether all arrays and metadata are equal, and sensitivities as far as a file keeps them."""
    fields = [getattr(a, name)[s] for name in ("ranks", "energies", "domains") for s in SIGNALS]
    others = [getattr(b, name)[s] for name in ("ranks", "energies", "domains") for s in SIGNALS]
    equal = all(
        x.dtype == y.dtype and mx.array_equal(x, y)
        for xs, ys in zip(fields, others, strict=True)
        for x, y in zip(xs, ys, strict=True)
    )
    if a.sensitivity is None or b.sensitivity is None:
        return equal and a.metadata == b.metadata and a.sensitivity is b.sensitivity
    return equal and a.metadata == b.metadata and np.allclose(a.sensitivity, b.sensitivity, rtol=1e-3)
