"""The plan's features, fitted to train: the schema of the data set, and the vocabularies that it names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from rechub_dist.data.columns.frequencies import frequent, vocabulary_name
from rechub_dist.data.columns.vocabulary import Vocabulary
from rechub_dist.data.importing.facts import Facts, steady
from rechub_dist.data.importing.histories import list_columns
from rechub_dist.data.importing.plan import DensePlan, OtherPlan, Plan, SequencePlan, SparsePlan, TablePlan
from rechub_dist.data.importing.rows import Shape, alike
from rechub_dist.data.prepare.writer import VOCABULARIES
from rechub_dist.derived import Bucket, Derived
from rechub_dist.errors import UserError, nearest
from rechub_dist.features import DenseFeature, FeatureSchema, SequenceFeature, SparseFeature
from rechub_dist.schema import parse_schema

MAX_GUESSED_LENGTH = 50


@dataclass(frozen=True)
class Earlier:
    """What an earlier import learned, which stays: a trained model knows its ids, means and bins.

    Attributes:
        schema: of it.
        vocabularies: by table, columns `value`, `id`, `count`.
    """

    schema: FeatureSchema
    vocabularies: dict[str, pa.Table]

    def dense(self, name: str) -> DenseFeature | None:
        """The dense feature of this name."""
        found = next((f for f in self.schema.features if f.name == name), None)
        return found if isinstance(found, DenseFeature) else None

    def boundaries(self, name: str) -> tuple[float, ...] | None:
        """Those of the derived column of this name."""
        found = next((one for one in self.schema.derived if one.name == name), None)
        return found.boundaries if isinstance(found, Bucket) else None


@dataclass
class Fitted:
    """What the plan became.

    Attributes:
        schema: with vocabularies' paths relative to the data set's folder.
        tree: the same as dataset.yaml has it, without its name.
        vocabularies: by embedding table, columns `value`, `id`, `count`.
        encoded: by column that is written as ids, the table whose vocabulary it is looked up in.
    """

    schema: FeatureSchema
    tree: dict[str, Any]
    vocabularies: dict[str, pa.Table]
    encoded: dict[str, str] = field(default_factory=dict)

    def lookup(self) -> dict[str, Vocabulary]:
        """The vocabularies by the columns that are written as ids."""
        made = {name: vocabulary_from(table, name) for name, table in self.vocabularies.items()}
        return {column: made[table] for column, table in self.encoded.items()}


def vocabulary_from(table: pa.Table, name: str) -> Vocabulary:
    """A vocabulary for lookup from its file's columns."""
    values, ids = (table[column].combine_chunks() for column in ("value", "id"))
    return Vocabulary.of(values, ids.to_numpy(), f"the vocabulary of {name}")


def derived_of(plan: Plan) -> tuple[Derived, ...]:
    """The derived columns that the plan declares. Raises UserError."""
    return parse_schema({"features": {"_": {"kind": "dense"}}, "derive": plan.derive}).derived if plan.derive else ()


def of_histories(plan: Plan, derived: tuple[Derived, ...]) -> tuple[Derived, ...]:
    """The derived columns that are computed from histories, at least in part."""
    made = {out for name, history in plan.histories.items() for out in list_columns(name, history)}
    found = []
    for one in derived:
        if not made.isdisjoint(one.inputs):
            found.append(one)
            made |= set(one.outputs)
    return tuple(found)


def column_of(plan: Plan, name: str) -> str:
    """The column that a feature reads."""
    return getattr(plan.features[name], "column", None) or name


def table_of(plan: Plan, name: str) -> str:
    """The embedding table of a sparse feature or a sequence: a history's is that of the feature it is made of."""
    feature = plan.features[name]
    if not isinstance(feature, SparsePlan | SequencePlan) or feature.table is not None:
        return getattr(feature, "table", None) or name
    made_of = {out: column for key, h in plan.histories.items() for out, column in list_columns(key, h).items()}
    source = made_of.get(column_of(plan, name))
    for other, candidate in plan.features.items():
        if isinstance(candidate, SparsePlan) and source is not None and column_of(plan, other) == source:
            return candidate.table or other
    return name


def has_vocabulary(feature: object) -> bool:
    """Whether ids of the feature are looked up in a vocabulary."""
    if isinstance(feature, SparsePlan):
        return feature.hash is None and feature.bins is None and feature.quantiles is None
    return isinstance(feature, SequencePlan)


def needed_columns(plan: Plan, shape: Shape, derived: tuple[Derived, ...]) -> list[str]:
    """The columns of the log and its tables that anything later reads.

    Raises:
        UserError: a feature, history or derived column reads a column that is nowhere, or makes one that is there.
    """
    made: dict[str, str] = {}
    lists = {f"histories.{name}": list_columns(name, history) for name, history in plan.histories.items()}
    outputs = [(f"derive.{one.name}", one.outputs) for one in derived]
    for where, names in [*((where, tuple(columns)) for where, columns in lists.items()), *outputs]:
        for name in names:
            if (known := alike(name, [*shape.types, *made, *plan.labels])) is not None:
                raise UserError(f"{where}: there is a column {known!r} already; choose another name")
            made[name] = where
    late = {output for one in of_histories(plan, derived) for output in one.outputs}
    for where, names in ((where, tuple(columns.values())) for where, columns in lists.items()):
        for name in names:
            if name in late or made.get(name, "").startswith("histories."):
                raise UserError(
                    f"{where}: column {name!r} is made of histories itself; a history is of the log's columns"
                )
    wanted: dict[str, str] = {}
    for name, feature in plan.features.items():
        wanted |= dict.fromkeys(_read_by(plan, name, feature), f"features.{name}")
    for one in derived:
        wanted |= dict.fromkeys(one.inputs, f"derive.{one.name}")
    for where, columns in lists.items():
        wanted |= dict.fromkeys(columns.values(), where)
    ours = (plan.user, plan.item, plan.time, *plan.k_core, *plan.split.key, plan.split.column, *plan.keep)
    wanted |= {column: "the plan" for column in ours if column is not None}
    for column, where in wanted.items():
        if column not in made and column not in shape.types:
            raise UserError(f"{where}: there is no column {column!r}; {nearest(column, [*shape.types, *made])}")
    return [column for column in wanted if column not in made]


def _read_by(plan: Plan, name: str, feature: Any) -> tuple[str, ...]:
    if isinstance(feature, OtherPlan):
        return tuple(column for column in (feature.times, feature.now) if column is not None)
    weights = getattr(feature, "weights", None)
    return (column_of(plan, name), *([weights] if weights else []))


def fit(plan: Plan, kinds: Mapping[str, str], facts: Facts, before: Earlier | None = None) -> Fitted:
    """The schema that the facts make of the plan.

    Args:
        plan: the plan.
        kinds: the types of the columns of ROWS and of the histories.
        facts: what is known of train.
        before: an earlier import, whose values keep their ids, and whose means and bins stay; new values follow.

    Raises:
        UserError: a table would have no value, or all numbers of a feature's bins are equal.
    """
    tree: dict[str, Any] = {"tables": {}, "derive": dict(plan.derive), "features": {}}
    vocabularies = _vocabularies(plan, facts, {} if before is None else before.vocabularies)
    for name, table in vocabularies.items():
        settings = plan.embeddings.get(name, TablePlan())
        rows = int(np.max(table["id"].to_numpy(), initial=0)) + 1
        tree["tables"][name] = {"rows": rows, **settings.model_dump(include={"dim", "init_std"}, exclude_none=True)}
    encoded = _encoded(plan)
    for name, feature in plan.features.items():
        column = column_of(plan, name)
        if isinstance(feature, DensePlan):
            tree["features"][name] = _dense(facts, name, column, feature, before)
        elif isinstance(feature, OtherPlan):
            tree["features"][name] = feature.model_dump(mode="json", exclude_none=True)
        elif isinstance(feature, SparsePlan) and not has_vocabulary(feature):
            tree["features"][name] = _without_vocabulary(plan, facts, kinds, tree, name, before)
        else:
            entry: dict[str, Any] = {"kind": feature.kind, "table": table_of(plan, name)}
            if isinstance(feature, SequencePlan):
                entry |= {"max_length": _length(plan, facts, column, feature), "keep": feature.keep}
            else:
                entry |= {"pooling": feature.pooling, "weights": feature.weights}
            entry |= {
                "column": None if column == name else column,
                "vocabulary": f"{VOCABULARIES}/{vocabulary_name(entry['table'])}",
                "encoded": True if column in encoded else None,
                "out_of_range": "unknown",
                "missing": "unknown",
            }
            tree["features"][name] = {key: value for key, value in entry.items() if value is not None}
    tree["labels"] = {}
    unused = set(plan.embeddings) - {f["table"] for f in tree["features"].values() if "table" in f}
    if unused:
        one = sorted(unused)[0]
        raise UserError(f"embeddings.{one}: no feature reads such a table; {nearest(one, vocabularies)}")
    schema = parse_schema({key: value for key, value in tree.items() if value})
    return Fitted(schema, tree, vocabularies, encoded)


def _encoded(plan: Plan) -> dict[str, str]:
    """The columns that can be written as ids: those that nothing reads but features of one vocabulary."""
    raw = {*plan.keep, plan.time}
    tables: dict[str, set[str | None]] = {}
    for name, feature in plan.features.items():
        first, *others = _read_by(plan, name, feature) or ("",)
        tables.setdefault(first, set()).add(table_of(plan, name) if has_vocabulary(feature) else None)
        for column in others:
            tables.setdefault(column, set()).add(None)
    found = {column: next(iter(of)) for column, of in tables.items() if len(of) == 1 and column not in raw}
    return {column: table for column, table in found.items() if table is not None}


def _vocabularies(plan: Plan, facts: Facts, grown_from: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    found = {}
    for table, counts in facts.counts.items():
        settings = plan.embeddings.get(table, TablePlan())
        least = settings.min_count or plan.min_count
        kept = _grown(table, grown_from[table], counts, least) if table in grown_from else frequent(
            counts, least, settings.max_size, scatter=settings.scatter
        )  # fmt: skip
        if not kept.num_rows:
            what = (
                f"no value occurs {least} times in train; lower min_count" if counts.num_rows else "there is no value"
            )
            column = next(
                column_of(plan, name)
                for name, feature in plan.features.items()
                if has_vocabulary(feature) and table_of(plan, name) == table
            )
            raise UserError(f"features: column {column!r}: {what}, or leave the feature out")
        found[table] = kept
    return found


def _grown(table: str, before: pa.Table, counts: pa.Table, least: int) -> pa.Table:
    """The earlier vocabulary, with the counts of now, and the new values that are frequent enough after it."""
    old = vocabulary_from(before, "the earlier import")
    words = pa.types.is_integer(counts["value"].type), not old.strings
    if words[0] != words[1]:
        now, earlier = ("integers" if integers else "strings" for integers in words)
        raise UserError(
            f"embeddings.{table}: its values are {now} now, and were {earlier} in the import that is to grow; give the "
            "columns the types that they had"
        )
    ids = old.find(counts["value"].combine_chunks())
    known = np.zeros(len(old.ids), np.int64)
    known[np.searchsorted(np.sort(old.ids), ids[ids >= 0])] = counts["count"].to_numpy()[ids >= 0]
    order = np.argsort(before["id"].to_numpy(), kind="stable")
    head = before.take(pa.array(order)).select(["value", "id"]).append_column("count", pa.array(known))
    fresh = frequent(counts.filter(pa.array(ids < 0)), least, first_id=int(old.ids.max(initial=0)) + 1)
    return pa.concat_tables([head.cast(fresh.schema), fresh])


def _dense(facts: Facts, name: str, column: str, feature: DensePlan, before: Earlier | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": "dense", "column": column, "transform": feature.transform, "dim": feature.dim}
    known = None if before is None else before.dense(name)
    if known is not None:
        entry |= {"mean": known.mean, "std": known.std, "missing": known.missing, "fill": known.fill}
    elif feature.dim == 1:
        found = facts.moments[column, feature.transform]
        if feature.standardize:
            entry |= {"mean": steady(found.mean), "std": steady(found.deviation)}
        if feature.fill == "mean":
            raw = math.copysign(math.expm1(abs(found.mean)), found.mean) if feature.transform == "log" else found.mean
            entry |= {"missing": "fill", "fill": steady(raw)}
    elif feature.fill == "mean":
        entry |= {"missing": "fill", "fill": 0.0}
    if isinstance(feature.fill, float) and known is None:
        entry |= {"missing": "fill", "fill": feature.fill}
    defaults = {"column": name, "transform": "none", "dim": 1, "mean": 0.0, "std": 1.0, "missing": "error"}
    return {key: value for key, value in entry.items() if key not in defaults or value != defaults[key]}


def _without_vocabulary(
    plan: Plan,
    facts: Facts,
    kinds: Mapping[str, str],
    tree: dict[str, Any],
    name: str,
    before: Earlier | None,
) -> dict[str, Any]:
    feature, column, settings = plan.features[name], column_of(plan, name), plan.embeddings.get(name, TablePlan())
    assert isinstance(feature, SparsePlan)
    if settings.min_count is not None or settings.max_size is not None:
        raise UserError(f"embeddings.{name}: min_count and max_size are for vocabularies, and {name} has none")
    if settings.scatter:
        raise UserError(f"embeddings.{name}: scatter is for vocabularies, and {name} has none")
    if feature.hash is not None:
        rows, source = feature.hash, column
        entry = {"hash": True, "missing": "drop", "pooling": feature.pooling, "weights": feature.weights}
    else:
        source, rows = _bucket(plan, facts, kinds, tree, name, before)
        entry = {"missing": "unknown", "unknown_id": rows - 1}
    tree["tables"][name] = {"rows": rows, **settings.model_dump(include={"dim", "init_std"}, exclude_none=True)}
    entry |= {"kind": "sparse", "table": name, "column": None if source == name else source}
    return {key: value for key, value in entry.items() if value is not None}


def _bucket(
    plan: Plan,
    facts: Facts,
    kinds: Mapping[str, str],
    tree: dict[str, Any],
    name: str,
    before: Earlier | None,
) -> tuple[str, int]:
    """Derive the bins of a number; returns the column that they are written to, and the rows of their table."""
    feature, column = plan.features[name], column_of(plan, name)
    assert isinstance(feature, SparsePlan)
    output = f"{name}_bin" if column == name else name
    known = None if before is None else before.boundaries(output)
    boundaries = feature.bins or known or facts.quantiles[column, feature.quantiles or 2]
    if not boundaries:
        raise UserError(
            f"features.{name}: the least value of column {column!r} fills all bins but the last in train; give bins "
            "or more quantiles, or leave the feature out"
        )
    if (clash := alike(output, [*kinds, *tree["derive"]])) is not None:
        raise UserError(f"features.{name}: its bins are column {output!r}, but there is {clash!r} already; rename it")
    tree["derive"][output] = {"kind": "bucket", "column": column, "boundaries": list(boundaries)}
    return output, len(boundaries) + 2  # the last is for missing values


def known_length(plan: Plan, column: str, feature: SequencePlan) -> int | None:
    """The length of a sequence, where the plan says it."""
    if feature.max_length is not None:
        return feature.max_length
    return next((h.max_length for key, h in plan.histories.items() if column in list_columns(key, h)), None)


def _length(plan: Plan, facts: Facts, column: str, feature: SequencePlan) -> int:
    known = known_length(plan, column, feature)
    return max(1, min(facts.longest[column], MAX_GUESSED_LENGTH)) if known is None else known


def stored_columns(schema: FeatureSchema) -> list[str]:
    """The columns that a row of the data set holds for its features."""
    found: dict[str, None] = {}
    for feature in schema.features:
        if isinstance(feature, SparseFeature | SequenceFeature):
            found.setdefault(feature.source)
            if isinstance(feature, SparseFeature) and feature.weights:
                found.setdefault(feature.weights)
        elif feature.kind == "dense":
            found.setdefault(feature.source)
        elif feature.kind == "time_gap":
            found.setdefault(feature.times)
            found.setdefault(feature.now)
    return list(found)
