"""Holds a bundle against the run that it was exported from, on rows of the run's own data."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rechub_dist.config import RunConfig
from rechub_dist.data.columns.vocabulary import vocabulary_of
from rechub_dist.data.parquet.kinds import is_list
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.pages import write_parquet
from rechub_dist.data.parquet.scan import scan
from rechub_dist.data.parquet.storage import join
from rechub_dist.errors import UserError
from rechub_dist.features import FeatureSchema, SequenceFeature, SparseFeature
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.run import Run

ROWS: Final = 10_000
TOLERANCES: Final = {"fp32": 1e-5, "fp16": 2e-3, "int8": 3e-2}  # of a probability, or of a vector's largest number


def check_bundle(run: Run, bundle: Bundle, data: str, rows: int = ROWS) -> dict[str, float]:
    """The largest differences of the run's scores of rows, as its files hold them, and the bundle's of their values.

    Args:
        run: the run.
        bundle: to check.
        data: a split of the run's data.
        rows: the first so many.

    Returns:
        By output, the largest difference: absolute for scores, relative to the largest number for vectors; and `rows`.

    Raises:
        UserError: the data cannot be read.
    """
    table = first_rows(data, rows)
    values = as_values(table, bundle.schema)
    found: dict[str, float] = {"rows": float(table.num_rows)}
    if "score" in bundle.manifest.graphs:
        with tempfile.TemporaryDirectory(prefix="rechub-check-") as folder:
            file = Path(folder) / "rows.parquet"
            write_parquet(table, file)
            wanted = run.predict(file)
        for name, got in _columns(bundle.score(values)).items():
            found[name] = _apart(wanted[name].to_numpy(), got)
        return found
    for side in ("user", "item"):
        if side == "item" and not run_item_columns(bundle) <= set(values.column_names):
            continue
        wanted, got = (_flat(one.vectors(side, values)) for one in (run, bundle))
        found[f"{side} vectors"] = _apart(wanted, got) / max(float(np.abs(wanted).max(initial=0)), 1e-30)
    return found


def rows_to_check(config: RunConfig) -> str:
    """The run's valid split, else its train split. Raises UserError if neither is there."""
    for split in (config.data.valid, config.data.train):
        if isinstance(split, str):
            path = join(config.data.root, split)
            if "://" in path or Path(path).exists():
                return path
    raise UserError(
        f"{config.data.root} holds neither the run's valid nor its train split to compare the bundle on: name rows "
        "with --check-data, say where they are with --set data.root=..., or give --no-check"
    )


def run_item_columns(bundle: Bundle) -> set[str]:
    """The columns that an item's vector is made of."""
    return set(bundle.columns_of("item"))


def first_rows(data: str, rows: int) -> pa.Table:
    """The first rows of a data set. Raises UserError if there is none."""
    manifest = Manifest.read(data)
    pieces, count = [], 0
    for _, piece in scan(manifest, list(manifest.schema.names), lambda table: table):
        pieces.append(piece)
        count += piece.num_rows
        if count >= rows:
            break
    if not count:
        raise UserError(f"{data} has no rows to compare the bundle on; name others with --check-data")
    return pa.concat_tables(pieces).slice(0, rows)


def as_values(table: pa.Table, schema: FeatureSchema) -> pa.Table:
    """The rows as a caller has them: of encoded features the values that the ids stand for, null for unknown ones."""
    encoded = {
        feature.source: feature
        for feature in schema.features
        if isinstance(feature, SparseFeature | SequenceFeature) and feature.encoded
    }
    for feature in encoded.values():
        if feature.source not in table.column_names:
            continue
        vocabulary = vocabulary_of(replace(feature, encoded=False))
        assert vocabulary is not None
        place = np.full(feature.table.rows, -1)
        place[vocabulary.ids] = np.arange(len(vocabulary.ids))
        column = table[feature.source].combine_chunks()
        flat = column.flatten() if is_list(column.type) else column
        places = place[flat.to_numpy(zero_copy_only=False)]
        values = vocabulary.values.take(pa.array(places, mask=places < 0))
        if is_list(column.type):
            lengths = np.diff(column.offsets.to_numpy())
            offsets = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths).astype(np.int32)])
            values = pa.ListArray.from_arrays(pa.array(offsets), values)
        table = table.set_column(table.column_names.index(feature.source), feature.source, values)
    return table


def _columns(scores: Any) -> Mapping[str, NDArray[Any]]:
    return {name: scores[name].to_numpy() for name in scores.column_names}


def _flat(vectors: pa.Table) -> NDArray[np.float32]:
    """All numbers of a column of vectors, or of lists of them."""
    column = vectors.column(0).combine_chunks()
    while not pa.types.is_floating(column.type):
        column = column.flatten()
    found: NDArray[np.float32] = column.to_numpy()
    return found


def _apart(one: NDArray[Any], other: NDArray[Any]) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float(np.abs(one.astype(np.float64) - other).max(initial=0.0))
