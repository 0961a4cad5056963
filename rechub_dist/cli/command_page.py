"""The page of all commands: python -m rechub_dist.cli.command_page > docs/commands.md

It is made of the functions that the commands are, so that it does not depend on the release of typer.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import typer
from typer.models import ArgumentInfo, OptionInfo

from rechub_dist.cli.main import app
from rechub_dist.cli.markdown import row

_INTRODUCTION: Final = """# Commands

What `rechub-dist COMMAND --help` says, of all commands. An option that is repeatable may be given several times; one
that is required has no default. What a run file holds is in [docs/configuration.md](configuration.md)."""
_METAVARS: Final = {int: "N", float: "X", Path: "PATH"}


def page() -> str:
    """All commands in Markdown."""
    found = list(_commands(app, "rechub-dist"))
    lines = [f"| [`{name}`](#{_anchor(name)}) | {_cell(_paragraphs(call)[0])} |" for name, call in found]
    table = "\n".join(["| command | |", "|---|---|", *lines])
    return "\n\n".join([_INTRODUCTION, table, *(_section(name, call) for name, call in found)])


def _commands(group: typer.Typer, name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    for command in group.registered_commands:
        assert command.callback is not None
        own = command.name or command.callback.__name__.rstrip("_").replace("_", "-")
        yield f"{name} {own}", command.callback
    for below in group.registered_groups:
        assert below.typer_instance is not None
        yield from _commands(below.typer_instance, f"{name} {below.name}")


def _section(name: str, call: Callable[..., Any]) -> str:
    arguments: list[str] = []
    options: list[str] = []
    for parameter, kind, info in _parameters(call):
        rows = arguments if isinstance(info, ArgumentInfo) else options
        rows.append(_row(parameter, kind, info))
    usage = " ".join([name, *(["[OPTIONS]"] if options else []), *(_usage(*one) for one in _parameters(call))]).strip()
    parts = [f"## {name}", *map(_text, _paragraphs(call)), f"```text\n{' '.join(usage.split())}\n```"]
    for title, rows in (("argument", arguments), ("option", options)):
        if rows:
            parts.append("\n".join([f"| {title} | default | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _parameters(call: Callable[..., Any]) -> list[tuple[inspect.Parameter, Any, OptionInfo | ArgumentInfo]]:
    """A command's parameters with the type of each value and what typer is told of them."""
    hints = typing.get_type_hints(call, include_extras=True)
    found = []
    for parameter in inspect.signature(call).parameters.values():
        told = typing.get_args(hints[parameter.name])  # typer's own context is not annotated further
        if told and not told[1].hidden:
            found.append((parameter, *told))
    return found


def _row(parameter: inspect.Parameter, kind: Any, info: OptionInfo | ArgumentInfo) -> str:
    required = parameter.default in (inspect.Parameter.empty, ...)
    name = _name(parameter, kind, info)
    default = (
        name.split("/")[0].strip()
        if parameter.default is True
        else getattr(parameter.default, "value", parameter.default)
    )
    shown = "" if default in (None, False) else f"`{default}`"
    bounds = {"At least": info.min, "At most": info.max}
    limits = "".join(f" {which} {bound}." for which, bound in bounds.items() if bound is not None)
    cells = (f"`{name}`", "required" if required else shown, f"{_cell(info.help or '')}{limits}")
    return row(cells)


def _name(parameter: inspect.Parameter, kind: Any, info: OptionInfo | ArgumentInfo) -> str:
    """As it is typed: `--nproc N`; of an argument its metavar."""
    plain = parameter.name.rstrip("_").replace("_", "-")
    if isinstance(info, ArgumentInfo):
        return (info.metavar or plain.upper()).strip("[]")
    flag = kind is bool
    # within Annotated, typer takes what would be a default for the first name
    given = [one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str)]
    names = ", ".join(given or ([f"--{plain} / --no-{plain}"] if flag else [f"--{plain}"]))
    values = typing.get_args(kind)
    value = info.metavar or (
        "" if flag else next((_METAVARS[one] for one in (kind, *values) if one in _METAVARS), "TEXT")
    )
    return f"{names} {value}".strip()


def _usage(parameter: inspect.Parameter, kind: Any, info: OptionInfo | ArgumentInfo) -> str:
    if isinstance(info, OptionInfo):
        return ""
    name = _name(parameter, kind, info)
    return name if parameter.default in (inspect.Parameter.empty, ...) else f"[{name}]"


def _paragraphs(call: Callable[..., Any]) -> list[str]:
    """Of a command's help; what follows a form feed is for readers of the code."""
    return (inspect.getdoc(call) or "").partition("\f")[0].strip().split("\n\n")


def _text(paragraph: str) -> str:
    """A paragraph; one that is an example, as something to type."""
    start = re.match(r"(?:Examples?: *)?(rechub-dist .*)", paragraph, re.DOTALL)
    if start:
        return f"```sh\n{' '.join(start[1].split())}\n```"
    return _cell(re.sub(r"(?<![`\w])(rechub-dist [a-z][^`]*)$", r"`\1`", paragraph), lines=True)


def _cell(text: str, *, lines: bool = False) -> str:
    """Plain text as Markdown, in one line; options and pages are marked."""
    text = text if lines else " ".join(text.split())
    pieces = re.split(r"(`[^`]*`)", text)
    pieces[::2] = [
        re.sub(r"(?<![\w/.-])(--[a-z][a-z-]*)", r"`\1`", re.sub(r"([*\[\]])", r"\\\1", one).replace("<", "&lt;"))
        for one in pieces[::2]
    ]
    return re.sub(r"(?<![\w/[])docs/(\w+)\.md", r"[docs/\1.md](\1.md)", "".join(pieces))


def _anchor(name: str) -> str:
    return name.replace(" ", "-")


if __name__ == "__main__":
    print(page())
