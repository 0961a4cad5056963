"""The items of a recall bundle: their ids, values, columns and vectors, and the best of them for users."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rechub_dist.data.columns.fit import reading
from rechub_dist.data.columns.values import one_array
from rechub_dist.data.columns.vocabulary import Vocabulary, vocabulary_of
from rechub_dist.data.columns.window import Window
from rechub_dist.data.given import windows
from rechub_dist.data.parquet.footers import UNREADABLE
from rechub_dist.data.parquet.pages import open_parquet
from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError, nearest, one_line
from rechub_dist.features import SparseFeature
from rechub_dist.inference.bundle.index import Index, by_index
from rechub_dist.inference.bundle.search import Flags, Floats, Ints, Pairs, exact
from rechub_dist.inference.bundle.where import rows_where

CHUNK: Final = 8192  # items whose vectors are computed at once
_FEW: Final = 20_000  # items among which exact search is at least as fast as an index
_SHARE: Final = 0.05  # of the catalogue, below which an index that has to pass the others by finds too few
_FILTERS: Final = 8  # whose items are remembered

ITEM, VECTOR = "item", "vector"  # the columns of a batch of items


@dataclass
class Catalogue:
    """The items that a recall model recommends: those that a value of the vocabulary, where there is one, stands for.

    An id that none stands for (that of unknown items, or one that is reserved) is no item, and never recommended.
    Items are numbered in the order of the bundle's table of items, or of their ids; these numbers are their places.

    Attributes:
        folder: of the bundle.
        item: the feature of the item's id.
        spec: what an item's vector is made of, of rows that hold values.
        ids_alone: whether that is its id alone.
        table: the bundle's table of items; None where it has none.
        vectors_of: the vectors of a window's items, float32 [n, D].
    """

    folder: Path
    item: SparseFeature
    spec: BatchSpec
    ids_alone: bool
    table: Path | None
    vectors_of: Callable[[Window], Floats]

    def __post_init__(self) -> None:
        self._filters: dict[str, Ints] = {}
        # held open: a later export may replace the folder
        self._held = None if self.table is None else self.table.open("rb")
        self._index: Index | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def use(self, index: Index, fingerprint: str, where: str) -> None:
        """Search an index from now on.

        Args:
            index: of these items' vectors.
            fingerprint: what identifies these.
            where: its folder, for errors.

        Raises:
            UserError: it is of others.
        """
        places = self.find(index.items) if index.manifest.source == fingerprint else np.empty(0, np.int64)
        if not np.array_equal(np.sort(places), np.arange(len(self))):
            raise UserError(f"{where} is an index of other items, or of another model; make one of {self.folder}")
        self._index = replace(index, renumber=places)

    def batches(self, columns: Sequence[str] = (), shard: int = 0, shards: int = 1) -> Iterator[pa.Table]:
        """The items in batches, in the order of their places: `item`, `columns` of their table, `vector`.

        Args:
            columns: to copy.
            shard, shards: of so many shares of the items, the one to give.

        Raises:
            UserError: there is no such column, or the items need columns that the bundle has not.
        """
        self.check_columns(columns)
        for window, table in self._windows(columns, shard, shards):
            values = {name: one_array(table, name) for name in columns}
            yield pa.table({ITEM: self.values_of(self._ids(window)), **values, VECTOR: fixed(self.vectors_of(window))})

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raise UserError if `batches` cannot copy these columns."""
        for name in columns:
            if name in (ITEM, VECTOR):
                raise UserError(f"--keep {name}: a column of this name is what is written; leave it out")
            if name not in self.columns:
                raise UserError(f"--keep {name}: the bundle's items have no such column; {nearest(name, self.columns)}")

    @cached_property
    def ids(self) -> Ints:
        """The id of the item at each place, int64 [N]."""
        if self.table is None:
            return self._known
        spec = BatchSpec(features=(replace(self.item, encoded=False),), derived=self.spec.derived)
        found = [self._ids(window) for window, _ in self._table_windows(spec, (), 0, 1)]
        return np.concatenate([np.empty(0, np.int64), *found])

    @cached_property
    def places(self) -> Ints:
        """The place of each id, int64 [rows of the item's table]; -1 for an id of no item."""
        places = np.full(self.item.table.rows, -1)
        places[self.ids] = np.arange(len(self.ids))
        return places

    @cached_property
    def vectors(self) -> Floats:
        """The vectors of all items, float32 [N, D], computed on first use.

        Raises:
            UserError: as `batches`.
        """
        found = list(self.blocks())
        return np.concatenate(found) if found else np.empty((0, 1), np.float32)

    def blocks(self) -> Iterator[Floats]:
        """The same vectors block by block, in the order of the items' places: float32 [n, D] each."""
        for window, _ in self._windows((), 0, 1):
            yield self.vectors_of(window)

    def best(
        self, users: Floats, live: Flags, k: int, seen: Pairs | None = None, where: str | None = None
    ) -> tuple[Ints, Floats]:
        """The ids [B, k] of the best items of users [B, Q, D], best first, and their scores; -1 and -inf for none.

        Args:
            users: float32.
            live: bool [B, Q], which of their vectors count.
            k: at least 1.
            seen: ids of items to leave out.
            where: an SQL expression over an item's columns, which must be true of it.

        Raises:
            UserError: no such expression, or as `batches`.
        """
        among = None if where is None else self.where(where)
        hidden = None if seen is None else Pairs(seen.users, self.places[seen.items])
        few = among is not None and len(among) <= max(_FEW, _SHARE * len(self))
        if self._index is None or few:
            places, scores = exact(users, live, self.vectors, k, hidden, among)
        else:
            places, scores = by_index(self._index, users, live, k, hidden, among)
            total = len(self) if among is None else len(among)
            short = live.any(axis=1) & ((places >= 0).sum(axis=1) < min(k, total))
            if short.any():  # an index passes over items; there may be more
                rows = np.flatnonzero(short)
                own = None if hidden is None else hidden.of_users(rows)
                places[rows], scores[rows] = exact(users[rows], live[rows], self.vectors, k, own, among)
        return np.where(places < 0, -1, self.ids[np.maximum(places, 0)]) if len(self) else places, scores

    def where(self, expression: str) -> Ints:
        """The places, int64, ascending, of the items of which an SQL expression over their columns is true.

        Raises:
            UserError: it is no such expression, or the bundle has no table of items.
        """
        if expression not in self._filters:
            if self._held is None:
                raise UserError("where: the bundle has no table of items to filter by: the data had none in items/")
            found = rows_where(Path(f"/dev/fd/{self._held.fileno()}"), expression)
            while len(self._filters) >= _FILTERS:
                self._filters.pop(next(iter(self._filters)), None)
            self._filters[expression] = found
        return self._filters[expression]

    def values_of(self, ids: NDArray[Any]) -> pa.Array:
        """Item ids as the values that the vocabulary gave them to, where there is one."""
        if self._vocabulary is None:
            return pa.array(ids)
        return self._vocabulary.values.take(pa.array(self._entries[ids]))

    def find(self, values: pa.Array) -> Ints:
        """The places of items by their values, int64 [n]; -1 for what is none."""
        if self._vocabulary is not None:
            ids = self._vocabulary.find(values)
        else:
            ids = values.to_numpy(zero_copy_only=False).astype(np.int64)
        within = (ids >= 0) & (ids < self.item.table.rows)
        return np.where(within, self.places[np.where(within, ids, 0)], -1)

    def first_windows(self, count: int) -> list[Window]:
        """The first items, at least `count` of them, if there are as many. Raises UserError as `batches`."""
        found: list[Window] = []
        for window, _ in self._windows((), 0, 1):
            found.append(window)
            if sum(one.rows for one in found) >= count:
                break
        return found

    @property
    def columns(self) -> list[str]:
        """The columns of the table of items; none where the bundle has no such table."""
        if self.table is None:
            return []
        with _opened(self.table) as file:
            return list(file.schema_arrow.names)

    @cached_property
    def _vocabulary(self) -> Vocabulary | None:
        return vocabulary_of(replace(self.item, encoded=False))

    @cached_property
    def _entries(self) -> Ints:
        """The entry of the vocabulary that has each id."""
        assert self._vocabulary is not None
        entries = np.zeros(self.item.table.rows, np.int64)
        entries[self._vocabulary.ids] = np.arange(len(self._vocabulary.ids))
        return entries

    @cached_property
    def _known(self) -> Ints:
        if self._vocabulary is None:
            return np.arange(self.item.table.rows)
        return np.unique(self._vocabulary.ids)

    def _ids(self, window: Window) -> Ints:
        if self.item.name in window.flat:
            return np.asarray(window.ids[window.flat.index(self.item.name)]).astype(np.int64)
        raise UserError(f"{self.table}: column {self.item.source!r} has not one item in each row; export again")

    def _windows(self, columns: Sequence[str], shard: int, shards: int) -> Iterator[tuple[Window, pa.Table]]:
        if self.table is not None:
            yield from self._table_windows(self.spec, columns, shard, shards)
            return
        if not self.ids_alone:
            raise UserError(
                f"{self.folder}: the items of this model have columns of their own, but the bundle has no table of "
                "items; export it again, with data.items in place"
            )
        starts = range(0, len(self._known), CHUNK)
        for start in starts[shard::shards]:
            ids = self._known[start : start + CHUNK]
            yield Window(len(ids), (self.item.name,), [ids], {}, [], None), pa.table({})

    def _table_windows(
        self, spec: BatchSpec, columns: Sequence[str], shard: int, shards: int
    ) -> Iterator[tuple[Window, pa.Table]]:
        assert self.table is not None
        where = str(self.table)
        with _opened(self.table) as file:
            uses = list(dict.fromkeys([*reading(spec, file.schema_arrow.names).uses, *columns]))
            read = [name for name in uses if name in file.schema_arrow.names]  # what is missing is told with the rest
            for group in range(file.num_row_groups)[shard::shards]:
                try:
                    table = file.read_row_group(group, read)
                except UNREADABLE as error:
                    raise UserError(f"{where} cannot be read: {one_line(error)}; export the bundle again") from None
                for start in range(0, table.num_rows, CHUNK):
                    piece = table.slice(start, CHUNK)
                    for window in windows(piece, spec, CHUNK, where):
                        yield window, piece.select(list(columns))


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return open_parquet(path)
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}; export the bundle again") from None


def numbers(values: Floats) -> pa.Array:
    """[n] as n numbers, [n, C] as n lists of C."""
    return pa.array(values) if values.ndim == 1 else fixed(values)


def fixed(vectors: Floats) -> pa.Array:
    """[n, D] as n lists of D."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors).reshape(-1)), vectors.shape[1])
