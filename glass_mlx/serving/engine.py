"""The engine: one thread that loads models and answers requests, for the server and for the menu-bar app.

    engine = Engine(EngineOptions(model="demo"))
    for piece in engine.submit(Request(messages=[{"role": "user", "content": "Hello"}])):
        print(piece.text, end="", flush=True)

All MLX work is done on this thread, because MLX's streams belong to a thread. A request is answered to its end before
the next one begins: each conversation decodes on weights of its own, which rules out batches, and taking turns between
tokens would make all wait for all and share one random state. What is fair is the order: clients take turns.
"""

from __future__ import annotations

import atexit
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import GlassError
from ..loading import DEFAULT_MODEL, load
from ..model.config import GlassConfig
from .cache_store import Conversations
from .catalogue import DEFAULT_NAME, Catalogue, ModelInfo, Source
from .queue import FairQueue
from .request import Busy, EngineError, EngineFailed, Piece, Request, Ticket, Usage
from .worker import Answerer

logger = logging.getLogger("glass_mlx")


@dataclass(frozen=True)
class EngineOptions:
    """How to serve.

    Attributes:
        model: what ``default_model`` stands for; loaded when first asked for.
        config: the choice of neurons for requests that say nothing of it.
        verify: ``verify`` and its options, of :func:`glass_mlx.stream_generate`, for requests that say nothing of it.
        load: further arguments of :func:`glass_mlx.load`.
        template_args: default arguments of the chat template.
        allow_paths: directories below which local models may be asked for.
        allow_download: whether models that are not in the Hub cache are downloaded when asked for.
        max_queue: requests that may wait; more are refused.
        max_prompt_tokens: longer prompts are refused.
        max_cache_bytes, max_conversations: what is kept of past conversations; the least recently used goes first.
        idle_timeout: seconds without a request after which the model is unloaded; None for never.
        prefill_step_size: prompt tokens that are read in one call.
        kv: mlx-lm's ``kv_bits``, ``kv_group_size``, ``quantized_kv_start``, if the KV cache is to be quantised.
    """

    model: str = DEFAULT_MODEL
    config: GlassConfig = GlassConfig()
    verify: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    template_args: dict[str, Any] = field(default_factory=dict)
    allow_paths: tuple[Path, ...] = ()
    allow_download: bool = False
    max_queue: int = 64
    max_prompt_tokens: int = 131_072
    max_cache_bytes: int = 2 << 30
    max_conversations: int = 10
    idle_timeout: float | None = 600.0
    prefill_step_size: int = 2048
    kv: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineStatus:
    """What the engine is doing.

    Attributes:
        state: "unloaded", "loading", "ready", "generating", or "failed": the last model could not be loaded.
        model: the model that is loaded or being loaded.
        has_ranks: whether it has global ranks.
        tokens_per_second: of the answer being generated, or of the last one.
        queued: requests that wait.
        memory_bytes: what MLX holds in arrays.
        conversations, cache_bytes: what is kept of past conversations.
        error: why the last loading or generation failed, until one succeeds.
        usage: of the last answer.
    """

    state: str
    model: str | None = None
    has_ranks: bool = False
    tokens_per_second: float = 0.0
    queued: int = 0
    memory_bytes: int = 0
    conversations: int = 0
    cache_bytes: int = 0
    error: str | None = None
    usage: Usage | None = None


class Engine:
    """Answers requests, loading models on demand, one at a time. All methods may be called from any thread.

    One is meant to be in a process: MLX's random state and its memory are the process's.
    """

    def __init__(self, options: EngineOptions | None = None):
        self.options = options or EngineOptions()
        self.catalogue = Catalogue(self.options.model, self.options.allow_paths, self.options.allow_download)
        self._queue = FairQueue()
        self._jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self._changed = threading.Condition()
        self._current: Ticket | None = None
        self._closing = False
        self._answerer: Answerer | None = None
        self._source: Source | None = None
        self._state, self._error, self._speed, self._usage = "unloaded", None, 0.0, None
        self._kept = (0, 0)
        self._thread = threading.Thread(target=self._run, name="glass_mlx engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, request: Request) -> Ticket:
        """Queue a request.

        Raises:
            UnknownModel: its model may not be served.
            Busy: too many requests wait.
            EngineFailed: the engine is closed.
        """
        source = self.catalogue.resolve(request.model)
        ticket = Ticket(request, source.id, self._forget)
        with self._changed:
            self._check_open()
            if len(self._queue) >= self.options.max_queue:
                raise Busy(f"The queue is full: {len(self._queue)} requests are waiting. Try again later.")
            self._queue.push(request.client, ticket, source)
            self._changed.notify()
        return ticket

    def call(self, function: Callable[[Any, Any], Any], model: str = DEFAULT_NAME) -> Future:
        """Run ``function(model, tokenizer)`` on the engine's thread with a model loaded, to measure its ranks, say."""
        source = self.catalogue.resolve(model)

        def job() -> Any:
            answerer = self._ensure(source)
            return function(answerer.model, answerer.tokenizer)

        return self._do(job)

    def load(self, model: str = DEFAULT_NAME) -> Future:
        """Load a model before it is asked for. The future's result is the status.

        Raises:
            UnknownModel: it may not be served.
        """
        source = self.catalogue.resolve(model)

        def job() -> EngineStatus:
            self._ensure(source)
            return self.status()

        return self._do(job)

    def unload(self) -> Future:
        """Free the model's memory, after the answer that is being generated. The future's result is the status."""

        def job() -> EngineStatus:
            self._unload()
            return self.status()

        return self._do(job)

    def models(self) -> list[ModelInfo]:
        """What can be asked for, the default model first."""
        return self.catalogue.models()

    def status(self) -> EngineStatus:
        answerer, source = self._answerer, self._source
        return EngineStatus(
            state=self._state,
            model=source.id if source else None,
            has_ranks=answerer is not None and answerer.model.global_ranks is not None,
            tokens_per_second=self._speed,
            queued=len(self._queue),
            memory_bytes=mx.get_active_memory(),
            conversations=self._kept[0],
            cache_bytes=self._kept[1],
            error=self._error,
            usage=self._usage,
        )

    @property
    def alive(self) -> bool:
        """Whether requests can be answered at all."""
        return self._thread.is_alive() and not self._closing

    def close(self, timeout: float = 10.0) -> None:
        """Stop the answer that is being generated, refuse those that wait, and free everything."""
        with self._changed:
            self._closing = True
            if self._current is not None:
                self._current.cancelled = True
            self._changed.notify()
        self._thread.join(timeout)
        atexit.unregister(self.close)

    def _do(self, job: Callable[[], Any]) -> Future:
        future: Future = Future()
        with self._changed:
            self._check_open()
            self._jobs.append((job, future))
            self._changed.notify()
        return future

    def _check_open(self) -> None:
        if not self.alive:
            raise EngineFailed("The engine is closed.")

    def _forget(self, ticket: Ticket) -> None:
        """A cancelled ticket that still waits gives its place free."""
        with self._changed:
            if self._queue.remove(ticket):
                ticket.put(Piece(finish_reason="cancelled"))

    # What follows runs on the engine's thread.

    def _run(self) -> None:
        while (work := self._next()) is not None:
            job, future = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except BaseException as e:  # whatever it is, its own caller hears of it, and the engine goes on
                future.set_exception(e)
            del work, job, future  # or the last model would live as long as they
        for ticket in self._queue.drain():
            ticket.put(EngineFailed("The engine was closed."))
        for _, future in self._jobs:
            future.cancel()
        self._unload()
        mx.clear_streams()  # left to the interpreter's exit, those of a thread that has ended abort the process

    def _next(self) -> tuple[Callable[[], Any], Future] | None:
        """The next piece of work: a job, a request, unloading when idle; None at the end."""
        with self._changed:
            self._current = None
            while not self._closing:
                if self._jobs:
                    return self._jobs.popleft()
                if (waiting := self._queue.pop()) is not None:
                    self._current = waiting[0]
                    return partial(self._answer, *waiting), Future()
                idle = self.options.idle_timeout if self._answerer is not None else None
                if not self._changed.wait(idle):
                    logger.info("idle: unloading %s", self._source.id)
                    return self._unload, Future()
        return None

    def _answer(self, ticket: Ticket, source: Source) -> None:
        if ticket.cancelled:  # between the queue and here: no reason to load a model
            ticket.put(Piece(finish_reason="cancelled"))
            return
        try:
            answerer = self._ensure(source)
            self._state = "generating"
            last = answerer.answer(ticket, self._measure)
            self._usage, self._speed, self._error = last.usage, last.usage.generation_tps, None
        except EngineError as e:
            last = e
        except Exception as e:
            logger.exception("generation failed")
            self._error = f"Generation failed: {type(e).__name__}. The log says more."
            last = EngineFailed(self._error)
        if self._answerer is not None:
            self._state = "ready"
            store = self._answerer.conversations
            self._kept = len(store), store.nbytes
        ticket.put(last)  # only now: whoever has it finds the engine ready, and the conversation kept

    def _measure(self, speed: float) -> None:
        self._speed = speed

    def _ensure(self, source: Source) -> Answerer:
        """The answerer of a model; another one that is loaded goes first."""
        if self._answerer is not None and self._source is not None and self._source.key == source.key:
            return self._answerer
        self._unload()
        self._state, self._source, self._error = "loading", source, None
        options, start = self.options, time.perf_counter()
        try:
            model, tokenizer = load(source.locate(), **vars(options.config), **options.load)
        except Exception as e:
            logger.error("%s cannot be loaded: %s", source.id, e, exc_info=not isinstance(e, GlassError))
            self._unload()
            self._state, self._error = "failed", f"{source.id} cannot be loaded. The log says why."
            if isinstance(e, EngineError):
                raise
            raise EngineFailed(self._error) from e
        logger.info("loaded %s in %.1f s", source.id, time.perf_counter() - start)
        context = getattr(getattr(model, "args", None), "max_position_embeddings", None)
        self._answerer = Answerer(
            model,
            tokenizer,
            Conversations(options.max_cache_bytes, options.max_conversations),
            options.template_args,
            min(options.max_prompt_tokens, context or options.max_prompt_tokens),
            options.prefill_step_size,
            options.kv,
            options.verify,
        )
        self._state = "ready"
        return self._answerer

    def _unload(self) -> None:
        """Drop the model and all conversations. MLX keeps freed buffers for itself unless told otherwise."""
        self._answerer = self._source = None
        gc.collect()
        mx.clear_cache()
        self._kept, self._state = (0, 0), "unloaded"
