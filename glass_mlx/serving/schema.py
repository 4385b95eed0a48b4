"""OpenAI's requests, with GLASS's own fields, and how they become requests to the engine.

Types and ranges are strict, but for what real clients send: whole floats as integers, and the usual values for "no
limit" and "off". What else they send is judged by the tables of ``fields``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, field_validator

from ..decoding.prompt import check_template_args
from ..errors import GlassError
from .errors import BadRequest
from .fields import CHAT, COMPLETIONS, Rule, judge
from .messages import (
    MAX_ITEMS,
    AllowedToolsChoice,
    JsonFormat,
    Message,
    Model,
    ResponseFormat,
    SchemaFormat,
    Tool,
    ToolChoice,
    whole,
)
from .request import Request
from .writers import ChatWriter, TextWriter

MAX_CHOICES = 128  # in one response
ANY_OBJECT: dict[str, Any] = {"type": "object"}

_Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
_StopWord = Annotated[str, Field(max_length=1000)]


def _check_not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("must be at least 1, or -1 for no limit")
    return value


def _check_penalty(value: float) -> float:
    if 0 < value < 0.01:
        raise ValueError("must be 0 or at least 0.01")  # logits of 16 bits would overflow
    return value


MaxTokens = Annotated[whole(-1, 2**31), AfterValidator(_check_not_zero)]


class StreamOptions(Model):
    include_usage: bool | None = None


def _check_token_ids(bias: dict[str, float]) -> dict[str, float]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ValueError("keys must be token ids")
    return bias


class Body(Model):
    """The fields that all endpoints share. Sampling options that are left out are the server's."""

    model_config = ConfigDict(strict=True, extra="allow")  # they are judged
    rules: ClassVar[Mapping[str, Rule]]

    model: str | None = Field(None, max_length=300)
    max_tokens: MaxTokens | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: _Unit | None = None
    top_k: whole(-1, 2**31) | None = Field(None, description="0 or -1: off")
    min_p: _Unit | None = None
    xtc_probability: _Unit | None = None
    xtc_threshold: float | None = Field(None, ge=0, le=0.5, allow_inf_nan=False)
    repetition_penalty: (
        Annotated[float, Field(ge=0, le=10, allow_inf_nan=False), AfterValidator(_check_penalty)] | None
    ) = Field(None, description="0 or 1: off")
    repetition_context_size: whole(1, 2**20) | None = None
    presence_penalty: _Penalty | None = None
    presence_context_size: whole(1, 2**20) | None = None
    frequency_penalty: _Penalty | None = None
    frequency_context_size: whole(1, 2**20) | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]],
            AfterValidator(_check_token_ids),
            Field(max_length=MAX_ITEMS, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}}),
        ]
        | None
    ) = None
    seed: whole(-(2**63), 2**63 - 1) | None = None
    stop: _StopWord | Annotated[list[_StopWord], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=1000, description="users take turns in the queue")
    density: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    quality: Literal["high", "balanced", "fast"] | None = None
    global_weight: Literal["auto"] | _Unit | None = None
    signal: Literal["impact", "activation"] | None = None
    layer_budgets: Literal["measured", "uniform"] | None = None
    compensation: bool | None = None
    experts: Literal["sparse", "dense"] | None = None
    verify: bool | None = Field(
        None, description="draft with the sparse model and check with the dense one, whose answer it is"
    )

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def warnings(self) -> list[str]:
        """What the client should know of the fields that it sent.

        Raises:
            BadRequest: one of them is not supported.
        """
        return judge(self.rules, self.model_extra or {})

    @abstractmethod
    def writer(self, model: str, choices: int) -> Any:
        """What writes the response.

        Args:
            model (str): the model's name.
            choices (int): the number of requests to the engine.
        """

    def _request(self, client: str, defaults: dict[str, Any], **fields: Any) -> Request:
        shared = Body.model_fields.keys() & Request.__dataclass_fields__.keys()
        given = {k: v for k in shared if (v := getattr(self, k)) is not None}
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        given["stop"] = tuple(word for word in stop if word)
        if self.logit_bias is not None:
            given["logit_bias"] = {int(k): v for k, v in self.logit_bias.items()}
        if self.top_k == -1:
            given["top_k"] = 0
        given["client"] = f"{client} {self.user}" if self.user else client
        return Request(**{**defaults, **given, **fields})


class ChatBody(Body):
    """``POST /v1/chat/completions``"""

    rules = CHAT

    messages: list[Message] = Field(min_length=1, max_length=MAX_ITEMS)
    max_completion_tokens: MaxTokens | None = None
    n: whole(1, MAX_CHOICES) | None = None
    logprobs: bool | None = None
    top_logprobs: whole(0, 20) | None = None
    tools: list[Tool] | None = Field(None, max_length=MAX_ITEMS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = Field(
        None, description="go on with the last message; by default, if it is the assistant's"
    )
    add_generation_prompt: bool | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_not_reserved(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            return value and check_template_args(value)
        except GlassError as e:
            raise ValueError(str(e)) from e

    def requests(self, client: str, defaults: dict[str, Any]) -> list[Request]:
        """A request to the engine for each choice. ``defaults`` are the server's sampling options."""
        fields = {
            **self._messages(),
            **tool_fields(self.tools, self.tool_choice),
            **format_fields(self.response_format),
        }
        fields["one_call"] = self.parallel_tool_calls is False
        if self.max_completion_tokens is not None:
            fields["max_tokens"] = self.max_completion_tokens
        fields |= {"template_args": self.chat_template_kwargs or {}, "top_logprobs": self.top_logprobs or 0}
        fields["logprobs"] = bool(self.logprobs or self.top_logprobs)
        return repeated(self._request(client, defaults, **fields), self.n or 1)

    def writer(self, model: str, choices: int) -> ChatWriter:
        return ChatWriter(model, bool(self.logprobs or self.top_logprobs), choices)

    def _messages(self) -> dict[str, Any]:
        """The messages, and whether the last one is to be continued."""
        messages, last = [message.render() for message in self.messages], self.messages[-1]
        continued, prompted = self.continue_final_message, self.add_generation_prompt
        if continued and prompted:
            raise BadRequest("continue_final_message rules out add_generation_prompt.", "continue_final_message")
        if continued is None:
            continued = last.role == "assistant" and not last.tool_calls and not prompted
        if continued and not messages[-1]["content"].strip():  # there is nothing to continue
            return {"messages": messages[:-1] or messages, "add_generation_prompt": True}
        prompted = not continued and prompted is not False
        return {"messages": messages, "continue_final_message": continued, "add_generation_prompt": prompted}


_TokenId = whole(0, 2**31 - 1)
# Each kind of list is left at its first wrong item: a million tokens would be a million wrong texts.
_Tokens = Annotated[list[_TokenId], Field(min_length=1, max_length=2**20, fail_fast=True)]
_Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
_Prompts = _Texts | Annotated[list[_Tokens], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]


class CompletionBody(Body):
    """``POST /v1/completions``: one prompt or several, as text or tokens."""

    rules = COMPLETIONS

    prompt: str | _Tokens | _Prompts
    n: whole(1, MAX_CHOICES) | None = None
    logprobs: bool | whole(0, 20) | None = Field(None, description="how many rivals of each token to give, or whether")
    top_logprobs: whole(-1, 20) | None = None
    echo: bool | None = None

    def requests(self, client: str, defaults: dict[str, Any]) -> list[Request]:
        """A request to the engine for each choice: ``n`` for the first prompt, ``n`` for the next one, and so on."""
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        prompts, n = [self.prompt] if single else self.prompt, self.n or 1
        if len(prompts) * n > MAX_CHOICES:
            raise BadRequest(f"n: {len(prompts)} prompts times {n} are more than {MAX_CHOICES} choices.", "n")
        wanted = self._wants_logprobs
        if self.echo and wanted:
            raise BadRequest("logprobs: with echo they would have to be those of the prompt, too.", "logprobs")
        top = self.logprobs if wanted and self.logprobs is not True else max(0, self.top_logprobs or 0)
        fields = {"logprobs": wanted, "top_logprobs": top if wanted else 0, "echo": bool(self.echo)}
        made = [self._request(client, defaults, prompt=prompt, **fields) for prompt in prompts]
        return [request for one in made for request in repeated(one, n)]

    def writer(self, model: str, choices: int) -> TextWriter:
        return TextWriter(model, self._wants_logprobs, choices)

    @property
    def _wants_logprobs(self) -> bool:
        return self.logprobs is not None and self.logprobs is not False


def repeated(request: Request, n: int) -> list[Request]:
    """The request n times. With a seed each has its own, or all would be answered alike."""
    seeds = [None if request.seed is None else request.seed + i for i in range(n)]
    return [replace(request, seed=seed) for seed in seeds]


def tool_fields(tools: list[Tool] | None, choice: Any) -> dict[str, Any]:
    """What a request to the engine says of tools.

    Args:
        tools (list): those of the body.
        choice: its ``tool_choice``.

    Raises:
        BadRequest: the choice is not one of the tools.
    """
    offered, forced = tools or [], choice == "required"
    if choice == "none":
        return {}
    if isinstance(choice, AllowedToolsChoice):
        allowed = {tool.function.name for tool in choice.allowed_tools.tools}
        _check_offered(allowed, offered)
        offered = [tool for tool in offered if tool.function.name in allowed]
        forced = choice.allowed_tools.mode == "required"
    names = [tool.function.name for tool in offered]
    if choice is not None and not isinstance(choice, str | AllowedToolsChoice):
        names, forced = [choice.function.name], True
        _check_offered(set(names), offered)
    if forced and not names:
        raise BadRequest("tool_choice: there are no tools to call.", "tool_choice")
    rendered = [tool.model_dump(exclude_none=True) for tool in offered] or None
    return {"tools": rendered, "forced_tools": tuple(names) if forced else ()}


def _check_offered(names: set[str], tools: list[Tool]) -> None:
    unknown = sorted(names - {tool.function.name for tool in tools})
    if unknown:
        raise BadRequest(f"tool_choice: {unknown[0][:100]!r} is not one of the tools.", "tool_choice")


def format_fields(form: Any) -> dict[str, Any]:
    """What a request to the engine says of the answer's form."""
    if isinstance(form, JsonFormat):
        return {"schema": form.schema_ or ANY_OBJECT, "strict_schema": form.schema_ is not None}
    if isinstance(form, SchemaFormat):
        given = form.json_schema
        return {"schema": ANY_OBJECT if given.schema_ is None else given.schema_, "strict_schema": bool(given.strict)}
    return {}


_B = TypeVar("_B", bound=Body)


def parse(kind: type[_B], body: bytes) -> _B:
    """Parse the body of a request.

    Raises:
        BadRequest: the body is invalid; the message names the field.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as e:
        # a union gives one error per member; the deepest in the value tells the most, but for a list of a wrong length;
        # and what has a wrong type may lack anything
        errors = e.errors(include_url=False, include_input=False, include_context=False)
        lengths = ("too_long", "too_short")
        first = max(errors, key=lambda x: (x["type"] in lengths, len(x["loc"]), x["loc"][-1:] == ("type",)))
        if first["type"] == "json_invalid":
            raise BadRequest("The body is not valid JSON.") from e
        where = ".".join(str(part) for part in first["loc"] if str(part).isidentifier() or isinstance(part, int))
        told = first["msg"].removeprefix("Value error, ")
        raise BadRequest(f"{where or 'body'}: {told}"[:500], where or None) from e
