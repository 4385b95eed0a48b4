"""The engine: one thread that loads models and answers requests, for the server and for the menu-bar app.

    engine = Engine(EngineOptions(model="demo"))
    for chunk in engine.submit(Request(messages=[{"role": "user", "content": "Hello"}])):
        print(chunk.text, end="", flush=True)

All MLX work is done on this thread, because MLX's streams belong to a thread. A request is completed before the next
one begins: each conversation decodes with its own weights, which rules out batches, and switching between requests at
every token would slow down all of them and mix their random numbers. Clients take turns between requests.
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
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream, wired_limit

from ..errors import GlassError
from ..loading import DEFAULT_MODEL, load
from ..model.config import GlassConfig
from ..model.memory import available_memory, default_limit
from .cache_store import ConversationStore
from .catalogue import DEFAULT_NAME, Catalogue, ModelInfo, Source
from .errors import EngineFailed, QueueFull, RequestError
from .prompt_limit import PromptLimit
from .queue import RoundRobinQueue
from .request import Chunk, PendingCompletion, Request, Usage
from .worker import Worker

logger = logging.getLogger("glass_mlx")


@dataclass(frozen=True)
class EngineOptions:
    """How to serve.

    Attributes:
        model: what ``default_model`` stands for. It is loaded at the first request for it.
        config: how neurons are chosen, for requests that do not set it.
        verify: ``verify`` and its options of :func:`glass_mlx.stream_generate`, for requests that do not set it.
        load: further arguments of :func:`glass_mlx.load`.
        template_args: default arguments of the chat template.
        allow_paths: directories whose models requests may name.
        allow_download: whether a requested model that is not in the Hub cache is downloaded.
        max_queue: how many requests may wait. More are refused.
        max_prompt_tokens: longer prompts are refused.
        max_cache_bytes, max_conversations: limits of what is kept of past conversations. The least recently used goes
            first. By default a quarter of the memory that the model leaves.
        idle_timeout: seconds without a request until the model is unloaded; None for never.
        prefill_step_size: prompt tokens that are read in one call, at most. The next turn may read one call again.
        kv: mlx-lm's ``kv_bits``, ``kv_group_size`` and ``quantized_kv_start``, to quantise the KV cache.
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
    max_cache_bytes: int | None = None
    max_conversations: int = 10
    idle_timeout: float | None = 600.0
    prefill_step_size: int = 512
    kv: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineStatus:
    """What the engine is doing.

    Attributes:
        state: "unloaded", "loading", "ready", "generating", or "failed" if the last model could not be loaded.
        model: the model that is loaded or being loaded.
        has_ranks: whether it has global ranks.
        tokens_per_second: speed of the present completion, or of the last one.
        queued: how many requests are waiting.
        memory_bytes: bytes that MLX holds in arrays.
        conversations, cache_bytes: how many conversations are kept, and their bytes.
        error: why loading or generating failed last; None once it has succeeded again.
        usage: what the last completion cost.
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
    """Completes requests one at a time, and loads models on demand. All methods may be called from any thread.

    Use one engine in a process: MLX's random state and its memory belong to the process.
    """

    def __init__(self, options: EngineOptions | None = None):
        self.options = options or EngineOptions()
        self.catalogue = Catalogue(self.options.model, self.options.allow_paths, self.options.allow_download)
        self._queue: RoundRobinQueue[PendingCompletion] = RoundRobinQueue()
        self._jobs: deque[tuple[Callable[[], Any], Future]] = deque()  # these go before the queue
        self._condition = threading.Condition()
        self._current: PendingCompletion | None = None
        self._closing = False
        self._worker: Worker | None = None
        self._source: Source | None = None
        self._state, self._error, self._speed, self._usage = "unloaded", None, 0.0, None
        self._stored = (0, 0)  # conversations, bytes
        self._held = ExitStack()  # what is held while a model is loaded
        self._thread = threading.Thread(target=self._run, name="glass_mlx engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, request: Request) -> PendingCompletion:
        """Queue a request.

        Returns:
            PendingCompletion: iterate over it for the chunks of the completion.

        Raises:
            UnknownModel: its model may not be served.
            BadRequest: its prompt is longer than allowed, as far as its length tells.
            QueueFull: too many requests are waiting.
            EngineFailed: the engine is closed.
        """
        pending = PendingCompletion(request, self.catalogue.resolve(request.model), self._drop_cancelled)
        self._limit(pending.source).check(request)
        with self._condition:
            self._check_open()
            if len(self._queue) >= self.options.max_queue:
                raise QueueFull(f"The queue is full: {len(self._queue)} requests are waiting. Try again later.")
            self._queue.push(request.client, pending)
            self._condition.notify()
        return pending

    def call(self, function: Callable[[Any, Any], Any], model: str = DEFAULT_NAME) -> Future:
        """Run a function on the engine's thread, for example to measure a model's ranks.

        Args:
            function (callable): called with the model and its tokenizer.
            model (str): the model to load, as in a request.

        Returns:
            Future: for the function's result.

        Raises:
            UnknownModel: the model may not be served.
            EngineFailed: the engine is closed.
        """
        source = self.catalogue.resolve(model)

        def job() -> Any:
            worker = self._ensure_loaded(source)
            return function(worker.model, worker.tokenizer)

        return self._run_job(job)

    def load(self, model: str = DEFAULT_NAME) -> Future:
        """Load a model before the first request for it. The future's result is the status.

        Raises:
            UnknownModel: the model may not be served.
            EngineFailed: the engine is closed.
        """
        source = self.catalogue.resolve(model)

        def job() -> EngineStatus:
            self._ensure_loaded(source)
            return self.status()

        return self._run_job(job)

    def unload(self) -> Future:
        """Free the model's memory, after the present completion. The future's result is the status."""

        def job() -> EngineStatus:
            self._unload()
            return self.status()

        return self._run_job(job)

    def models(self) -> list[ModelInfo]:
        """All models that requests may name, the default model first."""
        return self.catalogue.models()

    def status(self) -> EngineStatus:
        """What the engine is doing now."""
        worker, source = self._worker, self._source
        return EngineStatus(
            state=self._state,
            model=source.id if source else None,
            has_ranks=worker is not None and worker.model.global_ranks is not None,
            tokens_per_second=self._speed,
            queued=len(self._queue),
            memory_bytes=mx.get_active_memory(),
            conversations=self._stored[0],
            cache_bytes=self._stored[1],
            error=self._error,
            usage=self._usage,
        )

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests."""
        return self._thread.is_alive() and not self._closing

    def close(self, timeout: float = 10.0) -> None:
        """Cancel the present completion, refuse the waiting requests, and free all memory.

        Args:
            timeout (float): seconds to wait for the engine's thread to end.
        """
        with self._condition:
            self._closing = True
            if self._current is not None:
                self._current.cancelled = True
            self._condition.notify()
        self._thread.join(timeout)
        atexit.unregister(self.close)

    def _limit(self, source: Source) -> PromptLimit:
        """How long prompts for a model may be. Its own limit and tokenizer are known only while it is loaded."""
        worker, loaded = self._worker, self._source
        if worker is not None and loaded is not None and loaded.key == source.key:
            return worker.limit
        return PromptLimit(self.options.max_prompt_tokens)

    def _run_job(self, job: Callable[[], Any]) -> Future:
        future: Future = Future()
        with self._condition:
            self._check_open()
            self._jobs.append((job, future))
            self._condition.notify()
        return future

    def _check_open(self) -> None:
        if not self.alive:
            raise EngineFailed("The engine is closed.")

    def _drop_cancelled(self, pending: PendingCompletion) -> None:
        """Take a cancelled request out of the queue, if it is still waiting."""
        with self._condition:
            if self._queue.remove(pending.request.client, pending):
                pending.put(Chunk(finish_reason="cancelled", usage=Usage()))

    # What follows runs on the engine's thread.

    def _run(self) -> None:
        while (work := self._next()) is not None:
            job, future = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except BaseException as e:  # the caller gets any exception, and the engine goes on
                future.set_exception(e)
            del work, job, future  # they refer to the model, which would stay in memory
        for pending in self._queue.clear():
            pending.put(EngineFailed("The engine was closed."))
        for _, future in self._jobs:
            future.cancel()
        self._unload()
        mx.clear_streams()  # streams of a thread that has ended would abort the process at exit

    def _next(self) -> tuple[Callable[[], Any], Future] | None:
        """Wait for the next work: a job, a request, or unloading after the idle timeout; None when closing."""
        with self._condition:
            self._current = None
            while not self._closing:
                if self._jobs:
                    return self._jobs.popleft()
                if (pending := self._queue.pop()) is not None:
                    self._current = pending
                    return partial(self._complete, pending), Future()
                if self._worker is not None and self._worker.answered is not None:
                    return self._read_ahead, Future()
                idle = self.options.idle_timeout if self._worker is not None else None
                if not self._condition.wait(idle):
                    logger.info("idle: unloading %s", self._source.id)
                    return self._unload, Future()
        return None

    def _complete(self, pending: PendingCompletion) -> None:
        if pending.cancelled:  # since it left the queue: no reason to load a model
            pending.put(Chunk(finish_reason="cancelled", usage=Usage()))
            return
        try:
            worker = self._ensure_loaded(pending.source)
            self._state = "generating"
            last = worker.complete(pending, self._set_speed)
            self._usage, self._speed, self._error = last.usage, last.usage.generation_tps, None
        except RequestError as e:
            last = e
        except Exception as e:
            logger.exception("generation failed")
            self._error = f"Generation failed: {type(e).__name__}. See the log."
            last = EngineFailed(self._error)
        if self._worker is not None:
            self._state = "ready"
            store = self._worker.store
            self._stored = len(store), store.nbytes
            mx.clear_cache()  # what an answer computed with would stay allocated until the next one
        pending.put(last)  # only now: whoever receives it finds the engine ready and the conversation in the store

    def _read_ahead(self) -> None:
        """Read the last answer while nobody waits; what comes in goes first."""
        try:
            self._worker.read_ahead(lambda: self._closing or bool(self._jobs) or len(self._queue) > 0)
        except Exception:  # it was only to save time
            logger.exception("the answer could not be read ahead")
        self._stored = len(self._worker.store), self._worker.store.nbytes
        mx.clear_cache()

    def _set_speed(self, speed: float) -> None:
        self._speed = speed

    def _ensure_loaded(self, source: Source) -> Worker:
        """The worker of a model. If another model is loaded, it is unloaded first, so that the peak is not the sum."""
        if self._worker is not None and self._source is not None and self._source.key == source.key:
            return self._worker
        self._unload()
        self._state, self._source, self._error = "loading", source, None
        start = time.perf_counter()
        try:
            self._worker = self._load(source)
        except Exception as e:
            logger.error("%s cannot be loaded: %s", source.id, e, exc_info=not isinstance(e, GlassError))
            self._unload()
            self._state, self._error = "failed", f"{source.id} cannot be loaded. See the log."
            if isinstance(e, RequestError):
                raise
            raise EngineFailed(self._error) from e
        logger.info("loaded %s in %.1f s", source.id, time.perf_counter() - start)
        self._state = "ready"
        return self._worker

    def _load(self, source: Source) -> Worker:
        options = self.options
        model, tokenizer = load(source.locate(), **vars(options.config), **options.load)
        context = getattr(getattr(model, "args", None), "max_position_embeddings", None)
        mx.set_cache_limit(available_memory() // 8)
        self._held.enter_context(wired_limit(model, [generation_stream]))  # else the weights may be paged out when idle
        kept = default_limit(model.dense) // 2 if options.max_cache_bytes is None else options.max_cache_bytes
        return Worker(
            model,
            tokenizer,
            ConversationStore(kept, options.max_conversations, options.kv.get("quantized_kv_start", 0)),
            options.template_args,
            min(options.max_prompt_tokens, context or options.max_prompt_tokens),
            options.prefill_step_size,
            options.kv,
            options.verify,
        )

    def _unload(self) -> None:
        """Free the model, all conversations, and the buffers that MLX would keep for reuse."""
        self._worker = self._source = None
        self._held.close()
        gc.collect()
        mx.clear_cache()
        self._stored, self._state = (0, 0), "unloaded"
