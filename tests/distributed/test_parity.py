"""Sharded training on one to four ranks equals the same mathematics in one process of plain torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rechub_dist.evaluation.evaluate import evaluate_run
from rechub_dist.models import catalogue
from rechub_tests.pipelined import pipelined_modules
from rechub_tests.plain import PlainRun, rowwise_adagrad_
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import each_model, slow
from rechub_tests.runs import SCHEMA, config_of, last_checkpoint, losses, parameters, run_file, train

MODELS = tuple(catalogue())
STEPS = 22  # two epochs of eleven steps, each with an uneven tail
BATCH = 52


def unsharded(path: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Per-step losses and final table weights of a loop over whole global batches, without torchrec or ranks."""
    run = PlainRun(path)
    states = {name: torch.zeros(len(run.tables.weight(name))) for name in run.placed}
    others = {
        name: {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adam": torch.optim.Adam}[optimizer.name](
            [run.tables.weight(name)], lr=optimizer.lr, **({"eps": optimizer.eps} if optimizer.name != "sgd" else {})
        )
        for name, optimizer in run.placed.items()
        if optimizer.name != "rowwise_adagrad"
    }
    dense = torch.optim.Adam([*run.model.parameters(), *run.objective.parameters()], lr=run.config.optimizer.lr)

    def update(*_: object) -> None:
        dense.step()
        for name, optimizer in run.placed.items():
            if optimizer.name == "rowwise_adagrad":
                rowwise_adagrad_(run.tables.weight(name), states[name], optimizer.lr, optimizer.eps)
            else:
                others[name].step()

    found = run.train(update)
    widths = {name: table.table.dim for name, table in run.parts.layout.tables.items()}
    return found, {name: run.tables.weight(name).detach()[:, : widths[name]] for name in run.placed}


MIXED = {
    "sharding": "table_wise",
    "rules": [
        {"tables": "user*", "sharding": "row_wise"},
        {"tables": "item.linear", "sharding": "replicated"},
        {"tables": "tags", "sharding": "column_wise", "optimizer": {"name": "adagrad", "lr": 0.05}},
    ],
}
PLACEMENTS: dict[str, dict] = {
    "table_wise": {"sharding": "table_wise"},
    "row_wise": {"sharding": "row_wise"},
    "column_wise": {"sharding": "column_wise", "optimizer": {"name": "adagrad", "lr": 0.05}},
    "sgd": {"sharding": "row_wise", "optimizer": {"name": "sgd", "lr": 0.1}},
    "replicated": {"sharding": "replicated"},
    "replicated_adam": {"sharding": "replicated", "optimizer": {"name": "adam", "lr": 0.01}},
    "mixed": MIXED,
}
CASES = [
    *(slow(model, "table_wise", 2) for model in catalogue()),
    *each_model("row_wise", 3),
    *(slow(model, "table_wise", 1) for model in ("DeepFM", "DIN", "SASRec", "SharedBottom")),
    *(("DeepFM", placement, 2) for placement in ("column_wise", "mixed")),
    *(slow("DeepFM", placement, 2) for placement in ("sgd", "replicated", "replicated_adam")),
    ("DIN", "replicated", 2),
    slow("DIN", "column_wise", 2),
    slow("SASRec", "column_wise", 2),
    slow("SASRec", "replicated_adam", 2),
    slow("DeepFM", "mixed", 4),
    slow("DIN", "row_wise", 4),
]


@pytest.mark.parametrize(("model", "placement", "ranks"), CASES)
def test_equals_the_unsharded_run(
    pool: RankPool, data_root: Path, tmp_path: Path, model: str, placement: str, ranks: int
) -> None:
    path = run_file(tmp_path, data_root, model, data={"batch_size": BATCH}, embedding=PLACEMENTS[placement])
    if placement == "row_wise":  # stopped on the way, within an epoch, and continued from its checkpoint
        pool.run(ranks, train, path, ["train.max_steps=15"])
    summaries = pool.run(ranks, train, path)
    assert all((s.valid, s.test) == (summaries[0].valid, summaries[0].test) for s in summaries)
    expected, weights = unsharded(path)
    assert len(expected) == STEPS
    torch.testing.assert_close(losses(path), expected, rtol=0, atol=3e-6)
    assert np.mean(expected[11:]) < np.mean(expected[:11]) * 0.999  # it does learn, from epoch to epoch
    state = last_checkpoint(path)
    for name, weight in weights.items():
        # Adaptive steps blow a rounding error up where a row's gradient is next to nothing: compare tables as wholes.
        difference = state[f"tables/{name}/weight"] - weight
        assert difference.norm() < 1e-4 * weight.norm(), name
    [again] = pool.run(1, evaluation, path)  # the checkpoint on another number of ranks
    assert again.keys() == summaries[0].test.keys()
    for name, value in summaries[0].test.items():
        assert again[name] == pytest.approx(value, abs=1e-5, nan_ok=True)


def evaluation(path: Path) -> dict[str, float]:
    """The metrics of the run's best checkpoint on the test split."""
    config = config_of(path)
    return evaluate_run(config, f"{config.data.root}/test")[1].metrics


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_ranks_without_a_single_row(pool: RankPool, data_root: Path, tmp_path: Path, model: str) -> None:
    # 200 rows in batches of 199: the second batch of an epoch has one row for three ranks.
    data = {"batch_size": 199, "train": "train/part-0.parquet", "valid": None, "test": None}
    path = run_file(tmp_path, data_root, model, data=data, embedding={"sharding": "row_wise"})
    pool.run(3, train, path)
    torch.testing.assert_close(losses(path), unsharded(path)[0], rtol=0, atol=3e-6)


RETRIEVAL = [
    slow("SASRec", {"loss": "softmax", "negatives": "full"}),
    slow("SASRec", {"loss": "gbce", "num_negatives": 3}),
    ("SASRec", {"loss": "softmax", "negatives": "sampled", "num_negatives": 4, "share_negatives": True}),
    slow("GRU4Rec", {"loss": "bpr_max", "negatives": "in_batch_and_sampled", "num_negatives": 2}),
    slow("GRU4Rec", {"loss": "top1_max", "negatives": "in_batch"}),
    ("NARM", {"loss": "bpr", "negatives": "sampled", "sampling": {"name": "popularity", "power": 0.5}}),
    slow("DSSM", {"negatives": "in_batch", "log_q": False}),
    ("YoutubeDNN", {"negatives": "in_batch_and_sampled", "sampling": {"name": "popularity"}, "num_negatives": 3}),
    slow("MIND", {"loss": "softmax", "negatives": "full"}),
]


@pytest.mark.parametrize(("model", "objective"), RETRIEVAL)
@pytest.mark.parametrize("ranks", [slow(2), 3])
def test_negatives_are_those_of_the_global_batch(
    pool: RankPool, data_root: Path, tmp_path: Path, model: str, objective: dict, ranks: int
) -> None:
    # The global batch on several ranks has the losses and gradients of one rank that holds all of it.
    path = run_file(
        tmp_path,
        data_root,
        model,
        data={"batch_size": BATCH},
        objective={"name": "retrieval", "sampled_items": 20, **objective},
        embedding={"sharding": "row_wise"},
    )
    summaries = pool.run(ranks, train, path)
    expected, weights = unsharded(path)
    torch.testing.assert_close(losses(path), expected, rtol=0, atol=3e-6)
    state = last_checkpoint(path)
    for name, weight in weights.items():
        difference = state[f"tables/{name}/weight"] - weight
        assert difference.norm() < 1e-4 * weight.norm(), name
    [again] = pool.run(1, evaluation, path)
    assert any(name.startswith("sampled_ndcg") for name in again)
    for name, value in summaries[0].test.items():
        assert again[name] == pytest.approx(value, abs=1e-5, nan_ok=True)


OPTIONS = [
    ("MIND", {"readout": "max", "last_gradient": True, "routing_scale": 5.0}),
    ("GRU4Rec", {"elu": 1.0}),
    ("SASRec", {"block": "authors", "positions": "newest"}),
    ("EDCN", {"bridge_type": "attention_pooling", "gate_batch_norm": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "options"), OPTIONS)
def test_options_of_models(pool: RankPool, data_root: Path, tmp_path: Path, model: str, options: dict) -> None:
    path = run_file(tmp_path, data_root, model, model={"name": model, **parameters(model), **options})
    pool.run(3, train, path)
    torch.testing.assert_close(losses(path), unsharded(path)[0], rtol=0, atol=3e-6)


@pytest.mark.slow
def test_row_weights(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    data = {"dataset": {**SCHEMA, "weight": "importance"}}  # the auxiliary loss of DIEN counts by row, too
    for model in ("SharedBottom", "DIEN"):
        path = run_file(tmp_path / model, data_root, model, data=data)
        pool.run(3, train, path)
        expected, _ = unsharded(path)
        torch.testing.assert_close(losses(path), expected, rtol=0, atol=3e-6)
        plain = run_file(tmp_path / model / "plain", data_root, model)
        assert abs(unsharded(plain)[0][0] - expected[0]) > 1e-3


def test_sparse_dist_pipeline_gives_the_same_losses(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    for model in ("DIN", "SASRec"):
        plain = run_file(tmp_path / model / "plain", data_root, model)
        overlapped = run_file(
            tmp_path / model / "overlapped", data_root, model, distributed={"pipeline": "sparse_dist"}
        )
        pool.run(2, train, plain)
        pool.run(2, train, overlapped)
        torch.testing.assert_close(losses(overlapped), losses(plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_every_sharded_module_is_pipelined(pool: RankPool, data_root: Path, tmp_path: Path, model: str) -> None:
    path = run_file(tmp_path, data_root, model)
    for sharded, pipelined in pool.run(2, pipelined_modules, path):
        assert sharded == pipelined > 0
