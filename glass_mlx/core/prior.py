"""What to expect after a prompt: the prompt's own evidence, and what the model is known to say after prompts like it.

A ranks file holds the energies of one or more *domains*: what the model says from BOS alone, what it answers as an
assistant, or a text of the user's. A prompt is a sample of n tokens from one of them, or of something new:

    weight of domain k     w_k ~ exp(s * mean over blocks of sum_j E_j log D_kj)      (Bayes, all alike beforehand)
    expected energy of j   E_j + m * sum_k w_k D_kj                                   (a pseudo-count of m tokens)

with E the prompt's energy (``importance.energy``, n in each block) and D_k the domain's mean per token (1 in each
block). Neurons are ranked by what is expected of them. How many tokens the domains are worth, m, depends on how well
they fit the prompt: the share of its energy that the better half of a domain's neurons holds, over what that half holds
of the domain's own energy. This is 1 on average for a prompt of the domain, however short, and lower for another.
Constants and forms are this project's, measured in README.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .ranking import kept_count, rank, select

# How much the evidence of the blocks, which repeat one another, counts more than that of one of them.
SHARPNESS = 2.0
# So many tokens' worth are the domains where they do not fit the prompt, up to a fit of the first number, and where
# they do, from the second one on.
PSEUDO_TOKENS = (4.0, 256.0)
FIT = (0.85, 0.95)
# A neuron that a domain never fires may fire in it all the same: so much of every domain is in each.
_SMOOTHING = 0.02


@dataclass
class Prior:
    """A model's domains, for one signal.

    Attributes:
        domains (list[mx.array]): for each FFN block the energies [K, F] float32 on each domain, with a sum of 1.
    """

    domains: list[mx.array]

    def __post_init__(self):
        self.blocks = len(self.domains)
        self._domains = mx.concatenate(self.domains, axis=1)
        mean = mx.mean(self._domains, axis=0, keepdims=True)
        self._logs = mx.log((1 - _SMOOTHING) * self._domains + _SMOOTHING * mean + 1e-12)
        self._better = mx.concatenate([_better_half(block) for block in self.domains], axis=1) / self.blocks
        mx.eval(self._domains, self._logs, self._better)

    def weights(self, energy: mx.array) -> mx.array:
        """How likely a prompt is of each domain, [K] float32 with a sum of 1, by its energy [sum of F]."""
        return mx.softmax(SHARPNESS / self.blocks * (self._logs @ energy))

    def fit(self, energy: mx.array) -> mx.array:
        """How well each domain fits a prompt, [K] float32, by its energy [sum of F]."""
        return (self._better @ energy) / mx.maximum(mx.sum(energy) / self.blocks, 1e-12)

    def tokens(self, energy: mx.array) -> mx.array:
        """How many tokens the domains are worth after a prompt, a scalar, by its energy [sum of F]."""
        low, high = PSEUDO_TOKENS
        trust = mx.clip((mx.sum(self.weights(energy) * self.fit(energy)) - FIT[0]) / (FIT[1] - FIT[0]), 0, 1)
        return low + (high - low) * mx.square(trust)

    def expected(self, energy: mx.array | None) -> mx.array:
        """What is expected of each neuron after a prompt, [sum of F] float32, by its energy; without any, of a token of
        whatever domain."""
        if energy is None:
            return mx.mean(self._domains, axis=0)
        return energy + self.tokens(energy) * (self.weights(energy) @ self._domains)


def _better_half(energies: mx.array) -> mx.array:
    """For each domain of a block [K, F], 1 over the share of the better half of the neurons, at these; 0 at others."""
    best = select(rank(energies), kept_count(0.5, energies.shape[1]))
    half = mx.put_along_axis(mx.zeros(energies.shape), best, mx.array(1.0), axis=1)
    shares = mx.sum(half * energies, axis=1, keepdims=True) / mx.sum(energies, axis=1, keepdims=True)
    return half / shares
