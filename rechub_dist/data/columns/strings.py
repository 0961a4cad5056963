"""String ids as 64-bit integers: each distinct string of an array is hashed once, and rows refer to it by code.

The hash is XXH3 (64 bits, no seed) of the string's UTF-8. The algorithm is published and fixed, so an id is the same
in every version and on every platform; a string takes less than 100 ns. (Arrow has no hash function, and polars
guarantees none across versions. Two 32-bit hashes of one family are no substitute: MurmurHash3 with two seeds maps 15
pairs of a million short strings to the same 64 bits.)
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


def python_value(scalar: pa.Scalar) -> Any:
    """A value for a message: of a string that is not UTF-8, which Arrow does not check, the bytes."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return (scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar).as_buffer().to_pybytes()


def hash_strings(strings: pa.Array) -> Ids:
    """The hash of each string, int64 [n]; nulls are not allowed. One Python call per string: pass distinct ones."""
    values = strings.cast(pa.large_binary()).to_pylist()
    return np.fromiter(map(xxhash.xxh3_64_intdigest, values), np.uint64, len(values)).view(np.int64)


def distinct(strings: pa.Array) -> tuple[pa.Array, Ids]:
    """The distinct strings of an array, which may be dictionary-encoded, and each row's index among them.

    Returns:
        Strings [d], all different and without nulls; and codes int64 [n], -1 for a null.
    """
    if pa.types.is_string_view(strings.type):
        strings = strings.cast(pa.large_string())  # Arrow can do little else with views
    encoded = strings if pa.types.is_dictionary(strings.type) else strings.dictionary_encode()
    if encoded.dictionary.null_count or len(encoded.dictionary) > len(encoded):
        # Nulls in the dictionary, or entries that these rows do not use: encode anew.
        encoded = encoded.dictionary_decode().dictionary_encode()
    codes: Any = pc.fill_null(encoded.indices.cast(pa.int64()), -1)
    return encoded.dictionary, codes.to_numpy(zero_copy_only=False)


def spread(of_distinct: Ids, codes: Ids, null: int) -> Ids:
    """Results for the distinct strings, int64 [d], by row: int64 [n]; `null` where the code is -1."""
    return np.append(of_distinct, np.int64(null))[codes]
