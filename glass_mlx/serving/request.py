"""What passes between a client and the engine: a request, pieces of its answer, and what can go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import GlassError


class EngineError(GlassError):
    """A request cannot be answered. The message may be shown to any client: it has no paths in it."""


class Busy(EngineError):
    """The queue is full."""


class UnknownModel(EngineError):
    """The model is none that the engine may serve."""


class BadRequest(EngineError):
    """The model cannot take this request: its template refuses it, it is too long, a token does not exist."""


class EngineFailed(EngineError):
    """Loading or generating failed, or the engine was closed."""


@dataclass(frozen=True)
class Request:
    """What to answer, and how.

    Attributes:
        messages: a chat ``[{"role", "content", ...}]``; or
        prompt: text or tokens to continue.
        model: ``demo``, an alias, a Hub repository, or ``default_model``.
        client: whose request this is; clients take turns in the queue.
        tools: function definitions for the chat template.
        template_args: further arguments of the chat template.
        max_tokens: at most so many tokens.
        stop: texts that end the answer and are left out of it.
        seed: with one, the answer is a function of the request alone: see ``conversations.py``.
        density, global_weight, signal, layer_budgets, refresh, verify: where they differ from the engine's.
        logprobs: give each token's log-probability, and of the ``top_logprobs`` most likely ones.
        The others are mlx-lm's, of ``make_sampler`` and ``make_logits_processors``.
    """

    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    model: str = "default_model"
    client: str = ""
    tools: list[dict[str, Any]] | None = None
    template_args: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    seed: int | None = None
    density: float | None = None
    global_weight: float | str | None = None
    signal: str | None = None
    layer_budgets: str | None = None
    refresh: int | str | None = None
    verify: bool | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    logit_bias: dict[int, float] | None = None
    repetition_penalty: float = 0.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: bool = False
    top_logprobs: int = 0


@dataclass(frozen=True)
class Token:
    """A generated token; its log-probability and the most likely ones, if asked for."""

    id: int
    text: str = ""
    logprob: float = 0.0
    top: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Usage:
    """What an answer cost. ``cached_tokens`` of the prompt were in the cache and were not read again; ``prompt_tps``
    is of the others. ``drafted_tokens`` of a verified answer are the sparse model's, the others the dense one's."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    prompt_tps: float = 0.0
    generation_tps: float = 0.0
    selection_ms: float = 0.0
    density: float = 1.0
    kept_neurons: int = 0
    total_neurons: int = 0
    global_weight: float = 0.0
    signal: str = ""
    verified: bool = False
    drafted_tokens: int = 0
    peak_memory: float = 0.0


@dataclass(frozen=True)
class Piece:
    """A piece of an answer; the last one has a finish reason ("stop", "length", "tool_calls" or "cancelled") and
    the usage. One comes for each token, though its text may be held back until it is known to be no stop word."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    token: Token | None = None
    finish_reason: str | None = None
    usage: Usage | None = None


class Ticket:
    """A submitted request. Iterate over it, with ``for`` or ``async for``, for the pieces of the answer.

    Iteration ends with the piece that has a finish reason, or raises an :class:`EngineError`.
    """

    def __init__(self, request: Request, model: str, on_cancel: Callable[[Ticket], None]):
        self.request, self.model = request, model
        self.cancelled = False
        self._on_cancel = on_cancel
        self._pieces: queue.SimpleQueue[Piece | EngineError] = queue.SimpleQueue()
        self._wake: Callable[[], None] = lambda: None

    def cancel(self) -> None:
        """Give up: generation stops at the next token, or does not begin. Safe to call at any time, on any thread."""
        self.cancelled = True
        self._on_cancel(self)

    def put(self, item: Piece | EngineError) -> None:
        """Called by the engine."""
        self._pieces.put(item)
        self._wake()

    def __iter__(self) -> Iterator[Piece]:
        while True:
            piece = _raised(self._pieces.get())
            yield piece
            if piece.finish_reason:
                return

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while True:
            piece = await self.get()
            yield piece
            if piece.finish_reason:
                return

    async def get(self, timeout: float | None = None) -> Piece | None:
        """The next piece; None if none comes within ``timeout`` seconds."""
        arrived, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed, and nobody listens
                loop.call_soon_threadsafe(arrived.set)

        self._wake = wake  # before looking, so that a piece that comes now is not slept through
        with contextlib.suppress(queue.Empty):
            return _raised(self._pieces.get_nowait())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await arrived.wait()
        with contextlib.suppress(queue.Empty):
            return _raised(self._pieces.get_nowait())
        return None


def _raised(item: Piece | EngineError) -> Piece:
    if isinstance(item, EngineError):
        raise item
    return item
