"""The responses of ``/v1/responses``: their models, and what writes them from the chunks of a completion."""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from .request import Chunk, Token
from .request import Usage as CompletionUsage
from .writers import ErrorBody, GlassUsage, Usage, logprob


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int
    glass: GlassUsage

    @classmethod
    def of(cls, usage: CompletionUsage, reasoning_tokens: int) -> ResponseUsage:
        return cls(
            input_tokens=usage.prompt_tokens,
            input_tokens_details={"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            output_tokens=usage.completion_tokens,
            output_tokens_details={"reasoning_tokens": reasoning_tokens},
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            glass=Usage.of(usage).glass,
        )


class ResponseObject(BaseModel):
    """A whole response; ``output`` are items of the types reasoning, message and function_call."""

    model_config = ConfigDict(extra="allow")  # what it repeats of the request

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete"]
    incomplete_details: dict[str, str] | None
    error: None
    output: list[dict[str, Any]]
    usage: ResponseUsage | None


class ResponseEvent(BaseModel):
    """An event of a stream; what else it has goes by its type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int


# Of an item: its type, the type of its parts, and the event that brings text.
_KINDS = {
    "message": ("output_text", "response.output_text"),
    "reasoning": ("reasoning_text", "response.reasoning_text"),
}


class ResponseWriter:
    """Makes the response to one request: the events of a stream, or the whole."""

    def __init__(self, model: str, logprobs: bool, echoed: dict[str, Any]):
        """
        Args:
            model (str): the model's name.
            logprobs (bool): whether tokens are written with their log-probabilities.
            echoed (dict): the fields of the request that the response repeats.
        """
        self._base = {"id": f"resp_{uuid.uuid4().hex}", "created_at": int(time.time()), "model": model, **echoed}
        self._logprobs = logprobs
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the item that is being written
        self._number, self._reasoning_tokens, self._finish = 0, 0, ""

    def add(self, chunk: Chunk, index: int = 0) -> None:
        """Collect a chunk for :meth:`response`."""
        self.events(chunk)

    def first_events(self, index: int = 0) -> list[BaseModel]:
        """The events that tell of the response."""
        begun = self._response("in_progress").model_dump()
        return [self._event(f"response.{what}", response=begun) for what in ("created", "in_progress")]

    def events(self, chunk: Chunk, index: int = 0) -> list[BaseModel]:
        """The events for a chunk."""
        events: list[BaseModel] = []
        self._reasoning_tokens += bool(chunk.reasoning)
        if chunk.reasoning:
            events += self._text("reasoning", chunk.reasoning, None)
        if chunk.text:
            events += self._text("message", chunk.text, chunk.token)
        for call in chunk.tool_calls:
            events += self._call(call)
        if chunk.finish_reason:
            self._finish = chunk.finish_reason
            if not self._items:
                events += self._text("message", "", None)
            events += self._close()
        return events

    def last_events(self, usage: CompletionUsage, include_usage: bool) -> list[BaseModel]:
        """The event of the whole response."""
        response = self.response(usage)
        return [self._event(f"response.{response.status}", response=response.model_dump())]

    def response(self, usage: CompletionUsage) -> ResponseObject:
        """The whole response."""
        return self._response(self._status, usage=ResponseUsage.of(usage, self._reasoning_tokens))

    def frame(self, event: ResponseEvent) -> bytes:
        """An event as it is sent."""
        return f"event: {event.type}\ndata: {event.model_dump_json()}\n\n".encode()

    def failure(self, error: ErrorBody) -> bytes:
        """The event of an error, as it is sent."""
        told = error.error
        return self.frame(self._event("error", code=told.code, message=told.message, param=told.param))

    @property
    def end(self) -> bytes:
        """What is sent after the last event."""
        return b""

    @property
    def _status(self) -> str:
        return "completed" if self._finish in ("stop", "tool_calls") else "incomplete"

    def _response(self, status: str, usage: ResponseUsage | None = None) -> ResponseObject:
        return ResponseObject(
            **self._base,
            object="response",
            status=status,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
            error=None,
            output=self._items,
            usage=usage,
        )

    def _event(self, type: str, **fields: Any) -> ResponseEvent:
        self._number += 1
        return ResponseEvent(type=type, sequence_number=self._number - 1, **fields)

    def _begin(self, item: dict[str, Any]) -> ResponseEvent:
        self._items.append(item)
        return self._event("response.output_item.added", output_index=len(self._items) - 1, item=dict(item))

    def _place(self) -> dict[str, Any]:
        """Where the open item is, as its events say it."""
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _text(self, kind: str, text: str, token: Token | None) -> list[BaseModel]:
        """The events of more text of an item, which begins where the last one was of another kind."""
        events: list[BaseModel] = []
        part_type, name = _KINDS[kind]
        if self._open is None or self._open["type"] != kind:
            events += self._close()
            events.append(self._begin(_new_item(kind)))
            self._open = self._items[-1]
            part: dict[str, Any] = {"type": part_type, "text": ""}
            part |= {"annotations": [], "logprobs": []} if kind == "message" else {}
            self._open["content"] = [part]
            events.append(
                self._event("response.content_part.added", **self._place(), content_index=0, part=part.copy())
            )
        part = self._open["content"][0]
        part["text"] += text
        known = self._known(token)
        if kind == "message":
            part["logprobs"] = [*part["logprobs"], *known]
        if text:
            more = {"logprobs": known} if kind == "message" else {}
            events.append(self._event(f"{name}.delta", **self._place(), content_index=0, delta=text, **more))
        return events

    def _close(self) -> list[BaseModel]:
        """The events of the end of the open item."""
        item, self._open = self._open, None
        if item is None:
            return []
        item["status"] = "incomplete" if self._finish and self._status == "incomplete" else "completed"
        part, place = item["content"][0], {**self._place(), "content_index": 0}
        more = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
        return [
            self._event(f"{_KINDS[item['type']][1]}.done", **place, text=part["text"], **more),
            self._event("response.content_part.done", **place, part=part),
            self._event("response.output_item.done", output_index=place["output_index"], item=item),
        ]

    def _call(self, call: dict[str, Any]) -> list[BaseModel]:
        """The events of a call."""
        events, function = self._close(), call["function"]
        item = _new_item("function_call") | {"call_id": call["id"], "name": function["name"], "arguments": ""}
        events.append(self._begin(item))
        place, arguments = self._place(), function["arguments"]
        item |= {"arguments": arguments, "status": "completed"}
        return [
            *events,
            self._event("response.function_call_arguments.delta", **place, delta=arguments),
            self._event("response.function_call_arguments.done", **place, name=item["name"], arguments=arguments),
            self._event("response.output_item.done", output_index=place["output_index"], item=item),
        ]

    def _known(self, token: Token | None) -> list[dict[str, Any]]:
        """A token's log-probabilities, if they are wanted."""
        if token is None or not self._logprobs:
            return []
        rivals = [_with_bytes(logprob(other)) for other in token.top]
        return [_with_bytes(logprob(token)) | {"top_logprobs": rivals}]


def _new_item(kind: str) -> dict[str, Any]:
    prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
    item: dict[str, Any] = {"type": kind, "id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress"}
    more: dict[str, Any] = {"message": {"role": "assistant", "content": []}, "reasoning": {"summary": []}}.get(kind, {})
    return item | more


def _with_bytes(known: dict[str, Any]) -> dict[str, Any]:
    return known | {"bytes": known["bytes"] or []}
