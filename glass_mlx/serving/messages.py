"""The parts of OpenAI's requests: messages, tools, and what the answer must look like."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# Of a list: no other thread runs while a body is checked, which takes 10 us for an item.
MAX_ITEMS = 2**14


def _whole(value: Any) -> Any:
    """JSON has one kind of number, and some clients write an integer as 5.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def whole(low: int, high: int) -> Any:
    """The type of an integer in a range."""
    return Annotated[int, BeforeValidator(_whole), Field(ge=low, le=high)]


class Model(BaseModel):
    """A part of a body. Types are strict, and unknown fields are left out."""

    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(Model):
    """A part of a message's content. Only text is supported."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(Model):
    """What an assistant said instead of an answer."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]
Content = str | Annotated[list[Part], Field(max_length=MAX_ITEMS)]


def text_of(content: str | list[TextPart | RefusalPart] | None) -> str:
    """The text of a message."""
    if isinstance(content, list):
        return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)
    return content or ""


class FunctionCall(Model):
    name: str
    arguments: str = "{}"

    def render(self) -> dict[str, Any]:
        """The call in the form that chat templates take: with an object as arguments, if it is one."""
        try:
            arguments = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        return {"name": self.name, "arguments": arguments if isinstance(arguments, dict) else self.arguments}


class ToolCall(Model):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall

    def render(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True, exclude={"function"}) | {"function": self.function.render()}


class Message(Model):
    """A message of a chat. ``reasoning`` is another name of ``reasoning_content``."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_ITEMS)
    tool_call_id: str | None = None

    def render(self) -> dict[str, Any]:
        """The message in the form that chat templates take."""
        message = self.model_dump(exclude_none=True, include={"name", "reasoning_content", "tool_call_id"})
        # templates do not know "developer", OpenAI's newer name for "system"
        message |= {"role": "system" if self.role == "developer" else self.role, "content": text_of(self.content)}
        if self.reasoning is not None:
            message.setdefault("reasoning_content", self.reasoning)
        if self.tool_calls:
            message["tool_calls"] = [call.render() for call in self.tool_calls]
        return message


class Function(Model):
    model_config = ConfigDict(strict=True, extra="allow")
    name: str = Field(min_length=1, max_length=1000)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Model):
    model_config = ConfigDict(strict=True, extra="allow")
    type: Literal["function"]
    function: Function


class FunctionName(Model):
    name: str


class NamedTool(Model):
    """Calls this function."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Model):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_ITEMS)


class AllowedToolsChoice(Model):
    """Offers these functions only."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = (
    Literal["none", "auto", "required"] | Annotated[NamedTool | AllowedToolsChoice, Field(discriminator="type")]
)


class TextFormat(Model):
    type: Literal["text"]


class JsonFormat(Model):
    """A JSON object; of a schema, if there is one (as llama.cpp's server takes it)."""

    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class JsonSchema(Model):
    name: str | None = Field(None, max_length=1000)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class SchemaFormat(Model):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]
