"""Both pipelines on the device, and what makes the host wait for it."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from traceback import FrameSummary

import pytest
import torch
import torchrec

import rechub_dist
from rechub_dist.models import catalogue
from rechub_tests.pipelined import SYNC, SyncRecorder, caller, pipelined_modules, syncs_of
from rechub_tests.ranks import RankPool
from rechub_tests.runs import losses, run_file, train

# Calls of TorchRec and FBGEMM that wait for the device in a step, and why they have to. No others are allowed.
THEIRS = {
    "torchrec/distributed/dist_data.py:_wait_impl": "how many ids each rank sends to each",
    "torchrec/sparse/jagged_tensor.py:_cuda_to_cpu_safe": "the same, as TorchRec 1.8 and later read it",
}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["DIN", "SASRec"])
def test_the_same_losses(pool: RankPool, data_root: Path, tmp_path: Path, device: str, model: str) -> None:
    """Over ends of passes, evaluations and saves, at which the pipeline is emptied and taken up again."""
    found = []
    for kind in ("base", "sparse_dist"):
        more = {"train": {"eval_every": 5}, "checkpoint": {"every_steps": 4}, "distributed": {"pipeline": kind}}
        path = run_file(tmp_path / kind, data_root, model, device=device, **more)
        pool.run(1, train, path)
        found.append(losses(path))
    assert len(found[0]) == 18
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("model", catalogue())
def test_every_sharded_module_is_pipelined(pool: RankPool, data_root: Path, tmp_path: Path, model: str) -> None:
    [(sharded, pipelined)] = pool.run(1, pipelined_modules, run_file(tmp_path, data_root, model, device="cuda"))
    assert sharded == pipelined > 0


def watched(pool: RankPool, root: Path, folder: Path, model: str, device: str) -> dict[str, int]:
    """What waits in steps 3 to 20, of 22 that an epoch has; the loss is read at the end alone."""
    path = run_file(
        folder,
        root,
        model,
        device=device,
        data={"batch_size": 25, "valid": None, "test": None},
        train={"epochs": 1, "log_every": 1000},
        checkpoint={"every_steps": 1000},
    )
    return pool.run(1, syncs_of, path, 3, 20)[0]


@pytest.mark.slow
def test_nothing_waits_on_cpu(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    assert watched(pool, data_root, tmp_path, "DeepFM", "cpu") == {}


@pytest.mark.gpu
@pytest.mark.parametrize("model", catalogue())
def test_no_wait_of_ours(
    pool: RankPool, data_root: Path, tmp_path: Path, model: str, record_property: Callable[[str, object], None]
) -> None:
    found = watched(pool, data_root, tmp_path, model, "cuda")
    record_property("waits", found)  # --junitxml tells them
    assert found.keys() <= THEIRS.keys()


@pytest.mark.gpu
def test_a_wait_is_told_with_its_place() -> None:
    recorder = SyncRecorder()
    recorder.start()
    torch.ones(3, device="cuda").sum().item()
    recorder.stop()
    torch.ones(3, device="cuda").sum().item()
    assert recorder.seen == {f"{__file__}:test_a_wait_is_told_with_its_place": 1}


def test_each_is_counted_whatever_else_listens() -> None:
    with warnings.catch_warnings():
        logging.captureWarnings(True)  # as a run's log does
        try:
            warnings.simplefilter("ignore")
            recorder = SyncRecorder()
            recorder.start()
            for _ in range(3):
                warnings.warn(f"{SYNC} (Triggered internally)", UserWarning, stacklevel=1)
            warnings.warn("another", UserWarning, stacklevel=1)
            recorder.stop()
            warnings.warn(SYNC, UserWarning, stacklevel=1)
        finally:
            logging.captureWarnings(False)
    assert recorder.seen == {f"{__file__}:test_each_is_counted_whatever_else_listens": 3}


def test_whose_call_it_is() -> None:
    ours, theirs = (Path(str(module.__file__)).parent for module in (rechub_dist, torchrec))
    torch_file = Path(traceback.__file__).parent / "site-packages" / "torch" / "_tensor.py"
    loop = FrameSummary(str(ours / "training" / "loop.py"), 1, "_segment")
    dist_data = FrameSummary(str(theirs / "distributed" / "dist_data.py"), 1, "_wait_impl")
    item = FrameSummary(str(torch_file), 1, "item")
    engine = FrameSummary(str(torch_file), 1, "_engine_run_backward")
    other = FrameSummary("/somewhere/else.py", 1, "work")
    assert caller([loop, dist_data, item]) == "torchrec/distributed/dist_data.py:_wait_impl"
    assert caller([dist_data, loop, item]) == "rechub_dist/training/loop.py:_segment"
    assert caller([loop, engine]) == "backward of rechub_dist/training/loop.py:_segment"
    assert caller([other]) == "/somewhere/else.py:work"
