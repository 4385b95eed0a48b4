"""Measure a model's global ranks.

The model speaks by itself: sequences sampled from its null prompt, the BOS token alone, and if it is an assistant from
an empty user turn (or a given text), read back in one dense pass that records the evidence of every neuron. The
sequences are split into two halves; how well the halves' ranks agree says when enough has been read. What kind of
text a sequence is of, its *domain*, is kept apart: a prompt is like the one or the other (see ``prior``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from jinja2 import TemplateError
from mlx_lm import batch_generate
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ._version import __version__
from .errors import GlassError
from .ffn import Tap, swapped
from .importance import SIGNALS, energy, output_norms
from .model import GlassModel
from .ranking import rank
from .ranks import FORMAT_VERSION, GlobalRanks, describe, fingerprint, write_atomically
from .sensitivity import SAMPLE_LENGTH, SAMPLE_ROWS, sensitivity

# Tokens to read at most, and the overlap of two halves' better halves of the neurons that ends it before.
DEFAULT_TOKENS, DEFAULT_STABLE_AT = 65536, 0.95

# Hidden values to hold at once while recording; 2**25 are 128 MB in float32.
_MAX_HIDDEN = 2**25


@dataclass
class Source:
    """Where the tokens come from.

    Attributes:
        domains: what to call the kinds of text in the metadata; batches are of each in turn.
        batch: a function from a batch's number to its token sequences, each beginning with what starts a text
            (BOS, say); an empty list ends the source. The same number gives the same sequences.
        settings: what else the metadata should say.
    """

    domains: tuple[str, ...]
    batch: Callable[[int], list[list[int]]]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        return " and ".join(self.domains)


def null_prompt(
    model: GlassModel,
    tokenizer: Any,
    sequences: int = 32,
    length: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    chat: bool | None = None,
) -> Source:
    """Sequences that the dense model samples from its BOS token, or in answer to an empty message.

    Args:
        chat (bool, optional): only the answers; or False for none of them. Default: both in turn, where the model has a
            chat template that takes an empty message.

    Raises:
        GlassError: answers were asked for, and the model gives none.
    """
    starts = {} if chat else {"null prompt": start_tokens(tokenizer)}
    if chat is not False:
        try:
            starts["chat null prompt"] = empty_message(tokenizer)
        except GlassError:
            if chat:
                raise
    sampler = make_sampler(temp=temperature)
    batchable = all(hasattr(c, "merge") for c in make_prompt_cache(model.dense))

    def batch(number: int) -> list[list[int]]:
        # The caller's random state is a key; seeding with that key's number puts it back.
        high, low = mx.random.state[0].tolist()
        mx.random.seed(int(np.random.SeedSequence((seed, number)).generate_state(1)[0]))
        start = list(starts.values())[number % len(starts)]
        prompts = [start] * sequences
        try:
            if batchable:
                out = batch_generate(
                    model.dense, tokenizer, prompts, max_tokens=length, sampler=sampler, return_token_ids=True
                )
                return [[*start, *said] for said in out.token_ids]
            return [[*start, *_sample(model, tokenizer, start, length, sampler)] for _ in prompts]
        finally:
            mx.random.seed((high << 32) | low)

    settings = {"sequences": sequences, "length": length, "temperature": temperature, "seed": seed}
    return Source(tuple(starts), batch, settings)


def empty_message(tokenizer: Any) -> list[int]:
    """What an assistant is given to answer where the user said nothing.

    Raises:
        GlassError: the model has no chat template, or one that does not take this.
    """
    if not tokenizer.has_chat_template:
        raise GlassError("This model has no chat template: leave --chat away.")
    try:
        return list(tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True))
    except TemplateError as e:
        raise GlassError(f"The chat template does not take an empty message ({e}): leave --chat away.") from e


def given_sequences(
    method: str, rows: list[list[int]], sequences: int = 32, settings: dict[str, Any] | None = None
) -> Source:
    """Token sequences that are at hand, of a text or a data set."""
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]
    return Source(
        (method,),
        lambda number: rows[number * sequences : (number + 1) * sequences],
        {"sequences": sequences, "digest": digest, **(settings or {})},
    )


def text_rows(text: str, tokenizer: Any, length: int) -> list[list[int]]:
    """A text cut into rows of at most ``length`` tokens after the BOS token."""
    start = start_tokens(tokenizer)
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    return [[*start, *ids[i : i + length]] for i in range(0, len(ids), length)]


def dataset_rows(lines: list[str], tokenizer: Any, length: int) -> list[list[int]]:
    """JSON lines with ``text``, ``messages`` or ``prompt`` and ``completion``, each a row of at most ``length`` tokens.

    Raises:
        GlassError: a line is none of these.
    """
    start, rows = start_tokens(tokenizer), []
    for number, line in enumerate(lines, 1):
        try:
            item = json.loads(line)
            if "messages" in item:
                row = list(tokenizer.apply_chat_template(item["messages"]))
            else:
                text = item["text"] if "text" in item else item["prompt"] + item["completion"]
                row = [*start, *tokenizer.encode(text, add_special_tokens=False)]
        except Exception as e:  # of JSON, of the template, or a key that is not there
            raise GlassError(
                f'Line {number} of the data set has no "text", "messages" or "prompt" and "completion".'
            ) from e
        rows.append(row[: length + 1])
    return rows


def start_tokens(tokenizer: Any) -> list[int]:
    """What a text begins with: BOS or, in families without one, the end token."""
    bos = tokenizer.bos_token_id
    return [tokenizer.eos_token_id if bos is None else bos]


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

        def tap(j: int, projection: Any, energies=energies, weights=weights) -> Tap:
            def observe(h: mx.array) -> None:
                for signal, scale in (("impact", norms[j]), ("activation", None)):
                    energies[signal][j] = energies[signal][j] + energy(h, scale, weights)

            return Tap(projection, observe)

        taps = [{b.output: tap(j, b.module[b.output])} for j, b in enumerate(model.blocks)]
        with swapped(model.blocks, taps):
            model.dense(tokens, cache=make_prompt_cache(model.dense))
        mx.eval(energies)
        for s, signal in enumerate(SIGNALS):
            sums.sums[s, half, domain] += np.concatenate([np.array(e) for e in energies[signal]])
        sums.tokens[half][domain] += sum(len(row) for row in part)
        sums.sequences += len(part)
        mx.clear_cache()


def _sample(model: GlassModel, tokenizer: Any, start: list[int], length: int, sampler: Any) -> list[int]:
    """One sequence, for models whose caches mlx-lm cannot batch."""
    said = []
    for token, _ in generate_step(mx.array(start), model.dense, max_tokens=length, sampler=sampler):
        if token in tokenizer.eos_token_ids:
            break
        said.append(token)
    return said
