"""Continuations that a model samples for a batch of prompts, and how they read: repetition, variety, perplexity."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..core.compensation import Sums
from ..model.blocks import run_with
from ..model.glass_model import GlassModel
from .teacher_forcing import TextBatch, without_dropped

# Prompts whose continuations are sampled together.
_BATCH = 32


def sample_continuations(
    model: GlassModel,
    prompts: list[list[int]],
    tokens: int,
    temperature: float = 1.0,
    masks: list[mx.array] | None = None,
    begin: list[list[int]] | None = None,
    sums: list[Sums] | None = None,
) -> list[list[int]]:
    """Sample a continuation of each prompt. The dense model reads every prompt.

    An end token does not end a continuation, so that all have the same length: the next text follows.

    Args:
        model (GlassModel): the model.
        prompts (list[list[int]]): tokens.
        tokens (int): length of a continuation.
        temperature (float): of the sampling; 0 takes the most likely token.
        masks (list[mx.array], optional): for each block the neurons [prompts, F] (bool) to decode with, as
            ``teacher_forcing.as_masks`` makes them. Default: all.
        begin (list[list[int]], optional): the given first tokens of each continuation.
        sums (list[Sums], optional): what the prompts add up to, to predict the dropped neurons by.

    Returns:
        list[list[int]]: the continuations, with their given first tokens.
    """
    continuations: list[list[int]] = []
    for i in range(0, len(prompts), _BATCH):
        some = slice(i, i + _BATCH)
        kept = None if masks is None else [mask[some] for mask in masks]
        own = sums and [s[some] for s in sums]
        batch = PromptBatch(model, prompts[some])
        continuations += batch.sample(tokens, temperature, kept, begin and begin[some], own)
    return continuations


class PromptBatch:
    """Prompts that the dense model has read, to be continued any number of times, side by side.

    Args:
        model (GlassModel): the model.
        prompts (list[list[int]]): tokens.
    """

    def __init__(self, model: GlassModel, prompts: list[list[int]]):
        self.model = model
        self._caches: list[list[Any]] = []
        self._logits: list[mx.array] = []
        for prompt in prompts:
            self._caches.append(make_prompt_cache(model.dense))
            self._logits.append(model.dense(mx.array(prompt)[None], cache=self._caches[-1])[:, -1])
            mx.eval(self._logits[-1])

    def sample(
        self,
        tokens: int,
        temperature: float = 1.0,
        masks: list[mx.array] | None = None,
        begin: list[list[int]] | None = None,
        sums: list[Sums] | None = None,
    ) -> list[list[int]]:
        """Continuations of the prompts; arguments and result as in :func:`sample_continuations`."""
        given = np.full((len(self._caches), tokens), -1)
        for b, start in enumerate(begin or []):
            given[b, : len(start)] = start[:tokens]
        if all(hasattr(entry, "merge") for entry in self._caches[0]):
            merged = [entries[0].merge(list(entries)) for entries in zip(*self._caches)]
            return _decode(self.model, merged, mx.concatenate(self._logits), given, temperature, masks, sums)
        continuations = []  # the family's caches cannot be merged, so neither can the texts
        for b, cache in enumerate(self._caches):
            one = slice(b, b + 1)
            mask = masks and [m[one] for m in masks]
            own = sums and [s[one] for s in sums]
            logits, fixed = self._logits[b], given[one]
            continuations += _decode(self.model, copy.deepcopy(cache), logits, fixed, temperature, mask, own)
        return continuations


def _decode(
    model: GlassModel,
    cache: list[Any],
    logits: mx.array,
    given: np.ndarray,
    temperature: float,
    masks: list[mx.array] | None,
    sums: list[Sums] | None,
) -> list[list[int]]:
    """Go on from the logits [B, vocabulary] of the prompts' last tokens; ``given`` [B, tokens] is -1 where a token is
    to be sampled."""
    masked = {} if masks is None else without_dropped(model, masks, sums)
    sampled: list[mx.array] = []
    for place, fixed in enumerate(mx.array(given.T)):
        if place:
            logits = run_with(masked, model.dense, sampled[-1][:, None], cache=cache)[:, -1]
        logits = logits.astype(mx.float32)
        token = mx.random.categorical(logits / temperature) if temperature else mx.argmax(logits, axis=-1)
        sampled.append(mx.where(fixed < 0, token.astype(mx.int32), fixed.astype(mx.int32)))
        mx.async_eval(sampled[-1])
    return mx.stack(sampled, axis=1).tolist()


def fit_length(
    model: GlassModel, prompts: list[list[int]], length: int | None, temperature: float, seed: int
) -> list[list[int]]:
    """Prompts of ``length`` tokens: longer ones are cut, and the dense model continues shorter ones; None changes
    nothing."""
    if length is None:
        return prompts
    short = [p for p in prompts if len(p) < length]
    mx.random.seed(seed)
    missing = length - min(map(len, short)) if short else 0
    more = iter(sample_continuations(model, short, missing, temperature))
    return [(p if len(p) >= length else [*p, *next(more)])[:length] for p in prompts]


def readability(continuations: list[list[int]]) -> dict[str, np.ndarray]:
    """How each text reads.

    Returns:
        dict: for each text ``repetition``, the share of its 4-grams that repeat an earlier one; ``distinct-1`` and
        ``distinct-2``, the share of distinct tokens and pairs of tokens.
    """
    scores = {"repetition": [1 - _distinct(row, 4) for row in continuations]}
    scores |= {f"distinct-{n}": [_distinct(row, n) for row in continuations] for n in (1, 2)}
    return {name: np.array(values) for name, values in scores.items()}


def _distinct(tokens: list[int], n: int) -> float:
    grams = list(zip(*(tokens[i:] for i in range(n))))
    return len(set(grams)) / max(1, len(grams))


def self_nll(model: GlassModel, prompts: list[list[int]], continuations: list[list[int]]) -> np.ndarray:
    """The negative log-likelihood of continuations under the dense model, in nats per token, [prompts]."""
    nll = []
    for prompt, row in zip(prompts, continuations):
        batch = TextBatch([prompt], [row])
        nll.append(batch.nll(batch.predictions(model.dense(batch.tokens))).mean().item())
    return np.array(nll)
