"""`/openapi.json`: the description of a server's API, made from the models that its requests are checked with."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import JSONResponse
from starlette.routing import Route

_PLACE = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A part of a path, or of a query, with its JSON schema."""

    name: str
    place: str  # "path" or "query"
    schema: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Operation:
    """What a route does: the models of its answers by status (None: no content) and of its body."""

    method: str
    path: str
    summary: str
    answers: Mapping[int, type[BaseModel] | None]
    body: type[BaseModel] | None = None
    parameters: Sequence[Parameter] = ()


def route(operations: Sequence[Operation]) -> Route:
    """The route of the description."""
    content = document(operations)
    return Route("/openapi.json", lambda _: JSONResponse(content), methods=["GET"])


def document(operations: Sequence[Operation]) -> dict[str, Any]:
    """The description of these operations, in OpenAPI 3.1."""
    bodies = {(operation.body, "validation") for operation in operations if operation.body}
    answers = {(model, "serialization") for operation in operations for model in operation.answers.values() if model}
    named = sorted(bodies | answers, key=lambda pair: (pair[0].__name__, pair[1]))
    references, definitions = models_json_schema(named, ref_template=_PLACE)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation, references)
    return {
        "openapi": "3.1.0",
        "info": {"title": "lamini_jax", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": {**definitions.get("$defs", {}), "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _described(operation: Operation, references: Mapping[tuple, dict]) -> dict[str, Any]:
    def content(schema):
        return {"content": {"application/json": {"schema": schema}}}

    responses: dict[str, Any] = {
        "default": {"description": "An error", **content({"$ref": _PLACE.format(model="Error")})}
    }
    for status, model in operation.answers.items():
        told = content(references[model, "serialization"]) if model else {}
        responses[str(status)] = {"description": operation.summary, **told}
    described: dict[str, Any] = {"summary": operation.summary, "responses": responses}
    if operation.body:
        described["requestBody"] = {"required": True, **content(references[operation.body, "validation"])}
    if operation.parameters:
        described["parameters"] = [
            {"name": one.name, "in": one.place, "required": one.place == "path", "schema": dict(one.schema)}
            for one in operation.parameters
        ]
    return described
