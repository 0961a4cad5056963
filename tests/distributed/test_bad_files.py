"""Files that are bad, or go bad: an error on all ranks, or fewer rows on whichever rank had them, and no hang."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.data.run_file import load_run
from rechub_dist.distributed.runtime import runtime
from rechub_dist.errors import UserError
from rechub_dist.training.trainer import Summary, Trainer
from rechub_tests.damage import spoil_footer, spoil_pages
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import slow
from rechub_tests.runs import SCHEMA, losses, output, records, run_file, train, write_data

SKIP = {"on_bad_file": "skip"}


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """A data set to break: files of 200, 200 and 130 rows in row groups of 70."""
    write_data(tmp_path / "data")
    return tmp_path / "data"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output(path) / "skipped.jsonl").read_text().splitlines()]


def unweigh(path: Path, group: int) -> None:
    """Give the rows of a row group no weight."""
    table = pq.read_table(path)
    weights = table["importance"].to_numpy().copy()
    weights[group * 70 : (group + 1) * 70] = 0
    place = table.column_names.index("importance")
    pq.write_table(table.set_column(place, "importance", pa.array(weights)), path, row_group_size=70)


# Of an unshuffled epoch, batches of 20 rows lie wholly in the bad row group.
@pytest.mark.parametrize("data", [{}, {"shuffle": False, "batch_size": 20}], ids=["shuffled", "whole_batches"])
@pytest.mark.parametrize(("ranks", "pipeline"), [slow(1, "base"), slow(2, "base"), (2, "sparse_dist")])
def test_skipped_rows_are_as_rows_without_weight(
    pool: RankPool, tmp_path: Path, ranks: int, pipeline: str, data: dict[str, Any]
) -> None:
    found = {}
    for kind, damage in (("skipped", spoil_pages), ("unweighed", unweigh)):
        root = tmp_path / kind / "data"
        write_data(root)
        damage(root / "train" / "part-1.parquet", 1)
        path = run_file(
            tmp_path / kind,
            root,
            "DeepFM",
            data={**data, **SKIP, "dataset": {**SCHEMA, "weight": "importance"}},
            model={"batch_norm": False},
            distributed={"pipeline": pipeline},
        )
        pool.run(ranks, train, path)
        found[kind] = losses(path)
        epochs = [(r["epoch"], r["rows_read"], r["rows_skipped"]) for r in records(path, "rows")]
        assert epochs == ([(0, 460, 70), (1, 460, 70)] if kind == "skipped" else [(0, 530, 0), (1, 530, 0)])
    assert found["skipped"] == pytest.approx(found["unweighed"], rel=1e-5, abs=1e-7)
    skipped = lines(tmp_path / "skipped" / "run.yaml")
    assert {Path(line["file"]).name for line in skipped} == {"part-1.parquet"}
    assert {(line["row_group"], line["reason"], line["split"]) for line in skipped} == {(1, "corrupt", "train")}
    assert sum(line["rows"] for line in skipped) == 2 * 70  # in two epochs


@pytest.mark.slow
@pytest.mark.parametrize("model", ["DCNv2", "SASRec"])  # with batch normalisation; with drawn negatives
def test_the_number_of_ranks_does_not_matter(pool: RankPool, own_data: Path, tmp_path: Path, model: str) -> None:
    spoil_pages(own_data / "train" / "part-0.parquet", 0)
    spoil_pages(own_data / "valid" / "part-0.parquet", 1)
    found = {}
    for ranks in (1, 3):
        path = run_file(tmp_path / str(ranks), own_data, model, data={"shuffle": False, "batch_size": 30, **SKIP})
        pool.run(ranks, train, path)
        found[ranks] = losses(path)
        assert [record["rows_skipped"] for record in records(path, "valid")] == [20, 20]
    assert found[3] == pytest.approx(found[1], rel=1e-4)


def test_a_file_without_a_footer_is_left_out(pool: RankPool, own_data: Path, tmp_path: Path) -> None:
    spoil_footer(own_data / "train" / "part-0.parquet")
    path = run_file(tmp_path, own_data, "DeepFM", data=SKIP)
    pool.run(2, train, path)
    [line] = lines(path)
    assert (Path(line["file"]).name, line["rows"], line["reason"]) == ("part-0.parquet", None, "corrupt")
    assert [(r["rows_read"], r["files_left_out"]) for r in records(path, "rows")] == [(330, 1)] * 2


def train_while_a_file_vanishes(path: Path, file: Path) -> Summary:
    """What every rank does; the file goes when the manifests are read."""
    with runtime("cpu", 60, 1) as rt:
        trainer = Trainer(load_run(path), rt)
        rt.together(lambda: file.unlink() if rt.is_main else None)
        try:
            return trainer.fit()
        finally:
            trainer.report.close()


def test_a_file_that_vanishes_stops_all_ranks(pool: RankPool, own_data: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, own_data, "DeepFM")
    with pytest.raises(UserError, match=r"part-2\.parquet: row group \d cannot be read .*check that it is there"):
        pool.run(2, train_while_a_file_vanishes, path, own_data / "train" / "part-2.parquet")


def test_a_file_that_vanishes_is_skipped(pool: RankPool, own_data: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, own_data, "DeepFM", data=SKIP)
    pool.run(2, train_while_a_file_vanishes, path, own_data / "train" / "part-2.parquet")
    assert [(r["rows_read"], r["rows_skipped_missing"]) for r in records(path, "rows")] == [(400, 130)] * 2


def train_on_own_copy(path: Path, roots: list[Path]) -> Summary:
    """What every rank does: with data of its own."""
    with runtime("cpu", 60, 1) as rt:
        trainer = Trainer(load_run(path, [f"data.root={roots[rt.rank]}"]), rt)
        try:
            return trainer.fit()
        finally:
            trainer.report.close()


def test_ranks_that_see_different_files(pool: RankPool, own_data: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "other", rows_of_train=430)
    path = run_file(tmp_path, own_data, "DeepFM", train={"epochs": 1})
    words = r"train: rank 0 sees 3 file\(s\) of 530 rows, rank 1 3 of 430, .*give all hosts the same data"
    with pytest.raises(UserError, match=words):
        pool.run(2, train_on_own_copy, path, [own_data, tmp_path / "other"])
    write_data(tmp_path / "copy")
    pool.run(2, train_on_own_copy, path, [own_data, tmp_path / "copy"])
    assert [record["rows_read"] for record in records(path, "rows")] == [530]


def test_an_epoch_in_two_parts_is_accounted_for(pool: RankPool, own_data: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, own_data, "DeepFM", train={"epochs": 1}, data={"shuffle": False, **SKIP})
    spoil_pages(own_data / "train" / "part-2.parquet", 1)  # the last 60 rows
    pool.run(2, train, path, ["train.max_steps=4"])
    pool.run(3, train, path)
    found = [(r["step"], r["rows_read"], r["rows_skipped"]) for r in records(path, "rows")]
    assert found == [(4, 4 * 64, 0), (9, 530 - 4 * 64 - 60, 60)]
