"""Columns that metrics group by reach the batch as they are, row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError
from rechub_dist.features import Label


def reader(folder: Path, keys: pa.Array, *, shuffle: bool, world_size: int = 1, rank: int = 0) -> ParquetReader:
    if not folder.exists():
        folder.mkdir()
        table = pa.table({"key": keys, "number": np.arange(len(keys))})
        pq.write_table(table.slice(0, 60), folder / "a.parquet", row_group_size=25)
        pq.write_table(table.slice(60), folder / "b.parquet", row_group_size=25)
    spec = BatchSpec(labels=(Label("number", type="regression"),), keys=("key",))
    manifest = Manifest.read([str(folder)])
    return ParquetReader(manifest, spec, batch_size=16, shuffle=shuffle, world_size=world_size, rank=rank)


WORDS = [f"user {i % 7}" for i in range(100)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (pa.array(WORDS), pa.large_string()),
        (pa.array(WORDS).dictionary_encode(), pa.large_string()),
        (pa.array(WORDS, pa.string_view()), pa.large_string()),
        (pa.array([i % 7 - 3 for i in range(100)], pa.int8()), pa.int64()),
        (pa.array([2**62 + i for i in range(100)], pa.uint64()), pa.int64()),
    ],
)
def test_rows_keep_their_keys(tmp_path: Path, keys: pa.Array, kind: pa.DataType, shuffle: bool) -> None:
    rows = 0
    for rank in (0, 1):
        for batch in reader(tmp_path / "data", keys, shuffle=shuffle, world_size=2, rank=rank).batches(0):
            there = batch.keys["key"]
            assert there.to_pylist() == [keys[int(i)].as_py() for i in batch.labels[:, 0]]
            assert not len(there) or there.type == kind
            rows += len(there)
    assert rows == 100


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (pa.array([*WORDS[:50], None, *WORDS[:49]]), r"column 'key': 1 key\(s\) are missing"),
        (pa.array([2**64 - 1] * 100, pa.uint64()), "column 'key': a key is beyond int64; write the column as strings"),
        (pa.array(np.arange(100.0)), "column 'key' is double, but a metric's group needs integers or strings"),
        (pa.array([[1]] * 100), "but a metric's group needs integers or strings"),
    ],
)
def test_keys_that_are_none(tmp_path: Path, keys: pa.Array, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(reader(tmp_path / "data", keys, shuffle=False).batches(0))
