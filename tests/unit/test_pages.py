"""Flipped bits in Parquet pages: found where pages have checksums, and what checksums do not protect."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.data.columns.extremes import check_extremes
from rechub_dist.data.columns.frequencies import build_vocabularies
from rechub_dist.data.parquet.manifest import Manifest, describe
from rechub_dist.data.parquet.pages import open_parquet, parquet_writer, read_parquet
from rechub_dist.data.prepare.writer import write_split
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.spec import BatchSpec
from rechub_dist.data.tools.rechunk import rechunk
from rechub_dist.errors import UserError
from rechub_dist.features import DenseFeature
from rechub_dist.skips import BadFileError

ROWS = 4000
SPEC = BatchSpec((), (DenseFeature("x"), DenseFeature("few")), (), collections={})


def table() -> pa.Table:
    random = np.random.default_rng(0)
    # `few` has a dictionary page; `x` has none that stays
    return pa.table({"x": random.random(ROWS), "few": random.integers(0, 50, ROWS) * 1.5})


def write(path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, table().schema, **options) as writer:
        writer.write_table(table(), row_group_size=ROWS // 4)
    return path


def write_ours(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with parquet_writer(path, table().schema) as writer:
        writer.write_table(table(), row_group_size=ROWS // 4)
    return path


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def in_pages(path: Path, column: int) -> list[int]:
    """Places spread over the bytes of a column's pages in row group 1, the last third, which no header is in."""
    chunk = pq.read_metadata(path).row_group(1).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    size = chunk.total_compressed_size
    return list(range(start + size * 2 // 3, start + size - 8, max(1, size // 60)))


def outcomes(path: Path, column: int) -> Counter[str]:
    """What reading gives after each of some flips, one at a time."""
    good, content = table(), path.read_bytes()
    found: Counter[str] = Counter()
    for place in in_pages(path, column):
        flip(path, place)
        try:
            batches = list(ParquetReader(Manifest.read(str(path)), SPEC, batch_size=ROWS).batches(0))
            expected = np.stack([good["x"].to_numpy(), good["few"].to_numpy()], axis=1).astype(np.float32)
            same = len(batches) == 1 and np.array_equal(
                np.sort(batches[0].dense.numpy(), axis=0), np.sort(expected, axis=0)
            )
            found["same" if same else "other values"] += 1
        except UserError as error:
            found["refused" if f"{path}: row group 1 is truncated or corrupt" in str(error) else str(error)] += 1
        path.write_bytes(content)
    return found


@pytest.mark.parametrize("column", [0, 1])
@pytest.mark.parametrize("options", [{"compression": "none"}, {"compression": "zstd"}, {"data_page_version": "2.0"}])
def test_every_flipped_bit_in_a_page_with_a_checksum_is_found(
    tmp_path: Path, column: int, options: dict[str, Any]
) -> None:
    found = outcomes(write(tmp_path / "data.parquet", write_page_checksum=True, **options), column)
    assert set(found) == {"refused"}
    assert found.total() >= 15


@pytest.mark.parametrize("column", [0, 1])
def test_what_we_write_has_checksums(tmp_path: Path, column: int) -> None:
    assert set(outcomes(write_ours(tmp_path / "data.parquet"), column)) == {"refused"}


def test_without_checksums_other_values_are_read(tmp_path: Path) -> None:
    """As the documentation says: this is what cannot be told."""
    path = write(tmp_path / "data.parquet", compression="none", use_dictionary=False)
    assert outcomes(path, 0)["other values"] > 5


def test_a_dictionary_page_has_one_too(tmp_path: Path) -> None:
    path = write(tmp_path / "data.parquet", write_page_checksum=True, compression="none", use_dictionary=["few"])
    chunk = pq.read_metadata(path).row_group(1).column(1)
    flip(path, chunk.data_page_offset - 20)  # in the last values of the dictionary
    with pytest.raises(UserError, match=r"row group 1 is truncated or corrupt .*CRC"):
        list(ParquetReader(Manifest.read(str(path)), SPEC, batch_size=ROWS).batches(0))


def test_a_bad_page_is_skipped_like_any_bad_file(tmp_path: Path) -> None:
    path = write_ours(tmp_path / "data.parquet")
    flip(path, in_pages(path, 0)[0])
    reader = ParquetReader(Manifest.read(str(path), skip_bad=True), SPEC, batch_size=ROWS // 4, shuffle=False)
    assert sum(batch.rows for batch in reader.batches(0)) == ROWS * 3 // 4


def test_all_that_writes_parquet_writes_checksums(tmp_path: Path) -> None:
    data = write(tmp_path / "data" / "data.parquet")
    rechunk(str(data), tmp_path / "rechunked")
    words = pa.table({"word": [f"w{i % 100}" for i in range(1000)]})
    write_split(tmp_path, "split", words)
    build_vocabularies(str(tmp_path / "split"), ["word"], tmp_path / "word.parquet")
    for path in (tmp_path / "rechunked/part-00000.parquet", tmp_path / "split/part-00000.parquet",
                 tmp_path / "word.parquet"):  # fmt: skip
        chunk = pq.read_metadata(path).row_group(0).column(0)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        flip(path, start + chunk.total_compressed_size - 4)
        with pytest.raises(OSError, match="CRC"):
            open_parquet(path).read_row_group(0)
        with pytest.raises(BadFileError, match=r"parquet: it is truncated or corrupt .*CRC"):
            read_parquet(path)


def test_rechunk_and_inspect_refuse_a_bad_page(tmp_path: Path) -> None:
    path = write(tmp_path / "data" / "data.parquet", write_page_checksum=True, write_statistics=False)
    flip(path, in_pages(path, 0)[0])
    with pytest.raises(BadFileError, match="truncated or corrupt"):
        rechunk(str(path), tmp_path / "out")
    with pytest.raises(BadFileError, match="truncated or corrupt"):
        describe(str(path))
    assert not (tmp_path / "out").exists()


def test_a_column_whose_place_has_no_name_is_damage(tmp_path: Path) -> None:
    """In a footer each column is named twice: in the schema, and where its pages are told."""
    path = write_ours(tmp_path / "part.parquet")
    told = b"\x19\x18\x03few"  # thrift: a list of one string
    assert path.read_bytes().count(told) == 4
    path.write_bytes(path.read_bytes().replace(told, told[:-1] + b"\x80"))
    manifest = Manifest.read(str(path))
    check_extremes(manifest.files, SPEC)  # which leaves it to the reader
    with pytest.raises(BadFileError, match=r"part\.parquet: row group 0 is truncated or corrupt \('utf-8' codec"):
        next(iter(ParquetReader(manifest, SPEC, batch_size=10, shuffle=False, prefetch=0).batches(0)))
