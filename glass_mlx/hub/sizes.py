"""Sizes of models, and whether they fit into memory."""

from __future__ import annotations

import os

import mlx.core as mx


def size(count: int) -> str:
    """Bytes in decimal units, as macOS shows them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.{1 if unit == 'GB' else 0}f} {unit}"
    return f"{count / 1e3:.0f} kB"


def fit(size: int, density: float, memory: int) -> str:
    """Whether a model fits into memory: "fits", "tight" or "too large". It needs its weights, a tenth more for the
    conversation, and a copy of the kept neurons' weights (at least two thirds of all weights are the FFN's)."""
    if 1.1 * size > memory:
        return "too large"
    copies = 0.8 * density if density < 1 else 0
    return "tight" if 1.1 * size * (1 + copies) > memory else "fits"


def usable_memory() -> int:
    """Bytes that a model may take: on Apple's GPU what the system recommends to use, elsewhere the machine's memory."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    return int(recommended or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
