"""GlassModel: an mlx-lm model that prefills densely and decodes on the neurons its prompt calls for.

A prompt is read by the dense model, which also records how strongly each neuron fires. What is expected after it, or
the fusion of its ranks with the model's global ones, orders the neurons; the best are sliced out of the projections,
and decoding runs on these. What was decoded so is read again densely with the next prompt, or on the way (refresh).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from ..core.importance import energy, output_norms
from ..core.layer_budgets import allocate, uniform
from ..core.prior import Prior
from ..core.ranking import fuse, preference, rank
from ..core.slicing import UNIT
from ..errors import GlassError
from .blocks import Block, Tap, swapped
from .config import GlassConfig
from .discovery import find_blocks
from .memory import SessionMemory, WeightFiles, default_limit
from .session import Session, bytes_of

logger = logging.getLogger("glass_mlx")

_REREAD = 512  # tokens of an answer that are read again in one call


@dataclass
class _Plan:
    """What GLASS knows of a model. Kept out of the module tree: none of it is a parameter."""

    blocks: list[Block]
    left_dense: dict[str, str]
    global_ranks: dict[str, list[mx.array]] | None = None
    priors: dict[str, Prior] = field(default_factory=dict)
    sensitivity: list[float] | None = None
    counts: dict[tuple, list[int]] = field(default_factory=dict)  # by density and allocation
    norms: list[mx.array] = field(default_factory=list)
    path: Path | None = None
    memory: SessionMemory | None = None
    files: WeightFiles | None = None
    paces: dict[float, Any] = field(default_factory=dict)


class GlassModel(nn.Module):
    """Wraps a loaded mlx-lm model; usable wherever mlx-lm takes a model.

    Every prompt cache from ``make_cache`` carries its own :class:`Session`, so several conversations can be open on
    one model. Calls with a cache of another origin, or without one, run the dense model.

    Attributes:
        dense (nn.Module): the wrapped model, unchanged in behaviour.
        config (GlassConfig): the choice of neurons for new sessions.
        path (Path | None): the model's directory, where known.
    """

    def __init__(
        self,
        dense: nn.Module,
        config: GlassConfig | None = None,
        global_ranks: dict[str, list[mx.array]] | None = None,
        path: Path | None = None,
        max_session_memory: int | None = None,
        low_memory: bool = False,
    ):
        """
        Args:
            dense (nn.Module): a loaded mlx-lm model.
            config (GlassConfig, optional): the choice of neurons. Default: ``GlassConfig()``.
            global_ranks (dict, optional): for each signal the ranks [F] of every block, in the order of
                ``blocks``. Without them the prompt alone decides.
            path (Path, optional): the model's directory.
            max_session_memory (int, optional): bytes for the compact weights of all sessions; those of idle ones
                are dropped, and made again when needed. Default: ``memory.default_limit``.
            low_memory (bool): let go of the dense FFN weights while decoding, and read them from the model's files
                again for the next prompt. A configured refresh ``"auto"`` is 0 then.

        Raises:
            GlassError: the model has no FFN block that can be sparsified.
        """
        super().__init__()
        blocks, left_dense = find_blocks(dense)
        if not blocks:
            name = getattr(dense, "model_type", type(dense).__name__)
            raise GlassError(
                f"{name} has no dense FFN block that GLASS can sparsify ({_why_none(dense, left_dense)}). "
                "Use it with mlx-lm directly."
            )
        self.dense = dense
        self.config = config or GlassConfig()
        if low_memory and path is None:
            raise GlassError("low_memory needs the model's directory, to read its weights again.")
        if low_memory and self.config.refresh == "auto":
            self.config = self.config.updated(refresh=0)  # each would read all weights from the disk
        self._plan = _Plan(blocks, left_dense, path=path)
        self.set_global_ranks(global_ranks)
        limit = default_limit(dense) if max_session_memory is None else max_session_memory
        self._plan.memory = SessionMemory(limit)
        self._plan.files = WeightFiles(path, blocks) if low_memory else None
        for message in _summarise(left_dense):
            logger.warning(message)

    @property
    def blocks(self) -> list[Block]:
        """The FFN blocks that decode sparsely, in the model's order."""
        return self._plan.blocks

    @property
    def left_dense(self) -> dict[str, str]:
        """FFN blocks that stay dense: {path: reason}."""
        return self._plan.left_dense

    @property
    def memory(self) -> SessionMemory:
        """The sessions' compact weights, and their limit."""
        return self._plan.memory

    @property
    def paces(self) -> dict[float, Any]:
        """What verified decoding has learnt about the times of this model, by density."""
        return self._plan.paces

    @property
    def path(self) -> Path | None:
        return self._plan.path

    @property
    def global_ranks(self) -> dict[str, list[mx.array]] | None:
        """The model's global ranks by signal, [F] for each block, or None."""
        return self._plan.global_ranks

    def set_global_ranks(
        self,
        ranks: dict[str, list[mx.array]] | None,
        domains: dict[str, list[mx.array]] | None = None,
        sensitivity: list[float] | None = None,
    ) -> None:
        """Use these for the choices to come.

        Args:
            ranks (dict, optional): for each signal the global ranks [F] of every block, in the order of ``blocks``;
                None to go without.
            domains (dict, optional): for each signal the energies [K, F] of every block on each kind of text that the
                ranks come from. Default: made from the ranks, a neuron of twice the rank having half the energy.
            sensitivity (list, optional): of every block (``sensitivity.sensitivity``). Default: all alike.
        """
        plan = self._plan
        plan.global_ranks, plan.sensitivity, plan.counts = ranks, sensitivity, {}
        domains = domains or {signal: [_shares(r) for r in rs] for signal, rs in (ranks or {}).items()}
        plan.priors = {signal: Prior(rows) for signal, rows in domains.items()}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "dense":
                raise
            return getattr(self.dense, name)

    def make_cache(self, max_kv_size: int | None = None, **config: Any) -> list[Any]:
        """A new prompt cache: mlx-lm's own for this model and, last, a new session.

        Args:
            max_kv_size (int, optional): as in mlx-lm's ``make_prompt_cache``.
            config: fields of ``GlassConfig``, where this conversation differs.
        """
        return [
            *make_prompt_cache(self.dense, max_kv_size),
            Session(self.config.updated(**config)),
        ]

    def add_session(self, cache: list[Any]) -> list[Any]:
        """A prompt cache with a session: the cache as it is if it has one, else a copy of the list with a new one.
        The tokens in a cache that plain mlx-lm filled (``mlx_lm.cache_prompt``, say) left no evidence, so what is
        read from now on and the global ranks decide."""
        if self._find_session(cache) is not None:
            return cache
        session = Session(self.config)
        session.offset = max((entry.size() for entry in cache), default=0)
        return [*cache, session]

    def session(self, cache: list[Any]) -> Session:
        """The session of a prompt cache that ``make_cache`` made or mlx-lm loaded from a file.

        Raises:
            GlassError: the cache has none.
        """
        session = self._find_session(cache)
        if session is None:
            raise GlassError("This prompt cache has no session; make it with model.make_cache().")
        return session

    def kept_neurons(self, cache: list[Any]) -> dict[str, mx.array]:
        """The neurons that a conversation decodes with: {block path: indices [k] int32, ascending}.

        Raises:
            GlassError: nothing to choose by yet: no prompt was read and there are no global ranks.
        """
        session = self.session(cache)
        return {b.path: kept for b, kept in zip(self.blocks, self._kept(session))}

    def kept_counts(self, density: float, allocation: str | None = None) -> list[int]:
        """How many neurons a density keeps in each block: density * F rounded to what the block can be cut into, or
        with the allocation ``"measured"``, where sensitivities are known, as many of all (``allocation``).
        Default: the allocation of the model's configuration."""
        key = (density, allocation or self.config.allocation)
        counts = self._plan.counts
        if key not in counts:
            sizes, groups = [b.size for b in self.blocks], [b.group for b in self.blocks]
            sensitivity = self._plan.sensitivity if key[1] == "measured" else None
            if sensitivity is None:
                counts[key] = uniform(density, sizes, groups)
            else:
                energies = [np.array(e) for e in self._by_block(self._plan.priors["impact"].expected(None))]
                counts[key] = allocate(density, energies, sensitivity, groups)
        return counts[key]

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
        **kwargs: Any,
    ) -> mx.array:
        """Logits [B, L, vocabulary] of tokens [B, L]; a prefill or a decode step of the cache's session."""
        if input_embeddings is not None:
            kwargs["input_embeddings"] = input_embeddings
        session = self._find_session(cache)
        if session is None:
            return self.dense(inputs, cache=cache, **kwargs)
        length = (inputs if input_embeddings is None else input_embeddings).shape[1]
        phase = self._prefill if session.is_prefill(length) else self._decode
        return phase(session, length, inputs, cache[:-1], kwargs)

    def decode(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        """Logits [B, L, vocabulary] of tokens [B, L], decoded sparsely whatever their number, and refreshed on the way
        as if they came one by one.

        A call of the model takes several tokens for a prompt; this feeds it a given continuation.
        """
        session, logits = self.session(cache), []
        while inputs.shape[1]:
            left = session.until_refresh()
            length = inputs.shape[1] if left is None else max(1, left)
            now, inputs = inputs[:, :length], inputs[:, length:]
            logits.append(self._decode(session, now.shape[1], now, cache[:-1], {}))
        return mx.concatenate(logits, axis=1)

    def prepare(self, cache: list[Any]) -> None:
        """Choose the neurons and make their compact weights now, if they are not."""
        self._compact(self.session(cache))

    def draft(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        """Logits [B, L, vocabulary] of tokens [B, L], decoded sparsely, to be verified; see ``verify``."""
        session = self.session(cache)
        with swapped(self.blocks, self._compact(session)):
            logits = self.dense(inputs, cache=cache[:-1])
        session.offset += inputs.shape[1]
        return logits

    def verify(self, inputs: mx.array, cache: list[Any], drafted: int) -> mx.array:
        """Logits [B, L, vocabulary] of tokens [B, L] by the dense model, in place of what the last ``drafted`` of the
        cache were. Their evidence is recorded; the choice of neurons stays."""
        session = self.session(cache)
        self.retract(cache, drafted)
        return self._read(session, inputs.shape[1], 0, inputs, cache[:-1], {}, choose=False)

    def retract(self, cache: list[Any], tokens: int) -> None:
        """Take the last ``tokens`` off a cache; the choice of neurons stays."""
        if tokens:
            trim_prompt_cache(cache[:-1], tokens)
            self.session(cache).retract(tokens)

    def _prefill(self, session: Session, length: int, inputs, cache, kwargs) -> mx.array:
        """The dense model over a prompt, with each block's evidence recorded."""
        unread = self._unread(session, cache)
        if unread is None:
            return self._read(session, length, length, inputs, cache, kwargs)
        together = 0 if "input_embeddings" in kwargs else _REREAD  # how many are read in one call with the prompt
        while unread.shape[1] > together:
            now, unread = unread[:, :_REREAD], unread[:, _REREAD:]
            self._read(session, now.shape[1], 0, now, cache, {}, choose=False)
            mx.eval([entry.state for entry in cache], session.energy)
        if unread.shape[1] > 0:
            inputs = mx.concatenate([unread, inputs], axis=1)
        read = length + unread.shape[1]
        return self._read(session, read, length, inputs, cache, kwargs)[:, -length:]

    def _unread(self, session: Session, cache: list[Any]) -> mx.array | None:
        """Trim what was said sparsely off the cache, to be read again; None if there is none, or it cannot be."""
        if not session.unread or not can_trim_prompt_cache(cache):
            session.unread = []
            return None
        tokens = session.take_unread()
        trim_prompt_cache(cache, tokens.shape[1])
        return tokens

    def _read(self, session: Session, length: int, prompt: int, inputs, cache, kwargs, choose=True) -> mx.array:
        norms = self._norms() if session.config.signal == "impact" else [None] * len(self.blocks)
        energies = [mx.zeros((block.size,)) for block in self.blocks]

        def tap(i: int, block: Block) -> dict[str, Tap]:
            def observe(h: mx.array) -> mx.array:
                energies[i] = energies[i] + energy(h, norms[i])
                # recorded before it is projected: else every layer's hidden vectors wait for the end of the prefill
                return mx.depends(h, energies[i])

            return {block.output: Tap(block.module[block.output], observe)}

        with swapped(self.blocks, [tap(i, block) for i, block in enumerate(self.blocks)]):
            logits = self.dense(inputs, cache=cache, **kwargs)
        session.record(mx.concatenate(energies), length, prompt, choose)
        return logits

    def _decode(self, session: Session, length: int, inputs, cache, kwargs) -> mx.array:
        """The same forward code on the session's compact projections; or, where a refresh is due, the dense model over
        all that was said since the last one."""
        if session.until_refresh() == 0 and (unread := self._unread(session, cache)) is not None:
            inputs = mx.concatenate([unread, inputs], axis=1)
            logits = self._read(session, inputs.shape[1], 0, inputs, cache, kwargs, session.chooses_now())
            session.said += length
            return logits[:, -length:]
        if session.config.density == 1:
            projections: list[dict[str, nn.Module]] = []
        else:
            projections = self._compact(session)
        with swapped(self.blocks, projections):
            logits = self.dense(inputs, cache=cache, **kwargs)
        # densely decoded ones too, where they follow sparse ones: what is read again is the end of the cache
        repaired = session.config.density == 1 and not session.unread
        session.advance(length, None if repaired or "input_embeddings" in kwargs else inputs)
        return logits

    def _compact(self, session: Session) -> list[dict[str, nn.Module]]:
        """The session's compact projections, made when first asked for after a choice."""
        memory = self._plan.memory
        if session.compact is not None:
            memory.use(session)
            return session.compact
        if session.energy is not None:
            mx.eval(session.energy)  # the prefill's time is not selection's
        tic = time.perf_counter()
        made = [block.compact(kept) for block, kept in zip(self.blocks, self._kept(session))]
        memory.use(session, bytes_of(made))
        files = self._plan.files
        stored = files.read() if files is not None else {}
        ahead = iter(made[1:])
        _start(made[0])
        # One block is sliced while the next is being sent to the device, and no more: what slicing needs in between
        # is held for two blocks at most.
        for i, (block, projections) in enumerate(zip(self.blocks, made)):
            _start(next(ahead, {}))
            mx.eval([projection.parameters() for projection in projections.values()])
            if files is not None:
                files.release(i, block, projections, stored)
        if files is not None:
            mx.clear_cache()
        session.compact = made
        session.selection_time = time.perf_counter() - tic
        return made

    def _kept(self, session: Session) -> list[mx.array]:
        if session.kept is None:
            session.kept = self._choose(session)
        return session.kept

    def _choose(self, session: Session) -> list[mx.array]:
        """Score the neurons by the session's evidence and what is known of the model, and select, on the device."""
        config = session.config
        if config.density == 1:
            return [mx.arange(block.size, dtype=mx.int32) for block in self.blocks]
        counts = self.kept_counts(config.density, config.allocation)
        scores = self._scores(session)
        kept: list[mx.array] = [None] * len(self.blocks)
        for (_, group), members in self._alike().items():  # blocks of one shape at once
            order = preference(scores(members), group)
            for i, best in zip(members, order):
                kept[i] = mx.sort(best[: counts[i]])
        return kept

    def _scores(self, session: Session) -> Callable[[list[int]], mx.array]:
        """What gives the scores [blocks, F] of blocks of one shape by their indices: integers, smaller is better."""
        prior = self._plan.priors.get(session.config.signal)
        if prior is None and session.energy is None:
            raise GlassError("No neurons are chosen yet: read a prompt first, or load global ranks.")
        weight = self._weight(session)
        if weight == "auto":
            expected = self._by_block(prior.expected(session.energy))
            return lambda members: rank(mx.stack([expected[i] for i in members]))
        ranks = self.global_ranks and self.global_ranks[session.config.signal]
        if weight == 1:
            return lambda members: mx.stack([ranks[i] for i in members])
        local = self._by_block(session.energy)

        def fused(members: list[int]) -> mx.array:
            own = rank(mx.stack([local[i] for i in members]))
            return own if weight == 0 else fuse(own, mx.stack([ranks[i] for i in members]), weight)

        return fused

    def _alike(self) -> dict[tuple[int, int], list[int]]:
        """Indices of the blocks by their number of neurons and the groups these are kept in."""
        alike: dict[tuple[int, int], list[int]] = {}
        for i, block in enumerate(self.blocks):
            alike.setdefault((block.size, block.group), []).append(i)
        return alike

    def _weight(self, session: Session) -> float | str:
        """The configured global weight, as far as there is something to weigh."""
        weight = session.config.global_weight
        if not self._plan.priors:
            return 0.0
        if weight == "auto":
            return weight
        alone = session.energy is None or (session.prompt_tokens <= 1 and weight > 0)
        return 1.0 if alone else float(weight)

    def global_weight(self, session: Session) -> float:
        """How much what is known of the model counts in a session's choice against the prompt, in [0, 1]: the
        configured weight, or with ``"auto"`` its share of the tokens that the expectation rests on. 0 without global
        ranks; 1 where nothing local is known, or only a single token that is to be weighed against them."""
        weight = self._weight(session)
        if weight != "auto":
            return weight
        if session.energy is None:
            return 1.0
        tokens = self._plan.priors[session.config.signal].tokens(session.energy)
        return (tokens / (tokens + mx.sum(session.energy) / len(self.blocks))).item()

    def _by_block(self, energy: mx.array) -> list[mx.array]:
        """A session's evidence [sum of F], block by block."""
        sizes = [block.size for block in self.blocks]
        return mx.split(energy, [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)])

    def _norms(self) -> list[mx.array]:
        if not self._plan.norms:
            for block in self.blocks:
                norms = output_norms(block.module[block.output])
                mx.eval(norms)  # one block at a time: a quantised one is dequantised for this
                self._plan.norms.append(norms)
        return self._plan.norms

    def _find_session(self, cache: list[Any] | None) -> Session | None:
        if not cache:
            return None
        if isinstance(cache[-1], Session):
            return cache[-1]
        restored = Session.restore(cache[-1])
        if restored is not None:
            cache[-1] = restored
            if restored.kept is not None and not self._can_keep(restored):
                restored.kept = None  # chosen for weights in another quantisation: choose again
        return restored

    def _can_keep(self, session: Session) -> bool:
        counts = self.kept_counts(session.config.density, session.config.allocation)
        if [kept.shape for kept in session.kept] != [(k,) for k in counts]:
            return False
        return all(block.group == 1 or _in_units(kept, block.group) for block, kept in zip(self.blocks, session.kept))


def _start(projections: dict[str, nn.Module]) -> None:
    mx.async_eval([projection.parameters() for projection in projections.values()])


def _in_units(kept: mx.array, group: int) -> bool:
    groups = kept.reshape(-1, UNIT) // group
    return mx.all(groups == groups[:, :1]).item()


def _shares(ranks: mx.array) -> mx.array:
    """Energies [1, F] that would rank like this."""
    shares = 1 / ranks.astype(mx.float32)
    return (shares / mx.sum(shares))[None]


def _why_none(dense: nn.Module, left_dense: dict[str, str]) -> str:
    if left_dense:
        return "; ".join(_summarise(left_dense))
    if any("Switch" in type(m).__name__ or "experts" in path.split(".") for path, m in dense.named_modules()):
        return "its FFNs are routed experts"
    return "none of its modules has the projections of an FFN: an SSM, or no text model"


def _summarise(left_dense: dict[str, str]) -> list[str]:
    """One line for each reason why blocks stay dense."""
    reasons: dict[str, list[str]] = {}
    for path, reason in left_dense.items():
        reasons.setdefault(reason, []).append(path)
    return [
        f"left dense: {paths[0]}{f' and {len(paths) - 1} more' if paths[1:] else ''} ({reason})"
        for reason, paths in reasons.items()
    ]
