"""Runs in bf16 and compiled ones beside the plain run; and what is refused before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rechub_dist.errors import UserError
from rechub_tests.pipelined import pipelined_modules
from rechub_tests.ranks import RankPool
from rechub_tests.runs import losses, output, run_file, train

ADAM = {"optimizer": {"name": "adam", "lr": 0.002}, "checkpoint": {"every_steps": 10**6}}


def curves(pool: RankPool, root: Path, folder: Path, model: str, ranks: int, **settings: Any) -> list[list[float]]:
    """The training losses of two epochs, without `settings` of `train` and with them."""
    found = []
    for number, more in enumerate(({}, settings)):
        patient = {"timeout_seconds": 600}  # a rank may compile for longer than the other
        path = run_file(folder / str(number), root, model, train={"epochs": 2, **more}, distributed=patient, **ADAM)
        pool.run(ranks, train, path, timeout=1200)
        found.append(losses(path))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model", ["DeepFM", "DIN", "MMoE", "SASRec", "DSSM"])
def test_the_losses_of_bf16_are_near_those_of_fp32(
    pool: RankPool, data_root: Path, tmp_path: Path, model: str, ranks: int
) -> None:
    expected, found = curves(pool, data_root, tmp_path, model, ranks, precision="bf16")
    assert found != expected
    np.testing.assert_allclose(found, expected, rtol=0.05)  # step by step
    assert np.mean(found[9:]) == pytest.approx(np.mean(expected[9:]), rel=0.005)  # of the second epoch
    assert np.mean(found[9:]) < np.mean(found[:9])


@pytest.mark.slow
def test_bf16_under_the_pipeline(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    found = []
    for pipeline in ("base", "sparse_dist"):
        sections = {"train": {"precision": "bf16", "max_steps": 12}, "distributed": {"pipeline": pipeline}}
        path = run_file(tmp_path / pipeline, data_root, "DIN", **sections, **ADAM)
        [sharded, pipelined] = pool.run(1, pipelined_modules, path)[0]
        assert sharded == pipelined > 0
        pool.run(2, train, path)
        found.append(losses(path))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "ranks"), [("DeepFM", 1), ("SASRec", 1), ("SharedBottom", 2), ("DIN", 1)])
def test_compiled_it_has_the_same_losses(
    pool: RankPool, data_root: Path, tmp_path: Path, model: str, ranks: int
) -> None:
    expected, found = curves(pool, data_root, tmp_path, model, ranks, compile=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_run_does_not_go_on_in_another_precision(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"max_steps": 3})
    pool.run(1, train, path)
    with pytest.raises(UserError, match=r'train\.precision "fp32" -> "bf16"'):
        pool.run(1, train, path, ["train.precision=bf16", "train.max_steps=6"])


@pytest.mark.parametrize(
    ("setting", "told"),
    [("train.tf32=true", "train.tf32: only GPUs"), ("train.precision=fp8", "train.precision: input should be 'fp32'")],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    pool: RankPool, data_root: Path, tmp_path: Path, setting: str, told: str
) -> None:
    path = run_file(tmp_path, data_root, "DeepFM")
    with pytest.raises(UserError, match=told):
        pool.run(2, train, path, [setting])
    assert not output(path).exists()


def test_small_buckets_change_nothing(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    found = []
    for number, distributed in enumerate(({}, {"bucket_mb": 1})):
        path = run_file(tmp_path / str(number), data_root, "MMoE", train={"max_steps": 5}, distributed=distributed)
        pool.run(2, train, path)
        found.append(losses(path))
    assert found[0] == found[1]
