"""Batches that are got ready one ahead, as for a GPU: the same run as without, however it ends. Here on CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from rechub_dist.assembly import readers
from rechub_dist.batch import Batch
from rechub_dist.checkpoint import saved_steps
from rechub_dist.data.run_file import load_run
from rechub_dist.distributed.external_control import ExternalControl
from rechub_dist.errors import UserError
from rechub_dist.training import feed
from rechub_dist.training import pipeline as pipelines
from rechub_dist.training.trainer import Summary
from rechub_tests.damage import spoil_pages
from rechub_tests.pipelined import train_watched
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import slow
from rechub_tests.runs import last_checkpoint, losses, output, records, run_file, train, write_data

STEPS = 15  # of 18: the run ends within an epoch
SECTIONS = {
    "train": {"epochs": 2, "log_every": 1, "eval_every": 5, "max_steps": STEPS},
    "checkpoint": {"every_steps": 4},
}


@contextmanager
def looking_ahead() -> Iterator[None]:
    """As on a device, but for page-locked memory, which there is none of without one."""
    with ExitStack() as stack:
        for module in (readers, feed, pipelines):
            stack.enter_context(mock.patch.object(module, "looks_ahead", return_value=True))
        stack.enter_context(mock.patch.object(Batch, "pin_memory", lambda batch: batch))
        yield


def train_ahead(path: Path, overrides: list[str] | None = None) -> Summary:
    with looking_ahead():
        return train(path, overrides)


def train_until(path: Path, step: int) -> Summary:
    """Rank 1 is asked to stop while it trains on the (0-based) `step`."""
    control = ExternalControl()

    def watched(number: int, progress: Callable[[], Any]) -> Any:
        if number == step and torch.distributed.get_rank() == 1:
            control.stop.ask()
        return progress()

    with looking_ahead():
        return train_watched(load_run(path, []), watched, control)


def same(path: Path, reference: Path, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(losses(path), losses(reference), rtol=0, atol=tolerance)
    found, wanted = last_checkpoint(path), last_checkpoint(reference)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=10 * tolerance, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["base", "sparse_dist"])
@pytest.mark.parametrize("model", ["DeepFM", "DIN"])
def test_the_same_run(pool: RankPool, data_root: Path, tmp_path: Path, model: str, kind: str) -> None:
    """Over ends of passes, evaluations and saves."""
    sections = {**SECTIONS, "distributed": {"pipeline": kind, "timeout_seconds": 60}}
    paths = [run_file(tmp_path / name, data_root, model, **sections) for name in ("plain", "ahead")]
    plain, ahead = (pool.run(2, work, path)[0] for work, path in zip((train, train_ahead), paths, strict=True))
    assert (plain.step, plain.test) == (ahead.step, ahead.test)
    same(paths[1], paths[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        {"negatives": "in_batch", "loss": "softmax"},
        {"negatives": "in_batch", "loss": "bpr_max"},
        {"negatives": "in_batch_and_sampled", "loss": "softmax"},
        {"negatives": "sampled", "share_negatives": True, "loss": "gbce"},
        {"negatives": "full", "loss": "softmax"},
    ],
    ids=lambda found: f"{found['negatives']}-{found['loss']}",
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_candidates_that_the_host_has_counted(
    pool: RankPool, data_root: Path, tmp_path: Path, objective: dict[str, Any], ranks: int
) -> None:
    """An item that two ranks bring is masked, where it else is left out."""
    objective = {"name": "retrieval", "num_negatives": 2, **objective}
    paths = [run_file(tmp_path / name, data_root, "SASRec", objective=objective) for name in ("plain", "ahead")]
    for work, path in zip((train, train_ahead), paths, strict=True):
        pool.run(ranks, work, path, ["train.max_steps=8"])
    same(paths[1], paths[0], 2e-6 if ranks > 1 and objective["negatives"] != "full" else 0.0)


@pytest.mark.parametrize("kind", [slow("base"), "sparse_dist"])
def test_a_stop_loses_no_row(pool: RankPool, data_root: Path, tmp_path: Path, kind: str) -> None:
    sections = {**SECTIONS, "distributed": {"pipeline": kind, "timeout_seconds": 60}}
    paths = [run_file(tmp_path / name, data_root, "DeepFM", **sections) for name in ("whole", "stopped")]
    pool.run(2, train, paths[0])
    stopped = pool.run(2, train_until, paths[1], 6)
    assert [summary.preempted for summary in stopped] == [True, True]
    assert 7 <= stopped[0].step <= 11
    assert len(losses(paths[1])) == stopped[0].step
    assert saved_steps(output(paths[1]) / "checkpoints")[-1] == stopped[0].step
    assert pool.run(2, train_ahead, paths[1])[0].step == STEPS
    same(paths[1], paths[0], 1e-6)


def test_a_bad_loss_ends_all_ranks(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM")
    with pytest.raises(UserError, match=r"step 1: the loss is above train.max_loss 0.01 .*; the rows are in "):
        pool.run(2, train_ahead, path, ["train.max_loss=0.01"])
    assert len(list((output(path) / "non_finite").glob("step-1-rank-*.pt"))) == 2


@pytest.mark.parametrize("skip", [False, True])
def test_a_file_that_cannot_be_read(pool: RankPool, tmp_path: Path, skip: bool) -> None:
    write_data(tmp_path / "data")
    spoil_pages(tmp_path / "data" / "train" / "part-1.parquet", 1)
    paths = [run_file(tmp_path / name, tmp_path / "data", "DeepFM", **SECTIONS) for name in ("plain", "ahead")]
    if not skip:
        with pytest.raises(UserError, match=r"part-1\.parquet"):
            pool.run(2, train_ahead, paths[1])
        return
    for work, path in zip((train, train_ahead), paths, strict=True):
        pool.run(2, work, path, ["data.on_bad_file=skip"])
    same(paths[1], paths[0])
    kept = [record["rows_skipped"] for path in paths for record in records(path, "rows")]
    assert kept[: len(kept) // 2] == kept[len(kept) // 2 :]
    assert sum(kept) > 0
