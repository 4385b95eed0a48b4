"""What the dropped neurons would have added, predicted from the block's input.

Most of what dropped neurons add to a block's output follows from its input x (what gate and up read) by a linear map of
low rank, so it need not vanish with them. With the hidden vector h, the output weights W, the kept neurons K and the
dropped ones S, a block computes

    y = W_K h_K + (x - mu) P (C_S W_S^T) + W_S (a_S + e_S)

mu and a are the means of x and h, and P [H, r] and C [r, F] the regression h ~ a + (x - mu) P C, all measured on text
of the model's own (``ranks/response.py``). e is by how much the prompt's mean of h differs from what they predict,
shrunk by ``SHRINKAGE`` tokens of zero. The first token of a text is in none of the means: its activations are huge.

P spans the directions that say most about what the dropped neurons add. With the covariances of x with itself, Cxx, and
with y_S = W_S h_S, Cxy, for the neurons S that global ranks drop, reduced-rank regression (Izenman 1975) gives
P = Cxx^-1 Cxy V_r, where V_r are the first eigenvectors of Cxy^T Cxx^-1 Cxy. C_S W_S^T is made for any kept set.
Routed experts share mu and P, the layer's, which are found for all of their outputs alike. Everything else is each
expert's own, of the tokens that are sent to it, and e is zero: a prompt sends most experts few tokens.
The form and its constants are this project's own, and measured. So is ranking neurons by the energy that this leaves of
them (:func:`unpredictable_share`).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

# Tokens without a difference that the prompt's mean difference is averaged with.
SHRINKAGE = 64
# What is added to the diagonal of Cxx, in parts of its mean.
RIDGE = 1e-2
# Tokens in which h did not follow from x, that the regression of h is made with.
UNRELATED = 8
# Up to this many inputs all eigenvectors are found; above it, the first ones by iteration.
_EXACT = 1024


@dataclass(frozen=True)
class Response:
    """How one block's hidden vector follows from its input. F are the neurons of all its experts.

    Attributes:
        input_mean (mx.array): mu, [H] float32.
        hidden_mean (mx.array): a, [F] float32.
        directions (mx.array): P, [H, r], in a 16-bit or 32-bit float type.
        coefficients (mx.array): C, [r, F].
        unpredictable (mx.array, optional): of each neuron's energy the share that does not follow from x, [F].
    """

    input_mean: mx.array
    hidden_mean: mx.array
    directions: mx.array
    coefficients: mx.array
    unpredictable: mx.array | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.directions.shape[1]

    def reader(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """[P, 0], [H, r + 1], and [-mu P, 1], [r + 1]: what an input's z = [(x - mu) P, 1] is computed with. Made once
        for each dtype."""
        made = self.__dict__.setdefault("_readers", {})
        if dtype not in made:
            directions = self.directions.astype(mx.float32)
            offset = mx.concatenate([-self.input_mean @ directions, mx.ones((1,))])
            directions = mx.concatenate([directions, mx.zeros((len(directions), 1))], axis=1)
            pair = directions.astype(dtype), offset.astype(dtype)
            mx.eval(pair)  # what is not evaluated belongs to this thread
            made[dtype] = pair
        return made[dtype]

    def predict(self, x: mx.array) -> mx.array:
        """The hidden vectors [..., F] (float32) that follow from inputs [..., H]."""
        z = (x.astype(mx.float32) - self.input_mean) @ self.directions.astype(mx.float32)
        return self.hidden_mean + z @ self.coefficients.astype(mx.float32)


@dataclass(frozen=True)
class Sums:
    """What a prompt's tokens add up to in one block.

    Attributes:
        hidden (mx.array): of the hidden vectors, [F] float32.
        inputs (mx.array): of the inputs, [H] float32.
        tokens (mx.array): how many they are, a scalar.
    """

    hidden: mx.array
    inputs: mx.array
    tokens: mx.array

    def __getitem__(self, rows: slice) -> Sums:
        """Those of some prompts, where the arrays have a leading axis of prompts."""
        return Sums(self.hidden[rows], self.inputs[rows], self.tokens[rows])


def mean_hidden(response: Response | None, sums: Sums | None) -> mx.array:
    """a + e (module docstring): the hidden vector [F] (float32) to expect where x is at its mean.

    Args:
        response (Response, optional): of the block. Without it a, P and C are zero.
        sums (Sums, optional): the prompt's. Without them e is zero.
    """
    if sums is None:
        return response.hidden_mean
    expected = mx.zeros_like(sums.hidden)
    if response is not None:
        tokens = mx.maximum(sums.tokens, 1)
        expected = response.predict(sums.inputs / tokens)
    e = (sums.hidden - sums.tokens * expected) / (sums.tokens + SHRINKAGE)
    return e if response is None else response.hidden_mean + e


def find_directions(inputs: np.ndarray, cross: np.ndarray, rank: int, ridge: float = RIDGE) -> np.ndarray:
    """P (module docstring), each direction scaled to a variance of 1, or to entries of 100 at most. Directions that say
    nothing are zero.

    Args:
        inputs (np.ndarray): Cxx, [H, H] float64.
        cross (np.ndarray): Cxy, [H, H] float64.
        rank (int): r; less where H is less.
        ridge (float): added to the diagonal of Cxx, in parts of its mean.

    Returns:
        np.ndarray: [H, r] float64.
    """
    size = len(inputs)
    load = ridge * np.trace(inputs) / size + np.finfo(np.float32).tiny
    solved = np.linalg.solve(inputs + load * np.eye(size), cross)
    directions = solved @ _first_eigenvectors(cross.T @ solved, min(rank, size))
    deviation = np.sqrt(np.maximum(np.einsum("hr,hr->r", directions, inputs @ directions), 0))
    said = deviation * np.linalg.norm(cross.T @ directions, axis=0)
    speaks = said > 1e-6 * said.max(initial=0)
    scale = np.maximum(deviation, np.abs(directions).max(axis=0) / 100)
    return np.where(speaks, directions / np.where(speaks, scale, 1), 0)


def find_coefficients(squares: np.ndarray, cross: np.ndarray, tokens: float = np.inf) -> np.ndarray:
    """C (module docstring): the regression of h on z = (x - mu) P, whose directions have a variance of about 1.

    Args:
        squares (np.ndarray): the covariance of z with itself, [r, r] float64.
        cross (np.ndarray): that of z with h, [r, F] float64.
        tokens (float): how many they are of; the fewer, the smaller C (``UNRELATED``).

    Returns:
        np.ndarray: [r, F] float64.
    """
    return np.linalg.lstsq(squares + (1e-6 + UNRELATED / tokens) * np.eye(len(squares)), cross, rcond=None)[0]


def unpredictable_share(
    energies: np.ndarray, means: np.ndarray, squares: np.ndarray, cross: np.ndarray, coefficients: np.ndarray
) -> np.ndarray:
    """E (h - prediction)^2 / E h^2 of each neuron, which is what dropping it still costs.

    Args:
        energies, means (np.ndarray): of h^2 and h, [F] float64.
        squares, cross (np.ndarray): as for :func:`find_coefficients`.
        coefficients (np.ndarray): C, [r, F].

    Returns:
        np.ndarray: [F] float64, from 0 to 1; 1 for neurons that never fired.
    """
    explained = np.einsum("rf,rf->f", coefficients, 2 * cross - squares @ coefficients)
    left = energies - np.square(means) - explained
    return np.clip(np.divide(left, energies, out=np.ones_like(left), where=energies > 0), 0, 1)


def _first_eigenvectors(matrix: np.ndarray, count: int) -> np.ndarray:
    """Those of a symmetric matrix [H, H] that belong to its largest eigenvalues, [H, count]."""
    size = len(matrix)
    if size <= _EXACT:
        return np.linalg.eigh((matrix + matrix.T) / 2)[1][:, ::-1][:, :count]
    # subspace iteration: what it confuses are directions of nearly equal worth
    block = np.linalg.qr(np.random.default_rng(0).standard_normal((size, min(size, count + 16))))[0]
    for _ in range(8):
        block = np.linalg.qr(matrix @ block)[0]
    values, vectors = np.linalg.eigh(block.T @ matrix @ block)
    return block @ vectors[:, np.argsort(-values)[:count]]
