"""Strict YAML: the door for every value that people write.

What comes through is a tree of mappings with keys that are strings, lists, strings, finite numbers of 64 bits, booleans
and null, of bounded size and depth. 1e-3 is a number and a date is the text that stands there. What two readers of YAML
could take for different things is refused: duplicate keys, `010` (octal, or ten), `1:30` (ninety, or a time).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Final, NoReturn

import yaml

from rechub_dist.errors import UserError, one_line, shown

MAX_BYTES: Final = 16 << 20
MAX_DEPTH: Final = 64
MAX_VALUES: Final = 1_000_000  # aliases count as what they stand for

_TAG: Final = "tag:yaml.org,2002:"
_FLOAT = re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+")
_OCTAL = re.compile(r"[-+]?0[\d_]+")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: it cannot be read, is not valid YAML, or holds what is not read here; names the line.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}; check the path") from error
    return parse_yaml(data, str(path))


def parse_yaml(text: str | bytes, path: str, *, finite: bool = True) -> dict[str, Any]:
    """As `read_yaml`, for the content of the file `path`; numbers may be infinite or NaN unless they are `finite`."""
    tree = _read(text, path, "", finite)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a mapping of keys to values; write lines of `key: value`")
    return tree


def parse_value(text: str, where: str) -> Any:
    """A value of any kind that stands in one line, such as that of an option; `where` begins the message.

    Raises:
        UserError: as `read_yaml`.
    """
    return _read(text, where, "the value is ")


def _read(text: str | bytes, where: str, one: str, finite: bool = True) -> Any:
    """The value that a text is; `one`, where it is all of a line, begins what is said of its syntax."""
    if len(text) > MAX_BYTES:
        raise UserError(
            f"{where}: larger than {MAX_BYTES >> 20} MiB, which no YAML file here is; is it the right file?"
        )
    if isinstance(text, bytes):
        text = _decoded(text, where)
    tree = _Tree(where, lines=not one, finite=finite)
    try:
        return tree.read(StrictLoader(text))
    except yaml.MarkedYAMLError as error:
        reason = one_line(", ".join(part for part in (error.context, error.problem) if part))
        place = tree.at(error.problem_mark or error.context_mark)
        raise UserError(f"{place}: {one}not valid YAML: {reason}") from error
    except yaml.reader.ReaderError as error:
        line = "" if one else f", line {text.count(chr(10), 0, error.position) + 1}"
        character = f"{error.character:#x}" if isinstance(error.character, int) else repr(error.character)
        raise UserError(f"{where}{line}: {one}not valid YAML: it may not hold the character {character}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: {one}not valid YAML: {one_line(error)}") from error


def _decoded(data: bytes, where: str) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        raise UserError(f"{where}: UTF-16 or binary; save it as UTF-8 text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}, line {line}: not UTF-8 text; save the file as UTF-8") from error


class StrictLoader(yaml.SafeLoader):
    """A safe loader that parses text of any depth only up to `MAX_DEPTH`, and leaves dates as they are written."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"nested more than {MAX_DEPTH} deep", self.peek_event().start_mark
            )
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _StrictDumper(yaml.SafeDumper):
    """Quotes strings that `StrictLoader` would read as something else."""


# PyYAML follows YAML 1.1, where 1e-3 is a string.
for _kind in (StrictLoader, _StrictDumper):
    _kind.add_implicit_resolver(f"{_TAG}float", re.compile(f"^{_FLOAT.pattern}$"), list("-+0123456789"))
StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{_TAG}timestamp", f"{_TAG}value")]
    for first, resolvers in StrictLoader.yaml_implicit_resolvers.items()
}


class _Tree:
    """Nodes of YAML -> values.

    PyYAML's own constructor makes one object of a node however often it is referred to; whatever walks the tree later
    would never end. Here a node is made as often as it is referred to, and counted each time.
    """

    def __init__(self, where: str, *, lines: bool, finite: bool) -> None:
        self._where = where
        self._lines = lines  # whether messages name them
        self._finite = finite  # whether numbers have to be
        self._values = 0

    def at(self, mark: Any) -> str:
        """What a message about a place begins with."""
        return f"{self._where}, line {mark.line + 1}" if self._lines and mark is not None else self._where

    def read(self, loader: StrictLoader) -> Any:
        try:
            node = loader.get_single_node()
            return None if node is None else self._value(node, loader, MAX_DEPTH)
        finally:
            loader.dispose()

    def _refuse(self, node: yaml.Node, message: str) -> NoReturn:
        raise UserError(f"{self.at(node.start_mark)}: {message}")

    def _value(self, node: yaml.Node, loader: StrictLoader, depth: int) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            self._refuse(node, f"more than {MAX_VALUES:,} values, those that aliases (*name) stand for included")
        if depth < 0:
            self._refuse(node, f"nested more than {MAX_DEPTH} deep, or an alias (*name) within what it stands for")
        tag = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self._mapping(node, loader, depth)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self._value(item, loader, depth - 1) for item in node.value]
        if isinstance(node, yaml.ScalarNode) and tag in ("str", "int", "float", "bool", "null"):
            return self._scalar(node, tag, loader)
        return self._refuse(
            node, f"the tag {shown(node.tag.replace(_TAG, '!!'))} is not read here; write a plain value"
        )

    def _mapping(self, node: yaml.MappingNode, loader: StrictLoader, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: list[dict[str, Any]] | None = None
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                if merged is not None:
                    self._refuse(key_node, "duplicate key '<<'; merge a list: <<: [*one, *other]")
                found = self._value(value_node, loader, depth - 1)
                merged = found if isinstance(found, list) else [found]
                if not all(isinstance(tree, dict) for tree in merged):
                    self._refuse(key_node, "<< merges mappings: write an alias of one, or a list of them")
                continue
            key = self._value(key_node, loader, depth - 1)
            if isinstance(key, dict | list):
                self._refuse(key_node, f"a {'mapping' if isinstance(key, dict) else 'list'} as a key; write a name")
            if not isinstance(key, str):
                text = shown(key_node.value or "null")
                self._refuse(key_node, f"the key {text[1:-1]} is no text but {shown(key)}; quote it: {text}:")
            if key in own:
                self._refuse(key_node, f"duplicate key {shown(key)}; remove one")
            own[key] = self._value(value_node, loader, depth - 1)
        base: dict[str, Any] = {}
        for tree in reversed(merged or ()):  # the first one that has a key wins
            base = {**base, **tree}
        return {**base, **own}

    def _scalar(self, node: yaml.ScalarNode, tag: str, loader: StrictLoader) -> Any:
        text: str = node.value
        if tag == "str":
            if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
                self._refuse(node, f"{shown(text)} has a NUL or half a character, which no text has; remove it")
            return text
        quoted = f"write {shown(text)} if it is text"
        if tag == "int" and _OCTAL.fullmatch(text):
            self._refuse(node, f"{shown(text)} is an octal number in YAML; leave out the 0 at its start, or {quoted}")
        if tag in ("int", "float") and ":" in text:
            self._refuse(node, f"{shown(text)} is a number to the base 60 in YAML; write it in decimals, or {quoted}")
        try:
            value = loader.construct_object(node)
        except (ValueError, LookupError, OverflowError):  # "", of which PyYAML takes the first character
            self._refuse(node, f"{shown(text)} is no {tag}; {quoted}")
        if self._finite and isinstance(value, float) and not math.isfinite(value):
            self._refuse(node, f"{shown(text)} is not a finite number; {quoted}")
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
            self._refuse(node, f"{shown(text)} is no integer of 64 bits; {quoted}")
        return value


def dump_yaml(tree: Any, width: int) -> str:
    """The tree as YAML, wrapped at `width` columns where possible; `parse_yaml` restores the same tree."""
    text: str = yaml.dump(tree, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=width)
    return text
