"""Training in bf16, in TF32 and compiled, beside the plain run on the same device; and the device's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rechub_dist.reporting.device_memory import ALLOCATED, RESERVED
from rechub_tests.ranks import RankPool
from rechub_tests.runs import losses, records, run_file, train

SETTINGS: dict[str, tuple[dict[str, Any], float]] = {  # and how far a step's loss may be off
    "bf16": ({"precision": "bf16"}, 0.05),
    "tf32": ({"tf32": True}, 0.02),
    "compiled": ({"compile": True}, 1e-4),
}
MODELS = ("DeepFM", "DIN", "MMoE", "SASRec", "DSSM")
ADAM = {"optimizer": {"name": "adam", "lr": 0.002}, "checkpoint": {"every_steps": 10**6}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "model", "setting"),
    [
        ("cpu", "DeepFM", "bf16"),
        *(pytest.param("cuda", model, setting, marks=pytest.mark.gpu) for model in MODELS for setting in SETTINGS),
    ],
)
def test_the_losses_are_near_those_of_fp32(
    pool: RankPool, data_root: Path, tmp_path: Path, device: str, model: str, setting: str
) -> None:
    more, tolerance = SETTINGS[setting]
    found = []
    for number, settings in enumerate(({}, more)):
        path = run_file(
            tmp_path / str(number), data_root, model, device=device, train={"epochs": 2, **settings}, **ADAM
        )
        pool.run(1, train, path)
        found.append(losses(path))
    np.testing.assert_allclose(found[1], found[0], rtol=tolerance)
    assert np.mean(found[1][9:]) == pytest.approx(np.mean(found[0][9:]), rel=0.005)


def test_records_have_the_memory_of_a_gpu(pool: RankPool, data_root: Path, tmp_path: Path, device: str) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", device=device, train={"max_steps": 5})
    pool.run(1, train, path)
    for record in records(path, "train"):
        if device == "cpu":
            assert ALLOCATED not in record
        else:
            assert 0 < record[ALLOCATED] <= record[RESERVED]
