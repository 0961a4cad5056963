"""A checkpoint of any placement on any number of ranks loads under any other, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rechub_tests.ranks import RankPool
from rechub_tests.runs import RECORD, config_of, output, run_file, train

PLACEMENTS: dict[str, dict[str, Any]] = {
    "table_wise": {"sharding": "table_wise"},
    "row_wise": {"sharding": "row_wise"},
    "column_wise": {"sharding": "column_wise"},
    "replicated": {"sharding": "replicated"},
    "mixed": {
        "sharding": "table_wise",
        "rules": [
            {"tables": "user", "sharding": "row_wise"},
            {"tables": "item", "sharding": "replicated"},
            {"tables": "tags*", "sharding": "column_wise"},
        ],
    },
}


def placements(optimizer: str) -> dict[str, dict[str, Any]]:
    """Those that go with an optimizer: columns have no row-wise state, and Adam takes replicated tables alone."""
    if optimizer == "adam":
        return {"replicated": PLACEMENTS["replicated"]}
    found = dict(PLACEMENTS)
    if optimizer == "rowwise_adagrad":
        del found["column_wise"]
        found["mixed"] = {**found["mixed"], "rules": found["mixed"]["rules"][:2]}
    return found


def reshard(paths: dict[str, Path], sources: list[Path], saves: Path | None) -> int:
    """On this many ranks and under each placement: load all sources, each over garbage; all must be alike.

    With `saves`, then save what is held there, once a placement. Returns how many loads were compared.
    """
    import torch.distributed as dist  # noqa: PLC0415

    from rechub_dist.assembly.parts import build  # noqa: PLC0415
    from rechub_dist.assembly.sharded import shard_train_module  # noqa: PLC0415
    from rechub_dist.checkpoint import Checkpoints, Position  # noqa: PLC0415
    from rechub_dist.checkpoint.folder import Folder  # noqa: PLC0415
    from rechub_dist.checkpoint.state import train_state  # noqa: PLC0415
    from rechub_dist.config import CheckpointConfig, StorageConfig  # noqa: PLC0415
    from rechub_dist.distributed.runtime import runtime  # noqa: PLC0415
    from rechub_dist.embedding.optim import Optimizers  # noqa: PLC0415
    from rechub_dist.embedding.rates import Rates  # noqa: PLC0415

    compared = 0
    with runtime("cpu", 60) as rt:
        for name, path in paths.items():
            config = config_of(path)
            parts = build(config, device="cpu", world_size=rt.world_size)
            module = shard_train_module(parts, rt)
            rates = Rates(config.optimizer.schedule, config.embedding.schedule)
            optimizers = Optimizers(module, parts.layout, config.optimizer, rates)
            state = train_state(module, parts.layout, optimizers)
            first: dict[tuple[str, int], torch.Tensor] = {}
            for source in sources:
                for entry in state.values():
                    for piece in entry.pieces:
                        piece.values.fill_(1)  # of any type
                checkpoints = Checkpoints(Folder(str(source), StorageConfig()), rt, CheckpointConfig())
                [step] = checkpoints.steps()
                checkpoints.load_weights(state, step)
                for key, entry in state.items():
                    for i, piece in enumerate(entry.pieces):
                        wanted = first.setdefault((key, i), piece.values.clone())
                        assert torch.equal(piece.values, wanted), f"{key} from {source} under {name} on {rt.world_size}"
                compared += 1
            if saves is not None:
                folder = Folder(str(saves / f"{name}-{rt.world_size}"), StorageConfig())
                checkpoints = Checkpoints(folder, rt, CheckpointConfig())
                checkpoints.save(state, Position(step=9), RECORD)
                checkpoints.check_last()
            dist.barrier()
    return compared


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "model", "precision"),
    [
        ("rowwise_adagrad", "DeepFM", "fp32"),
        ("adagrad", "DIN", "fp32"),
        ("adam", "DeepFM", "fp32"),
        ("adagrad", "DeepFM", "fp32"),
        ("sgd", "DIN", "fp32"),
        ("adagrad", "DIN", "fp16"),  # in fp32 where they are replicated
    ],
)
def test_any_placement_loads_under_any_other(
    pool: RankPool, data_root: Path, tmp_path: Path, optimizer: str, model: str, precision: str
) -> None:
    tables = {"optimizer": {"name": optimizer, "lr": 0.05}, "precision": precision}
    trained = run_file(
        tmp_path / "trained",
        data_root,
        model,
        embedding={**tables, "sharding": next(iter(placements(optimizer)))},
        train={"epochs": 1},
    )
    pool.run(2, train, trained)
    paths = {
        name: run_file(tmp_path / name, data_root, model, embedding={**section, **tables})
        for name, section in placements(optimizer).items()
    }
    original = tmp_path / "original"
    shutil.copytree(output(trained) / "checkpoints", original)
    for ranks in (1, 2, 3, 4):
        pool.run(ranks, reshard, paths, [original], tmp_path / "saved")
    sources = [original, *sorted((tmp_path / "saved").iterdir())]
    assert len(sources) == 1 + 4 * len(paths)
    for ranks in (1, 2, 3, 4):
        assert set(pool.run(ranks, reshard, paths, sources, None)) == {len(sources) * len(paths)}
