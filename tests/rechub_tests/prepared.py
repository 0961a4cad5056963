"""A look into prepared folders."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rechub_dist.config import read_yaml
from rechub_dist.data.prepare.writer import (
    ROW_GROUP,
    SPLITS,
)
from rechub_dist.features import DenseFeature, FeatureSchema, SequenceFeature
from rechub_dist.schema import parse_schema

ROOT = Path(__file__).parents[2]


def rows(folder: Path, split: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(file) for file in sorted((folder / split).iterdir())])


def schema(folder: Path) -> FeatureSchema:
    return parse_schema(read_yaml(folder / "dataset.yaml"))


def column(table: pa.Table, name: str) -> np.ndarray[Any, Any]:
    return table[name].to_numpy()


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_prepared(folder: Path) -> None:
    """Every feature has a column of its kind in every split, without gaps, and ids lie within their tables."""
    declared = schema(folder)
    names = {item.source for item in (*declared.features, *declared.labels)}
    for split in SPLITS:
        for file in (folder / split).iterdir():
            metadata = pq.ParquetFile(file).metadata
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            assert all(group.num_rows == ROW_GROUP for group in groups[:-1])
            assert groups[0].column(0).compression == "ZSTD"
        table = rows(folder, split)
        assert set(table.column_names) == names
        for feature in declared.features:
            values = table[feature.source].combine_chunks()
            if isinstance(feature, DenseFeature):
                assert pa.types.is_floating(values.type)
                assert feature.missing == "fill" or values.null_count == 0
                continue
            assert values.null_count == 0
            if isinstance(feature, SequenceFeature):
                assert pa.types.is_list(values.type)
            if pa.types.is_list(values.type):
                values = values.flatten()
                assert values.null_count == 0
            assert pa.types.is_integer(values.type)
            if len(values):
                low, high = pc.min_max(values).as_py().values()
                assert low >= 0
                assert high < feature.table.rows, feature.name
        for label in declared.labels:
            assert set(pc.unique(table[label.source]).to_pylist()) <= {0, 1}
