"""Kernels that keep tables in host memory, with and without a cache on the device: no row is ever stale."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rechub_dist.checkpoint.state import weights_state
from rechub_dist.data.prepare.synthetic import synthesize
from rechub_dist.data.run_file import load_run
from rechub_dist.distributed.runtime import runtime
from rechub_dist.embedding.optim import kernels
from rechub_dist.embedding.sharding import table_shards
from rechub_dist.errors import UserError
from rechub_dist.evaluation.evaluate import evaluate_run
from rechub_dist.training.trainer import Trainer
from rechub_tests.ranks import RankPool
from rechub_tests.runs import last_checkpoint, losses, records, run_file, train

ROWS, WIDTH, TABLES = 400_000, 64, 4  # 0.41 GB of weights
ALLOWED_GB = 0.2


def run_of(folder: Path, root: Path, kernel: str, device: str = "cuda", **sections: Any) -> Path:
    embedding = {"sharding": "row_wise", "kernel": kernel, "optimizer": {"name": "rowwise_adagrad", "lr": 0.05}}
    return run_file(folder, root, "DIN", device=device, embedding=embedding, **sections)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kernel", "pipeline"),
    [
        ("fused_uvm", "auto"),
        ("fused_uvm_caching", "base"),
        ("fused_uvm_caching", "sparse_dist"),
        ("fused_uvm_caching", "auto"),  # which prefetches
    ],
)
def test_losses_and_checkpoints_as_without(
    pool: RankPool, data_root: Path, tmp_path: Path, kernel: str, pipeline: str
) -> None:
    """Evaluations and saves lie in between, so a row that is not written back, or too late, would show."""
    more = {
        "train": {"epochs": 4, "max_steps": 30, "eval_every": 8},
        "checkpoint": {"every_steps": 5},
        "distributed": {"pipeline": pipeline},
    }
    runs = [run_of(tmp_path / name, data_root, name, **more) for name in ("fused", kernel)]
    tests = [pool.run(1, train, path)[0].test for path in runs]
    torch.testing.assert_close(losses(runs[1]), losses(runs[0]), rtol=0, atol=1e-5)
    expected, found = (last_checkpoint(path) for path in runs)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert (found[key] - value).double().norm() <= 1e-4 * max(1.0, value.double().norm()), key
    assert tests[1] == pytest.approx(tests[0], abs=1e-3)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("large") / "data"
    synthesize(root, 40_000, dense=2, sparse=TABLES, vocabulary=ROWS)
    return root


def large_run(folder: Path, root: Path, kernel: str) -> Path:
    names = [f"sparse_{i}" for i in range(TABLES)]
    tree = {
        "output_dir": str(folder / "out"),
        "device": "cuda",
        "data": {"root": str(root), "batch_size": 2048, "valid": None, "test": None},
        "model": {
            "name": "DeepFM",
            "features": [*names, "dense_0"],
            "hidden_units": [16],
            "dropout_rates": 0.0,
            "embedding_dim": WIDTH,
        },
        "train": {"max_steps": 15, "log_every": 5},
        "embedding": {"sharding": "table_wise", "kernel": kernel, "memory_per_rank_gb": ALLOWED_GB},
    }
    folder.mkdir()
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def peak_and_step(path: Path) -> tuple[float, int]:
    """Train; the device memory that it took at its peak, in GB, and the steps."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = train(path).step
    return torch.cuda.max_memory_allocated() / 2**30, step


@pytest.mark.gpu
def test_tables_beyond_memory_per_rank_gb(pool: RankPool, large: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="memory_per_rank_gb"):
        pool.run(1, train, large_run(tmp_path / "fused", large, "fused"))
    [(peak, step)] = pool.run(1, peak_and_step, large_run(tmp_path / "uvm", large, "fused_uvm_caching"))
    assert step == 15
    assert peak < 0.9 * TABLES * ROWS * WIDTH * 4 / 2**30  # less than the tables alone would take


def caches(path: Path) -> tuple[int, list[int], str, int]:
    """Train, then look rows up; the tables' rows, the caches' slots, the pipeline, and how many slots are locked."""
    config = load_run(path)
    with runtime("cuda", 60) as rt:
        trainer = Trainer(config, rt)
        trainer.fit()
        looked_up(trainer)
        held = kernels(trainer.module)
        locks = sum(int(kernel.lxu_cache_locking_counter.sum()) for kernel in held)
        rows = sum(placed.table.rows for placed in trainer.parts.layout.tables.values())
        trainer.checkpoints.close(60)
        trainer.report.close()
        return rows, [kernel.lxu_cache_state.numel() for kernel in held], type(trainer.loop.pipeline).__name__, locks


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [0.05, 0.5])
@pytest.mark.parametrize("setting", ["auto", "sparse_dist"])
def test_caches_have_their_share_of_rows(
    pool: RankPool, large: Path, tmp_path: Path, factor: float, setting: str
) -> None:
    path = large_run(tmp_path / "run", large, "fused_uvm_caching")
    tree = yaml.safe_load(path.read_text())
    tree["embedding"] |= {"cache_load_factor": factor, "memory_per_rank_gb": None}
    path.write_text(yaml.safe_dump(tree | {"distributed": {"pipeline": setting}}))
    [(rows, slots, pipeline, locks)] = pool.run(1, caches, path)
    assert sum(slots) == pytest.approx(factor * rows, rel=0.01)
    assert (pipeline, locks) == ("PrefetchPipeline" if setting == "auto" else "SparseDistPipeline", 0)


def looked_up(trainer: Trainer) -> float:
    """The largest number that the first batch's lookups give."""
    here = trainer.passes.current(0)
    with torch.no_grad(), closing(here.reader.batches(here.number, 0)) as batches:
        found = trainer.module.module.stage(next(batches).to(trainer.rt.device))
    return max(float(vector.abs().max()) for vector in found.vectors.values())


def written_in_place(path: Path) -> tuple[float, float, float]:
    """Train, which fills the cache, then write zeros into all tables.

    What the lookups gave before and give afterwards, and the largest number in the tables when those are read again
    (which writes the cache back).
    """
    config = load_run(path)
    with runtime("cuda", 60) as rt:
        trainer = Trainer(config, rt)
        trainer.fit()
        before = looked_up(trainer)
        for shards in table_shards(trainer.module, trainer.parts.layout).values():
            for shard in shards:
                shard.tensor.detach().zero_()
        after = looked_up(trainer)
        state = weights_state(trainer.module, trainer.parts.layout)
        tables = (piece.values for key, entry in state.items() if key.startswith("tables/") for piece in entry.pieces)
        kept = max(float(values.abs().max()) for values in tables)
        trainer.checkpoints.close(60)
        trainer.report.close()
        return before, after, kept


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["fused_uvm", "fused_uvm_caching"])
def test_what_is_written_in_place_is_looked_up(pool: RankPool, large: Path, tmp_path: Path, kernel: str) -> None:
    [(before, after, kept)] = pool.run(1, written_in_place, large_run(tmp_path / "run", large, kernel))
    assert before > 0
    assert (after, kept) == (0, 0)


def evaluated(path: Path, kernel: str) -> tuple[int, dict[str, float]]:
    """Step and test metrics of a run's best checkpoint, read anew."""
    config = load_run(path, [f"embedding.kernel={kernel}"])
    step, found = evaluate_run(config, f"{config.data.root}/test")
    return step, found.metrics


@pytest.mark.parametrize(
    ("device", "kernel"),
    [
        ("cpu", "fused"),
        *(pytest.param("cuda", name, marks=pytest.mark.gpu) for name in ("fused", "fused_uvm", "fused_uvm_caching")),
    ],
)
def test_metrics_of_the_best_weights(pool: RankPool, data_root: Path, tmp_path: Path, device: str, kernel: str) -> None:
    """They are not the last ones: they are loaded over what training went on to."""
    steps = {"epochs": 4, "eval_every": 6, "best_metric": "log_loss"}
    path = run_of(tmp_path, data_root, kernel, device=device, train=steps)
    [summary] = pool.run(1, train, path)
    assert summary.step == 36
    assert summary.best_step is not None
    assert summary.best_step < 36
    for name in {"fused", kernel}:
        [(step, metrics)] = pool.run(1, evaluated, path, name)
        assert step == summary.best_step
        assert summary.test == pytest.approx(metrics, abs=1e-6)
    [last] = [record for record in records(path, "valid") if record["step"] == 36]
    assert last["log_loss"] > 1.1 * summary.valid["log_loss"]
