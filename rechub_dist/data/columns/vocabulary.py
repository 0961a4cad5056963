"""Vocabularies: Parquet files with columns `value` and `id`, and vectorised lookup in them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rechub_dist.data.columns.strings import distinct, hash_strings, is_string, python_value, spread
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.scan import scan
from rechub_dist.errors import UserError
from rechub_dist.features import StoredFeature

Ids = NDArray[np.int64]
UNKNOWN = -1
_FEW = 4096  # values; fewer are searched for, since making a table would take longer


@dataclass(frozen=True)
class Vocabulary:
    """Values and their ids, sorted for lookup.

    Attributes:
        path: the file, for messages.
        values: Arrow array of integers or strings [n], in the order of `words`.
        words: int64 [n], ascending: integers themselves (those from 2^63 on reinterpreted), hashes of strings.
        ids: int64 [n].
    """

    path: str
    values: pa.Array
    words: Ids
    ids: Ids

    @classmethod
    def of(cls, values: pa.Array, ids: Ids, path: str) -> Vocabulary:
        """The vocabulary of these values and their ids, int64 [n].

        Raises:
            UserError: a duplicate or null value, or values that are neither integers nor strings.
        """
        if not (is_string(values.type) or pa.types.is_integer(values.type)):
            raise UserError(f"{path}: column 'value' is {values.type}; a vocabulary's values are integers or strings")
        if values.null_count:
            raise UserError(f"{path}: column 'value' has {values.null_count} missing value(s); remove these rows")
        if is_string(values.type):
            values = values.cast(pa.large_string())
            words = hash_strings(values)
        else:
            words = _bits(values.to_numpy())
        order = np.argsort(words, kind="stable")
        words, values, ids = words[order], values.take(pa.array(order)), ids[order]
        if (twice := np.flatnonzero(words[1:] == words[:-1])).size:
            first, second = (python_value(values[int(twice[0]) + i]) for i in (0, 1))
            what = (
                f"value {first!r} occurs twice" if first == second else f"{first!r} and {second!r} have the same hash"
            )
            raise UserError(f"{path}: column 'value': {what}; remove one of the two rows")
        return cls(path, values, words, ids)

    @property
    def strings(self) -> bool:
        """Whether the values are strings rather than integers."""
        return is_string(self.values.type)

    @cached_property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest id; (0, 0) for an empty vocabulary."""
        return (int(self.ids.min()), int(self.ids.max())) if len(self.ids) else (0, 0)

    def find(self, array: pa.Array) -> Ids:
        """The id of each value, int64 [n]; -1 for values that are not in the vocabulary, and for nulls.

        Strings are found by hash and then compared, so that colliding hashes do no harm.
        """
        if self.strings:
            strings, codes = distinct(array)
            strings = strings.cast(pa.large_string())
            places, there = self._places(hash_strings(strings))
            candidates = self.values.take(pa.array(places[there]))
            there[there] = pc.equal(candidates, strings.filter(pa.array(there))).to_numpy(zero_copy_only=False)
            return spread(np.where(there, self._id_at(places), UNKNOWN), codes, UNKNOWN)
        numbers = (pc.fill_null(array, 0) if array.null_count else array).to_numpy(zero_copy_only=False)
        found = self._by_table(numbers)
        if found is None:
            places, there = self._places(_bits(numbers))
            # NumPy compares int64 with uint64 exactly: 2^64 - 1 has the bits of -1, but differs
            there[there] = self.values.to_numpy()[places[there]] == numbers[there]
            found = np.where(there, self._id_at(places), UNKNOWN)
        return np.where(array.is_valid().to_numpy(zero_copy_only=False), found, UNKNOWN) if array.null_count else found

    @cached_property
    def _table(self) -> Ids | None:
        """The ids of integers from the smallest on, in a table; None if they are far between.

        It takes no more memory than the sorted values and ids, or 8 MB, and finds a value in one step, not in twenty.
        """
        if self.strings or not len(self.words):
            return None
        values = self.values.to_numpy()
        least, span = int(values.min()), int(values.max()) - int(values.min()) + 1
        if span > max(2 * len(self.words), 1 << 20) or int(values.max()) >= 1 << 63:
            return None
        table = np.full(span, UNKNOWN, np.int64)
        table[self.words - least] = self.ids
        return table

    def _by_table(self, numbers: NDArray[np.integer]) -> Ids | None:
        """The ids of integers by the table; None if there is none, or too few are asked for to make it."""
        if len(numbers) < _FEW or numbers.dtype == np.uint64 or self._table is None:
            return None
        least = int(self.words[0])
        places = numbers.astype(np.int64, copy=False) - least
        inside = (numbers >= least) & (numbers < least + len(self._table))
        return np.where(inside, self._table[np.where(inside, places, 0)], UNKNOWN)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify which value has which id."""
        digest = hashlib.blake2b(self.words.tobytes(), digest_size=8)
        digest.update(self.ids.tobytes())
        return digest.hexdigest()

    def _places(self, words: Ids) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """The index of each word in `words`, and whether it is there: both [n]."""
        places = np.minimum(np.searchsorted(self.words, words), max(len(self.words) - 1, 0))
        there = self.words[places] == words if len(self.words) else np.zeros(len(words), np.bool_)
        return places, there

    def _id_at(self, places: NDArray[np.intp]) -> Any:
        return self.ids[places] if len(self.ids) else UNKNOWN


def vocabulary_of(feature: StoredFeature) -> Vocabulary | None:
    """The vocabulary that a feature's values are looked up in, read once per process; None where there is none.

    That is so of an encoded feature, too: its column holds ids.

    Raises:
        UserError: as `read_vocabulary`, or its ids do not fit the feature's table.
    """
    if feature.vocabulary is None or feature.encoded:
        return None
    found = _HELD.get(feature.vocabulary) or read_vocabulary(feature.vocabulary)
    low, high = found.limits
    rows = feature.table.rows
    if low < 0 or high >= rows:
        raise UserError(
            f"{found.path}: column 'id': id {low if low < 0 else high} is outside table {feature.table.name!r} of "
            f"{rows} rows (feature {feature.name!r}); "
            + ("build the vocabulary again" if low < 0 else f"set the table's rows to {high + 1}")
        )
    return found


def vocabulary_fingerprint(feature: StoredFeature) -> str | None:
    """What identifies a feature's vocabulary, as `Vocabulary.fingerprint`; None for a feature without one.

    The vocabulary of an encoded feature is read for this, once, and not kept.

    Raises:
        UserError: as `vocabulary_of`.
    """
    if feature.vocabulary is None:
        return None
    if feature.encoded:
        return _fingerprint(feature.vocabulary)
    vocabulary = vocabulary_of(feature)
    assert vocabulary is not None
    return vocabulary.fingerprint()


# Vocabularies of files that may be replaced while they are in use, by the names that features have for them.
_HELD: WeakValueDictionary[str, Vocabulary] = WeakValueDictionary()


def hold(path: str, name: str) -> Vocabulary:
    """The vocabulary in a file, which features that name it `name` find as long as the result is kept.

    Whatever then becomes of the file: `read_vocabulary` would give its first content for ever.

    Raises:
        UserError: as `read_vocabulary`.
    """
    found = _HELD.get(name)
    if found is None:
        _HELD[name] = found = read_vocabulary.__wrapped__(path)
    return found


@cache
def _fingerprint(path: str) -> str:
    return read_vocabulary.__wrapped__(path).fingerprint()


@cache
def read_vocabulary(path: str) -> Vocabulary:
    """The vocabulary in a Parquet file (or a folder of them) with columns `value` and `id`; cached.

    Raises:
        UserError: it cannot be read, or is not a vocabulary.
    """
    manifest = Manifest.read(path)
    for name in ("value", "id"):
        if name not in manifest.schema.names:
            raise UserError(
                f"{path}: there is no column {name!r}; a vocabulary has columns 'value' and 'id' "
                "(rechub-dist data vocabulary writes one)"
            )
    # the order of the row groups does not matter: values are sorted anyway
    table = pa.concat_tables(piece for _, piece in scan(manifest, ["value", "id"], lambda piece: piece))
    ids, values = table["id"].combine_chunks(), table["value"]
    if not pa.types.is_integer(ids.type) or ids.null_count:
        raise UserError(f"{path}: column 'id' is {ids.type} with {ids.null_count} missing; give each value an integer")
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if is_string(values.type):
        values = values.cast(pa.large_string())  # in one piece, they may exceed 2 GB
    try:
        numbers = ids.cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:
        raise UserError(f"{path}: column 'id' has numbers from 2^63 on; build the vocabulary again") from None
    return Vocabulary.of(values.combine_chunks(), numbers, path)


def _bits(numbers: NDArray[np.integer]) -> Ids:
    """Integers of any width as int64; those from 2^63 on are reinterpreted."""
    return numbers.view(np.int64) if numbers.dtype == np.uint64 else numbers.astype(np.int64, copy=False)
