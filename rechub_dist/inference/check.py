"""Holds a bundle against the run that it was exported from, on rows of the run's own data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from rechub_dist.assembly.readers import evaluation_spec, prediction_spec
from rechub_dist.config import RunConfig
from rechub_dist.data.columns.fit import reading
from rechub_dist.data.columns.vocabulary import vocabulary_of
from rechub_dist.data.parquet.kinds import is_list
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.scan import scan
from rechub_dist.data.parquet.storage import join
from rechub_dist.errors import UserError
from rechub_dist.evaluation.measured import Measured
from rechub_dist.features import FeatureSchema, SequenceFeature, SparseFeature
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.check_items import compare_items
from rechub_dist.inference.comparison import Comparison, as_array, largest
from rechub_dist.inference.from_checkpoint import batches_of
from rechub_dist.inference.run import Run
from rechub_dist.objectives.base import Scores

ROWS: Final = 10_000


def check_bundle(run: Run, bundle: Bundle, data: str, rows: int = ROWS) -> Comparison:
    """Compare the run's scores of rows, as its files hold them, with the bundle's of the values that they stand for.

    Args:
        run: the run; by `open_run` its tables need not fit in memory.
        bundle: to check.
        data: a split of the run's data.
        rows: the first so many.

    Raises:
        UserError: the data cannot be read.
    """
    table = first_rows(data, rows)
    values = as_values(table, bundle.schema)
    with torch.no_grad():
        if "score" in bundle.manifest.graphs:
            return _of_scores(run, bundle, table, values)
        return compare_items(run, bundle, table, values)


def _of_scores(run: Run, bundle: Bundle, table: pa.Table, values: pa.Table) -> Comparison:
    parts, tasks = run.parts, run.parts.train_module.objective.tasks
    assert tasks is not None
    spec = evaluation_spec(parts, run.runtime)
    labelled = set(reading(spec, table.column_names).uses) <= set(table.column_names)
    metrics = tasks.wanted_of_tasks(run.config.evaluation)
    of_run, of_bundle = Measured(tasks, metrics), Measured(tasks, metrics)
    scores = bundle.score(values)
    got = {name: as_array(scores[f"predicted_{name}"]) for name in tasks.scored}
    wanted: dict[str, list[NDArray[Any]]] = {name: [] for name in got}
    first = 0
    for batch in batches_of(run, table, spec if labelled else prediction_spec(parts)):
        output = parts.train_module.model(parts.train_module.stage(batch))
        for name, values_of_run in tasks.calibrated(output).items():
            wanted[name].append(values_of_run.float().cpu().numpy())
        if labelled:
            of_run.add(output, batch)
            of_bundle.add_scores(
                {
                    name: Scores(torch.from_numpy(got[name][first : first + batch.rows].copy()), *targets)
                    for name, targets in tasks.targets(batch).items()
                },
                batch,
            )
        first += batch.rows
    differences = {f"predicted_{name}": largest(np.concatenate(wanted[name]), got[name]) for name in got}
    if not labelled:
        return Comparison(table.num_rows, differences)
    one, other = (measured.finish(run.runtime).metrics for measured in (of_run, of_bundle))
    return Comparison(
        table.num_rows, differences, {name: (one[name], other[name]) for name in one}, tasks.task_metrics(metrics)
    )


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
