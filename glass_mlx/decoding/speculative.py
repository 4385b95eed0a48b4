"""Verified decoding: the compact model drafts, the dense model checks, and the answer is the dense model's.

One model and one prompt cache serve both. A pass drafts k tokens sparsely, takes them off the cache and reads them in
one dense call, which gives the dense model's token after each. The longest prefix on which both agree is kept, and one
dense token after it. So greedy output is the dense model's, and sampled output follows its distribution, because every
emitted token was sampled from it. That call also writes exact keys and values, and records the evidence by which the
neurons are chosen again.

*The dense model's* means up to rounding: a call over several tokens sums in another order than one over a single token,
as in a prefill of another step size. Where two tokens are equally likely to the last bits, most often in 16-bit models,
either may be taken, and the answer goes on from that token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse as DenseResponse
from mlx_lm.generate import generation_stream, maybe_quantize_kv_cache, wired_limit
from mlx_lm.models.cache import can_trim_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .. import group
from ..errors import GlassError
from ..model.glass_model import GlassModel
from .draft_scheduler import MAX_STRETCH, DraftScheduler, next_choice
from .sampling import CommonRandomNumbers


class _Decoder:
    """One answer while it is generated.

    Attributes:
        place (int): the next token's place in the answer.
        step_seconds (float): the time of a dense step, over the last stretch of them.
    """

    def __init__(self, model: GlassModel, cache: list[Any], sampler: Callable, processors: list[Callable], kv: tuple):
        self.model, self.cache, self.sampler, self.processors, self.kv = model, cache, sampler, processors, kv
        self.session = model.session(cache)
        self.randomness, self.place = CommonRandomNumbers(), 0
        self.step_seconds = 0.0
        self.seen = mx.zeros((0,), mx.int32)  # the tokens that logits processors are shown

    def read_prompt(self, prompt: mx.array, step_size: int, progress: Callable[[int, int], None]) -> tuple:
        """Prefill as mlx-lm does: in steps, and the last token by itself. Returns the first token [1] and its
        log-probabilities [1, vocabulary]."""
        done, logits = 0, None
        progress(0, prompt.size)
        while done < prompt.size:
            stop = min(done + step_size, prompt.size - 1) if done < prompt.size - 1 else prompt.size
            logits = self.model.prefill(prompt[done:stop][None], self.cache)
            self._quantise()
            mx.eval([entry.state for entry in self.cache])
            done = stop
            progress(done, prompt.size)
        return self._next(logits[:, -1], prompt)

    def densely(self, token: int, steps: int) -> Iterator[tuple[int, mx.array]]:
        """Dense steps; each is under way while the one before is handed over."""
        start, seconds = time.perf_counter(), 0.0
        ahead = self._dense_step(mx.array([token], mx.int32))
        for i in range(steps):
            y, logprobs = ahead
            if i + 1 < steps:
                ahead = self._dense_step(y)
            generated = y.item()
            seconds += time.perf_counter() - start
            self.step_seconds = seconds / (i + 1)
            yield generated, logprobs[0]
            start = time.perf_counter()

    def draft(self, token: int, k: int) -> mx.array:
        """The token and k tokens decoded sparsely after it, [k + 1]."""
        read, seen = [mx.array([token], mx.int32)], self.seen
        for i in range(k):
            logits = self.model.draft(read[-1][None], self.cache)
            y, _, seen = self._sample(logits[:, -1], self.place + i, seen, read[-1])
            read.append(y.astype(mx.int32))
            mx.async_eval(read[-1])  # of a pipeline MLX may else receive for the next token first
        tokens = mx.concatenate(read)
        mx.eval(tokens)
        return tokens

    def check(self, tokens: mx.array) -> tuple[list[tuple[int, mx.array, bool]], int]:
        """Read drafted tokens densely. Returns the tokens to emit (id, log-probabilities, drafted), and how many of the
        drafted ones were kept."""
        k = tokens.size - 1
        logits = self.model.verify(tokens[None], self.cache, drafted=k)
        self._quantise()
        seen, given, chosen = self.seen, [], []
        for i in range(k + 1):
            y, logprobs, seen = self._sample(logits[:, i], self.place + i, seen, tokens[i : i + 1])
            given.append(logprobs[0])
            chosen.append(y)
        chosen = mx.concatenate(chosen)
        agree = chosen[:-1] == tokens[1:]
        mx.eval(chosen, agree, self.session.energy)
        kept = next((i for i, same in enumerate(agree.tolist()) if not same), k)
        self.model.retract(self.cache, k - kept)
        if self.processors:
            self.seen = mx.concatenate([self.seen, tokens[: kept + 1]])
        self.place += kept + 1
        emitted = [*tokens[1 : kept + 1].tolist(), chosen[kept].item()]
        return [(t, given[i], i < kept) for i, t in enumerate(emitted)], kept

    def _dense_step(self, y: mx.array) -> tuple[mx.array, mx.array]:
        with mx.stream(generation_stream):
            logits = self.model.dense(y[None], cache=self.cache[:-1])
            self.session.draft(1)
            self._quantise()
            step = self._next(logits[:, -1], y)
            mx.async_eval(*step)
            return step

    def _next(self, logits: mx.array, read: mx.array) -> tuple[mx.array, mx.array]:
        """The answer's next token [1] after ``read``, and its log-probabilities [1, vocabulary]."""
        y, logprobs, self.seen = self._sample(logits, self.place, self.seen, read)
        self.place += 1
        return y, logprobs

    def _sample(self, logits: mx.array, place: int, seen: mx.array, read: mx.array) -> tuple:
        """A token [1] for a place, its log-probabilities [1, vocabulary], and what processors have seen by then."""
        if self.processors:
            seen = mx.concatenate([seen, read])
            for processor in self.processors:
                logits = processor(seen, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        self.randomness.at(place)
        return self.sampler(logprobs), logprobs, seen

    def _quantise(self) -> None:
        maybe_quantize_kv_cache(self.cache, *self.kv)


def verified_generate_step(
    prompt: mx.array,
    model: GlassModel,
    *,
    prompt_cache: list[Any],
    max_tokens: int = 256,
    sampler: Callable[[mx.array], mx.array] | None = None,
    logits_processors: list[Callable[[mx.array, mx.array], mx.array]] | None = None,
    prefill_step_size: int = 2048,
    draft_tokens: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 0,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    scheduler: DraftScheduler | None = None,
) -> Iterator[tuple[int, mx.array, bool]]:
    """Generate tokens as ``mlx_lm.generate.generate_step`` does with the dense model, drafting sparsely.

    Args:
        prompt (mx.array): tokens [n].
        model (GlassModel): the model.
        prompt_cache (list): from ``model.make_cache()``.
        max_tokens (int): the longest answer; -1 for no limit.
        sampler, logits_processors, prefill_step_size, prompt_progress_callback, kv_bits, kv_group_size,
            quantized_kv_start: as in mlx-lm. MLX's global random state, which samplers draw from, is seeded for each
            place of the answer. Samplers of ``sampling.make_sampler`` accept more drafts than mlx-lm's.
        draft_tokens (int, optional): how many to draft before each check. Default: as many as pay
            (``DraftScheduler``).
        scheduler (DraftScheduler, optional): the cost model. Default: the one that this model's
            answers at this density share.

    Yields:
        tuple: a token, its log-probabilities [vocabulary] by the dense model, and whether it was drafted.

    Raises:
        GlassError: an argument is out of range.
    """
    if draft_tokens is not None and draft_tokens < 0:
        raise GlassError(f"draft_tokens must not be negative, not {draft_tokens}.")
    sampler = sampler or (lambda logprobs: mx.argmax(logprobs, axis=-1))
    kv = (quantized_kv_start, kv_group_size, kv_bits)
    decoder = _Decoder(model, prompt_cache, sampler, logits_processors or [], kv)
    session = decoder.session
    scheduler = scheduler or model.draft_schedulers.setdefault(session.config.density, DraftScheduler())
    with mx.stream(generation_stream):
        first, logprobs = decoder.read_prompt(prompt, prefill_step_size, prompt_progress_callback or (lambda *_: None))
        token = first.item()
    yield token, logprobs[0], False
    emitted, due = 1, next_choice(1)
    while emitted != max_tokens:
        left = max_tokens - emitted if max_tokens > 0 else MAX_STRETCH
        k = min(scheduler.choose() if draft_tokens is None else draft_tokens, left - 1)
        if k == 0 or not scheduler.measured or not _can_take_back(prompt_cache[:-1], k + 1):
            steps = min(left, scheduler.stretch if scheduler.measured else 1)
            for generated, logprobs in decoder.densely(token, steps):
                token, emitted = generated, emitted + 1
                yield token, logprobs, False
            scheduler.observe(0, 0, 0.0, *_in_step(model, decoder.step_seconds))
            continue
        with mx.stream(generation_stream):
            model.select(prompt_cache)
            start = time.perf_counter()
            tokens = decoder.draft(token, k)
            drafted = time.perf_counter()
            accepted, kept = decoder.check(tokens)
        scheduler.observe(k, kept, *_in_step(model, drafted - start, time.perf_counter() - drafted))
        session.accept(kept + 1)
        if session.generated >= due:
            session.drop_choice()
            due = next_choice(session.generated + 1)
        token = accepted[-1][0]
        for i, one in enumerate(accepted):
            emitted += 1
            if emitted % 256 == 0:
                mx.clear_cache()  # as mlx-lm's own loop does
            try:
                yield one
            except GeneratorExit:
                model.retract(prompt_cache, max(0, kept - i - 1))  # what was kept and not taken
                raise


def _in_step(model: GlassModel, *seconds: float) -> list[float]:
    """Times that were measured; of processes that share a model those of the first, so that all draft as much."""
    return list(seconds) if model.part is None else group.share(mx.array(seconds)).tolist()


def _can_take_back(entries: list[Any], tokens: int) -> bool:
    """Whether a cache that grows by this many tokens can give them back. A sliding window that is full by then cannot,
    nor can a recurrent state; from there on the dense model decodes."""
    room = all(entry.offset + tokens < entry.max_size for entry in entries if hasattr(entry, "max_size"))
    return room and can_trim_prompt_cache(entries)


def stream_verified(
    model: GlassModel,
    tokenizer: TokenizerWrapper,
    prompt: mx.array,
    max_tokens: int,
    **kwargs: Any,
) -> Iterator[DenseResponse]:
    """``mlx_lm.stream_generate`` with ``verified_generate_step``, which takes ``kwargs``."""
    detokenizer, start, prompt_tps = tokenizer.detokenizer, time.perf_counter(), 0.0
    steps = verified_generate_step(prompt, model, max_tokens=max_tokens, **kwargs)
    with wired_limit(model, [generation_stream]), closing(steps):
        for n, (token, logprobs, drafted) in enumerate(steps, start=1):
            if n == 1:
                prompt_tps, start = prompt.size / (time.perf_counter() - start), time.perf_counter()
            ended = token in tokenizer.eos_token_ids
            if not ended:
                detokenizer.add_token(token)
            last = ended or n == max_tokens
            if last:
                detokenizer.finalize()
            yield DenseResponse(
                text=detokenizer.last_segment,
                token=token,
                logprobs=logprobs,
                from_draft=drafted,
                prompt_tokens=prompt.size,
                prompt_tps=prompt_tps,
                generation_tokens=n,
                generation_tps=n / (time.perf_counter() - start),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=("stop" if ended else "length") if last else None,
            )
            if last:
                return
