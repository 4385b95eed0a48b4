"""Plots, with matplotlib (``pip install 'glass_mlx[plot]'``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import GlassError
from ..files import write_atomically
from ..ranks.format import GlobalStatistics
from .names import SELECTORS


def plot_ranks(
    statistics: GlobalStatistics,
    out: Path,
    overlaps: np.ndarray | None = None,
    share: float = 0.5,
    signal: str = "impact",
) -> None:
    """Draw global ranks: how concentrated importance is in each layer, how stable the ranks became as tokens were read,
    and optionally how the choice by prompts overlaps with the global one.

    Args:
        statistics (GlobalStatistics): what to draw.
        out (Path): the PNG to write.
        overlaps (np.ndarray, optional): [prompts, layers], shares of the best neurons in common.
        share (float): the share of the neurons that ``overlaps`` compares.
        signal (str): whose energies to draw.

    Raises:
        GlassError: matplotlib is not installed, or the file cannot be written.
    """
    name = statistics.metadata.get("model", "").replace("$", r"\$")  # $ would start a formula
    try:
        history = np.array(json.loads(statistics.metadata.get("stability_history", "[]")), dtype=float)
    except (ValueError, TypeError, RecursionError):  # the file may come from anyone
        history = np.zeros(0)
    panels = [_draw_concentration]
    if history.ndim == 2 and len(history) > 1 and history.shape[1] >= 3:
        panels.append(_draw_stability)
    if overlaps is not None:
        panels.append(_draw_overlaps)
    figure = _figure(5.5 * len(panels))
    figure.suptitle(f"Global ranks of {name}" if name else "Global ranks")
    data = {_draw_concentration: statistics.energies[signal], _draw_stability: history, _draw_overlaps: overlaps}
    for axes, draw in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels):
        draw(axes, data[draw], signal, share)
    _save(figure, out)


def plot_benchmark(result: dict[str, Any], out: Path) -> None:
    """Draw decode speed by density, with the dense model and the byte ceiling.

    Args:
        result (dict): from ``benchmark --json``.
        out (Path): the PNG to write.

    Raises:
        GlassError: as for ``plot_ranks``.
    """
    figure = _figure(6.5)
    axes = figure.subplots()
    rows = {"dense": result["dense"], **result["glass"]}
    medians = [row["generation_tps"] for row in rows.values()]
    ranges = [row["range"]["generation_tps"] for row in rows.values()]
    spread = [[m - low for m, (low, _) in zip(medians, ranges)], [high - m for m, (_, high) in zip(medians, ranges)]]
    colors = ["grey"] + ["tab:blue"] * len(result["glass"])
    axes.bar(range(len(rows)), medians, yerr=spread, color=colors, capsize=4)
    ceilings = [medians[0] * result["ceiling"][d] for d in result["glass"]]
    axes.plot(range(1, len(rows)), ceilings, "_", color="black", markersize=40, label="byte ceiling")
    for x, density in enumerate(result["glass"], start=1):
        axes.annotate(f"{result['speedup'][density]:.2f}x", (x, medians[x] / 2), ha="center", color="white")
    names = ["mlx-lm, dense", *(f"density {density}" for density in result["glass"])]
    axes.set_xticks(range(len(rows)), names)
    axes.set_ylabel("decode tokens/s")
    axes.set_title(f"{result['model']}\n{result['machine']}, {result['backend']}", fontsize="small")
    _legend_below(axes)
    _save(figure, out)


def _figure(width: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise GlassError("Plots need matplotlib: pip install 'glass_mlx[plot]'") from e
    return Figure(figsize=(width, 4.5), layout="constrained")


def _legend_below(axes: Any) -> None:
    """A panel's legend, where it covers no data."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize="small", frameon=False)


def _common_legend(figure: Any) -> None:
    """One legend for all panels, below them, with every name once."""
    found = {}
    for axes in figure.axes:
        found |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels()) if label not in found}
    columns = max(2, int(figure.get_figwidth() // 1.6))
    figure.legend(found.values(), found, loc="outside lower center", ncols=columns, fontsize="small", frameon=False)


def _color(place: int) -> Any:
    """One of twenty colours that differ, the strong ones first."""
    from matplotlib import colormaps

    return colormaps["tab20"](place * 2 % 20 + place * 2 // 20 % 2)


def _save(figure: Any, out: Path) -> None:
    write_atomically(out, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def _draw_concentration(axes: Any, layers: list[Any], signal: str, share: float) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colors = colormaps["viridis"](np.linspace(0, 1, len(layers)))
    for i, energy in enumerate(layers):
        cumulative = np.cumsum(-np.sort(-np.array(energy, dtype=np.float64)))
        x = np.arange(1, len(cumulative) + 1) / len(cumulative)
        axes.plot(x, cumulative / max(cumulative[-1], 1e-30), color=colors[i])
    axes.plot([0, 1], [0, 1], ":", color="grey", label="all neurons equal")
    axes.set(xlabel="best share of the neurons", ylabel="share of the energy", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"Concentration of {signal}")
    axes.legend(loc="lower right", fontsize="small", frameon=False)  # below the diagonal there is nothing
    scale = ScalarMappable(Normalize(0, max(1, len(layers) - 1)), "viridis")
    axes.figure.colorbar(scale, ax=axes, label="layer")


def _draw_stability(axes: Any, history: np.ndarray, signal: str, share: float) -> None:
    tokens, *columns = history.T
    labels = ("overlap of the better half", "rank correlation", "efficiency")  # older files lack the last one
    for values, label, style in zip(columns, labels, ("o-", "s-", "^-")):
        axes.plot(tokens, values, style, label=label)
    axes.set(xlabel="tokens read", ylabel="agreement of two halves", xscale="log", ylim=(None, 1))
    axes.set_title("Stability")
    _legend_below(axes)


def _draw_overlaps(axes: Any, overlaps: np.ndarray, signal: str, share: float) -> None:
    axes.boxplot(overlaps, tick_labels=[str(i) for i in range(overlaps.shape[1])])
    axes.axhline(share, linestyle=":", color="grey")
    axes.set(xlabel="layer", ylabel=f"overlap of the best {share:.0%}", ylim=(0, 1))
    axes.set_title(f"Prompt's choice against the global one ({len(overlaps)} prompts)")


def plot_fidelity(result: dict[str, Any], out: Path) -> None:
    """Draw each selector's divergence from the dense model: by density, by position in the continuation and, if several
    were measured, by global weight and by prompt length.

    Args:
        result (dict): from ``evaluate --json``.
        out (Path): the PNG to write.

    Raises:
        GlassError: as for ``plot_ranks``.
    """
    selectors = {name: rows for name, rows in result["arms"].items() if name != "dense"}
    by_weight = {name: rows for name, rows in selectors.items() if " " in name}
    plain = {name: rows for name, rows in selectors.items() if name not in by_weight}
    densities = list(next(iter(selectors.values())))
    middle = min(densities, key=lambda d: abs(float(d) - 0.5))
    panels = [lambda axes: _draw_positions(axes, plain, middle, result["windows"])]
    if len(densities) > 1:
        panels.insert(0, lambda axes: _draw_densities(axes, plain))
    if by_weight:
        panels.append(lambda axes: _draw_weights(axes, by_weight, plain, middle))
    if len(result["prompt_tokens"]) > 1:
        panels.append(lambda axes: _draw_lengths(axes, result["prompt_tokens"], list(plain), middle))
    figure = _figure(5.5 * len(panels))
    length = next(iter(result["prompt_tokens"]))  # of all panels but the last
    of = "" if length == "own" else f" of {length} tokens"
    title = f"{result['model']}: {result['prompts']} prompts{of}, {result['tokens']} tokens each"
    figure.suptitle(title.replace("$", r"\$"))
    all_axes = np.atleast_1d(figure.subplots(1, len(panels)))
    for axes, draw in zip(all_axes, panels):
        draw(axes)
        axes.set(ylabel="KL(dense || sparse), nats per token", ylim=(0, None))
    _common_legend(figure)
    _save(figure, out)


def _style(name: str) -> dict[str, Any]:
    """A selector's colour in all panels; bounds are dotted."""
    names = list(dict.fromkeys(("glass", "griffin", "oracle", "static", *SELECTORS)))
    bound = name in ("oracle", "random", "magnitude")
    return {
        "label": name,
        "color": _color(names.index(name)) if name in names else "black",
        "linestyle": ":" if bound else "-",
        "marker": "o",
        "markersize": 4,
    }


def _draw_densities(axes: Any, selectors: dict[str, Any]) -> None:
    for name, rows in selectors.items():
        x, kl = np.array([float(d) for d in rows]), np.array([row["kl"] for row in rows.values()])
        order = np.argsort(x)
        axes.plot(x[order], kl[order], **_style(name))
        low, high = np.array([row["ci"]["kl"] for row in rows.values()]).T
        axes.fill_between(x[order], low[order], high[order], color=_style(name)["color"], alpha=0.15)
    axes.set(xlabel="density")
    axes.set_title("By density")


def _draw_positions(axes: Any, selectors: dict[str, Any], density: str, ends: list[int]) -> None:
    middles = [(a + b) / 2 for a, b in zip([0, *ends], ends)]
    for name, rows in selectors.items():
        axes.plot(middles, rows[density]["kl_by_position"], **_style(name))
    axes.set(xlabel="token of the continuation")
    axes.set_title(f"By position, density {density}")


def _draw_weights(axes: Any, by_weight: dict[str, Any], plain: dict[str, Any], density: str) -> None:
    for signal in dict.fromkeys(name.split()[0] for name in by_weight):
        points = [(float(n.split()[1]), rows[density]) for n, rows in by_weight.items() if n.split()[0] == signal]
        points.sort(key=lambda point: point[0])
        kl = np.array([row["kl"] for _, row in points])
        error = np.abs(np.array([row["ci"]["kl"] for _, row in points]).T - kl)
        axes.errorbar([w for w, _ in points], kl, error, capsize=3, **_style(signal))
    if "glass" in plain:
        axes.axhline(
            plain["glass"][density]["kl"], color=_style("glass")["color"], linestyle="--", label="glass (auto)"
        )
    axes.set(xlabel="global weight")
    axes.set_title(f"By global weight, density {density}")


def _draw_lengths(axes: Any, by_length: dict[str, Any], names: list[str], density: str) -> None:
    lengths = sorted(by_length, key=int)
    for name in names:
        axes.plot([int(n) for n in lengths], [by_length[n][name][density]["kl"] for n in lengths], **_style(name))
    axes.set(xlabel="prompt tokens", xscale="log")
    axes.set_xticks([int(n) for n in lengths], lengths)
    axes.minorticks_off()
    axes.set_title(f"By prompt length, density {density}")


def plot_tradeoff(result: dict[str, Any], out: Path) -> None:
    """Draw each decoder's speed against its distance from the dense model; without fidelity (random weights), its speed
    by density.

    Args:
        result (dict): from ``tradeoff --json``.
        out (Path): the PNG to write.

    Raises:
        GlassError: as for ``plot_ranks``.
    """
    decoders = result["ways"]
    panels = [(key, label) for key, label in _FIDELITIES if key in next(iter(decoders.values()))["1"]] or [("", "")]
    figure = _figure(6.5 * len(panels))
    for axes, (key, label) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels):
        for i, (name, rows) in enumerate(decoders.items()):
            shown = {d: row for d, row in rows.items() if not key or key in row}
            if shown:
                _draw_decoder(axes, name, shown, key, _color(i))
        axes.axvline(1, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel="speed-up over mlx-lm", ylabel=label or "density")
    note = "; acceptance is simulated" if result["simulated_acceptance"] else ""
    of = f" of {result['prompt_tokens']} tokens" if result["prompt_tokens"] else ""
    title = f"{result['model']}: {result['prompts']} prompts{of}, {result['tokens']} tokens each{note}\n"
    figure.suptitle((title + f"{result['machine']}, {result['backend']}").replace("$", r"\$"), fontsize="small")
    _common_legend(figure)
    _save(figure, out)


_FIDELITIES = (
    ("strays", "tokens that the dense model would not have chosen"),
    ("kl", "KL(dense || decoder), nats per token"),
)


def _draw_decoder(axes: Any, name: str, rows: dict[str, Any], key: str, color: str) -> None:
    speed = np.array([row["speedup"] for row in rows.values()])
    y = np.array([row[key] if key else float(d) for d, row in rows.items()])
    spread = np.abs(np.array([row["range"]["speedup"] for row in rows.values()]).T - speed)
    axes.errorbar(speed, y, xerr=spread, fmt="o-", markersize=4, elinewidth=0.6, label=name, color=color)
    for d, x, height in zip(rows, speed, y):
        if d != "1":
            axes.annotate(d, (x, height), (3, 3), textcoords="offset points", fontsize=7, color=color)
