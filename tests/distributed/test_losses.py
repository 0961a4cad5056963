"""Each loss on one, two and three ranks equals the same mathematics in one process of plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import unsharded

from rechub_tests.ranks import RankPool
from rechub_tests.runs import SCHEMA, last_checkpoint, losses, run_file, train

# Rows of unlike weight, and labels of both types.
TASKS: dict[str, Any] = {
    "data": {"dataset": {**SCHEMA, "weight": "importance"}, "labels": ["click", "buy", "stay"], "batch_size": 52},
    "model": {"task_types": ["classification", "classification", "regression"], "num_tasks": 3},
    "embedding": {"sharding": "row_wise"},
}
POINTWISE: list[dict[str, Any]] = [
    {
        "loss": "focal",
        "loss_arguments": {"gamma": 1.5},
        "label_losses": {
            "buy": {"loss": "cross_entropy", "loss_arguments": {"positive_weight": 3, "label_smoothing": 0.1}},
            "stay": {"loss": "huber", "loss_arguments": {"delta": 0.5}},
        },
    },
]


def check(pool: RankPool, path: Path, ranks: int) -> None:
    """Losses and tables of a run on so many ranks are those of plain torch."""
    pool.run(ranks, train, path)
    expected, weights = unsharded(path)
    torch.testing.assert_close(losses(path), expected, rtol=0, atol=3e-6)
    state = last_checkpoint(path)
    for name, weight in weights.items():
        assert (state[f"tables/{name}/weight"] - weight).norm() < 1e-4 * weight.norm(), name


@pytest.mark.parametrize("objective", POINTWISE)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_losses_of_labels(
    pool: RankPool, data_root: Path, tmp_path: Path, objective: dict[str, Any], ranks: int
) -> None:
    tree = {"name": "pointwise", **objective}
    check(pool, run_file(tmp_path, data_root, "SharedBottom", **TASKS, objective=tree), ranks)


RETRIEVAL: list[tuple[str, dict[str, Any]]] = [
    ("SASRec", {"loss": "gbce", "gbce_reduction": "mean", "num_negatives": 3}),
]


@pytest.mark.parametrize(("model", "objective"), RETRIEVAL)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_losses_of_recall_models(
    pool: RankPool, data_root: Path, tmp_path: Path, model: str, objective: dict[str, Any], ranks: int
) -> None:
    tree = {"name": "retrieval", **objective}
    path = run_file(
        tmp_path, data_root, model, data={"batch_size": 52}, objective=tree, embedding={"sharding": "row_wise"}
    )
    check(pool, path, ranks)
