"""The command `rechub-dist config`: every key of a run file, from the types that check it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from rechub_dist.cli.markdown import row
from rechub_dist.errors import UserError, nearest

_WIDEST = 1_000_000  # a bound beyond this guards against overflow, and tells a reader nothing
_BOUNDS: Final = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
_TYPES: Final = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
_INTRODUCTION: Final = """# Configuration

Every key of a run file. `rechub-dist config` prints the same: `rechub-dist config embedding` a section,
`rechub-dist config train.patience` a key. `--set train.patience=3` overrides one on the command line. Keys of a list's
entries are written `embedding.rules[].tables`; `objective[retrieval]` are those of one kind of objective. The models'
own parameters, which stand in `model` beside its name, are printed by `rechub-dist models NAME`.
"""


@dataclass(frozen=True)
class Key:
    """A key of a run file.

    Attributes:
        path: such as `train.patience`.
        type: what it takes.
        default: as it would be written; None: it must be given.
        meaning: of it.
        keys: those below it, if it is a section.
    """

    path: str
    type: str
    default: str | None
    meaning: str
    keys: tuple[Key, ...] = ()

    def all(self) -> Iterator[Key]:
        """The key and those below it."""
        yield self
        for key in self.keys:
            yield from key.all()


def config(
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="A section or a key, such as embedding.optimizer.lr.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print all keys as a page.")] = False,
) -> None:
    """Print the keys of run files: what each takes, its default and its meaning.

    Example: rechub-dist config embedding.optimizer
    """
    keys = run_keys()
    if markdown:
        print(page(keys))
        return
    known = {one.path: one for top in keys for one in top.all()}
    if key is not None and key not in known:
        raise UserError(f"{key}: no such key, {nearest(key, known)}")
    console = Console()
    if key is not None and known[key].keys:
        console.print(f"[bold]{escape(key)}[/bold]: {escape(known[key].meaning)}\n", highlight=False)
    for one in keys if key is None else (known[key].keys or (known[key],)):
        default = "" if one.default is None else f"; default: {one.default}"
        takes = f"{one.type}{default}" if one.default or one.keys else f"{one.type}; required"
        console.print(f"[bold]{escape(one.path)}[/bold]  [dim]{escape(takes)}[/dim]", highlight=False, soft_wrap=True)
        console.print(Padding(escape(one.meaning), (0, 0, 0, 4)), highlight=False)
    if key is None:
        console.print("\nA section's keys: rechub-dist config SECTION; all of them: --markdown", highlight=False)


def run_keys() -> tuple[Key, ...]:
    """The keys at the top of a run file, with all below them."""
    from rechub_dist.config import RunConfig  # noqa: PLC0415 - slow to import

    schema = RunConfig.model_json_schema()
    return _keys(schema, "", schema["$defs"])


def page(keys: tuple[Key, ...]) -> str:
    """All keys in Markdown: a table for those at the top, and one for each section."""
    simple = tuple(key for key in keys if not key.keys)
    parts = [_INTRODUCTION, _table(simple)]
    for key in keys:
        if key.keys:
            below = [one for child in key.keys for one in child.all()]
            parts.append(f"\n## {key.path}\n\n{key.meaning}\n\n{_table(below)}")
    return "\n".join(parts)


def _table(keys: Any) -> str:
    lines = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        cells = (f"`{key.path}`", key.type, f"`{_default(key)}`" if key.default else _default(key), key.meaning)
        lines.append(row(cells))
    return re.sub(r"\bdocs/(\w+)\.md", r"[docs/\1.md](\1.md)", "\n".join(lines))


def _default(key: Key) -> str:
    return ("" if key.keys else "required") if key.default is None else key.default


def _keys(schema: Mapping[str, Any], path: str, defs: Mapping[str, Any]) -> tuple[Key, ...]:
    """The keys of a section's JSON schema."""
    found = []
    for name, node in schema["properties"].items():
        below = f"{path}.{name}" if path else name
        sections = list(_sections(node, below, defs))
        keys = tuple(key for place, section in sections for key in _keys(defs[section], place, defs))
        # what a section is stands at its type, unless a key says what this one is for
        described = [defs[section].get("description", "") for _, section in sections]
        meaning = node.get("description") or (described[0] if len(described) == 1 else "")
        default = _written(node["default"]) if "default" in node else None
        if keys and default not in (None, "null", "[]", "{}"):
            default = None  # that of its keys
        if "default" not in node and name not in schema.get("required", ()):
            default = "{}"  # by a factory
        found.append(Key(below, _type(node, defs), default, " ".join(meaning.split()), keys))
    return tuple(found)


def _sections(node: Mapping[str, Any], path: str, defs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The sections that a value may be, or have in it: the path of each, and its name among the definitions."""
    if "$ref" in node:
        yield path, node["$ref"].rpartition("/")[2]
    elif "oneOf" in node:
        for one in node["oneOf"]:
            name = one["$ref"].rpartition("/")[2]
            kind = defs[name]["properties"]["name"]
            yield f"{path}[{kind.get('const', 'package.module:Class')}]", name
    else:
        for one in node.get("anyOf", ()):
            yield from _sections(one, path, defs)
        if isinstance(node.get("items"), dict):
            yield from _sections(node["items"], f"{path}[]", defs)
        if isinstance(node.get("additionalProperties"), dict):
            yield from _sections(node["additionalProperties"], f"{path}.NAME", defs)


def _written(default: Any) -> str:
    return default if isinstance(default, str) else json.dumps(default)


def _type(node: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    """What a value is, in words."""
    if "$ref" in node or "oneOf" in node:
        return "section"
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(_type(one, defs) for one in node["anyOf"]))
    if "const" in node or "enum" in node:
        return ", ".join(map(str, node.get("enum", [node.get("const")])))
    if node.get("type") in ("array", "object"):
        return _several(node, defs)
    bounds = [f"{sign} {node[name]:g}" for name, sign in _BOUNDS.items() if abs(node.get(name, 2e9)) <= _WIDEST]
    return " ".join([_TYPES.get(node.get("type", ""), "any value"), " and ".join(bounds)]).strip()


def _several(node: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    """What a list or a mapping holds, in words."""
    if node["type"] == "object":
        inner = node.get("additionalProperties")
        return f"mapping to {_type(inner, defs)}" if isinstance(inner, dict) else "mapping"
    if "prefixItems" in node:
        return f"list of {len(node['prefixItems'])}: {_type(node['prefixItems'][0], defs)}"
    return f"list of {_type(node.get('items', {}), defs)}"
