"""Saves beside training: what they hold, what they survive, and what is refused of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rechub_dist.checkpoint import Checkpoints, Position, saved_steps
from rechub_dist.checkpoint.folder import Folder
from rechub_dist.checkpoint.load import blocks_of, consume, read_manifest, verify
from rechub_dist.checkpoint.tensors import Entry, Piece
from rechub_dist.config import CheckpointConfig, StorageConfig
from rechub_dist.distributed.runtime import Runtime, runtime
from rechub_dist.errors import UserError
from rechub_dist.reporting.saves import Save
from rechub_tests.object_store import BUCKET, KEYS, filesystem, s3_server
from rechub_tests.ranks import RankPool
from rechub_tests.runs import RECORD, losses, output, position, read_checkpoint, records, run_file, train


def checkpoints(rt: Runtime, folder: Path | str, **config: Any) -> Checkpoints:
    return Checkpoints(Folder(str(folder), StorageConfig()), rt, CheckpointConfig(**config))


def state_of(rt: Runtime, rows: int, value: float) -> dict[str, Entry]:
    """A table of `rows` rows a rank and a replicated vector, all `value`."""
    part = Piece(rt.rank * rows, 0, torch.full((rows, 16), value))
    table = Entry((rows * rt.world_size, 16), torch.float32, (part,), replicated=False)
    return {"tables/t/weight": table, "dense/b": Entry.whole(torch.full((5,), value, dtype=torch.float64))}


def fill(state: dict[str, Entry], value: float) -> None:
    for entry in state.values():
        for piece in entry.pieces:
            piece.values.fill_(value)


def values(folder: Path, step: int) -> set[float]:
    found = read_checkpoint(folder / f"step-{step:010d}")
    return {value for tensor in found.values() for value in tensor.unique().tolist()}


def save_and_go_on(folder: Path, asynchronous: bool, copy_gb: float | None) -> list[Save]:
    """Two saves, the state being changed as soon as each call returns."""
    with runtime("cpu", 60) as rt:
        found = checkpoints(rt, folder, asynchronous=asynchronous, copy_gb=copy_gb)
        state = state_of(rt, 1_000_000, 1.0)
        for step in (1, 2):
            found.save(state, Position(step=step), RECORD)
            fill(state, step + 1.0)
        found.check_last()
        return found.news()


@pytest.mark.parametrize(
    ("asynchronous", "copy_gb"),
    [(True, None), (True, 0.04), (True, 0), (False, None)],
    ids=["copied", "half", "none", "waits"],
)
def test_a_save_is_of_the_moment_at_which_it_was_asked_for(
    pool: RankPool, tmp_path: Path, asynchronous: bool, copy_gb: float | None
) -> None:
    told = pool.run(2, save_and_go_on, tmp_path, asynchronous, copy_gb)
    assert saved_steps(tmp_path) == [1, 2]
    assert (values(tmp_path, 1), values(tmp_path, 2)) == ({1.0}, {2.0})
    size = sum(file.stat().st_size for file in (tmp_path / "step-0000000001").glob("rank-*"))
    for saves in told:
        assert [(save.step, save.error, save.warning, save.bytes) for save in saves] == [
            (1, None, None, size),
            (2, None, None, size),
        ]
        assert all(save.blocked_seconds > 0 for save in saves)
    assert all(save.blocked_seconds <= save.seconds for save in told[0])  # the seconds are the main rank's


def test_what_is_kept(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    section = {"every_steps": 1, "keep_last": 2, "keep_every": 4}
    sections = {"train": {"max_steps": 11, "log_every": 1, "eval_every": 3}, "checkpoint": section}
    path = run_file(tmp_path, data_root, "DeepFM", **sections)
    best = pool.run(2, train, path)[0].best_step
    assert saved_steps(output(path) / "checkpoints") == sorted({4, 8, 10, 11, best})


def test_a_run_reports_its_saves(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"max_steps": 8}, checkpoint={"every_steps": 4})
    pool.run(2, train, path)
    saves = records(path, "checkpoint")
    assert [record["step"] for record in saves] == [4, 8]
    assert all(0 < record["blocked_seconds"] <= record["seconds"] for record in saves)
    assert saves[0]["bytes"] > 10_000
    board = EventAccumulator(str(output(path) / "tensorboard"))
    board.Reload()
    for name in ("seconds", "bytes", "blocked_seconds"):
        assert [event.step for event in board.Scalars(f"checkpoint/{name}")] == [4, 8]


# --- failing saves


def fail_in_between(folder: Path, fail: str) -> tuple[list[Save], list[int], list[str]]:
    """Steps 1 to 3 of a synthetic run; the main rank may write 100 kB a file in step 2."""
    with runtime("cpu", 60) as rt:
        found = checkpoints(rt, folder, keep_last=5)
        state = state_of(rt, 10_000, 1.0)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        told: list[Save] = []
        for step in (1, 2, 3):
            fill(state, float(step))
            if step == 2 and fail == "limit" and rt.is_main:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
            record = {**RECORD, "tables": 7} if step == 2 and fail == "record" else RECORD
            found.save(state, Position(step=step), record)
            found.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            told += found.news()
        return told, found.steps(), sorted(found.folder.files())


def test_a_file_that_cannot_be_written_is_a_warning(pool: RankPool, tmp_path: Path) -> None:
    for told, steps, files in pool.run(2, fail_in_between, tmp_path, "limit"):
        assert [save.error is None for save in told] == [True, False, True]
        wanted = r"the checkpoint of step 2 could not be saved: .*step-0000000002/rank-00000-.*: File too large"
        assert told[1].error is not None
        assert re.fullmatch(wanted, told[1].error)
        assert steps == [1, 3]
        assert not any("step-0000000002" in name for name in files)
    assert (values(tmp_path, 1), values(tmp_path, 3)) == ({1.0}, {3.0})


def test_a_record_that_cannot_be_written_is_told_to_all_ranks(pool: RankPool, tmp_path: Path) -> None:
    for told, steps, _ in pool.run(2, fail_in_between, tmp_path, "record"):
        assert [save.error is None for save in told] == [True, False, True]
        assert steps == [1, 3]
    assert (values(tmp_path, 1), values(tmp_path, 3)) == ({1.0}, {3.0})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"mounting a small disk needs privileges: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_training_goes_on_over_a_full_disk(pool: RankPool, data_root: Path, tmp_path: Path, small_disk: Path) -> None:
    section = {"every_steps": 4, "folder": str(small_disk / "saves"), "keep_last": 9}
    path = run_file(tmp_path, data_root, "DeepFM", checkpoint=section, train={"epochs": 2, "log_every": 1})
    pool.run(2, train, path, ["train.max_steps=4"])
    wanted = read_checkpoint(small_disk / "saves" / "step-0000000004")
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    os.truncate(ballast, ballast.stat().st_size - 16384)  # room for who holds the folder, not for a checkpoint
    with pytest.raises(UserError, match=r"step 12 could not be saved: .*No space left on device; the last steps are"):
        pool.run(2, train, path, ["train.max_steps=12"])
    assert [record["step"] for record in records(path, "train")] == list(range(1, 13))
    assert saved_steps(small_disk / "saves") == [4]
    found = read_checkpoint(small_disk / "saves" / "step-0000000004")
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    ballast.unlink()
    pool.run(2, train, path, ["train.max_steps=12"])
    assert saved_steps(small_disk / "saves") == [4, 8, 9, 12]  # 9: before the evaluation at the epoch's end


def test_a_full_disk_is_known_before_what_is_left_is_taken_from_the_logs(small_disk: Path) -> None:
    folder = Folder(str(small_disk / "saves"), StorageConfig())
    folder.check_room(2 << 20)
    with pytest.raises(OSError, match="No space left on device"):
        folder.check_room(4 << 20)


def test_a_folder_that_cannot_be_written_is_refused_at_once(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = run_file(tmp_path, data_root, "DeepFM", checkpoint={"folder": str(tmp_path / "file")})
    with pytest.raises(UserError, match=r"checkpoint.folder: .*/file cannot be written: .*; choose another folder"):
        pool.run(2, train, path)


def save_apart(folder: Path) -> str | None:
    """Each rank has a folder of its own, as where hosts do not share a disk."""
    with runtime("cpu", 60) as rt:
        found = checkpoints(rt, folder / str(rt.rank))
        found.save(state_of(rt, 10, 1.0), Position(step=1), RECORD)
        found.wait()
        assert found.steps() == []
        return found.news()[0].error


def test_hosts_that_share_no_folder_are_told(pool: RankPool, tmp_path: Path) -> None:
    for error in pool.run(2, save_apart, tmp_path):
        assert error is not None
        assert "the main rank does not see this file as it was written; choose a folder that all hosts" in error


# --- a kill


KILLED = """
    import os, sys, torch
    from rechub_dist.checkpoint import Checkpoints, Position
    from rechub_dist.checkpoint.folder import Folder
    from rechub_dist.checkpoint.tensors import Entry
    from rechub_dist.config import CheckpointConfig, StorageConfig
    from rechub_dist.distributed.runtime import runtime

    identity = {"seed": 0, "model": {"name": "none"}, "data": {}}
    record = {"identity": identity, "config": "{}", "tables": {}}
    folder, rows, first, last = sys.argv[1], *map(int, sys.argv[2:])
    with runtime("cpu", 60) as rt:
        found = Checkpoints(Folder(folder, StorageConfig()), rt, CheckpointConfig(keep_last=3))
        state = {"tables/t/weight": Entry.whole(torch.zeros(rows, 64))}
        position = found.load(state, lambda *_: [])
        print("at", position and position.step, state["tables/t/weight"].pieces[0].values.unique().tolist(), flush=True)
        for step in range(first, last):
            state["tables/t/weight"].pieces[0].values.fill_(step)
            found.save(state, Position(step=step), record)
        found.check_last()
    sys.stdout.flush()
    os._exit(0)  # as a rank ends: threads of gloo may abort an interpreter that takes its time
"""


@pytest.mark.slow
def test_sigkill_during_a_save_leaves_the_one_before(tmp_path: Path) -> None:
    script = tmp_path / "saves.py"
    script.write_text(textwrap.dedent(KILLED))
    folder = tmp_path / "folder"

    def command(first: int, last: int) -> list[str]:
        return [sys.executable, str(script), str(folder), "500000", str(first), str(last)]  # 128 MB

    subprocess.run(command(1, 2), check=True)
    for attempt in range(2, 12):
        process = subprocess.Popen(command(attempt, attempt + 1))
        while not list(folder.glob(f"step-{attempt:010d}/rank-*")):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not (folder / f"step-{attempt:010d}" / "manifest.json").exists():
            break
    assert list(folder.glob(f"step-{attempt:010d}/rank-*")), "the kill was to leave a part of a checkpoint"
    before = saved_steps(folder)
    assert before == list(range(max(1, attempt - 3), attempt))
    done = subprocess.run(command(attempt + 1, attempt + 2), check=True, capture_output=True, text=True)
    assert done.stdout.strip() == f"at {attempt - 1} [{attempt - 1}.0]"
    assert sorted(file.name for file in folder.iterdir()) == [
        f"step-{step:010d}" for step in [*before, attempt + 1][-3:]
    ]


@pytest.mark.slow
def test_a_killed_save_of_a_step_anew_leaves_the_old_one_whole(tmp_path: Path) -> None:
    script = tmp_path / "saves.py"
    script.write_text(textwrap.dedent(KILLED))
    folder = tmp_path / "folder"
    command = [sys.executable, str(script), str(folder), "500000", "1", "2"]
    subprocess.run(command, check=True)
    manifest = folder / "step-0000000001" / "manifest.json"
    for _ in range(10):
        first = manifest.read_bytes()
        process = subprocess.Popen(command)
        while len(list(manifest.parent.glob("rank-*"))) < 2:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        if len(list(manifest.parent.glob("rank-*"))) == 2 and manifest.read_bytes() == first:
            break
    store = Folder(str(folder), StorageConfig())
    found = read_manifest(store, 1)
    consume(verify(store, found, blocks_of(found)))
    assert manifest.read_bytes() == first, "the kill was to come before the second manifest"
    subprocess.run(command, check=True)
    assert len(list(manifest.parent.iterdir())) == 2


# --- object stores


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.mark.slow
def test_a_run_keeps_its_checkpoints_on_s3(pool: RankPool, data_root: Path, tmp_path: Path, server: int) -> None:
    storage = {"endpoint": f"http://127.0.0.1:{server}", "region": "us-east-1", "options": KEYS}
    local = run_file(tmp_path / "local", data_root, "DeepFM")
    pool.run(2, train, local)
    section = {"folder": f"s3://{BUCKET}/run", "storage": storage, "every_steps": 3}
    path = run_file(tmp_path / "remote", data_root, "DeepFM", checkpoint=section)
    pool.run(2, train, path, ["train.max_steps=7"])
    steps = saved_steps(f"s3://{BUCKET}/run", StorageConfig(**storage))
    assert steps[-2:] == [6, 7]
    client = filesystem(server)
    [victim] = [
        info.path for info in client.get_file_info(_below(f"{BUCKET}/run/step-0000000007")) if "rank-00001" in info.path
    ]
    with client.open_input_file(victim) as source:
        data = bytearray(source.read())
    data[-1] ^= 1
    with client.open_output_stream(victim) as sink:
        sink.write(bytes(data))
    assert [step for step, _ in pool.run(3, position, path)] == [6, 6, 6]
    pool.run(2, train, path)
    torch.testing.assert_close(losses(path), losses(local), rtol=0, atol=1e-6)
    assert saved_steps(f"s3://{BUCKET}/run", StorageConfig(**storage))[-2:] == [15, 18]
    assert not (output(path) / "checkpoints").exists()
    command = [sys.executable, "-m", "rechub_dist", "checkpoint", "list", str(output(path)), "--json"]
    done = subprocess.run([*command, "--storage", json.dumps(storage)], check=True, capture_output=True, text=True)
    assert [line["step"] for line in json.loads(done.stdout)["checkpoints"]][-2:] == [15, 18]


def _below(folder: str) -> Any:

    return pafs.FileSelector(folder, recursive=True)


def test_a_store_that_is_lost_is_a_warning() -> None:
    with runtime("cpu", 60) as rt:
        with s3_server() as port:
            settings = StorageConfig(
                endpoint=f"http://127.0.0.1:{port}",
                region="us-east-1",
                options=KEYS,
                client_attempts=1,
                connect_timeout_seconds=1,
                request_timeout_seconds=1,
                deadline_seconds=1,
            )
            found = Checkpoints(Folder(f"s3://{BUCKET}/lost", settings), rt, CheckpointConfig())
            state = state_of(rt, 1000, 1.0)
            found.save(state, Position(step=1), RECORD)
            found.check_last()
        found.save(state, Position(step=2), RECORD)
        with pytest.raises(
            UserError, match=r"the checkpoint of step 2 could not be saved: s3://bucket/lost/.*; the last"
        ):
            found.check_last()
        assert [save.error is None for save in found.news()] == [True, False]
