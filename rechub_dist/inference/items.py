"""Copies the data set's table of items into a bundle, as values: for filters, and for the vectors of items."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from rechub_dist.assembly.parts import Plan
from rechub_dist.assembly.readers import items_spec, read_manifest
from rechub_dist.config import Selection
from rechub_dist.data.columns.vocabulary import vocabulary_of
from rechub_dist.data.columns.window import Window
from rechub_dist.data.given import windows
from rechub_dist.data.parquet.files import OpenFiles
from rechub_dist.data.parquet.pages import parquet_writer
from rechub_dist.data.parquet.storage import exists, join
from rechub_dist.data.spec import BatchSpec
from rechub_dist.distributed.runtime import alone
from rechub_dist.errors import UserError
from rechub_dist.features import SparseFeature
from rechub_dist.inference.check import as_values

ROWS: Final = 1 << 16  # of a row group


def write_items(found: Plan, path: Path) -> bool:
    """Write the rows of `data.items` whose item has a value; returns whether there is such a table.

    A model whose items' vectors come from their ids alone needs none: its table is copied where it has a row for each
    item, for filters.

    Raises:
        UserError: the items of another model are not there, or not each once, or their columns mean something else
            once their ids are written as values.
    """
    ranking = found.objective.ranking
    if ranking is None:
        return False
    config, spec = found.config, items_spec(ranking, found.spec)
    source = config.data.items
    if ranking.ids_alone and isinstance(source, str) and not exists(join(config.data.root, source), config.storage):
        return False
    manifest = read_manifest(config, alone(torch.device("cpu")), source, spec, may_skip=False)
    item = ranking.item.feature
    assert isinstance(item, SparseFeature)
    vocabulary = vocabulary_of(replace(item, encoded=False))
    wanted = np.zeros(item.table.rows, np.bool_)
    wanted[np.arange(item.table.rows) if vocabulary is None else vocabulary.ids] = True
    counts = np.zeros(item.table.rows, np.int64)
    where = f"data.items: {source.path if isinstance(source, Selection) else source} below {config.data.root}"
    writer: pq.ParquetWriter | None = None
    opened = OpenFiles()
    try:
        for file, group in manifest.groups:
            whole = opened.read(file, group, list(manifest.schema.names))
            for first in range(0, whole.num_rows, ROWS):
                table = whole.slice(first, ROWS)
                ids = _ids(table, spec, item.name, file.path)
                counts += np.bincount(ids, minlength=len(counts))
                table = table.filter(pa.array(wanted[ids]))
                values = as_values(table, found.schema)
                _check_same(table, values, spec, where)
                writer = writer or parquet_writer(path, values.schema)
                writer.write_table(values.cast(writer.schema), row_group_size=ROWS)
    finally:
        opened.close()
        if writer is not None:
            writer.close()
    wrong = np.flatnonzero(wanted & (counts != 1))
    if len(wrong) and not ranking.ids_alone:
        raise UserError(
            f"{where} holds item {wrong[0]} {counts[wrong[0]]} times; each of the {wanted.sum()} items needs one row"
        )
    if len(wrong):
        path.unlink(missing_ok=True)
    return not len(wrong)


def _ids(table: pa.Table, spec: BatchSpec, item: str, where: str) -> NDArray[Any]:
    [window] = windows(table, spec, max(1, table.num_rows), where)
    if item not in window.flat:
        raise UserError(f"{where}: a row has not one item; each of the data's items must have one row")
    return np.asarray(window.ids[window.flat.index(item)])


def _check_same(stored: pa.Table, values: pa.Table, spec: BatchSpec, where: str) -> None:
    """Make sure that values become the ids that they are written for."""
    if not stored.num_rows:
        return
    [one] = windows(stored, spec, stored.num_rows, where)
    [other] = windows(values, spec.of_values(), stored.num_rows, where)
    for name in (*one.flat, *one.ragged):
        if not all(np.array_equal(a, b) for a, b in zip(_of(one, name), _of(other, name), strict=True)):
            raise UserError(
                f"{where}: feature {name!r} has ids that its vocabulary has no value for; set missing: unknown, with "
                "their unknown_id"
            )


def _of(window: Window, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    if name in window.flat:
        return np.asarray(window.ids[window.flat.index(name)]), np.arange(window.rows + 1)
    return window.ragged[name].values, window.ragged[name].offsets
