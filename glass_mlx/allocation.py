"""How many neurons each block keeps, at one density for the whole model.

A neuron that is left out costs what the model's output suffers by it, and that differs much between layers. A ranks
file says how sensitive the output is to each block (``sensitivity.py``): KL nats per share of the block's energy that
is lost. If losses add up, the best k neurons of all are those with the largest sensitivity times energy. Only their
number in each block is taken from this, so that shapes depend on nothing but the model and the density.
"""

from __future__ import annotations

import numpy as np

from .ranking import kept_count
from .slicing import UNIT

# No block keeps less than this share of the density, however little it seems to matter.
FLOOR = 1 / 8


def uniform(density: float, sizes: list[int], groups: list[int]) -> list[int]:
    """The same share of every block's neurons; ``groups`` as in ``ranking.select``."""
    return [size if density == 1 else kept_count(density, size, group) for size, group in zip(sizes, groups)]


def allocate(density: float, energies: list[np.ndarray], sensitivity: list[float], groups: list[int]) -> list[int]:
    """Neurons to keep in each block, density * sum of F in all, so that the least is lost.

    Args:
        density (float): in (0, 1].
        energies (list[np.ndarray]): each block's energies [F], with a sum of 1.
        sensitivity (list[float]): of each block, not negative.
        groups (list[int]): how each block's neurons can be kept (``Block.group``).

    Returns:
        list[int]: counts, each at least ``FLOOR`` * density * F, and a multiple of ``UNIT`` where there are groups.
    """
    sizes = [len(e) for e in energies]
    if density == 1 or not any(sensitivity):
        return uniform(density, sizes, groups)
    floors = uniform(FLOOR * density, sizes, groups)
    gains, owners = [], []
    for i, (energy, weight, group, floor) in enumerate(zip(energies, sensitivity, groups, floors)):
        step = 1 if group == 1 else UNIT
        best = np.sort(energy.astype(np.float64))[::-1][floor:]
        steps = best[: len(best) // step * step].reshape(-1, step).mean(axis=1)
        gains.append(steps * weight)
        owners.append(np.full(len(steps), i))
    gains, owners = np.concatenate(gains), np.concatenate(owners)
    widths = np.array([1 if group == 1 else UNIT for group in groups])[owners]
    order = np.argsort(-gains, kind="stable")
    budget = round(density * sum(sizes)) - sum(floors)
    taken = order[np.cumsum(widths[order]) <= budget]
    extra = np.bincount(owners[taken], weights=widths[taken], minlength=len(sizes))
    return [floor + int(more) for floor, more in zip(floors, extra)]
