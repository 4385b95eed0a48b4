"""Measure a model's global statistics.

The model generates text by itself: sequences sampled from its null prompt (the BOS token alone) and, if it is an
assistant, from an empty user turn. Or a text is given. The sequences are read back in one dense pass that records the
evidence of every neuron. They are split into two halves; how much more energy is dropped by the other half's choice
than by a half's own tells when enough has been read. Kinds of text (*domains*) are kept apart, because a prompt
resembles one or another (``core/prior.py``).
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from .._version import __version__
from ..core.importance import SIGNALS, output_norms
from ..core.ranking import rank_by_expert
from ..errors import GlassError
from ..model.blocks import by_token, run_with
from ..model.discovery import vocabulary_size
from ..model.glass_model import GlassModel
from .amounts import DEFAULT_RANK, DEFAULT_STABLE_AT, DEFAULT_TOKENS
from .bars import READING, Bars
from .evidence import STABILITY, SplitEvidence
from .format import FORMAT_VERSION, GlobalStatistics
from .identity import describe, fingerprint
from .lookup import cached_file
from .quality import measure_quality
from .response import measure_responses
from .sensitivity import sensitivity
from .sources import Source, null_prompt

logger = logging.getLogger("glass_mlx")

# Of the partial file: what an older version has read in other batches is measured again.
_PARTIAL_VERSION = 3

# Hidden values to hold at once while recording; 2**25 are 128 MB in float32.
_MAX_HIDDEN = 2**25


def build_ranks(
    model: GlassModel,
    tokenizer: Any,
    out: Path | None = None,
    source: Source | None = None,
    tokens: int = DEFAULT_TOKENS,
    stable_at: float | None = DEFAULT_STABLE_AT,
    name: str | None = None,
    response_rank: int = DEFAULT_RANK,
    on_step: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Path:
    """Measure a model's global statistics with a progress bar, and write them to a file.

    What was read stays beside the file, also of an interrupted run: the next run of the same source goes on from there,
    for statistics that are more stable, say.

    Args:
        model (GlassModel): the model.
        tokenizer: its tokenizer.
        out (Path, optional): the file. Default: the model's file in the user's cache.
        source (Source, optional): the token sequences. Default: :func:`sources.null_prompt`.
        tokens, stable_at, name, response_rank: as in :func:`measure_statistics`.
        on_step (callable): called with the name of the phase, how much of it is done and of how much, whenever that
            changes: in ``bars.READING`` with every token that is generated.

    Returns:
        Path: the file.
    """
    out = out or cached_file(model)
    source = source or null_prompt(model, tokenizer)
    partial = out.with_name(f"{out.name}.read")
    with Bars(stable_at, on_step) as bars:
        source.watchers.append(bars.sampled)
        try:
            statistics = measure_statistics(
                model, source, tokens, stable_at, name, partial, response_rank, bars.read, bars.phase
            )
        except KeyboardInterrupt:
            logger.warning(
                "stopped: %s tokens are kept%s",
                f"{bars.kept:,}" if bars.kept else "no",
                ", and the next measuring of this model goes on from them" if bars.kept else "",
            )
            raise
        finally:
            source.watchers.remove(bars.sampled)
    statistics.write(out)
    return out


def measure_statistics(
    model: GlassModel,
    source: Source,
    tokens: int = DEFAULT_TOKENS,
    stable_at: float | None = DEFAULT_STABLE_AT,
    name: str | None = None,
    partial: Path | None = None,
    response_rank: int = DEFAULT_RANK,
    progress: Callable[[int, dict[str, float]], None] = lambda tokens, stability: None,
    phase: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> GlobalStatistics:
    """Measure a model's global statistics.

    Args:
        model (GlassModel): the model; its dense form is run.
        source (Source): the token sequences to record.
        tokens (int): stop after this many tokens.
        stable_at (float, optional): stop earlier, at this ``efficiency`` of the two halves of the sequences
            (:meth:`SplitEvidence.stability`); None reads all ``tokens``.
        name (str, optional): the model's name in the metadata.
        partial (Path, optional): a file that keeps what has been read. An interrupted run with the same arguments
            continues from it, with the result of an uninterrupted one.
        response_rank (int): of the answers for dropped neurons (``response.py``); 0 for none.
        progress: called after every batch with the tokens read and :meth:`SplitEvidence.stability`.
        phase: called with the name of each phase, how much of it is done, at first what an earlier run has kept, and
            of how much.

    Returns:
        GlobalStatistics: for both signals and all blocks.

    Raises:
        GlassError: the source gave no tokens, or ``partial`` cannot be written.
    """
    identity = json.dumps([_PARTIAL_VERSION, fingerprint(model), source.method, source.settings])
    empty = SplitEvidence.empty(model, len(source.domains))
    evidence = SplitEvidence.load(partial, identity, empty, vocabulary_size(model.dense))

    def tell(stability: dict[str, float]) -> None:
        known = stable_at is not None
        most = evidence.expected_tokens(stability["efficiency"], stable_at) if known else math.inf
        phase(READING, evidence.total, max(1, round(min(tokens, most))))

    def after_batch(stability: dict[str, float]) -> None:
        tell(stability)
        progress(evidence.total, stability)
        if partial is not None:
            evidence.save(partial, identity)

    def during(name: str) -> Callable[[int, int], None]:
        phase(name, 0, 1)
        return functools.partial(phase, name)

    before = evidence.stability()
    tell(before)
    _read(model, source, evidence, tokens, stable_at, before, after_batch)
    if evidence.total == 0:
        raise GlassError("There is nothing to measure: the source gave no tokens.")
    read = [d for d in range(len(source.domains)) if evidence.tokens_of(d)]
    energies = {signal: _shares(evidence.by_block(signal)) for signal in SIGNALS}
    experts = [block.experts for block in model.blocks]
    ranks = {signal: list(map(rank_by_expert, energies[signal], experts)) for signal in SIGNALS}
    by_domain = {signal: [_shares(evidence.by_block(signal, domain=d)) for d in read] for signal in SIGNALS}
    statistics = GlobalStatistics(
        ranks=ranks,
        energies=energies,
        domains={signal: [mx.stack(rows) for rows in zip(*found)] for signal, found in by_domain.items()},
        sensitivity=_mean_sensitivity(
            model,
            [evidence.rows[d] for d in read],
            by_domain["impact"],
            during("sensitivity of the blocks"),
        ),
        responses=measure_responses(
            model,
            sum(evidence.rows, []),
            ranks["impact"],
            response_rank,
            during("responses of the blocks"),
        )
        or None,
        metadata=_metadata(model, source, evidence, read, name),
    )
    # the model itself keeps the statistics that it has
    judged = GlassModel(model.dense, model.config.updated(experts="sparse"))
    statistics.use_in(judged)
    alternating = [row for rows in zip_longest(*evidence.rows) for row in rows if row is not None]
    statistics.quality = measure_quality(judged, alternating, during("quality of densities"))
    return statistics


def _read(
    model: GlassModel,
    source: Source,
    evidence: SplitEvidence,
    tokens: int,
    stable_at: float | None,
    agreement: dict[str, float],
    after_batch: Callable[[dict[str, float]], None],
) -> None:
    """Read batches of a source into the evidence until there are enough tokens, or the ranks are stable; ``agreement``
    is the evidence's stability so far."""
    norms = [output_norms(block.module[block.output]) for block in model.blocks]
    mx.eval(norms)
    domains = len(source.domains)
    while evidence.batches < domains or (
        evidence.total < tokens and not (stable_at is not None and agreement["efficiency"] >= stable_at)
    ):
        rows = [row for row in source.batch(evidence.batches) if row]
        if not rows:
            break
        domain, before = evidence.batches % domains, evidence.sequences
        evidence.rows[domain] += rows
        for half in (0, 1):  # sequences alternate, across batches too
            mine = rows[(before + half) % 2 :: 2]
            if mine:
                _record(model, mine, norms, evidence, half, domain, source)
        evidence.batches += 1
        agreement = evidence.stability()
        evidence.history.append([evidence.total, *(round(agreement[key], 4) for key in STABILITY)])
        after_batch(agreement)


def _record(
    model: GlassModel,
    rows: list[list[int]],
    norms: list[mx.array],
    evidence: SplitEvidence,
    half: int,
    domain: int,
    source: Source,
) -> None:
    """Read rows with the dense model and add their energies to one half and domain."""
    width = max(len(row) for row in rows)
    at_once = max(1, _MAX_HIDDEN // (width * max(block.width * block.active for block in model.blocks)))
    for i in range(0, len(rows), at_once):
        part = rows[i : i + at_once]
        # padding comes after a row's tokens, which never look ahead
        tokens = mx.array([row + [0] * (width - len(row)) for row in part])
        weights = mx.array([[1.0] * len(row) + [0.0] * (width - len(row)) for row in part])
        energies = {signal: [mx.zeros((n,)) for n in evidence.sizes] for signal in SIGNALS}

        def observe(j: int, h: mx.array, *routing: mx.array, energies=energies, weights=weights) -> None:
            for signal, scale in (("impact", norms[j]), ("activation", None)):
                found = model.blocks[j].energy(h, scale, *routing, weights=weights)
                energies[signal][j] = energies[signal][j] + found

        run_with(by_token(model.blocks, observe), model.dense, tokens, cache=make_prompt_cache(model.dense))
        mx.eval(energies)
        for s, signal in enumerate(SIGNALS):
            evidence.sums[s, half, domain] += np.concatenate([np.array(e) for e in energies[signal]])
        evidence.tokens[half][domain] += sum(len(row) for row in part)
        evidence.sequences += len(part)
        mx.clear_cache()
        source.tell(0)


def _shares(energies: list[np.ndarray]) -> list[mx.array]:
    """The energies [F] of each block, scaled to a sum of 1; all alike in a block that never fired."""
    fired = [e if e.sum() > 0 else np.ones_like(e) for e in energies]
    return [mx.array((e / e.sum()).astype(np.float32)) for e in fired]


def _mean_sensitivity(
    model: GlassModel,
    samples: list[list[list[int]]],
    energies: list[list[mx.array]],
    block_progress: Callable[[int, int], None],
) -> list[float]:
    """The sensitivity to each block, averaged over domains with a sample and energies [F] of every block each."""
    blocks, sums = len(model.blocks), np.zeros(len(model.blocks))
    for i, (rows, own) in enumerate(zip(samples, energies)):
        sums += sensitivity(model, rows, own, lambda n, i=i: block_progress(i * blocks + n, len(samples) * blocks))
    return (sums / len(samples)).tolist()


def _metadata(
    model: GlassModel, source: Source, evidence: SplitEvidence, read: list[int], name: str | None
) -> dict[str, str]:
    """A file's metadata; ``read`` are the domains that tokens were read of."""
    described, routed = describe(model), any(block.experts for block in model.blocks)
    if name:
        described["model"] = name
    return {
        "format_version": FORMAT_VERSION,
        **described,
        "fingerprint": fingerprint(model),
        "sizes": json.dumps([block.size for block in model.blocks]),
        "blocks": json.dumps([block.path for block in model.blocks]),
        **({"experts": json.dumps([block.experts for block in model.blocks])} if routed else {}),
        "method": source.method,
        "domains": json.dumps([source.domains[d] for d in read]),
        "domain_tokens": json.dumps([evidence.tokens_of(d) for d in read]),
        **{key: str(value) for key, value in source.settings.items()},
        "sequences": str(evidence.sequences),
        "tokens": str(evidence.total),
        "stability": json.dumps({key: round(value, 4) for key, value in evidence.stability().items()}),
        "stability_history": json.dumps(evidence.history),
        "glass_mlx": __version__,
        "mlx": mx.__version__,
        "mlx_lm": mlx_lm.__version__,
    }
