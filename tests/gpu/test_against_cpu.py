"""The same run on the device and on CPU: the same losses, to a rounding error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rechub_dist.models import catalogue
from rechub_tests.ranks import RankPool
from rechub_tests.runs import losses, run_file, train

PLACEMENTS: dict[str, dict[str, Any]] = {
    "row_wise": {"sharding": "row_wise", "optimizer": {"name": "rowwise_adagrad", "lr": 0.02}},
    "table_wise": {"sharding": "table_wise", "optimizer": {"name": "adagrad", "lr": 0.02}},
    "column_wise": {"sharding": "column_wise", "optimizer": {"name": "adagrad", "lr": 0.02}},
    "sgd": {"sharding": "table_wise", "optimizer": {"name": "sgd", "lr": 0.02}},
    "replicated": {"sharding": "replicated", "optimizer": {"name": "adam", "lr": 0.02}},
}
CASES = [
    *((model, placement) for model in ("DeepFM", "DIN", "SASRec", "MMoE") for placement in ("row_wise", "table_wise")),
    *(("DeepFM", placement) for placement in ("column_wise", "sgd", "replicated")),
    ("DIN", "column_wise"),
    ("SASRec", "replicated"),
]


def on_cpu_and(device: str, pool: RankPool, root: Path, folder: Path, model: str, **sections: Any) -> list[list[float]]:
    """The losses of the two runs. Adam's rate is small: a rounding error is not to grow."""
    found = []
    for number, place in enumerate(("cpu", device)):
        more = {"optimizer": {"name": "adam", "lr": 0.002}, "checkpoint": {"every_steps": 10**6}, **sections}
        path = run_file(folder / str(number), root, model, device=place, **more)
        pool.run(1, train, path)
        found.append(losses(path))
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("model", catalogue())
def test_every_model(pool: RankPool, data_root: Path, tmp_path: Path, model: str) -> None:
    only = {"data": {"valid": None, "test": None}, "train": {"epochs": 3, "max_steps": 20}}
    expected, found = on_cpu_and("cuda", pool, data_root, tmp_path, model, **only)
    assert len(found) == 20
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "model", "placement"),
    [
        ("cpu", "DeepFM", "table_wise"),
        *(pytest.param("cuda", model, placement, marks=pytest.mark.gpu) for model, placement in CASES),
    ],
)
def test_shardings_and_optimizers(
    pool: RankPool, data_root: Path, tmp_path: Path, device: str, model: str, placement: str
) -> None:
    more = {"embedding": PLACEMENTS[placement], "train": {"epochs": 6, "max_steps": 50}}
    expected, found = on_cpu_and(device, pool, data_root, tmp_path, model, **more)
    assert len(found) == 50
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert min(found) < 0.95 * found[0]  # it does learn
