"""Generates completions with a loaded model, one at a time. Everything here runs on the engine's thread.

What is done with the model is in ``operations``; here is decided what, and in what words that is answered.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from typing import Any

import mlx.core as mx
from mlx_lm import sample_utils
from mlx_lm.sample_utils import make_logits_processors

from ..decoding import sampling
from ..decoding.conversation import CachedConversation
from ..decoding.prompt import ContinuingTokenizer, encode
from ..decoding.stream import GenerationResponse, context_length
from ..errors import GlassError
from ..model.config import GlassConfig
from ..model.quality import density_for
from .cache_store import message_marks, prompt_call_ends
from .engine_options import EngineOptions
from .errors import BadRequest
from .grammar import Grammars
from .operations import Operations
from .output_parser import OutputParser
from .prompt_limit import PromptLimit
from .request import Chunk, PendingCompletion, Request, Token, Usage

_BEFORE = 4  # tokens, of which a character has at most so many


class _Cancelled(Exception):
    """The client gave up while its prompt was being read."""


class Worker:
    """A loaded model, and what it takes to answer requests with it.

    Attributes:
        operations: what is done with the model, of all processes that share it.
        model, tokenizer: as loaded.
        store: the prompt caches of past conversations.
        template_args: default arguments of the chat template.
        max_prompt_tokens: longer prompts are refused.
        prefill_step_size: prompt tokens that are read in one call.
        verify: ``verify`` and its options, for requests that do not set them.
        answered: the last request and its answer, until ``read_ahead`` has read it.
    """

    def __init__(self, operations: Operations, options: EngineOptions):
        self.operations = operations
        self.model, self.tokenizer, self.store = operations.model, operations.tokenizer, operations.store
        self.template_args, self.verify = options.template_args, options.verify
        context = context_length(self.model, self.tokenizer, self.model.make_cache())
        self.max_prompt_tokens = min(options.max_prompt_tokens, context or options.max_prompt_tokens)
        self.prefill_step_size = options.prefill_step_size
        self.answered: tuple[Request, str] | None = None
        self.marks = message_marks(self.tokenizer)
        self.grammars = Grammars(self.tokenizer)

    def complete(self, pending: PendingCompletion, on_speed: Callable[[float], None]) -> Chunk:
        """Generate a completion.

        Args:
            pending (PendingCompletion): the request, which receives all chunks but the last.
            on_speed (callable): called with the tokens/s after each token.

        Returns:
            Chunk: the last chunk.

        Raises:
            BadRequest: the model cannot take the request.
        """
        request = pending.request
        config = self._config(request)
        prompt = self._encode(request)
        pending.warnings += self._warnings(request, prompt)
        grammar = self.grammars.processor(request, prompt)
        pending.warnings += grammar.warnings if grammar is not None else ()
        call_ends = prompt_call_ends(prompt, self.marks, self.prefill_step_size)
        with self._conversation(prompt, call_ends, config) as conversation:
            completion = _Completion(self, pending, conversation, prompt, call_ends, grammar)
            last = completion.run(on_speed)
        self.answered = completion.answered(last)
        return last

    def read_ahead(self, interrupted: Callable[[], bool]) -> None:
        """Read the last answer in the calls in which the next turn would read it, and keep that. The next turn then
        waits for its own message only.

        Args:
            interrupted (callable): asked before each call whether to stop, with what is read by then.
        """
        answered, self.answered = self.answered, None
        if answered is None or self.model.low_memory or not self.store.max_conversations:
            return  # with little memory, the next prompt reads all weights from the disk anyway
        request, answer = answered
        said = [*request.messages, {"role": "assistant", "content": answer}]
        turns = ([*said, {"role": "user", "content": text}] for text in "xy")
        try:
            prompt, other = (self._encode(replace(request, messages=messages)) for messages in turns)
        except BadRequest:  # it is too long, or the template refuses it
            return
        common = next((i for i, (a, b) in enumerate(zip(prompt, other)) if a != b), 0)
        call_ends = [end for end in prompt_call_ends(prompt, self.marks, self.prefill_step_size) if end < common]
        kept = max((end for end in call_ends if end < len(self._encode(request)) - 1), default=0)
        with self._conversation(prompt, call_ends, self._config(request)) as conversation:
            if len(conversation.tokens) >= kept:  # else there was no room for it
                self.read(conversation, prompt, call_ends, interrupted)

    @contextmanager
    def _conversation(
        self, prompt: list[int], call_ends: list[int], config: GlassConfig
    ) -> Iterator[CachedConversation]:
        """The conversation that a prompt goes on from. It is kept for later ones, unless there is an error."""
        conversation = self.operations.take(prompt, call_ends, vars(config))
        try:
            yield conversation
        except BaseException:
            self.operations.close(False)
            raise
        self.operations.close(True)

    def read(
        self, conversation: CachedConversation, prompt: list[int], call_ends: list[int], stop: Callable[[], bool]
    ) -> bool:
        """Read a prompt up to the last of its calls, from where a conversation is; ``stop`` is asked before each.
        Returns whether it was all read."""
        for end in call_ends:
            start = conversation.session.offset
            if end <= start:
                continue
            if stop():
                return False
            self.operations.read(prompt[start:end])
        return True

    def _config(self, request: Request) -> GlassConfig:
        try:
            choice = {field.name: getattr(request, field.name) for field in fields(GlassConfig)}
            if request.quality is not None:
                choice["density"] = density_for(request.quality, self.model.quality)
            return self.model.config.updated(**choice)
        except GlassError as e:
            raise BadRequest(str(e)) from e

    def verify_options(self, request: Request) -> dict[str, Any]:
        """The options of verified decoding for a request: arguments of ``stream_generate``."""
        return self.verify if request.verify is None else {**self.verify, "verify": request.verify}

    @property
    def limit(self) -> PromptLimit:
        """How long prompts may be."""
        return PromptLimit(self.max_prompt_tokens, self.tokenizer, self.template_args)

    def _encode(self, request: Request) -> list[int]:
        """The tokens of the prompt."""
        tokenizer, limit = self.tokenizer, self.limit
        limit.check(request)
        if request.messages is not None:
            prompt = limit.render(request.messages, **limit.options(request))
        elif isinstance(request.prompt, str):
            prompt = encode(tokenizer, request.prompt)
        else:
            prompt = list(request.prompt or ())
        size = len(tokenizer)
        if not prompt:
            raise BadRequest("The prompt is empty: it has no tokens.")
        limit.refuse_above(len(prompt))
        if any(not 0 <= t < size for t in (*prompt, *(request.logit_bias or ()))):
            raise BadRequest(f"A token id is out of range: this model has the ids 0 to {size - 1}.")
        return prompt

    def _warnings(self, request: Request, prompt: list[int]) -> list[str]:
        """What the client should know that depends on the model."""
        if not request.tools:
            return []
        warnings, limit = [], self.limit
        if limit.render(request.messages, **{**limit.options(request), "tools": None}) == prompt:
            warnings.append("tools: this model's chat template does not show them to it")
        if not request.forced_tools and not self.grammars.writes_calls_as_json:
            if any(tool["function"].get("strict") for tool in request.tools):
                warnings.append("strict: this model's form of tool calls cannot be enforced")
            if request.schema is not None:
                warnings.append("tools: this model can call none in an answer of a given form")
        return warnings

    def token(self, id: int, logprob: float = 0.0, top: tuple[Token, ...] = ()) -> Token:
        """A token with its text. It is decoded after another token, because alone it may lose its leading space."""
        anchor = self.tokenizer.encode("a", add_special_tokens=False)[-1]
        before, both = self.tokenizer.decode([anchor]), self.tokenizer.decode([anchor, id])
        text = both[len(before) :] if both.startswith(before) else self.tokenizer.decode([id])
        return Token(id, text, logprob, top)


class _Completion:
    """One completion while it is generated."""

    def __init__(
        self,
        worker: Worker,
        pending: PendingCompletion,
        conversation: CachedConversation,
        prompt: list[int],
        call_ends: list[int],
        grammar: Callable[[mx.array, mx.array], mx.array] | None,
    ):
        self.worker, self.pending, self.request = worker, pending, pending.request
        self.conversation, self.prompt, self.call_ends = conversation, prompt, call_ends
        self.grammar, self.in_cache = grammar, len(conversation.tokens)
        self.verify = worker.verify_options(self.request)
        self.verified = bool(self.verify.get("verify")) and not worker.model.keeps_all(conversation.session.config)
        self.generated: list[int] = []
        self.text = ""  # of the chunks so far
        self.drafted = 0
        self.started = self.first_token_at = time.perf_counter()

    def run(self, on_speed: Callable[[float], None]) -> Chunk:
        """Generate; returns the last chunk."""
        # Seeded right before generating, and no other request runs until it ends, so the random numbers are its own.
        # Without a seed: 64 fresh bits, or the answers that follow a seeded request would always be the same.
        mx.random.seed(self.request.seed % 2**64 if self.request.seed is not None else secrets.randbits(64))
        request, tokenizer = self.request, self.worker.tokenizer
        parser = OutputParser(
            tokenizer,
            self.prompt,
            request.stop,
            request.tools,
            is_chat=request.messages is not None,
            bare_call=self.worker.grammars.forces_bare_call(request),
            one_call=request.one_call,
        )
        if request.echo:
            said = request.prompt if isinstance(request.prompt, str) else tokenizer.decode(self.prompt)
            self.pending.put(Chunk(said))
        response, chunk, finish = None, Chunk(), "cancelled"
        try:
            self._read_beginning()
            response, chunk, finish = self._generate(parser, on_speed)
        except _Cancelled:
            pass
        usage = self._usage(response) if response is not None else Usage(len(self.prompt))
        if finish != "cancelled":
            rest = parser.finish()
            ended = response.token in tokenizer.eos_token_ids
            chunk = Chunk(
                chunk.text + rest.text,
                chunk.reasoning + rest.reasoning,
                chunk.tool_calls + rest.tool_calls,
                None if ended else self._token(response),
            )
            if finish == "stop":
                finish = "tool_calls" if parser.has_tool_calls else "length" if parser.is_reasoning else "stop"
        return replace(chunk, finish_reason=finish, usage=usage)

    def _generate(
        self, parser: OutputParser, on_speed: Callable[[float], None]
    ) -> tuple[GenerationResponse, Chunk, str]:
        """Deliver all chunks but the last; returns the last response, its chunk and the finish reason."""
        with closing(self._stream()) as stream:
            for response in stream:
                if not self.generated:
                    self.first_token_at = time.perf_counter()
                self.generated.append(response.token)
                self.drafted += response.from_draft
                if self.pending.cancelled:
                    return response, Chunk(), "cancelled"
                chunk = parser.feed(response.text)
                finish = "stop" if parser.stopped else response.finish_reason
                if finish is not None:
                    return response, chunk, finish
                on_speed(response.generation_tps)
                self.text += chunk.text
                self.pending.put(replace(chunk, token=self._token(response)))
        raise RuntimeError("the stream ended without a finish reason")

    def _read_beginning(self) -> None:
        """Read the prompt up to the last of its calls, from where another one can go on."""
        read = self.worker.read(self.conversation, self.prompt, self.call_ends, lambda: self.pending.cancelled)
        if not read or self.pending.cancelled:
            raise _Cancelled

    def answered(self, last: Chunk) -> tuple[Request, str] | None:
        """The request and its answer, if there may be a next turn that has them; not so where it calls tools."""
        answer = self.text + last.text
        is_turn = self.request.messages is not None and not self.request.continue_final_message
        goes_on = is_turn and last.finish_reason in ("stop", "length") and answer
        return (self.request, answer) if goes_on else None

    def _stream(self) -> Iterator[GenerationResponse]:
        worker, request = self.worker, self.request
        sampler = (sampling if self.verified else sample_utils).make_sampler(
            sampling.effective_temperature(request.temperature, request.top_p),
            request.top_p,
            request.min_p,
            top_k=request.top_k if request.top_k < len(worker.tokenizer) else 0,  # mlx-lm refuses more
            xtc_probability=request.xtc_probability,
            xtc_threshold=request.xtc_threshold,
            xtc_special_tokens=worker.tokenizer.encode("\n") + list(worker.tokenizer.eos_token_ids),
        )
        processors = make_logits_processors(
            request.logit_bias,
            request.repetition_penalty,
            request.repetition_context_size,
            request.presence_penalty,
            request.presence_context_size,
            request.frequency_penalty,
            request.frequency_context_size,
        )
        offset = self.conversation.session.offset
        # mlx-lm shows the processors only the tokens of this call, but penalties count earlier tokens as well
        sizes = request.repetition_context_size, request.presence_context_size, request.frequency_context_size
        before = mx.array(self.prompt[max(0, offset - max(sizes)) : offset], dtype=mx.int32)
        processors = [lambda t, logits, p=p: p(mx.concatenate([before, t]), logits) for p in processors]
        if self.grammar is not None:
            processors.append(self.grammar)  # the last one: nothing may lift what it forbids
        return worker.operations.answer(
            self.prompt[offset:],
            request.max_tokens,
            self.verify,
            tokenizer=self._tokenizer(),
            sampler=sampler,
            processors=processors,
        )

    def _tokenizer(self) -> Any:
        """The tokenizer to write the answer with. A chat's answer begins a text; others go on with one."""
        tokenizer, request = self.worker.tokenizer, self.request
        goes_on = request.messages is None or request.continue_final_message
        return ContinuingTokenizer(tokenizer, self.prompt[-_BEFORE:]) if goes_on else tokenizer

    def _token(self, response: GenerationResponse) -> Token:
        if not self.request.logprobs:
            return Token(response.token)
        best = []
        if self.request.top_logprobs:
            best = mx.argsort(-response.logprobs)[: self.request.top_logprobs].tolist()
        values = response.logprobs[mx.array([response.token, *best])].tolist()
        top = tuple(self.worker.token(id, value) for id, value in zip(best, values[1:]))
        return self.worker.token(response.token, values[0], top)

    def _usage(self, response: GenerationResponse) -> Usage:
        return Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.generated),
            cached_tokens=self.in_cache,
            prompt_tps=(len(self.prompt) - self.in_cache) / (self.first_token_at - self.started),
            generation_tps=response.generation_tps,
            selection_ms=self.conversation.session.selection_time * 1e3 if response.density < 1 else 0.0,
            density=response.density,
            kept_neurons=response.kept_neurons,
            total_neurons=response.total_neurons,
            global_weight=response.global_weight,
            signal=response.signal,
            expected_agreement=response.expected_agreement,
            verified=self.verified,
            drafted_tokens=self.drafted,
            peak_memory=response.peak_memory,
        )
