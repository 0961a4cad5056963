"""Parses a data set's schema file: tables, features and labels in YAML, checked and made a `FeatureSchema`."""

from __future__ import annotations

import dataclasses
import json
import posixpath
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rechub_dist.derived import Age, Bucket, Derived, Hour, KeyValues, Lookup, Overlap, Ratio, Split, Weekday
from rechub_dist.errors import UserError, nearest, shown
from rechub_dist.features import (
    CrossFeature,
    DenseFeature,
    Feature,
    FeatureSchema,
    Label,
    SequenceFeature,
    SparseFeature,
    Table,
    TimeGapFeature,
)
from rechub_dist.typed import complaint

KINDS: dict[str, type[Feature]] = {
    "dense": DenseFeature,
    "sparse": SparseFeature,
    "sequence": SequenceFeature,
    "cross": CrossFeature,
    "time_gap": TimeGapFeature,
}
DERIVED_KINDS: dict[str, type[Derived]] = {
    "split": Split,
    "key_values": KeyValues,
    "hour": Hour,
    "weekday": Weekday,
    "age": Age,
    "bucket": Bucket,
    "ratio": Ratio,
    "overlap": Overlap,
    "lookup": Lookup,
}


def parse_schema(tree: dict[str, Any], root: str = "") -> FeatureSchema:
    """The schema that a `dataset.yaml` describes.

    A sparse or sequence feature names a table of `tables`, or gives `rows` (and `dim`, `init_std`) for a table of its
    own, of the same name. A cross names its inputs, which may be declared before or after it. A derived column reads
    those derived before it, and the files' own. Paths of vocabularies are relative to `root`, the data set's folder.

    Raises:
        UserError: unknown keys, kinds or tables, wrong types, or contradictions; names the key.
    """
    _known(tree, {"name", "tables", "derive", "features", "labels", "weight"}, "dataset")
    tables = {name: _build(Table, name, spec, f"dataset.tables.{name}") for name, spec in _items(tree, "tables")}
    items = _items(tree, "features")
    plain = {name: _feature(name, _below(root, spec), tables) for name, spec in items if spec.get("kind") != "cross"}
    features = tuple(plain.get(name) or _cross(name, spec, plain) for name, spec in items)
    labels = tuple(_build(Label, name, spec, f"dataset.labels.{name}") for name, spec in _items(tree, "labels"))
    derived = tuple(_derived(name, spec) for name, spec in _items(tree, "derive"))
    weight = tree.get("weight")
    if weight is not None and not isinstance(weight, str):
        raise UserError(f"dataset.weight: write the name of a column, got {shown(weight)}")
    if not features:
        raise UserError("dataset.features: at least one feature is needed")
    try:
        return FeatureSchema(features, labels, weight, derived)
    except ValueError as error:
        raise UserError(f"dataset: {error}") from error


def _feature(name: str, spec: dict[str, Any], tables: dict[str, Table]) -> Feature:
    where = f"dataset.features.{name}"
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{where}.kind: got {shown(kind)}; {nearest(str(kind), KINDS)}")
    own_table = {"rows", "dim", "init_std"} if kind in ("sparse", "sequence") else set()
    _known(spec, _keys(KINDS[kind]) | own_table, where)
    if not own_table:
        return _build(KINDS[kind], name, spec, where)
    own: dict[str, Any] = {key: value for key, value in spec.items() if key in own_table}
    rest = {key: value for key, value in spec.items() if key not in own_table}
    shared = rest.get("table", None if own else name)
    if not isinstance(shared, str | None):
        raise UserError(f"{where}.table: write the name of a table, got {shown(shared)}")
    if own and shared is not None:
        raise UserError(f"{where}: names table {shared!r} and gives {', '.join(own)} too; give those in tables")
    if own and name in tables:
        raise UserError(f"{where}: gives {', '.join(own)}, but a table {name!r} is declared too; write table: {name}")
    if shared is not None and shared not in tables:
        if "table" in rest:
            raise UserError(f"{where}.table: there is no table {shown(shared)}: {nearest(str(shared), tables)}")
        raise UserError(f"{where}: give rows (the number of ids), or the name of a shared table")
    table = tables[shared] if shared is not None else _build(Table, name, own, where)
    return _build(KINDS[kind], name, {**rest, "table": dataclasses.asdict(table)}, where)


def _derived(name: str, spec: dict[str, Any]) -> Derived:
    where = f"dataset.derive.{name}"
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in DERIVED_KINDS:
        raise UserError(f"{where}.kind: got {shown(kind)}; {nearest(str(kind), DERIVED_KINDS)}")
    found: Derived = _build(DERIVED_KINDS[kind], name, spec, where)
    return found


def _below(root: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The feature with its vocabulary's path below `root`, unless that is an address or absolute."""
    path = spec.get("vocabulary")
    if not isinstance(path, str) or "://" in path:
        return spec
    return {**spec, "vocabulary": posixpath.join(root, path)}


def _cross(name: str, spec: dict[str, Any], features: dict[str, Feature]) -> Feature:
    where = f"dataset.features.{name}"
    inputs = spec.get("inputs")
    if not isinstance(inputs, list):
        raise UserError(f"{where}.inputs: write a list of feature names, got {shown(inputs)}")
    sparse = {name for name, feature in features.items() if isinstance(feature, SparseFeature)}
    for source in inputs:
        if not isinstance(source, str) or source not in sparse:
            raise UserError(
                f"{where}.inputs: there is no sparse feature {shown(source)}: {nearest(str(source), sparse)}"
            )
    found = [dataclasses.asdict(features[source]) for source in inputs]
    return _build(CrossFeature, name, {**spec, "inputs": found}, where)


def _keys(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)} - {"name"}


def _build(cls: Any, name: str, spec: dict[str, Any], where: str) -> Any:
    _known(spec, _keys(cls), where)
    try:
        return TypeAdapter(cls).validate_json(json.dumps({"name": name, **spec}, default=str), strict=True)
    except ValidationError as error:
        raise UserError("; ".join(_line(where, e) for e in error.errors())) from error


def _line(where: str, error: Any) -> str:
    if error["type"] == "value_error":  # of the whole, which it names
        return f"{where}: {error['ctx']['error']}"
    return complaint(".".join([where, *(str(part) for part in error["loc"])]), error)


def _known(tree: dict[str, Any], valid: set[str], where: str) -> None:
    for key in tree:
        if key not in valid:
            raise UserError(f"unknown key {shown(f'{where}.{key}')}: {nearest(str(key), valid)}")


def _items(tree: dict[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    section = tree.get(key) or {}
    if not isinstance(section, dict) or not all(isinstance(v, dict | None) for v in section.values()):
        raise UserError(f"dataset.{key}: write a mapping of names to mappings")
    return [(str(name), spec or {}) for name, spec in section.items()]
