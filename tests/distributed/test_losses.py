"""Each loss on one, two and three ranks equals the same mathematics in one process of plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_parity import unsharded

from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.export import export_bundle
from rechub_dist.inference.run import load
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import slow
from rechub_tests.runs import SCHEMA, last_checkpoint, losses, output, read_checkpoint, run_file, train

RANKS = [slow(1), slow(2), 3]
# Rows of unlike weight, and labels of both types. Smooth activations: where a sum rounds otherwise, the kink of a ReLU
# can turn that into another step altogether, and this compares steps.
SMOOTH = "silu"
TASKS: dict[str, Any] = {
    "data": {"dataset": {**SCHEMA, "weight": "importance"}, "labels": ["click", "buy", "stay"], "batch_size": 52},
    "model": {"task_types": ["classification", "classification", "regression"], "num_tasks": 3, "activation": SMOOTH},
    "embedding": {"sharding": "row_wise"},
}
POINTWISE: list[Any] = [
    {
        "loss": "focal",
        "loss_arguments": {"gamma": 1.5},
        "label_losses": {
            "buy": {"loss": "cross_entropy", "loss_arguments": {"positive_weight": 3, "label_smoothing": 0.1}},
            "stay": {"loss": "huber", "loss_arguments": {"delta": 0.5}},
        },
    },
    # 17 shops, so that most groups have rows on each rank
    {"group_loss": {"loss": "pairwise", "group": "shop", "share": 0.7}, "task_weights": {"buy": 2.0}},
    slow({"group_loss": {"loss": "listwise", "group": "shop"}}),
]


def check(pool: RankPool, path: Path, ranks: int, within: float = 3e-6) -> None:
    """Losses and tables of a run on so many ranks are those of plain torch."""
    pool.run(ranks, train, path)
    expected, weights = unsharded(path)
    torch.testing.assert_close(losses(path), expected, rtol=0, atol=within)
    state = last_checkpoint(path)
    for name, weight in weights.items():
        assert (state[f"tables/{name}/weight"] - weight).norm() < 1e-4 * weight.norm(), name


def resumed_to_the_bit(pool: RankPool, whole: Path, halved: Path) -> dict[str, torch.Tensor]:
    """Two run files of one run: stopped at step 10 and resumed on two ranks, the second is the first, to the bit.

    Returns what its last checkpoint holds.
    """
    pool.run(2, train, whole)
    pool.run(2, train, halved, ["train.max_steps=10"])
    pool.run(2, train, halved)
    assert losses(halved) == losses(whole)
    found, expected = last_checkpoint(halved), last_checkpoint(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    return found


@pytest.mark.parametrize("objective", POINTWISE)
@pytest.mark.parametrize("ranks", RANKS)
def test_losses_of_labels(
    pool: RankPool, data_root: Path, tmp_path: Path, objective: dict[str, Any], ranks: int
) -> None:
    tree = {"name": "pointwise", **objective}
    check(pool, run_file(tmp_path, data_root, "SharedBottom", **TASKS, objective=tree), ranks)


WEIGHTED: list[tuple[str, dict[str, Any]]] = [
    ("SharedBottom", {"task_weighting": "uncertainty", "group_loss": {"loss": "listwise", "group": "shop"}}),
    ("SharedBottom", {"task_weighting": "gradnorm", "gradnorm_lr": 0.1}),
    ("MMoE", {"task_weighting": "pareto"}),
    ("PLE", {"task_weighting": "pcgrad"}),
]


def tasks_of(model: str) -> dict[str, Any]:
    """The sections of a run of three labels; with batch normalisation, whose backward pass is an exchange, too."""
    more: dict[str, Any] = {
        "MMoE": {"activation": None, "expert_activation": SMOOTH, "tower_activation": SMOOTH},
        "PLE": {"num_tasks": None, "num_layers": 2},
    }.get(model, {})
    sizes = {key: value for key, value in {**TASKS["model"], **more}.items() if value is not None}
    return {**TASKS, "model": sizes, "optimizer": {"lr": 0.001}}


@pytest.mark.parametrize(
    ("model", "objective"), [slow(*WEIGHTED[0]), WEIGHTED[1], slow(*WEIGHTED[2]), slow(*WEIGHTED[3])]
)
@pytest.mark.parametrize("ranks", RANKS)
def test_weighting_of_labels(
    pool: RankPool, data_root: Path, tmp_path: Path, model: str, objective: dict[str, Any], ranks: int
) -> None:
    tree = {"name": "pointwise", **objective}
    # weights that come from gradients carry their rounding on: a relative 2e-7 of the first weights is 6e-6 in the end
    check(pool, run_file(tmp_path, data_root, model, **tasks_of(model), objective=tree), ranks, within=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [objective for _, objective in WEIGHTED[:2]])
def test_weighting_in_the_sparse_dist_pipeline(
    pool: RankPool, data_root: Path, tmp_path: Path, objective: dict[str, Any]
) -> None:
    tree = {"name": "pointwise", **objective}
    path = run_file(
        tmp_path, data_root, "SharedBottom", **TASKS, objective=tree, distributed={"pipeline": "sparse_dist"}
    )
    check(pool, path, 2)


@pytest.mark.parametrize("name", [slow("uncertainty"), "gradnorm", slow("pareto")])
def test_weighting_is_resumed_to_the_bit(pool: RankPool, data_root: Path, tmp_path: Path, name: str) -> None:
    tree = {"name": "pointwise", "task_weighting": name}
    whole, halved = (
        run_file(tmp_path / part, data_root, "SharedBottom", **TASKS, objective=tree) for part in ("whole", "halved")
    )
    found = resumed_to_the_bit(pool, whole, halved)
    learned = {key: value for key, value in found.items() if key.startswith("dense/objective/")}
    assert bool(learned) == (name != "pareto")
    assert all(value.isfinite().all() and value.unique().numel() == 3 for value in learned.values())


def test_a_step_that_is_left_out_leaves_weights_as_they_were(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    tree = {"name": "pointwise", "task_weighting": "gradnorm"}
    path = run_file(tmp_path, data_root, "SharedBottom", **TASKS, objective=tree)
    # A limit below every loss: no step is taken, and none is too many in one run of 11.
    pool.run(2, train, path, ["train.on_non_finite=skip", "train.max_loss=1e-9", "train.epochs=1"])
    state = last_checkpoint(path)
    assert state["dense/objective/weighting.weight"].tolist() == [1, 1, 1]
    assert state["dense/objective/weighting.first"].tolist() == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["pairwise", "listwise"])
def test_groups_where_ranks_have_no_rows(pool: RankPool, data_root: Path, tmp_path: Path, loss: str) -> None:
    # 200 rows in batches of 199: the second batch of an epoch has one row for three ranks.
    data = {"batch_size": 199, "train": "train/part-0.parquet", "valid": None, "test": None}
    tree = {"name": "pointwise", "group_loss": {"loss": loss, "group": "shop", "share": 0.5}}
    check(pool, run_file(tmp_path, data_root, "DIN", data=data, objective=tree), 3)


def test_a_run_with_groups_is_evaluated_and_predicts_without_them(
    pool: RankPool, data_root: Path, tmp_path: Path
) -> None:
    tree = {"name": "pointwise", "group_loss": {"loss": "pairwise", "group": "shop"}}
    data = {"root": str(data_root), "batch_size": 52}
    path = run_file(
        tmp_path, data_root, "DeepFM", data=data, objective=tree,
        evaluation={"metrics": ["default", {"name": "grouped_auc", "group": "user"}]},
    )  # fmt: skip
    assert "grouped_auc" in pool.run(2, train, path)[0].test
    rows = pq.read_table(data_root / "test").drop_columns(["shop"])
    assert load(output(path)).predict(rows).num_rows == 70


RETRIEVAL: list[tuple[str, dict[str, Any]]] = [
    ("SASRec", {"loss": "gbce", "gbce_reduction": "mean", "num_negatives": 3}),
    slow("SASRec", {"loss": "softmax", "negatives": "full", "temperature": 0.5}),
    ("DSSM", {"temperature": "learn"}),
    slow("FacebookDSSM", {"loss": "softmax", "temperature": "learn", "temperature_start": 0.2}),
    slow("GRU4Rec", {"loss": "bpr", "negatives": "sampled", "num_negatives": 2, "temperature": "learn"}),
]


@pytest.mark.parametrize(("model", "objective"), RETRIEVAL)
@pytest.mark.parametrize("ranks", RANKS)
def test_losses_of_recall_models(
    pool: RankPool, data_root: Path, tmp_path: Path, model: str, objective: dict[str, Any], ranks: int
) -> None:
    tree = {"name": "retrieval", **objective}
    path = run_file(
        tmp_path, data_root, model, data={"batch_size": 52}, objective=tree, embedding={"sharding": "row_wise"}
    )
    check(pool, path, ranks)


TEMPERATURE = "dense/objective/_temperature.log_value"


@pytest.mark.slow
def test_a_learnt_temperature_is_resumed_to_the_bit(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    tree = {"name": "retrieval", "temperature": "learn"}
    whole, halved = (run_file(tmp_path / name, data_root, "DSSM", objective=tree) for name in ("whole", "halved"))
    pool.run(2, train, whole)
    pool.run(2, train, halved, ["train.max_steps=10"])
    first = last_checkpoint(halved)
    pool.run(2, train, halved)
    assert losses(halved) == losses(whole)
    found, expected = last_checkpoint(halved), last_checkpoint(whole)
    assert found.keys() == expected.keys()
    assert {TEMPERATURE, "dense_optim/objective/_temperature.log_value/exp_avg"} <= found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert first[TEMPERATURE] != found[TEMPERATURE] != np.float32(np.log(0.05))


@pytest.mark.slow
def test_scores_of_a_bundle_are_divided_by_the_learnt_temperature(
    pool: RankPool, data_root: Path, tmp_path: Path
) -> None:
    tree = {"name": "retrieval", "loss": "softmax", "temperature": "learn", "temperature_start": 0.5}
    path = run_file(tmp_path, data_root, "FacebookDSSM", objective=tree)
    pool.run(1, train, path)
    manifest = export_bundle(str(output(path)), tmp_path / "bundle")
    users = pq.read_table(data_root / "test")
    trained = load(output(path)).vectors("user", users)
    vectors = Bundle(tmp_path / "bundle").vectors("user", users)
    found = np.array(vectors["vectors"].to_pylist())[:, 0]
    np.testing.assert_allclose(found, np.array(trained["vectors"].to_pylist())[:, 0], rtol=1e-4, atol=1e-5)
    state = read_checkpoint(output(path) / "checkpoints" / f"step-{manifest.step:010d}")
    length = np.exp(-float(state[TEMPERATURE]))  # the model's own vectors have length 1
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), length, rtol=1e-4)
    assert abs(length - 2) > 1e-3
