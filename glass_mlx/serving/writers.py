"""OpenAI's responses: their models, and writers that make them of an answer's pieces.

Fields that are not set are left out of the JSON.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from .request import Piece, Token
from .request import Usage as Cost


class _Out(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Error(_Out):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Out):
    """What every failure answers."""

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
    def of(cls, cost: Cost) -> Usage:
        said = {k: v for k, v in asdict(cost).items() if k in GlassUsage.model_fields}
        return cls(
            prompt_tokens=cost.prompt_tokens,
            completion_tokens=cost.completion_tokens,
            total_tokens=cost.prompt_tokens + cost.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cost.cached_tokens),
            glass=GlassUsage(**said),
        )


class TopLogprob(_Out):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Out):
    content: list[TokenLogprob]


class CalledFunction(_Out):
    name: str
    arguments: str


class Called(_Out):
    index: int | None = None
    id: str
    type: Literal["function"]
    function: CalledFunction


class Said(_Out):
    """A message, or in a stream a piece of one. ``reasoning`` and ``reasoning_content`` are the same."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Called] | None = None


FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


class ChatChoice(_Out):
    index: int = 0
    message: Said
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
    delta: Said
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


class _Writer:
    """Makes the responses to one request."""

    prefix: str

    def __init__(self, model: str):
        self._base = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._all = Piece()
        self._tokens: list[Token] = []

    def add(self, piece: Piece) -> None:
        """Collect a piece for :meth:`whole`."""
        a = self._all
        self._all = Piece(
            a.text + piece.text,
            a.reasoning + piece.reasoning,
            a.tool_calls + piece.tool_calls,
            finish_reason=piece.finish_reason,
            usage=piece.usage,
        )
        if piece.token is not None:
            self._tokens.append(piece.token)


class ChatWriter(_Writer):
    prefix = "chatcmpl"

    def __init__(self, model: str, logprobs: bool):
        super().__init__(model)
        self._logprobs, self._calls = logprobs, 0

    def begin(self) -> BaseModel:
        """The first event, which says who speaks."""
        return self._chunk(Said(role="assistant", content=""), None, None)

    def event(self, piece: Piece) -> BaseModel | None:
        """The event for a piece; None if it has nothing to tell."""
        delta = self._said(piece, stream=True)
        logprobs = self._chat_logprobs([piece.token]) if piece.token is not None else None
        if not delta.model_fields_set and not piece.finish_reason and logprobs is None:
            return None
        return self._chunk(delta, piece.finish_reason, logprobs)

    def usage(self, cost: Cost) -> BaseModel:
        """The event after the last piece, where the client asks for it."""
        return ChatChunk(**self._base, object="chat.completion.chunk", choices=[], usage=Usage.of(cost))

    def whole(self) -> BaseModel:
        piece = self._all
        said = self._said(piece, stream=False)
        said.role = "assistant"
        said.content = piece.text if piece.text or not piece.tool_calls else None
        choice = ChatChoice(
            index=0, message=said, finish_reason=piece.finish_reason, logprobs=self._chat_logprobs(self._tokens)
        )
        return ChatCompletion(**self._base, object="chat.completion", choices=[choice], usage=Usage.of(piece.usage))

    def _chunk(self, delta: Said, finish_reason: str | None, logprobs: ChatLogprobs | None) -> ChatChunk:
        choice = ChunkChoice(index=0, delta=delta, finish_reason=finish_reason, logprobs=logprobs)
        return ChatChunk(**self._base, object="chat.completion.chunk", choices=[choice])

    def _said(self, piece: Piece, stream: bool) -> Said:
        said: dict[str, Any] = {}
        if piece.text:
            said["content"] = piece.text
        if piece.reasoning:
            said |= {"reasoning": piece.reasoning, "reasoning_content": piece.reasoning}
        if piece.tool_calls:
            numbered = enumerate(piece.tool_calls, self._calls)
            said["tool_calls"] = [Called(**call, **({"index": i} if stream else {})) for i, call in numbered]
            self._calls += len(piece.tool_calls)
        return Said(**said)

    def _chat_logprobs(self, tokens: list[Token]) -> ChatLogprobs | None:
        if not self._logprobs:
            return None
        return ChatLogprobs(
            content=[
                TokenLogprob(**_logprob(t), top_logprobs=[TopLogprob(**_logprob(o)) for o in t.top]) for t in tokens
            ]
        )


class TextWriter(_Writer):
    prefix = "cmpl"

    def __init__(self, model: str, logprobs: bool):
        super().__init__(model)
        self._logprobs, self._offset = logprobs, 0

    def begin(self) -> None:
        return None

    def event(self, piece: Piece) -> BaseModel | None:
        text = piece.reasoning + piece.text  # a continued text has no parts
        logprobs = self._text_logprobs([piece.token]) if piece.token is not None else None
        if not text and not piece.finish_reason and logprobs is None:
            return None
        return self._response(text, piece.finish_reason, logprobs)

    def usage(self, cost: Cost) -> BaseModel:
        return TextCompletion(**self._base, object="text_completion", choices=[], usage=Usage.of(cost))

    def whole(self) -> BaseModel:
        piece = self._all
        text = piece.reasoning + piece.text
        response = self._response(text, piece.finish_reason, self._text_logprobs(self._tokens))
        response.usage = Usage.of(piece.usage)
        return response

    def _response(self, text: str, finish_reason: str | None, logprobs: TextLogprobs | None) -> TextCompletion:
        choice = TextChoice(index=0, text=text, finish_reason=finish_reason, logprobs=logprobs)
        return TextCompletion(**self._base, object="text_completion", choices=[choice])

    def _text_logprobs(self, tokens: list[Token]) -> TextLogprobs | None:
        if not self._logprobs:
            return None
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.text)
        return TextLogprobs(
            tokens=[t.text for t in tokens],
            token_logprobs=[_finite(t.logprob) for t in tokens],
            top_logprobs=[{o.text: _finite(o.logprob) for o in t.top} for t in tokens],
            text_offset=offsets,
        )


def _logprob(token: Token) -> dict[str, Any]:
    known = "\ufffd" not in token.text  # a part of a character has no text of its own
    return {
        "token": token.text,
        "logprob": _finite(token.logprob),
        "bytes": list(token.text.encode()) if known else None,
    }


def _finite(logprob: float) -> float:
    return max(logprob, -9999.0)  # a banned token has -inf, for which JSON has no number; OpenAI writes -9999
