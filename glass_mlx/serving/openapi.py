"""The OpenAPI document, made from the models that check requests and write responses."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import TypeAdapter

from .._version import __version__
from .engine import EngineStatus
from .response_writer import ResponseEvent, ResponseObject
from .responses import ResponseBody
from .schema import ChatBody, CompletionBody
from .writers import ChatChunk, ChatCompletion, ErrorBody, Health, Model, ModelList, TextCompletion

_MODELS = (
    *(ChatBody, CompletionBody, ResponseBody, ChatCompletion, ChatChunk, TextCompletion),
    *(ResponseObject, ResponseEvent),
    *(Model, ModelList, EngineStatus, Health, ErrorBody),
)
_REF = "#/components/schemas/{model}"
_ERRORS = {
    "400": "The request is invalid",
    "401": "The API key is missing or wrong",
    "403": "The Host or the Origin is not allowed",
    "404": "The model does not exist",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "429": "The queue is full. Try again later",
    "500": "Loading or generating failed",
}


_FORBIDDEN = ("401", "403")
_COMPLETING = ("400", *_FORBIDDEN, "404", "408", "413", "429", "500")


@cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    inputs = [(model, "validation", TypeAdapter(model)) for model in _MODELS]
    schemas, definitions = TypeAdapter.json_schemas(inputs, ref_template=_REF)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "glass_mlx",
            "version": __version__,
            "description": "OpenAI's API for models that decode with only the neurons that their prompt calls for.",
        },
        "paths": _paths({model: schema for (model, _), schema in schemas.items()}),
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _paths(refs: dict[type, dict]) -> dict[str, Any]:
    """The endpoints; ``refs`` refers to the models' schemas."""

    def operation(
        summary: str, answer: type, errors: tuple[str, ...], body: type | None = None, events: type | None = None
    ) -> dict[str, Any]:
        content = {"application/json": {"schema": refs[answer]}}
        if events is not None:
            content["text/event-stream"] = {"schema": _event({"anyOf": [refs[events], refs[ErrorBody]]})}
        responses = {"200": {"description": "Done", "content": content}}
        for status in errors:
            error = {"application/json": {"schema": refs[ErrorBody]}}
            responses[status] = {"description": _ERRORS[status], "content": error}
        operation: dict[str, Any] = {"summary": summary, "responses": responses}
        if body is not None:
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": refs[body]}}}
        return operation

    model = operation("One model", Model, (*_FORBIDDEN, "404"))
    model["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    unload = operation("Free the model's memory, after the present completion", EngineStatus, (*_FORBIDDEN, "500"))
    user = {"name": "user", "in": "query", "schema": {"type": "string"}, "description": "whose place is asked for"}
    status = operation("What the engine is doing", EngineStatus, _FORBIDDEN) | {"parameters": [user]}
    name = {"name": "model", "in": "query", "schema": {"type": "string"}}
    measure = operation("Measure a model's global ranks while nobody waits", EngineStatus, ("400", *_FORBIDDEN, "404"))
    stop = operation("End that, and keep what was measured", EngineStatus, _FORBIDDEN)
    complete = operation("Continue a text", TextCompletion, _COMPLETING, CompletionBody, TextCompletion)
    respond = operation("Answer an input", ResponseObject, _COMPLETING, ResponseBody, ResponseEvent)
    return {
        "/v1/chat/completions": {"post": operation("Answer a chat", ChatCompletion, _COMPLETING, ChatBody, ChatChunk)},
        "/v1/completions": {"post": complete},
        "/v1/responses": {"post": respond},
        "/v1/models": {"get": operation("The models that requests may name", ModelList, _FORBIDDEN)},
        "/v1/models/{id}": {"get": model},
        "/v1/status": {"get": status},
        "/v1/measure": {"post": measure | {"parameters": [name]}, "delete": stop},
        "/v1/unload": {"post": unload},
        "/health": {"get": operation("Whether the server takes requests", Health, ("403",))},
    }


def _event(payload: dict[str, Any]) -> dict[str, Any]:
    """A server-sent event: JSON of the payload's schema, or the mark of the end."""
    data = {
        "anyOf": [
            {"type": "string", "contentMediaType": "application/json", "contentSchema": payload},
            {"const": "[DONE]", "description": "The last event of a stream that did not end with an error"},
        ]
    }
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}
