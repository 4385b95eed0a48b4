"""What passes between a client and the engine: a request, and the chunks of its completion."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from .catalogue import Source
from .errors import RequestError


@dataclass(frozen=True)
class Request:
    """What to complete, and how. Give either ``messages`` or ``prompt``.

    Attributes:
        messages: a chat ``[{"role", "content", ...}]`` to answer.
        prompt: text or tokens to continue.
        model: ``demo``, an alias, a Hub repository, or ``default_model``.
        client: who sent the request. Clients take turns in the queue.
        tools: function definitions for the chat template.
        forced_tools: names of those that the answer must call one of; none if it need not call any.
        one_call: whether the answer ends after its first call.
        schema: the JSON schema that the answer must follow, if any.
        strict_schema: whether a schema is refused that says more than can be enforced.
        template_args: further arguments of the chat template.
        add_generation_prompt, continue_final_message: the answer begins a message of its own, or goes on with the last.
        echo: whether the text begins with the prompt.
        max_tokens: the most tokens to generate; -1 for as many as the model's context has room for.
        stop: texts that end the answer. They are not part of it.
        seed: of the random numbers that tokens are sampled with. Without one they are new for every request.
        quality: instead of a density, the one for this quality.
        density, global_weight, signal, layer_budgets, compensation, experts, verify: where they differ from the
            engine's.
        logprobs: whether each token comes with its log-probability and with its ``top_logprobs`` most likely rivals.
        refresh: has no effect any more (``model/config.py``).

    The other fields are those of mlx-lm's ``make_sampler`` and ``make_logits_processors``.
    """

    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    model: str = "default_model"
    client: str = ""
    tools: list[dict[str, Any]] | None = None
    forced_tools: tuple[str, ...] = ()
    one_call: bool = False
    schema: dict[str, Any] | None = None
    strict_schema: bool = False
    template_args: dict[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    echo: bool = False
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    seed: int | None = None
    density: float | None = None
    quality: str | None = None
    global_weight: float | str | None = None
    refresh: Any = None
    signal: str | None = None
    layer_budgets: str | None = None
    compensation: bool | None = None
    experts: str | None = None
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
    presence_context_size: int = 20
    frequency_penalty: float = 0.0
    frequency_context_size: int = 20
    logprobs: bool = False
    top_logprobs: int = 0


@dataclass(frozen=True)
class Token:
    """A generated token. Its log-probability and the most likely tokens are there only if they were asked for."""

    id: int
    text: str = ""
    logprob: float = 0.0
    top: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Usage:
    """What a completion cost.

    Attributes:
        prompt_tokens, completion_tokens: tokens read and generated.
        cached_tokens: tokens of the prompt that were taken from the cache.
        prompt_tps: tokens/s of reading the rest of the prompt.
        generation_tps: tokens/s of generating.
        selection_ms: milliseconds of choosing the neurons and copying their weights.
        density, kept_neurons, total_neurons, global_weight, signal: how the model decoded; see
            :class:`glass_mlx.GenerationResponse`.
        expected_agreement: how often the sparse model's most likely token is the dense one's; None if not known.
        verified: whether the dense model checked the completion.
        drafted_tokens: tokens of a verified completion that the sparse model drafted. The dense model made the others.
        peak_memory: GB that MLX held at most.
    """

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
    expected_agreement: float | None = None
    verified: bool = False
    drafted_tokens: int = 0
    peak_memory: float = 0.0


@dataclass(frozen=True)
class Chunk:
    """The part of a completion that one token adds. Its text may be empty: what could be the beginning of a stop word
    or of a marker is held back. The last chunk has the usage and a finish reason: "stop", "length", "tool_calls" or
    "cancelled"."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    token: Token | None = None
    finish_reason: str | None = None
    usage: Usage | None = None


def total(usages: list[Usage], n: int) -> Usage:
    """What several completions cost together, of which each n have the same prompt; the rest is the last one's."""
    prompts = usages[::n]
    return replace(
        usages[-1],
        prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
        cached_tokens=sum(usage.cached_tokens for usage in prompts),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        drafted_tokens=sum(usage.drafted_tokens for usage in usages),
    )


class PendingCompletion:
    """A submitted request. Iterate over it, with ``for`` or ``async for``, for the chunks of its completion.

    Iteration ends after the chunk that has a finish reason, or raises a :class:`RequestError`. All methods may be
    called from any thread.

    Attributes:
        request, source: what was asked, and of which model.
        warnings: what the client should know of its request, as of the first chunk.
        following: the request that is queued when this one has ended, if any.
        cancelled: whether nobody wants the rest any more.
    """

    def __init__(self, request: Request, source: Source, on_cancel: Callable[[PendingCompletion], None]):
        self.request, self.source = request, source
        self.warnings: list[str] = []
        self.following: PendingCompletion | None = None
        self.cancelled = False
        self._on_cancel = on_cancel
        self._items: queue.SimpleQueue[Chunk | RequestError] = queue.SimpleQueue()
        self._wake: Callable[[], None] = lambda: None

    def cancel(self) -> None:
        """Give up. Generation stops at the next token, or does not begin."""
        self.cancelled = True
        self._on_cancel(self)

    def put(self, item: Chunk | RequestError) -> None:
        """Deliver a chunk, or the error that ends the completion. Called by the engine."""
        self._items.put(item)
        self._wake()

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            chunk = _raise_errors(self._items.get())
            yield chunk
            if chunk.finish_reason:
                return

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        while True:
            chunk = await self.get()
            yield chunk
            if chunk.finish_reason:
                return

    async def get(self, timeout: float | None = None) -> Chunk | None:
        """Wait for the next chunk.

        Args:
            timeout (float, optional): seconds to wait; ``None`` waits until a chunk comes.

        Returns:
            Chunk | None: the chunk; ``None`` if none came in time.

        Raises:
            RequestError: the request failed.
        """
        arrived, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is waiting
                loop.call_soon_threadsafe(arrived.set)

        self._wake = wake  # set before the first look, so that no chunk slips in between unnoticed
        with contextlib.suppress(queue.Empty):
            return _raise_errors(self._items.get_nowait())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await arrived.wait()
        with contextlib.suppress(queue.Empty):
            return _raise_errors(self._items.get_nowait())
        return None


def _raise_errors(item: Chunk | RequestError) -> Chunk:
    if isinstance(item, RequestError):
        raise item
    return item
