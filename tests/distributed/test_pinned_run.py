"""A run with `embedding.plan`: its tables lie where the plan has them, and it learns the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rechub_dist.checkpoint.folder import Folder
from rechub_dist.checkpoint.load import read_manifest
from rechub_dist.checkpoint.manifest import CheckpointManifest
from rechub_dist.config import StorageConfig
from rechub_dist.errors import UserError
from rechub_tests.ranks import RankPool
from rechub_tests.runs import losses, output, run_file, train


def test_a_pinned_run(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    free, kept = (run_file(tmp_path / name, data_root, "DCN") for name in ("free", "kept"))
    pool.run(2, train, free)
    plan = manifest(free).run["plan"]
    for number, table in enumerate(plan["tables"].values()):
        if table["sharding"] == "table_wise":
            table["shards"][0][0] = number % 2
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    pool.run(2, train, kept, [f"embedding.plan={path}"])
    found = manifest(kept)
    assert found.run["plan"] == plan
    on_rank = {
        name: {int(piece.file.split("-")[1]) for piece in found.tensors[f"tables/{name}/weight"].pieces}
        for name, table in plan["tables"].items()
        if table["sharding"] == "table_wise"
    }
    assert on_rank == {name: {plan["tables"][name]["shards"][0][0]} for name in on_rank}
    assert len(set.union(*on_rank.values())) == 2
    torch.testing.assert_close(losses(kept), losses(free), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"embedding.plan: .* is for 2 rank\(s\), and the run has 1"):
        train(kept, [f"embedding.plan={path}", "train.epochs=3"])


def manifest(path: Path) -> CheckpointManifest:
    folder = Folder(str(output(path) / "checkpoints"), StorageConfig())
    return read_manifest(folder, 18)
