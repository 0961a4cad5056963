from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rechub_dist.batch import Batch
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.reader import ParquetReader, _Source
from rechub_dist.data.spec import BatchSpec
from rechub_dist.errors import UserError
from rechub_dist.features import DenseFeature, Label, NegativeFeature, SequenceFeature, SparseFeature, Table
from rechub_tests.damage import spoil_pages

ROW = Table("row", 10_000)
ITEM = Table("item", 50)
SPEC = BatchSpec(
    features=(
        SparseFeature("row", ROW),
        SequenceFeature("history", ITEM, max_length=3),
        NegativeFeature("negative", ITEM, like="history", count=2, exclude=("history",)),
    ),
    dense=(DenseFeature("x"),),
    labels=(Label("y"),),
    collections={"a": ("row",), "b": ("history", "negative")},
)


def write(folder: Path, layout: list[list[int]]) -> Manifest:
    """Files of row groups of these sizes; `row` numbers the rows of the data set from 0."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for number, counts in enumerate(layout):
        rows = np.arange(first, first + sum(counts))
        table = pa.table(
            {
                "row": rows,
                "history": [[int((r * k) % 50) for k in range(r % 5)] for r in rows],
                "x": rows.astype(np.float32) / 2,
                "y": rows % 2,
                "unread": ["text"] * len(rows),
            },
            schema=pa.schema(
                [
                    ("row", pa.int64()),
                    ("history", pa.list_(pa.int64())),
                    ("x", pa.float32()),
                    ("y", pa.int64()),
                    ("unread", pa.string()),
                ]
            ),
        )
        with pq.ParquetWriter(folder / f"part-{number:03}.parquet", table.schema) as writer:
            start = 0
            for count in counts:
                writer.write_table(table.slice(start, count), row_group_size=max(count, 1))
                start += count
        first += sum(counts)
    return Manifest.read(str(folder))


Row = tuple[int, list[int], list[int], float, float]


def rows_of(batch: Batch) -> list[Row]:
    """The rows of a batch, checked for padding."""
    a, b = batch.jagged["a"], batch.jagged["b"]
    assert a.stride() == b.stride()
    assert a.stride() - batch.rows in (0, 1)

    def split(jagged: Any) -> list[list[int]]:
        return [part.tolist() for part in torch.split(jagged.values(), jagged.lengths().tolist())]

    columns = [split(a["row"]), split(b["history"]), split(b["negative"])]
    assert all(column[batch.rows :] == [[]] * (a.stride() - batch.rows) for column in columns)
    row, history, negative = (column[: batch.rows] for column in columns)
    values = zip(row, history, negative, batch.dense.tolist(), batch.labels.tolist(), strict=True)
    return [(r[0], h, n, x[0], y[0]) for r, h, n, x, y in values]


def read(manifest: Manifest, epoch: int = 0, start: int = 0, world: int = 1, **arguments: Any) -> list[list[Row]]:
    """The global batches of an epoch, put together from all ranks."""
    arguments = {"spec": SPEC, **arguments}
    ranks = []
    for rank in range(world):
        reader = ParquetReader(manifest, rank=rank, world_size=world, **arguments)
        ranks.append(list(reader.batches(epoch, start)))
        assert len(ranks[-1]) == reader.steps - start
    for batches in zip(*ranks, strict=True):
        assert len({batch.jagged["a"].stride() for batch in batches}) == 1
    return [[row for batch in batches for row in rows_of(batch)] for batches in zip(*ranks, strict=True)]


def wait_until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def threads() -> int:
    return sum(thread.name == "rechub-dist-reader" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert threads() == 0


layouts = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=4), min_size=1, max_size=4).filter(
    lambda layout: sum(map(sum, layout)) > 0
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=layouts,
    batch_size=st.integers(1, 40),
    world=st.sampled_from((2, 3, 4, 7)),
    shuffle=st.booleans(),
    shuffle_rows=st.sampled_from((1, 60, 1000)),
    streams=st.none() | st.integers(1, 5),
    seed=st.integers(0, 5),
    resume=st.floats(0, 1),
)
def test_rows_do_not_depend_on_ranks_or_restarts(
    *, tmp_path_factory: pytest.TempPathFactory, layout: list[list[int]], world: int, resume: float, **arguments: Any
) -> None:
    manifest = write(tmp_path_factory.mktemp("data"), layout)
    whole = read(manifest, prefetch=0, **arguments)
    assert sorted(row[0] for batch in whole for row in batch) == list(range(manifest.rows))
    for batch in whole:
        for row, history, negative, x, y in batch:
            assert history == [(row * k) % 50 for k in range(row % 5)][-3:]
            assert (x, y) == (row / 2, row % 2)
            assert len(negative) == 2 * len(history)
            assert not {*negative} & {*history}
    assert read(manifest, prefetch=2, world=world, **arguments) == whole
    start = round(resume * len(whole))
    assert read(manifest, prefetch=1, start=start, world=world, **arguments) == whole[start:]


def ragged_layouts(rows: int) -> st.SearchStrategy[list[list[int]]]:
    """Files with equal row groups but for the last of each, as writers leave them."""
    sizes = st.tuples(st.integers(1, 6), st.integers(0, rows))
    return st.integers(1, rows).flatmap(
        lambda size: st.lists(sizes, min_size=1, max_size=6).map(
            lambda files: [[size] * groups + [min(size, last)] for groups, last in files]
        )
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=ragged_layouts(20),
    batch_size=st.integers(1, 30),
    shuffle_rows=st.sampled_from((20, 100, 8000)),
    drop_last=st.booleans(),
    data=st.data(),
)
def test_each_row_once_over_kills_and_changes_of_the_world_size(
    *, tmp_path_factory: pytest.TempPathFactory, layout: list[list[int]], data: st.DataObject, **arguments: Any
) -> None:
    manifest = write(tmp_path_factory.mktemp("data"), layout)
    whole = read(manifest, prefetch=0, **arguments)
    done: list[list[Row]] = []
    while len(done) < len(whole):
        # a run of some ranks takes up the epoch, and applies some steps before it is killed
        world, prefetch = data.draw(st.sampled_from((1, 2, 3, 5))), data.draw(st.sampled_from((0, 1, 4)))
        steps = data.draw(st.integers(1, len(whole) - len(done)))
        readers = [
            ParquetReader(manifest, SPEC, rank=rank, world_size=world, prefetch=prefetch, **arguments)
            for rank in range(world)
        ]
        ranks = [reader.batches(0, len(done)) for reader in readers]
        done += [[row for rank in ranks for row in rows_of(next(rank))] for _ in range(steps)]
        for rank in ranks:
            rank.close()
    assert done == whole
    rows = [row[0] for batch in done for row in batch]
    assert len(set(rows)) == len(rows)
    size = arguments["batch_size"]
    assert len(rows) == (manifest.rows // size * size if arguments["drop_last"] else manifest.rows)


def test_unshuffled_is_the_stored_order(tmp_path: Path) -> None:
    manifest = write(tmp_path, [[7, 0, 5], [11]])
    rows = [row[0] for batch in read(manifest, world=3, batch_size=4, shuffle=False) for row in batch]
    assert rows == list(range(23))


def test_epochs_differ(tmp_path: Path) -> None:
    manifest = write(tmp_path, [[40, 40]])
    first, second = (read(manifest, epoch, batch_size=16) for epoch in (0, 1))
    assert [[row[0] for row in batch] for batch in first] != [[row[0] for row in batch] for batch in second]
    negatives = [{row[0]: row[2] for batch in epoch for row in batch if row[1]} for epoch in (first, second)]
    assert sum(negatives[0][row] == negatives[1][row] for row in negatives[0]) < 10


def test_more_ranks_than_rows(tmp_path: Path) -> None:
    manifest = write(tmp_path, [[3]])
    readers = [ParquetReader(manifest, SPEC, batch_size=8, rank=rank, world_size=4) for rank in range(4)]
    assert [(reader.rows, reader.steps) for reader in readers] == [(3, 1)] * 4
    batches = [next(iter(reader.batches(0))) for reader in readers]
    assert [batch.rows for batch in batches] == [1, 1, 1, 0]
    last = batches[3]
    assert tuple(last.dense.shape) == (0, 1)
    assert tuple(last.labels.shape) == (0, 1)
    assert last.jagged["b"].stride() == 1
    assert last.jagged["b"].lengths().tolist() == [0, 0]
    assert last.jagged["b"].values().tolist() == []


def test_only_the_needed_windows_and_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write(tmp_path, [[50] * 8] * 4)
    reads: dict[tuple[int, int], list[str]] = {}
    plain = pq.ParquetFile.read_row_group
    files = []  # kept: a file that is opened later must not get the same identity

    def spy(self: Any, group: int, columns: list[str], **arguments: Any) -> pa.Table:
        files.append(self)
        reads.setdefault((id(self), group), []).extend(columns)
        assert arguments == {"use_threads": False}
        return plain(self, group, columns=columns, **arguments)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    reader = ParquetReader(manifest, SPEC, batch_size=64, rank=1, world_size=4, prefetch=0, seed=3)
    assert reader.order.streams == 32
    assert len(list(reader.batches(0))) == 25
    # a quarter of the row groups, and what ranks share while not all streams are active
    assert 8 <= len(reads) <= 12
    assert all(columns == ["row", "history", "x", "y"] for columns in reads.values())
    reads.clear()
    assert len(list(reader.batches(0, 20))) == 5
    assert 0 < len(reads) <= 12
    reads.clear()
    assert list(reader.batches(0, 25)) == []
    assert reads == {}


@pytest.mark.parametrize("ahead", [False, True])
def test_open_windows_are_bounded(tmp_path: Path, ahead: bool) -> None:
    manifest = write(tmp_path, [[20] * 16] * 2)
    reader = ParquetReader(manifest, SPEC, batch_size=16, shuffle_rows=8 * 20, prefetch=0)
    assert reader.order.streams == 8
    most = 0

    class Source(_Source):
        def _read(self, *arguments: Any) -> Any:
            nonlocal most
            most = max(most, len(self._windows) + 1)
            return super()._read(*arguments)

    source = Source(reader, reader.order.epoch(0))
    for step, _ in enumerate(source.batches(0)):
        while ahead and source.open_ahead():
            pass
        for index, opened in source._windows.items():
            assert opened.last_step > step
            # what is open ahead is the next of its stream
            assert opened.first_step <= step + 1 or index - 1 in source._windows
    assert most == (11 if ahead else 9)  # a batch straddles the windows of one stream
    assert not source._windows


def test_windows_are_opened_while_the_consumer_is_busy(tmp_path: Path) -> None:
    manifest = write(tmp_path, [[20] * 16])
    opened: list[int] = []

    class Source(_Source):
        def open_ahead(self) -> bool:
            done = super().open_ahead()
            opened.append(done)
            return done

    reader = ParquetReader(manifest, SPEC, batch_size=8, shuffle_rows=80, prefetch=1)
    source = Source(reader, reader.order.epoch(0))
    batches = reader._read_ahead(source, 0)
    assert rows_of(next(batches)) == read(manifest, batch_size=8, shuffle_rows=80)[0]
    assert wait_until(lambda: True in opened and opened[-1] is False)
    assert [rows_of(b) for b in batches] == read(manifest, batch_size=8, shuffle_rows=80)[1:]


def test_closing_stops_the_thread(tmp_path: Path) -> None:
    reader = ParquetReader(write(tmp_path, [[50] * 4]), SPEC, batch_size=4, prefetch=2)
    batches = reader.batches(0)
    next(batches)
    assert threads() == 1
    batches.close()
    assert threads() == 0

    def consume() -> None:
        for _ in reader.batches(0):
            raise RuntimeError("the consumer fails")

    with pytest.raises(RuntimeError, match="the consumer fails"):
        consume()
    assert wait_until(lambda: threads() == 0)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_corrupt_page_is_raised_at_its_step(tmp_path: Path, prefetch: int) -> None:
    write(tmp_path, [[10], [10, 10, 10]])
    spoil_pages(tmp_path / "part-001.parquet", 1, column=0)
    manifest = Manifest.read(str(tmp_path))
    batches = ParquetReader(manifest, SPEC, batch_size=5, shuffle=False, prefetch=prefetch).batches(0)
    for _ in range(4):
        assert next(batches).rows == 5
        time.sleep(0.03)  # long enough for the window to be opened ahead, in vain
    with pytest.raises(
        UserError, match=r"part-001\.parquet: row group 1 is truncated or corrupt \([^\n]*write the file"
    ):
        next(batches)
    assert next(batches, None) is None


def test_a_bad_value_names_the_file(tmp_path: Path) -> None:
    manifest = write(tmp_path, [[10], [10]])
    spec = BatchSpec(features=(SparseFeature("row", Table("row", 15)),), collections={"a": ("row",)})
    with pytest.raises(UserError, match=r"part-001\.parquet: column 'row': id 15 is outside table 'row' of 15 rows"):
        list(ParquetReader(manifest, spec, batch_size=5, shuffle=False).batches(0))


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    manifest = write(tmp_path, [[10]])
    write(tmp_path, [[12]])
    with pytest.raises(UserError, match=r"part-000\.parquet: it has changed since the run began"):
        list(ParquetReader(manifest, SPEC, batch_size=5).batches(0))
    (tmp_path / "part-000.parquet").unlink()
    with pytest.raises(UserError, match=r"part-000\.parquet: row group 0 cannot be read .*check that it is there"):
        list(ParquetReader(manifest, SPEC, batch_size=5).batches(0))


def test_many_files_stay_within_the_limit_of_open_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rechub_dist.data.parquet.files._OPEN_FILES", 2)
    manifest = write(tmp_path, [[4]] * 6)
    assert sorted(row[0] for batch in read(manifest, batch_size=5) for row in batch) == list(range(24))


def test_wrong_arguments(tmp_path: Path) -> None:
    manifest = write(tmp_path, [[10]])
    with pytest.raises(UserError, match=f"{tmp_path}: there is no column 'z'"):
        ParquetReader(manifest, BatchSpec(dense=(DenseFeature("z"),)), batch_size=2)
    with pytest.raises(ValueError, match="rank 2"):
        ParquetReader(manifest, SPEC, batch_size=2, rank=2, world_size=2)
    with pytest.raises(ValueError, match="prefetch is -1"):
        ParquetReader(manifest, SPEC, batch_size=2, prefetch=-1)
    with pytest.raises(ValueError, match=r"start_step is 6, must be within 0\.\.5"):
        ParquetReader(manifest, SPEC, batch_size=2).batches(0, 6)


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (pa.int64(), [3, 9], [3, -1]),
        (pa.int8(), [3, 9], [3, 10]),
        (pa.uint32(), [3, 9], [3, 2**31 + 5]),
        (pa.uint64(), [3, 9], [3, 2**63 + 5]),
        (pa.list_(pa.int64()), [[3], [9]], [[3], [10]]),
        (pa.list_(pa.uint64()), [[3], [9, 9]], [[3], [9, 2**64 - 1]]),
    ],
)
def test_ids_outside_the_table_are_found_with_and_without_statistics(
    tmp_path: Path, statistics: bool, kind: pa.DataType, good: list[Any], bad: list[Any]
) -> None:
    spec = BatchSpec((SparseFeature("id", Table("id", 10)),), collections={"a": ("id",)})
    for name, ids in (("good", good), ("bad", bad)):
        (tmp_path / name).mkdir()
        pq.write_table(
            pa.table({"id": pa.array(ids, kind)}), tmp_path / name / "a.parquet", write_statistics=statistics
        )
    (batch,) = ParquetReader(Manifest.read(str(tmp_path / "good")), spec, batch_size=4, shuffle=False).batches(0)
    assert batch.jagged["a"].values().max() == 9
    reader = ParquetReader(Manifest.read(str(tmp_path / "bad")), spec, batch_size=4, shuffle=False)
    with pytest.raises(UserError, match="is outside table 'id' of 10 rows"):
        list(reader.batches(0))


def test_row_groups_that_are_needed_together_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write(tmp_path, [[50] * 8] * 4)
    reference = read(manifest, batch_size=64)
    meeting = threading.Barrier(4)  # nobody passes alone
    plain = _Source._read

    def read_window(self: Any, *arguments: Any) -> Any:
        meeting.wait(timeout=30)
        return plain(self, *arguments)

    reader = ParquetReader(manifest, SPEC, batch_size=64, prefetch=0)
    monkeypatch.setattr(_Source, "_read", read_window)
    source = _Source(reader, reader.order.epoch(0))
    batches = source.batches(0)
    assert len({piece.window for piece in reader.order.epoch(0).share(0).slices}) % 4 == 0
    assert rows_of(next(batches)) == reference[0]
    batches.close()
