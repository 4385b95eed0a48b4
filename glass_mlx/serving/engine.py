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
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from itertools import pairwise
from typing import Any

import mlx.core as mx

from .. import group
from ..errors import GlassError
from ..model.randomness import random_state_kept
from .catalogue import DEFAULT_NAME, Catalogue, ModelInfo, Source
from .engine_options import EngineOptions
from .engine_status import EngineStatus, ModelFacts
from .errors import BadRequest, EngineFailed, QueueFull, RequestError, shown_reason
from .measuring import Measurement
from .operations import Operations
from .prompt_limit import PromptLimit
from .queue import RoundRobinQueue
from .request import Chunk, PendingCompletion, Request, Usage
from .worker import Worker

logger = logging.getLogger("glass_mlx")


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
        self._measurement: Measurement | None = None
        self._source: Source | None = None
        self._state, self._error, self._speed, self._usage = "unloaded", None, 0.0, None
        self._stored = (0, 0)  # conversations, bytes
        self._operations = Operations(self.catalogue, self.options)
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
        return self.submit_all([request])[0]

    def submit_all(self, requests: list[Request]) -> list[PendingCompletion]:
        """Queue several requests of one client, each when the one before it has ended: they take one place.

        Returns and raises what :meth:`submit` does.
        """
        pending = [PendingCompletion(r, self.catalogue.resolve(r.model), self._drop_cancelled) for r in requests]
        for one in pending:
            self._limit(one.source).check(one.request)
        for one, following in pairwise(pending):
            one.following = following
        with self._condition:
            self._check_open()
            if len(self._queue) >= self.options.max_queue:
                raise QueueFull(f"The queue is full: {len(self._queue)} requests are waiting. Try again later.")
            self._push(pending[0])
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
            BadRequest: several processes share the model.
            EngineFailed: the engine is closed.
        """
        source = self.catalogue.resolve(model)
        _refuse_in_a_group("Functions are called with a whole model")

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

    def measure(self, model: str = DEFAULT_NAME) -> Future:
        """Measure a model's global ranks while nobody waits for an answer; an earlier measurement goes on.

        Returns:
            Future: ends with the measurement, which may raise :class:`measuring.MeasuringStopped` or a GlassError.

        Raises:
            UnknownModel: the model may not be served.
            BadRequest: another model's ranks are being measured; or several processes share the model.
            EngineFailed: the engine is closed.
        """
        source = self.catalogue.resolve(model)
        _refuse_in_a_group("Ranks are measured on a whole model")
        with self._condition:
            self._check_open()
            measurement = self._measurement = self._measurement or Measurement(source)
            if measurement.source.key != source.key:
                raise BadRequest(f"The ranks of {measurement.source.id} are being measured: wait, or stop that first.")
            self._condition.notify()
        return measurement.future

    def stop_measuring(self) -> None:
        """End the measurement, if there is one. What was measured is kept for the next one."""
        with self._condition:
            if self._measurement is not None:
                self._measurement.stop()
                self._condition.notify()

    def models(self) -> list[ModelInfo]:
        """All models that requests may name, the default model first."""
        return self.catalogue.models()

    def status(self, client: str = "") -> EngineStatus:
        """What the engine is doing now. ``place`` is that of this client."""
        worker, source, measurement = self._worker, self._source, self._measurement
        with self._condition:
            before = self._queue.place(client)
        return EngineStatus(
            state=self._state,
            model=source.id if source else None,
            has_ranks=worker is not None and worker.model.global_ranks is not None,
            facts=ModelFacts.of(worker) if worker is not None else None,
            measuring=measurement.progress if measurement is not None else None,
            tokens_per_second=self._speed,
            queued=len(self._queue),
            place=None if before is None else before + (self._current is not None),
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

    def close(self, timeout: float | None = 10.0) -> None:
        """Cancel the present completion, refuse the waiting requests, and free all memory.

        Args:
            timeout (float, optional): seconds to wait for the engine's thread to end; None for as long as it takes.
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

    def _push(self, pending: PendingCompletion | None) -> None:
        """Put a request into the queue, if there is one. The caller holds the condition."""
        if pending is not None:
            self._queue.push(pending.request.client, pending)
            self._condition.notify()

    def _drop_cancelled(self, pending: PendingCompletion) -> None:
        """Take a cancelled request out of the queue, if it is still waiting."""
        with self._condition:
            if self._queue.remove(pending.request.client, pending):
                pending.put(Chunk(finish_reason="cancelled", usage=Usage()))
                self._push(pending.following)

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
            while pending is not None:
                pending.put(EngineFailed("The engine was closed."))
                pending = pending.following
        for _, future in self._jobs:
            future.cancel()
        if self._measurement is not None:
            self._measurement.future.cancel()
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
                if self._measurement is not None and self._measurement.may_go_on(self._source):
                    return self._measure, Future()
                idle = self.options.idle_timeout if self._worker is not None else None
                if not self._condition.wait(idle):
                    logger.info("idle: unloading %s", self._source.id)
                    return self._unload, Future()
        return None

    def _complete(self, pending: PendingCompletion) -> None:
        last = Chunk(finish_reason="cancelled", usage=Usage())
        if not pending.cancelled:  # since it left the queue: no reason to load a model
            last = self._generate(pending)
        with self._condition:
            self._push(pending.following)
        pending.put(last)  # only now: whoever receives it finds the engine ready and the conversation in the store

    def _generate(self, pending: PendingCompletion) -> Chunk | RequestError:
        """Complete a request: the last chunk, or why it failed."""
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
        return last

    def _read_ahead(self) -> None:
        """Read the last answer while nobody waits; what comes in goes first."""
        try:
            self._worker.read_ahead(self._is_awaited)
        except Exception:  # it was only to save time
            logger.exception("the answer could not be read ahead")
        self._stored = len(self._worker.store), self._worker.store.nbytes
        mx.clear_cache()

    def _is_awaited(self) -> bool:
        return self._closing or bool(self._jobs) or len(self._queue) > 0

    def _measure(self) -> None:
        """Measure until the end, or until something has to go first."""
        measurement = self._measurement

        def loaded() -> tuple[Any, Any]:
            worker = self._ensure_loaded(measurement.source)
            self._state = "measuring"
            return worker.model, worker.tokenizer

        if measurement.run(loaded, self._give_way):
            self._measurement = None
        if self._worker is not None:
            self._state = "ready"
            mx.clear_cache()

    def _give_way(self) -> bool:
        """Between two steps of a measurement, answer whoever waits for its model; returns False if something else is
        waited for."""
        while self._is_awaited():
            with self._condition:
                first = self._queue.peek()
                if self._closing or self._jobs or (first is not None and first.source.key != self._source.key):
                    return False
                self._current = self._queue.pop()
            if self._current is not None:  # else it was cancelled
                with random_state_kept():
                    self._complete(self._current)
                    if self._worker.answered is not None:
                        self._read_ahead()
            self._current, self._state = None, "measuring"
        return True

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
            self._operations.load(source.name, source=source)
            self._worker = Worker(self._operations, self.options)
        except Exception as e:
            logger.error("%s cannot be loaded: %s", source.id, e, exc_info=not isinstance(e, GlassError))
            self._unload()
            self._state, self._error = "failed", f"{source.id} cannot be loaded{shown_reason(e)}"
            if isinstance(e, RequestError):
                raise
            raise EngineFailed(self._error) from e
        logger.info("loaded %s in %.1f s", source.id, time.perf_counter() - start)
        self._state = "ready"
        return self._worker

    def _unload(self) -> None:
        """Free the model and all conversations."""
        self._worker = self._source = None
        self._operations.unload()
        self._stored, self._state = (0, 0), "unloaded"


def _refuse_in_a_group(why: str) -> None:
    if group.size() > 1:
        raise BadRequest(f"{why}, on one machine: start the server without mlx.launch for it.")
