"""How strongly each FFN neuron fires: the evidence that GLASS ranks neurons by.

A block's hidden vector h_t is the input of its output projection at token t. Its evidence is kept as an energy,
the square of the importance, because energies of chunks, turns and sequences simply add up:

    activation   E_j = sum_t (h_tj / max(||h_t||, eps))^2
    impact       the same with g_tj = h_tj * ||W_out[:, j]|| in place of h_tj

The importance of the GLASS and GRIFFIN papers (arXiv 2508.14302, 2404.01365) is A_j = sqrt(E_j), which ranks alike.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

SIGNALS = ("impact", "activation")
EPS = 1e-6


@mx.compile
def _shares(h: mx.array) -> mx.array:
    squares = mx.square(h.astype(mx.float32))
    total = mx.sum(squares, axis=-1, keepdims=True)
    return squares / mx.maximum(total, EPS * EPS)


def token_shares(h: mx.array, norms: mx.array | None = None) -> mx.array:
    """Each neuron's share of a token's energy.

    Args:
        h (mx.array): hidden vectors, [..., F], any float dtype.
        norms (mx.array, optional): output-weight norms [F] float32; given for impact, not for activation.

    Returns:
        mx.array: [..., F] float32, non-negative, summing to 1 over the neurons (to 0 where h is zero).
    """
    return _shares(h if norms is None else h.astype(mx.float32) * norms)


def energy(h: mx.array, norms: mx.array | None = None, weights: mx.array | None = None) -> mx.array:
    """The energy E_j (module docstring) of hidden vectors, summed over all their tokens.

    Args:
        h (mx.array): hidden vectors, [..., F], any float dtype.
        norms (mx.array, optional): output-weight norms [F] float32; given for impact, not for activation.
        weights (mx.array, optional): a weight for each token, in any shape; 0 leaves a token out.

    Returns:
        mx.array: [F] float32.
    """
    shares = token_shares(h, norms)
    if weights is not None:
        shares = shares * weights.reshape(*h.shape[:-1], 1)
    return mx.sum(shares.reshape(-1, shares.shape[-1]), axis=0)


def output_norms(projection: nn.Module) -> mx.array:
    """Column norms ||W_out[:, j]||_2 of an output projection.

    Args:
        projection (nn.Module): an ``nn.Linear`` or ``nn.QuantizedLinear`` with weight [D, F].

    Returns:
        mx.array: [F] float32.
    """
    weight = dense_weight(projection).astype(mx.float32)
    return mx.sqrt(mx.sum(mx.square(weight), axis=0))


def dense_weight(projection: nn.Module) -> mx.array:
    """The weight of a linear layer, [out, in], dequantised if it is quantised."""
    if not isinstance(projection, nn.QuantizedLinear):
        return projection.weight
    return mx.dequantize(
        projection.weight,
        projection.scales,
        projection.get("biases"),
        group_size=projection.group_size,
        bits=projection.bits,
        mode=projection.mode,
    )
