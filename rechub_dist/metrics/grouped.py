"""AUC within groups, exact over ranks: each group's rows come together on one rank."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from pydantic import Field

from rechub_dist.data.columns.hashing import mix64
from rechub_dist.data.columns.strings import distinct, hash_strings, is_string, spread
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.errors import UserError
from rechub_dist.metrics.binary import Array, checked_rows, ratio
from rechub_dist.metrics.direction import Direction
from rechub_dist.metrics.metric import Scored

Ints = NDArray[np.int64]
_BUCKETS = 1 << 16
_AT_ONCE = 1 << 26  # bytes that a rank sends in one round: measuring takes ten times as much for a moment
_EXACT = 2.0**53  # whole numbers up to here are exact in float64


class GroupedAUC:
    """The mean over groups of the AUC among the group's rows; groups whose rows have one label are left out.

    Groups are told apart by the key's value, whatever its hash. The mean counts a group by its impressions, the sum of
    its rows' weights (Zhou et al. 2018, section 6.3), or, unweighted, once.

    Args:
        group: the column of the data that holds the key, integers or strings, such as the user.
        weighted: whether groups count by their impressions.
        max_mb: the most that rows and keys may take on a rank. They are 22 bytes a row, and the strings.
    """

    direction: Direction = "max"

    def __init__(self, group: str, weighted: bool = True, max_mb: Annotated[int, Field(ge=1)] = 4096) -> None:
        self.group: str | None = group
        self._column = group
        self._weighted = weighted
        self._max_mb = max_mb
        self._parts: list[pa.Table] = []
        self._bytes = 0
        self._sums = np.zeros(2)

    def update(self, rows: Scored) -> None:
        """Keep rows and their keys.

        Raises:
            UserError: there are more than `max_mb` hold.
        """
        if not len(rows.predictions):
            return
        keys = rows.keys[self._column]
        table = pa.table(
            {
                "key": keys.dictionary_encode() if is_string(keys.type) else keys,
                "bucket": _buckets(keys),
                "prediction": rows.predictions,
                "target": rows.targets,
                "weight": rows.weights,
            }
        )
        self._bytes += table.nbytes
        self._check(self._bytes)
        self._parts.append(table)

    def merge(self, ranks: Runtime) -> None:
        """Send each row to the rank that its key's hash names, measure there, and add up; some groups at a time.

        Raises:
            UserError: a rank gets more than `max_mb` hold.
        """
        rounds = -(-int(max(ranks.gather(torch.tensor([self._bytes])))) // _AT_ONCE)
        rounds = min(rounds, _BUCKETS // ranks.world_size)
        for turn in range(rounds):
            outgoing: list[list[pa.Table]] = [[] for _ in range(ranks.world_size)]
            for table in self._parts:
                turns, owners = np.divmod(table["bucket"].to_numpy(), ranks.world_size)
                owners = np.where(turns % rounds == turn, owners, ranks.world_size)
                for rank, pieces in enumerate(outgoing):
                    pieces.append(table.filter(pa.array(owners == rank)))
            received = ranks.exchange([_packed(pieces) for pieces in outgoing], self._check)
            self._sums += self._measure([table for data in received if len(data) for table in _unpacked(data)])
        self._parts = []
        self._sums = ranks.all_reduce_sum(torch.from_numpy(self._sums)).numpy()

    def compute(self) -> float:
        """The value; NaN where no group has both labels, or a prediction is NaN."""
        return ratio(self._sums[0], self._sums[1])

    def _measure(self, tables: list[pa.Table]) -> Array:
        """The sum over groups of share times AUC, and of shares."""
        if not tables:
            return np.zeros(2)
        codes = _codes(pa.chunked_array([chunk for table in tables for chunk in table["key"].chunks]))
        names = ("prediction", "target", "weight")
        p, y, w = (np.concatenate([table[name].to_numpy() for table in tables]) for name in names)
        del tables
        p, y, w = checked_rows(p, y, w, binary=True)
        if np.isnan(p).any():
            return np.full(2, math.nan)
        impressions = np.bincount(codes, w)
        aucs = group_aucs(codes, p, y, w)
        there = ~np.isnan(aucs)
        shares = impressions[there] if self._weighted else np.ones(int(there.sum()))
        return np.array([shares @ aucs[there], shares.sum()])

    def _check(self, size: int) -> None:
        if size > self._max_mb * 1e6:
            raise UserError(
                f"metric grouped_auc: the rows by key {self._column!r} take {size / 1e6:,.0f} MB on a rank, more than "
                f"max_mb: {self._max_mb}; raise it beside the metric's name, use more ranks, or leave the metric out"
            )


def group_aucs(codes: Ints, p: Array, y: Array, w: Array) -> Array:
    """The AUC among the rows of each group, NaN where they have one label: float64 [groups].

    Args:
        codes: the rows' groups, 0 .. groups - 1, each there; int64 [N].
        p, y, w: predictions, labels 0 or 1, and weights; float64 [N].
    """
    order = np.lexsort((p, codes))
    codes, p, y, w = codes[order], p[order], y[order], w[order]
    # rows of one group and prediction are one step of the curve
    first = np.flatnonzero(np.append(True, (codes[1:] != codes[:-1]) | (p[1:] != p[:-1]))) if len(p) else codes
    if not len(first):
        return np.zeros(0)
    positives, negatives = np.add.reduceat(w * y, first), np.add.reduceat(w * (1 - y), first)
    codes = codes[first]
    below = _running(negatives, codes) - 0.5 * negatives
    won, all_positives, all_negatives = (
        np.bincount(codes, values) for values in (positives * below, positives, negatives)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        aucs: Array = won / (all_positives * all_negatives)
    return aucs


def _running(values: Array, codes: Ints) -> Array:
    """Running sums within runs of one code, each with the value itself."""
    starts = np.flatnonzero(np.append(True, codes[1:] != codes[:-1]))
    lengths = np.diff(np.append(starts, len(codes)))
    if not np.mod(values, 1).any() and values.sum() < _EXACT:
        total = np.cumsum(values)
        return total - np.repeat(total[starts] - values[starts], lengths)
    # A difference of two long sums would lose the digits of a small group. So each group's sums are doubled in reach.
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    total, reach, most = values.copy(), 1, int(lengths.max())
    while reach < most:
        late = np.flatnonzero(place >= reach)
        total[late] += total[late - reach]
        reach *= 2
    return total


def key_words(keys: pa.Array) -> Ints:
    """A word for each key, int64 [N], the same for equal ones on every rank: an integer itself, a string's hash."""
    if is_string(keys.type):
        strings, codes = distinct(keys)
        return spread(hash_strings(strings), codes, null=0)
    found: Ints = keys.to_numpy()
    return found


def _buckets(keys: pa.Array) -> NDArray[np.uint16]:
    """A number below `_BUCKETS` for each key, the same for equal ones, on every rank."""
    return (mix64(key_words(keys).view(np.uint64)) % np.uint64(_BUCKETS)).astype(np.uint16)


def _codes(keys: pa.ChunkedArray) -> Ints:
    """The keys' values numbered from 0, int64 [N]; equal ones alike, whichever rank they come from."""
    keys = keys.unify_dictionaries() if pa.types.is_dictionary(keys.type) else pc.dictionary_encode(keys)
    used = np.concatenate([chunk.indices.to_numpy() for chunk in keys.chunks])
    there = np.bincount(used) > 0
    found: Ints = (np.cumsum(there) - 1)[used]
    return found


def _packed(tables: list[pa.Table]) -> Any:
    """Tables as bytes, a uint8 array; none for no rows."""
    tables = [table for table in tables if len(table)]
    if not tables:
        return np.zeros(0, np.uint8)
    whole = pa.concat_tables(tables)
    if pa.types.is_dictionary(whole["key"].type):  # of the rows' own strings alone
        strings = whole["key"].cast(whole["key"].type.value_type)
        whole = whole.set_column(0, "key", strings.combine_chunks().dictionary_encode())
    whole = whole.combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    return np.frombuffer(sink.getvalue(), np.uint8)


def _unpacked(data: Any) -> list[pa.Table]:
    with pa.ipc.open_stream(pa.py_buffer(data)) as reader:
        return [reader.read_all()]
