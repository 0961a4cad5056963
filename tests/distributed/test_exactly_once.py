"""A training that is killed again and again, and goes on with other numbers of ranks, has each row once an epoch."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from rechub_dist.checkpoint import saved_steps
from rechub_dist.data.stored import StoredRows
from rechub_tests.ranks import RankPool
from rechub_tests.runs import config_of, done_steps, losses, output, run_file, start, train, wait_for, write_data

Row = tuple[str, int, int]  # file, row group, row
EPOCHS, ROWS, BATCH = 2, 2000, 32
STEPS = EPOCHS * -(-ROWS // BATCH)


def trained(path: Path) -> dict[int, list[Row]]:
    """By step, the rows of the global batch that the last attempt at it was trained on."""
    attempts: dict[tuple[int, str], dict[int, list[Row]]] = {}
    for file in (output(path) / "rows").glob("*.jsonl"):
        attempt, rank = file.stem.split("-rank-")
        for line in file.read_text().splitlines():
            if line.endswith("}"):  # else it was cut short by the kill
                entry = json.loads(line)
                rows = [(name, group, row) for name, group, rows in entry["stored"] for row in rows]
                attempts.setdefault((entry["step"], attempt), {})[int(rank)] = rows
    return {
        step: [row for rank in sorted(ranks) for row in ranks[rank]] for (step, _), ranks in sorted(attempts.items())
    }


@pytest.mark.slow
def test_five_kills_and_other_numbers_of_ranks(pool: RankPool, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_data(data, ROWS)
    sections = {
        "data": {"batch_size": BATCH, "valid": None, "test": None},
        "model": {"hidden_units": [512, 512]},
        "train": {"epochs": EPOCHS, "log_every": 1, "trace_rows": True},
        "checkpoint": {"every_steps": 4},
    }
    reference = run_file(tmp_path / "reference", data, "DeepFM", **sections)
    pool.run(2, train, reference)

    path = run_file(tmp_path / "killed", data, "DeepFM", **sections)
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for number, ranks in enumerate((2, 4, 1, 2, 1)):
        process = start(path, ranks)
        wanted = done_steps(path) + rng.randint(6, 14)
        wait_for(process, lambda wanted=wanted: done_steps(path) >= wanted)  # type: ignore[misc]
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        assert (saved_steps(output(path) / "checkpoints") or [0])[-1] < STEPS, f"over before kill {number}"
    last = start(path, 2)
    told = last.communicate(timeout=300)[0]
    assert last.returncode == 0, told
    assert "resumed at step" in told

    found, wanted_rows = trained(path), trained(reference)
    assert found == wanted_rows  # the same rows in the same batches, whatever the ranks
    per_epoch = STEPS // EPOCHS
    stored = {
        (str(file), group, row)
        for file in (data / "train").glob("*.parquet")
        for group in range(pq.ParquetFile(file).num_row_groups)
        for row in range(pq.ParquetFile(file).metadata.row_group(group).num_rows)
    }
    for epoch in range(EPOCHS):
        steps = range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)
        assert Counter(row for step in steps for row in found[step]) == Counter(stored)
    torch.testing.assert_close(losses(path)[-1], losses(reference)[-1], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_chosen_rows(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    chosen = {"path": "train", "where": [["age", ">", 0.0], ["user", "<", 80]]}
    sections = {"data": {"train": chosen, "batch_size": BATCH}, "train": {"log_every": 1, "trace_rows": True}}
    path = run_file(tmp_path / "run", data_root, "DeepFM", **sections)
    pool.run(2, train, path, ["train.max_steps=5"])
    pool.run(3, train, path)
    wanted = {
        (str(file), group, row)
        for file in (data_root / "train").glob("*.parquet")
        for group in range(pq.ParquetFile(file).num_row_groups)
        for row, (age, user) in enumerate(
            zip(*pq.ParquetFile(file).read_row_group(group, columns=["age", "user"]).to_pydict().values(), strict=True)
        )
        if age > 0 and user < 80
    }
    found, per_epoch = trained(path), -(-len(wanted) // BATCH)
    epochs = len(found) // per_epoch
    assert len(found) == epochs * per_epoch > per_epoch > 5
    for epoch in range(epochs):
        steps = range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)
        assert [len(found[step]) for step in steps[:-1]] == [BATCH] * (per_epoch - 1)
        assert Counter(row for step in steps for row in found[step]) == Counter(wanted)


def test_the_trace_is_of_the_rows_that_the_batches_hold(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    steps = -(-530 // 64)
    assert pool.run(2, traced_and_read, run_file(tmp_path / "run", data_root, "DeepFM")) == [steps, steps]


def traced_and_read(path: Path) -> int:
    """Compare, for each batch of an epoch, the users at the traced places with those that the batch has."""
    from rechub_dist.distributed.runtime import runtime  # noqa: PLC0415 - for the ranks alone
    from rechub_dist.training.trainer import Trainer  # noqa: PLC0415

    with runtime("cpu", 60) as rt:
        trainer = Trainer(config_of(path), rt)
        reader = trainer.passes.current(0).reader
        stored = StoredRows(reader, epoch=1)
        for step, batch in enumerate(reader.batches(epoch=1)):
            users: list[int] = []
            for name, group, rows in stored.of(step):
                users += pq.ParquetFile(name).read_row_group(group, ["user"])["user"].to_numpy()[rows].tolist()
            assert batch.feature("user").values()[: batch.rows].tolist() == users
        trainer.report.close()
        return step + 1
