"""Rows of bad files that are left out: which, how many, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rechub_dist.batch import Batch
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError
from rechub_dist.features import CatalogueFeature, DenseFeature, NegativeFeature, SparseFeature, Table
from rechub_dist.skips import Tally
from rechub_tests.damage import spoil_footer, spoil_pages

FILES, GROUPS, ROWS = 3, 4, 25
SPEC = BatchSpec(
    features=(
        SparseFeature("row", Table("row", FILES * GROUPS * ROWS)),
        NegativeFeature("negative", Table("item", 1000), like="row", count=2),
    ),
    dense=(DenseFeature("x"),),
    collections={"all": ("row", "negative")},
)
BAD = (1, 2)  # file and row group
BAD_ROWS = range((BAD[0] * GROUPS + BAD[1]) * ROWS, (BAD[0] * GROUPS + BAD[1] + 1) * ROWS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`row` numbers the rows of the data set."""
    for part in range(FILES):
        rows = np.arange(part * GROUPS * ROWS, (part + 1) * GROUPS * ROWS)
        table = pa.table({"row": rows, "x": rows.astype(np.float32)})
        pq.write_table(table, tmp_path / f"part-{part}.parquet", row_group_size=ROWS)
    return tmp_path


def contents(batch: Batch) -> list[tuple[int, list[int], float]]:
    """Row, negatives and value of each row of a batch."""
    rows, negatives = batch.feature("row"), batch.feature("negative")
    assert rows.lengths()[batch.rows :].sum() == 0
    drawn = torch.split(negatives.values(), negatives.lengths()[: batch.rows].tolist())
    return [(r, n.tolist(), x[0]) for r, n, x in zip(rows.values().tolist(), drawn, batch.dense.tolist(), strict=True)]


def batches(manifest: Manifest, world: int = 1, **arguments: Any) -> list[list[Batch]]:
    """For each step, the ranks' batches."""
    ranks = [
        list(ParquetReader(manifest, SPEC, batch_size=32, rank=rank, world_size=world, **arguments).batches(1))
        for rank in range(world)
    ]
    return [list(step) for step in zip(*ranks, strict=True)]


def vanish(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    pq.write_table(pa.table({"row": [0], "x": [0.0]}), path)


def other_columns(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.rename_columns(["row", "y"]), path, row_group_size=ROWS)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("arguments", [{}, {"shuffle": False}, {"shuffle_rows": 60, "prefetch": 0}], ids=str)
def test_the_other_rows_stay_where_they_are(folder: Path, world: int, arguments: dict[str, Any]) -> None:
    good = [contents(batch) for [batch] in batches(Manifest.read(str(folder)), **arguments)]
    assert spoil_pages(folder / f"part-{BAD[0]}.parquet", BAD[1]) == ROWS
    found = batches(Manifest.read(str(folder), skip_bad=True), world, **arguments)
    for step, planned in zip(found, good, strict=True):
        rest = [row for row in planned if row[0] not in BAD_ROWS]
        assert [row for batch in step for row in contents(batch)] == rest
        assert sum(batch.skipped for batch in step) == len(planned) - len(rest)
        assert {batch.jagged["all"].stride() for batch in step} == {-(-len(planned) // world)}
    notices = {notice for step in found for batch in step for notice in batch.notices}
    assert sum(notice.rows or 0 for notice in notices) == ROWS
    for notice in notices:
        assert (notice.file, notice.row_group, notice.reason) == (str(folder / "part-1.parquet"), BAD[1], "corrupt")


@pytest.mark.parametrize(("damage", "reason"), [(vanish, "missing"), (replace, "changed"), (other_columns, "changed")])
def test_a_file_that_goes_bad_during_the_run(folder: Path, damage: Callable[[Path], None], reason: str) -> None:
    strict, lenient = (Manifest.read(str(folder), skip_bad=skip) for skip in (False, True))
    damage(folder / "part-2.parquet")
    with pytest.raises(UserError, match=r"part-2\.parquet: "):
        batches(strict)
    tally = Tally()
    for [batch] in batches(lenient):
        tally.add(batch.rows, batch.skipped)
        tally.note(batch.notices)
    tally.check(lenient.rows, whole=True, what="epoch")
    assert tally.values() == {
        "rows_read": (FILES - 1) * GROUPS * ROWS,
        "rows_skipped": GROUPS * ROWS,
        f"rows_skipped_{reason}": GROUPS * ROWS,
    }


@pytest.mark.parametrize(
    ("damage", "reason", "words"),
    [(spoil_footer, "corrupt", "truncated or corrupt"), (other_columns, "schema", "column 'x' is missing, not float")],
)
@pytest.mark.parametrize("part", [0, 2])
def test_a_file_that_is_bad_from_the_beginning(
    folder: Path, damage: Callable[[Path], None], reason: str, words: str, part: int
) -> None:
    damage(folder / f"part-{part}.parquet")
    with pytest.raises(UserError, match=r"part-\d\.parquet: "):
        Manifest.read(str(folder))
    manifest = Manifest.read(str(folder), skip_bad=True)
    assert [file.name for file in manifest.files] == [f"part-{i}.parquet" for i in range(FILES) if i != part]
    [left_out] = manifest.left_out
    assert (left_out.file, left_out.reason) == (str(folder / f"part-{part}.parquet"), reason)
    assert words in left_out.message


def test_nothing_but_bad_files_is_an_error(folder: Path) -> None:
    for part in range(FILES):
        spoil_footer(folder / f"part-{part}.parquet")
    with pytest.raises(UserError, match=r"no rows in its 3 Parquet file\(s\) that can be read; .*part-0\.parquet"):
        Manifest.read(str(folder), skip_bad=True)


def test_bad_values_are_no_bad_files(folder: Path) -> None:
    spec = BatchSpec(features=(SparseFeature("row", Table("row", 7)),), collections={"all": ("row",)})
    reader = ParquetReader(Manifest.read(str(folder), skip_bad=True), spec, batch_size=10)
    with pytest.raises(UserError, match=r"column 'row': id .* is outside"):
        list(reader.batches(0))


def test_a_dealt_catalogue_needs_all_rows(folder: Path) -> None:
    features = (*SPEC.features, CatalogueFeature("catalogue", Table("item", 1000)))
    spec = BatchSpec(features=features, collections={"all": ("row", "negative", "catalogue")})
    ParquetReader(Manifest.read(str(folder)), spec, batch_size=10)
    with pytest.raises(UserError, match=r"data.on_bad_file: skip does not go with negatives: full"):
        ParquetReader(Manifest.read(str(folder), skip_bad=True), spec, batch_size=10)


def test_a_tally_that_does_not_add_up(folder: Path) -> None:
    spoil_pages(folder / "part-1.parquet", 2)
    [first, *_] = [n for [batch] in batches(Manifest.read(str(folder), skip_bad=True)) for n in batch.notices]
    tally = Tally()
    tally.add(275, 25)
    assert tally.note([first, first]) == [first]  # of two ranks
    assert str(tally) == f"275 rows read, 25 skipped ({first.rows} corrupt)"
    tally.check(300, whole=False, what="these steps")
    with pytest.raises(RuntimeError, match="these steps: 301 rows were planned, but 275 were read and 25 skipped"):
        tally.check(301, whole=False, what="these steps")
    tally.add(0, 1)
    with pytest.raises(RuntimeError, match="by reason"):
        tally.check(301, whole=True, what="epoch 0")
