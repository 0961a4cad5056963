"""Partitions in sequence: trained in the order of their names, killed, resumed, and growing while the ranks train."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rechub_dist.checkpoint import saved_steps
from rechub_dist.errors import UserError
from rechub_tests.ranks import RankPool
from rechub_tests.runs import (
    config_of,
    done_steps,
    last_checkpoint,
    losses,
    output,
    records,
    run_file,
    start,
    train,
    wait_for,
    write_data,
)

ROWS = (200, 200, 130)  # of the days; in batches of 64
STEPS = 4 + 4 + 3


def day(number: int) -> str:
    return f"date=2022-04-{25 + number}"


@pytest.fixture
def days(tmp_path: Path) -> Path:
    """Three complete days."""
    root = tmp_path / "days"
    write_data(root)
    for number, file in enumerate(sorted((root / "train").glob("*.parquet"))):
        folder = root / "train" / day(number)
        folder.mkdir()
        assert pq.read_metadata(file).num_rows == ROWS[number]
        file.rename(folder / file.name)
        (folder / "_SUCCESS").touch()
    return root


def partitioned(folder: Path, root: Path, **sections: Any) -> Path:
    data = {"root": str(root), "batch_size": 64, "eval_batch_size": 50, "order": "sequential-partitions"}
    sections = {"train": {"epochs": 1, "log_every": 1}, **sections}
    return run_file(
        folder, root, "DeepFM", **{**sections, "data": {**data, "labels": ["click"], **sections.get("data", {})}}
    )


def equal_runs(path: Path, reference: Path) -> None:
    torch.testing.assert_close(losses(path), losses(reference), rtol=0, atol=1e-6)
    found, wanted = last_checkpoint(path), last_checkpoint(reference)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)


def test_days_are_trained_one_after_the_other(pool: RankPool, days: Path, tmp_path: Path) -> None:
    path = partitioned(tmp_path / "run", days, checkpoint={"keep_last": 5})
    assert pool.run(2, train, path)[0].step == STEPS
    assert [record["epoch"] for record in records(path, "train")] == [0] * 4 + [1] * 4 + [2] * 3
    assert [record["step"] for record in records(path, "valid")] == [4, 8, 11]  # after each day
    assert saved_steps(output(path) / "checkpoints") == [4, 8, 11]
    # another world size, from where another run of these days stopped, goes on with the same curve
    elastic = partitioned(tmp_path / "elastic", days)
    for ranks, steps in ((3, 2), (1, 6), (2, STEPS)):
        pool.run(ranks, train, elastic, [f"train.max_steps={steps}"])
    torch.testing.assert_close(losses(elastic), losses(path), rtol=0, atol=1e-4)


def test_a_day_trains_on_the_day_alone(pool: RankPool, days: Path, tmp_path: Path) -> None:
    # the first day by itself, as a data set, is the first pass
    path, alone = partitioned(tmp_path / "run", days), tmp_path / "alone"
    shutil.copytree(days, alone)
    for number in (1, 2):
        shutil.rmtree(alone / "train" / day(number))
    reference = partitioned(tmp_path / "reference", alone, data={"root": str(alone), "order": "epochs"})
    pool.run(1, train, path)
    pool.run(1, train, reference)
    assert losses(reference) == losses(path)[:4]


@pytest.mark.slow
def test_killed_in_the_middle_of_a_day(pool: RankPool, days: Path, tmp_path: Path) -> None:
    model = {"hidden_units": [1024, 1024]}
    sections = {"model": model, "checkpoint": {"every_steps": 3}}
    reference = partitioned(tmp_path / "reference", days, **sections)
    pool.run(2, train, reference)
    path = partitioned(tmp_path / "killed", days, **sections)
    process = start(path, 2)
    wait_for(process, lambda: done_steps(path) >= 6)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    done = saved_steps(output(path) / "checkpoints")
    assert done
    assert done[-1] < STEPS, "the run was over before the signal"
    again = start(path, 2)
    told = again.communicate(timeout=300)[0]
    assert again.returncode == 0, told
    assert "resumed at step" in told
    equal_runs(path, reference)


@pytest.mark.slow
def test_a_folder_that_grows_while_two_ranks_train(pool: RankPool, days: Path, tmp_path: Path) -> None:
    reference = partitioned(tmp_path / "reference", days)
    pool.run(2, train, reference)
    grown = days / "train"
    later = tmp_path / "later"
    later.mkdir()
    for number in (1, 2):
        (grown / day(number)).rename(later / day(number))
    follow = {"root": str(days), "follow": True}
    path = partitioned(tmp_path / "follow", days, data=follow)
    process = start(path, 2)
    # the first day is done, evaluated and saved, and the ranks wait
    wait_for(process, lambda: saved_steps(output(path) / "checkpoints") == [4])
    wait_for(process, lambda: [record["step"] for record in records(path, "valid")] == [4])
    # the third day is complete before the second one, which comes in parts
    (grown / day(1)).mkdir()
    (later / day(2)).rename(grown / day(2))
    for file in (later / day(1)).glob("*.parquet"):
        shutil.copy(file, grown / day(1) / file.name)
    time.sleep(1.5)
    assert done_steps(path) == 4
    assert process.poll() is None
    # they are asked to stop while they wait, and started anew on another number of ranks
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGTERM)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 0, told
    assert "preempted at step 4" in told
    process = start(path, 2)
    (grown / day(1) / "_SUCCESS").touch()
    wait_for(process, lambda: saved_steps(output(path) / "checkpoints")[-1] == STEPS)
    assert process.poll() is None  # waits for ever
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    equal_runs(path, reference)
    # with a timeout the run ends by itself, and evaluates on test
    summaries = pool.run(3, train, path, ["data.follow_timeout_seconds=0.5"])
    assert summaries[0].step == STEPS
    assert "auc" in summaries[0].test


def test_the_past_must_stay_as_it_was_and_the_future_is_free(pool: RankPool, days: Path, tmp_path: Path) -> None:
    path = partitioned(tmp_path / "run", days)
    pool.run(1, train, path, ["train.max_steps=6"])  # within the second day
    shutil.rmtree(days / "train" / day(2))
    shutil.copytree(days / "train" / day(0), days / "train" / day(3))
    shutil.copytree(days / "train" / day(0), days / "train" / day(4))
    assert pool.run(2, train, path)[0].step == 4 * 4
    shutil.copytree(days / "train" / day(0), days / "train" / "date=2022-01-01")
    with pytest.raises(UserError, match=r"data\.train\.date=2022-01-01 null -> "):
        pool.run(2, train, path)
    shutil.rmtree(days / "train" / "date=2022-01-01")
    file = next((days / "train" / day(1)).glob("*.parquet"))
    pq.write_table(pq.read_table(file).slice(1), file)
    with pytest.raises(UserError, match=r"data\.train\.date=2022-04-26 \"\w+\" -> \"\w+\""):
        pool.run(1, train, path)


def test_what_does_not_fit_is_told(pool: RankPool, days: Path, tmp_path: Path) -> None:
    path = partitioned(tmp_path / "run", days)
    shutil.copy(next((days / "train" / day(0)).glob("*.parquet")), days / "train" / "stray.parquet")
    with pytest.raises(UserError, match=r"train: 'stray\.parquet' is a file beside the partitions"):
        pool.run(2, train, path)
    with pytest.raises(UserError, match=r"sequential-partitions makes one pass; leave train\.epochs at 1"):
        pool.run(1, train, path, ["train.epochs=2"])
    (days / "train" / "stray.parquet").unlink()
    for folder in (days / "train").iterdir():
        file = next(folder.glob("*.parquet"))
        pq.write_table(pq.read_table(file).slice(0, 60), file)
    objective = {"name": "retrieval", "sampling": {"name": "popularity"}}
    data = {"root": str(days), "order": "sequential-partitions", "follow": True}
    counting = run_file(tmp_path / "counting", days, "SASRec", data=data, objective=objective, train={"epochs": 1})
    with pytest.raises(UserError, match=r"data\.follow: how often an item is in train is not known while it grows"):
        pool.run(2, train, counting)
    with pytest.raises(UserError, match="no batch of 64 rows in it"):
        pool.run(2, train, path, ["data.drop_last=true"])


def test_short_last_batches_can_be_left_out(pool: RankPool, days: Path, tmp_path: Path) -> None:
    path = partitioned(tmp_path / "run", days, data={"drop_last": True})
    assert pool.run(2, train, path)[0].step == 3 + 3 + 2
    assert np.isfinite(losses(path)).all()
    # evaluation scores each row all the same
    assert pool.run(2, rows_of_valid, path) == [(90, 2)] * 2


def rows_of_valid(path: Path) -> tuple[int, int]:
    from rechub_dist.distributed.runtime import runtime  # noqa: PLC0415
    from rechub_dist.training.trainer import Trainer  # noqa: PLC0415

    with runtime("cpu", 60) as rt:
        trainer = Trainer(config_of(path), rt)
        trainer.report.close()
        assert trainer.valid_reader is not None
        return trainer.valid_reader.rows, trainer.valid_reader.steps
