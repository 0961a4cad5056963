"""Values that people write, checked against annotations; and what to say of one that does not fit."""

from __future__ import annotations

import json
import typing
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)

from rechub_dist.errors import UserError, nearest, one_line, printable, shortened, shown

T = TypeVar("T", bound=BaseModel)
# What pydantic calls mistakes in a value whose type is right.
_OF_VALUE = ("value_error", "greater_than", "less_than", "multiple_of", "too_", "string_too_", "finite_number")
_CONFIG = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


def typed(where: str, hint: Any, value: Any) -> Any:
    """The value as the annotation `hint` has it: a list may become a tuple, an integer a float; nothing else changes.

    Raises:
        UserError: it does not fit, or is no finite number.
    """
    try:
        adapter = TypeAdapter(hint, config=_CONFIG)
    except PydanticSchemaGenerationError:
        return value  # an annotation that says nothing about plain values
    except PydanticUserError:  # a type that has a configuration of its own
        adapter = TypeAdapter(hint)
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {one_line(error)}, got {shown(value)}") from error
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        found = error.errors()[0]
        if not found["type"].startswith(_OF_VALUE):
            raise UserError(f"{where}: should be {_written(hint)}, got {shown(value)}") from error
        raise UserError(complaint(".".join([where, *map(str, found["loc"])]), found)) from error


def validated(where: str, cls: type[T], tree: Any) -> T:
    """A section of a configuration from its tree; `where` begins the message.

    Raises:
        UserError: keys or values that it does not take.
    """
    try:
        return cls.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        found = error.errors()[0]
        key = ".".join(map(str, found["loc"]))
        if found["type"] == "extra_forbidden" and len(found["loc"]) == 1:
            text = f"unknown key {shown(key)}: {nearest(key, cls.model_fields)}"
        else:
            text = complaint(key, found) if key or found["type"] == "value_error" else _lower(found["msg"])
        raise UserError(f"{where}: {text}") from error


def complaint(key: str, error: Any) -> str:
    """What one error of pydantic's says of the key that it was met in."""
    key = shortened(printable(key), 200)
    if error["type"] == "missing":
        return f"missing key {key!r}"
    if error["type"] == "value_error":  # raised by our validators: the message is complete
        return ": ".join([part for part in (key,) if part] + [str(error["ctx"]["error"])])
    message = _lower(error["msg"]).replace("an object", "a mapping of keys to values")  # JSON's word for it
    return f"{key}: {message}, got {shown(error['input'])}"


def _lower(text: str) -> str:
    return f"{text[:1].lower()}{text[1:]}"


def _written(hint: Any) -> str:
    """An annotation as people write it."""
    if typing.get_origin(hint) is Annotated:
        return _written(typing.get_args(hint)[0])
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
