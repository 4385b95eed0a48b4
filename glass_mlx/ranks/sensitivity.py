"""How sensitive a model's output is to losing part of one FFN block's energy.

Each block is measured alone: keep the better half of its neurons by their global energies, run a sample of text, and
divide KL(dense || sparse) of the next-token distributions by the share of the block's energy that was lost.
``core/layer_budgets.py`` shares out neurons by it.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..core.importance import output_norms
from ..core.metrics import kl_divergence
from ..core.ranking import kept_count, rank, select
from ..model.blocks import Block, by_token, run_with
from ..model.glass_model import GlassModel

# Limits of a sample: rows, tokens in a row, and logits at once (2**25 are 128 MB in float32).
SAMPLE_ROWS = 8
SAMPLE_LENGTH = 128
_MAX_LOGITS = 2**25


def sensitivity(
    model: GlassModel,
    rows: list[list[int]],
    energies: list[mx.array],
    progress: Callable[[int], None] = lambda blocks: None,
) -> list[float]:
    """KL per share of energy lost, for each block.

    Args:
        model (GlassModel): the model; its dense form is run once for every block.
        rows (list[list[int]]): a sample of token sequences; the longest ``SAMPLE_ROWS`` or fewer are used.
        energies (list[mx.array]): the global energies (impact) [F] of each block.
        progress: called after every block with how many are done.

    Returns:
        list[float]: nats per share, non-negative; 0 where no energy was lost.
    """
    tokens, real = _sample(model, rows)
    dense = model.dense(tokens).astype(mx.float32)
    mx.eval(dense)
    found = []
    for block, energy in zip(model.blocks, energies):
        kl, lost = _without_worse_half(model, block, energy, tokens, real, dense)
        found.append(max(0.0, kl) / lost if lost > 0 else 0.0)
        mx.clear_cache()
        progress(len(found))
    return found


def _without_worse_half(
    model: GlassModel, block: Block, energy: mx.array, tokens: mx.array, real: mx.array, dense: mx.array
) -> tuple[float, float]:
    """KL(dense || sparse) in nats, and the share of energy lost, with the worse half of one block's neurons dropped.

    Args:
        energy (mx.array): the block's global energies [F].
        tokens, real (mx.array): the sample, [B, L] each.
        dense (mx.array): the dense model's logits [B, L, vocabulary].
    """
    best = select(rank(block.by_expert(energy)), kept_count(0.5, block.width, block.group), block.group)
    mask = mx.zeros((block.size,)).at[block.joined(best)].add(1)
    scale = mx.square(output_norms(block.module[block.output])).reshape(-1)
    lost: list[mx.array] = []

    def observe(_: int, h: mx.array, *routing: mx.array) -> mx.array:
        kept = block.beside(mask, *routing)
        squares = mx.square(h.astype(mx.float32)) * block.beside(scale, *routing)
        gone = mx.sum((1 - kept) * squares, axis=-1) / mx.maximum(mx.sum(squares, axis=-1), 1e-12)
        gone = mx.mean(gone.reshape(*tokens.shape, -1), axis=-1)  # over a token's experts
        lost.append(mx.sum(gone * real) / mx.sum(real))
        return h * kept.astype(h.dtype)

    sparse = run_with(by_token([block], observe), model.dense, tokens).astype(mx.float32)
    kl = mx.sum(kl_divergence(dense, sparse) * real) / mx.sum(real)
    share = mx.mean(mx.stack(lost))
    mx.eval(kl, share)
    return kl.item(), share.item()


def _sample(model: GlassModel, rows: list[list[int]]) -> tuple[mx.array, mx.array]:
    """Tokens [B, L], and a mask [B, L] (float32) that is 0 at padding."""
    vocabulary = model.dense(mx.array([[0]])).shape[-1]
    length = max(2, min(SAMPLE_LENGTH, _MAX_LOGITS // vocabulary))
    rows = sorted((row[:length] for row in rows if len(row) > 1), key=len, reverse=True) or [[0, 0]]
    rows = rows[: max(1, min(SAMPLE_ROWS, _MAX_LOGITS // (vocabulary * length)))]
    width = len(rows[0])
    tokens = mx.array([row + [0] * (width - len(row)) for row in rows])
    real = mx.array([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows])
    return tokens, real
