"""Make the compact weights of a conversation, block by block."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..core.compensation import Response, Sums
from .blocks import Block, CompactWeights, Projection
from .dropped import Answer
from .memory import WeightFiles

# What is known of a block's dropped neurons.
Known = tuple[Response | None, Sums | None]


def make_compact(
    blocks: list[Block],
    kept: list[mx.array],
    known: list[Known] | None,
    files: WeightFiles | None,
    reserve: Callable[[int], None],
) -> CompactWeights:
    """Copy the kept neurons' weights into compact matrices, and make the answers for the others. A block that keeps all
    decodes with its own weights.

    One block is sliced while the next is being sent to the device, and no more: what slicing needs in between is held
    for two blocks at most. Where dense weights are let go of, blocks come one by one: memory is short.

    Args:
        blocks (list[Block]): of the model.
        kept (list[mx.array]): for each block the neurons [k] int32, ascending.
        known (list, optional): for each block what its dropped neurons are answered for by. None: they add nothing.
        files (WeightFiles, optional): let go of the dense weights as they are copied.
        reserve: called with the bytes needed, before any is taken.

    Returns:
        CompactWeights: evaluated.
    """
    whole = [neurons.size == block.size for block, neurons in zip(blocks, kept)]
    made = [{} if all_ else block.compact(neurons) for block, neurons, all_ in zip(blocks, kept, whole)]
    answers: list[Answer | None] = [None] * len(blocks)
    if known:
        answers = [None if all_ else Answer.make(*each) for *each, all_ in zip(blocks, kept, *zip(*known), whole)]
    arrays = [_arrays(projections) for projections in made]
    needed = sum(array.nbytes for block in arrays for array in block)
    needed += sum(answer.nbytes for answer in answers if answer is not None)
    reserve(needed)
    for block, answer in zip(arrays, answers):
        block += [] if answer is None else answer.arrays
    stored = files.read() if files is not None else {}
    ahead = [*arrays[1:], []] if files is None else [[]] * len(blocks)
    mx.async_eval(arrays[0])
    for i, (block, projections) in enumerate(zip(blocks, made)):
        mx.async_eval(ahead[i])
        mx.eval(arrays[i])
        if files is not None and projections:
            files.release(i, block, projections, stored)
    mx.clear_cache()  # the buffers of the prefill and of slicing have other sizes than those of decoding
    replacements: dict[int, Projection] = {}
    for block, projections, answer in zip(blocks, made, answers):
        replacements |= block.replacing(projections if answer is None else answer.replacing(block, projections))
    return CompactWeights(made, replacements, needed, answers)


def _arrays(projections: dict[str, nn.Module]) -> list[mx.array]:
    """A block's compact weights, without the whole projection that a ``ScatterLinear`` refers to."""
    return [value for module in projections.values() for value in module.values() if isinstance(value, mx.array)]
