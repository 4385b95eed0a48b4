"""Make the compact weights of a conversation, block by block."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .blocks import Block, CompactWeights
from .memory import WeightFiles


def make_compact(
    blocks: list[Block], kept: list[mx.array], files: WeightFiles | None, reserve: Callable[[int], None]
) -> CompactWeights:
    """Copy the kept neurons' weights into compact matrices.

    One block is sliced while the next is being sent to the device, and no more: what slicing needs in between is held
    for two blocks at most.

    Args:
        blocks (list[Block]): of the model.
        kept (list[mx.array]): for each block the neurons [k] int32, ascending.
        files (WeightFiles, optional): let go of the dense weights as they are copied.
        reserve: called with the bytes needed, before any is taken.

    Returns:
        CompactWeights: evaluated.
    """
    made = [block.compact(neurons) for block, neurons in zip(blocks, kept)]
    compact = CompactWeights.of(blocks, made)
    reserve(compact.nbytes)
    stored = files.read() if files is not None else {}
    ahead = iter(made[1:])
    _start(made[0])
    for i, (block, projections) in enumerate(zip(blocks, made)):
        _start(next(ahead, {}))
        mx.eval([projection.parameters() for projection in projections.values()])
        if files is not None:
            files.release(i, block, projections, stored)
    if files is not None:
        mx.clear_cache()
    return compact


def _start(projections: dict[str, nn.Module]) -> None:
    mx.async_eval([projection.parameters() for projection in projections.values()])
