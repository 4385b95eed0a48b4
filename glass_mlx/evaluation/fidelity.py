"""How far sparse decoding strays from the dense model, over all prompts and selectors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import GlassError
from ..model.glass_model import GlassModel
from .free_running import _speak, readability, self_nll
from .intervals import interval, summarise
from .selectors import GLOBAL, Arm, standard_arms
from .teacher_forcing import Scores, measure


def evaluate(
    model: GlassModel,
    prompts: list[list[int]],
    arms: dict[str, Arm],
    densities: list[float],
    tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    free: bool = False,
    progress: Callable[[int], None] = lambda prompts: None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure arms on the dense model's own continuations.

    Args:
        model (GlassModel): the model.
        prompts (list[list[int]]): tokens.
        arms (dict): functions that choose neurons, by name.
        densities (list[float]): at which each arm is measured.
        tokens (int): length of a continuation.
        temperature (float): of its sampling.
        seed (int): of its sampling.
        free (bool): also let each arm speak by itself.
        progress: called with the number of prompts done since the last call.

    Returns:
        dict: for each arm, ``dense`` included, and each density the figures of :func:`summary.summarise`; with
        ``free`` under that name those of :func:`speak_freely`.
    """
    mx.random.seed(seed)
    said = _speak(model, prompts, tokens, temperature)
    scores = measure(model, prompts, said, arms, densities, progress)
    griffin = scores.get("griffin", {})
    result = {
        name: {
            f"{d:g}": summarise(row, griffin.get(d) if name not in ("dense", "griffin") else None)
            for d, row in rows.items()
        }
        for name, rows in scores.items()
    }
    if free:
        for name, rows in scores.items():
            for d, row in rows.items():
                mx.random.seed(seed)
                result[name][f"{d:g}"]["free"] = speak_freely(model, prompts, row, tokens, temperature)
    return result


def speak_freely(
    model: GlassModel, prompts: list[list[int]], scores: Scores, tokens: int, temperature: float
) -> dict[str, Any]:
    """Let an arm go on by itself from each prompt, with the neurons that it chose.

    Returns:
        dict: ``repetition``, ``distinct-1``, ``distinct-2`` (:func:`continuation.readability`), ``self_ppl``, the
        perplexity of what it says under the dense model; ``ci`` of each.
    """
    said = _speak(model, prompts, tokens, temperature, scores.kept)
    values = readability(said)
    nll = self_nll(model, prompts, said)
    return {
        **{name: float(v.mean()) for name, v in values.items()},
        "self_ppl": float(np.exp(nll.mean())),
        "ci": {name: interval(v) for name, v in values.items()} | {"self_ppl": np.exp(interval(nll)).tolist()},
    }


def choose_arms(names: list[str] | None, weights: list[float | str], global_ranks: bool) -> dict[str, Arm]:
    """The arms asked for by name (default: all), as far as there are global ranks for them; a weight ``auto`` is
    ``glass``, which is one of them anyway.

    Raises:
        GlassError: an arm was asked for that needs global ranks.
    """
    standard = standard_arms([w for w in weights if w != "auto"])
    arms = {name: arm for name, arm in standard.items() if names is None or name.split()[0] in names}
    missing = [] if global_ranks else [name for name in arms if name.split()[0] in GLOBAL]
    if missing and names is not None:
        raise GlassError(f"There are no global ranks for this model, and {missing[0]} needs them: build some first.")
    if missing:
        print(f"There are no global ranks for this model: without {', '.join(missing)}.", file=sys.stderr)
    return {name: arm for name, arm in arms.items() if name not in missing}
