"""`Bundle`: scores rows as their caller has them, with NumPy, Arrow and onnxruntime (or torch) alone."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rechub_dist.config.strict_yaml import read_yaml
from rechub_dist.data.columns.fit import column_names
from rechub_dist.data.columns.vocabulary import Vocabulary, hold
from rechub_dist.data.columns.window import Window
from rechub_dist.data.given import like, windows
from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError
from rechub_dist.features import CrossFeature, DenseFeature, Feature, FeatureSchema, SequenceFeature, SparseFeature
from rechub_dist.inference.bundle.candidates import Candidates, Piece
from rechub_dist.inference.bundle.catalogue import Catalogue, fixed, numbers
from rechub_dist.inference.bundle.deltas import read_state, state_tables
from rechub_dist.inference.bundle.engines import Computation, Engine, engine_of, open_graph
from rechub_dist.inference.bundle.index import IndexManifest, open_index
from rechub_dist.inference.bundle.manifest import (
    ITEMS,
    MANIFEST,
    SCHEMA,
    TABLES,
    FileRecord,
    GraphRecord,
    check_content,
)
from rechub_dist.inference.bundle.search import Flags, Floats, Pairs
from rechub_dist.inference.bundle.tables import padded, pooled
from rechub_dist.inference.bundle.whole import ids_of, whole_inputs
from rechub_dist.schema import parse_schema

BATCH: Final = 4096  # rows that are scored at once


class Bundle:
    """A trained model with all that turns a row into its scores.

    Rows are a dict of columns, an Arrow table, a pandas or polars DataFrame. Their columns are those of the data that
    training was prepared from: values, not ids. Scores come as what the rows are.

    Args:
        folder: of the bundle, or one that `rechub-dist publish` writes to.
        deltas: folders of deltas that follow it, in order.
        threads: that compute one call; default: as many as there are cores. Torch has one such number for the process.
        check: compare the tables, of items too, with their checksums, which reads them whole.
        index: a folder that `rechub-dist index` has written of this bundle's items, for `retrieve` to search.
        engine: what computes the graphs: `onnx` (onnxruntime) or `torch`; default: the first of them that the bundle
            has graphs for and that is installed.
        former: an open bundle; files of it that are still the same are not compared again.

    Raises:
        UserError: it is no bundle, is damaged or of a later format, a delta does not follow, what computes its graphs
            is missing, or the index is of other items.
    """

    def __init__(
        self,
        folder: str | Path,
        deltas: Iterable[str | Path] = (),
        *,
        threads: int | None = None,
        check: bool = False,
        index: str | Path | None = None,
        engine: Engine | None = None,
        former: Bundle | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._state = read_state(self.folder, map(Path, deltas))
        self.manifest, self._files = self._state.manifest, self._state.files
        graphs = self.manifest.graphs
        self.engine: Engine = engine_of(self.folder, graphs, engine)
        files = {name: self._files[str(graph.file_for(self.engine))] for name, graph in graphs.items()}
        left_out = {self._files[name] for name in self.manifest.apart(self.engine)}
        left_out |= set() if check else self._state.big_files
        self._compared = {_stamp(path, file) for path, file in self._state.records.items() if path not in left_out}
        for _, path, file in self._compared - (set() if former is None else former._compared):
            check_content(path, file)
        self.schema: FeatureSchema = parse_schema(read_yaml(self._files[SCHEMA]), str(self.folder))
        self._check_schema()
        self._vocabularies: list[Vocabulary] = []
        self.schema = replace(self.schema, features=tuple(map(self._with_vocabulary, self.schema.features)))
        self._tables = state_tables(self._state)
        self._lookups = {lookup.name: lookup for lookup in self.manifest.lookups}
        self._computations = {name: open_graph(self.engine, file, threads) for name, file in files.items()}
        for name, graph in graphs.items():
            self._check_graph(graph, self._computations[name], files[name])
        self._threads = threads
        if index is not None:
            self.use_index(index)

    def _check_schema(self) -> None:
        """Refuse a schema that is not that of the manifest, or that names files from elsewhere."""
        where = self._files[SCHEMA]
        features = {feature.name: feature for feature in self.schema.features}
        features |= {f.name: f for c in self.schema.features if isinstance(c, CrossFeature) for f in c.inputs}
        for feature in features.values():
            path = getattr(feature, "vocabulary", None)
            known = {str(self.folder / name) for name in self.manifest.files}
            if path is not None and path not in known:
                raise UserError(f"{where}: vocabulary {path!r} is none of the bundle's files; export the bundle again")
        tables = self.manifest.tables
        for lookup in self.manifest.lookups:
            found = features.get(lookup.feature)
            if found is None or isinstance(found, DenseFeature) or found.table.rows > tables[lookup.table].rows:
                raise UserError(f"{where}: feature {lookup.feature!r} does not fit its table; export the bundle again")

    def _with_vocabulary(self, feature: Feature) -> Feature:
        """The feature with its vocabulary as it is now: a later export may replace the folder."""
        if isinstance(feature, CrossFeature):
            inputs = tuple(self._with_vocabulary(one) for one in feature.inputs)
            return replace(feature, inputs=tuple(one for one in inputs if isinstance(one, SparseFeature)))
        if not isinstance(feature, SparseFeature | SequenceFeature) or feature.vocabulary is None:
            return feature
        file = str(Path(feature.vocabulary).relative_to(self.folder))
        name = f"{file} of bundle {self.manifest.seal[:12]}"
        self._vocabularies.append(hold(str(self._files[file]), name))
        return replace(feature, vocabulary=name)

    def _check_graph(self, graph: GraphRecord, computation: Computation, where: Path) -> None:
        """Refuse a graph that does not read what the manifest says it reads."""
        dense = {f.name: f.dim for f in self.schema.features if isinstance(f, DenseFeature)}
        dims: list[int | None] = [self.manifest.tables[self._lookups[name].table].dim for name in graph.pooled]
        for name in graph.sequences:
            dims += [self.manifest.tables[self._lookups[name].table].dim, None]
        for name in graph.dense:
            if name not in dense:
                raise UserError(f"{self._files[SCHEMA]} has no dense feature {name!r}, which {where} reads")
            dims.append(dense[name])
        if computation.widths != dims or computation.outputs != len(graph.outputs):
            raise UserError(f"{where} does not read and answer what {MANIFEST} says; export the bundle again")

    def __repr__(self) -> str:
        return f"<Bundle of {self.manifest.model}, step {self.manifest.step}, in {self.folder}>"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that rows to score must have; of a recall model those of users."""
        return self.columns_of("score" if "score" in self.manifest.graphs else "user")

    def columns_of(self, part: str) -> tuple[str, ...]:
        """The columns that a graph's rows must have; part is `score`, `user` or `item`."""
        return tuple(column_names(self._specs[part]))

    def score(self, rows: Any) -> Any:
        """The probability (or value) of each label, float32: columns `predicted_<label>`, of C classes lists of C.

        Raises:
            UserError: a row does not fit, or the model is a recall model.
        """
        if "score" not in self.manifest.graphs:
            raise UserError(f"score: {self.manifest.model} is a recall model; use retrieve or vectors")
        names = [f"predicted_{name}" for name in self.manifest.graphs["score"].outputs]
        pieces = [dict(zip(names, outputs, strict=True)) for outputs in self._run("score", rows)]
        found = {name: numbers(np.concatenate([piece[name] for piece in pieces])) for name in names}
        return like(rows, pa.table(found))

    def score_candidates(self, user: Any, candidates: Any) -> Any:
        """`score` of the candidates, each with the columns of the one row `user`, which are converted once.

        Raises:
            UserError: as `score`; `user` is not one row, or a column is in both.
        """
        if "score" not in self.manifest.graphs:
            raise UserError(f"score: {self.manifest.model} is a recall model; use retrieve or vectors")
        names = [f"predicted_{name}" for name in self.manifest.graphs["score"].outputs]
        outputs = [
            self._graph("score", pieces, rows) for rows, pieces in self._candidates.pieces(user, candidates, BATCH)
        ]
        found = zip(names, (numbers(np.concatenate(pieces)) for pieces in zip(*outputs, strict=True)), strict=True)
        return like(candidates, pa.table(dict(found)))

    def vectors(self, side: str, rows: Any) -> Any:
        """A recall model's vectors: `vectors`, several a row, of users; `vector` of items.

        Raises:
            UserError: a row does not fit, or the model is no recall model.
        """
        if side not in ("user", "item"):
            raise UserError(f"vectors: the side is 'item' or 'user', not {side!r}")
        if side not in self.manifest.graphs:
            raise UserError(f"vectors: {self.manifest.model} is no recall model; use score")
        found = self._run(side, rows)
        if side == "item":
            return like(rows, pa.table({"vector": fixed(np.concatenate([vectors for (vectors,) in found]))}))
        users = [lists_of_vectors(vectors, mask) for vectors, mask in found]
        return like(rows, pa.table({"vectors": pa.concat_arrays(users)}))

    def retrieve(self, users: Any, k: int = 10, *, where: str | None = None) -> Any:
        """The `k` best items of the whole catalogue for each row: `predicted_items`, best first, `predicted_scores`.

        Items of the row's history are left out, unless the run's `evaluation.exclude_seen` is false; so is the id that
        stands for unknown items.

        Args:
            users: the rows.
            k: at least 1.
            where: an SQL expression that must be true of an item, over the columns of the bundle's table of items:
                `category = 'x'`.

        Raises:
            UserError: a row does not fit, the model is no recall model, or there is no such column.
        """
        if k < 1:
            raise UserError(f"retrieve: k is {k}, must be at least 1")
        pieces = [self.best(window, k, where) for window in windows(users, self.user_spec(), BATCH)]
        return like(users, pa.concat_tables(pieces).combine_chunks())

    def best(self, window: Window, k: int, where: str | None = None) -> pa.Table:
        """`retrieve` for a window of `user_spec()`."""
        vectors, live = self.user_vectors(window)
        ids, scores = self.catalogue.best(vectors, live, k, self.seen(window), where)
        there = ids >= 0
        offsets = np.zeros(window.rows + 1, np.int32)
        np.cumsum(there.sum(axis=1), out=offsets[1:])
        return pa.table(
            {
                "predicted_items": pa.ListArray.from_arrays(pa.array(offsets), self.catalogue.values_of(ids[there])),
                "predicted_scores": pa.ListArray.from_arrays(pa.array(offsets), pa.array(scores[there])),
            }
        )

    def user_vectors(self, window: Window) -> tuple[Floats, Flags]:
        """The vectors of a window of `user_spec()`, float32 [B, Q, D], and which are live, bool [B, Q]."""
        vectors, live = self.of_window("user", window)
        return vectors, live

    @cached_property
    def catalogue(self) -> Catalogue:
        """The items of a recall model. Raises UserError for another model."""
        if "item" not in self.manifest.graphs:
            raise UserError(f"retrieve: {self.manifest.model} is no recall model; use score")
        item = next((f for f in self.schema.features if f.name == self.manifest.item), None)
        if not isinstance(item, SparseFeature):
            raise UserError(f"{self._files[SCHEMA]} has no feature {self.manifest.item!r}; export the bundle again")
        graph = self.manifest.graphs["item"]
        twin = copy(self)  # were it the bundle itself, each would hold the other, and the tables, after the last use
        read = {self._lookups[name].feature for name in (*graph.pooled, *graph.sequences)}
        return Catalogue(
            self.folder,
            item,
            self._specs["item"],
            ids_alone=not graph.dense and read <= {item.name},
            table=self._files.get(ITEMS),
            vectors_of=lambda window: twin.of_window("item", window)[0],
        )

    def use_index(self, index: str | Path) -> IndexManifest:
        """Have `retrieve` search the index in a folder from now on; returns what it is.

        Raises:
            UserError: as the constructor; `retrieve` does what it did.
        """
        opened = open_index(Path(index), self._threads)
        self.catalogue.use(opened, self.fingerprint, str(index))
        return opened.manifest

    @property
    def fingerprint(self) -> str:
        """What identifies the items' vectors: the checksums of all that they are made of."""
        item = self.manifest.graphs["item"].files[0]
        names = sorted({TABLES, SCHEMA, item, ITEMS} & self.manifest.files.keys())
        return "-".join(self.manifest.files[name].checksum for name in names)

    def user_spec(self, *, encoded: bool = False) -> BatchSpec:
        """What is read of a user's row; `encoded`: of one that holds ids, as the data set's own files do."""
        _ = self.catalogue  # refuses other models
        return self._stored_specs["user"] if encoded else self._specs["user"]

    def _spec(self, part: str) -> BatchSpec:
        """What is read of a row for a graph."""
        graph = self.manifest.graphs[part]  # type: ignore[index]
        names = {self._lookups[name].feature for name in (*graph.pooled, *graph.sequences)}
        if part == "user" and self.manifest.history is not None:
            names.add(self.manifest.history)
        if part == "item" and self.manifest.item is not None:
            names.add(self.manifest.item)
        features = [f for f in self.schema.features if f.name in names]
        inputs = [f for cross in features if isinstance(cross, CrossFeature) for f in cross.inputs]
        every = {f.name: f for f in (*inputs, *features)}
        dense = {f.name: f for f in self.schema.features if isinstance(f, DenseFeature)}
        return BatchSpec(
            features=tuple(f for f in every.values() if not isinstance(f, DenseFeature)),
            dense=tuple(dense[name] for name in graph.dense),
            derived=self.schema.derived,
            aligned=tuple(tuple(name for name in group if name in every) for group in self.manifest.aligned),
        )

    def _run(self, part: str, rows: Any) -> list[list[NDArray[Any]]]:
        return [self.of_window(part, window) for window in windows(rows, self._specs[part], BATCH)]

    def of_window(self, part: str, window: Window) -> list[NDArray[Any]]:
        """The outputs of a graph for the rows of a window."""
        return self._graph(part, [Piece(self._stored_specs[part], window)], window.rows)

    @cached_property
    def _stored_specs(self) -> dict[str, BatchSpec]:
        return {part: self._spec(part) for part in self.manifest.graphs}

    @cached_property
    def _specs(self) -> dict[str, BatchSpec]:
        return {part: spec.of_values() for part, spec in self._stored_specs.items()}

    @cached_property
    def _candidates(self) -> Candidates:
        return Candidates(self.spec("score"))

    def spec(self, part: str) -> BatchSpec:
        """What is read of a row for a graph; part is `score`, `user` or `item`."""
        return self._specs[part]

    def whole_inputs(self, rows: Any, part: str = "score") -> dict[str, NDArray[Any]]:
        """What the bundle's whole graph of a part, `score`, `user` or `item`, takes: its inputs by name, in order.

        Raises:
            UserError: a row does not fit, or the bundle has no such graph.
        """
        record = self.manifest.whole.get(part)  # type: ignore[call-overload]
        if record is None:
            raise UserError(f"{self.folder} has no whole graph of {part!r}; export it with --format onnx,whole")
        spec = self._specs[part]
        [window] = windows(rows, spec, 1 << 40)  # all at once
        return whole_inputs(record, spec, window)

    def _graph(self, part: str, pieces: list[Piece], rows: int) -> list[NDArray[Any]]:
        """The outputs of a graph for the rows that the pieces make."""
        graph: GraphRecord = self.manifest.graphs[part]  # type: ignore[index]
        inputs: list[NDArray[Any]] = []
        for name in graph.pooled:
            lookup = self._lookups[name]
            piece = _piece_with(lookup.feature, pieces)
            ids, offsets, weights = ids_of(piece.window, lookup.feature)
            mean = lookup.pooling == "mean"
            inputs.append(piece.spread(pooled(self._tables[lookup.table], ids, offsets, weights, mean), rows))
        several = [(self._lookups[name], _piece_with(self._lookups[name].feature, pieces)) for name in graph.sequences]
        ragged = [_several(piece.window, lookup.feature) for lookup, piece in several]
        longest = max([1, *(int(np.diff(offsets).max(initial=0)) for _, offsets in ragged)])
        for (lookup, piece), (ids, offsets) in zip(several, ragged, strict=True):
            found = padded(self._tables[lookup.table], ids, offsets, graph.length or longest)
            inputs += [piece.spread(array, rows) for array in found]
        dense = {name: array for piece in pieces for name, array in piece.dense(rows)}
        inputs += [dense[name] for name in graph.dense]
        compute = self._computations[part]  # type: ignore[index]
        if not rows:  # for which onnxruntime's GRU would end the process
            return [found[:0] for found in compute([np.zeros((1, *one.shape[1:]), one.dtype) for one in inputs])]
        return compute(inputs)

    def seen(self, window: Window) -> Pairs | None:
        """The ids of the items that `retrieve` leaves out for a window of `user_spec()`; None for none."""
        if self.manifest.history is None or not self.manifest.exclude_seen:
            return None
        return Pairs.of(*_several(window, self.manifest.history))


def _stamp(path: Path, file: FileRecord) -> tuple[tuple[int, int], Path, FileRecord]:
    """What is the same as long as nobody has changed a file, and what it should hold."""
    found = path.stat()
    return (found.st_ino, found.st_mtime_ns), path, file


def _piece_with(feature: str, pieces: list[Piece]) -> Piece:
    return next(piece for piece in pieces if feature in piece.window.flat or feature in piece.window.ragged)


def _several(window: Window, feature: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """A feature's ids, and its offsets [B + 1]."""
    ids, offsets, _ = ids_of(window, feature)
    return ids, np.arange(window.rows + 1) if offsets is None else offsets


def lists_of_vectors(vectors: Floats, mask: Flags) -> pa.Array:
    """The live ones of [B, Q, D] as B lists of vectors."""
    offsets = np.zeros(len(vectors) + 1, np.int32)
    np.cumsum(mask.sum(axis=1), out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), fixed(vectors[mask]))
