"""Sampling: what its settings mean at their edges, and for verified decoding common random numbers."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, apply_xtc, greedy_sampler

_COLDEST = 1e-5  # below it, one over the temperature leaves the range of 16-bit numbers, and rounding decides


def effective_temperature(temp: float, top_p: float) -> float:
    """The temperature for mlx-lm's samplers, which take ``top_p`` 0 as no limit: the most likely token is meant.

    Args:
        temp (float): the temperature asked for.
        top_p (float): the probability to sample from, in [0, 1].
    """
    return temp if temp >= _COLDEST and top_p > 0 else 0.0


class CommonRandomNumbers:
    """Random numbers by the place of a token in the answer (common random numbers, as in simulation).

    What is sampled at a place depends neither on what was drafted nor on timing, so a seed makes an answer
    reproducible. And a draft and its check, each a sample of its own distribution, agree more often than two
    independent samples.
    """

    def __init__(self):
        self._start = mx.random.randint(0, 2**31 - 1).item() << 20

    def at(self, place: int) -> None:
        """Set MLX's global random state to that of a place in the answer."""
        mx.random.seed(self._start + place)


def make_sampler(
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    xtc_special_tokens: list[int] | None = None,
) -> Callable[[mx.array], mx.array]:
    """A sampler with the arguments and the distribution of ``mlx_lm.sample_utils.make_sampler``, by Gumbel noise.

    By the same noise two distributions at total variation d give the same token with probability (1 - d) / (1 + d) or
    more. MLX's own ``categorical`` searches in the summed-up probabilities, where a little more for one token shifts
    all that follow it.
    """
    if temp == 0:
        return greedy_sampler
    filters: list[Callable[[mx.array], mx.array]] = []
    if 0 < top_p < 1:
        filters.append(lambda x: apply_top_p(x, top_p))
    if min_p != 0:
        filters.append(lambda x: apply_min_p(x, min_p, min_tokens_to_keep))
    if xtc_probability > 0:
        filters.append(lambda x: apply_xtc(x, xtc_probability, xtc_threshold, xtc_special_tokens or []))
    if top_k > 0:
        filters.append(lambda x: apply_top_k(x, top_k))

    def sample(logprobs: mx.array) -> mx.array:
        for keep in filters:
            logprobs = keep(logprobs)
        return mx.argmax(logprobs / temp + mx.random.gumbel(logprobs.shape), axis=-1)

    return sample
