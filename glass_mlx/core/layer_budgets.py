"""How many neurons each block keeps, at one density for the whole model.

Dropping neurons hurts the model's output, and how much differs widely between layers. A file of global statistics
holds the output's sensitivity to each block (``ranks/sensitivity.py``): KL in nats per share of the block's energy
lost, measured by dropping the worse half of its neurons. The losses of the blocks add up, and each grows faster than
the share lost:

    cost = sum over blocks of s * lost^p / lost_half^(p - 1)

where lost_half is the share that the worse half holds. The best counts are found one neuron at a time, because every
further neuron of a block saves less. Only the number of neurons in each block comes from this, so shapes depend on
nothing but the model and the density.
"""

from __future__ import annotations

import numpy as np

# p above. With p = 1, deep models give too few neurons to their less sensitive layers.
POWER = 1.75
# Every block keeps at least this fraction of the density, however insensitive the output is to it.
FLOOR = 1 / 8
# Steps from this on are too large to round every block by itself.
LARGE = 256


def uniform_budgets(density: float, sizes: list[int], steps: list[int]) -> list[int]:
    """Neurons to keep in each block: the same share of every block, in whole steps.

    Where steps are large (``Block.step``), blocks of one size take turns in being rounded up or down, so that what is
    kept in all is right to a step. ``steps`` is as in ``measured_budgets``.
    """
    if density == 1:
        return list(sizes)
    kinds = list(zip(sizes, steps))
    counts = []
    for i, (size, step) in enumerate(kinds):
        exact, earlier = density * size / step, kinds[:i].count((size, step))
        turn = round((earlier + 1) * exact) - round(earlier * exact) if step >= LARGE else round(exact)
        counts.append(step * min(max(1, turn), size // step))
    return counts


def measured_budgets(
    density: float, energies: list[np.ndarray], sensitivity: list[float], steps: list[int]
) -> list[int]:
    """Neurons to keep in each block: density * sum of F in total, shared out at the least cost.

    Args:
        density (float): share of the neurons to keep, in (0, 1].
        energies (list[np.ndarray]): the global energies [F] of each block.
        sensitivity (list[float]): of each block, non-negative.
        steps (list[int]): the counts of each block are multiples of this (``Block.step``).

    Returns:
        list[int]: counts, each at least ``FLOOR`` * density * F.
    """
    sizes = [len(e) for e in energies]
    if density == 1 or not any(sensitivity):
        return uniform_budgets(density, sizes, steps)
    floors = uniform_budgets(FLOOR * density, sizes, steps)
    saved, owners, widths = [], [], []
    for i, (energy, weight, step, floor) in enumerate(zip(energies, sensitivity, steps, floors)):
        savings = -np.diff(cost(energy, weight)[floor::step]) / step
        saved.append(savings)
        owners.append(np.full(len(savings), i))
        widths.append(np.full(len(savings), step))
    saved, owners, widths = np.concatenate(saved), np.concatenate(owners), np.concatenate(widths)
    order = np.argsort(-saved, kind="stable")
    taken = order[np.cumsum(widths[order]) <= round(density * sum(sizes)) - sum(floors)]
    extra = np.bincount(owners[taken], weights=widths[taken], minlength=len(sizes))
    return [floor + int(more) for floor, more in zip(floors, extra)]


def cost(energy: np.ndarray, sensitivity: float) -> np.ndarray:
    """The cost (module docstring) of keeping a block's best 0, 1, ..., F neurons, [F + 1], from its energies [F]."""
    best = np.sort(energy.astype(np.float64))[::-1] / np.sum(energy, dtype=np.float64)
    lost = np.append(np.cumsum(best[::-1])[::-1], 0.0)
    half = max(lost[len(best) // 2], np.finfo(np.float64).tiny)
    return sensitivity * lost * (lost / half) ** (POWER - 1)
