"""OpenAI's requests, with GLASS's own fields, and how they become requests to the engine.

Types and ranges are strict. Unknown fields are ignored, because clients send all sorts of them.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..decoding.prompt import check_template_args
from ..errors import GlassError
from .errors import BadRequest
from .request import Request

# Of a list: no other thread runs while a body is checked, which takes 10 us for an item.
MAX_ITEMS = 2**14

_Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
_StopWord = Annotated[str, Field(min_length=1, max_length=1000)]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(_Model):
    """A part of a message's content. Only text is supported."""

    type: Literal["text"]
    text: str


class FunctionCall(_Model):
    name: str
    arguments: str = "{}"

    @field_validator("arguments")
    @classmethod
    def _check_is_object(cls, value: str) -> str:
        try:
            if isinstance(json.loads(value or "{}"), dict):
                return value
        except (ValueError, RecursionError):
            pass
        raise ValueError("must be a JSON object, as a string")


class ToolCall(_Model):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(_Model):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_ITEMS)] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_ITEMS)
    tool_call_id: str | None = None

    def render(self) -> dict[str, Any]:
        """The message in the form that chat templates take."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        message = self.model_dump(exclude_none=True, exclude={"content", "tool_calls"})
        # templates do not know "developer", OpenAI's newer name for "system"
        message |= {"role": "system" if self.role == "developer" else self.role, "content": content or ""}
        if self.tool_calls:
            calls = [call.model_dump(exclude_none=True) for call in self.tool_calls]
            for call in calls:  # templates want the arguments as objects
                call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
            message["tool_calls"] = calls
        return message


class Function(_Model):
    model_config = ConfigDict(strict=True, extra="allow")
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Model):
    model_config = ConfigDict(strict=True, extra="allow")
    type: Literal["function"]
    function: Function


class StreamOptions(_Model):
    include_usage: bool | None = None


class ResponseFormat(_Model):
    """Only text is supported: generation cannot be constrained to a schema."""

    type: Literal["text"]


def _check_token_ids(bias: dict[str, float]) -> dict[str, float]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ValueError("keys must be token ids")
    return bias


class _Body(_Model):
    """The fields that chats and completions share. Sampling options that are left out are the server's."""

    model: str = Field("default_model", max_length=300)
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: _Unit | None = None
    top_k: int | None = Field(None, ge=0, le=2**31)
    min_p: _Unit | None = None
    xtc_probability: _Unit | None = None
    xtc_threshold: float | None = Field(None, ge=0, le=0.5, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    repetition_context_size: int | None = Field(None, ge=1, le=2**20)
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]],
            AfterValidator(_check_token_ids),
            Field(max_length=MAX_ITEMS, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}}),
        ]
        | None
    ) = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: _StopWord | Annotated[list[_StopWord], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    user: str | None = Field(None, max_length=1000, description="users take turns in the queue")
    density: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    quality: Literal["high", "balanced", "fast"] | None = None
    global_weight: Literal["auto"] | _Unit | None = None
    signal: Literal["impact", "activation"] | None = None
    layer_budgets: Literal["measured", "uniform"] | None = None
    refresh: Literal["auto"] | Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    compensation: bool | None = None
    verify: bool | None = Field(
        None, description="draft with the sparse model and check with the dense one, whose answer it is"
    )

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _request(self, client: str, defaults: dict[str, Any], **fields: Any) -> Request:
        names = Request.__dataclass_fields__.keys() & type(self).model_fields.keys() - {"prompt", "messages", "tools"}
        given = {k: v for k in names if (v := getattr(self, k)) is not None}
        stop = self.stop or ()
        given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        if self.logit_bias is not None:
            given["logit_bias"] = {int(k): v for k, v in self.logit_bias.items()}
        given["client"] = f"{client} {self.user}" if self.user else client
        return Request(**{**defaults, **given, **fields})


class ChatBody(_Body):
    """``POST /v1/chat/completions``"""

    messages: list[Message] = Field(min_length=1, max_length=MAX_ITEMS)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=MAX_ITEMS)
    tool_choice: Literal["none", "auto"] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_not_reserved(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            return value and check_template_args(value)
        except GlassError as e:
            raise ValueError(str(e)) from e

    def request(self, client: str, defaults: dict[str, Any]) -> Request:
        """The request to the engine. ``defaults`` are the server's sampling options."""
        fields: dict[str, Any] = {"messages": [message.render() for message in self.messages]}
        if self.tools and self.tool_choice != "none":
            fields["tools"] = [tool.model_dump(exclude_none=True) for tool in self.tools]
        if self.max_completion_tokens is not None:
            fields["max_tokens"] = self.max_completion_tokens
        fields |= {"template_args": self.chat_template_kwargs or {}, "top_logprobs": self.top_logprobs or 0}
        fields["logprobs"] = bool(self.logprobs or self.top_logprobs)
        return self._request(client, defaults, **fields)


_TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Tokens = Annotated[list[_TokenId], Field(min_length=1, max_length=2**20)]


class CompletionBody(_Body):
    """``POST /v1/completions``: one prompt, as text or tokens."""

    prompt: str | _Tokens | Annotated[list[str], Field(min_length=1, max_length=1)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    def request(self, client: str, defaults: dict[str, Any]) -> Request:
        """The request to the engine. ``defaults`` are the server's sampling options."""
        prompt = (
            self.prompt[0] if isinstance(self.prompt[:1], list) and isinstance(self.prompt[0], str) else self.prompt
        )
        fields = {"prompt": prompt, "logprobs": self.logprobs is not None, "top_logprobs": self.logprobs or 0}
        return self._request(client, defaults, **fields)


_B = TypeVar("_B", bound=_Body)


def parse(kind: type[_B], body: bytes) -> _B:
    """Parse the body of a request.

    Raises:
        BadRequest: the body is invalid; the message names the field.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as e:
        # a union gives one error per member; the deepest in the value tells the most, but for a list that is too long
        errors = e.errors(include_url=False, include_input=False, include_context=False)
        first = max(errors, key=lambda x: (x["type"] == "too_long", len(x["loc"])))
        if first["type"] == "json_invalid":
            raise BadRequest("The body is not valid JSON.") from e
        where = ".".join(str(part) for part in first["loc"] if str(part).isidentifier() or isinstance(part, int))
        raise BadRequest(f"{where or 'body'}: {first['msg']}"[:500], where or None) from e
