"""Batch prediction: what a model says of each row of a data set, as Parquet."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rechub_dist.assembly.parts import Parts, build
from rechub_dist.assembly.readers import prediction_reader
from rechub_dist.batch import Batch
from rechub_dist.config import RunConfig
from rechub_dist.data.columns.values import one_array
from rechub_dist.data.columns.vocabulary import Vocabulary, vocabulary_of
from rechub_dist.data.parquet.files import DataFile, OpenFiles
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.outputs import claim
from rechub_dist.data.parquet.overlap import refuse_overlap
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.stored import Stored, StoredRows
from rechub_dist.distributed.runtime import Runtime, device_type, runtime
from rechub_dist.embedded import Jagged
from rechub_dist.errors import UserError, nearest
from rechub_dist.evaluation.batches import agreed_batches, on_device
from rechub_dist.evaluation.evaluate import load_best
from rechub_dist.evaluation.ranking import catalogue_of, seen_items, with_missing, with_no_weights
from rechub_dist.features import SparseFeature
from rechub_dist.inference.bundle.catalogue import numbers
from rechub_dist.inference.written import PartFile, finish, part_name
from rechub_dist.metrics.ranking import Catalogue, best_of_parts, top_items
from rechub_dist.objectives import Ranking
from rechub_dist.reporting.reporter import Reporter
from rechub_dist.skips import Tally


@dataclass(frozen=True)
class Prediction:
    """What to predict.

    Attributes:
        data: Parquet file, folder, glob or address; labels are not needed, nor, for a recall model, items.
        out: folder or address for `part-<rank>.parquet` and, when all are written, `_SUCCESS`; new, empty, or with the
            parts of a prediction that was cut off, which are removed: those that its mark names, and nothing else.
        keep: columns of `data` to copy.
        top_k: items a row, of a recall model.
    """

    data: str
    out: str
    keep: tuple[str, ...] = ()
    top_k: int = 100


def predict_run(config: RunConfig, wanted: Prediction) -> tuple[int, int]:
    """Predict by a run's best checkpoint (else its newest): its step, and the number of rows; called on every rank.

    Raises:
        UserError: the run has no checkpoint, the data does not fit it, or the output cannot be written.
    """
    device = device_type(config.device)
    with runtime(device, config.distributed.timeout_seconds, config.distributed.threads) as rt:
        parts = rt.together(lambda: build(config, device=rt.device.type, world_size=rt.world_size))
        reader = prediction_reader(config, parts, rt, wanted.data)
        step = load_best(config, parts, rt)
        report = Reporter(None, quiet=not rt.is_main)
        report.start(f"predicting {wanted.data}", reader.steps)
        rows = predict(wanted, parts, reader, rt, report)
        report.close()
        return step, rows


def predict(wanted: Prediction, parts: Parts, reader: ParquetReader, runtime: Runtime, report: Reporter) -> int:
    """Predict each row of `reader` once; returns their number over all ranks. Called on every rank.

    A row of the output has `source_file` and `source_row` (int64, within the file), the columns to keep, and

    - `predicted_<name>`, float32, for each label (and what else the objective scores): a probability, the value of
      a regression, or of a label of C classes a list of fixed size, C, of their probabilities;
    - of a recall model `predicted_items` and `predicted_scores`, lists of at most `top_k`, the best first: the
      catalogue's items (but not the id that stands for unknown ones) without those in the row's history, if
      evaluation leaves them out as well. Items are in the
      words of their vocabulary where they have one, else table ids; those of equal scores stand in any order. A user
      without a live vector has none.

    Raises:
        UserError: a column to keep that is not there or there twice, a folder that holds other files or overlaps the
            data, or a store that fails.
    """
    output = runtime.together(lambda: _Output(wanted, parts, reader.manifest, runtime))
    runtime.from_main(output.make_room)
    parts.train_module.eval()
    stored = StoredRows(reader, 0)
    with torch.no_grad():
        catalogue = catalogue_if_any(parts, runtime)
        batches = on_device(agreed_batches(reader, runtime, report.advance, lambda: False, Tally(), []), runtime)
        for number, batch in enumerate(batches):
            found = predicted(parts, batch, catalogue, wanted.top_k, runtime)
            runtime.together(lambda n=number, columns=found: output.write(stored.of(n), columns))  # type: ignore[misc]
    runtime.together(output.close)
    runtime.from_main(output.finish)
    return reader.rows


def catalogue_if_any(parts: Parts, runtime: Runtime) -> Catalogue | None:
    """This rank's part of the items that a recall model recommends; None for other models. Collective.

    Of a feature with a vocabulary these are the ids that a value stands for: neither that of unknown items, nor those
    that are reserved.
    """
    ranking = parts.train_module.objective.ranking
    if ranking is None:
        return None
    catalogue, known = catalogue_of(parts, ranking, runtime), known_items(ranking)
    return catalogue if known is None else catalogue.only(known)


def known_items(ranking: Ranking) -> Tensor | None:
    """The ids of items that a value stands for, ascending; None where ids have no vocabulary."""
    vocabulary = _vocabulary(ranking)
    return None if vocabulary is None else torch.from_numpy(np.unique(vocabulary.ids))


def predicted(
    parts: Parts, batch: Batch, catalogue: Catalogue | None, top_k: int, runtime: Runtime
) -> dict[str, pa.Array]:
    """The columns that `predict` adds, for the rows of a batch (of `prediction_spec`). Collective."""
    if catalogue is None:
        return _scores(parts, batch)
    return _items(parts, batch, catalogue, top_k, runtime)


def user_vectors(parts: Parts, batch: Batch) -> tuple[Tensor, Tensor]:
    """A recall model's user vectors [B, Q, D], and which are live, bool [B, Q], of a batch of `prediction_spec`."""
    ranking = parts.train_module.objective.ranking
    assert ranking is not None
    there = tuple(feature for feature in parts.spec.dense if feature not in ranking.dense)
    dense = with_missing(batch.dense, there, parts.spec.dense)
    whole = replace(batch, dense=dense, id_weights=with_no_weights(parts.spec, batch.id_weights, dense))
    return ranking.user(parts.train_module.stage(whole))


def _scores(parts: Parts, batch: Batch) -> dict[str, pa.Array]:
    train_module = parts.train_module
    found = train_module.objective.calibrated(train_module.model(train_module.stage(batch)))
    return {f"predicted_{name}": numbers(values.float().cpu().numpy()) for name, values in found.items()}


def _items(parts: Parts, batch: Batch, catalogue: Catalogue, top_k: int, runtime: Runtime) -> dict[str, pa.Array]:
    ranking = parts.train_module.objective.ranking
    assert ranking is not None
    user, mask = user_vectors(parts, batch)
    seen = seen_items(ranking, batch) if parts.config.evaluation.exclude_seen else None
    hidden = None if seen is None else Jagged(runtime.gather(seen.values), runtime.gather(seen.lengths))
    ids, scores = top_items(runtime.gather(user), runtime.gather(mask), catalogue, top_k, hidden)
    best_ids, best = best_of_parts(runtime.gather(ids), runtime.gather(scores), runtime.world_size, top_k)
    first = sum(runtime.gather_list([batch.rows])[: runtime.rank])
    own = slice(first, first + batch.rows)
    ids, scores = best_ids[own].cpu(), best[own].cpu()
    live = scores > -torch.inf
    offsets = np.zeros(batch.rows + 1, np.int32)
    np.cumsum(live.sum(dim=1).numpy(), out=offsets[1:])
    return {
        "predicted_items": pa.ListArray.from_arrays(pa.array(offsets), words(ids[live], ranking)),
        "predicted_scores": pa.ListArray.from_arrays(pa.array(offsets), pa.array(scores[live].numpy())),
    }


def words(ids: Tensor, ranking: Ranking) -> pa.Array:
    """Item ids, or the values that a vocabulary gave them to, even where the files hold the ids."""
    vocabulary = _vocabulary(ranking)
    if vocabulary is None:
        return pa.array(ids.numpy())
    place = np.full(ranking.item.table.rows, -1)
    place[vocabulary.ids] = np.arange(len(vocabulary.ids))
    places = place[ids.numpy()]
    return vocabulary.values.take(pa.array(places, mask=places < 0))


def _vocabulary(ranking: Ranking) -> Vocabulary | None:
    feature = ranking.item.feature
    assert isinstance(feature, SparseFeature)
    return vocabulary_of(replace(feature, encoded=False))


class Origins:
    """Where rows come from, and the columns of theirs to keep.

    Raises:
        UserError: a column to keep that is not there, is there twice, or has the name of a predicted one.
    """

    def __init__(self, keep: tuple[str, ...], parts: Parts, manifest: Manifest) -> None:
        names = manifest.schema.names
        for column in keep:
            if (count := names.count(column)) > 1:
                raise UserError(
                    f"--keep {column}: {manifest.path} has {count} columns of this name; rename one of them"
                )
            if column not in names:
                raise UserError(f"--keep {column}: {manifest.path} has no such column; {nearest(column, names)}")
        made = _made(parts)
        for column in keep:
            if column in made:
                raise UserError(f"--keep {column}: a column of this name is what is predicted; leave it out")
        self._keep = list(keep)
        self._files = {file.path: file for file in manifest.files}
        self._opened = OpenFiles()
        self._group: tuple[str, int, pa.Table] | None = None

    def of(self, stored: list[Stored], columns: dict[str, pa.Array]) -> pa.Table | None:
        """The rows that `stored` names, in its order, with `columns` beside what is their own; None for no rows."""
        pieces = [self._own(piece) for piece in stored if len(piece.rows)]
        if not pieces:
            return None
        table = pa.concat_tables(pieces)
        for name, values in columns.items():
            table = table.append_column(name, values)
        return table

    def close(self) -> None:
        """Close the files."""
        self._opened.close()

    def _own(self, piece: Stored) -> pa.Table:
        file = self._files[piece.path]
        first = sum(file.counts[: piece.group])
        rows = pa.array(piece.rows)
        own = {
            "source_file": pa.repeat(piece.path, len(rows)),
            "source_row": pa.array(first + piece.rows),
        }
        if self._keep:
            kept = self._read(file, piece.group).take(rows)
            own |= {name: one_array(kept, name) for name in self._keep}
        return pa.table(own)

    def _read(self, file: DataFile, group: int) -> pa.Table:
        if self._group is None or self._group[:2] != (file.path, group):
            self._group = None  # first let go of the one before
            self._group = (file.path, group, self._opened.read(file.whole(), group, self._keep))
        return self._group[2]


class _Output:
    """This rank's file."""

    def __init__(self, wanted: Prediction, parts: Parts, manifest: Manifest, runtime: Runtime) -> None:
        self._origins = Origins(wanted.keep, parts, manifest)
        self._where = wanted.out
        self._storage = parts.config.storage
        self._file = PartFile(wanted.out, runtime.rank, "predict", self._storage)
        self._parts = [part_name(rank) for rank in range(runtime.world_size)]
        refuse_overlap(wanted.out, [wanted.data, *(file.path for file in manifest.files)])

    def make_room(self) -> None:
        """Make the folder, or remove from it what a prediction that was cut off has left; before any rank writes."""
        claim(self._where, "predictions", self._parts, self._storage)

    def write(self, stored: list[Stored], columns: dict[str, pa.Array]) -> None:
        """The predictions of the rows that `stored` names, in its order."""
        table = self._origins.of(stored, columns)
        if table is not None:
            self._file.write(table)

    def close(self) -> None:
        """Write what is left."""
        self._origins.close()
        self._file.close()

    def finish(self) -> None:
        """Mark the output as whole; after all ranks have closed theirs."""
        finish(self._where, "predict", self._storage)


def _made(parts: Parts) -> set[str]:
    """The names of the columns that are made."""
    objective = parts.train_module.objective
    names = ("items", "scores") if objective.tasks is None or objective.ranking else objective.tasks.scored
    return {"source_file", "source_row", *(f"predicted_{name}" for name in names)}
