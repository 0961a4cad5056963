"""Who holds a run's folders: one of many that want them, here and on an object store; what a refused run leaves."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rechub_dist.checkpoint import saved_steps
from rechub_dist.checkpoint.holder import Holder, as_bytes, parsed, this_process
from rechub_dist.checkpoint.lease import FOLDER, Lease, LostError, _Place
from rechub_dist.config import RunConfig, StorageConfig
from rechub_dist.distributed.process import LAUNCH
from rechub_dist.distributed.runtime import Runtime, runtime
from rechub_dist.errors import UserError
from rechub_tests.object_store import BUCKET, KEYS, filesystem, s3_server
from rechub_tests.ranks import RankPool
from rechub_tests.runs import config_of, output, run_file, train


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


def settings(port: int) -> StorageConfig:
    return StorageConfig(endpoint=f"http://127.0.0.1:{port}", region="us-east-1", options=KEYS)


def config(folder: Path, data_root: Path, **distributed: Any) -> RunConfig:
    given = {"timeout_seconds": 60, "threads": 1, "lease_seconds": 600, **distributed}
    return config_of(run_file(folder, data_root, "DeepFM", distributed=given))


@contextlib.contextmanager
def held(run: RunConfig, rt: Runtime, *, take_over: bool = False) -> Iterator[Lease]:
    lease = Lease(run, rt, take_over=take_over)
    lease.take()
    try:
        yield lease
    finally:
        lease.release()


@pytest.fixture
def alone() -> Iterator[Runtime]:
    with runtime("cpu", 60) as rt:
        yield rt


def files(folder: Path) -> dict[str, bytes]:
    """All files but leases, which their holder writes."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != FOLDER]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def leases(folder: Path) -> list[Holder]:
    found = [parsed(path.read_bytes()) for path in sorted((folder / FOLDER).iterdir())]
    return [holder for holder in found if holder is not None]


def write_lease(folder: Path, holder: Holder) -> None:
    """A lease that another process has left."""
    for place in (folder, folder / "checkpoints"):
        (place / FOLDER).mkdir(parents=True)
        (place / FOLDER / "00000007.json").write_bytes(as_bytes(holder))


def elsewhere(**changes: Any) -> Holder:
    """A process of a host of which this kernel knows nothing."""
    return replace(this_process(1.0), token="0123456789abcdef", boot="another", host="far", **changes)


# --- contention


@pytest.mark.parametrize("where", ["local", "s3"])
def test_of_many_that_claim_a_folder_at_most_one_has_it(server: int, tmp_path: Path, where: str) -> None:
    for attempt in range(8):
        address = f"s3://{BUCKET}/many-{attempt}" if where == "s3" else str(tmp_path / str(attempt))
        places = [_Place("output_dir", address, settings(server)) for _ in range(6)]
        start = threading.Barrier(len(places))

        def claim(place: _Place, start: threading.Barrier = start) -> bool:
            start.wait()
            return place.claim(this_process(60.0), [])

        with ThreadPoolExecutor(len(places)) as threads:
            won = sum(threads.map(claim, places))
        assert won == 1 if where == "local" else won <= 1  # on a store all may withdraw, and try again


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_claim_ends_the_lease_before_it(server: int, tmp_path: Path, where: str) -> None:
    address = f"s3://{BUCKET}/one-after-another" if where == "s3" else str(tmp_path / "folder")
    first, second = (_Place("output_dir", address, settings(server)) for _ in range(2))
    one, two = this_process(60.0), this_process(60.0)
    assert first.claim(one, [])
    first.verify(one)
    assert not _Place("output_dir", address, settings(server)).claim(two, [])
    assert second.claim(two, [found.name for found in second.look(0)])
    with pytest.raises(LostError, match=rf"was taken over by process {os.getpid()} on "):
        first.verify(one)
    if where == "s3":
        first.write(one)  # a sign of life that was under way meanwhile
        with pytest.raises(LostError):
            first.verify(one)
    second.verify(two)


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_lease_that_was_removed_with_its_folder_is_taken_anew(server: int, tmp_path: Path, where: str) -> None:
    address = f"s3://{BUCKET}/removed" if where == "s3" else str(tmp_path / "folder")
    place, own = _Place("output_dir", address, settings(server)), this_process(60.0)
    assert place.claim(own, [])
    if where == "s3":
        filesystem(server).delete_dir(f"{BUCKET}/removed")
    else:
        subprocess.run(["rm", "-r", address], check=True)
    place.verify(own)
    assert [found.holder for found in place.look(0)] == [own]


# --- who goes on at once, and who waits


def test_a_run_lets_go_of_its_folders(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", distributed={"lease_seconds": 600})
    pool.run(2, train, path, ["train.max_steps=2"])
    for folder in (output(path), output(path) / "checkpoints"):
        assert [holder.released for holder in leases(folder)] == [True]
    pool.run(2, train, path, ["train.max_steps=4"])
    assert saved_steps(output(path) / "checkpoints") == [2, 4]


def test_a_failed_run_lets_go_of_its_folders(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", distributed={"lease_seconds": 600})
    pool.run(2, train, path, ["train.max_steps=2"])
    before = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}
    with pytest.raises(UserError, match="holds another run"):
        pool.run(2, train, path, ["seed=8"])
    assert {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()} == before
    with pytest.raises(UserError, match=r"train\.best_metric: no metric 'nonsense'"):
        pool.run(2, train, path, ["train.best_metric=nonsense", "train.max_steps=3"])
    assert [holder.released for holder in leases(output(path))] == [True]
    pool.run(2, train, path, ["train.max_steps=4"])


def test_of_a_process_that_has_ended_here_nothing_is_waited_for(
    alone: Runtime, data_root: Path, tmp_path: Path
) -> None:
    run = config(tmp_path, data_root)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_lease(run.output_dir, replace(this_process(600.0), pid=ended.pid))
    with held(run, alone):
        assert [holder.pid for holder in leases(run.output_dir)] == [os.getpid()]


def test_the_number_of_an_ended_process_may_be_anothers(alone: Runtime, data_root: Path, tmp_path: Path) -> None:
    run, own = config(tmp_path, data_root), this_process(600.0)
    write_lease(run.output_dir, replace(own, started=own.started - 1))
    with held(run, alone):
        assert len(leases(run.output_dir)) == 1


def test_attempts_of_one_launch_do_not_wait(
    alone: Runtime, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path, data_root)
    write_lease(run.output_dir, elsewhere(launch="job 7", seconds=600.0))
    monkeypatch.setenv(LAUNCH, "job 7")
    with held(run, alone):
        assert [holder.launch for holder in leases(run.output_dir)] == ["job 7"]


def test_a_silent_lease_of_another_host_is_waited_for_and_told_in_one_line(
    alone: Runtime, data_root: Path, tmp_path: Path
) -> None:
    run = config(tmp_path, data_root)
    write_lease(run.output_dir, elsewhere(since="2026-01-02T03:04:05+00:00"))
    told, began = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(told), held(run, alone):
        assert time.monotonic() - began >= 1.0  # its own time, not that of this run
    (line,) = told.getvalue().splitlines()
    for words in (f"output_dir: {run.output_dir} is held by process", "on far", "2026-01-02T03:04:05", "--take-over"):
        assert words in line


def test_a_run_that_is_about_to_end_is_waited_for(alone: Runtime, data_root: Path, tmp_path: Path) -> None:
    run = config(tmp_path, data_root, lease_seconds=6)
    first = Lease(run, alone)
    first.take()
    first.stopping = lambda: True
    deadline = time.monotonic() + 60
    while not leases(run.output_dir)[0].stopping:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    told = io.StringIO()
    timer = threading.Timer(2.0, first.release)
    timer.start()
    with contextlib.redirect_stderr(told), held(run, alone):
        timer.join()
        assert [holder.stopping for holder in leases(run.output_dir)] == [False]
    assert "it is about to save and end, waiting for it" in told.getvalue()


@pytest.mark.parametrize("what", ["output_dir", "checkpoint.folder"])
def test_a_folder_in_use_is_refused_and_nothing_is_written(
    pool: RankPool, alone: Runtime, data_root: Path, tmp_path: Path, what: str
) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", distributed={"lease_seconds": 6})
    pool.run(2, train, path, ["train.max_steps=2"])
    before = files(tmp_path)
    more = [f"output_dir={tmp_path / 'other'}", f"checkpoint.folder={output(path) / 'checkpoints'}"]
    with held(config_of(path), alone):
        with pytest.raises(UserError, match=rf"^{what}: .* in use by process {os.getpid()} .* --take-over$"):
            pool.run(2, train, path, [] if what == "output_dir" else more)
        assert files(tmp_path) == before
        assert not (tmp_path / "other").exists()


def test_take_over_ends_the_holder_before_it_saves(alone: Runtime, data_root: Path, tmp_path: Path) -> None:
    run = config(tmp_path, data_root)
    with held(run, alone) as first, held(run, alone, take_over=True) as second:
        second.fence()
        with pytest.raises(LostError, match=r"was taken over by process .* ends without saving"):
            first.check()
        with pytest.raises(LostError):
            next(first.guard(iter([1])))
        second.fence()


# --- an object store


def remote(folder: Path, data_root: Path, port: int, **more: Any) -> Path:
    given = {"folder": f"s3://{BUCKET}/{folder.name}", "storage": settings(port).model_dump(exclude_unset=True)}
    return run_file(folder, data_root, "DeepFM", checkpoint=given, distributed={"lease_seconds": 6, **more})


@pytest.mark.slow
def test_a_folder_of_checkpoints_on_a_store_is_held(
    server: int, pool: RankPool, alone: Runtime, data_root: Path, tmp_path: Path
) -> None:
    path = remote(tmp_path, data_root, server)
    pool.run(2, train, path, ["train.max_steps=2"])
    elsewhere_too = [f"output_dir={tmp_path / 'other'}", "train.max_steps=4"]
    with held(config_of(path), alone):
        with pytest.raises(UserError, match=rf"^checkpoint.folder: s3://.* is in use by process {os.getpid()}"):
            pool.run(2, train, path, elsewhere_too)
        assert not (tmp_path / "other").exists()
    pool.run(2, train, path, elsewhere_too)
    assert saved_steps(f"s3://{BUCKET}/{tmp_path.name}", settings(server)) == [2, 4]
