"""Hashes of 64-bit words, names and ids. Needs neither torch nor Arrow."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Words = NDArray[np.uint64]


def mix64(words: Words) -> Words:
    """splitmix64 of each word: a bijection on uint64 in which every output bit depends on every input bit."""
    z = words + np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def name_salt(name: str) -> np.uint64:
    """A 64-bit hash of a name, the same in every process."""
    return np.uint64(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))


def hash_ids(ids: NDArray[Any], table: str, rows: int) -> Ids:
    """Integers hashed to ids of a table, int64 of the same shape in 0 .. rows - 1, in a way that differs by `table`."""
    words = mix64(ids.astype(np.int64).view(np.uint64) ^ name_salt(table))
    words %= np.uint64(rows)
    return words.view(np.int64)
