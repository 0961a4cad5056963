"""The prepared folder: Parquet shards of each split, and `dataset.yaml`.

```
out/
  train/part-00000.parquet ...   zstd, row groups of 65,536 rows
  valid/part-00000.parquet ...
  test/part-00000.parquet ...
  dataset.yaml                   the features, tables and labels
```

Sequences also have `train_prefixes/`, synthetic data `truth.json`, and a user's own events the original ids in
`items.parquet` and `users.parquet`; Criteo has the values of its ids in `_vocabularies/`.

Everything is written into a hidden folder beside `out`, which replaces it once it is complete, so that a preparation
that was killed leaves nothing that looks finished. The output has a mark (see `outputs`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from rechub_dist.data.parquet.outputs import whole_folder
from rechub_dist.data.parquet.overlap import refuse_overlap
from rechub_dist.data.parquet.pages import parquet_writer
from rechub_dist.features import CrossFeature, DenseFeature, Feature, FeatureSchema, Table, TimeGapFeature

SPLITS = ("train", "valid", "test")
SCHEMA_FILE = "dataset.yaml"
PREFIXES = "train_prefixes"  # the train split of sequences with one row per position
TRUTH_FILE = "truth.json"
ITEMS_FILE = "items.parquet"  # the original ids
USERS_FILE = "users.parquet"
VOCABULARIES = "_vocabularies"  # a file per column: value, id, count; because of the `_` they are not data
ROW_GROUP = 65_536
SHARD_ROWS = 4 * ROW_GROUP


@contextmanager
def prepared_folder(out: Path, name: str, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block succeeds, and is removed when it fails.

    An earlier, unchanged preparation of the same data set at `out` is replaced.

    Args:
        out: the folder.
        name: of the data set.
        inputs: the files that are read, or their folders; they must not be in `out`.

    Raises:
        UserError: `out` is a file, holds anything but such an earlier preparation, or overlaps an input.
    """
    folders_files = (file for path in inputs for file in (path.iterdir() if path.is_dir() else [path]))
    refuse_overlap(str(out), (str(file) for file in folders_files if not file.is_dir()))
    with whole_folder(out, f"prepared {name}", replace=True) as work:
        yield work


class ShardWriter:
    """Writes the rows of a split in shards of `shard_rows` rows; a context manager, or call `close`.

    Even a split without rows has a shard, so that its columns can be read.
    """

    def __init__(self, folder: Path, split: str, schema: pa.Schema, shard_rows: int = SHARD_ROWS) -> None:
        self._folder = folder / split
        self._folder.mkdir()
        self._schema = schema
        self._shard_rows = shard_rows
        self._shard = 0
        self._room = 0
        self._pending = schema.empty_table()
        self._writer = self._next()

    def _next(self) -> pq.ParquetWriter:
        path = self._folder / f"part-{self._shard:05d}.parquet"
        self._shard += 1
        self._room = self._shard_rows
        return parquet_writer(path, self._schema)

    def write(self, table: pa.Table) -> None:
        """Append rows, whose columns are cast to the schema."""
        table = table.select(self._schema.names).cast(self._schema)
        self._pending = pa.concat_tables([self._pending, table])
        self._flush(ROW_GROUP)

    def _flush(self, least: int) -> None:
        """Write row groups while at least `least` rows are pending, or as many as the shard has room for."""
        while self._pending.num_rows >= max(1, min(least, self._room)):
            if not self._room:
                self._writer.close()
                self._writer = self._next()
                continue
            rows = self._pending.slice(0, min(ROW_GROUP, self._room))
            self._writer.write_table(rows, row_group_size=ROW_GROUP)
            self._room -= rows.num_rows
            self._pending = self._pending.slice(rows.num_rows)

    def close(self) -> None:
        """Write pending rows and close the shard."""
        self._flush(1)
        self._writer.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_split(folder: Path, split: str, table: pa.Table, shard_rows: int = SHARD_ROWS) -> None:
    """Write a whole split."""
    with ShardWriter(folder, split, table.schema, shard_rows) as writer:
        writer.write(table)


def write_schema(folder: Path, name: str, schema: FeatureSchema) -> None:
    """Write `dataset.yaml`."""
    (folder / SCHEMA_FILE).write_text(schema_text(name, schema), encoding="utf-8")


def schema_text(name: str, schema: FeatureSchema) -> str:
    """The schema as YAML: derived columns and features in their order, without fields that have their defaults.

    A feature with a default table of its own name that no other reads has `rows`; other tables are under `tables`.
    """
    readers: dict[str, list[Feature]] = {}
    for feature in schema.features:
        if not isinstance(feature, DenseFeature):
            readers.setdefault(feature.table.name, []).append(feature)
    listed: dict[str, Table] = {}
    features: dict[str, dict[str, Any]] = {}
    for feature in schema.features:
        entry: dict[str, Any] = {"kind": feature.kind}
        if isinstance(feature, CrossFeature | TimeGapFeature):  # whose tables are always their own
            features[feature.name] = entry | _changed(feature, without={"name", "kind"})
            if isinstance(feature, CrossFeature):
                features[feature.name]["inputs"] = [source.name for source in feature.inputs]
            continue
        if not isinstance(feature, DenseFeature):
            table = feature.table
            own = table.name == feature.name and len(readers[table.name]) == 1
            if own and table == Table(table.name, table.rows):
                entry["rows"] = table.rows
            else:
                listed[table.name] = table
                entry["table"] = table.name
        features[feature.name] = entry | _changed(feature, without={"name", "kind", "table"})
    document: dict[str, Any] = {"name": name}
    if listed:
        document["tables"] = {table.name: _changed(table, without={"name"}) for table in listed.values()}
    if schema.derived:
        document["derive"] = {
            one.name: {"kind": one.kind} | _changed(one, without={"name", "kind"}) for one in schema.derived
        }
    document["features"] = features
    if schema.labels:
        document["labels"] = {
            label.name: {"type": label.type} | _changed(label, without={"name", "type"}) for label in schema.labels
        }
    if schema.weight is not None:
        document["weight"] = schema.weight
    text: str = yaml.safe_dump(document, default_flow_style=None, sort_keys=False, width=120, allow_unicode=True)
    return text


def _changed(value: Any, without: Iterable[str]) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, or have none."""
    return {
        field.name: getattr(value, field.name)
        for field in fields(value)
        if field.name not in without and getattr(value, field.name) != field.default
    }
