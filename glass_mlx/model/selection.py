"""Which neurons a conversation keeps: chosen by its evidence and by what is known of the model.

    evidence + global statistics -> scores -> layer budgets -> kept neurons

All of it stays on the device, and the number of neurons kept depends on nothing but the model and the configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import mlx.core as mx
import numpy as np

from ..core.layer_budgets import measured_budgets, uniform_budgets
from ..core.prior import Prior
from ..core.ranking import fuse, keep_order, rank
from ..core.slicing import UNIT
from ..errors import GlassError
from .config import GlassConfig


@dataclass(frozen=True)
class BlockShape:
    """What the choice of neurons must know of a block.

    Attributes:
        size: F, the neurons of all its experts, expert by expert. As many of each are kept.
        group: how many neurons share a quantisation group (``Block.group``).
        step: how many neurons are kept is a multiple of this (``Block.step``).
        experts: how many routed experts it has; 1 if it is dense.
        active: how many of them a token is routed to.
    """

    size: int
    group: int = 1
    step: int = 1
    experts: int = 1
    active: int = 1


@dataclass(frozen=True)
class Measured:
    """What was measured of a model's neurons once, for the choice among them.

    Attributes:
        ranks: for each signal the global ranks [F] of every block, those of routed experts within each of them; None
            without global statistics.
        domains: for each signal the energies [K, F] of every block on each kind of text that the ranks come from.
            Without: made from the ranks, with half the energy at twice the rank.
        sensitivity: of every block (``ranks/sensitivity.py``). Without: all alike.
        unpredictable: of every block the share [F] of each neuron's energy that is lost with it where dropped neurons
            are answered for (``core/compensation.py``). Without, or None: all of it.
    """

    ranks: dict[str, list[mx.array]] | None = None
    domains: dict[str, list[mx.array]] | None = None
    sensitivity: list[float] | None = None
    unpredictable: list[mx.array | None] | None = None

    def of(self, signal: str) -> Measured:
        """What of it is of one signal, or of none."""
        ranks, domains = ({signal: values[signal]} if values else None for values in (self.ranks, self.domains))
        return replace(self, ranks=ranks, domains=domains)


NOTHING = Measured()


class NeuronSelector:
    """Chooses neurons for one model.

    Attributes:
        shapes: of the model's blocks.
        measured: what is known of the model.
    """

    def __init__(
        self,
        shapes: list[BlockShape],
        measured: Measured = NOTHING,
        counts: Callable[[GlassConfig], list[int]] | None = None,
    ):
        """
        Args:
            shapes (list[BlockShape]): of the model's blocks.
            measured (Measured, optional): of them. Default: nothing.
            counts (callable, optional): says how many neurons each block keeps, as :meth:`counts`. Default: the blocks
                and their sensitivity do.
        """
        self.shapes, self.measured, self._given_counts = shapes, measured, counts
        ranks = measured.ranks or {}
        domains = measured.domains or {signal: [_shares(r) for r in rs] for signal, rs in ranks.items()}
        experts = [(shape.experts, shape.active) for shape in shapes]
        self._priors = {signal: Prior(rows, experts) for signal, rows in domains.items()}
        self._counts: dict[tuple[float, str, str], list[int]] = {}

    @property
    def sizes(self) -> list[int]:
        """F of each block."""
        return [shape.size for shape in self.shapes]

    def of(self, shapes: list[BlockShape]) -> NeuronSelector:
        """The selector of the same model with other blocks: what is known of it goes along where they have the same
        neurons."""
        if [(s.size, s.experts) for s in shapes] != [(s.size, s.experts) for s in self.shapes]:
            return NeuronSelector(shapes)
        return NeuronSelector(shapes, self.measured, self._given_counts)

    def counts(self, config: GlassConfig) -> list[int]:
        """How many neurons each block keeps: density * F, rounded to what the block can be cut into; or, with the
        budgets ``"measured"`` and where sensitivities are known, as many in all (``core/layer_budgets.py``). Routed
        experts that are to stay dense keep all of theirs."""
        key = (config.density, config.layer_budgets, config.experts)
        if key not in self._counts and self._given_counts is not None:
            self._counts[key] = self._given_counts(config)
        elif key not in self._counts:
            sparse = [i for i, s in enumerate(self.shapes) if s.experts == 1 or config.experts == "sparse"]
            self._counts[key] = self.sizes
            for i, count in zip(sparse, self._budgets(config, sparse)):
                self._counts[key][i] = count
        return self._counts[key]

    def _budgets(self, config: GlassConfig, members: list[int]) -> list[int]:
        """How many neurons some of the blocks keep, if the density holds for these."""
        sizes, steps = [self.sizes[i] for i in members], [self.shapes[i].step for i in members]
        sensitivity = self.measured.sensitivity
        if sensitivity is None or config.layer_budgets == "uniform" or not members:
            return uniform_budgets(config.density, sizes, steps)
        energies = self.by_block(self._priors["impact"].posterior_energy(None))
        known = [(np.array(energies[i]), sensitivity[i]) for i in members]
        return measured_budgets(config.density, *map(list, zip(*known)), steps)

    def keeps_all(self, config: GlassConfig) -> bool:
        """Whether every block keeps all of its neurons."""
        return config.density == 1 or self.counts(config) == self.sizes

    def choose(self, config: GlassConfig, energy: mx.array | None, prompt_tokens: int) -> list[mx.array]:
        """The neurons to keep.

        Args:
            config (GlassConfig): how to choose.
            energy (mx.array, optional): the evidence, [sum of F] float32.
            prompt_tokens (int): how many tokens it is from.

        Returns:
            list[mx.array]: for each block the kept neurons [k] int32, ascending.

        Raises:
            GlassError: there is nothing to choose by.
        """
        kept = [mx.arange(size, dtype=mx.int32) for size in self.sizes]
        if self.keeps_all(config):
            return kept
        counts = self.counts(config)
        scores = self._scores(config, energy, prompt_tokens)
        chosen = [i for i, count in enumerate(counts) if count < self.sizes[i]]
        for shape, members in self._alike(chosen).items():  # blocks of one shape at once
            first = mx.arange(0, shape.size, shape.size // shape.experts, dtype=mx.int32)[:, None]  # of each expert
            for i, order in zip(members, keep_order(scores(members), shape.group)):
                kept[i] = (mx.sort(order[:, : counts[i] // shape.experts], axis=-1) + first).reshape(-1)
        return kept

    def fits(self, kept: list[mx.array], config: GlassConfig) -> bool:
        """Whether neurons [k] that were kept elsewhere, in a file say, can be kept in these blocks."""
        counts = self.counts(config)
        if [(k.shape, k.dtype) for k in kept] != [((count,), mx.int32) for count in counts]:
            return False
        for neurons, shape in zip(map(np.array, kept), self.shapes):
            if neurons[0] < 0 or neurons[-1] >= shape.size or (np.diff(neurons) <= 0).any():
                return False
            owners = neurons.reshape(shape.experts, -1) // (shape.size // shape.experts)
            if (owners != np.arange(shape.experts)[:, None]).any():
                return False
            units = neurons.reshape(-1, UNIT) // shape.group if shape.group > 1 else neurons[:, None]
            if (units != units[:, :1]).any():
                return False
        return True

    def global_weight(self, config: GlassConfig, energy: mx.array | None, prompt_tokens: int) -> float:
        """How much what is known of the model counts in a choice against the prompt, in [0, 1].

        It is the configured weight; with ``"auto"``, the global statistics' share of the tokens that the expectation
        rests on. It is 0 without global statistics, and 1 where nothing, or a single token, is known of the prompt.
        """
        weight = self._weight(config, energy, prompt_tokens)
        if weight != "auto":
            return weight
        if energy is None:
            return 1.0
        tokens = self._priors[config.signal].tokens(energy)
        return (tokens / (tokens + mx.sum(energy) / len(self.shapes))).item()

    def by_block(self, energy: mx.array) -> list[mx.array]:
        """Evidence [sum of F], block by block."""
        return mx.split(energy, list(accumulate(self.sizes))[:-1])

    def _scores(self, config: GlassConfig, energy: mx.array | None, prompt_tokens: int) -> Callable:
        """A function from indices of blocks of one shape to their neurons' scores within each expert [blocks, experts,
        F / experts]: integers, smaller is better."""
        prior = self._priors.get(config.signal)
        if prior is None and energy is None:
            raise GlassError("No neurons can be chosen yet: prefill a prompt first, or load global ranks.")
        weight = self._weight(config, energy, prompt_tokens)
        if weight == "auto":
            expected = self.by_block(prior.posterior_energy(energy))
            if config.compensation and self.measured.unpredictable is not None:
                shares = (1.0 if share is None else share for share in self.measured.unpredictable)
                expected = [e * share for e, share in zip(expected, shares)]
            return lambda members: rank(self._stack(expected, members))
        ranks = self.measured.ranks and self.measured.ranks[config.signal]
        if weight == 1:
            return lambda members: self._stack(ranks, members)
        local = self.by_block(energy)

        def fused(members: list[int]) -> mx.array:
            own = self._stack(local, members)
            if ranks is None:
                return rank(own)
            known = self._stack(ranks, members)
            # an expert that saw nothing of the prompt is chosen by what is known of the model alone
            own = mx.where(mx.any(own > 0, axis=-1, keepdims=True), rank(own), known)
            return own if weight == 0 else fuse(own, known, weight)

        return fused

    def _stack(self, values: list[mx.array], members: list[int]) -> mx.array:
        """Values [F] of blocks of one shape, [blocks, experts, F / experts]."""
        return mx.stack([values[i].reshape(self.shapes[i].experts, -1) for i in members])

    def _weight(self, config: GlassConfig, energy: mx.array | None, prompt_tokens: int) -> float | str:
        """The configured global weight, as far as there is something to weigh."""
        if not self._priors:
            return 0.0
        if config.global_weight == "auto":
            return "auto"
        alone = energy is None or (prompt_tokens <= 1 and config.global_weight > 0)
        return 1.0 if alone else float(config.global_weight)

    def _alike(self, members: list[int]) -> dict[BlockShape, list[int]]:
        """Indices of blocks by their shape."""
        alike: dict[BlockShape, list[int]] = {}
        for i in members:
            alike.setdefault(self.shapes[i], []).append(i)
        return alike


def _shares(ranks: mx.array) -> mx.array:
    """Energies [1, F] that would rank like this."""
    shares = 1 / ranks.astype(mx.float32)
    return (shares / mx.sum(shares))[None]
