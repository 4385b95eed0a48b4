"""How much quality a density costs on a model, measured on text of its own.

Each sequence's beginning is read as a prompt, and the rest is decoded on the neurons chosen by it: KL(dense || sparse)
of the next-token distributions, and how often both find the same token the most likely.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..core.metrics import kl_divergence
from ..model.glass_model import GlassModel
from ..model.quality import QualityPoint

DENSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Sequences of a measurement, tokens of a sequence that are its prompt, and of all of it.
_ROWS, _PROMPT, _LENGTH = 8, 32, 160


def measure_quality(
    model: GlassModel,
    rows: list[list[int]],
    progress: Callable[[int, int], None] = lambda done, rows: None,
) -> list[QualityPoint]:
    """What ``DENSITIES`` cost a model that has its statistics.

    Args:
        model (GlassModel): the model.
        rows (list[list[int]]): token sequences of its own; the longest few are used.
        progress: called with how many decodings of a sequence are done, and of how many.

    Returns:
        list[QualityPoint]: by density, ascending; empty if no row is longer than a prompt.
    """
    rows = sorted((row for row in rows if len(row) > _PROMPT + 1), key=len, reverse=True)[:_ROWS]
    found = {density: ([], []) for density in DENSITIES}
    for i, row in enumerate(rows):
        dense = _continued(model, row, 1.0)  # [L, vocabulary]: 128 MB at most at 262,144 tokens
        for j, (density, (kl, agree)) in enumerate(found.items()):
            sparse = _continued(model, row, density)
            kl.append(mx.mean(kl_divergence(dense, sparse)).item())
            agree.append(mx.mean(mx.argmax(dense, axis=-1) == mx.argmax(sparse, axis=-1)).item())
            mx.clear_cache()
            progress(i * len(found) + j + 1, len(rows) * len(found))
    return [QualityPoint(d, float(np.mean(kl)), float(np.mean(agree))) for d, (kl, agree) in found.items() if kl]


def _continued(model: GlassModel, row: list[int], density: float) -> mx.array:
    """Logits [L, vocabulary] (float32) of a sequence after its prompt, decoded on the neurons that the prompt chose."""
    cache = model.make_cache(density=density)
    model.prefill(mx.array([row[:_PROMPT]]), cache)
    model.select(cache)
    tokens = mx.array([row[_PROMPT:_LENGTH]])
    logits = model.decode(tokens, cache)[0].astype(mx.float32)
    mx.eval(logits)
    return logits
