"""Finds bad values from the statistics in footers, before reading: ids outside a table, labels other than 0 and 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from rechub_dist.data.columns.fit import column_names
from rechub_dist.data.columns.values import read_dense, read_ids, read_label, read_weight
from rechub_dist.data.parquet.files import DataFile, open_file
from rechub_dist.data.parquet.footers import corrupt
from rechub_dist.data.parquet.kinds import is_list
from rechub_dist.data.parquet.row_group import UndecodableError, column_chunks
from rechub_dist.data.spec import BatchSpec
from rechub_dist.skips import BadFileError


def check_extremes(files: Sequence[DataFile], spec: BatchSpec) -> None:
    """Convert the minimum and maximum of each column, and as many nulls as it has, like the rows to come.

    Files without statistics pass, and so do files whose rows are selected by conditions, and unreadable ones.

    Raises:
        UserError: as the conversion of a row with such values.
    """
    for file in files:
        if file.where.items:
            continue

        def read(_attempt: int, file: DataFile = file) -> dict[str, pa.Array]:
            with open_file(file) as parquet:
                try:
                    return dict(_extremes(parquet, spec))
                except (UndecodableError, ValueError, OverflowError, pa.ArrowException) as error:  # no store's fault
                    raise corrupt(file.path, error, "its footer") from None

        try:
            found = file.store.with_retries(read, file.path)
        except BadFileError:  # reported, or skipped, where its rows are read
            continue
        where = f"{file.path} (by its statistics, each value once)"
        for feature in spec.stored:
            if feature.source in found:
                read_ids(found[feature.source], feature, where)
        for dense in spec.dense:
            if dense.source in found:
                read_dense(found[dense.source], replace(dense, dim=1), where)
        for label in spec.labels:
            if label.source in found:
                read_label(found[label.source], label, where)
        if spec.weight in found:
            read_weight(found[spec.weight], where, spec.weight)


def _extremes(parquet: pq.ParquetFile, spec: BatchSpec) -> Iterator[tuple[str, pa.Array]]:
    """By numeric or boolean column, or column of lists of such: minima and maxima of the row groups, and nulls."""
    schema, metadata = parquet.schema_arrow, parquet.metadata
    names = [name for name in column_names(spec) if name in schema.names]  # others are derived
    groups = [column_chunks(metadata.row_group(group), names) for group in range(metadata.num_row_groups)]
    for name in names:
        kind = schema.field(name).type
        value = kind.value_type if is_list(kind) else kind
        types = pa.types
        fits = types.is_integer(value) or types.is_boolean(value) or types.is_float32(value) or types.is_float64(value)
        if not fits:
            continue
        chunks = [group[name] for group in groups if name in group]
        known = [chunk.statistics for chunk in chunks if chunk.is_stats_set]
        values = [end for one in known if one.has_min_max for end in (one.min, one.max)]
        # in list columns, null lists are counted as well
        nulls = sum(one.null_count for one in known if one.has_null_count) if value == kind else 0
        yield name, pa.concat_arrays([pa.array(list(dict.fromkeys(values)), value), pa.nulls(nulls, value)])
