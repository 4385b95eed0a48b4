"""What to expect after a prompt: the prompt's own evidence, combined with what the model generates after similar text.

Global statistics hold the energies of one or more *domains*: what the model generates from BOS alone, what it answers
as an assistant, or a text of the user's. A prompt is a sample of n tokens from one of them, or of something new:

    weight of domain k     w_k ~ exp(s * mean over blocks of sum_j E_j log D_kj)      (Bayes, with equal priors)
    expected energy of j   E_j + m * sum_k w_k D_kj                                   (a pseudo-count of m tokens)

E is the prompt's energy (``importance.energy``, summing to n per block) and D_k the domain's mean per token (summing
to 1 per block). Neurons are ranked by their expected energy. How many tokens the domains are worth, m, depends on
how well they fit the prompt: the share of the prompt's energy that the better half of a domain's neurons holds, divided
by the share that this half holds of the domain's own energy. It averages 1 for a prompt from the domain, however short,
and less for any other. Constants and forms are this project's own and were measured.

A block of routed experts shares the energy of a token among the experts that it is routed to, a of them: a prompt that
sent an expert n_e tokens left n_e / a there. What is chosen are neurons within each expert, so each has an expectation
of its own: its domains are worth m tokens of that expert, whatever their share of the routing is. An expert that saw
none of the prompt is decided by its domains alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx

from .ranking import kept_count, rank, select

# The evidence of the blocks repeats itself, so all of it together counts as much as that of this many blocks.
SHARPNESS = 2.0
# How many tokens the domains are worth where they do not fit the prompt, and where they do.
PSEUDO_TOKENS = (4.0, 256.0)
# Up to which fit they do not, and from which fit on they do.
FIT = (0.85, 0.95)
# A neuron that never fires in a domain may still fire after a prompt from it: each gets this share of all domains.
_SMOOTHING = 0.02


@dataclass
class Prior:
    """A model's domains, for one signal.

    Attributes:
        domains (list[mx.array]): for each FFN block the energies [K, F] float32 in each domain; rows sum to 1. F are
            the neurons of all experts.
        experts (list[tuple[int, int]], optional): for each block how many routed experts it has, and how many of them
            a token is routed to; (1, 1) for a dense block. Default: all are dense.
    """

    domains: list[mx.array]
    experts: list[tuple[int, int]] | None = None

    def __post_init__(self):
        self.blocks = len(self.domains)
        self.experts = self.experts or [(1, 1)] * self.blocks
        self._domains = mx.concatenate(self.domains, axis=1)
        mean = mx.mean(self._domains, axis=0, keepdims=True)
        self._logs = mx.log((1 - _SMOOTHING) * self._domains + _SMOOTHING * mean + 1e-12)
        self._better = mx.concatenate(list(map(_better_half, self.domains, self.experts)), axis=1) / self.blocks
        mx.eval(self._domains, self._logs, self._better)

    def weights(self, energy: mx.array) -> mx.array:
        """The probability [K] (float32) that a prompt with this energy [sum of F] is from each domain."""
        return mx.softmax(SHARPNESS / self.blocks * (self._logs @ energy))

    def fit(self, energy: mx.array) -> mx.array:
        """How well each domain fits a prompt with this energy [sum of F]: [K] float32, near 1 for a good fit."""
        return (self._better @ energy) / mx.maximum(mx.sum(energy) / self.blocks, 1e-12)

    def tokens(self, energy: mx.array) -> mx.array:
        """How many tokens of evidence the domains are worth after a prompt with this energy [sum of F]; a scalar."""
        low, high = PSEUDO_TOKENS
        trust = mx.clip((mx.sum(self.weights(energy) * self.fit(energy)) - FIT[0]) / (FIT[1] - FIT[0]), 0, 1)
        return low + (high - low) * mx.square(trust)

    def posterior_energy(self, energy: mx.array | None) -> mx.array:
        """The expected energy [sum of F] (float32) after a prompt with this energy [sum of F].

        Without a prompt's energy it is the mean over the domains.
        """
        if energy is None:
            return mx.mean(self._domains, axis=0)
        return energy + self.tokens(energy) * self._token(self.weights(energy) @ self._domains)

    def _token(self, energy: mx.array) -> mx.array:
        """The energy [sum of F] of a token of a mixture of domains, routed to every expert."""
        if all(count == 1 for count, _ in self.experts):
            return energy
        blocks = mx.split(energy, list(accumulate(block.shape[1] for block in self.domains))[:-1])
        return mx.concatenate([_each_expert(*block) for block in zip(blocks, self.experts)])


def _each_expert(energy: mx.array, experts: tuple[int, int]) -> mx.array:
    """The energy [F] of a block, scaled to what a token leaves in each of its experts."""
    count, active = experts
    if count == 1:
        return energy
    rows = energy.reshape(count, -1)
    return (rows / mx.maximum(active * mx.sum(rows, axis=1, keepdims=True), 1e-12)).reshape(-1)


def _better_half(energies: mx.array, experts: tuple[int, int]) -> mx.array:
    """For each domain of a block [K, F]: 1 / (the share of the energy that the better half of every expert's neurons
    holds) at these neurons, 0 elsewhere."""
    rows = energies.reshape(len(energies), experts[0], -1)
    best = select(rank(rows), kept_count(0.5, rows.shape[2]))
    half = mx.put_along_axis(mx.zeros(rows.shape), best, mx.array(1.0), axis=2).reshape(energies.shape)
    shares = mx.sum(half * energies, axis=1, keepdims=True) / mx.sum(energies, axis=1, keepdims=True)
    return half / shares
