"""Combinations of several features' ids, hashed into the rows of one table. Vectorised over rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rechub_dist.data.columns.hashing import mix64, name_salt
from rechub_dist.features import CrossFeature

Ints = NDArray[Any]


def cross(feature: CrossFeature, inputs: Sequence[tuple[Ints, Ints | None]]) -> tuple[Ints, Ints | None]:
    """The ids of a cross: for every combination of one id of each input, a hash of these and of the cross's name.

    Args:
        feature: the cross.
        inputs: for each of its inputs the ids, integers, row after row, and the number of ids in each of the n rows;
            None if that is 1 throughout.

    Returns:
        Ids, int64, in which the first input varies slowest, and their number in each row, int64 [n]; None if that is 1
        throughout.
    """
    words = np.full(_rows(inputs), name_salt(feature.name))
    lengths: Ints | None = None
    for ids, counts in inputs:
        right = ids.astype(np.int64).view(np.uint64)
        if lengths is not None or counts is not None:
            one = np.ones(len(words) if lengths is None else len(lengths), np.int64)
            left, right, lengths = _pairs(
                words, one if lengths is None else lengths, right, one if counts is None else counts
            )
            words = mix64(left ^ right)
        else:
            words = mix64(words ^ right)
    return (words % np.uint64(feature.buckets)).view(np.int64), lengths


def _rows(inputs: Sequence[tuple[Ints, Ints | None]]) -> int:
    ids, counts = inputs[0]
    return len(ids if counts is None else counts)


def _pairs(left: Ints, left_counts: Ints, right: Ints, right_counts: Ints) -> tuple[Ints, Ints, Ints]:
    """All pairs of values of `left` and `right` of the same row, and the number of pairs in each row."""
    counts = left_counts * right_counts
    index = np.arange(counts.sum()) - np.repeat(_starts(counts), counts)
    width = np.repeat(right_counts, counts)
    at_left = np.repeat(_starts(left_counts), counts) + index // width
    at_right = np.repeat(_starts(right_counts), counts) + index % width
    return left[at_left], right[at_right], counts


def _starts(counts: Ints) -> Ints:
    return np.cumsum(counts) - counts
