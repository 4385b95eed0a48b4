"""Measure a model's global ranks.

The model speaks by itself: sequences sampled from its null prompt, the BOS token alone, and if it is an assistant from
an empty user turn (or a given text), read back in one dense pass that records the evidence of every neuron. The
sequences are split into two halves; how well the halves' ranks agree says when enough has been read. What kind of
text a sequence is of, its *domain*, is kept apart: a prompt is like the one or the other (see ``prior``).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from .._version import __version__
from ..core.importance import SIGNALS, energy, output_norms
from ..core.ranking import rank
from ..errors import GlassError
from ..files import write_atomically
from ..model.blocks import hooked, run_with
from ..model.glass_model import GlassModel
from .format import FORMAT_VERSION, GlobalRanks
from .identity import describe, fingerprint
from .lookup import cached_file
from .sensitivity import SAMPLE_LENGTH, SAMPLE_ROWS, sensitivity
from .sources import Source, null_prompt

# Tokens to read at most, and the overlap of two halves' better halves of the neurons that ends it before.
DEFAULT_TOKENS, DEFAULT_STABLE_AT = 65536, 0.95

# Hidden values to hold at once while recording; 2**25 are 128 MB in float32.
_MAX_HIDDEN = 2**25


def calibrate(
    model: GlassModel,
    source: Source,
    tokens: int = DEFAULT_TOKENS,
    stable_at: float | None = DEFAULT_STABLE_AT,
    name: str | None = None,
    partial: Path | None = None,
    progress: Callable[[int, dict[str, float]], None] = lambda tokens, stability: None,
    weighing: Callable[[int, int], None] = lambda done, blocks: None,
) -> GlobalRanks:
    """Measure a model's global ranks.

    Args:
        model (GlassModel): the model; its dense form is run.
        source (Source): the token sequences to record.
        tokens (int): stop after this many tokens.
        stable_at (float, optional): stop before that when the two halves' better halves of the neurons overlap by this
            much on average over the layers; None reads all ``tokens``.
        name (str, optional): what to call the model in the metadata.
        partial (Path, optional): a file that keeps what has been read. An interrupted run with the same arguments
            goes on from it with the same result as one in one go. Remove it when the ranks are written.
        progress: called after every batch with the tokens read and :func:`stability`.
        weighing: called with the number of blocks whose sensitivity was measured, and that of all to be measured.

    Returns:
        GlobalRanks: both signals, all blocks.

    Raises:
        GlassError: the source gave no tokens, or ``partial`` cannot be written.
    """
    norms = [output_norms(block.module[block.output]) for block in model.blocks]
    mx.eval(norms)
    identity = json.dumps([fingerprint(model), source.method, source.settings])
    sums = _Halves.load(partial, identity) or _Halves.empty(model, len(source.domains))
    agreement = stability(sums)
    while sums.batches < len(source.domains) or (
        sums.total < tokens and not (stable_at is not None and agreement["overlap"] >= stable_at)
    ):
        rows = [row for row in source.batch(sums.batches) if row]
        if not rows:
            break
        domain = sums.batches % len(source.domains)
        sums.samples[domain] = sums.samples[domain] or [row[:SAMPLE_LENGTH] for row in rows[:SAMPLE_ROWS]]
        read = sums.sequences
        for half in (0, 1):
            mine = rows[(read + half) % 2 :: 2]
            if mine:
                _record(model, mine, norms, sums, half, domain)
        sums.batches += 1
        agreement = stability(sums)
        sums.history.append([sums.total, *(round(agreement[key], 4) for key in ("overlap", "correlation"))])
        progress(sums.total, agreement)
        if partial is not None:
            sums.save(partial, identity)
    if sums.total == 0:
        raise GlassError("There is nothing to measure: the source gave no tokens.")
    energies = {signal: _shares(sums.by_block(signal)) for signal in SIGNALS}
    read = [d for d in range(len(source.domains)) if sums.tokens_of(d)]
    domains = {s: [_shares(sums.by_block(s, domain=d)) for d in read] for s in SIGNALS}
    domains = {s: [mx.stack(rows) for rows in zip(*found)] for s, found in domains.items()}
    weights = np.zeros(len(model.blocks))
    for i, d in enumerate(read):
        before = i * len(model.blocks)
        own = [rows[i] for rows in domains["impact"]]
        weights += sensitivity(
            model, sums.samples[d], own, lambda n, before=before: weighing(before + n, len(read) * len(model.blocks))
        )
    what = describe(model)
    if name:
        what["model"] = name
    return GlobalRanks(
        ranks={s: [rank(e) for e in energies[s]] for s in SIGNALS},
        energies=energies,
        domains=domains,
        sensitivity=(weights / len(read)).tolist(),
        metadata={
            "format_version": FORMAT_VERSION,
            **what,
            "fingerprint": fingerprint(model),
            "sizes": json.dumps([block.size for block in model.blocks]),
            "blocks": json.dumps([block.path for block in model.blocks]),
            "method": source.method,
            "domains": json.dumps([source.domains[d] for d in read]),
            "domain_tokens": json.dumps([sums.tokens_of(d) for d in read]),
            **{key: str(value) for key, value in source.settings.items()},
            "sequences": str(sums.sequences),
            "tokens": str(sums.total),
            "stability": json.dumps({k: round(v, 4) for k, v in agreement.items()}),
            "stability_history": json.dumps(sums.history),
            "glass_mlx": __version__,
            "mlx": mx.__version__,
            "mlx_lm": mlx_lm.__version__,
        },
    )


def _shares(energies: list[np.ndarray]) -> list[mx.array]:
    """Energies [F] of each block, with a sum of 1."""
    tiny = np.finfo(np.float32).tiny
    return [mx.array((e / np.maximum(e.sum(), tiny)).astype(np.float32)) for e in energies]


def stability(sums: _Halves) -> dict[str, float]:
    """How well the two halves agree, means over the layers, the worse signal's: ``correlation`` of the ranks (Spearman)
    and ``overlap`` of the better halves of the neurons. It speaks for half of the tokens read; all of them
    together are more stable than that."""
    worst = {"correlation": 1.0, "overlap": 1.0}
    for signal in SIGNALS:
        layers = [compare(a, b) for a, b in zip(sums.by_block(signal, 0), sums.by_block(signal, 1))]
        for key in worst:
            worst[key] = min(worst[key], float(np.mean([layer[key] for layer in layers])))
    return worst


def compare(a: np.ndarray, b: np.ndarray, share: float = 0.5) -> dict[str, float]:
    """Two importance vectors [F] of one layer: Spearman ``correlation``, and ``overlap``, the share that their best
    ``share`` of the neurons have in common."""
    order_a, order_b = (np.argsort(-v, kind="stable") for v in (a, b))
    rank_a, rank_b = np.empty(len(a)), np.empty(len(b))
    rank_a[order_a] = rank_b[order_b] = np.arange(len(a))
    correlation = np.corrcoef(rank_a, rank_b)[0, 1] if len(a) > 1 else 1.0
    k = max(1, round(share * len(a)))
    overlap = len(np.intersect1d(order_a[:k], order_b[:k])) / k
    return {"correlation": float(correlation), "overlap": float(overlap)}


@dataclass
class _Halves:
    """Energies summed so far: sums [signals, halves, domains, sum of F] float64, what was read (tokens by half and
    domain), rows of each domain to measure the sensitivity on, and how stable it was after each batch: (tokens,
    overlap, correlation)."""

    sizes: list[int]
    sums: np.ndarray
    tokens: list[list[int]]
    samples: list[list[list[int]]]
    sequences: int = 0
    batches: int = 0
    history: list[list[float]] = field(default_factory=list)

    @classmethod
    def empty(cls, model: GlassModel, domains: int) -> _Halves:
        sizes = [block.size for block in model.blocks]
        sums = np.zeros((len(SIGNALS), 2, domains, sum(sizes)))
        return cls(sizes, sums, [[0] * domains, [0] * domains], [[] for _ in range(domains)])

    @property
    def total(self) -> int:
        return sum(map(sum, self.tokens))

    def tokens_of(self, domain: int) -> int:
        return sum(tokens[domain] for tokens in self.tokens)

    def by_block(self, signal: str, half: int | None = None, domain: int | None = None) -> list[np.ndarray]:
        """Energies [F] of each block, of one half or both, and of one domain or all."""
        halves = slice(None) if half is None else slice(half, half + 1)
        domains = slice(None) if domain is None else slice(domain, domain + 1)
        values = self.sums[SIGNALS.index(signal), halves, domains].sum(axis=(0, 1))
        return np.split(values, np.cumsum(self.sizes)[:-1])

    def save(self, path: Path, identity: str) -> None:
        state = {"identity": identity, "sizes": self.sizes, "tokens": self.tokens, "samples": self.samples}
        state |= {"sequences": self.sequences, "batches": self.batches, "history": self.history}
        data = save({"sums": self.sums}, metadata={"state": json.dumps(state)})
        write_atomically(path, lambda temporary: temporary.write_bytes(data))

    @classmethod
    def load(cls, path: Path | None, identity: str) -> _Halves | None:
        """What an interrupted run of the same arguments kept, if anything usable."""
        if path is None or not path.exists():
            return None
        try:
            with safe_open(str(path), framework="numpy") as f:
                state = json.loads(f.metadata()["state"])
                sums = f.get_tensor("sums")
            kept = cls(sums=sums, **state) if state.pop("identity") == identity else None
            fits = kept and sums.shape == (len(SIGNALS), 2, len(kept.tokens[0]), sum(kept.sizes))
            return kept if fits and kept.total > 0 else None
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
            return None


def _record(
    model: GlassModel, rows: list[list[int]], norms: list[mx.array], sums: _Halves, half: int, domain: int
) -> None:
    """Read rows with the dense model and add their evidence to one half and domain."""
    width = max(len(row) for row in rows)
    at_once = max(1, _MAX_HIDDEN // (width * max(sums.sizes)))
    for i in range(0, len(rows), at_once):
        part = rows[i : i + at_once]
        # padding comes after a row's tokens, which never look ahead
        tokens = mx.array([row + [0] * (width - len(row)) for row in part])
        weights = mx.array([[1.0] * len(row) + [0.0] * (width - len(row)) for row in part])
        energies = {signal: [mx.zeros((n,)) for n in sums.sizes] for signal in SIGNALS}

        def observe(j: int, h: mx.array, energies=energies, weights=weights) -> None:
            for signal, scale in (("impact", norms[j]), ("activation", None)):
                energies[signal][j] = energies[signal][j] + energy(h, scale, weights)

        run_with(hooked(model.blocks, observe), model.dense, tokens, cache=make_prompt_cache(model.dense))
        mx.eval(energies)
        for s, signal in enumerate(SIGNALS):
            sums.sums[s, half, domain] += np.concatenate([np.array(e) for e in energies[signal]])
        sums.tokens[half][domain] += sum(len(row) for row in part)
        sums.sequences += len(part)
        mx.clear_cache()


def build_ranks(
    model: GlassModel,
    tokenizer: Any,
    out: Path | None = None,
    source: Source | None = None,
    tokens: int = DEFAULT_TOKENS,
    stable_at: float | None = DEFAULT_STABLE_AT,
    name: str | None = None,
) -> Path:
    """Measure a model's ranks with a progress bar, and write them to ``out`` or to the user's cache.

    An interrupted run leaves what it has read beside the file, and the next one goes on from there.

    Returns:
        Path: the file.
    """
    out = out or cached_file(model)
    source = source or null_prompt(model, tokenizer)
    with tqdm(total=tokens, unit="tok", desc="ranks", file=sys.stderr, disable=None) as bar:

        def progress(done: int, agreement: dict[str, float]) -> None:
            bar.update(min(done, tokens) - bar.n)
            goal = "" if stable_at is None else f" of {stable_at:.0%}"
            bar.set_postfix_str(f"stable {agreement['overlap']:.1%}{goal}")

        def weighing(done: int, blocks: int) -> None:
            bar.set_postfix_str(f"sensitivity of block {done} of {blocks}")

        partial = out.with_name(f"{out.name}.partial")
        ranks = calibrate(model, source, tokens, stable_at, name, partial, progress, weighing)
    ranks.write(out)
    partial.unlink(missing_ok=True)
    return out
