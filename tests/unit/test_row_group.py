"""Row groups that are decoded as their columns are asked for, against the whole row group at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.data.columns.fit import column_uses
from rechub_dist.data.columns.window import open_window
from rechub_dist.data.parquet import row_group
from rechub_dist.data.parquet.files import OpenFiles
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.row_group import RowGroup
from rechub_dist.data.rows import RowEncoder
from rechub_dist.data.spec import BatchSpec
from rechub_dist.features import DenseFeature, Label, SequenceFeature, SparseFeature, Table, TimeGapFeature
from rechub_dist.skips import BadFileError
from rechub_tests.damage import spoil_pages

ROWS = 60
ITEMS = Table("items", 100, dim=4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, 100, n).tolist() for n in rng.integers(0, 6, ROWS)]
    table = pa.table(
        {
            "y": rng.integers(0, 2, ROWS).astype(np.int8),
            "item": rng.integers(0, 100, ROWS),
            "history": lists,
            "importance": [rng.random(len(ids)).tolist() for ids in lists],
            "times": [[0] * len(ids) for ids in lists],
            "now": np.ones(ROWS, np.int64),
            "x": rng.random(ROWS),
            "unread": ["a"] * ROWS,
        }
    )
    pq.write_table(table, tmp_path / "part.parquet", row_group_size=ROWS // 2)
    return tmp_path / "part.parquet"


def spied(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is read from now on, call by call."""
    reads: list[list[str]] = []
    plain = pq.ParquetFile.read_row_group

    def spy(self: Any, group: int, columns: list[str], **arguments: Any) -> pa.Table:
        reads.append(list(columns))
        return plain(self, group, columns=columns, **arguments)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    return reads


def test_columns_are_decoded_a_few_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_group, "_VALUES", ROWS)  # two columns of single values
    with pq.ParquetFile(path) as parquet:
        expected = parquet.read_row_group(1)
        reads = spied(monkeypatch)
        found = RowGroup(parquet, 1, ["x", "y", "item", "history", "x"])
        assert found.num_rows == ROWS // 2
        piece = found.slice(3, 20)
        for name in ("x", "y", "item", "history", "x"):
            assert piece.column(name).to_pylist() == expected.column(name).to_pylist()[3:23]
        assert reads == [["x", "y"], ["item"], ["history"]]
        reads.clear()
        assert RowGroup(parquet, 1, ["x", "history"], whole=True).column("history") == expected.column("history")
        assert RowGroup(parquet, 1, ["y", "x"]).table().equals(expected.select(["y", "x"]))
        assert reads == [["x", "history"], ["y", "x"]]


@pytest.mark.parametrize("kind", [pa.list_view, pa.large_list_view])
def test_list_views_are_read_as_lists(tmp_path: Path, kind: Any) -> None:
    rows = [["a", None], None, [], ["b"], ["c", "d", "e"]]
    table = pa.table({"x": pa.array(rows, kind(pa.string_view())).slice(0)})
    pq.write_table(table, tmp_path / "a.parquet")
    with pq.ParquetFile(tmp_path / "a.parquet") as parquet:
        found = RowGroup(parquet, 0, ["x"]).slice(1, 4).column("x")
    found.validate(full=True)
    assert found.to_pylist() == rows[1:]
    assert found.type == (pa.list_ if kind is pa.list_view else pa.large_list)(pa.field("element", pa.large_string()))
    spec = BatchSpec((SequenceFeature("x", ITEMS, 2, hash=True, missing="drop"),), collections={"c": ("x",)})
    batch = next(RowEncoder(spec).batches(table, 9))
    assert batch.feature("x").lengths().tolist() == [1, 0, 0, 1, 2]


def test_bounds_are_those_of_the_statistics(path: Path) -> None:
    with pq.ParquetFile(path) as parquet:
        found = RowGroup(parquet, 0, ["item", "history", "x"])
        ids = [i for row in found.column("history").to_pylist() for i in row]
        item = found.column("item").to_pylist()
        assert found.bounds == {"item": (min(item), max(item)), "history": (min(ids), max(ids))}


def test_a_window_reads_each_column_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that several features are made from."""
    monkeypatch.setattr(row_group, "_VALUES", 1)
    spec = BatchSpec(
        (
            SparseFeature("item", ITEMS),
            SparseFeature("weighted", ITEMS, column="history", weights="importance"),
            SequenceFeature("history", ITEMS, max_length=3),
            TimeGapFeature("gap", "times", "now", (1.0, 2.0), max_length=3),
            SparseFeature("again", ITEMS, column="item"),
        ),
        (DenseFeature("x"), DenseFeature("weight", column="now")),
        (Label("y"),),
        weight="now",
        collections={"d4": ("again", "history", "item")},
    )
    with pq.ParquetFile(path) as parquet:
        whole = open_window(parquet.read_row_group(1), spec, None, "a")
        reads = spied(monkeypatch)
        opened = open_window(RowGroup(parquet, 1, column_uses(spec)), spec, None, "a")
    assert reads == [["item"], ["history"], ["importance"], ["times"], ["now"], ["x"], ["y"]]
    assert opened.flat == whole.flat == ("again", "item")
    for mine, theirs in zip([*opened.ids, *opened.floats], [*whole.ids, *whole.floats], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for name, column in whole.ragged.items():
        np.testing.assert_array_equal(opened.ragged[name].values, column.values)
        np.testing.assert_array_equal(opened.ragged[name].lengths, column.lengths)


def test_a_failing_conversion_is_not_repeated(path: Path) -> None:
    manifest = Manifest.read(str(path))
    calls: list[int] = []

    def convert(group: RowGroup) -> None:
        calls.append(group.num_rows)
        raise ZeroDivisionError("mine")

    files = OpenFiles()
    with pytest.raises(ZeroDivisionError, match="mine"):
        files.convert(manifest.files[0], 0, ["x"], convert)
    assert calls == [ROWS // 2]
    assert files.read(manifest.files[0], 1, ["x"]).num_rows == ROWS // 2
    files.close()


def test_one_bad_column_is_met_when_it_is_asked_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns before it are converted twice: by the attempt that fails, and the one that makes sure."""
    monkeypatch.setattr(row_group, "_VALUES", 1)
    spoil_pages(path, 1, column=3)
    manifest = Manifest.read(str(path))
    met: list[str] = []

    def convert(group: RowGroup) -> None:
        for name in ("item", "importance"):
            group.column(name)
            met.append(name)

    files = OpenFiles()
    with pytest.raises(BadFileError, match=r"part\.parquet: row group 1 is truncated or corrupt \(.+\)"):
        files.convert(manifest.files[0], 1, ["item", "importance"], convert)
    assert met == ["item", "item"]
    files.close()
