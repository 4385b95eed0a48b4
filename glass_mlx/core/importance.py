"""How strongly each FFN neuron fires: the evidence that GLASS ranks neurons by.

A block's hidden vector h_t is the input of its output projection at token t. Evidence is kept as energy, the square
of the importance, because the energies of chunks, turns and sequences simply add up:

    activation   E_j = sum_t (h_tj / max(||h_t||, eps))^2
    impact       the same with g_tj = h_tj * ||W_out[:, j]|| in place of h_tj

Of routed experts each token shows every one of its experts a hidden vector of its own, which counts for that expert's
neurons, whatever weight the router gives it.

The importance in the GLASS and GRIFFIN papers (arXiv 2508.14302, 2404.01365) is A_j = sqrt(E_j), with the same ranks.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .slicing import input_size, is_quantised, slice_experts, slice_rows

SIGNALS = ("impact", "activation")
EPS = 1e-6
# Weights that are dequantised at once to find norms: 16 MB in float32.
_AT_ONCE = 1 << 22


def energy(h: mx.array, norms: mx.array | None = None, weights: mx.array | None = None) -> mx.array:
    """The energy E_j (module docstring) of hidden vectors, summed over their tokens.

    Args:
        h (mx.array): hidden vectors, [..., F], any float dtype.
        norms (mx.array, optional): output-weight norms [F] float32, for the signal impact; None for activation.
        weights (mx.array, optional): a weight for each token, of any shape; 0 leaves a token out.

    Returns:
        mx.array: [F] float32, non-negative. Each token adds its weight to the sum, or 0 where h is zero.
    """
    # Two matrix-vector products with the squares, so no second array of that size is made.
    squares = mx.square(h.reshape(-1, h.shape[-1]).astype(mx.float32))
    scale = mx.ones((h.shape[-1],)) if norms is None else mx.square(norms)
    share = 1 / mx.maximum(squares @ scale, EPS * EPS)
    if weights is not None:
        share = share * weights.reshape(-1)
    return scale * (share @ squares)


def expert_energy(
    h: mx.array, experts: mx.array, count: int, norms: mx.array | None = None, weights: mx.array | None = None
) -> mx.array:
    """The energies of routed experts' neurons: the hidden vectors of each expert summed as by ``energy``.

    Args:
        h (mx.array): hidden vectors, [..., F], any float dtype.
        experts (mx.array): the expert of each of them, integers of any shape.
        count (int): E, how many experts there are.
        norms (mx.array, optional): output-weight norms [E, F] float32, for the signal impact; None for activation.
        weights (mx.array, optional): a weight for each hidden vector, of any shape.

    Returns:
        mx.array: [E, F] float32.
    """
    experts = experts.reshape(-1)
    squares = mx.square(h.reshape(-1, h.shape[-1]).astype(mx.float32))
    scale = None if norms is None else mx.square(norms)
    share = 1 / mx.maximum(mx.sum(squares if scale is None else squares * scale[experts], axis=-1), EPS * EPS)
    if weights is not None:
        share = share * weights.reshape(-1)
    # A product, not a scatter: on a GPU it adds up in the same order every time.
    own = mx.where(mx.arange(count)[:, None] == experts, share, 0.0)  # [E, vectors]
    energies = own @ squares
    return energies if scale is None else scale * energies


def output_norms(projection: nn.Module) -> mx.array:
    """Column norms ||W_out[:, j]||_2 of an output projection.

    Args:
        projection (nn.Module): an ``nn.Linear`` or ``nn.QuantizedLinear`` with weight [D, F], or routed experts
            [E, D, F].

    Returns:
        mx.array: [F] or [E, F] float32.
    """
    if projection.weight.ndim == 3:
        return _expert_norms(projection)
    outputs = projection.weight.shape[0]
    rows, squares = max(1, _AT_ONCE // input_size(projection)), 0.0
    for start in range(0, outputs, rows):
        part = slice_rows(projection, mx.arange(start, min(start + rows, outputs)))
        squares = squares + mx.sum(mx.square(dense_weight(part).astype(mx.float32)), axis=0)
        mx.eval(squares)  # else all of it is dequantised at once
    return mx.sqrt(squares)


def _expert_norms(projection: nn.Module) -> mx.array:
    count, outputs, _ = projection.weight.shape
    at_once, norms = max(1, _AT_ONCE // (outputs * input_size(projection))), []
    for start in range(0, count, at_once):
        part = dense_weight(slice_experts(projection, slice(start, start + at_once))).astype(mx.float32)
        norms.append(mx.sqrt(mx.sum(mx.square(part), axis=1)))
        mx.eval(norms[-1])
    return mx.concatenate(norms)


def dense_weight(projection: nn.Module) -> mx.array:
    """The weight of a linear layer, [out, in] or [E, out, in], dequantised if it is quantised."""
    if not is_quantised(projection):
        return projection.weight
    return mx.dequantize(
        projection.weight,
        projection.scales,
        projection.get("biases"),
        group_size=projection.group_size,
        bits=projection.bits,
        mode=projection.mode,
    )
