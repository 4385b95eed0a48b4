"""OpenAI's responses: their models, and writers that make them from the chunks of a completion.

Fields that are not set are left out of the JSON.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from .request import Chunk, Token
from .request import Usage as CompletionUsage


class _Out(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Error(_Out):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Out):
    """The body of every error response."""

    error: Error


class PromptTokensDetails(_Out):
    cached_tokens: int


class GlassUsage(_Out):
    """How GLASS decoded."""

    density: float
    kept_neurons: int
    total_neurons: int
    global_weight: float
    signal: str
    expected_agreement: float | None
    verified: bool
    drafted_tokens: int
    prompt_tps: float
    generation_tps: float
    selection_ms: float
    cached_tokens: int
    peak_memory: float


class Usage(_Out):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    glass: GlassUsage

    @classmethod
    def of(cls, usage: CompletionUsage) -> Usage:
        glass = {k: v for k, v in asdict(usage).items() if k in GlassUsage.model_fields}
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
            glass=GlassUsage(**glass),
        )


class TopLogprob(_Out):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Out):
    content: list[TokenLogprob]


class FunctionCallOutput(_Out):
    name: str
    arguments: str


class ToolCallOutput(_Out):
    index: int | None = None
    id: str
    type: Literal["function"]
    function: FunctionCallOutput


class AssistantMessage(_Out):
    """A message, or a part of one in a stream. ``reasoning`` and ``reasoning_content`` are the same."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallOutput] | None = None


FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


class ChatChoice(_Out):
    index: int = 0
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None


class ChatCompletion(_Out):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChunkChoice(_Out):
    index: int = 0
    delta: AssistantMessage
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None


class ChatChunk(_Out):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextLogprobs(_Out):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(_Out):
    index: int = 0
    text: str
    finish_reason: FinishReason | None
    logprobs: TextLogprobs | None


class TextCompletion(_Out):
    """A completion, or an event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class Model(_Out):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "glass_mlx"
    kind: str
    size_bytes: int
    downloaded: bool


class ModelList(_Out):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(_Out):
    status: Literal["ok", "unavailable"]


class _Choice:
    """One of the answers to a request.

    Attributes:
        whole: what was collected of it.
        tokens: its tokens.
        calls: how many tool calls were written of it.
        offset: how many characters of text.
    """

    def __init__(self):
        self.whole, self.tokens, self.calls, self.offset = Chunk(), [], 0, 0

    def add(self, chunk: Chunk) -> None:
        whole = self.whole
        self.whole = Chunk(
            whole.text + chunk.text,
            whole.reasoning + chunk.reasoning,
            whole.tool_calls + chunk.tool_calls,
            finish_reason=chunk.finish_reason,
            usage=chunk.usage,
        )
        if chunk.token is not None:
            self.tokens.append(chunk.token)


class _Writer:
    """Makes the responses to one request: either the events of a stream, or one whole response."""

    prefix: str

    def __init__(self, model: str, logprobs: bool, choices: int = 1):
        self._base = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._logprobs = logprobs
        self._choices = [_Choice() for _ in range(choices)]

    end = b"data: [DONE]\n\n"  # what is sent after the last event

    def frame(self, event: BaseModel) -> bytes:
        """An event as it is sent."""
        return b"data: " + event.model_dump_json(exclude_unset=True).encode() + b"\n\n"

    def failure(self, error: ErrorBody) -> bytes:
        """The event of an error, as it is sent."""
        return self.frame(error)

    def add(self, chunk: Chunk, index: int = 0) -> None:
        """Collect a chunk of a choice for :meth:`response`."""
        self._choices[index].add(chunk)


class ChatWriter(_Writer):
    """Writes responses of ``/v1/chat/completions``."""

    prefix = "chatcmpl"

    def first_events(self, index: int = 0) -> list[BaseModel]:
        """The event that tells the role."""
        return [self._event(AssistantMessage(role="assistant", content=""), None, None, index)]

    def events(self, chunk: Chunk, index: int = 0) -> list[BaseModel]:
        """The events for a chunk of a choice; none if it has nothing to show."""
        delta = self._message(chunk, self._choices[index], stream=True)
        logprobs = self._chat_logprobs([chunk.token]) if chunk.token is not None else None
        if not delta.model_fields_set and not chunk.finish_reason and logprobs is None:
            return []
        return [self._event(delta, chunk.finish_reason, logprobs, index)]

    def last_events(self, usage: CompletionUsage, include_usage: bool) -> list[BaseModel]:
        """The event after the last chunk, for clients that ask for the usage."""
        if not include_usage:
            return []
        return [ChatChunk(**self._base, object="chat.completion.chunk", choices=[], usage=Usage.of(usage))]

    def response(self, usage: CompletionUsage) -> BaseModel:
        """The whole response."""
        choices = [self._whole_choice(i, choice) for i, choice in enumerate(self._choices)]
        return ChatCompletion(**self._base, object="chat.completion", choices=choices, usage=Usage.of(usage))

    def _whole_choice(self, index: int, choice: _Choice) -> ChatChoice:
        whole = choice.whole
        message = self._message(whole, choice, stream=False)
        message.role = "assistant"
        message.content = whole.text if whole.text or not whole.tool_calls else None
        logprobs = self._chat_logprobs(choice.tokens)
        return ChatChoice(index=index, message=message, finish_reason=whole.finish_reason, logprobs=logprobs)

    def _event(
        self, delta: AssistantMessage, finish_reason: str | None, logprobs: ChatLogprobs | None, index: int
    ) -> ChatChunk:
        choice = ChunkChoice(index=index, delta=delta, finish_reason=finish_reason, logprobs=logprobs)
        return ChatChunk(**self._base, object="chat.completion.chunk", choices=[choice])

    def _message(self, chunk: Chunk, choice: _Choice, stream: bool) -> AssistantMessage:
        fields: dict[str, Any] = {}
        if chunk.text:
            fields["content"] = chunk.text
        if chunk.reasoning:
            fields |= {"reasoning": chunk.reasoning, "reasoning_content": chunk.reasoning}
        if chunk.tool_calls:
            numbered = enumerate(chunk.tool_calls, choice.calls)
            fields["tool_calls"] = [ToolCallOutput(**call, **({"index": i} if stream else {})) for i, call in numbered]
            choice.calls += len(chunk.tool_calls)
        return AssistantMessage(**fields)

    def _chat_logprobs(self, tokens: list[Token]) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        return ChatLogprobs(
            content=[TokenLogprob(**logprob(t), top_logprobs=[TopLogprob(**logprob(o)) for o in t.top]) for t in tokens]
        )


class TextWriter(_Writer):
    """Writes responses of ``/v1/completions``."""

    prefix = "cmpl"

    def first_events(self, index: int = 0) -> list[BaseModel]:
        return []

    def events(self, chunk: Chunk, index: int = 0) -> list[BaseModel]:
        """The events for a chunk of a choice; none if it has nothing to show."""
        logprobs = self._text_logprobs([chunk.token], index) if chunk.token is not None else None
        if not chunk.text and not chunk.finish_reason and logprobs is None:
            return []
        return [self._response([self._choice(index, chunk, logprobs)])]

    def last_events(self, usage: CompletionUsage, include_usage: bool) -> list[BaseModel]:
        """The event after the last chunk, for clients that ask for the usage."""
        return [self._response([], usage=Usage.of(usage))] if include_usage else []

    def response(self, usage: CompletionUsage) -> BaseModel:
        """The whole response."""
        choices = [
            self._choice(i, choice.whole, self._text_logprobs(choice.tokens, i))
            for i, choice in enumerate(self._choices)
        ]
        return self._response(choices, usage=Usage.of(usage))

    def _choice(self, index: int, chunk: Chunk, logprobs: TextLogprobs | None) -> TextChoice:
        return TextChoice(index=index, text=chunk.text, finish_reason=chunk.finish_reason, logprobs=logprobs)

    def _response(self, choices: list[TextChoice], **usage: Usage) -> TextCompletion:
        return TextCompletion(**self._base, object="text_completion", choices=choices, **usage)

    def _text_logprobs(self, tokens: list[Token], index: int) -> TextLogprobs | None:
        if not self._logprobs:
            return None
        choice, offsets = self._choices[index], []
        for token in tokens:
            offsets.append(choice.offset)
            choice.offset += len(token.text)
        return TextLogprobs(
            tokens=[t.text for t in tokens],
            token_logprobs=[_finite(t.logprob) for t in tokens],
            top_logprobs=[{o.text: _finite(o.logprob) for o in t.top} for t in tokens],
            text_offset=offsets,
        )


def logprob(token: Token) -> dict[str, Any]:
    """A token's text, log-probability and bytes."""
    has_text = "\ufffd" not in token.text  # a token may be a part of a character
    return {
        "token": token.text,
        "logprob": _finite(token.logprob),
        "bytes": list(token.text.encode()) if has_text else None,
    }


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # a banned token has -inf, which JSON cannot write; OpenAI writes -9999
