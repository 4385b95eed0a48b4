"""What is done with a model, by every process that shares it.

The engine is in the first process, and only there is anything decided: what is answered and when, who gave up, what is
unloaded, which tokens are sampled, what a clock or a limit of memory says. It reaches the others (:func:`follow`) as
operations, by name and with plain arguments, which all carry out in the same order, each on its part of the model.
Where a model is on one machine, an operation is a call.

Within an operation all exchange the same. So an error in an operation must occur in all of them; then each waits for
the next one. If it does not, they are at different points, and end.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import wraps
from typing import Any

import mlx.core as mx
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.sample_utils import greedy_sampler

from .. import group
from ..decoding.conversation import CachedConversation
from ..decoding.stream import GenerationResponse, stream_generate
from ..errors import GlassError
from ..model.glass_model import GlassModel
from .cache_store import ConversationStore, stays_cuttable
from .catalogue import Catalogue, Source
from .engine_options import EngineOptions
from .model_loading import load_model, make_store

logger = logging.getLogger("glass_mlx")

Sampler = Callable[[mx.array], mx.array]
Processor = Callable[[mx.array, mx.array], mx.array]

_END = "end"


def operation(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that all processes carry out. Its positional arguments are told to the others, as JSON; keywords are the
    first one's own."""

    @wraps(method)
    def told(self: Operations, *arguments: Any, **own: Any) -> Any:
        group.tell([method.__name__, arguments])
        with _in_step():
            return method(self, *arguments, **own)

    told.carry_out = method
    return told


@contextmanager
def _in_step() -> Iterator[None]:
    """After an error here, make sure that the others wait for the next operation, too."""
    try:
        yield
    except Exception:
        if group.rank() == 0:
            group.tell(None)
        raise


class Operations:
    """A model, or this process's part of it, the prompt caches of past conversations, and what is done with them.

    Attributes:
        model, tokenizer, store: None while no model is loaded.
    """

    model: GlassModel | None = None
    tokenizer: Any = None
    store: ConversationStore | None = None

    def __init__(self, catalogue: Catalogue, options: EngineOptions):
        self.catalogue, self.options = catalogue, options
        self._held = ExitStack()  # what is held while a model is loaded
        self._conversation: CachedConversation | None = None  # the present one
        self._kept: CachedConversation | None = None  # as it was where the last call ended

    @operation
    def load(self, name: str, *, source: Source | None = None) -> None:
        """Load a model.

        Raises:
            GlassError: it cannot be loaded, or its KV cache cannot be quantised as asked.
        """
        path = group.attempt(lambda: (source or self.catalogue.resolve(name)).locate())
        self.model, self.tokenizer = load_model(path, self.options, self._held)
        self.store = make_store(self.model, self.options)
        self._try_quantising()

    @operation
    def unload(self) -> None:
        """Free the model, all conversations, and the buffers that MLX would keep for reuse."""
        self.model = self.tokenizer = self.store = self._conversation = self._kept = None
        self._held.close()
        gc.collect()
        mx.clear_cache()

    @operation
    def take(self, prompt: list[int], call_ends: list[int], config: dict[str, Any]) -> CachedConversation:
        """Go on from the stored conversation that holds the most of a prompt, or from none, with a configuration."""
        signal = config["signal"]
        self._conversation = self.store.take(prompt, call_ends, signal, lambda: self.model.make_cache(**config))
        self._conversation.session.configure(**config)
        return self._conversation

    @operation
    def read(self, tokens: list[int]) -> None:
        """Read some more of the prompt, in one call."""
        conversation = self._conversation
        self.model.prefill(mx.array(tokens, dtype=mx.int32)[None], conversation.cache)
        if self.options.kv:
            maybe_quantize_kv_cache(conversation.cache, **self.options.kv)
        mx.eval([c.state for c in conversation.cache])
        conversation.tokens = [*conversation.tokens, *tokens]

    @operation
    def answer(
        self,
        prompt: list[int],
        max_tokens: int,
        verify: dict[str, Any],
        *,
        tokenizer: Any = None,
        sampler: Sampler | None = None,
        processors: Sequence[Processor] = (),
    ) -> Iterator[GenerationResponse]:
        """Answer, after the rest of the prompt; as ``stream_generate``. Close it: it may be left at any time."""
        conversation, steps = self._conversation, _Steps()
        if stays_cuttable(conversation.cache, self.options.kv.get("kv_bits")):
            self._kept = conversation
        else:
            self._kept = copy.deepcopy(conversation)
        stream = stream_generate(
            self.model,
            tokenizer or self.tokenizer,
            prompt,
            max_tokens,
            prompt_cache=conversation.cache,
            sampler=steps.shared(sampler),
            logits_processors=[steps.guarded(processor, lambda tokens, logits: logits) for processor in processors],
            prefill_step_size=self.options.prefill_step_size,
            **verify,
            **self.options.kv,
        )
        return _together(stream, steps)

    @operation
    def close(self, keep: bool) -> None:
        """End the present conversation. ``keep``: put it into the store, as it was before the prompt's last tokens, if
        something of it can be reused."""
        kept = self._kept or self._conversation  # if the prompt was not all read
        self._kept = self._conversation = None
        if keep and kept.tokens and group.all_of(kept.cut(len(kept.tokens))):
            self.store.put(kept)
        mx.clear_cache()

    def _try_quantising(self) -> None:
        """Find out whether the KV cache can be quantised as asked; else every request would."""
        kv = self.options.kv
        if kv.get("kv_bits") is None:
            return
        cache = self.model.make_cache()[:-1]
        self.model.dense(mx.zeros((1, 1), dtype=mx.int32), cache=cache)
        try:
            for entry in cache:
                if hasattr(entry, "to_quantized"):
                    mx.eval(entry.to_quantized(kv.get("kv_group_size", 64), kv["kv_bits"]).state)
        except (ValueError, RuntimeError, NotImplementedError) as e:
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            raise GlassError(f"Its KV cache cannot be quantised so (--kv-bits, --kv-group-size): {reason}") from e


class _Steps:
    """The steps of an answer: with every token the first process tells the others which one it took, and whether it
    wants no more.

    Attributes:
        over: whether this process wants no more.
        error: why, if something that is this process's own has failed.
    """

    def __init__(self) -> None:
        self.over = False
        self.error: Exception | None = None
        self._known_over = False
        self._told: deque[mx.array] = deque()  # tokens and ``over``, as far as they were not looked at

    @property
    def are_over(self) -> bool:
        """Whether all processes know that no more is wanted. It is asked after each response. The last thing told is
        not looked at: the step may still be under way."""
        if group.size() == 1:
            return self.over
        while len(self._told) > 1:
            self._known_over |= bool(self._told.popleft().tolist()[-1])
        return self._known_over

    def shared(self, sampler: Sampler | None) -> Sampler | None:
        """A sampler that gives all processes the first one's tokens."""
        if group.size() == 1:
            return sampler
        sample = self.guarded(sampler or greedy_sampler, greedy_sampler)

        def shared(logprobs: mx.array) -> mx.array:
            tokens = sample(logprobs).astype(mx.uint32)
            word = mx.concatenate([tokens, mx.array([self.over], mx.uint32)])
            self._told.append(group.share_in_graph(word, logprobs))
            return self._told[-1][:-1]

        return shared

    def guarded(self, own: Callable[..., mx.array], otherwise: Callable[..., mx.array]) -> Callable[..., mx.array]:
        """What this process alone computes in a step. An error ends the answer, but not before all know; until then
        ``otherwise`` takes its place."""

        def guarded(*arguments: mx.array) -> mx.array:
            if self.error is None:
                try:
                    return own(*arguments)
                except Exception as e:
                    self.error, self.over = e, True
            return otherwise(*arguments)

        return guarded


def _together(stream: Iterator[GenerationResponse], steps: _Steps) -> Iterator[GenerationResponse]:
    """The responses of a stream, which ends after as many steps in every process."""
    with closing(stream), _in_step():
        try:
            for response in stream:
                if steps.are_over:
                    break
                if steps.error is None:
                    yield response
        except GeneratorExit:
            steps.over = True
            while not steps.are_over and next(stream, None) is not None:
                pass
            raise
        if steps.error is not None:
            raise steps.error


def end() -> None:
    """Tell the others that this was all."""
    group.tell(_END)


def follow(options: EngineOptions) -> None:
    """Carry out what the first process does, on this one's part of the model, until that ends.

    Raises:
        GlassError: this process is not at the same point any more.
    """
    operations = Operations(Catalogue(options.model, options.allow_paths, options.allow_download), options)
    error = ""
    while True:
        try:
            told = group.hear()
        except GlassError as e:
            raise GlassError(f"{e}{error}") from e
        if told == _END:
            return
        if told is None:
            continue
        name, arguments = told
        try:
            result = getattr(Operations, name).carry_out(operations, *arguments)
            for _ in result if isinstance(result, Iterator) else ():
                pass
        except Exception as e:  # the first process has it, too, or will find that this one is elsewhere
            error = f"; the last error here: {type(e).__name__}: {e}"
            logger.debug("%s failed", name, exc_info=True)
        finally:
            result = None
