"""What can choose the neurons of a prompt: GLASS, the methods that it is compared with, and bounds.

An *arm* is a function from the evidence of a batch of prompts to the neurons that it keeps in each block. To try
another one:

    def by_activation(evidence):
        return evidence.keep([rank(energy) for energy in evidence.local["activation"]])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from ..core.importance import dense_weight, output_norms
from ..core.ranking import kept_count, rank, select
from ..model.blocks import INTERLEAVED, Block
from ..model.glass_model import GlassModel


@dataclass
class Evidence:
    """What arms choose by. B prompts, F neurons in a block; lists have an entry for each block.

    Attributes:
        model (GlassModel): the model, with its ``blocks`` and ``global_ranks``.
        density (float): share of the neurons to keep.
        prompts (list[list[int]]): tokens of each prompt.
        local (dict): for each signal the prompts' energies, [B, F] float32.
        oracle (dict): for each signal the energies of what is said after the prompts, [B, F] float32. No method can
            know them.
        first (int): number of the first prompt among all of them.
    """

    model: GlassModel
    density: float
    prompts: list[list[int]]
    local: dict[str, list[mx.array]]
    oracle: dict[str, list[mx.array]]
    first: int = 0

    def keep(self, scores: list[mx.array]) -> list[mx.array]:
        """The neurons with the smallest scores (ranks or fused ranks).

        Args:
            scores (list[mx.array]): [B, F] integers, or [F] for all prompts alike.

        Returns:
            list[mx.array]: indices [B, k] int32, ascending.
        """
        blocks, kept = self.model.blocks, []
        for block, score in zip(blocks, scores):
            score = mx.broadcast_to(score, (len(self.prompts), block.size))
            if self.density == 1:
                kept.append(mx.broadcast_to(mx.arange(block.size, dtype=mx.int32), score.shape))
            else:
                kept.append(select(score, kept_count(self.density, block.size, block.group), block.group))
        return kept


# Kept neurons of each block, indices [B, k].
Arm = Callable[[Evidence], list[mx.array]]


def product(signal: str, global_weight: float | str, layer_budgets: str = "uniform") -> Arm:
    """The arm that decoding itself is: the choice of a session that read the prompt."""

    def choose(evidence: Evidence) -> list[mx.array]:
        model, chosen = evidence.model, []
        for b, prompt in enumerate(evidence.prompts):
            choice = {"global_weight": global_weight, "signal": signal, "layer_budgets": layer_budgets}
            cache = model.make_cache(density=evidence.density, **choice)
            model.session(cache).record(mx.concatenate([e[b] for e in evidence.local[signal]]), len(prompt))
            chosen.append(list(model.kept_neurons(cache).values()))
        return [mx.stack(rows) for rows in zip(*chosen)]

    return choose


def by_chance(evidence: Evidence) -> list[mx.array]:
    shapes = [(len(evidence.prompts), block.size) for block in evidence.model.blocks]
    keys = [mx.random.key(evidence.first * len(shapes) + i) for i in range(len(shapes))]
    return evidence.keep([rank(mx.random.uniform(shape=shape, key=key)) for shape, key in zip(shapes, keys)])


def by_magnitude(evidence: Evidence) -> list[mx.array]:
    return evidence.keep([rank(magnitude(block)) for block in evidence.model.blocks])


def by_oracle(evidence: Evidence) -> list[mx.array]:
    return evidence.keep([rank(energy) for energy in evidence.oracle["impact"]])


def magnitude(block: Block) -> mx.array:
    """The product of the norms of each neuron's input weights (rows of gate and up) and output weights (its column of
    down), [F] float32."""
    result = output_norms(block.module[block.output])
    for name in block.inputs:
        weight = dense_weight(block.module[name]).astype(mx.float32)
        norms = mx.sqrt(mx.sum(mx.square(weight), axis=1))
        if block.fused:  # gate and up of a neuron are two rows of one matrix
            norms = norms.reshape((-1, 2) if block.fused == INTERLEAVED else (2, -1))
            norms = mx.prod(norms, axis=1 if block.fused == INTERLEAVED else 0)
        result = result * norms
    return result


# By the names of the reports. Those of GLOBAL need global ranks.
GLOBAL = ("static", "glass-a", "glass-i")
ARMS = (
    *("dense", "random", "magnitude", "static", "griffin", "glass-a", "glass-i", "glass-uniform", "glass"),
    "oracle",
)


def standard_arms(weights: list[float]) -> dict[str, Arm]:
    """All arms by name, but ``dense``, which chooses nothing.

    Args:
        weights (list[float]): global weights of ``glass-a`` and ``glass-i``; where there are several, the weight is
            added to the name, ``glass-i 0.25`` say.
    """
    arms: dict[str, Arm] = {
        "random": by_chance,
        "magnitude": by_magnitude,
        "static": product("impact", 1.0),
        "griffin": product("activation", 0.0),
    }
    for name, signal in (("glass-a", "activation"), ("glass-i", "impact")):
        for weight in weights:
            arms[name if len(weights) == 1 else f"{name} {weight:g}"] = product(signal, weight)
    arms["glass-uniform"] = product("impact", "auto")
    return {**arms, "glass": product("impact", "auto", "measured"), "oracle": by_oracle}
