"""How far sparse decoding strays from the dense model: the measuring.

What the dense model says after a prompt is fed to each arm, whose neurons are chosen from the prompt alone. This is
computed in one pass over whole texts, prompt and continuation, in which the hidden vectors of the continuation's tokens
keep the values of the chosen neurons only. As every token sees only what is before it, it equals decoding token by
token on compact weights, and texts of different lengths may stand side by side, filled up at the right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..core.importance import SIGNALS, energy, output_norms
from ..core.metrics import kl_divergence
from ..model.blocks import hooked, run_with
from ..model.glass_model import GlassModel
from .selectors import Arm, Evidence, by_oracle

# Logits to hold at once; 2**24 are 64 MB in float32.
_MAX_LOGITS = 2**24


@dataclass
class Scores:
    """What was measured of an arm, for every prompt and every token of its continuation.

    Attributes:
        nll (np.ndarray): negative log-likelihood of the token, nats, [prompts, tokens].
        kl (np.ndarray): KL(dense || sparse) of the next-token distributions, nats, [prompts, tokens].
        agree (np.ndarray): whether both find the same token the most likely, [prompts, tokens].
        jaccard (np.ndarray): kept neurons in common with the oracle's over those of either, [prompts, blocks].
        kept (list[np.ndarray]): for each block which neurons were kept, bool [prompts, F].
    """

    nll: np.ndarray
    kl: np.ndarray
    agree: np.ndarray
    jaccard: np.ndarray
    kept: list[np.ndarray]

    @classmethod
    def joined(cls, parts: list[Scores]) -> Scores:
        """The scores of several batches of prompts."""
        arrays = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ("nll", "kl", "agree", "jaccard")}
        return cls(**arrays, kept=[np.concatenate(blocks) for blocks in zip(*(p.kept for p in parts))])


def measure(
    model: GlassModel,
    prompts: list[list[int]],
    said: list[list[int]],
    arms: dict[str, Arm],
    densities: list[float],
    progress: Callable[[int], None] = lambda prompts: None,
) -> dict[str, dict[float, Scores]]:
    """Feed what the dense model said after each prompt to every arm.

    Args:
        model (GlassModel): the model.
        prompts (list[list[int]]): tokens.
        said (list[list[int]]): the continuation of each prompt, all of one length, at least 2.
        arms (dict): functions that choose neurons, by name.
        densities (list[float]): at which each arm is measured.
        progress: called with the number of prompts done since the last call.

    Returns:
        dict: scores by arm and density; ``dense`` at density 1 is among them.
    """
    vocabulary = model.dense(mx.array([[0]])).shape[-1]
    length = max(len(p) for p in prompts) + len(said[0])
    batch = max(1, _MAX_LOGITS // (length * vocabulary))
    parts: dict[str, dict[float, list[Scores]]] = {"dense": {1.0: []}}
    parts |= {name: {d: [] for d in densities} for name in arms}
    for first in range(0, len(prompts), batch):
        text = Text(prompts[first : first + batch], said[first : first + batch])
        evidence, logits = record(model, text)
        evidence.first = first
        dense = text.predicting(logits)
        everything = [mx.ones(e.shape, mx.bool_) for e in evidence.local["impact"]]
        parts["dense"][1.0].append(_score(text, dense, dense, everything, everything))
        for evidence.density in densities:
            best = as_masks(model, by_oracle(evidence))
            for name, arm in arms.items():
                masks = as_masks(model, arm(evidence))
                sparse = text.predicting(forced(model, text, masks))
                parts[name][evidence.density].append(_score(text, dense, sparse, masks, best))
        progress(len(text.prompts))
    return {name: {d: Scores.joined(rows) for d, rows in found.items()} for name, found in parts.items()}


class Text:
    """A batch of prompts with their continuations, side by side.

    Attributes:
        prompts, said (list[list[int]]): their tokens; continuations have T of them.
        tokens (mx.array): [B, L] int32, prompt and continuation, filled up at the right.
        decoded (mx.array): [B, L] bool, the tokens of the continuations.
        read (mx.array): [B, L] bool, those of the prompts.
    """

    def __init__(self, prompts: list[list[int]], said: list[list[int]]):
        self.prompts, self.said = prompts, said
        # the last token is only predicted, never read
        rows = [[*prompt, *rest[:-1]] for prompt, rest in zip(prompts, said)]
        width = max(map(len, rows))
        self.tokens = mx.array([row + [0] * (width - len(row)) for row in rows], dtype=mx.int32)
        place = mx.arange(width)[None]
        starts = mx.array([len(p) for p in prompts])[:, None]
        ends = mx.array([len(row) for row in rows])[:, None]
        self.read = place < starts
        self.decoded = (place >= starts) & (place < ends)
        # places, in the rows one after the other, whose logits are of the continuations' tokens
        self._predicts = starts - 1 + mx.arange(len(said[0])) + mx.arange(len(rows))[:, None] * width

    def predicting(self, logits: mx.array) -> mx.array:
        """The logits [B, T, vocabulary] (float32) of the continuations' tokens, out of all [B, L, vocabulary]."""
        return logits.reshape(-1, logits.shape[-1])[self._predicts].astype(mx.float32)

    def nll(self, logits: mx.array) -> mx.array:
        """Negative log-likelihood [B, T] of the continuations' tokens, by their logits [B, T, vocabulary]."""
        picked = mx.take_along_axis(logits, mx.array(self.said)[:, :, None], axis=-1)[..., 0]
        return mx.logsumexp(logits, axis=-1) - picked


def record(model: GlassModel, text: Text) -> tuple[Evidence, mx.array]:
    """Run the dense model and collect the arms' evidence.

    Returns:
        tuple: the evidence (its density is to be set), and the logits [B, L, vocabulary].
    """
    blocks = model.blocks
    norms = [output_norms(block.module[block.output]) for block in blocks]
    found: dict[str, list] = {s: [[None] * len(blocks) for _ in range(2)] for s in SIGNALS}

    def observe(i: int, h: mx.array) -> mx.array:
        h = h.reshape(*text.tokens.shape, -1)
        for signal in SIGNALS:
            scale = norms[i] if signal == "impact" else None
            for side, of in zip(found[signal], (text.read, text.decoded)):
                side[i] = mx.stack([energy(row, scale, counts) for row, counts in zip(h, of.astype(mx.float32))])
        return mx.depends(h, [side[i] for sides in found.values() for side in sides])

    logits = _run(model, text, observe)
    local, oracle = ({signal: sides[k] for signal, sides in found.items()} for k in range(2))
    mx.eval(local, oracle, logits)
    return Evidence(model, 1.0, text.prompts, local, oracle), logits


def forced(model: GlassModel, text: Text, masks: list[mx.array]) -> mx.array:
    """Logits [B, L, vocabulary] where the continuations are decoded with the kept neurons only.

    Args:
        model (GlassModel): the model.
        text (Text): prompts and continuations.
        masks (list[mx.array]): for each block [B, F], bool.
    """
    sparse = text.decoded[:, :, None]

    def observe(i: int, h: mx.array) -> mx.array:
        masked = h.reshape(*text.tokens.shape, -1) * masks[i][:, None].astype(h.dtype)
        return mx.where(sparse, masked, h.reshape(masked.shape))

    return _run(model, text, observe)


def as_masks(model: GlassModel, kept: list[mx.array]) -> list[mx.array]:
    """Each block's kept neurons [B, k] as a mask [B, F], bool."""
    empty = [mx.zeros((k.shape[0], block.size), mx.bool_) for k, block in zip(kept, model.blocks)]
    return [mx.put_along_axis(mask, k, mx.array(True), axis=-1) for mask, k in zip(empty, kept)]


def _run(model: GlassModel, text: Text, observe: Callable[[int, mx.array], mx.array]) -> mx.array:
    """The dense model on a text, each block's hidden vectors [B, L, F] passed through ``observe``."""
    return run_with(hooked(model.blocks, lambda i, h: observe(i, h).reshape(h.shape)), model.dense, text.tokens)


def _score(text: Text, dense: mx.array, sparse: mx.array, masks: list[mx.array], best: list[mx.array]) -> Scores:
    nll = text.nll(sparse)
    agree = mx.argmax(dense, axis=-1) == mx.argmax(sparse, axis=-1)
    kl = kl_divergence(dense, sparse)
    mx.eval(nll, kl, agree)
    kept = [np.array(mask) for mask in masks]
    pairs = [(k, np.array(b)) for k, b in zip(kept, best)]
    jaccard = np.stack([(k & b).sum(axis=1) / (k | b).sum(axis=1) for k, b in pairs], axis=1)
    return Scores(np.array(nll, np.float64), np.array(kl, np.float64), np.array(agree), jaccard, kept)


def decode_given(model: GlassModel, tokens: mx.array, cache: list[Any]) -> mx.array:
    """Logits [B, L, vocabulary] of a given continuation [B, L], decoded with the rereads that it would have had if its
    tokens had come one by one."""
    session, logits = model.session(cache), []
    while tokens.shape[1]:
        left = session.until_reread()
        length = tokens.shape[1] if left is None else max(1, left)
        now, tokens = tokens[:, :length], tokens[:, length:]
        logits.append(model.run_phase(session.decoding_phase(), now, cache))
    return mx.concatenate(logits, axis=1)
