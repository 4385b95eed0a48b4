"""How far sparse decoding is from the dense model on a given continuation.

The dense model's continuation of a prompt is fed to each selector's sparse model, with neurons chosen from the prompt
alone. This takes one pass over whole texts, prompt and continuation, in which the hidden vectors of the continuation's
tokens keep only the values of the chosen neurons. Every token sees only what precedes it, so the result equals decoding
token by token on compact weights, and texts of different lengths can be batched with padding at the right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.compensation import Response, Sums, mean_hidden
from ..core.importance import SIGNALS, output_norms
from ..core.metrics import kl_divergence
from ..model.blocks import Block, by_token, run_with
from ..model.glass_model import GlassModel
from .selectors import Evidence, Selector, by_oracle, is_compensated

# Logits to hold at once; 2**24 are 64 MB in float32.
_MAX_LOGITS = 2**24


@dataclass
class Scores:
    """What was measured of a selector, for every prompt and every token of its continuation.

    Attributes:
        nll (np.ndarray): negative log-likelihood of the token in nats, [prompts, tokens].
        kl (np.ndarray): KL(dense || sparse) of the next-token distributions in nats, [prompts, tokens].
        agree (np.ndarray): whether both find the same token the most likely, [prompts, tokens].
        jaccard (np.ndarray): overlap of the kept neurons with the oracle's, intersection over union, [prompts, blocks].
        kept (list[np.ndarray]): for each block which neurons were kept, bool [prompts, F].
    """

    nll: np.ndarray
    kl: np.ndarray
    agree: np.ndarray
    jaccard: np.ndarray
    kept: list[np.ndarray]

    @classmethod
    def joined(cls, parts: list[Scores]) -> Scores:
        """The scores of several batches of prompts as one."""
        arrays = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("nll", "kl", "agree", "jaccard")}
        return cls(**arrays, kept=[np.concatenate(blocks) for blocks in zip(*(p.kept for p in parts))])


class TextBatch:
    """Prompts with their continuations, side by side: B texts of L tokens, T of them in the continuation.

    Attributes:
        prompts, continuations (list[list[int]]): their tokens.
        tokens (mx.array): [B, L] int32, prompt and continuation, padded at the right. The last token of a continuation
            is only predicted, so it is not among them.
        in_prompt, in_continuation (mx.array): [B, L] bool, which of the tokens belong to which.
    """

    def __init__(self, prompts: list[list[int]], continuations: list[list[int]]):
        self.prompts, self.continuations = prompts, continuations
        rows = [[*prompt, *rest[:-1]] for prompt, rest in zip(prompts, continuations)]
        width = max(map(len, rows))
        self.tokens = mx.array([row + [0] * (width - len(row)) for row in rows], dtype=mx.int32)
        place = mx.arange(width)[None]
        starts = mx.array([len(p) for p in prompts])[:, None]
        ends = mx.array([len(row) for row in rows])[:, None]
        self.in_prompt = place < starts
        self.in_continuation = (place >= starts) & (place < ends)
        # where, in the rows joined end to end, the logits predict the continuations' tokens
        self._predicts = starts - 1 + mx.arange(len(continuations[0])) + mx.arange(len(rows))[:, None] * width

    def predictions(self, logits: mx.array) -> mx.array:
        """The logits [B, T, vocabulary] (float32) that predict the continuations, out of all [B, L, vocabulary]."""
        return logits.reshape(-1, logits.shape[-1])[self._predicts].astype(mx.float32)

    def nll(self, predictions: mx.array) -> mx.array:
        """The negative log-likelihood [B, T] of the continuations' tokens, by ``predictions`` [B, T, vocabulary]."""
        picked = mx.take_along_axis(predictions, mx.array(self.continuations)[:, :, None], axis=-1)[..., 0]
        return mx.logsumexp(predictions, axis=-1) - picked


def score_selectors(
    model: GlassModel,
    prompts: list[list[int]],
    continuations: list[list[int]],
    selectors: dict[str, Selector],
    densities: list[float],
    progress: Callable[[int], None] = lambda prompts: None,
) -> dict[str, dict[float, Scores]]:
    """Feed each prompt's continuation to the sparse model of every selector.

    Args:
        model (GlassModel): the model.
        prompts (list[list[int]]): tokens.
        continuations (list[list[int]]): tokens, all of one length, at least 2.
        selectors (dict): functions that choose neurons, by name.
        densities (list[float]): to measure each selector at.
        progress: called with the number of prompts done since the last call.

    Returns:
        dict: scores by selector and density, with ``dense`` at density 1 among them.
    """
    vocabulary = model.dense(mx.array([[0]])).shape[-1]
    length = max(len(p) for p in prompts) + len(continuations[0])
    size = max(1, _MAX_LOGITS // (length * vocabulary))
    parts: dict[str, dict[float, list[Scores]]] = {"dense": {1.0: []}}
    parts |= {name: {d: [] for d in densities} for name in selectors}
    for first in range(0, len(prompts), size):
        batch = TextBatch(prompts[first : first + size], continuations[first : first + size])
        evidence, logits = collect_evidence(model, batch)
        evidence.first = first
        dense = batch.predictions(logits)
        everything = [mx.ones(e.shape, mx.bool_) for e in evidence.local["impact"]]
        parts["dense"][1.0].append(_score(batch, dense, dense, everything, everything))
        for evidence.density in densities:
            best = as_masks(model, by_oracle(evidence))
            for name, selector in selectors.items():
                masks = as_masks(model, selector(evidence))
                sums = evidence.sums if is_compensated(selector) else None
                sparse = batch.predictions(teacher_forced(model, batch, masks, sums))
                parts[name][evidence.density].append(_score(batch, dense, sparse, masks, best))
        progress(len(batch.prompts))
    return {name: {d: Scores.joined(rows) for d, rows in found.items()} for name, found in parts.items()}


def collect_evidence(model: GlassModel, batch: TextBatch) -> tuple[Evidence, mx.array]:
    """Run the dense model and collect what selectors choose by.

    Returns:
        tuple: the evidence, whose density is still to be set, and the logits [B, L, vocabulary].
    """
    blocks = model.blocks
    norms = [output_norms(block.module[block.output]) for block in blocks]
    found: dict[str, list] = {s: [[None] * len(blocks) for _ in range(2)] for s in SIGNALS}
    counted = (batch.in_prompt & (mx.arange(batch.tokens.shape[1]) > 0)).astype(mx.float32)
    inputs, hidden = [[None] * len(blocks) for _ in range(2)]
    nothing = mx.zeros((len(batch.prompts), 0))  # of routed experts, which a prompt's sums do not answer for

    def observe_input(i: int, x: mx.array) -> None:
        inputs[i] = nothing if blocks[i].experts else _sum(x.reshape(*batch.tokens.shape, -1), counted)

    def observe(i: int, h: mx.array, *routing: mx.array) -> mx.array:
        texts, block = len(batch.prompts), blocks[i]
        vectors, experts = h.reshape(texts, -1, h.shape[-1]), [chosen.reshape(texts, -1) for chosen in routing]
        hidden[i] = nothing if routing else _sum(vectors, counted)
        for signal in SIGNALS:
            scale = norms[i] if signal == "impact" else None
            for side, part in zip(found[signal], (batch.in_prompt, batch.in_continuation)):
                each = zip(part.astype(mx.float32), vectors, *experts)
                side[i] = mx.stack([block.energy(row, scale, *of, weights=counts) for counts, row, *of in each])
        return mx.depends(h, [inputs[i], hidden[i], *(side[i] for sides in found.values() for side in sides)])

    logits = run_with(by_token(blocks, observe, observe_input), model.dense, batch.tokens)
    local, oracle = ({signal: sides[k] for signal, sides in found.items()} for k in range(2))
    mx.eval(local, oracle, inputs, hidden, logits)
    sums = [Sums(*pair, mx.sum(counted, axis=1)) for pair in zip(hidden, inputs)]
    return Evidence(model, 1.0, batch.prompts, local, oracle, sums), logits


def teacher_forced(
    model: GlassModel, batch: TextBatch, masks: list[mx.array], sums: list[Sums] | None = None
) -> mx.array:
    """Logits [B, L, vocabulary] with the continuations decoded on the kept neurons only.

    Args:
        model (GlassModel): the model.
        batch (TextBatch): prompts and continuations.
        masks (list[mx.array]): the kept neurons of each block, bool [B, F].
        sums (list[Sums], optional): what the prompts add up to, to predict the dropped neurons by; None: they are zero.
    """
    replacements = without_dropped(model, masks, sums, batch.in_continuation[:, :, None])
    return run_with(replacements, model.dense, batch.tokens)


def without_dropped(
    model: GlassModel, masks: list[mx.array], sums: list[Sums] | None, sparse: mx.array | None = None
) -> dict[int, Any]:
    """Replacements that compute with the kept neurons only: what the others add is predicted, or nothing.

    Args:
        model (GlassModel): the model.
        masks, sums: as for :func:`teacher_forced`.
        sparse (mx.array, optional): the tokens that this holds for, bool [B, L, 1]. Default: all.
    """
    inputs: dict[int, mx.array] = {}
    responses = model.responses or [None] * len(masks)

    def observe(i: int, h: mx.array, *routing: mx.array) -> mx.array:
        texts, x, others = masks[i].shape[0], inputs.pop(i), mx.array(0, h.dtype)
        if sums is not None and not (routing and responses[i] is None):
            own = None if routing else sums[i]
            others = expected_hidden(responses[i], own, x.reshape(texts, -1, x.shape[-1])).astype(h.dtype)
        if routing:
            return _without_experts(model.blocks[i], masks[i], h, routing[0], others, sparse)
        dropped = mx.logical_not(masks[i])[:, None]
        if sparse is not None:
            dropped = mx.logical_and(sparse, dropped)
        return mx.where(dropped, others, h.reshape(texts, -1, h.shape[-1])).reshape(h.shape)

    return by_token(model.blocks, observe, inputs.__setitem__)


def _without_experts(
    block: Block, mask: mx.array, h: mx.array, experts: mx.array, others: mx.array, sparse: mx.array | None
) -> mx.array:
    """The hidden vectors of routed experts (``by_token``) with the kept neurons [B, F] only, and in place of the others
    what is expected of all neurons, [B, L, F] or zero."""
    texts = mask.shape[0]
    own = experts.reshape(texts, -1)  # of each text
    kept = block.by_expert(mask)[mx.arange(texts)[:, None], own].reshape(h.shape)
    if sparse is not None:
        kept = mx.logical_or(kept, mx.logical_not(sparse.reshape(*experts.shape[:-1], 1, 1, 1)))
    if others.ndim:
        others = block.by_expert(others).reshape(-1, block.experts, block.width)
        others = mx.take_along_axis(others, experts.reshape(len(others), -1, 1), axis=1).reshape(h.shape)
    return mx.where(kept, h, others)


def prompt_sums(model: GlassModel, prompts: list[list[int]]) -> list[Sums]:
    """What prompts add up to in each block, as in ``Evidence.sums``; they are read one by one."""
    found = [collect_evidence(model, TextBatch([prompt], [[0, 0]]))[0].sums for prompt in prompts]
    parts = [zip(*((s.hidden, s.inputs, s.tokens) for s in block)) for block in zip(*found)]
    return [Sums(*map(mx.concatenate, part)) for part in parts]


def expected_hidden(response: Response | None, sums: Sums | None, x: mx.array) -> mx.array:
    """The hidden vectors [B, L, F] (float32) to expect of inputs [B, L, H] after prompts that add up to ``sums``."""
    if sums is None:
        return response.predict(x)
    prompts = [Sums(*row) for row in zip(sums.hidden, sums.inputs, sums.tokens)]
    mean = mx.stack([mean_hidden(response, prompt) for prompt in prompts])[:, None]
    return mean if response is None else mean + response.predict(x) - response.hidden_mean


def as_masks(model: GlassModel, kept: list[mx.array]) -> list[mx.array]:
    """The kept neurons [B, k] of each block as a mask [B, F], bool."""
    empty = [mx.zeros((k.shape[0], block.size), mx.bool_) for k, block in zip(kept, model.blocks)]
    return [mx.put_along_axis(mask, k, mx.array(True), axis=-1) for mask, k in zip(empty, kept)]


def _sum(vectors: mx.array, counted: mx.array) -> mx.array:
    """Vectors [B, L, N] summed over the tokens with weights [B, L], [B, N] float32."""
    return (counted[:, None] @ vectors.astype(mx.float32))[:, 0]


def _score(batch: TextBatch, dense: mx.array, sparse: mx.array, masks: list[mx.array], best: list[mx.array]) -> Scores:
    """Compare predictions [B, T, vocabulary], and kept neurons [B, F] with the oracle's."""
    nll = batch.nll(sparse)
    agree = mx.argmax(dense, axis=-1) == mx.argmax(sparse, axis=-1)
    kl = kl_divergence(dense, sparse)
    mx.eval(nll, kl, agree)
    kept = [np.array(mask) for mask in masks]
    pairs = [(k, np.array(b)) for k, b in zip(kept, best)]
    jaccard = np.stack([(k & b).sum(axis=1) / (k | b).sum(axis=1) for k, b in pairs], axis=1)
    return Scores(np.array(nll, np.float64), np.array(kl, np.float64), np.array(agree), jaccard, kept)
