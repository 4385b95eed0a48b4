"""How a model's FFN blocks respond to their inputs, measured on text: what predicts its dropped neurons.

The text is read twice: first the covariances of the blocks' inputs and of what the dropped neurons add, from which the
directions follow; then the regressions of the hidden vectors on these (``core/compensation.py`` has the formulas). The
covariances of as many blocks as fit are summed at once, so a large model reads its text several times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..core.compensation import Response, find_coefficients, find_directions, unpredictable_share
from ..core.ranking import kept_count, select
from ..core.slicing import in_float32
from ..model.blocks import Block, by_token, run_with
from ..model.glass_model import GlassModel
from .amounts import DEFAULT_RANK, answer_rank

# The neurons that the directions are found for: those that global ranks drop at this density.
_DENSITY = 0.5
# Bytes of covariances to hold at once, and hidden values (2**25 are 128 MB in float32).
_MAX_COVARIANCES = 1 << 30
_MAX_HIDDEN = 2**25
_MAX_FLOAT16 = float(np.finfo(np.float16).max)

# Called for each block with its number, its inputs [N, H], hidden vectors [N, F] (float32), and a weight [N] for each;
# of routed experts with hidden vectors [N, F / E], and the expert [N] of each.
_Observer = Callable[..., list[mx.array]]


def measure_responses(
    model: GlassModel,
    rows: list[list[int]],
    ranks: list[mx.array],
    rank: int = DEFAULT_RANK,
    progress: Callable[[int, int], None] = lambda done, passes: None,
) -> list[Response]:
    """The response of every block.

    Args:
        model (GlassModel): the model; its dense form is run.
        rows (list[list[int]]): token sequences, each of which begins as a text does. Their first tokens do not count.
        ranks (list[mx.array]): the global ranks [F] of every block.
        rank (int): of the regressions of dense blocks (``amounts.answer_rank``).
        progress: called with how many tokens were read, in all passes over the text, and how many there are to read.

    Returns:
        list[Response]: of all blocks, in float16 but for the means. Empty if no row has two tokens.
    """
    rows = [row for row in rows if len(row) > 1]
    if not rows or rank == 0:
        return []
    groups = _groups(model.blocks)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    read, total = 0, (len(groups) + 1) * sum(map(len, rows))

    def on_tokens(tokens: int) -> None:
        nonlocal read
        read += tokens
        progress(read, total)

    for members in groups:
        found += _directions(model, rows, members, ranks, rank, on_tokens)
    return _regressions(model, rows, found, on_tokens)


@dataclass
class _Moments:
    """Sums over tokens: their number, and first and second moments of pairs of vectors; each for several groups of
    tokens."""

    count: mx.array
    left: mx.array
    right: mx.array
    squares: mx.array
    cross: mx.array
    energies: mx.array  # of the right vectors' values

    @classmethod
    def zeros(cls, groups: int, left: int, right: int) -> _Moments:
        shapes = ((), (left,), (right,), (left, left), (left, right), (right,))
        return cls(*(mx.zeros((groups, *shape)) for shape in shapes))

    def add(self, left: mx.array, right: mx.array, weights: mx.array) -> list[mx.array]:
        """Add vectors [N, left] and [N, right] with weights [groups, N]; returns what to evaluate."""
        weighted = weights[:, None] * left.T
        self.count = self.count + mx.sum(weights, axis=1)
        self.left, self.right = self.left + weights @ left, self.right + weights @ right
        self.squares, self.cross = self.squares + weighted @ left, self.cross + weighted @ right
        self.energies = self.energies + weights @ mx.square(right)
        return list(vars(self).values())

    def central(self) -> list[tuple[float, *tuple[np.ndarray, ...]]]:
        """For each group the number of tokens, both means, the left's covariance with itself, that with the right, and
        the mean squares of the right; float64, and zero without tokens."""
        found = []
        for count, *sums in zip(*(np.array(a, np.float64) for a in vars(self).values())):
            n = max(count, 1.0)
            left, right, squares, cross, energies = (each / n for each in sums)
            found.append((n, left, right, squares - np.outer(left, left), cross - np.outer(left, right), energies))
        return found


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
    moments = [_Moments.zeros(1, block.input_size, block.output_size) for block in blocks]
    outputs = [in_float32(block.module[block.output]) for block in blocks]
    dropped = []
    for i, block in zip(members, blocks):
        kept = select(block.by_expert(ranks[i]), kept_count(_DENSITY, block.width, block.group), block.group)
        dropped.append(mx.ones((block.size,)).at[block.joined(kept)].multiply(0.0))

    def observe(i: int, x: mx.array, h: mx.array, weights: mx.array, *routing: mx.array) -> list[mx.array]:
        h = h[:, None] if routing else h  # as routed experts take it
        y = outputs[i](h * blocks[i].beside(dropped[i], *routing), *routing)
        return moments[i].add(x, y.reshape(len(x), -1), weights[None])

    _read(model, blocks, rows, observe, on_tokens)
    found = []
    for block, moment in zip(blocks, moments):
        [(_, mean, _, squares, cross, _)] = moment.central()
        found.append((mean, find_directions(squares, cross, answer_rank(block.experts, rank))))
    return found


def _regressions(
    model: GlassModel,
    rows: list[list[int]],
    directions: list[tuple[np.ndarray, np.ndarray]],
    on_tokens: Callable[[int], None],
) -> list[Response]:
    blocks = model.blocks
    means = [mx.array(mean.astype(np.float32)) for mean, _ in directions]
    spans = [mx.array(span.astype(np.float32)) for _, span in directions]
    moments = [_Moments.zeros(b.experts or 1, span.shape[1], b.width) for span, b in zip(spans, blocks)]

    def observe(i: int, x: mx.array, h: mx.array, weights: mx.array, *routing: mx.array) -> list[mx.array]:
        own = [weights * (routing[0] == e) for e in range(blocks[i].experts)] if routing else [weights]
        return moments[i].add((x - means[i]) @ spans[i], h, mx.stack(own))

    _read(model, blocks, rows, observe, on_tokens)
    responses = []
    for mean, span, moment in zip(means, spans, moments):
        hidden, coefficients, shares = [], [], []
        for count, z, h, squares, cross, energies in moment.central():
            own = find_coefficients(squares, cross, count)
            coefficients.append(np.clip(own, -_MAX_FLOAT16, _MAX_FLOAT16))
            hidden.append(h - z @ own)
            shares.append(unpredictable_share(energies, h, squares, cross, own))
        responses.append(
            Response(
                mean,
                mx.array(np.concatenate(hidden).astype(np.float32)),
                span.astype(mx.float16),
                mx.array(np.concatenate(coefficients, axis=1).astype(np.float32)).astype(mx.float16),
                mx.array(np.concatenate(shares).astype(np.float32)).astype(mx.float16),
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

        def show(i: int, h: mx.array, *routing: mx.array, inputs=inputs, weights=weights, made=made) -> None:
            each = [inputs.pop(i), weights]
            if routing:  # of each token its experts in turn
                each = [mx.repeat(values, routing[0].shape[-1], axis=0) for values in each]
            made += observe(i, each[0], _vectors(h), each[1], *(of.reshape(-1) for of in routing))

        run_with(by_token(blocks, show, keep), model.dense, tokens)
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
