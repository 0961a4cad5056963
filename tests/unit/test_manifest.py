from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from rechub_dist.cli.data import data_app
from rechub_dist.data.parquet.manifest import Manifest, describe, prepared_splits
from rechub_dist.errors import UserError


def write(path: Path, rows: int = 5, group: int = 2, **columns: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"a": list(range(rows)), **columns}), path, row_group_size=group)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "data" / "part-1.parquet", rows=5)
    write(tmp_path / "data" / "part-0.parquet", rows=4)
    write(tmp_path / "data" / "day=2" / "part-0.parquet", rows=3)
    write(tmp_path / "data" / "_temporary" / "part-9.parquet", rows=3)
    write(tmp_path / "data" / ".part-1.parquet", rows=3)
    (tmp_path / "data" / "_SUCCESS").touch()
    return tmp_path / "data"


def fails(path: Path | str, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        Manifest.read(str(path))
    message = str(caught.value)
    assert message.startswith(str(path)) or str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_folder_is_its_parquet_files_in_the_order_of_names(folder: Path) -> None:
    manifest = Manifest.read(str(folder))
    assert [file.name for file in manifest.files] == ["day=2/part-0.parquet", "part-0.parquet", "part-1.parquet"]
    assert manifest.counts == (2, 1, 2, 2, 2, 2, 1)
    assert manifest.rows == 12
    assert [(file.name, group) for file, group in manifest.groups][-1] == ("part-1.parquet", 2)
    assert manifest.files[0].size == os.path.getsize(folder / "day=2" / "part-0.parquet")
    assert manifest.schema == pa.schema([("a", pa.int64())])


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("part-?.parquet", ["part-0.parquet", "part-1.parquet"]),
        ("part-[!1].parquet", ["part-0.parquet"]),
        ("part-[1-3].*", ["part-1.parquet"]),
        ("**/part-0.parquet", ["day=2/part-0.parquet", "part-0.parquet"]),
        ("day=*/*.parquet", ["day=2/part-0.parquet"]),
        ("day=?", ["day=2/part-0.parquet"]),
        ("d*/", ["day=2/part-0.parquet"]),
    ],
)
def test_patterns(folder: Path, pattern: str, names: list[str]) -> None:
    assert [file.name for file in Manifest.read(f"{folder}/{pattern}").files] == names


def test_one_file_an_address_and_a_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [file.name for file in Manifest.read(f"{folder}/part-1.parquet").files] == ["part-1.parquet"]
    assert Manifest.read(f"file://{folder}").counts == Manifest.read(str(folder)).counts
    assert Manifest.read(f"file://{folder}/part-*").counts == (2, 2, 2, 2, 1)
    monkeypatch.chdir(folder)
    assert Manifest.read("*.parquet").counts == (2, 2, 2, 2, 1)
    assert Manifest.read(".").files[0].path == "./day=2/part-0.parquet"


def test_fingerprint_is_that_of_the_data_not_of_the_place(folder: Path, tmp_path: Path) -> None:
    first = Manifest.read(str(folder)).fingerprint()
    assert len(first) == 16
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert Manifest.read(str(tmp_path / "elsewhere")).fingerprint() == first
    assert Manifest.read(f"{folder}/").fingerprint() == first
    write(tmp_path / "elsewhere" / "part-1.parquet", rows=5, group=3)
    changed = Manifest.read(str(tmp_path / "elsewhere")).fingerprint()
    os.rename(folder / "part-1.parquet", folder / "part-3.parquet")
    assert len({first, changed, Manifest.read(str(folder)).fingerprint()}) == 3


def test_empty_files_are_passed_over(folder: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([], pa.null())}), folder / "empty.parquet")
    assert Manifest.read(str(folder)).rows == 12


def test_missing_path(tmp_path: Path) -> None:
    fails(tmp_path / "nothing", "no such file or folder", "check the path")
    fails(tmp_path / "nothing" / "*.parquet", "no such file or folder")


def test_folder_without_parquet(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a,b\n")
    fails(tmp_path, "no *.parquet file")
    fails(tmp_path / "*.pq", "no file matches")


@pytest.mark.parametrize("size", [3, 60, -9])
def test_truncated_file_is_named(folder: Path, size: int) -> None:
    path = folder / "part-1.parquet"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"/part-1\.parquet: it is truncated or corrupt \(.*write the file again"):
        Manifest.read(str(folder))


def test_unreadable_address(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nosuchscheme:// cannot be reached .*check the address"):
        Manifest.read(f"nosuchscheme://{tmp_path}")


def test_zero_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows=0)
    fails(tmp_path, "no rows in its 1 Parquet file")


def test_differing_schemas(folder: Path) -> None:
    write(folder / "part-2.parquet", b=[1.0] * 5)
    with pytest.raises(
        UserError, match=r"part-2.parquet: its columns differ .*day=2.*: column 'b' is float, not missi"
    ):
        Manifest.read(str(folder))
    pq.write_table(pa.table({"a": pa.array(["1"])}), folder / "part-2.parquet")
    with pytest.raises(UserError, match=r"column 'a' is string, not integer; write the files with one schema"):
        Manifest.read(str(folder))


def test_the_order_of_columns_is_no_difference(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"b": [1], "a": [2]}), tmp_path / "1.parquet")
    assert Manifest.read(str(tmp_path)).rows == 2


@pytest.mark.parametrize("statistics", [True, False])
def test_describe(tmp_path: Path, statistics: bool) -> None:
    table = pa.table(
        {
            "a": pa.array([1, None, 3, None, 5], pa.int32()),
            "b": pa.array([[1], None, [], [None, 2], None], pa.list_(pa.int64())),
            "c": [1.0] * 5,
        }
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=3, write_statistics=statistics)
    described = describe(str(tmp_path))
    assert described["columns"] == [
        {"name": "a", "type": "int32", "nulls": 2},
        {"name": "b", "type": "list<element: int64>", "nulls": 2},
        {"name": "c", "type": "double", "nulls": 0},
    ]
    assert (described["files"], described["rows"], described["row_groups"]) == (1, 5, 2)
    assert described["row_group_rows"] == {"min": 2, "max": 3}
    assert described["bytes"] == os.path.getsize(tmp_path / "x.parquet")
    assert described["fingerprint"] == Manifest.read(str(tmp_path)).fingerprint()


def test_a_prepared_folder_is_shown_split_by_split(tmp_path: Path) -> None:
    for split, rows in (("train", 5), ("test", 2)):
        (tmp_path / split).mkdir()
        pq.write_table(pa.table({"x": list(range(rows))}), tmp_path / split / "part-0.parquet")
    pq.write_table(pa.table({"other": ["a"]}), tmp_path / "items.parquet")  # not of the splits' columns
    assert prepared_splits(str(tmp_path)) == ("train", "test")
    assert prepared_splits(str(tmp_path / "train")) == ()
    shown = CliRunner().invoke(data_app, ["inspect", str(tmp_path)]).stdout
    for option in ("--max-streams", "--max-lanes"):  # the latter is the former name
        assert CliRunner().invoke(data_app, ["inspect", str(tmp_path), option, "64"]).stdout == shown
    assert "5 rows in" in shown
    assert "2 rows in" in shown
    guessed = CliRunner().invoke(data_app, ["inspect", str(tmp_path), "--schema"]).stdout
    assert "(7 rows)" in guessed  # tables are sized from all splits
