"""The cache of footers: what it saves, and when it is not believed."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.config import StorageConfig
from rechub_dist.data.parquet import manifest as module
from rechub_dist.data.parquet.footers import read_footer
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.pages import read_parquet, read_schema
from rechub_dist.data.parquet.storage import Store
from rechub_dist.skips import BadFileError

LONG_AGO = 1_500_000_000


def write(path: Path, rows: int = 5, **columns: list[Any]) -> None:
    """A file that seems old."""
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"a": list(range(rows)), **columns}), path, row_group_size=2)
    os.utime(path, (LONG_AGO, LONG_AGO))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for part in range(3):
        write(tmp_path / "data" / f"part-{part}.parquet")
    return tmp_path / "data"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose footers are read from now on."""
    names: list[str] = []

    def spy(store: Store, path: str) -> Any:
        names.append(Path(path).name)
        return read_footer(store, path)

    monkeypatch.setattr(module, "read_footer", spy)
    return names


def test_a_column_whose_name_is_no_text_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"clicked": [1, 0]}), path)
    path.write_bytes(path.read_bytes().replace(b"clicked", b"clic\x80ed"))
    for read in (lambda: Manifest.read(str(path)), lambda: read_parquet(path), lambda: read_schema(path)):
        with pytest.raises(BadFileError, match=r"part\.parquet: it is truncated or corrupt \('utf-8' codec"):
            read()


def cache_file(folder: Path) -> Path:
    [path] = (folder.parent / "cache" / "rechub-dist" / "manifests").iterdir()
    return path


def test_footers_are_read_once(folder: Path, read: list[str]) -> None:
    first = Manifest.read(str(folder))
    assert len(read) == 3
    second = Manifest.read(str(folder))
    assert len(read) == 3
    assert (second.files, second.schema) == (first.files, first.schema)
    assert second.rows == 15
    Manifest.read(str(folder), StorageConfig(cache=False))
    assert len(read) == 6


def test_only_what_has_changed_is_read_again(folder: Path, read: list[str]) -> None:
    Manifest.read(str(folder))
    read.clear()
    write(folder / "part-1.parquet", rows=7)  # another size
    os.utime(folder / "part-2.parquet", (LONG_AGO + 1, LONG_AGO + 1))
    write(folder / "part-3.parquet", rows=1)
    assert Manifest.read(str(folder)).rows == 18
    assert sorted(read) == ["part-1.parquet", "part-2.parquet", "part-3.parquet"]
    read.clear()
    assert Manifest.read(str(folder)).rows == 18
    assert read == []


def test_a_file_that_may_still_change_unseen_is_not_kept(folder: Path, read: list[str]) -> None:
    os.utime(folder / "part-0.parquet")
    Manifest.read(str(folder))
    read.clear()
    Manifest.read(str(folder))
    assert read == ["part-0.parquet"]


def test_schemas_are_kept(folder: Path, read: list[str]) -> None:
    write(folder / "part-0.parquet", b=[1.0] * 5)
    first = Manifest.read(str(folder), skip_bad=True)
    read.clear()
    second = Manifest.read(str(folder), skip_bad=True)
    assert read == []
    assert [left_out.file for left_out in second.left_out] == [str(folder / "part-0.parquet")]
    assert second.left_out == first.left_out


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_cache_is_passed_over_and_mended(folder: Path, read: list[str], damage: str) -> None:
    Manifest.read(str(folder))
    path = cache_file(folder)
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes({"truncate": content[:-7], "flip": content, "empty": b""}[damage])
    read.clear()
    assert Manifest.read(str(folder)).rows == 15
    assert len(read) == 3
    read.clear()
    assert Manifest.read(str(folder)).rows == 15
    assert read == []


def test_a_cache_that_cannot_be_written_is_done_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "file"))
    assert Manifest.read(str(folder)).rows == 15


def test_many_at_once(folder: Path) -> None:
    rows: list[int] = []
    readers = [threading.Thread(target=lambda: rows.append(Manifest.read(str(folder)).rows)) for _ in range(16)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert rows == [15] * 16
    cache_file(folder)  # one, and no temporary file beside it
