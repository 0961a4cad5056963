"""Values of a run file -> arguments of a constructor or function, by its annotations alone."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

from rechub_dist.errors import UserError, nearest, one_line, shown
from rechub_dist.features import Feature, FeatureSchema, RowsOf
from rechub_dist.typed import typed

_KINDS: tuple[Any, ...] = typing.get_args(Feature)
_MANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What a function, or a class's constructor, takes by name."""
    target = _target(function)
    found = list(inspect.signature(target).parameters.values())
    return {p.name: p for p in (found if target is function else found[1:]) if p.kind not in _MANY}


def arguments_of(
    where: str,
    function: Callable[..., Any],
    given: Mapping[str, Any],
    schema: FeatureSchema | None = None,
    others: Collection[str] = (),
) -> dict[str, Any]:
    """The arguments that `given` stands for, type-checked.

    A name becomes a feature where the annotation takes features; so does a default that is a name. What is annotated
    with `RowsOf` may be left out, as may what has a default. A parameter without annotation takes the value as it is.

    Args:
        where: the section of the run file, for errors.
        function: a function, or a class.
        given: by parameter.
        schema: where the features are; None if `function` takes none.
        others: parameters that are given by other means.

    Raises:
        UserError: an unknown parameter or feature, a missing parameter, a value of another type.
    """
    parameters = {name: p for name, p in parameters_of(function).items() if name not in others}
    for name in given:
        if name not in parameters:
            raise UserError(f"unknown key {shown(f'{where}.{name}')}: {nearest(str(name), parameters)}")
    hints = hints_of(where, function)
    found = {name: _argument(f"{where}.{name}", value, hints.get(name), schema) for name, value in given.items()}
    for name, parameter in parameters.items():
        if name in found:
            continue
        if isinstance(parameter.default, str) and feature_kinds(hints.get(name)):
            found[name] = _argument(f"{where}.{name}", parameter.default, hints[name], schema)
        elif parameter.default is inspect.Parameter.empty and rows_of(hints.get(name)) is None:
            raise UserError(f"missing key '{where}.{name}': {name_of(function)} needs {', '.join(parameters)}")
    for name in parameters:
        source = rows_of(hints.get(name))
        if source is not None and name not in found:
            if not hasattr(found.get(source), "table"):
                raise UserError(f"missing key '{where}.{name}': there is no table of {source} to take it from")
            found[name] = found[source].table.rows
    return found


def arguments_as_written(
    function: Callable[..., Any], given: Mapping[str, Any], schema: FeatureSchema
) -> dict[str, Any]:
    """`given`, features by name, with the defaults and what `RowsOf` stands for written out."""
    parameters = parameters_of(function)
    defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    found = {**defaults, **given}
    hints = hints_of("model", function)
    for name in parameters:
        source = rows_of(hints.get(name))
        if source is not None and name not in found:
            found[name] = getattr(schema[found[source]], "table").rows  # noqa: B009 - not every feature has one
    return found


def name_of(function: Callable[..., Any]) -> str:
    """What to call it in a message."""
    return getattr(function, "__name__", type(function).__name__)


def rows_of(hint: Any) -> str | None:
    """The parameter that `RowsOf` names, where a hint has one."""
    marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    return next((mark.parameter for mark in marks if isinstance(mark, RowsOf)), None)


def feature_kinds(hint: Any) -> set[Any]:
    """The kinds of feature that an annotation takes."""
    if hint in _KINDS:
        return {hint}
    return {kind for argument in typing.get_args(hint) for kind in feature_kinds(argument)}


def _target(function: Callable[..., Any]) -> Callable[..., Any]:
    return function.__init__ if isinstance(function, type) else function  # type: ignore[misc]


def hints_of(where: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of what a function, or a class's constructor, takes; none where it has none to read."""
    try:
        return typing.get_type_hints(_target(function), include_extras=True)
    except TypeError:  # a partial function or an object that can be called: it has none of its own
        return {}
    except Exception as error:
        raise UserError(
            f"{where}: the annotations of {name_of(function)} cannot be read: {one_line(error)}; import what they name "
            f"at the top of its module"
        ) from error


def _argument(where: str, value: Any, hint: Any, schema: FeatureSchema | None) -> Any:
    """A YAML value as the annotation wants it: names become features, plain values are type-checked."""
    kinds = feature_kinds(hint)
    if not kinds or schema is None:
        return value if hint is None else typed(where, hint, value)
    if value is None and type(None) in typing.get_args(hint):
        return None
    if list in {typing.get_origin(option) for option in (hint, *typing.get_args(hint))}:
        if not isinstance(value, list):
            raise UserError(f"{where}: write a list of feature names, got {shown(value)}")
        return [_feature(where, name, kinds, schema) for name in value]
    return _feature(where, value, kinds, schema)


def _feature(where: str, name: Any, kinds: set[Any], schema: FeatureSchema) -> Feature:
    names = [feature.name for feature in schema.features]
    if name not in names:
        raise UserError(f"{where}: the data set has no feature {shown(name)}: {nearest(str(name), names)}")
    feature = schema[name]
    if type(feature) not in kinds:
        wanted = " or ".join(sorted(kind.kind for kind in kinds))
        raise UserError(f"{where}: feature {name!r} is {feature.kind}, but a {wanted} feature is needed here")
    return feature
