from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.partitions import new_partitions
from rechub_dist.data.passes import Epochs, Partitions
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.spec import BatchSpec
from rechub_dist.distributed.runtime import Runtime, runtime
from rechub_dist.errors import UserError
from rechub_dist.features import DenseFeature

SPEC = BatchSpec(dense=(DenseFeature("row"),))


def write(folder: Path, rows: int, *, complete: bool = True) -> None:
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"row": np.arange(rows, dtype=np.float32)}), folder / "part.parquet")
    if complete:
        (folder / "_SUCCESS").touch()


def test_partitions_are_taken_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("day=2", "day=1", "_temporary", ".hidden"):
        write(tmp_path / name, 3)
    (tmp_path / "_SUCCESS").touch()
    assert new_partitions(str(tmp_path), [], complete=False) == ["day=1", "day=2"]
    assert new_partitions(f"file://{tmp_path}", ["day=1"], complete=True) == ["day=2"]
    assert new_partitions(f"{tmp_path}/", ["day=1", "day=2"], complete=True) == []


def test_an_incomplete_partition_is_waited_for(tmp_path: Path) -> None:
    write(tmp_path / "day=1", 3)
    write(tmp_path / "day=2", 3, complete=False)
    write(tmp_path / "day=3", 3)
    assert new_partitions(str(tmp_path), [], complete=True) == ["day=1"]
    assert new_partitions(str(tmp_path), ["day=1"], complete=True) == []
    assert new_partitions(str(tmp_path), [], complete=False) == ["day=1", "day=2", "day=3"]
    (tmp_path / "day=2" / "_SUCCESS").touch()
    assert new_partitions(str(tmp_path), ["day=1"], complete=True) == ["day=2", "day=3"]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "day=2", 3)
    write(tmp_path / "day=1", 3)
    with pytest.raises(UserError, match="partition 'day=1' has appeared after 'day=2', but sorts before it"):
        new_partitions(str(tmp_path), ["day=2"], complete=True)
    (tmp_path / "part.parquet").touch()
    with pytest.raises(UserError, match=r"'part\.parquet' is a file beside the partitions; with data\.order"):
        new_partitions(str(tmp_path), [], complete=False)
    with pytest.raises(UserError, match="nothing cannot be read"):
        new_partitions(str(tmp_path / "nothing"), [], complete=False)


def partitions(folder: Path, rt: Runtime, *, follow: bool, drop_last: bool = False) -> Partitions:
    def open_reader(name: str) -> ParquetReader:
        return ParquetReader(Manifest.read(str(folder / name)), SPEC, batch_size=10, drop_last=drop_last)

    return Partitions(str(folder), open_reader, rt, follow=follow, timeout_seconds=0.1 if follow else None)


def test_steps_and_rows_are_counted_over_the_partitions(tmp_path: Path) -> None:
    sizes = [25, 3, 10, 41]
    for number, rows in enumerate(sizes):
        write(tmp_path / f"day={number}", rows)
    for drop_last in (False, True):
        with runtime("cpu", 60) as rt:
            found = partitions(tmp_path, rt, follow=False, drop_last=drop_last)
        steps: list[tuple[int, int]] = []  # the partition and the rows of each step
        for number, rows in enumerate(sizes):
            steps += [(number, min(10, rows - at)) for at in range(0, rows, 10) if not drop_last or rows - at >= 10]
        assert found.steps == len(steps)
        assert [found.current(step).number for step in range(len(steps))] == [number for number, _ in steps]
        done = 0
        while done < found.steps:
            current = found.current(done)
            for batch in current.reader.batches(current.number, done - current.first_step):
                assert batch.rows == steps[done][1]
                assert found.rows_before(done) == sum(rows for _, rows in steps[:done])
                done += 1
            assert done == current.end
        assert found.rows_before(done) == found.rows == sum(rows for _, rows in steps)


def test_partitions_are_shuffled_differently(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / f"day={number}", 30)
    with runtime("cpu", 60) as rt:
        found = partitions(tmp_path, rt, follow=False)
    orders = [
        [row for batch in current.reader.batches(current.number) for row in batch.dense[:, 0].tolist()]
        for current in map(found.current, (0, 3))
    ]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_the_identity_is_that_of_what_is_begun(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"day={number}", 20)
    with runtime("cpu", 60) as rt:
        found = partitions(tmp_path, rt, follow=False)
    assert [len(found.identity(step)) for step in range(7)] == [0, 1, 1, 2, 2, 3, 3]
    assert found.identity(2)["day=0"] == Manifest.read(str(tmp_path / "day=0")).fingerprint()


def test_waiting_for_growth(tmp_path: Path) -> None:
    with runtime("cpu", 60) as rt:
        found = partitions(tmp_path, rt, follow=True)
        assert (found.steps, found.rows, found.rows_before(0)) == (0, 0, 0)
        assert not found.wait(lambda: False)  # the timeout
        write(tmp_path / "day=1", 25)
        write(tmp_path / "day=2", 25)
        assert found.wait(lambda: False)
        assert (found.steps, found.rows) == (6, 50)
        found._timeout = None
        assert not found.wait(lambda: True)  # asked to stop
        write(tmp_path / "day=0", 25)
        with pytest.raises(UserError, match="'day=0' has appeared after 'day=2'"):
            found.wait(lambda: False)
        still = partitions(tmp_path, rt, follow=False)
        assert still.steps == 9
        write(tmp_path / "day=3", 25)
        assert not still.wait(lambda: False)


def test_epochs_repeat_a_reader(tmp_path: Path) -> None:
    write(tmp_path / "data", 25)
    reader = ParquetReader(Manifest.read(str(tmp_path / "data")), SPEC, batch_size=10)
    epochs = Epochs(reader, 3, "data")
    assert (epochs.steps, epochs.rows) == (9, 25)
    assert [epochs.current(step).number for step in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [epochs.rows_before(step) for step in (0, 2, 3, 4, 9)] == [0, 20, 25, 35, 75]
    assert not epochs.wait(lambda: False)
