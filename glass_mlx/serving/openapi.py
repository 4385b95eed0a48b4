"""The published description of the API, made from the models that check requests and write responses."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import TypeAdapter

from .._version import __version__
from .engine import EngineStatus
from .schema import ChatBody, CompletionBody
from .writers import ChatChunk, ChatCompletion, ErrorBody, Health, Model, ModelList, TextCompletion

_MODELS = (
    *(ChatBody, CompletionBody, ChatCompletion, ChatChunk, TextCompletion),
    *(Model, ModelList, EngineStatus, Health, ErrorBody),
)
_REF = "#/components/schemas/{model}"
_REFUSALS = {
    "400": "The request is not as it should be",
    "401": "The API key is missing or wrong",
    "403": "The Host or the Origin is not allowed",
    "404": "There is no such model",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "429": "The queue is full: try again later",
    "500": "Loading or generating failed",
}


@cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    inputs = [(model, "validation", TypeAdapter(model)) for model in _MODELS]
    schemas, definitions = TypeAdapter.json_schemas(inputs, ref_template=_REF)
    refs = {model: schema for (model, _), schema in schemas.items()}

    def operation(
        summary: str, answers: type, refused: str, body: type | None = None, events: type | None = None
    ) -> dict:
        content = {"application/json": {"schema": refs[answers]}}
        if events is not None:
            content["text/event-stream"] = {"schema": _event({"anyOf": [refs[events], refs[ErrorBody]]})}
        failed = {"application/json": {"schema": refs[ErrorBody]}}
        done: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "Done", "content": content}}}
        for code in refused.split():
            done["responses"][code] = {"description": _REFUSALS[code], "content": failed}
        if body is not None:
            done["requestBody"] = {"required": True, "content": {"application/json": {"schema": refs[body]}}}
        return done

    door, answering = "401 403", "400 401 403 404 408 413 429 500"
    one = operation("One of them", Model, f"{door} 404")
    one["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    unload = operation("Free the model's memory once the present answer has ended", EngineStatus, f"{door} 500")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "glass_mlx",
            "version": __version__,
            "description": "OpenAI's API for models that decode on the neurons their prompt calls for.",
        },
        "paths": {
            "/v1/chat/completions": {
                "post": operation("Answer a chat", ChatCompletion, answering, ChatBody, ChatChunk)
            },
            "/v1/completions": {
                "post": operation("Continue a text", TextCompletion, answering, CompletionBody, TextCompletion)
            },
            "/v1/models": {"get": operation("The models that can be asked for", ModelList, door)},
            "/v1/models/{id}": {"get": one},
            "/v1/status": {"get": operation("What the engine is doing", EngineStatus, door)},
            "/v1/unload": {"post": unload},
            "/health": {"get": operation("Whether requests can be answered", Health, "403")},
        },
        "components": {**_components(definitions), "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _event(payload: dict[str, Any]) -> dict[str, Any]:
    """A server-sent event: JSON of the payload's schema, or the mark of the end."""
    data = {
        "anyOf": [
            {"type": "string", "contentMediaType": "application/json", "contentSchema": payload},
            {"const": "[DONE]", "description": "The last event of an answer that was not broken off by an error"},
        ]
    }
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _components(definitions: dict[str, Any]) -> dict[str, Any]:
    return {"schemas": definitions.get("$defs", {})}
