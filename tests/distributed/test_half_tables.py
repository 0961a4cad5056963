"""Tables in fp16 against plain torch that rounds as the kernels do, over a resume; and all that reads such tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from rechub_dist.checkpoint.consolidate import consolidate, load_consolidated
from rechub_dist.checkpoint.find import best_manifest, find_folder
from rechub_dist.errors import UserError
from rechub_dist.evaluation.evaluate import evaluate_run
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.export import export_bundle
from rechub_dist.inference.run import load
from rechub_tests.plain import PlainRun
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import slow
from rechub_tests.runs import config_of, last_checkpoint, last_weights, losses, output, run_file, train

HALF = {"precision": "fp16", "optimizer": {"name": "rowwise_adagrad", "lr": 0.05}}
CASES: dict[str, dict[str, Any]] = {
    "rowwise_adagrad": {"rules": [{"tables": "user*", "sharding": "row_wise"}]},
    "adagrad": {"optimizer": {"name": "adagrad", "lr": 0.05}, "sharding": "column_wise"},
    "sgd": {"optimizer": {"name": "sgd", "lr": 0.1}, "sharding": "row_wise"},
    "decay": {"optimizer": {"name": "rowwise_adagrad", "lr": 0.05, "weight_decay": 0.01, "decay": "decoupled"}},
    "mixed": {
        "rules": [
            {"tables": "user", "precision": "fp32"},
            {"tables": "tags*", "sharding": "replicated"},
            {"tables": "item", "frozen": True},
        ]
    },
}


class HalfRun(PlainRun):
    """Its sharded tables have the values of fp16 after each step, rounded to nearest as on CPU."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.states = {name: torch.zeros_like(self.tables.weight(name)) for name in self.placed}
        self.halves = {name: table.precision == "fp16" for name, table in self.parts.layout.tables.items()}
        for name in self.placed:
            self.tables.weight(name).data.copy_(self.rounded(name, self.tables.weight(name).data))
        self.dense = torch.optim.Adam(self.model.parameters(), lr=0.01)

    def rounded(self, name: str, values: Tensor) -> Tensor:
        return values.half().float() if self.halves[name] else values

    @torch.no_grad()
    def update(self, _step: int, batch: Any) -> None:
        self.dense.step()
        looked_up = self.looked_up(batch)
        for name, optimizer in self.placed.items():
            weight, state = self.tables.weight(name), self.states[name]
            grad = weight.grad
            assert grad is not None
            if optimizer.name == "sgd":
                step = optimizer.lr * grad
            else:
                squares = grad.square()
                state += squares.mean(dim=1, keepdim=True) if optimizer.name == "rowwise_adagrad" else squares
                step = optimizer.lr * grad / (state.sqrt() + optimizer.eps)
            if optimizer.name != "rowwise_adagrad":  # these kernels round the step, too
                step = self.rounded(name, step)
            kept = weight * (1 - optimizer.lr * optimizer.weight_decay * looked_up[name][:, None].float())
            weight.copy_(self.rounded(name, kept - step))


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        ("rowwise_adagrad", (1, 3)),
        ("adagrad", (2, 2)),
        slow("sgd", (2, 2)),
        ("mixed", (2, 1)),
        ("decay", (2, 2)),
        slow("rowwise_adagrad", (2, 2)),
        slow("adagrad", (1, 3)),
        slow("sgd", (3, 1)),
    ],
)
def test_equals_plain_torch(pool: RankPool, data_root: Path, tmp_path: Path, case: str, ranks: tuple[int, int]) -> None:
    embedding = {**HALF, **CASES[case]}
    path = run_file(tmp_path, data_root, "DeepFM", embedding=embedding, train={"epochs": 1, "log_every": 1})
    pool.run(ranks[0], train, path, ["train.max_steps=4"])
    pool.run(ranks[1], train, path)
    plain = HalfRun(path)
    torch.testing.assert_close(losses(path), plain.train(plain.update), rtol=0, atol=3e-5)
    found = last_checkpoint(path)
    for name, wanted in plain.weights().items():
        table = name.split("/")[1]
        if name.startswith("tables/"):
            half = plain.halves[table]
            assert found[name].dtype == (torch.float16 if half else torch.float32), name
            if half:  # a sum in another order ends on the other side of a tie, by the last place
                assert (found[name].float() == wanted).float().mean() > 0.98, name
        assert (found[name].float() - wanted).norm() <= 1e-4 * wanted.norm(), name
    for name, value in found.items():
        if name.startswith("tables/") and not name.endswith("/weight"):
            assert value.dtype == torch.float32, name


@pytest.mark.slow
@pytest.mark.parametrize(("model", "ranks"), [("DIN", 2), ("DeepFM", 3)])
def test_a_resumed_run_is_the_uninterrupted_one(
    pool: RankPool, data_root: Path, tmp_path: Path, model: str, ranks: int
) -> None:
    paths = [run_file(tmp_path / name, data_root, model, embedding=HALF) for name in ("whole", "resumed")]
    pool.run(ranks, train, paths[0])
    for overrides in (["train.max_steps=5"], ["train.max_steps=13"], []):
        pool.run(ranks, train, paths[1], overrides)
    torch.testing.assert_close(losses(paths[0]), losses(paths[1]), rtol=0, atol=1e-6)
    whole, resumed = map(last_checkpoint, paths)
    for name, value in whole.items():
        if value.dtype == torch.float16:  # by chance about half would be equal
            assert (value == resumed[name]).float().mean() > 0.99, name


@pytest.mark.slow
def test_everything_reads_them(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", embedding=HALF)
    [summary, _] = pool.run(2, train, path)
    run = load(output(path))
    whole = run.evaluate(data_root / "test")  # in one process, in fp32, where every number of fp16 is one
    [sharded] = pool.run(1, evaluation, path)
    for name, value in summary.test.items():
        assert whole[name] == pytest.approx(value, rel=1e-5)
        assert sharded[name] == pytest.approx(value, rel=1e-5)
    folder, _step = find_folder(str(output(path)), None)
    out = tmp_path / "whole.safetensors"
    size = sum(consolidate(folder, best_manifest(folder), out))
    assert size < out.stat().st_size
    parts, tables = last_weights(path)
    load_consolidated(out, parts.train_module.model, tables)
    for name in parts.layout.tables:
        assert torch.equal(tables.weight(name), run.parts.train_module.stage.replicated.local.weight(name))
    rows = pq.read_table(data_root / "test")
    scores = []
    for precision in ("fp16", "fp32"):
        export_bundle(str(output(path)), tmp_path / precision, tables=precision)
        scores.append(Bundle(tmp_path / precision, check=True).score(rows).column(0).to_numpy())
    np.testing.assert_array_equal(*scores)


def evaluation(path: Path) -> dict[str, float]:
    config = config_of(path)
    return evaluate_run(config, f"{config.data.root}/test")[1].metrics


@pytest.mark.slow
def test_another_precision_is_another_run(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    sections = {"train": {"max_steps": 3}}
    path = run_file(tmp_path / "fp32", data_root, "DeepFM", **sections)
    pool.run(1, train, path)
    with pytest.raises(UserError, match=r'embedding\.precision\.\S+ "fp32" -> "fp16".*Choose another output_dir'):
        pool.run(1, train, path, ["embedding.precision=fp16", "train.max_steps=6"])
    frozen = {"rules": [{"tables": "*", "frozen": True}]}
    half = run_file(
        tmp_path / "fp16",
        data_root,
        "DeepFM",
        embedding={**HALF, **frozen},
        warm_start={"from": str(output(path))},
        **sections,
    )
    pool.run(2, train, half)
    source, rounded = last_checkpoint(path), last_checkpoint(half)
    tables = [name for name in source if name.startswith("tables/") and name.endswith("/weight")]
    assert tables
    assert all(torch.equal(rounded[name], source[name].half()) for name in tables)
    back = run_file(
        tmp_path / "back",
        data_root,
        "DeepFM",
        embedding=frozen,
        warm_start={"from": str(output(half))},
        **sections,
    )
    pool.run(1, train, back)
    assert all(torch.equal(last_checkpoint(back)[name], rounded[name].float()) for name in tables)


def test_what_fp16_cannot_hold_is_refused(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    huge = {"rules": [{"tables": "user", "init_std": 1e6, "frozen": True}]}
    path = run_file(tmp_path / "huge", data_root, "DeepFM", embedding=huge, train={"max_steps": 1})
    pool.run(1, train, path)
    warm = run_file(
        tmp_path / "warm", data_root, "DeepFM", embedding=HALF, warm_start={"from": str(output(path)), "dense": []}
    )
    with pytest.raises(UserError, match="tables/user/weight has weights that fp16 cannot hold"):
        pool.run(2, train, warm)
    vectors = tmp_path / "user.npy"
    np.save(vectors, np.full((101, 6), 1e5, np.float32))
    section = {"embeddings": [{"table": "user", "file": str(vectors)}]}
    path = run_file(tmp_path / "vectors", data_root, "DeepFM", embedding=HALF, warm_start=section)
    with pytest.raises(UserError, match=r"has numbers that fp16 cannot hold .up to 65,504.; set precision: fp32"):
        pool.run(2, train, path)
