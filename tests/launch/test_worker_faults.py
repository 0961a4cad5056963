"""One host: workers that hang, requests to stop at every stage, losses that are not finite."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from faults.account import account, losses
from faults.hosts import Command, train_command
from rechub_dist.checkpoint import saved_steps
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.stored import StoredRows
from rechub_dist.errors import UserError
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import slow
from rechub_tests.runs import config_of, last_checkpoint, output, read_checkpoint, run_file, train, write_data

BIG = {"hidden_units": [768, 768], "dropout_rates": 0.0, "batch_norm": False}


def command(path: Path, *more: str) -> Command:
    return Command([sys.executable, "-m", "rechub_dist", "train", str(path), "--nproc", "2", *more])


def wait_for_step(path: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (output(path) / "metrics.jsonl").exists() or step not in losses(output(path)):
        assert time.monotonic() < deadline, f"step {step} is not reached"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_stopped_worker_is_told_and_the_run_goes_on(launch_data: Path, tmp_path: Path) -> None:
    sections = {"checkpoint": {"every_steps": 10}, "train": {"epochs": 1, "log_every": 1, "trace_rows": True}}
    path = run_file(tmp_path, launch_data, "DeepFM", model=BIG, **sections, distributed={"stall_seconds": 3})
    run = command(path, "--grace", "2")
    wait_for_step(path, 12)
    os.kill(run.workers()[1], signal.SIGSTOP)
    assert run.wait() == 0, run.text
    assert run.saw("watchdog: rank 0 .*no sign of life from rank 1"), run.text
    assert run.saw("resumed at step"), run.text
    written = next((output(path) / "logs").glob("stalled-rank-0-*.txt")).read_text()
    assert "trainer.py" in written
    rows = [row for batch in account(output(path)).batches.values() for row in batch]
    assert len(rows) == len(set(rows)) == 6000


@pytest.mark.slow
def test_sigterm_during_an_evaluation(pool: RankPool, tmp_path: Path) -> None:
    write_data(tmp_path / "data", 6000)
    sections = {"model": BIG, "train": {"epochs": 2, "log_every": 1}, "data": {"valid": "train"}}
    reference = run_file(tmp_path / "reference", tmp_path / "data", "DeepFM", **sections)
    pool.run(2, train, reference)
    path = run_file(tmp_path / "stopped", tmp_path / "data", "DeepFM", **sections)
    run = command(path, "--set", "data.eval_batch_size=2")  # 3,000 batches: it takes seconds
    run.wait_for("epoch 0: 6,000 rows read")
    run.signal(signal.SIGTERM)
    assert run.wait() == 0, run.text
    assert run.saw("preempted at step 94, resume with the same command"), run.text
    assert run.saw("step 94 valid") is None, "the evaluation was over before the signal"
    assert saved_steps(output(path) / "checkpoints") == [94]
    again = command(path)
    assert again.wait() == 0, again.text
    assert again.saw("step 94 valid"), again.text
    torch.testing.assert_close(losses(output(path)), losses(output(reference)), rtol=0, atol=1e-6)
    assert saved_steps(output(path) / "checkpoints") == saved_steps(output(reference) / "checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True], ids=["while training", "after training"])
def test_sigterm_while_a_checkpoint_is_written(launch_data: Path, tmp_path: Path, last: bool) -> None:
    users = {"user": {"kind": "sparse", "rows": 3_000_000}}  # 220 MB to save, so that it takes a while
    path = run_file(
        tmp_path,
        launch_data,
        "DeepFM",
        model={"dropout_rates": 0.0, "embedding_dim": 16},
        # without an evaluation, which would follow the last save and be left for the next start
        data={"features": users, "test": None, **({"valid": None} if last else {})},
        checkpoint={"every_steps": 10},
        train={"max_steps": 10 if last else 94, "log_every": 1},
    )
    folder = output(path) / "checkpoints"
    run = command(path)
    while not list(folder.glob("step-0000000010/rank-*")):
        assert run.code is None, run.text
        time.sleep(0.001)
    time.sleep(0.05)  # training, too, is over then
    run.signal(signal.SIGTERM)
    assert not (folder / "step-0000000010" / "manifest.json").exists(), "the save was over before the signal"
    assert run.wait() == 0, run.text
    assert sorted(file.name for file in folder.glob("step-*")) == [f"step-{step:010d}" for step in saved_steps(folder)]
    step = saved_steps(folder)[-1]
    assert run.saw(f"finished at step {step}" if last else f"preempted at step {step}, resume with"), run.text
    read_checkpoint(folder / f"step-{step:010d}")  # compares with the checksums
    if not last:
        again = command(path, "--set", f"train.max_steps={step + 2}")
        assert again.wait() == 0, again.text
        assert again.saw(f"resumed at step {step}")


@pytest.mark.slow
def test_sigterm_before_training_ends_at_once(launch_data: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, launch_data, "DeepFM", model=BIG)
    run = command(path)
    while len(run.workers()) < 2:
        assert run.code is None, run.text
        time.sleep(0.01)
    run.signal(signal.SIGTERM)
    assert run.wait(20) == 0, run.text
    assert "resume with the same command" in run.text


@pytest.mark.slow
def test_outer_restarts_after_the_agent_has_died(launch_data: Path, tmp_path: Path) -> None:
    # so long that it cannot end before it is killed, on a busy machine either
    path = run_file(
        tmp_path, launch_data, "DeepFM", model=BIG, checkpoint={"every_steps": 10}, train={"epochs": 40, "log_every": 1}
    )
    run = Command(train_command(path, "--nproc", "2", "--outer-restarts", "1"), {"RECHUB_OUTER_PAUSE": "0"})
    wait_for_step(path, 15)
    agent, workers = run.agent(), run.workers()
    os.kill(agent, signal.SIGKILL)
    run.wait_for("restarting it")
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers.values()):
        assert time.monotonic() < deadline, "an orphan trains on"
        time.sleep(0.05)
    run.wait_for("resumed at step")
    run.signal(signal.SIGTERM)
    assert run.wait() == 0, run.text


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_a_worker_that_hangs(launch_data: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, launch_data, "DeepFM", model=BIG)
    run = command(path)
    wait_for_step(path, 12)
    os.kill(run.workers()[1], signal.SIGSTOP)
    run.signal(signal.SIGTERM)
    time.sleep(1.5)  # what comes within a second is the same request
    assert run.code is None
    workers = run.workers()
    run.signal(signal.SIGTERM)
    assert run.wait(20) == 128 + signal.SIGTERM, run.text  # the grace period is 30 s
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())


@pytest.mark.slow
def test_a_worker_that_does_not_stop_has_the_grace_period_and_no_more(launch_data: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, launch_data, "DeepFM", model=BIG)
    run = command(path, "--grace", "3")
    wait_for_step(path, 12)
    workers = run.workers()
    os.kill(workers[1], signal.SIGSTOP)
    began = time.monotonic()
    run.signal(signal.SIGTERM)
    assert run.wait(25) == 128 + signal.SIGTERM, run.text  # torchrun's own grace period is 30 s
    assert time.monotonic() - began > 2.5
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """Data with one dense value that no loss survives: in row 30 of the first file."""
    root = tmp_path / "data"
    write_data(root)
    path = sorted((root / "train").glob("*.parquet"))[0]
    table = pq.read_table(path)
    values = table["age"].to_numpy().copy()
    values[30] = np.float32(3e38)
    pq.write_table(table.set_column(table.column_names.index("age"), "age", [values]), path, row_group_size=70)
    return root


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_shows_its_rows(
    pool: RankPool, spoilt: Path, tmp_path: Path
) -> None:
    path = run_file(tmp_path, spoilt, "DeepFM", checkpoint={"every_steps": 1, "keep_last": 20})
    with pytest.raises(UserError, match=r"step \d+: the loss is not finite .*non_finite/step-\d+-rank-\*.pt"):
        pool.run(2, train, path)
    files = sorted((output(path) / "non_finite").glob("*.pt"))
    assert len(files) == 2
    found = [torch.load(file, weights_only=True) for file in files]
    step = found[0]["step"]
    # nothing of the bad step, or after it, is saved
    assert saved_steps(output(path) / "checkpoints") == list(range(1, step))
    stored = [(name, group, row) for part in found for name, group, rows in part["stored"] for row in rows.tolist()]
    assert len(stored) == sum(part["rows"] for part in found) == 64
    assert (str(sorted((spoilt / "train").glob("*.parquet"))[0]), 0, 30) in stored
    assert sum(int((part["dense"].abs() > 1e38).sum()) for part in found) == 1


@pytest.mark.parametrize("pipeline", [slow("base"), "sparse_dist"])
def test_a_skipped_step_leaves_the_weights_untouched(
    pool: RankPool, spoilt: Path, tmp_path: Path, pipeline: str
) -> None:
    sections = {"checkpoint": {"every_steps": 1, "keep_last": 20}, "distributed": {"pipeline": pipeline}}
    path = run_file(tmp_path, spoilt, "DeepFM", train={"on_non_finite": "skip", "epochs": 1}, **sections)
    pool.run(2, train, path)
    bad = torch.load(next((output(path) / "non_finite").glob("*.pt")), weights_only=True)["step"]
    before, after = (read_checkpoint(output(path) / f"checkpoints/step-{step:010d}") for step in (bad - 1, bad))
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert all(value.isfinite().all() for value in last_checkpoint(path).values())
    assert saved_steps(output(path) / "checkpoints")[-1] == 9
    alone = run_file(tmp_path / "alone", spoilt, "DeepFM", train={"on_non_finite": "skip", "epochs": 1}, **sections)
    pool.run(1, train, alone)
    wanted, found = losses(output(path)), losses(output(alone))
    assert wanted.pop(bad) is found.pop(bad) is None
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_a_loss_above_the_limit_stops_the_run(pool: RankPool, launch_data: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, launch_data, "DeepFM")
    with pytest.raises(UserError, match=r"step 1: the loss is above train.max_loss 0.01"):
        pool.run(2, train, path, ["train.max_loss=0.01"])


def test_stored_rows_are_those_of_the_batches(pool: RankPool, launch_data: Path, tmp_path: Path) -> None:
    """The trace is arithmetic; here it is held against the values that the reader delivers."""
    path = run_file(tmp_path, launch_data, "DeepFM")
    assert pool.run(2, stored_and_read, path) == [94, 94]


def stored_and_read(path: Path) -> int:
    """Compare, for each batch of an epoch, the users at the traced places with those that the batch has."""
    from rechub_dist.distributed.runtime import runtime  # noqa: PLC0415
    from rechub_dist.training.trainer import Trainer  # noqa: PLC0415

    with runtime("cpu", 60) as rt:
        trainer = Trainer(config_of(path), rt)
        reader = trainer.passes.current(0).reader
        stored = StoredRows(reader, epoch=1)
        assert isinstance(reader.manifest, Manifest)
        for step, batch in enumerate(reader.batches(epoch=1)):
            users = []
            for name, group, rows in stored.of(step):
                users += pq.ParquetFile(name).read_row_group(group, ["user"])["user"].to_numpy()[rows].tolist()
            assert batch.feature("user").values()[: batch.rows].tolist() == users
        trainer.report.close()
        return step + 1
