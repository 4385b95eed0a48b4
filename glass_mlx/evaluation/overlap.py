"""How the neurons that prompts call for overlap with those that global statistics rank highest."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..model.glass_model import GlassModel
from ..ranks.agreement import compare
from ..ranks.format import GlobalStatistics


def prompt_overlaps(
    model: GlassModel, prompts: list[list[int]], statistics: GlobalStatistics, share: float
) -> np.ndarray:
    """Overlap of the best ``share`` of each layer's neurons by a prompt with those by the statistics.

    Args:
        model (GlassModel): the model.
        prompts (list[list[int]]): tokens.
        statistics (GlobalStatistics): the model's.
        share (float): share of the neurons to compare, in (0, 1].

    Returns:
        np.ndarray: [prompts, layers].
    """
    energies, rows = statistics.energies[model.config.signal], []
    for tokens in prompts:
        cache = model.make_cache()
        mx.eval(model.prefill(mx.array(tokens)[None], cache))
        local = np.split(np.array(model.session(cache).energy), np.cumsum(statistics.sizes)[:-1])
        rows.append([compare(own, np.array(known), share)["overlap"] for own, known in zip(local, energies)])
    return np.array(rows)
