"""A killed run, started again, is the run that was never killed; and checkpoints do not care about ranks."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from torchrec.distributed.model_parallel import DistributedModelParallel

import rechub_dist.training.trainer as trainer_module
from rechub_dist.assembly.parts import Parts
from rechub_dist.assembly.sharded import shard_train_module
from rechub_dist.checkpoint import saved_steps
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.embedding.sharding import draw_tables, table_shards
from rechub_dist.errors import UserError
from rechub_tests.ranks import RankPool
from rechub_tests.runs import (
    done_steps,
    last_checkpoint,
    losses,
    output,
    read_checkpoint,
    records,
    run_file,
    start,
    train,
    wait_for,
)

STEPS = 18


def equal_runs(path: Path, reference: Path) -> None:
    torch.testing.assert_close(losses(path), losses(reference), rtol=0, atol=1e-6)
    found, wanted = last_checkpoint(path), last_checkpoint(reference)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["agent", "worker"])
def test_sigkill_at_a_random_step(pool: RankPool, data_root: Path, tmp_path: Path, victim: str) -> None:
    # Dropout on: the resumed run must draw what the uninterrupted one drew. A step must take long enough to be hit.
    model = {"dropout_rates": 0.2, "hidden_units": [1024, 1024]}
    sections = {"model": model, "checkpoint": {"every_steps": 3}, "train": {"epochs": 6, "log_every": 1}}
    reference = run_file(tmp_path / "reference", data_root, "DeepFM", **sections)
    pool.run(2, train, reference)
    path = run_file(tmp_path / "killed", data_root, "DeepFM", **sections)
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    target = random.Random(seed).randint(4, 40)
    process = start(path, 2)
    wait_for(process, lambda: done_steps(path) >= target)
    if victim == "agent":
        os.kill(process.pid, signal.SIGKILL)
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
    told = process.communicate(timeout=300)[0]
    if victim == "agent":
        assert process.returncode == -signal.SIGKILL
        done = saved_steps(output(path) / "checkpoints")
        assert done
        assert done[-1] < 54, "the run was over before the signal"
        process = start(path, 2)
        told = process.communicate(timeout=300)[0]
    else:
        assert "was ended by SIGKILL; restart 1 of 3" in told
        assert "Traceback" not in told
    assert process.returncode == 0, told
    assert "resumed at step" in told
    equal_runs(path, reference)


@pytest.mark.slow
def test_the_end_of_another_rank_is_one_line(data_root: Path, tmp_path: Path) -> None:
    """Without an agent that would end this rank first."""
    path = run_file(tmp_path, data_root, "DeepFM", train={"epochs": 10**4, "log_every": 1})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "rechub_dist", "train", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    wait_for(ranks[0], lambda: done_steps(path) >= 5)
    ranks[1].kill()
    ranks[1].wait()
    told = ranks[0].communicate()[0]
    assert ranks[0].returncode == 1
    assert told.count("rank 0: another rank has ended (") == 1, told
    assert "Traceback" not in told
    log = (output(path) / "logs" / "rank-0.jsonl").read_text().splitlines()
    assert "trainer.py" in json.loads(log[-1])["exc_info"]


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    sections = {"model": {"hidden_units": [1024, 1024]}, "train": {"epochs": 6, "log_every": 1}}
    reference = run_file(tmp_path / "reference", data_root, "DeepFM", **sections)
    pool.run(2, train, reference)
    path = run_file(tmp_path / "stopped", data_root, "DeepFM", **sections)
    process = start(path, 2)
    wait_for(process, lambda: done_steps(path) >= 12)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGTERM)
    told = process.communicate(timeout=60)[0]
    assert "preempted at step" in told
    assert process.returncode == 0, told
    again = start(path, 2)
    assert "resumed at step" in again.communicate(timeout=300)[0]
    assert again.returncode == 0
    equal_runs(path, reference)


def test_another_world_size_goes_on_with_the_same_curve(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    reference = run_file(tmp_path / "reference", data_root, "DIN")
    pool.run(2, train, reference)
    path = run_file(tmp_path / "elastic", data_root, "DIN")
    for ranks, steps in ((3, 5), (1, 11), (4, STEPS)):
        pool.run(ranks, train, path, [f"train.max_steps={steps}"])
    torch.testing.assert_close(losses(path), losses(reference), rtol=0, atol=1e-4)


def train_over_garbage(path: Path) -> int:
    """Train with tables that hold nothing of use when they have been sharded; how often initial weights were drawn."""
    drawn = 0

    def spoiled(parts: Parts, rt: Runtime, **more: Any) -> DistributedModelParallel:
        module = shard_train_module(parts, rt, **more)
        for name, shards in table_shards(module, parts.layout).items():
            for shard in shards:
                shard.tensor[:, : parts.layout.tables[name].table.dim] = torch.nan
        return module

    def counted(*args: Any) -> None:
        nonlocal drawn
        drawn += 1
        draw_tables(*args)

    with (
        mock.patch.object(trainer_module, "shard_train_module", spoiled),
        mock.patch.object(trainer_module, "draw_tables", counted),
    ):
        train(path)
    return drawn


def test_a_resumed_run_draws_no_initial_weights(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    more = {"checkpoint": {"every_steps": 3}}
    reference = run_file(tmp_path / "reference", data_root, "DeepFM", train={"epochs": 1}, **more)
    pool.run(1, train, reference)
    path = run_file(tmp_path / "resumed", data_root, "DeepFM", train={"epochs": 1, "max_steps": 4}, **more)
    assert pool.run(1, train_over_garbage, path) == [1]
    path = run_file(tmp_path / "resumed", data_root, "DeepFM", train={"epochs": 1}, **more)
    assert pool.run(1, train_over_garbage, path) == [0]
    equal_runs(path, reference)


def test_another_run_is_refused_by_the_differing_keys(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"epochs": 1})
    pool.run(1, train, path)
    changed = ["seed=8", "model.hidden_units=[16, 9]", "embedding.optimizer.lr=0.1", "data.batch_size=32"]
    table = [changed[2], "seed=7"]
    with pytest.raises(UserError) as error:
        pool.run(2, train, path, changed)
    for key in ("seed 7 -> 8", "model.hidden_units", "batch_size 64 -> 32", "embedding.optimizers.", " more. Choose"):
        assert key in str(error.value)
    with pytest.raises(UserError, match=r"embedding.optimizers.user.lr 0.05 -> 0.1; .*; and \d+ more. Choose"):
        pool.run(1, train, path, table)
    # What does not make another run: ranks, sharding, cadence, a longer duration.
    pool.run(2, train, path, ["embedding.sharding=row_wise", "train.epochs=2", "train.log_every=3", "data.prefetch=1"])
    assert saved_steps(output(path) / "checkpoints")[-1] == STEPS


def test_another_optimizer_algorithm_is_refused(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"epochs": 1})
    pool.run(1, train, path)
    with pytest.raises(UserError, match=r"embedding.optimizers.user.name \"rowwise_adagrad\" -> \"adagrad\""):
        pool.run(1, train, path, ["embedding.optimizer.name=adagrad"])


def test_a_damaged_checkpoint_is_refused_by_name(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(
        tmp_path, data_root, "DeepFM", checkpoint={"every_steps": 4, "keep_last": 3}, train={"max_steps": 16}
    )
    pool.run(2, train, path)
    folder = output(path) / "checkpoints"
    assert saved_steps(folder)[-2:] == [12, 16]
    wanted = read_checkpoint(folder / "step-0000000016")
    data = next((folder / "step-0000000016").glob("*.safetensors"))
    with data.open("r+b") as file:
        file.truncate(data.stat().st_size // 2)
    pool.run(2, train, path)
    again = read_checkpoint(folder / "step-0000000016")
    for name, value in wanted.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=1e-6, msg=name)


def test_a_partial_checkpoint_is_invisible(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"epochs": 1})
    pool.run(1, train, path)
    folder = output(path) / "checkpoints"
    (folder / ".step-0000000012.partial").mkdir()
    assert saved_steps(folder) == [9]
    (folder / "step-0000000099").mkdir()  # no manifest: not complete
    pool.run(1, train, path, ["train.epochs=2"])
    assert STEPS in saved_steps(folder)


def test_retention_keeps_the_last_and_the_best(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    train_section = {"epochs": 2, "eval_every": 3, "best_metric": "log_loss", "best_mode": "min"}
    path = run_file(tmp_path, data_root, "DeepFM", train=train_section, checkpoint={"every_steps": 2, "keep_last": 2})
    summary = pool.run(1, train, path)[0]
    valid = records(path, "valid")
    best = min(valid, key=lambda record: record["log_loss"])
    assert summary.best_step == best["step"]
    assert set(saved_steps(output(path) / "checkpoints")) == {16, 18, best["step"]}
    test = records(path, "test")
    assert len(test) == 1
    assert test[0]["step"] == best["step"]


def test_the_output_folder_launches_itself(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "SASRec", train={"epochs": 1})
    pool.run(1, train, path)
    resolved = output(path) / "config.yaml"
    assert yaml.safe_load(resolved.read_text())["data"]["dataset"]["name"] == "small"
    summary = pool.run(1, train, resolved)[0]
    assert summary.step == 9
    assert summary.samples_per_second is None
    assert "ndcg@10" in summary.test
