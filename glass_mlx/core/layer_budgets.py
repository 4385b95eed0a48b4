"""How many neurons each block keeps, at one density for the whole model.

A neuron that is left out costs what the model's output suffers by it, and that differs much between layers. A ranks
file says how sensitive the output is to each block (``sensitivity.py``): KL nats per share of the block's energy that
is lost, measured by leaving out the worse half of its neurons. Losses of all blocks add up, and grow faster than the
share that is lost:

    cost = sum over blocks of s * lost^p / lost_half^(p - 1)

with lost_half the share that the worse half holds. The best k neurons of all are found one by one, since every further
one of a block saves less. Only their number in each block is taken from this, so that shapes depend on nothing but the
model and the density.
"""

from __future__ import annotations

import numpy as np

from .ranking import kept_count
from .slicing import UNIT

# p above. With 1, models of many layers give too little to the less sensitive ones.
POWER = 1.75
# No block keeps less than this share of the density, however little it seems to matter.
FLOOR = 1 / 8


def uniform(density: float, sizes: list[int], groups: list[int]) -> list[int]:
    """The same share of every block's neurons; ``groups`` as in ``ranking.select``."""
    return [size if density == 1 else kept_count(density, size, group) for size, group in zip(sizes, groups)]


def cost(energy: np.ndarray, sensitivity: float) -> np.ndarray:
    """What a block costs (module docstring) with its best 0, 1, ..., F neurons kept, [F + 1]; energies [F]."""
    best = np.sort(energy.astype(np.float64))[::-1] / np.sum(energy, dtype=np.float64)
    lost = np.append(np.cumsum(best[::-1])[::-1], 0.0)
    half = max(lost[len(best) // 2], np.finfo(np.float64).tiny)
    return sensitivity * lost * (lost / half) ** (POWER - 1)


def allocate(density: float, energies: list[np.ndarray], sensitivity: list[float], groups: list[int]) -> list[int]:
    """Neurons to keep in each block, density * sum of F in all, at the least cost.

    Args:
        density (float): in (0, 1].
        energies (list[np.ndarray]): each block's energies [F].
        sensitivity (list[float]): of each block, not negative.
        groups (list[int]): how each block's neurons can be kept (``Block.group``).

    Returns:
        list[int]: counts, each at least ``FLOOR`` * density * F, and a multiple of ``UNIT`` where there are groups.
    """
    sizes = [len(e) for e in energies]
    if density == 1 or not any(sensitivity):
        return uniform(density, sizes, groups)
    floors = uniform(FLOOR * density, sizes, groups)
    saved, owners, widths = [], [], []
    for i, (energy, weight, group, floor) in enumerate(zip(energies, sensitivity, groups, floors)):
        step = 1 if group == 1 else UNIT
        steps = -np.diff(cost(energy, weight)[floor::step]) / step
        saved.append(steps)
        owners.append(np.full(len(steps), i))
        widths.append(np.full(len(steps), step))
    saved, owners, widths = np.concatenate(saved), np.concatenate(owners), np.concatenate(widths)
    order = np.argsort(-saved, kind="stable")
    taken = order[np.cumsum(widths[order]) <= round(density * sum(sizes)) - sum(floors)]
    extra = np.bincount(owners[taken], weights=widths[taken], minlength=len(sizes))
    return [floor + int(more) for floor, more in zip(floors, extra)]
