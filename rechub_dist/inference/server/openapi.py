"""The OpenAPI description of a server: for each bundle its own columns, with an example that scores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rechub_dist.inference.server.arrow import STREAM
from rechub_dist.inference.server.requests import JSON
from rechub_dist.inference.server.versions import OPERATIONS, Asked, Operation, Served, Version

_K = {"name": "k", "in": "query", "schema": {"type": "integer", "default": 10, "minimum": 1}}
_WHERE = {"name": "where", "in": "query", "schema": {"type": "string"}, "description": "SQL, true of the items to find"}
_SIDE = {"name": "side", "in": "query", "schema": {"enum": ["user", "item"], "default": "user"}}
_SUMMARY = {
    "score": "The probability (or value) of each label, for each row",
    "retrieve": "The best items for each row",
    "vectors": "Vectors of users, or of items",
}
_ANSWER = {
    "type": "object",
    "properties": {
        "bundle": {"type": "string"},
        "model": {"type": "string"},
        "step": {"type": "integer"},
        "version": {"type": "string"},
        "columns": {"type": "object", "additionalProperties": {"type": "array", "items": {}}},
    },
}
_ERRORS = {
    "400": "The body cannot be read",
    "401": "A token is needed",
    "413": "The body is too large, or has too many rows",
    "422": "A column is missing, or a value does not fit",
    "504": "There was no answer within the request's deadline",
    "503": "Too many requests wait; Retry-After says when to come again",
}


def with_bundles(tree: dict[str, Any], served: Iterable[Served], *, token: bool) -> dict[str, Any]:
    """A description with the paths of the bundles.

    Args:
        tree: of the other paths.
        served: the bundles.
        token: whether requests need one.
    """
    schemas = tree.setdefault("components", {}).setdefault("schemas", {})
    schemas["Answer"] = _ANSWER
    schemas["Error"] = {"type": "object", "properties": {"detail": {"type": "string"}}}
    for one in served:
        version = one.current
        for operation in OPERATIONS:
            if operation not in version.refused:
                path = f"/bundles/{one.name}/{operation}"
                tree["paths"][path] = {"post": _operation(one.name, operation, version, schemas)}
    if token:
        tree["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        tree["security"] = [{"token": []}]
    return tree


def _operation(name: str, operation: Operation, version: Version, schemas: dict[str, Any]) -> dict[str, Any]:
    parts = ("user", "item") if operation == "vectors" else (Asked(operation).part,)
    bodies = []
    for part in parts:
        key = f"{name}-{part}"
        schema = dict(version.readers[part].schema)  # type: ignore[index]
        for inner, value in schema.pop("$defs", {}).items():
            schemas[f"{key}-{inner}"] = _renamed(value, key)
        schemas[key] = _renamed(schema, key)
        bodies.append({"$ref": f"#/components/schemas/{key}"})
    example = version.examples[parts[0]]  # type: ignore[index]
    return {
        "summary": _SUMMARY[operation],
        "operationId": f"{operation}-{name}",
        "tags": [name],
        "parameters": {"score": [], "retrieve": [_K, _WHERE], "vectors": [_SIDE]}[operation],
        "requestBody": {
            "required": True,
            "content": {
                JSON: {
                    "schema": bodies[0] if len(bodies) == 1 else {"anyOf": bodies},
                    "example": {"rows": [example]},
                },
                STREAM: {"schema": {"type": "string", "format": "binary"}},
            },
        },
        "responses": {
            "200": {
                "description": "A column for each output, with a value for each row",
                "content": {
                    JSON: {"schema": {"$ref": "#/components/schemas/Answer"}},
                    STREAM: {"schema": {"type": "string", "format": "binary"}},
                },
            },
            **{
                code: {
                    "description": text,
                    "content": {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}},
                }
                for code, text in _ERRORS.items()
            },
        },
    }


def _renamed(tree: Any, key: str) -> Any:
    """The schema with references to components instead of definitions of its own."""
    if isinstance(tree, dict):
        return {
            name: f"#/components/schemas/{key}-{value}"
            if name == "$ref" and isinstance(value, str)
            else _renamed(value, key)
            for name, value in tree.items()
        }
    return [_renamed(one, key) for one in tree] if isinstance(tree, list) else tree
