"""How much a model's output suffers where one FFN block loses part of its energy.

For every block by itself: keep the better half of its neurons by their global energies, run a sample of text, and
divide KL(dense || sparse) of the next-token distributions by the share of the block's energy that was lost.
``core/layer_budgets.py`` gives the blocks their neurons by it.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..core.importance import output_norms
from ..core.metrics import kl_divergence
from ..core.ranking import kept_count, rank, select
from ..model.blocks import hooked, run_with
from ..model.glass_model import GlassModel

# A sample: at most so many rows of so many tokens, and so many logits at once (2**25 are 128 MB in float32).
SAMPLE_ROWS = 8
SAMPLE_LENGTH = 128
_MAX_LOGITS = 2**25


def sensitivity(
    model: GlassModel,
    rows: list[list[int]],
    energies: list[mx.array],
    progress: Callable[[int], None] = lambda blocks: None,
) -> list[float]:
    """KL per lost share of energy, for each block.

    Args:
        model (GlassModel): the model; its dense form is run once for every block.
        rows (list[list[int]]): a sample of token sequences, of which as much as needed is used.
        energies (list[mx.array]): the global energies (impact) of each block, [F].
        progress: called after every block.

    Returns:
        list[float]: nats by share, not negative; 0 where nothing was lost.
    """
    tokens, real = _sample(model, rows)
    dense = model.dense(tokens).astype(mx.float32)
    mx.eval(dense)
    found = []
    for block, energy in zip(model.blocks, energies):
        kept = select(rank(energy), kept_count(0.5, block.size, block.group), block.group)
        mask = mx.zeros((block.size,)).at[kept].add(1)
        scale = mx.square(output_norms(block.module[block.output]))
        lost: list[mx.array] = []

        def observe(_: int, h: mx.array, mask=mask, scale=scale, lost=lost) -> mx.array:
            squares = mx.square(h.reshape(*tokens.shape, -1).astype(mx.float32)) * scale
            gone = mx.sum((1 - mask) * squares, axis=-1) / mx.maximum(mx.sum(squares, axis=-1), 1e-12)
            lost.append(mx.sum(gone * real) / mx.sum(real))
            return h * mask.astype(h.dtype)

        sparse = run_with(hooked([block], observe), model.dense, tokens).astype(mx.float32)
        kl = mx.sum(kl_divergence(dense, sparse) * real) / mx.sum(real)
        share = mx.mean(mx.stack(lost))
        mx.eval(kl, share)
        found.append(max(0.0, kl.item()) / share.item() if share.item() > 0 else 0.0)
        mx.clear_cache()
        progress(len(found))
    return found


def _sample(model: GlassModel, rows: list[list[int]]) -> tuple[mx.array, mx.array]:
    """Tokens [B, L], and 1 where they are text and 0 where they fill up, [B, L]."""
    vocabulary = model.dense(mx.array([[0]])).shape[-1]
    length = max(2, min(SAMPLE_LENGTH, _MAX_LOGITS // vocabulary))
    rows = sorted((row[:length] for row in rows if len(row) > 1), key=len, reverse=True) or [[0, 0]]
    rows = rows[: max(1, min(SAMPLE_ROWS, _MAX_LOGITS // (vocabulary * length)))]
    width = len(rows[0])
    tokens = mx.array([row + [0] * (width - len(row)) for row in rows])
    real = mx.array([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows])
    return tokens, real
