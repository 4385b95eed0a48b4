"""How a model's FFN blocks respond to their inputs, measured on text: what predicts its dropped neurons.

The text is read twice: first the covariances of the blocks' inputs and of what the dropped neurons add, from which the
directions follow; then the regression of the hidden vectors on these (``core/compensation.py`` has the formulas). The
covariances of as many blocks as fit are summed at once, so a large model reads its text several times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..core.compensation import Response, find_coefficients, find_directions
from ..core.ranking import kept_count, select
from ..core.slicing import in_float32
from ..model.blocks import Block, hooked, run_with, watching_inputs
from ..model.glass_model import GlassModel
from .amounts import DEFAULT_RANK

# The neurons that the directions are found for: those that global ranks drop at this density.
_DENSITY = 0.5
# Bytes of covariances to hold at once, and hidden values (2**25 are 128 MB in float32).
_MAX_COVARIANCES = 1 << 30
_MAX_HIDDEN = 2**25
_MAX_FLOAT16 = float(np.finfo(np.float16).max)

# Called for each block with its number, its inputs [N, H], hidden vectors [N, F] (float32), and a weight [N] for each.
_Observer = Callable[[int, mx.array, mx.array, mx.array], list[mx.array]]


def measure_responses(
    model: GlassModel,
    rows: list[list[int]],
    ranks: list[mx.array],
    rank: int = DEFAULT_RANK,
    progress: Callable[[int, int], None] = lambda done, passes: None,
) -> list[Response | None]:
    """The response of every dense block.

    Args:
        model (GlassModel): the model; its dense form is run.
        rows (list[list[int]]): token sequences, each of which begins as a text does. Their first tokens do not count.
        ranks (list[mx.array]): the global ranks [F] of every block.
        rank (int): of the regression.
        progress: called with how many tokens were read, in all passes over the text, and how many there are to read.

    Returns:
        list[Response | None]: of all blocks, in float16 but for the means; None for routed experts. Empty if no row has
        two tokens, or no block is dense.
    """
    rows = [row for row in rows if len(row) > 1]
    answered = [i for i, block in enumerate(model.blocks) if not block.experts]
    if not rows or not answered or rank == 0:
        return []
    blocks = [model.blocks[i] for i in answered]
    groups = _groups(blocks)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    read, total = 0, (len(groups) + 1) * sum(map(len, rows))

    def on_tokens(tokens: int) -> None:
        nonlocal read
        read += tokens
        progress(read, total)

    for members in groups:
        found += _directions(model, rows, [answered[i] for i in members], ranks, rank, on_tokens)
    responses: list[Response | None] = [None] * len(model.blocks)
    for i, response in zip(answered, _regressions(model, blocks, rows, found, on_tokens)):
        responses[i] = response
    return responses


@dataclass
class _Moments:
    """Sums over tokens: their number, and first and second moments of pairs of vectors."""

    count: mx.array
    left: mx.array
    right: mx.array
    squares: mx.array
    cross: mx.array

    @classmethod
    def zeros(cls, left: int, right: int) -> _Moments:
        shapes = ((), (left,), (right,), (left, left), (left, right))
        return cls(*(mx.zeros(shape) for shape in shapes))

    def add(self, left: mx.array, right: mx.array, weights: mx.array) -> list[mx.array]:
        """Add vectors [N, left] and [N, right] with weights [N]; returns what to evaluate."""
        weighted = (weights[:, None] * left).T
        self.count = self.count + mx.sum(weights)
        self.left, self.right = self.left + weights @ left, self.right + weights @ right
        self.squares, self.cross = self.squares + weighted @ left, self.cross + weighted @ right
        return list(vars(self).values())

    def central(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Both means, the left's covariance with itself, and that with the right; float64."""
        count, left, right, squares, cross = (np.array(a, np.float64) for a in vars(self).values())
        left, right = left / count, right / count
        return left, right, squares / count - np.outer(left, left), cross / count - np.outer(left, right)


def _directions(
    model: GlassModel,
    rows: list[list[int]],
    members: list[int],
    ranks: list[mx.array],
    rank: int,
    on_tokens: Callable[[int], None],
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For some blocks the mean input [H], and the directions [H, r] that say most of what the dropped neurons add."""
    blocks = [model.blocks[i] for i in members]
    moments = [_Moments.zeros(block.input_size, block.output_size) for block in blocks]
    outputs = [in_float32(block.module[block.output]) for block in blocks]
    dropped = []
    for i, block in zip(members, blocks):
        kept = select(ranks[i], kept_count(_DENSITY, block.size, block.group), block.group)
        dropped.append(mx.ones((block.size,)).at[kept].multiply(0.0))

    def observe(i: int, x: mx.array, h: mx.array, weights: mx.array) -> list[mx.array]:
        return moments[i].add(x, outputs[i](h * dropped[i]), weights)

    _read(model, blocks, rows, observe, on_tokens)
    found = []
    for moment in moments:
        mean, _, squares, cross = moment.central()
        found.append((mean, find_directions(squares, cross, rank)))
    return found


def _regressions(
    model: GlassModel,
    blocks: list[Block],
    rows: list[list[int]],
    directions: list[tuple[np.ndarray, np.ndarray]],
    on_tokens: Callable[[int], None],
) -> list[Response]:
    means = [mx.array(mean.astype(np.float32)) for mean, _ in directions]
    spans = [mx.array(span.astype(np.float32)) for _, span in directions]
    moments = [_Moments.zeros(span.shape[1], block.size) for span, block in zip(spans, blocks)]

    def observe(i: int, x: mx.array, h: mx.array, weights: mx.array) -> list[mx.array]:
        return moments[i].add((x - means[i]) @ spans[i], h, weights)

    _read(model, blocks, rows, observe, on_tokens)
    responses = []
    for mean, span, moment in zip(means, spans, moments):
        _, hidden, squares, cross = moment.central()
        coefficients = np.clip(find_coefficients(squares, cross), -_MAX_FLOAT16, _MAX_FLOAT16)
        responses.append(
            Response(
                mean,
                mx.array(hidden.astype(np.float32)),
                span.astype(mx.float16),
                mx.array(coefficients.astype(np.float32)).astype(mx.float16),
            )
        )
    return responses


def _read(
    model: GlassModel,
    blocks: list[Block],
    rows: list[list[int]],
    observe: _Observer,
    on_tokens: Callable[[int], None],
) -> None:
    """Read rows with the dense model and show some blocks' inputs and hidden vectors; what is made of them is
    evaluated. ``on_tokens`` is told how many tokens a batch had."""
    rows = sorted(rows, key=len)  # so that there is little padding
    at_once = max(1, _MAX_HIDDEN // (len(rows[-1]) * max(block.size for block in blocks)))
    for first in range(0, len(rows), at_once):
        part = rows[first : first + at_once]
        width = len(part[-1])
        # padding comes after a row's tokens, which never look ahead
        tokens = mx.array([row + [0] * (width - len(row)) for row in part])
        weights = mx.array([[0.0] + [1.0] * (len(row) - 1) + [0.0] * (width - len(row)) for row in part]).reshape(-1)
        inputs: dict[int, mx.array] = {}
        made: list[mx.array] = []

        def keep(i: int, x: mx.array, inputs=inputs) -> None:
            inputs[i] = _vectors(x)

        def show(i: int, h: mx.array, inputs=inputs, weights=weights, made=made) -> None:
            made += observe(i, inputs.pop(i), _vectors(h), weights)

        run_with(watching_inputs(blocks, keep) | hooked(blocks, show), model.dense, tokens)
        mx.eval(made)
        mx.clear_cache()
        on_tokens(sum(map(len, part)))


def _vectors(array: mx.array) -> mx.array:
    return array.reshape(-1, array.shape[-1]).astype(mx.float32)


def _groups(blocks: list[Block]) -> list[list[int]]:
    """The blocks' numbers, in groups whose covariances can be held at once."""
    groups, held = [[]], 0
    for i, block in enumerate(blocks):
        needed = 4 * block.input_size * (block.input_size + block.output_size)
        if groups[-1] and held + needed > _MAX_COVARIANCES:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += needed
    return groups
