"""Means over prompts with their confidence intervals, from what was measured for every prompt and token; a table."""

from __future__ import annotations

from typing import Any

import numpy as np

from .teacher_forcing import Scores

_RESAMPLES = 2000
_WINDOWS = 8


def interval(values: np.ndarray) -> list[float]:
    """The 95 % confidence interval of the mean of values [prompts], by bootstrap (the same resamples every time)."""
    picks = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
    return [float(x) for x in np.quantile(values[picks].mean(axis=1), (0.025, 0.975))]


def windows(tokens: int) -> list[int]:
    """The ends of at most eight stretches of equal length that a continuation is looked at in."""
    step = -(-tokens // _WINDOWS)
    return [*range(step, tokens, step), tokens]


def summarise(scores: Scores, rival: Scores | None = None) -> dict[str, Any]:
    """An arm in figures.

    Args:
        scores (Scores): of the arm.
        rival (Scores, optional): of another arm on the same texts.

    Returns:
        dict: ``ppl``; ``kl`` in nats per token; ``agreement``; ``jaccard`` with the oracle; ``ci``: the 95 % interval
        of each; ``jaccard_by_layer``; ``kl_by_position``, means over :func:`windows`; and ``against_griffin``: the
        mean difference in KL from the rival (below zero is better) and its paired ``ci``.
    """
    nll, kl, agree = (rows.mean(axis=1) for rows in (scores.nll, scores.kl, scores.agree))
    jaccard = scores.jaccard.mean(axis=1)
    ends = windows(scores.kl.shape[1])
    row: dict[str, Any] = {
        "ppl": float(np.exp(nll.mean())),
        "kl": float(kl.mean()),
        "agreement": float(agree.mean()),
        "jaccard": float(jaccard.mean()),
        "ci": {
            "ppl": [float(np.exp(x)) for x in interval(nll)],
            "kl": interval(kl),
            "agreement": interval(agree),
            "jaccard": interval(jaccard),
        },
        "jaccard_by_layer": scores.jaccard.mean(axis=0).tolist(),
        "kl_by_position": [float(scores.kl[:, a:b].mean()) for a, b in zip([0, *ends], ends)],
    }
    if rival is not None:
        differences = kl - rival.kl.mean(axis=1)
        row["against_griffin"] = {"kl": float(differences.mean()), "ci": interval(differences)}
    return row


def table(result: dict[str, Any]) -> str:
    """The figures as text, a table for each prompt length and density."""
    lines = [
        f"{result['model']}, {'float32' if result['float32'] else 'own precision'}, {result['backend']}: "
        f"{result['prompts']} prompts, {result['tokens']} tokens each, {result['seconds']:.0f} s; [95 % interval]"
    ]
    for length, arms in result["prompt_tokens"].items():
        of = "" if length == "own" else f", prompts of {length} tokens"
        for d in dict.fromkeys(d for name, rows in arms.items() if name != "dense" for d in rows):
            lines += ["", f"density {d}{of}"]
            lines.append(f"{'':>14} {'PPL':>8} {'KL':>22} {'KL - griffin':>24} {'agreement':>10} {'Jaccard':>8}")
            for name, rows in arms.items():
                row = rows.get(d) or rows["1"] if name == "dense" else rows[d]
                kl, versus = row["kl"], row.get("against_griffin")
                against = "" if versus is None else f"{versus['kl']:+8.3f} {_brackets(versus['ci'], '+.3f')}"
                lines.append(
                    f"{name:>14} {row['ppl']:8.2f} {kl:7.3f} {_brackets(row['ci']['kl'], '.3f')} {against:>24} "
                    f"{row['agreement']:10.1%} {row['jaccard']:8.3f}"
                )
            if "free" in arms["dense"]["1"]:
                lines += [
                    "",
                    f"{'by itself':>14} {'self-PPL':>8} {'repetition':>11} {'distinct-1':>11} {'distinct-2':>11}",
                ]
                for name, rows in arms.items():
                    free = (rows["1"] if name == "dense" else rows[d])["free"]
                    figures = "".join(f" {free[key]:11.1%}" for key in ("repetition", "distinct-1", "distinct-2"))
                    lines.append(f"{name:>14} {free['self_ppl']:8.2f}{figures}")
    return "\n".join(lines)


def _brackets(ci: list[float], form: str) -> str:
    return f"[{ci[0]:{form}}, {ci[1]:{form}}]"
