"""What can choose the neurons of a prompt: GLASS, the methods that it is compared with, and bounds.

A *selector* is a function from the evidence of a batch of prompts to the neurons that it keeps in each block. To try
another one:

    def by_activation(evidence):
        return evidence.keep_best(evidence.local["activation"])

The option ``--arms`` of ``evaluate`` and the key ``arms`` of its JSON mean selectors; they keep the name because
scripts rely on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

from ..core.compensation import Sums
from ..core.importance import dense_weight, output_norms
from ..core.ranking import kept_count, rank, select
from ..errors import GlassError
from ..model.blocks import INTERLEAVED, Block
from ..model.glass_model import GlassModel
from .names import GLOBAL


@dataclass
class Evidence:
    """What selectors choose by, for B prompts and F neurons in a block. Lists have an entry for each block.

    Attributes:
        model (GlassModel): the model, with its ``blocks`` and ``global_ranks``.
        density (float): share of the neurons to keep.
        prompts (list[list[int]]): the tokens of each prompt.
        local (dict): for each signal the energies of the prompts, [B, F] float32.
        oracle (dict): for each signal the energies of the continuations, [B, F] float32, which no method can know.
        sums (list[Sums]): what the prompts' tokens but the first add up to, with a leading axis B.
        first (int): the number of the first prompt among all prompts.
    """

    model: GlassModel
    density: float
    prompts: list[list[int]]
    local: dict[str, list[mx.array]]
    oracle: dict[str, list[mx.array]]
    sums: list[Sums] = field(default_factory=list)
    first: int = 0

    def keep(self, scores: list[mx.array]) -> list[mx.array]:
        """The neurons with the smallest scores (ranks or fused ranks), as many of each expert.

        Args:
            scores (list[mx.array]): [B, F] integers, or [F] to score all prompts alike.

        Returns:
            list[mx.array]: indices [B, k] int32, ascending.
        """
        blocks, kept = self.model.blocks, []
        for block, score in zip(blocks, scores):
            score = mx.broadcast_to(score, (len(self.prompts), block.size))
            if self.density == 1 or (block.experts and self.model.config.experts == "dense"):
                kept.append(mx.broadcast_to(mx.arange(block.size, dtype=mx.int32), score.shape))
            else:
                k = kept_count(self.density, block.width, block.group)
                kept.append(block.joined(select(block.by_expert(score), k, block.group)))
        return kept

    def keep_best(self, importance: list[mx.array]) -> list[mx.array]:
        """The most important neurons by ``importance``, [B, F] or [F] for each block; returned as by ``keep``."""
        scores = []
        for block, values in zip(self.model.blocks, importance):
            scores.append(rank(block.by_expert(values)).reshape(values.shape))
        return self.keep(scores)


# Gives the kept neurons of each block, indices [B, k].
Selector = Callable[[Evidence], list[mx.array]]


def standard_selectors(weights: list[float]) -> dict[str, Selector]:
    """All selectors by name, except ``dense``, which chooses nothing.

    Args:
        weights (list[float]): global weights of ``glass-a`` and ``glass-i``; several are added to the names:
            ``glass-i 0.25``, say.
    """
    selectors: dict[str, Selector] = {
        "random": by_chance,
        "magnitude": by_magnitude,
        "static": by_session("impact", 1.0),
        "griffin": by_session("activation", 0.0),
    }
    for name, signal in (("glass-a", "activation"), ("glass-i", "impact")):
        for weight in weights:
            selectors[name if len(weights) == 1 else f"{name} {weight:g}"] = by_session(signal, weight)
    selectors["expected"] = by_session("impact", "auto")
    selectors["griffin+"] = by_session("activation", 0.0, compensation=True)
    selectors["glass-i+"] = by_session("impact", 0.5, compensation=True)
    selectors["glass-uniform"] = by_session("impact", "auto", compensation=True)
    selectors["glass"] = by_session("impact", "auto", "measured", compensation=True)
    return {**selectors, "oracle": by_oracle}


def is_compensated(choose: Selector) -> bool:
    """Whether what a selector's dropped neurons would add is predicted."""
    return getattr(choose, "compensated", False)


def choose_selectors(names: list[str] | None, weights: list[float | str], has_statistics: bool) -> dict[str, Selector]:
    """The selectors with these names.

    Args:
        names (list[str], optional): of ``names.SELECTORS``. Default: all that the model has what they need for.
        weights (list): global weights of ``glass-a`` and ``glass-i``. ``auto`` is left out: ``glass`` has it.
        has_statistics (bool): whether the model has global statistics.

    Raises:
        GlassError: a name needs global statistics, and there are none.
    """
    standard = standard_selectors([w for w in weights if w != "auto"])
    chosen = {name: by for name, by in standard.items() if names is None or name.split()[0] in names}
    missing = [] if has_statistics else [name for name in chosen if name.split()[0] in GLOBAL]
    if missing and names is not None:
        raise GlassError(f"There are no global ranks for this model, and {missing[0]} needs them: build some first.")
    return {name: by for name, by in chosen.items() if name not in missing}


def by_session(
    signal: str, global_weight: float | str, layer_budgets: str = "uniform", compensation: bool = False
) -> Selector:
    """What decoding itself does: the choice of a session that has read the prompt. With ``compensation``, what the
    dropped neurons would add is predicted (``core/compensation.py``)."""
    choice = {"global_weight": global_weight, "signal": signal, "layer_budgets": layer_budgets}

    def choose(evidence: Evidence) -> list[mx.array]:
        model, chosen = evidence.model, []
        for b, prompt in enumerate(evidence.prompts):
            cache = model.make_cache(density=evidence.density, compensation=compensation, **choice)
            model.session(cache).record(mx.concatenate([e[b] for e in evidence.local[signal]]), len(prompt))
            chosen.append(list(model.kept_neurons(cache).values()))
        return [mx.stack(rows) for rows in zip(*chosen)]

    choose.compensated = compensation
    return choose


def by_chance(evidence: Evidence) -> list[mx.array]:
    """Random neurons, the same for the same prompt number."""
    shapes = [(len(evidence.prompts), block.size) for block in evidence.model.blocks]
    keys = [mx.random.key(evidence.first * len(shapes) + i) for i in range(len(shapes))]
    return evidence.keep_best([mx.random.uniform(shape=shape, key=key) for shape, key in zip(shapes, keys)])


def by_magnitude(evidence: Evidence) -> list[mx.array]:
    """The neurons with the largest weights (:func:`magnitude`), whatever the prompt."""
    return evidence.keep_best([magnitude(block) for block in evidence.model.blocks])


def by_oracle(evidence: Evidence) -> list[mx.array]:
    """The neurons that matter most to the continuation itself: a bound that no method can reach."""
    return evidence.keep_best(evidence.oracle["impact"])


def magnitude(block: Block) -> mx.array:
    """The product of the norms of each neuron's input weights (rows of gate and up) and output weights (its column of
    down), [F] float32."""
    result = output_norms(block.module[block.output]).reshape(-1)
    for name in block.inputs:
        weight = dense_weight(block.module[name]).astype(mx.float32)
        norms = mx.sqrt(mx.sum(mx.square(weight), axis=-1)).reshape(-1)
        if block.fused:  # a neuron's gate and up are two rows of one matrix
            norms = norms.reshape((-1, 2) if block.fused == INTERLEAVED else (2, -1))
            norms = mx.prod(norms, axis=1 if block.fused == INTERLEAVED else 0)
        result = result * norms
    return result
