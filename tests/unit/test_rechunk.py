from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rechub_dist.data.tools.rechunk as module
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.outputs import MARK
from rechub_dist.data.tools.rechunk import rechunk
from rechub_dist.errors import UserError


def rows(first: int, count: int) -> pa.Table:
    """Rows of every type that matters; `id` numbers them."""
    ids = np.arange(first, first + count)
    colors = pa.array([None if i % 7 == 0 else f"color {i % 5 + first % 3}" for i in ids], pa.string())
    return pa.table(
        {
            "id": ids,
            "color": colors.dictionary_encode(),
            "tags": pa.array([[int(i), int(i) + 1][: i % 3] for i in ids], pa.list_(pa.int32())),
            "profile": pa.FixedSizeListArray.from_arrays(np.repeat(ids, 2).astype(np.float32), 2),
            "label": pa.array(ids % 2, pa.int8()),
        }
    )


def write(folder: Path, layout: list[list[int]]) -> Path:
    folder.mkdir(parents=True)
    first = 0
    for number, counts in enumerate(layout):
        with pq.ParquetWriter(folder / f"part-{number}.parquet", rows(0, 0).schema) as writer:
            for count in counts:
                writer.write_table(rows(first, count), row_group_size=max(1, count))
                first += count
    return folder


def read(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.ParquetFile(file).read() for file in sorted(folder.glob("*.parquet")))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=1, max_size=3).filter(
        lambda layout: sum(map(sum, layout)) > 0
    ),
    row_group_rows=st.integers(1, 40),
    sizes=st.sampled_from(({}, {"files": 1}, {"files": 3}, {"files": 400}, {"file_rows": 7}, {"file_rows": 50})),
    shuffle=st.booleans(),
)
def test_the_same_rows_in_other_row_groups(
    *,
    tmp_path_factory: pytest.TempPathFactory,
    layout: list[list[int]],
    row_group_rows: int,
    sizes: dict[str, int],
    shuffle: bool,
) -> None:
    folder = tmp_path_factory.mktemp("data")
    source = write(folder / "source", layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_READ_ROWS", 8)  # rows wait over several tables
        patch.setattr(module, "_BUCKET_BYTES", 300)
        counts = rechunk(str(source), folder / "out", row_group_rows=row_group_rows, shuffle=shuffle, **sizes)
    total = sum(map(sum, layout))
    assert counts == {"": total}
    found, wanted = read(folder / "out"), read(source)
    assert found.schema == wanted.schema
    assert (found["id"].to_pylist() == list(range(total))) or shuffle
    assert found.sort_by("id").to_pylist() == wanted.to_pylist()
    files = [file.counts for file in Manifest.read(str(folder / "out")).files]
    for groups in files:
        assert set(groups[:-1]) <= {row_group_rows}
        assert 0 < groups[-1] <= row_group_rows
    if "files" in sizes:
        assert len(files) == min(total, sizes["files"])
        assert max(map(sum, files)) - min(map(sum, files)) <= 1
    else:
        size = sizes.get("file_rows", module.FILE_ROWS)
        assert [sum(groups) for groups in files[:-1]] == [size] * (-(-total // size) - 1)
    assert sorted(path.name for path in folder.iterdir()) == ["out", "source"]


def test_a_shuffle_is_one_of_all_orders_and_the_seed_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUCKET_BYTES", 4000)
    source = write(tmp_path / "source", [[1000, 1000], [2000]])
    orders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        rechunk(str(source), tmp_path / name, shuffle=True, seed=seed)
        orders.append(read(tmp_path / name)["id"].to_numpy())
    assert (orders[0] == orders[1]).all()
    assert (orders[0] != orders[2]).any()
    # where rows are stored and where they come have nothing to do with each other: 4.5 standard deviations
    assert abs(np.corrcoef(orders[0], np.arange(4000))[0, 1]) < 4.5 / np.sqrt(4000)
    assert abs(np.mean(np.diff(orders[0]) > 0) - 0.5) < 4.5 / np.sqrt(12 * 4000)  # nor have neighbours
    quarters = np.histogram2d(orders[0], np.arange(4000), bins=4)[0]
    assert ((quarters - 250) ** 2 / 250).sum() < 36  # chi-squared, 9 degrees of freedom, p below 0.0001


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_size_of_row_groups(tmp_path: Path) -> None:
    columns = {f"x{i}": np.random.default_rng(i).random(1_500_000) for i in range(20)}  # 240 MB
    pq.write_table(pa.table(columns), tmp_path / "one.parquet", row_group_size=1_500_000, use_dictionary=False)
    script = (
        "import resource, sys; from pathlib import Path; import rechub_dist.data.tools.rechunk as module;"
        "module._BUCKET_BYTES = 8 << 20; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "before = peak(); module.rechunk(sys.argv[1], Path(sys.argv[2]), shuffle=sys.argv[3] == 'True');"
        "print(peak() - before)"
    )
    for shuffle in (False, True):
        command = [sys.executable, "-c", script, str(tmp_path / "one.parquet"), str(tmp_path / str(shuffle))]
        done = subprocess.run([*command, str(shuffle)], capture_output=True, text=True, check=True)
        print(shuffle, done.stdout)
        assert int(done.stdout) < 120_000  # kilobytes
        assert Manifest.read(str(tmp_path / str(shuffle))).rows == 1_500_000


def test_a_prepared_folder_is_written_split_by_split(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for split, layout in {"train": [[30, 30], [30]], "valid": [[9]], "test": [[0]]}.items():
        write(root / split, layout)
    (root / "dataset.yaml").write_text("name: small\n")
    counts = rechunk(str(root), tmp_path / "out", row_group_rows=20, files=2, shuffle=True)
    assert counts == {"train": 90, "valid": 9, "test": 0}
    assert (tmp_path / "out" / "dataset.yaml").read_text() == "name: small\n"
    for split, sizes in {"train": [45, 45], "valid": [5, 4]}.items():
        files = Manifest.read(str(tmp_path / "out" / split)).files
        assert [sum(file.counts) for file in files] == sizes
        assert read(tmp_path / "out" / split).sort_by("id").to_pylist() == read(root / split).to_pylist()
    assert pq.read_schema(tmp_path / "out" / "test" / "part-0.parquet") == rows(0, 0).schema


@pytest.mark.parametrize("shuffle", [False, True])
def test_partitions_stay_what_they_are(tmp_path: Path, shuffle: bool) -> None:
    days = {f"date=2022-04-{day}/country={name}": 10 * day for day in (24, 25) for name in ("de", "fr")}
    for folder, first in days.items():
        write(tmp_path / "log" / folder, [[5, first % 7], [0]])
        (tmp_path / "log" / folder / "_SUCCESS").touch()
    done: list[int] = []
    told = rechunk(
        str(tmp_path / "log"),
        tmp_path / "new",
        row_group_rows=4,
        shuffle=shuffle,
        progress=lambda *a: done.append(a[1]),
    )
    assert told == {"": sum(5 + first % 7 for first in days.values())}
    assert done == sorted(done)
    assert done[-1] == told[""] * (1 + shuffle)
    for folder in days:
        assert (tmp_path / "new" / folder / "_SUCCESS").exists()
        before, after = (read(tmp_path / place / folder) for place in ("log", "new"))
        assert after.sort_by("id").to_pylist() == before.sort_by("id").to_pylist()
        assert max(Manifest.read(str(tmp_path / "new" / folder)).counts) == 4
    # beside other folders they are folders like these
    write(tmp_path / "log" / "other", [[3]])
    rechunk(str(tmp_path / "log"), tmp_path / "one", row_group_rows=4)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [MARK, "part-00000.parquet"]


def test_what_is_there_is_never_touched(tmp_path: Path) -> None:
    source = write(tmp_path / "source", [[5]])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("dear")
    with pytest.raises(UserError, match=r"out already holds mine: name a new folder"):
        rechunk(str(source), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "dear"
    (tmp_path / "out" / "mine").unlink()
    assert rechunk(str(source), tmp_path / "out") == {"": 5}
    with pytest.raises(UserError, match="source is the input"):
        rechunk(str(source), source)


def test_nothing_appears_where_a_file_is_broken(tmp_path: Path) -> None:
    source = write(tmp_path / "source", [[50], [50]])
    data = bytearray((source / "part-1.parquet").read_bytes())
    data[4:200] = b"\xff" * 196
    (source / "part-1.parquet").write_bytes(data)
    for shuffle in (False, True):
        with pytest.raises(UserError, match=r"part-1\.parquet: it is truncated or corrupt"):
            rechunk(str(source), tmp_path / "out", shuffle=shuffle)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_rows_that_appear_or_vanish_meanwhile_are_noticed(tmp_path: Path) -> None:
    source = write(tmp_path / "source", [[50], [50]])
    for count, files in ((40, None), (60, 2)):
        manifest = Manifest.read(str(source))
        changed = rows(0, count)

        def change(_split: str, done: int, _total: int, changed: pa.Table = changed) -> None:
            if done == 50:
                pq.write_table(changed, source / "part-1.parquet")

        with pytest.raises(UserError, match=rf"{50 + count} of {manifest.rows} rows were written; its files changed"):
            rechunk(str(source), tmp_path / "out", files=files, progress=change)
        assert not (tmp_path / "out").exists()


def test_nothing_appears_where_it_is_killed_and_the_next_one_succeeds(tmp_path: Path) -> None:
    source = write(tmp_path / "source", [[20_000] * 10])
    script = "from rechub_dist.cli.main import main; main()"
    arguments = ["data", "rechunk", str(source), "--out", str(tmp_path / "out"), "--row-group-rows", "5", "--shuffle"]
    command: list[Any] = [sys.executable, "-c", script, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = tmp_path / ".out.writing"
    while not list(work.glob("*.parquet")):
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    done = subprocess.run([*command[:-2], "900", "--files", "3"], capture_output=True, text=True, check=True)
    assert f"{tmp_path / 'out'}: 200,000 rows" in done.stdout.replace("\n", "")
    assert len(Manifest.read(str(tmp_path / "out")).files) == 3
    assert not work.exists()


def test_refuses_impossible_sizes(tmp_path: Path) -> None:
    source = write(tmp_path / "source", [[5]])
    for wrong in ({"row_group_rows": 0}, {"seed": -1}, {"files": 1, "file_rows": 1}):
        with pytest.raises(ValueError, match="at least 1"):
            rechunk(str(source), tmp_path / "out", **wrong)
