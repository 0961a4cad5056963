"""String ids as 64-bit numbers: each distinct string of an array is hashed once, the rows follow by their codes.

The hash is XXH3 (64 bits, without a seed) of the string's UTF-8. The algorithm is published and does not change, so an
id is the same under every version and on every platform; a string takes less than 100 ns. (Arrow has no hash function,
and polars promises none that lasts over its versions. Two 32-bit hashes of one family side by side are no substitute:
MurmurHash3 under two seeds gives 15 pairs of a million short strings the same 64 bits.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

Ids = NDArray[np.int64]


def is_string(kind: pa.DataType) -> bool:
    """Whether values are strings, dictionary-encoded or not."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def hash_strings(strings: pa.Array) -> Ids:
    """64 bits for each string, int64 [n]; no nulls. For distinct strings: the time is that of a call each."""
    values = strings.cast(pa.large_binary()).to_pylist()
    return np.fromiter(map(xxhash.xxh3_64_intdigest, values), np.uint64, len(values)).view(np.int64)


def distinct(strings: pa.Array) -> tuple[pa.Array, Ids]:
    """The distinct strings of an array that may be dictionary-encoded, and each row's place among them.

    Returns:
        Strings without nulls [d], and codes int64 [n], -1 for a null. A string that occurs is there once.
    """
    if pa.types.is_string_view(strings.type):
        strings = strings.cast(pa.large_string())  # Arrow can do little else with views
    encoded = strings if pa.types.is_dictionary(strings.type) else strings.dictionary_encode()
    if encoded.dictionary.null_count or len(encoded.dictionary) > len(encoded):
        # Nulls among the values, or a dictionary of which these rows use a part: make one that fits.
        encoded = encoded.dictionary_decode().dictionary_encode()
    codes: Any = pc.fill_null(encoded.indices.cast(pa.int64()), -1)
    return encoded.dictionary, codes.to_numpy(zero_copy_only=False)


def spread(of_distinct: Ids, codes: Ids, null: int) -> Ids:
    """What was found for the distinct strings, given to the rows by their codes; `null` where the code is -1."""
    return np.append(of_distinct, np.int64(null))[codes]
