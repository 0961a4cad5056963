"""The table of items: each item's id and original value, with what the data set says of the item alone.

It has a row for each row of the item's embedding table, so that a recall model finds its catalogue there
(`data.items`); that of id 0, unknown items, has no original value and no attributes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pyarrow as pa

from rechub_dist.data.columns.derive import derive
from rechub_dist.data.importing.engine import Engine, quoted
from rechub_dist.data.importing.fitted import Fitted, column_of, has_vocabulary, stored_columns, table_of
from rechub_dist.data.importing.ids import encode
from rechub_dist.data.importing.plan import Plan
from rechub_dist.data.importing.rows import Shape
from rechub_dist.data.importing.sources import source_query
from rechub_dist.data.parquet.pages import write_parquet
from rechub_dist.errors import UserError

FOLDER: Final = "items"
_VOCABULARY: Final = "items"


def item_table(plan: Plan) -> str:
    """The embedding table of the item's id.

    Raises:
        UserError: no sparse feature with a vocabulary reads the item's column.
    """
    for name, feature in plan.features.items():
        if column_of(plan, name) == plan.item and has_vocabulary(feature):
            return table_of(plan, name)
    raise UserError(f"items: no sparse feature with a vocabulary reads the item's column {plan.item!r}; add one")


def write_items(plan: Plan, engine: Engine, shape: Shape, fitted: Fitted, folder: Path) -> int:
    """Write `items/`: `id`, `original`, and the stored columns that come from tables of the item; returns the items.

    Raises:
        UserError: as `item_table`.
    """
    vocabulary = fitted.vocabularies[item_table(plan)].select(["id", "value"])
    unknown = pa.table({"id": [0], "value": [None]}).cast(vocabulary.schema)
    engine.give(_VOCABULARY, pa.concat_tables([unknown, vocabulary]))
    tables = {name: table for name, table in plan.tables.items() if (table.log_key or table.key) == plan.item}
    parts, joins = ["v.id", "v.value as original", f"v.value as {quoted(plan.item or '')}"], []
    there = {plan.item}
    for name, table in tables.items():
        alias = quoted(f"t {name}")
        joins.append(
            f"left join ({source_query(table, engine, f'tables.{name}')}) as {alias} "
            f"on {alias}.{quoted(table.key)} = v.value"
        )
        columns = [column for column, of in shape.origin.items() if of == name]
        parts += [f"{alias}.{quoted(column)}" for column in columns]
        there |= set(columns)
    rows = engine.table(
        f"select {', '.join(parts)} from {engine.given(_VOCABULARY)} as v {' '.join(joins)} order by id"
    )
    for one in fitted.schema.derived:
        if there >= set(one.inputs):
            rows = derive(rows, (one,), "the items")
            there |= set(one.outputs)
    lookup = fitted.lookup()
    wanted = [column for column in stored_columns(fitted.schema) if column in there]
    found = {"id": rows["id"], "original": rows["original"]}
    found |= {c: encode(rows[c], lookup[c]) if c in lookup else rows[c] for c in wanted if c not in found}
    (folder / FOLDER).mkdir()
    write_parquet(pa.table(found), folder / FOLDER / "part-00000.parquet")
    return int(vocabulary.num_rows)
