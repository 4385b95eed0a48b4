"""Pictures, with matplotlib (``pip install 'glass_mlx[plot]'``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .errors import GlassError
from .ranks import GlobalRanks, write_atomically


def plot_ranks(
    ranks: GlobalRanks,
    out: Path,
    overlaps: np.ndarray | None = None,
    share: float = 0.5,
    signal: str = "impact",
) -> None:
    """Draw how concentrated importance is in each layer and, where given, how the choice by prompts overlaps with
    the global one.

    Args:
        ranks (GlobalRanks): the ranks to draw.
        out (Path): the PNG to write.
        overlaps (np.ndarray, optional): [prompts, layers], shares of the best neurons in common.
        share (float): the share of the neurons that ``overlaps`` compares.
        signal (str): whose energies to draw.

    Raises:
        GlassError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise GlassError("Plots need matplotlib: pip install 'glass_mlx[plot]'") from e
    figure = Figure(figsize=(6 if overlaps is None else 11, 4.5), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, 1 if overlaps is None else 2))
    name = ranks.metadata.get("model", "")
    layers = ranks.energies[signal]
    colors = _colors(len(layers))
    for i, energy in enumerate(layers):
        cumulative = np.cumsum(-np.sort(-np.array(energy, dtype=np.float64)))
        x = np.arange(1, len(cumulative) + 1) / len(cumulative)
        axes[0].plot(x, cumulative / max(cumulative[-1], 1e-30), color=colors[i], label=f"layer {i}")
    axes[0].plot([0, 1], [0, 1], ":", color="grey", label="all alike")
    axes[0].set(xlabel="best share of the neurons", ylabel="share of the energy", xlim=(0, 1), ylim=(0, 1))
    axes[0].set_title(f"Concentration of {signal}, {name}")
    if len(layers) <= 12:
        axes[0].legend(fontsize="small")
    if overlaps is not None:
        axes[1].boxplot(overlaps, tick_labels=[str(i) for i in range(overlaps.shape[1])])
        axes[1].axhline(share, linestyle=":", color="grey")
        axes[1].set(xlabel="layer", ylabel=f"overlap of the best {share:.0%}", ylim=(0, 1))
        axes[1].set_title(f"Prompt's choice against the global one ({len(overlaps)} prompts)")
    write_atomically(out, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def _colors(n: int) -> np.ndarray:
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0, 0.9, n))
