"""The page of what there is to import: python -m rechub_dist.cli.python_page > docs/python.md"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Final

from rechub_dist.data.importing.frames import prepare
from rechub_dist.embedded import Embedded, Jagged, Lookup, Output, Sequence
from rechub_dist.embedding.local import LocalTables
from rechub_dist.features import CrossFeature, DenseFeature, SequenceFeature, SparseFeature, Table, TimeGapFeature
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.run import Run, load
from rechub_dist.metrics.metric import Metric, Ranked, Scored
from rechub_dist.models.base import Model, RecallModel
from rechub_dist.notebook import Finished, train
from rechub_dist.objectives.base import Objective, TaskObjective

_INTRODUCTION: Final = """# Python

What there is to import, from its docstrings. `[B, D]` are the dimensions of a tensor: B rows, D numbers. Examples are
in [a notebook](notebook.md), [bundles](export.md) and
[models of your own](models.md#your-own-model-loss-and-objective); the models themselves have
[a page each](choose_a_model.md). What starts with an underscore, and what is not here, may change in any release."""
_PARTS: Final[tuple[tuple[str, str, tuple[Any, ...]], ...]] = (
    ("Prepare, train, use", "rechub_dist", (prepare, train, Finished, load, Run, Bundle)),
    ("Models without a run", "", (LocalTables, Embedded, Jagged, Sequence, Lookup, Output)),
    (
        "Features", "rechub_dist.features",
        (Table, SparseFeature, SequenceFeature, DenseFeature, CrossFeature, TimeGapFeature),
    ),
    ("Classes of your own", "", (Model, RecallModel, Objective, TaskObjective, Metric, Scored, Ranked)),
)  # fmt: skip
_MADE: Final = (Finished, Run)  # by a function, and by nobody else
_WIDTH: Final = 110
_SECTIONS: Final = re.compile(r"^(Args|Attributes|Returns|Raises):$", re.MULTILINE)


class _Written(str):
    """An annotation as it is written, without the quotes of a string."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def page() -> str:
    """All of it in Markdown."""
    parts = [_INTRODUCTION]
    for title, home, members in _PARTS:
        parts.append(f"## {title}")
        for member in members:
            named = home if hasattr(import_module(home or "rechub_dist"), member.__name__) else ""
            parts += _member(member, named or member.__module__)
    return "\n\n".join(parts)


def _member(member: Any, home: str) -> Iterator[str]:
    """A function, or a class with its methods."""
    yield f"### {member.__name__}"
    yield f"```python\nfrom {home} import {member.__name__}\n```"
    if not inspect.isclass(member):
        yield _code(_signature(member.__name__, member))
    elif "__init__" in vars(member) and member not in _MADE and not getattr(member, "_is_protocol", False):
        yield _code(_signature(member.__name__, member.__init__))
    yield from _docstring(member)
    if inspect.isclass(member):
        for name, value in vars(member).items():
            yield from _method(member, name, value)


def _method(owner: type, name: str, value: Any) -> Iterator[str]:
    call = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    if name.startswith("_") or not inspect.isfunction(call) or not call.__doc__:
        return
    yield f"#### {owner.__name__}.{name}"
    if not isinstance(value, property):
        yield _code(_signature(name, call))
    yield from _docstring(call)


def _signature(name: str, call: Any) -> str:
    """A call as one would write it, on several lines if it is long."""
    signature = inspect.signature(call)
    parameters = [
        one if one.annotation is one.empty else one.replace(annotation=_Written(one.annotation))
        for one in signature.parameters.values()
        if one.name != "self"
    ]
    answer = "" if name == "__init__" or signature.return_annotation in ("None", None) else signature.return_annotation
    answer = f" -> {answer}" if answer else ""
    short = ", ".join(_starred(parameters))
    if len(name) + len(short) + len(answer) <= _WIDTH:
        return f"{name}({short}){answer}"
    return "\n".join([f"{name}(", *(f"    {one}," for one in _starred(parameters)), f"){answer}"])


def _starred(parameters: list[inspect.Parameter]) -> list[str]:
    found = [str(one) for one in parameters]
    for i, one in enumerate(parameters):
        if one.kind is inspect.Parameter.KEYWORD_ONLY:
            return [*found[:i], "*", *found[i:]]
    return found


def _docstring(member: Any) -> Iterator[str]:
    """The text, and its sections as lists."""
    text, *sections = _SECTIONS.split(inspect.getdoc(member) or "")
    for paragraph in text.strip().split("\n\n"):
        example = paragraph.startswith("```")  # of a part: it runs in no other place
        yield paragraph.replace("```python", "```text", 1) if example else _text(paragraph)
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        if title == "Returns":
            yield f"Returns: {_text(body)}"
            continue
        entries = re.split(r"\n(?=\S)", inspect.cleandoc(body))
        yield f"{title.replace('Args', 'Arguments')}:\n\n" + "\n".join(f"- {_named(entry)}" for entry in entries)


def _named(entry: str) -> str:
    name, _, meaning = entry.partition(":")
    return f"{', '.join(f'`{one.strip()}`' for one in name.split(','))}: {_text(meaning)}"


def _text(paragraph: str) -> str:
    """In one line; a comparison is no tag, and a dimension no link."""
    pieces = re.split(r"(`[^`]*`)", " ".join(paragraph.split()))
    pieces[::2] = [re.sub(r"([*\[\]])", r"\\\1", one).replace("<", "&lt;") for one in pieces[::2]]
    return "".join(pieces)


def _code(text: str) -> str:
    return f"```text\n{text}\n```"


if __name__ == "__main__":
    print(page())
