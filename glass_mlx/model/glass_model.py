"""GlassModel: an mlx-lm model that prefills densely and decodes on the neurons that its prompt calls for.

logits = model.prefill(tokens, cache)   # dense; every neuron's evidence is recorded in the cache's session
model.select(cache)                     # neurons are chosen, and their weights copied into compact matrices
logits = model.decode(token, cache)     # the same forward code, on the compact weights
"""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from ..core.compensation import Response
from ..errors import GlassError
from .blocks import Block, run_with
from .compacting import make_compact
from .config import GlassConfig
from .evidence import recording
from .memory import SessionMemory
from .part import ModelPart, WholeModel
from .plan import Plan
from .quality import QualityPoint
from .saved_cache import check_entries
from .saved_session import check_restored, restore
from .session import Phase, Session, call_length

logger = logging.getLogger("glass_mlx")

# Generated tokens that a dense call reads again at once, before a prompt: a long answer needs no more memory.
_REREAD = 512


class GlassModel(nn.Module):
    """Wraps a loaded mlx-lm model; usable wherever mlx-lm takes a model.

    Every prompt cache from ``make_cache`` carries its own :class:`Session`, so several conversations can be open on one
    model. A call with any other cache, or without one, runs the dense model. The phases are calls: ``prefill``,
    ``select`` and ``decode``; only where a foreign loop calls the model itself is the phase inferred.

    Attributes:
        dense (nn.Module): the wrapped model, unchanged in behaviour.
        config (GlassConfig): the choice of neurons for new sessions.
    """

    def __init__(
        self,
        dense: nn.Module,
        config: GlassConfig | None = None,
        global_ranks: dict[str, list[mx.array]] | None = None,
        path: Path | None = None,
        max_session_memory: int | None = None,
        low_memory: bool = False,
        whole: WholeModel | None = None,
    ):
        """
        Args:
            dense (nn.Module): a loaded mlx-lm model.
            config (GlassConfig, optional): the choice of neurons. Default: ``GlassConfig()``.
            global_ranks (dict, optional): for each signal the ranks [F] of every block, in the order of ``blocks``.
                Without them the prompt alone decides.
            path (Path, optional): the model's directory.
            max_session_memory (int, optional): bytes for the compact weights of all sessions. Those of idle sessions
                are dropped, and made again when needed. Default: ``memory.default_limit``.
            low_memory (bool): let go of the dense FFN weights while decoding, and read them from the model's files
                again for the next prompt.
            whole (WholeModel, optional): what this is a part of (``model/part.py``); global ranks are then the whole's.

        Raises:
            GlassError: the model has no FFN block that can be sparsified, or it is a GlassModel.
        """
        super().__init__()
        if isinstance(dense, GlassModel):
            raise GlassError("This model is wrapped already; give its dense model, model.dense.")
        self.dense = dense
        self.config = config or GlassConfig()
        self._plan = Plan.make(dense, path, max_session_memory, whole)
        if low_memory:
            self.let_go_of_dense_weights()
        self.set_global_ranks(global_ranks)

    @property
    def blocks(self) -> list[Block]:
        """The FFN blocks that decode sparsely, in the model's order, as the last prefill found them."""
        return self._plan.blocks

    @property
    def part(self) -> ModelPart | None:
        """Which part of a model this is, if several processes share it."""
        return self._plan.part

    @property
    def left_dense(self) -> dict[str, str]:
        """FFN blocks that stay dense: {path: reason}."""
        return self._plan.left_dense

    @property
    def low_memory(self) -> bool:
        """Whether the dense FFN weights are let go of while decoding."""
        return self._plan.files is not None

    def let_go_of_dense_weights(self) -> None:
        """From the next choice of neurons on, as ``low_memory`` of the constructor.

        Raises:
            GlassError: the model's directory is not known, or this is only a part of it.
        """
        if self.path is None or self.part is not None:
            raise GlassError("low_memory needs the model's directory, to read its weights again, and a whole model.")
        self._plan.let_go()

    @property
    def memory(self) -> SessionMemory:
        """The sessions' compact weights, and their limit."""
        return self._plan.memory

    @property
    def draft_schedulers(self) -> dict[float, Any]:
        """What verified decoding has learnt about the times of this model, by density."""
        return self._plan.draft_schedulers

    @property
    def path(self) -> Path | None:
        """The model's directory, where known."""
        return self._plan.path

    @property
    def context_length(self) -> int | None:
        """The longest text, prompt and answer, in tokens that the model was made for; None where it does not say."""
        return self._plan.context_length

    @property
    def global_ranks(self) -> dict[str, list[mx.array]] | None:
        """The model's global ranks by signal, [F] for each block, or None."""
        return self._plan.selector.measured.ranks

    @property
    def quality(self) -> list[QualityPoint]:
        """What densities cost this model (``model/quality.py``), as far as it is known: with sparse routed experts."""
        known = self.config.experts == "sparse" or not any(block.experts for block in self.blocks)
        return self._plan.quality if known else []

    @property
    def responses(self) -> list[Response | None] | None:
        """How the blocks respond to their inputs, to answer for dropped neurons; None where that was not measured."""
        return self._plan.responses

    def set_global_ranks(
        self,
        ranks: dict[str, list[mx.array]] | None,
        domains: dict[str, list[mx.array]] | None = None,
        sensitivity: list[float] | None = None,
        responses: list[Response | None] | None = None,
        quality: list[QualityPoint] | None = None,
    ) -> None:
        """Use these for the choices to come.

        Args:
            ranks, domains, sensitivity: as for :class:`~glass_mlx.model.selection.NeuronSelector`.
            responses, quality (optional): as :attr:`responses`, and :attr:`quality` where routed experts are sparse.
        """
        self._plan.set_statistics(responses, ranks, domains, sensitivity)
        self._plan.quality = quality or []

    def parameters(self) -> dict[str, Any]:
        """The dense model's parameters under its own names, so that what mlx-lm saves of this model it can load."""
        return self.dense.parameters()

    def update(self, parameters: dict[str, Any], strict: bool = True) -> GlassModel:
        """As ``nn.Module.update``, with the names of ``parameters()``."""
        named = parameters if set(parameters) == {"dense"} else {"dense": parameters}
        return super().update(named, strict=strict)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "dense":
                raise
            return getattr(self.dense, name)

    # Prompt caches and their sessions.

    def make_cache(self, max_kv_size: int | None = None, **config: Any) -> list[Any]:
        """A new prompt cache: mlx-lm's own for this model and, last, a new session.

        Args:
            max_kv_size (int, optional): as in mlx-lm's ``make_prompt_cache``.
            config: fields of ``GlassConfig``, where this conversation differs.
        """
        session = Session(self.config.updated(**config), neurons=self._plan.layout.neurons)
        entries = make_prompt_cache(self.dense, max_kv_size)
        if max_kv_size is not None and not any(getattr(entry, "max_size", 0) == max_kv_size for entry in entries):
            logger.warning("max_kv_size has no effect: in mlx-lm this model's family has caches of its own")
        return [*entries, session]

    def add_session(self, cache: list[Any]) -> list[Any]:
        """A prompt cache with a session: the cache itself if it has one, else a copy of the list with a new session.

        The tokens of a cache that plain mlx-lm filled (``mlx_lm.cache_prompt``) left no evidence, so the tokens read
        from now on and the global ranks decide.

        Raises:
            UnusableCache: it came out of a file and is damaged, or another model's.
        """
        if self._find_session(cache) is not None:
            return cache
        check_entries(cache, self.dense)
        read = max((entry.size() for entry in cache), default=0)
        return [*cache, Session(self.config, read, self._plan.layout.neurons)]

    def session(self, cache: list[Any]) -> Session:
        """The session of a prompt cache that ``make_cache`` made or mlx-lm loaded from a file.

        Raises:
            GlassError: the cache has none, or a damaged one.
        """
        session = self._find_session(cache)
        if session is None:
            raise GlassError("This prompt cache has no session; make it with model.make_cache().")
        return session

    def kept_neurons(self, cache: list[Any]) -> dict[str, mx.array]:
        """The neurons that a conversation decodes with: {block path: indices [k] int32, ascending}.

        Raises:
            GlassError: nothing to choose by yet: no prompt was prefilled and there are no global ranks.
        """
        return {block.path: kept for block, kept in zip(self.blocks, self._choose(self.session(cache)))}

    def kept_counts(self, density: float, layer_budgets: str | None = None, **choice: Any) -> list[int]:
        """How many neurons a density keeps in each block; what is not given is as in the model's configuration."""
        return self._plan.selector.counts(self.config.updated(density=density, layer_budgets=layer_budgets, **choice))

    def keeps_all(self, config: GlassConfig) -> bool:
        """Whether decoding is dense: at density 1, or where all blocks are routed experts that stay dense."""
        return self._plan.selector.keeps_all(config)

    def global_weight(self, session: Session) -> float:
        """How much what is known of the model counts in a session's choice, in [0, 1]; see ``NeuronSelector``."""
        return self._plan.selector.global_weight(session.config, session.energy, session.prompt_tokens)

    # The phases. Calls with a prompt cache return logits [B, L, vocabulary] of tokens [B, L].

    # mlx-lm looks for input_embeddings in the signature
    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
        **kwargs: Any,
    ) -> mx.array:
        """One step of a foreign loop, mlx-lm's for example: the phase is inferred (``Session.infer_phase``)."""
        if input_embeddings is not None:
            kwargs["input_embeddings"] = input_embeddings
        session = self._find_session(cache)
        if session is None:
            self._plan.bring_here(self.dense)
            return self.dense(inputs, cache=cache, **kwargs)
        return self.run_phase(session.infer_phase(call_length(inputs, kwargs)), inputs, cache, **kwargs)

    def run_phase(self, phase: Phase, inputs: mx.array, cache: list[Any], **kwargs: Any) -> mx.array:
        """The call that a phase names; before decoding, neurons are chosen where they are not yet."""
        if phase is Phase.DECODE:
            self.select(cache)
        return {Phase.PREFILL: self.prefill, Phase.DECODE: self.decode}[phase](inputs, cache, **kwargs)

    def prefill(self, inputs: mx.array, cache: list[Any], **kwargs: Any) -> mx.array:
        """The dense model over a prompt, or a part of one; the evidence is recorded. What an answer before it decoded
        sparsely is read again first, so that the cache holds what the dense model would have written."""
        self._plan.follow(self.dense)
        session, entries = self.session(cache), cache[:-1]
        length = call_length(inputs, kwargs)
        # how many tokens of the answer are read in one call with the prompt
        pending = self._reread(session, entries, 0 if "input_embeddings" in kwargs else _REREAD)
        if pending is not None:
            inputs = mx.concatenate([pending, inputs], axis=1)
        together = length if pending is None else length + pending.shape[1]
        return self._read(session, entries, inputs, together, length, kwargs)[:, -length:]

    def reread(self, cache: list[Any]) -> None:
        """Read what was decoded sparsely again now, densely. The next prompt then has less to read."""
        self._plan.follow(self.dense)
        self._reread(self.session(cache), cache[:-1], 0)

    def _reread(self, session: Session, entries: list[Any], leave: int) -> mx.array | None:
        """Read the tokens that wait for it in calls of ``_REREAD``, until so few are left; returns these, if any."""
        pending = self._take_pending(session, entries)
        while pending is not None and pending.shape[1] > leave:
            now, pending = pending[:, :_REREAD], pending[:, _REREAD:]
            self._read(session, entries, now, now.shape[1], 0, {})
            mx.eval([entry.state for entry in entries], session.evidence)
        return pending if pending is not None and pending.shape[1] > 0 else None

    def select(self, cache: list[Any]) -> None:
        """Choose the conversation's neurons and make their compact weights, where that is not done yet.

        Raises:
            GlassError: nothing to choose by yet: no prompt was prefilled and there are no global ranks.
        """
        session, plan = self.session(cache), self._plan
        if self.keeps_all(session.config):
            return
        if session.compact is not None:
            plan.memory.use(session)
            return
        if session.evidence is not None:
            mx.eval(session.evidence)  # so that the prefill's time is not counted as selection's
        start = time.perf_counter()
        plan.bring_here(self.dense)
        kept = self._choose(session)
        compact = make_compact(plan.blocks, kept, plan.known(session), plan.files, partial(plan.memory.use, session))
        if plan.files is not None:
            plan.accept(self.dense)  # dense weights were let go
        session.hold(compact, time.perf_counter() - start)

    def decode(self, inputs: mx.array, cache: list[Any], **kwargs: Any) -> mx.array:
        """The same forward code on the kept neurons' weights, however many tokens there are; after ``select``."""
        session = self.session(cache)
        logits = self._sparse(session, inputs, cache, kwargs)
        # Densely decoded tokens wait too where they follow sparse ones: what is read again is the cache's end.
        exact = self.keeps_all(session.config) and not session.pending_reread
        session.advance(call_length(inputs, kwargs), None if exact or "input_embeddings" in kwargs else inputs)
        return logits

    # Verified decoding: tokens are drafted sparsely and checked by the dense model.

    def draft(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        """Decode tokens that the dense model is to check; ``verify`` takes them off the cache again."""
        session = self.session(cache)
        logits = self._sparse(session, inputs, cache, {})
        session.draft(inputs.shape[1])
        return logits

    def verify(self, inputs: mx.array, cache: list[Any], drafted: int) -> mx.array:
        """The dense model over ``inputs``, in place of the last ``drafted`` tokens of the cache. Their evidence is
        recorded; the choice of neurons stays."""
        self.retract(cache, drafted)
        return self._read(self.session(cache), cache[:-1], inputs, inputs.shape[1], 0, {}, choose=False)

    def retract(self, cache: list[Any], tokens: int) -> None:
        """Take the last tokens off a cache; the choice of neurons stays."""
        if tokens:
            trim_prompt_cache(cache[:-1], tokens)
            self.session(cache).retract(tokens)

    def _sparse(self, session: Session, inputs: mx.array, cache: list[Any], kwargs: dict[str, Any]) -> mx.array:
        if self.keeps_all(session.config):
            self._plan.bring_here(self.dense)
            return self.dense(inputs, cache=cache[:-1], **kwargs)
        if session.compact is None:
            raise GlassError("No neurons are chosen: call model.select(cache) before model.decode.")
        return run_with(session.compact.replacements, self.dense, inputs, cache=cache[:-1], **kwargs)

    def _read(self, session, entries, inputs, length: int, prompt: int, kwargs, choose: bool = True) -> mx.array:
        """The dense model over ``length`` tokens, the last ``prompt`` of them of a prompt; the evidence is recorded."""
        self._plan.bring_here(self.dense, make_room=choose)
        norms = self._plan.norms() if session.config.signal == "impact" else [None] * len(self.blocks)
        counted = mx.ones((kwargs.get("input_embeddings", inputs).shape[0], length))
        if session.offset == 0:
            counted[:, 0] = 0  # BOS, whose activations are huge
        logits, evidence = recording(self.blocks, norms, counted, self.dense, inputs, cache=entries, **kwargs)
        session.record(evidence, length, prompt)
        mx.async_eval(session.evidence, self._plan.passed_on(entries))  # else an array would belong to this thread
        if choose:
            session.drop_choice()
        return logits

    def _take_pending(self, session: Session, entries: list[Any]) -> mx.array | None:
        """Trim the tokens that wait to be read again off the cache; None if there are none, or it cannot go back."""
        if not session.pending_reread or not can_trim_prompt_cache(entries):
            session.forget_pending()
            return None
        pending = session.take_pending()
        trim_prompt_cache(entries, pending.shape[1])
        return pending

    def _choose(self, session: Session) -> list[mx.array]:
        if session.kept is None:
            kept = self._plan.selector.choose(session.config, session.energy, session.prompt_tokens)
            mx.eval(kept)
            session.choose(kept)
        return session.kept

    def _find_session(self, cache: list[Any] | None) -> Session | None:
        if not cache:
            return None
        if isinstance(cache[-1], Session):
            return cache[-1]
        restored = restore(cache[-1])
        if restored is not None:
            check_restored(restored, cache[:-1], self._plan.layout, self._plan.selector, self.dense)
            cache[-1] = restored
        return restored
