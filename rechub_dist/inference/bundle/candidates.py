"""Rows that have one user in common: what depends on the user alone is converted, and looked up, once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rechub_dist.data.columns.cross import cross
from rechub_dist.data.columns.fit import column_names, reading
from rechub_dist.data.columns.window import Ragged, Window
from rechub_dist.data.given import GIVEN, all_of, windows
from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError
from rechub_dist.features import CrossFeature, LookupFeature

MOST_REPEATED = 1 << 28  # bytes of the user's columns that may be copied for each candidate
_CALLERS = 64  # who put columns in different places; what is read of whom is remembered for so many


@dataclass(frozen=True)
class Piece:
    """Some features of rows.

    Attributes:
        spec: what the window was opened with.
        window: of the rows, or of the one user of all rows.
        shared: whether it is of the user.
    """

    spec: BatchSpec
    window: Window
    shared: bool = False

    def spread(self, array: NDArray[Any], rows: int) -> NDArray[Any]:
        """The array [rows, ...] of an array of the window's rows."""
        return np.repeat(array, rows, axis=0) if self.shared else array

    def dense(self, rows: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """By name, the dense features, float32 [rows, dim]."""
        row = 0
        for feature in self.spec.dense:
            values = np.stack([*self.window.floats[row : row + feature.dim]], axis=1).astype(np.float32, copy=False)
            yield feature.name, self.spread(values, rows)
            row += feature.dim


class Candidates:
    """Rows of candidates that have one user in common, as pieces.

    Args:
        spec: what to convert.
    """

    def __init__(self, spec: BatchSpec) -> None:
        self._spec = spec
        self._read = {*column_names(spec), *(name for d in spec.derived for name in (*d.inputs, *d.outputs))}
        self._shares = lru_cache(_CALLERS)(self._share)

    def pieces(self, user: Any, candidates: Any, size: int) -> Iterator[tuple[int, list[Piece]]]:
        """The rows that candidates and their user make, `size` at once: how many, and their pieces.

        Args:
            user: one row, as `table_of` takes it.
            candidates: rows with the other columns.
            size: at least 1.

        Raises:
            UserError: as `windows`; `user` is not one row, a column is in both, or too much of the user is repeated.
        """
        one, each = all_of(user, "the user"), all_of(candidates, "the candidates")
        if one.num_rows != 1:
            raise UserError(f"the user: got {one.num_rows} rows, must be one")
        if twice := sorted(set(one.column_names) & set(each.column_names)):
            raise UserError(f"column {twice[0]!r} is in the user and in the candidates; leave it out of one of them")
        share = self._shares(*(frozenset(self._read.intersection(table.column_names)) for table in (one, each)))
        shared = []
        if share.of_user.features or share.of_user.dense:
            shared = [Piece(share.of_user, next(windows(one, share.of_user, 1)), True)]
        for first in range(0, max(1, each.num_rows), size):
            count = min(size, each.num_rows - first)  # a slice of a table without columns does not know
            pieces = list(shared)
            if share.of_each.features or share.of_each.dense:
                own = one.select([name for name in one.column_names if name in share.repeated])
                table = _beside(own, each.slice(first, count), count)
                pieces.append(Piece(share.of_each, next(windows(table, share.of_each, max(1, count)))))
            if share.mixed.features:
                pieces.append(Piece(share.mixed, _crossed(share.mixed.crosses, pieces, count)))
            yield count, pieces

    def _share(self, user: frozenset[str], each: frozenset[str]) -> _Share:
        of_user, of_each, mixed = _divided(self._spec, set(user), set(each))
        repeated = frozenset(reading(of_each, [*user, *each]).uses)
        return _Share(of_user, of_each, replace(self._spec, features=mixed, dense=()), repeated)


@dataclass(frozen=True)
class _Share:
    """What is read of whom, where a user and its candidates have certain columns; it is the same for all requests.

    Attributes:
        of_user: what is of the user alone.
        of_each: what differs by candidate.
        mixed: the crosses of both.
        repeated: the columns that `of_each` reads, some of which may be the user's.
    """

    of_user: BatchSpec
    of_each: BatchSpec
    mixed: BatchSpec
    repeated: frozenset[str]


def _divided(spec: BatchSpec, user: set[str], each: set[str]) -> tuple[BatchSpec, BatchSpec, tuple[CrossFeature, ...]]:
    """What is of the user alone, what differs by candidate, and the crosses of both."""
    own = user - each
    for derived in spec.derived:
        if not set(derived.outputs) & (user | each) and set(derived.inputs) <= own:
            own |= set(derived.outputs)

    def of_user(feature: LookupFeature) -> bool:
        return set(column_names(BatchSpec(features=(feature,)))) <= own

    by_name = {feature.name: feature for feature in spec.features}
    together = [group for group in spec.aligned if not all(of_user(by_name[name]) for name in group)]
    beside = {name for group in together for name in group}  # read with what they are compared with

    def shared(feature: LookupFeature) -> bool:
        if isinstance(feature, CrossFeature):
            return all(map(shared, feature.inputs))
        return feature.name not in beside and of_user(feature)

    crosses = spec.crosses
    mixed = tuple(c for c in crosses if len({shared(feature) for feature in c.inputs}) > 1)
    plain = [feature for feature in spec.features if feature not in mixed]
    dense = [feature.source in own for feature in spec.dense]
    found = [
        replace(
            spec,
            features=tuple(feature for feature in plain if shared(feature) is side),
            dense=tuple(feature for feature, is_own in zip(spec.dense, dense, strict=True) if is_own is side),
        )
        for side in (True, False)
    ]
    return found[0], found[1], mixed


def _beside(one: pa.Table, rows: pa.Table, count: int) -> pa.Table:
    """The rows, `count` of them, each with the columns of `one`.

    Raises:
        UserError: that would take too much memory.
    """
    if one.nbytes * count > MOST_REPEATED:
        names = ", ".join(one.column_names)
        raise UserError(
            f"{GIVEN}: {count} candidates, each with the user's {names} ({one.nbytes} bytes): give fewer at once"
        )
    index = pa.array(np.zeros(count, np.int64))
    columns = dict(zip(rows.column_names, rows.columns, strict=True))
    return pa.table({**columns, **{name: one[name].take(index) for name in one.column_names}})


def _crossed(crosses: tuple[CrossFeature, ...], pieces: list[Piece], rows: int) -> Window:
    """The window of crosses of the user's features with the candidates'."""
    flat: dict[str, NDArray[Any]] = {}
    ragged: dict[str, Ragged] = {}
    for feature in crosses:
        ids, lengths = cross(feature, [_spread_ids(source.name, pieces, rows) for source in feature.inputs])
        if lengths is None:
            flat[feature.name] = ids
        else:
            offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
            ragged[feature.name] = Ragged(ids, offsets, lengths)
    return Window(rows, tuple(flat), list(flat.values()), ragged, [], None)


def _spread_ids(name: str, pieces: list[Piece], rows: int) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """A feature's ids, and their number in each row; None if that is 1 throughout."""
    piece = next(piece for piece in pieces if name in piece.window.flat or name in piece.window.ragged)
    if name in piece.window.flat:
        return piece.spread(np.asarray(piece.window.ids[piece.window.flat.index(name)]), rows), None
    found = piece.window.ragged[name]
    if piece.shared:
        return np.tile(found.values, rows), np.repeat(found.lengths, rows)
    return found.values, found.lengths
