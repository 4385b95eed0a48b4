"""Answers one request on a loaded model. Runs on the engine's thread, from beginning to end."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx_lm import sample_utils
from mlx_lm.models.cache import can_trim_prompt_cache
from mlx_lm.sample_utils import make_logits_processors

from ..decoding import sampling
from ..decoding.prompt import encode, render
from ..decoding.stream import GenerationResponse, stream_generate
from ..errors import GlassError
from ..model.config import GlassConfig
from ..model.glass_model import GlassModel
from .cache_store import Conversations, Entry, read_bounds
from .output_parser import Reader
from .request import BadRequest, Piece, Request, Ticket, Token, Usage


class _Stop(Exception):
    """The client has gone while its prompt was being read."""


@dataclass
class Answerer:
    """A loaded model and what answering takes besides.

    Attributes:
        model, tokenizer: as loaded.
        conversations: the store of prompt caches.
        template_args: default arguments of the chat template.
        max_prompt_tokens: longer prompts are refused.
        prefill_step_size: prompt tokens in one call.
        kv: mlx-lm's ``kv_bits``, ``kv_group_size`` and ``quantized_kv_start``, if the KV cache is to be quantised.
        verify: ``verify`` and its options, for requests that say nothing of it.
    """

    model: GlassModel
    tokenizer: Any
    conversations: Conversations
    template_args: dict[str, Any]
    max_prompt_tokens: int
    prefill_step_size: int
    kv: dict[str, int]
    verify: dict[str, Any]

    def answer(self, ticket: Ticket, progress: Callable[[float], None]) -> Piece:
        """Put the pieces of the answer into the ticket, but for the last, which is returned; ``progress`` is told the
        tokens/s.

        Raises:
            BadRequest: the model cannot take the request.
        """
        request = ticket.request
        config = self._config(request)
        prompt, shared = self._encode(request)
        bounds = read_bounds(len(prompt), shared, self.prefill_step_size)
        entry = self.conversations.take(
            prompt,
            bounds,
            request.client,
            config.signal,
            exact=request.seed is not None,
            new=lambda: self.model.make_cache(**vars(config)),
        )
        entry.session.configure(**vars(config))
        reading = _Reading(self, ticket, entry, prompt, bounds)
        try:
            return reading.run(progress)
        finally:
            if reading.sound:
                self.conversations.put(entry)

    def _config(self, request: Request) -> GlassConfig:
        try:
            return self.model.config.updated(
                density=request.density,
                global_weight=request.global_weight,
                signal=request.signal,
                layer_budgets=request.layer_budgets,
                refresh=request.refresh,
            )
        except GlassError as e:
            raise BadRequest(str(e)) from e

    def checks(self, request: Request) -> dict[str, Any]:
        """How the dense model checks this answer: arguments of ``stream_generate``."""
        checks = dict(self.verify)
        if request.verify is not None:
            checks |= {"verify": request.verify}
        return checks

    def _encode(self, request: Request) -> tuple[list[int], int]:
        """The prompt's tokens, and how many of them are a system prompt that other chats may share."""
        tokenizer, shared = self.tokenizer, 0
        if request.messages is not None:
            if not tokenizer.has_chat_template:
                raise BadRequest("This model has no chat template, so it cannot chat; use /v1/completions.")
            options = {**self.template_args, **request.template_args, "tools": request.tools}
            prompt = _render(tokenizer, request.messages, add_generation_prompt=True, **options)
            shared = self._shared(request.messages, prompt, options)
        elif isinstance(request.prompt, str):
            prompt = encode(tokenizer, request.prompt)
        else:
            prompt = list(request.prompt or ())
        size = len(tokenizer)
        if not prompt:
            raise BadRequest("The prompt is empty: it has no tokens.")
        if len(prompt) > self.max_prompt_tokens:
            raise BadRequest(f"The prompt has {len(prompt):,} tokens; at most {self.max_prompt_tokens:,} are allowed.")
        if any(not 0 <= t < size for t in (*prompt, *(request.logit_bias or ()))):
            raise BadRequest(f"A token id is out of range: this model has 0 to {size - 1}.")
        return prompt, shared

    def _shared(self, messages: list[dict[str, Any]], prompt: list[int], options: dict[str, Any]) -> int:
        count = next((i for i, m in enumerate(messages) if m["role"] != "system"), 0)
        if count == 0:
            return 0
        try:
            other = render(self.tokenizer, [*messages[:count], {"role": "user", "content": ""}], **options)
        except Exception:  # templates raise what they please; then the system prompt is not shared
            return 0
        return next((i for i, (a, b) in enumerate(zip(prompt, other)) if a != b), 0)

    def token(self, id: int, logprob: float = 0.0, top: tuple[Token, ...] = ()) -> Token:
        """A token with its text as it is within a text: decoding it alone may lose its leading space."""
        anchor = self.tokenizer.encode("a", add_special_tokens=False)[-1]
        before, both = self.tokenizer.decode([anchor]), self.tokenizer.decode([anchor, id])
        text = both[len(before) :] if both.startswith(before) else self.tokenizer.decode([id])
        return Token(id, text, logprob, top)


class _Reading:
    """One answer in the making. ``sound`` is whether the entry's cache and tokens agree, so that it can be kept."""

    def __init__(self, of: Answerer, ticket: Ticket, entry: Entry, prompt: list[int], bounds: list[int]):
        self.of, self.ticket, self.entry, self.prompt, self.bounds = of, ticket, entry, prompt, bounds
        self.cached = len(entry.tokens)
        self.unread = _unread(entry)  # they are in the cache, but are read again before the prompt
        self.checks = of.checks(ticket.request)
        self.verified = bool(self.checks.get("verify")) and entry.session.config.density < 1
        self.generated: list[int] = []
        self.drafted = 0
        self.started = time.perf_counter()
        self.sound = False

    def run(self, progress: Callable[[float], None]) -> Piece:
        request = self.ticket.request
        # Set right before its generation, and no other request runs until that ends: a seed's answer is its own.
        # Without one, 64 new bits, else the answers after a seeded request would be the same every time.
        mx.random.seed(request.seed % 2**64 if request.seed is not None else secrets.randbits(64))
        response, finish, reader = None, None, None
        try:
            self._read_shared()
            reader = Reader(self.of.tokenizer, self.prompt, request.stop, request.tools)
            stream = self._stream()
            try:
                for response in stream:
                    if not self.generated:
                        first = time.perf_counter()
                    self.generated.append(response.token)
                    self.drafted += response.from_draft
                    finish = "cancelled" if self.ticket.cancelled else response.finish_reason
                    piece = reader.feed(response.text) if finish != "cancelled" else Piece()
                    if reader.stopped:
                        finish = "stop"
                    if finish is not None:
                        break
                    progress(response.generation_tps)
                    self.ticket.put(replace(piece, token=self._token(response)))
            finally:
                stream.close()
        except _Stop:
            finish, piece = "cancelled", Piece()
        self._settle()
        usage = self._usage(response, first - self.started) if response is not None else Usage(len(self.prompt))
        if finish != "cancelled":
            rest = reader.finish()
            ended = response.token in self.of.tokenizer.eos_token_ids
            piece = Piece(
                piece.text + rest.text,
                piece.reasoning + rest.reasoning,
                piece.tool_calls + rest.tool_calls,
                None if ended else self._token(response),
            )
            if reader.called and finish == "stop":
                finish = "tool_calls"
        return replace(piece, finish_reason=finish, usage=usage)

    def _read_shared(self) -> None:
        """Read a system prompt in calls of its own, so that other chats with it can go on from its end."""
        session = self.entry.session
        for end in self.bounds[:-2]:
            if end <= session.offset:
                continue
            if self.ticket.cancelled:
                raise _Stop
            start = session.offset
            self.of.model.prefill(mx.array(self.prompt[start:end], dtype=mx.int32)[None], self.entry.cache)
            mx.eval([c.state for c in self.entry.cache])

    def _stream(self):
        of, request = self.of, self.ticket.request
        sampler = (sampling if self.verified else sample_utils).make_sampler(
            request.temperature,
            request.top_p,
            request.min_p,
            top_k=request.top_k if request.top_k < len(of.tokenizer) else 0,  # mlx-lm refuses more than all
            xtc_probability=request.xtc_probability,
            xtc_threshold=request.xtc_threshold,
            xtc_special_tokens=of.tokenizer.encode("\n") + list(of.tokenizer.eos_token_ids),
        )
        processors = make_logits_processors(
            request.logit_bias,
            request.repetition_penalty,
            request.repetition_context_size,
            request.presence_penalty,
            request.repetition_context_size,
            request.frequency_penalty,
            request.repetition_context_size,
        )
        offset = self.entry.session.offset
        # mlx-lm shows the processors only the tokens of this call; penalties count those before as well
        before = mx.array(self.prompt[max(0, offset - request.repetition_context_size) : offset], dtype=mx.int32)
        processors = [lambda t, logits, p=p: p(mx.concatenate([before, t]), logits) for p in processors]

        def on_progress(done: int, total: int) -> None:
            if self.ticket.cancelled and done < total:
                raise _Stop

        return stream_generate(
            of.model,
            of.tokenizer,
            self.prompt[offset:],
            request.max_tokens,
            prompt_cache=self.entry.cache,
            sampler=sampler,
            logits_processors=processors,
            prompt_progress_callback=on_progress,
            prefill_step_size=of.prefill_step_size,
            **self.checks,
            **of.kv,
        )

    def _settle(self) -> None:
        """Note what the cache holds now."""
        entry, read = self.entry, min(self.entry.session.offset, len(self.prompt))
        if self.cached == (entry.bounds[-1] if entry.bounds else 0):  # dense so far
            entry.bounds += [b for b in self.bounds if self.cached < b <= read]
        entry.tokens = [*self.prompt, *self.generated][: entry.session.offset]
        self.sound = len(entry.tokens) == entry.session.offset

    def _token(self, response: GenerationResponse) -> Token:
        request = self.ticket.request
        if not request.logprobs:
            return Token(response.token)
        best = []
        if request.top_logprobs:
            best = mx.argsort(-response.logprobs)[: request.top_logprobs].tolist()
        values = response.logprobs[mx.array([response.token, *best])].tolist()
        top = tuple(self.of.token(id, value) for id, value in zip(best, values[1:]))
        return self.of.token(response.token, values[0], top)

    def _usage(self, response: GenerationResponse, prompt_seconds: float) -> Usage:
        cached = self.cached - self.unread
        return Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.generated),
            cached_tokens=cached,
            prompt_tps=(len(self.prompt) - cached) / prompt_seconds,
            generation_tps=response.generation_tps,
            selection_ms=self.entry.session.selection_time * 1e3 if response.density < 1 else 0.0,
            density=response.density,
            kept_neurons=response.kept_neurons,
            total_neurons=response.total_neurons,
            global_weight=response.global_weight,
            signal=response.signal,
            verified=self.verified,
            drafted_tokens=self.drafted,
            peak_memory=response.peak_memory,
        )


def _unread(entry: Entry) -> int:
    """How many of a cache's last tokens wait to be read again densely."""
    can_go_back = can_trim_prompt_cache(entry.cache[:-1])
    return sum(tokens.shape[1] for tokens in entry.session.pending_reread) if can_go_back else 0


def _render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    try:
        return render(tokenizer, messages, **options)
    except GlassError as e:
        raise BadRequest(str(e)) from e
    except Exception as e:  # a template that takes for granted what these messages lack raises what it pleases
        raise BadRequest(f"The model's chat template does not take this conversation ({type(e).__name__}).") from e
