"""Values to ids, as an import stores them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rechub_dist.data.columns.vocabulary import Vocabulary
from rechub_dist.data.parquet.kinds import is_list


def encode(column: pa.ChunkedArray | pa.Array, vocabulary: Vocabulary, unknown: int = 0) -> pa.Array:
    """The ids of values, int32 [n] or lists of them; `unknown` for nulls and values that are not in the vocabulary."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if is_list(array.type):
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
        offsets = np.zeros(len(array) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        return pa.ListArray.from_arrays(pa.array(offsets), encode(array.flatten(), vocabulary, unknown))
    if pa.types.is_null(array.type):
        return pa.array(np.full(len(array), unknown, np.int32))
    ids = vocabulary.find(array)
    kind = np.int32 if vocabulary.limits[1] < 2**31 else np.int64
    return pa.array(np.where(ids < 0, unknown, ids).astype(kind))
