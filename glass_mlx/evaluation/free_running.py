"""What a model says after a batch of prompts, and how such texts read: repetition, variety, self-perplexity."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..model.blocks import hooked, run_with
from ..model.glass_model import GlassModel
from .teacher_forcing import Text


def speak(
    model: GlassModel,
    prompts: list[list[int]],
    tokens: int,
    temperature: float = 1.0,
    masks: list[mx.array] | None = None,
    begin: list[list[int]] | None = None,
) -> list[list[int]]:
    """Sample a continuation of each prompt, all together. Every prompt is read by the dense model.

    A continuation runs on over an end token, so that all have one length: what follows is the next text.

    Args:
        model (GlassModel): the model.
        prompts (list[list[int]]): tokens.
        tokens (int): length of a continuation.
        temperature (float): of the sampling; 0 takes the most likely token.
        masks (list[mx.array], optional): for each block the neurons [B, F] that the continuations are decoded with,
            as ``fidelity.as_masks`` makes them. Default: all.
        begin (list[list[int]], optional): what each continuation begins with.

    Returns:
        list[list[int]]: the continuations, with what they begin with.
    """
    caches, logits = [], []
    for prompt in prompts:
        caches.append(make_prompt_cache(model.dense))
        logits.append(model.dense(mx.array(prompt)[None], cache=caches[-1])[:, -1])
        mx.eval(logits[-1])
    given = np.full((len(prompts), tokens), -1)
    for b, start in enumerate(begin or []):
        given[b, : len(start)] = start[:tokens]
    if all(hasattr(entry, "merge") for entry in caches[0]):
        merged = [entries[0].merge(list(entries)) for entries in zip(*caches)]
        return _decode(model, merged, mx.concatenate(logits), given, temperature, masks)
    said = []  # the family's caches stay apart, and so do the texts
    for b, cache in enumerate(caches):
        mask = masks and [m[b : b + 1] for m in masks]
        said += _decode(model, cache, logits[b], given[b : b + 1], temperature, mask)
    return said


def _decode(
    model: GlassModel,
    cache: list[Any],
    logits: mx.array,
    given: np.ndarray,
    temperature: float,
    masks: list[mx.array] | None,
) -> list[list[int]]:
    """Go on from the logits [B, vocabulary] of the prompts' last tokens; ``given`` [B, tokens] is -1 where a token is
    to be sampled."""
    masked = {} if masks is None else hooked(model.blocks, lambda i, h: _masked(h, masks[i]))
    said: list[mx.array] = []
    for place, forced in enumerate(mx.array(given.T)):
        if place:
            logits = run_with(masked, model.dense, said[-1][:, None], cache=cache)[:, -1]
        logits = logits.astype(mx.float32)
        token = mx.random.categorical(logits / temperature) if temperature else mx.argmax(logits, axis=-1)
        said.append(mx.where(forced < 0, token.astype(mx.int32), forced.astype(mx.int32)))
        mx.async_eval(said[-1])
    return mx.stack(said, axis=1).tolist()


def _masked(h: mx.array, mask: mx.array) -> mx.array:
    return h * mask.astype(h.dtype).reshape(mask.shape[0], *[1] * (h.ndim - 2), mask.shape[1])


def readability(said: list[list[int]]) -> dict[str, np.ndarray]:
    """How texts read, for each of them: ``repetition``, the share of its 4-grams that it had before, and ``distinct-1``
    and ``distinct-2``, the share of different tokens and pairs among all of its own."""
    scores = {"repetition": [1 - _distinct(row, 4) for row in said]}
    scores |= {f"distinct-{n}": [_distinct(row, n) for row in said] for n in (1, 2)}
    return {name: np.array(values) for name, values in scores.items()}


def _distinct(tokens: list[int], n: int) -> float:
    grams = list(zip(*(tokens[i:] for i in range(n))))
    return len(set(grams)) / max(1, len(grams))


def self_nll(model: GlassModel, prompts: list[list[int]], said: list[list[int]]) -> np.ndarray:
    """What the dense model thinks of continuations: negative log-likelihood in nats per token, [B]."""
    nll = []
    for prompt, row in zip(prompts, said):
        text = Text([prompt], [row])
        nll.append(text.nll(text.predicting(model.dense(text.tokens))).mean().item())
    return np.array(nll)


# Prompts whose continuations are sampled together.
_BATCH = 32


def _speak(
    model: GlassModel,
    prompts: list[list[int]],
    tokens: int,
    temperature: float,
    kept: list[np.ndarray] | None = None,
) -> list[list[int]]:
    said: list[list[int]] = []
    for i in range(0, len(prompts), _BATCH):
        masks = None if kept is None else [mx.array(rows[i : i + _BATCH]) for rows in kept]
        said += speak(model, prompts[i : i + _BATCH], tokens, temperature, masks)
    return said


def cut(
    model: GlassModel, prompts: list[list[int]], length: int | None, temperature: float, seed: int
) -> list[list[int]]:
    """Prompts of ``length`` tokens: the beginnings of longer ones; the dense model goes on with shorter ones."""
    if length is None:
        return prompts
    short = [p for p in prompts if len(p) < length]
    mx.random.seed(seed)
    more = iter(_speak(model, short, length - min(map(len, short)), temperature)) if short else iter(())
    return [(p if len(p) >= length else [*p, *next(more)])[:length] for p in prompts]
