"""A bundle's tables: what is stored of vectors, and what is read of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from rechub_dist.checkpoint.tensors import framed
from rechub_dist.inference.bundle.manifest import TABLES, Precision, TableRecord
from rechub_dist.inference.bundle.tables import DTYPES, MappedTable, open_tables, precision_of, stored, tensors_of

WORST = {"fp32": 0.0, "fp16": 2**-11, "int8": 0.5001 / 255, "int4": 0.51 / 15}  # of a row's range, from 0 on


def vectors(rows: int, dim: int, std: float = 0.3, mean: float = 0.0) -> Any:
    return (np.random.default_rng(dim).normal(size=(rows, dim)) * std + mean).astype(np.float32)


def opened(folder: Path, values: Any, precision: Precision) -> MappedTable:
    """The table as a bundle has it on disk."""
    record = TableRecord(rows=len(values), dim=values.shape[1], precision=precision)
    header, body = {}, b""
    for (name, (kind, shape)), array in zip(tensors_of("t", record).items(), stored(values, precision), strict=True):
        assert (array.dtype, array.shape) == (DTYPES[kind], shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + array.nbytes]}
        body += array.tobytes()
    (folder / TABLES).write_bytes(framed(header) + body)
    return open_tables(folder / TABLES, {"t": record})["t"]


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("dim", [1, 2, 3, 8, 15, 16])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_what_is_read_is_what_was_stored(tmp_path: Path, precision: Precision, dim: int, mean: float) -> None:
    values = vectors(101, dim, mean=mean)
    values[7] = 0.25  # all alike
    values[8] = 0
    table = opened(tmp_path, values, precision)
    ids = np.array([100, 7, 8, 0, 7, 33])
    found = table.rows(ids)
    assert (found.dtype, found.shape) == (np.float32, (6, dim))
    span = np.maximum(values.max(axis=1), 0) - np.minimum(values.min(axis=1), 0)
    assert (np.abs(found - values[ids]) <= WORST[precision] * span[ids][:, None]).all()
    np.testing.assert_array_equal(found[[1, 2, 4]], values[[7, 8, 7]])
    assert table.rows(ids[:0]).shape == (0, dim)


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_what_half_precision_cannot_hold_is_refused(precision: Precision) -> None:
    values = vectors(5, 8)
    values[3, 2] = -7e4
    with pytest.raises(OverflowError, match="70000 is beyond 65504, the largest number of fp16"):
        stored(values, precision)


def test_narrow_tables_are_stored_in_fp16() -> None:
    def bytes_of(precision: Precision, dim: int) -> int:
        record = TableRecord(rows=1, dim=dim, precision=precision)
        return sum(DTYPES[kind].itemsize * int(np.prod(shape)) for kind, shape in tensors_of("t", record).values())

    for dim in range(1, 200):
        assert precision_of("fp32", dim) == "fp32"
        for wanted in ("int8", "int4"):
            best: Precision = "fp16" if bytes_of("fp16", dim) <= bytes_of(wanted, dim) else wanted
            assert precision_of(wanted, dim) == best
    assert (precision_of("int8", 8), precision_of("int8", 9)) == ("fp16", "int8")
    assert (precision_of("int4", 3), precision_of("int4", 4)) == ("fp16", "int4")
