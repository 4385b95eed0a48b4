"""How far sparse decoding is from the dense model: all prompts, selectors and densities, in figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.compensation import Sums
from ..model.glass_model import GlassModel
from .free_running import readability, sample_continuations, self_nll
from .intervals import interval, window_means
from .selectors import Selector, is_compensated
from .tables import text_table
from .teacher_forcing import Scores, prompt_sums, score_selectors


def measure_fidelity(
    model: GlassModel,
    prompts: list[list[int]],
    selectors: dict[str, Selector],
    densities: list[float],
    tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    free: bool = False,
    progress: Callable[[int], None] = lambda prompts: None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure selectors on the dense model's own continuations.

    Args:
        model (GlassModel): the model.
        prompts (list[list[int]]): tokens.
        selectors (dict): functions that choose neurons, by name.
        densities (list[float]): to measure each selector at.
        tokens (int): length of a continuation.
        temperature (float): of its sampling.
        seed (int): of its sampling.
        free (bool): also let each selector's sparse model continue by itself.
        progress: called with the number of prompts done since the last call.

    Returns:
        dict: for each selector, ``dense`` included, and each density the figures of :func:`summarise`; with ``free``,
        under that key, those of :func:`run_freely`.
    """
    mx.random.seed(seed)
    continuations = sample_continuations(model, prompts, tokens, temperature)
    scores = score_selectors(model, prompts, continuations, selectors, densities, progress)
    griffin = scores.get("griffin", {})
    result = {
        name: {
            f"{d:g}": summarise(row, griffin.get(d) if name not in ("dense", "griffin") else None)
            for d, row in rows.items()
        }
        for name, rows in scores.items()
    }
    if free:
        compensated = {name for name, selector in selectors.items() if is_compensated(selector)}
        sums = prompt_sums(model, prompts) if compensated else None
        for name, rows in scores.items():
            for d, row in rows.items():
                mx.random.seed(seed)
                own = sums if name in compensated else None
                result[name][f"{d:g}"]["free"] = run_freely(model, prompts, row, tokens, temperature, own)
    return result


def run_freely(
    model: GlassModel,
    prompts: list[list[int]],
    scores: Scores,
    tokens: int,
    temperature: float,
    sums: list[Sums] | None = None,
) -> dict[str, Any]:
    """Let the model continue each prompt on the neurons that a selector kept; with the prompts' sums, the others are
    predicted.

    Returns:
        dict: ``repetition``, ``distinct-1``, ``distinct-2`` (:func:`free_running.readability`); ``self_ppl``, the
        perplexity of the continuations under the dense model; ``ci`` of each.
    """
    masks = [mx.array(rows) for rows in scores.kept]
    continuations = sample_continuations(model, prompts, tokens, temperature, masks, sums=sums)
    values = readability(continuations)
    nll = self_nll(model, prompts, continuations)
    return {
        **{name: float(v.mean()) for name, v in values.items()},
        "self_ppl": float(np.exp(nll.mean())),
        "ci": {name: interval(v) for name, v in values.items()} | {"self_ppl": np.exp(interval(nll)).tolist()},
    }


def summarise(scores: Scores, rival: Scores | None = None) -> dict[str, Any]:
    """A selector in figures.

    Args:
        scores (Scores): of the selector.
        rival (Scores, optional): of another selector on the same texts.

    Returns:
        dict: ``ppl``; ``kl`` in nats per token; ``agreement``; ``jaccard`` with the oracle; ``ci``: the 95 % interval
        of each; ``jaccard_by_layer``; ``kl_by_position`` (:func:`intervals.window_means`); and ``against_griffin``: the
        mean difference in KL from the rival (negative is better) and its paired ``ci``.
    """
    nll, kl, agree = (rows.mean(axis=1) for rows in (scores.nll, scores.kl, scores.agree))
    jaccard = scores.jaccard.mean(axis=1)
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
        "kl_by_position": window_means(scores.kl),
    }
    if rival is not None:
        differences = kl - rival.kl.mean(axis=1)
        row["against_griffin"] = {"kl": float(differences.mean()), "ci": interval(differences)}
    return row


def table(result: dict[str, Any]) -> str:
    """The result of ``evaluate --json`` as text: a table for each prompt length and density."""
    precision = "float32" if result["float32"] else "own precision"
    lines = [
        f"{result['model']}, {precision}, {result['backend']}: "
        f"{result['prompts']} prompts ({result['prompt_set']}), {result['tokens']} tokens each, "
        f"{result['seconds']:.0f} s; [95 % interval]"
    ]
    for length, selectors in result["prompt_tokens"].items():
        of = "" if length == "own" else f", prompts of {length} tokens"
        for d in dict.fromkeys(d for name, rows in selectors.items() if name != "dense" for d in rows):
            at_density = {name: rows["1"] if name == "dense" else rows[d] for name, rows in selectors.items()}
            lines += ["", f"density {d}{of}", *_fidelity_rows(at_density)]
            if "free" in at_density["dense"]:
                lines += ["", *_free_rows(at_density)]
    return "\n".join(lines)


def _fidelity_rows(rows: dict[str, dict[str, Any]]) -> list[str]:
    cells = []
    for name, row in rows.items():
        versus = row.get("against_griffin")
        against = "" if versus is None else f"{versus['kl']:+.3f} {_brackets(versus['ci'], '+.3f')}"
        kl = f"{row['kl']:.3f} {_brackets(row['ci']['kl'], '.3f')}"
        cells.append([name, f"{row['ppl']:.2f}", kl, against, f"{row['agreement']:.1%}", f"{row['jaccard']:.3f}"])
    return text_table(("", "PPL", "KL", "KL - griffin", "agreement", "Jaccard"), cells)


def _free_rows(rows: dict[str, dict[str, Any]]) -> list[str]:
    shares, cells = ("repetition", "distinct-1", "distinct-2"), []
    for name, row in rows.items():
        free = row["free"]
        cells.append([name, f"{free['self_ppl']:.2f}", *(f"{free[key]:.1%}" for key in shares)])
    return text_table(("by itself", "self-PPL", *shares), cells)


def _brackets(ci: list[float], form: str) -> str:
    return f"[{ci[0]:{form}}, {ci[1]:{form}}]"
