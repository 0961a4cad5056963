"""The identity of a run: the same however it is written and wherever it lies, another where the mathematics is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rechub_dist.assembly.identity import identity, other_than, recorded
from rechub_dist.assembly.parts import build
from rechub_dist.data.run_file import load_run
from rechub_dist.errors import UserError
from rechub_dist.models import catalogue
from rechub_tests.runs import SCHEMA, run_file


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "dataset.yaml").write_text(json.dumps(SCHEMA))
    return folder


def found(path: Path, *overrides: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's identity, and the record of it that a checkpoint has."""
    config = load_run(path, overrides)
    one = identity(build(config, device="cpu", world_size=1), "data")
    return one, {"config": config.dump(), "identity": one}


@pytest.mark.parametrize("model", catalogue())
def test_a_record_of_any_model_resolves_to_the_identity_of_its_run(root: Path, tmp_path: Path, model: str) -> None:
    one, run = found(run_file(tmp_path, root, model))
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    assert recorded(run, "here") == one
    assert other_than(run, one, "here") == []
    assert torch.equal(torch.rand(3), wanted)  # nothing was drawn meanwhile


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed=8", "seed 7 -> 8"),
        ("data.shuffle_rows=4000", "data.shuffle_rows 8000000 -> 4000"),
        ("data.features.user={kind: sparse, rows: 102}", "data.features.user.table.rows 101 -> 102"),
        ("data.labels=[buy]", 'data.labels.0.name "click" -> "buy"'),
        ("embedding.schedule.warmup_steps=3", "embedding.schedule.warmup_steps 0 -> 3"),
        ("embedding.rules=[{tables: user, init_std: 0.5}]", "embedding.init_std.user 0.3 -> 0.5"),
        ("model.embedding_dim=8", "model.embedding_dim 6 -> 8"),
        ("train.precision=bf16", 'train.precision "fp32" -> "bf16"'),
        ("train.tf32=true", "train.tf32 false -> true"),
        ("embedding.communication.forward=fp16", 'embedding.communication.forward "fp32" -> "fp16"'),
        ("train.ema=0.99", "train.ema null -> 0.99"),
        ("embedding.rules=[{tables: item, dropout: 0.5}]", "embedding.dropout.item 0.0 -> 0.5"),
        ("embedding.dropout=0.1", "embedding.dropout.user 0.0 -> 0.1"),
        ("embedding.optimizer.weight_decay=0.1", "embedding.optimizers.user.weight_decay 0.0 -> 0.1"),
        ("embedding.rules=[{tables: user, frozen: true}]", 'embedding.optimizers.user.name "rowwise_adagrad" -> "sgd"'),
        ("optimizer.rules=[{parameters: mlp.*, frozen: true}]", "optimizer.rules [] -> "),
        ("optimizer.betas=[0.9, 0.99]", "optimizer.betas [0.9, 0.999] -> [0.9, 0.99]"),
    ],
)
def test_what_the_mathematics_depends_on_makes_another_run(
    root: Path, tmp_path: Path, override: str, line: str
) -> None:
    path = run_file(tmp_path, root, "DeepFM")
    _, saved = found(path)
    wanted, _ = found(path, override)
    assert any(differing.startswith(line) for differing in other_than(saved, wanted, "here"))


@pytest.mark.parametrize(
    "override",
    [
        "output_dir=elsewhere",
        "train={epochs: 9, patience: 2, max_loss: 5, on_non_finite: skip}",
        "train.compile=true",
        "distributed.bucket_mb=3",
        "embedding.sharding=row_wise",
        "embedding.replicate_below=50",
        "evaluation={top_k: [1], sampled_items: 3}",
        "data.eval_batch_size=7",
        "checkpoint={every_steps: 3}",
        "data.features.unread={kind: dense, column: age}",
        "data.features.age={kind: dense, column: age, dim: 1, fill: 0}",
        "objective={name: pointwise}",
        "optimizer={name: adam, lr: 0.01, betas: [0.9, 0.999], weight_decay: 0}",
        "warm_start={from: other}",
    ],
)
def test_what_it_does_not_depend_on_does_not(root: Path, tmp_path: Path, override: str) -> None:
    path = run_file(tmp_path, root, "DeepFM")
    _, saved = found(path)
    wanted, _ = found(path, override)
    assert other_than(saved, wanted, "here") == []


def test_weights_of_draws_are_told_by_what_they_are(root: Path, tmp_path: Path) -> None:
    """By the file's name only where a checkpoint of an older version does not tell what was in it."""
    runs = []
    for name, power in (("a", 1), ("b", 1), ("c", 2)):
        np.save(tmp_path / f"{name}.npy", np.arange(1.0, 62.0) ** power)
        objective = {"name": "retrieval", "sampling": {"name": "file", "path": str(tmp_path / f"{name}.npy")}}
        config = load_run(run_file(tmp_path / name, root, "SASRec", objective=objective))
        parts = build(config, device="cpu", world_size=1)
        negatives = parts.train_module.objective.negatives
        assert negatives is not None
        weights = negatives.draw_weights(config.storage)
        assert weights is not None
        parts.spec.cumulative["negatives"] = np.cumsum(weights)
        one = identity(parts, "data")
        runs.append((one, {"config": config.dump(), "identity": one}))
    assert other_than(runs[0][1], runs[1][0], "here") == []
    assert [line.split()[0] for line in other_than(runs[0][1], runs[2][0], "here")] == ["data.sampling_weights"]
    old = {**runs[0][1], "identity": {"data": {"train": "data", "order_version": 4}}}
    assert other_than(old, runs[0][0], "here") == []
    assert [line.split()[0] for line in other_than(old, runs[1][0], "here")] == ["objective.sampling.path"]


def test_a_record_that_means_nothing_here_is_told(root: Path, tmp_path: Path) -> None:
    one, run = found(run_file(tmp_path, root, "DeepFM"))
    run = {**run, "config": run["config"].replace("embedding_dim: 6", "embedding_dimension: 6")}
    with pytest.raises(UserError, match=r"here: its configuration means nothing to this version \(unknown key 'model"):
        other_than(run, one, "here")
