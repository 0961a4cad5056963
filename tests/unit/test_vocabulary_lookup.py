"""Looking integers up: by a table where there are many and they are close together, by searching otherwise."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rechub_dist.data.columns.vocabulary import Vocabulary

KINDS = [pa.int8(), pa.uint8(), pa.int16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64()]
EDGES = [
    -(1 << 63),
    -(1 << 31),
    -1,
    0,
    1,
    127,
    255,
    (1 << 31) - 1,
    (1 << 32) - 1,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
]


def limits(kind: pa.DataType) -> tuple[int, int]:
    info = np.iinfo(kind.to_pandas_dtype())
    return int(info.min), int(info.max)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(KINDS), st.sampled_from(KINDS), st.integers(0, 30))
def test_many_values_are_found_as_few_are(
    data: st.DataObject, held: pa.DataType, asked: pa.DataType, near: int
) -> None:
    low, high = limits(held)
    centre = min(max(data.draw(st.sampled_from(EDGES)), low), high)
    around = st.integers(max(low, centre - near), min(high, centre + near)) | st.integers(low, high)
    values = data.draw(st.lists(around, unique=True, min_size=1, max_size=30))
    vocabulary = Vocabulary.of(pa.array(values, held), np.arange(1, len(values) + 1), "the values")
    low, high = limits(asked)
    wanted = data.draw(
        st.lists(st.none() | st.sampled_from([v for v in values if low <= v <= high] or [low]) | st.integers(low, high),
                 min_size=1, max_size=40)
    )  # fmt: skip
    expected = [values.index(v) + 1 if v in values else -1 for v in wanted]
    assert vocabulary.find(pa.array(wanted, asked)).tolist() == expected
    many = pa.array(wanted * 5000, asked)
    assert vocabulary.find(many).tolist() == expected * 5000


@pytest.mark.parametrize("values", [[5, 3, 9], [1 << 63, 3], [0, 1 << 40]])
def test_only_values_that_are_close_together_get_a_table(values: list[int]) -> None:
    vocabulary = Vocabulary.of(pa.array(values, pa.uint64()), np.arange(len(values)), "the values")
    assert (vocabulary._table is not None) == (values == [5, 3, 9])
