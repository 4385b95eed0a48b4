"""OpenAI's newer requests, ``POST /v1/responses``, and how they become requests to the engine.

Nothing is stored, so each request brings its whole conversation.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from .fields import RESPONSES
from .messages import (
    MAX_ITEMS,
    Content,
    Function,
    FunctionCall,
    FunctionName,
    JsonFormat,
    JsonSchema,
    Model,
    NamedTool,
    SchemaFormat,
    TextFormat,
    Tool,
    text_of,
    whole,
)
from .request import Request
from .response_writer import ResponseWriter
from .schema import Body, MaxTokens, format_fields, tool_fields


class InputMessage(Model):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class InputCall(Model):
    """A call that the model has made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class InputResult(Model):
    """What a call has brought."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content


class ReasoningText(Model):
    type: Literal["reasoning_text"]
    text: str


class InputReasoning(Model):
    """What the model has thought before its answer or call."""

    type: Literal["reasoning"]
    content: list[ReasoningText] | None = Field(None, max_length=MAX_ITEMS)


def _kind(item: Any) -> str:
    """The kind of an item; messages need not say theirs."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return kind if isinstance(kind, str) else ""


_Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputResult, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="unknown_item",
        custom_error_message="must be a message, a function_call, a function_call_output or reasoning",
    ),
]


class FunctionTool(Function):
    type: Literal["function"]


class FunctionChoice(Model):
    """Calls this function."""

    type: Literal["function"]
    name: str


class FlatSchemaFormat(JsonSchema):
    type: Literal["json_schema"]


class TextOptions(Model):
    format: Annotated[TextFormat | JsonFormat | FlatSchemaFormat, Field(discriminator="type")] | None = None


class ResponseBody(Body):
    """``POST /v1/responses``"""

    rules = RESPONSES

    input: str | Annotated[list[_Item], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_ITEMS)
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: whole(0, 20) | None = None
    include: list[str] | None = Field(None, max_length=100)

    def requests(self, client: str, defaults: dict[str, Any]) -> list[Request]:
        """The request to the engine. ``defaults`` are the server's sampling options."""
        tools = [Tool(type="function", function=Function(**t.model_dump(exclude={"type"}))) for t in self.tools or ()]
        choice = self.tool_choice
        if isinstance(choice, FunctionChoice):
            choice = NamedTool(type="function", function=FunctionName(name=choice.name))
        form = self.text.format if self.text is not None else None
        if isinstance(form, FlatSchemaFormat):
            form = SchemaFormat(type="json_schema", json_schema=form)
        fields = tool_fields(tools, choice) | format_fields(form)
        fields |= {"messages": self._messages(), "one_call": self.parallel_tool_calls is False}
        if self.max_output_tokens is not None:
            fields["max_tokens"] = self.max_output_tokens
        fields |= {"logprobs": self.wants_logprobs, "top_logprobs": self.top_logprobs or 0}
        return [self._request(client, defaults, **fields)]

    def writer(self, model: str, choices: int) -> ResponseWriter:
        return ResponseWriter(model, self.wants_logprobs, self._echoed())

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())

    def _echoed(self) -> dict[str, Any]:
        """The fields of the request that its response repeats."""
        given = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        kept = ("instructions", "max_output_tokens", "temperature", "top_p", "top_logprobs", "user")
        settings = {name: given.get(name) for name in kept}
        settings["text"] = {"format": {"type": "text"}, **given.get("text", {})}
        settings["tools"] = given.get("tools", [])
        settings["tool_choice"] = given.get("tool_choice", "auto")
        settings["parallel_tool_calls"] = given.get("parallel_tool_calls", True)
        return settings

    def _messages(self) -> list[dict[str, Any]]:
        """The input as the messages of a chat. What the assistant thought, said and called is one message of it."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        names: dict[str, str] = {}
        for item in self.input:
            if isinstance(item, InputResult):
                told = {"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)}
                messages.append(told | ({"name": names[item.call_id]} if item.call_id in names else {}))
            elif isinstance(item, InputMessage) and item.role != "assistant":
                role = "system" if item.role == "developer" else item.role
                messages.append({"role": role, "content": text_of(item.content)})
            else:
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                _add(item, messages[-1])
            if isinstance(item, InputCall):
                names[item.call_id] = item.name
        return messages


def _add(item: InputMessage | InputCall | InputReasoning, message: dict[str, Any]) -> None:
    """Add what the assistant did to its message."""
    if isinstance(item, InputMessage):
        message["content"] += text_of(item.content)
    elif isinstance(item, InputReasoning):
        message["reasoning_content"] = "".join(part.text for part in item.content or ())
    else:
        function = FunctionCall(name=item.name, arguments=item.arguments).render()
        message.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
