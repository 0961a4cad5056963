"""Strict YAML: duplicate keys are errors, and 1e-3 is a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from rechub_dist.errors import UserError, one_line


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: the file cannot be read, is not valid YAML, has a duplicate key, or does not hold a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, path: str) -> dict[str, Any]:
    """As `read_yaml`, for the text of the file `path`."""
    try:
        tree = yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a mapping of keys to values")
    return tree


class StrictLoader(yaml.SafeLoader):
    """A safe loader that rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", node.start_mark)
        return super().construct_mapping(node, deep=deep)


class _StrictDumper(yaml.SafeDumper):
    """Quotes strings that `StrictLoader` would read as something else."""


# PyYAML follows YAML 1.1, where 1e-3 is a string.
for _kind in (StrictLoader, _StrictDumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def dump_yaml(tree: Any, width: int) -> str:
    """The tree as YAML, wrapped at `width` columns where possible; `parse_yaml` restores the same tree."""
    text: str = yaml.dump(tree, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=width)
    return text
