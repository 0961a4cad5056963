"""Settings of the order of rows, through whole runs: mixes of sources, and what is said of a poor layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rechub_dist.errors import UserError
from rechub_tests.ranks import RankPool
from rechub_tests.runs import config_of, losses, records, run_file, train, write_data


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two sources: `train` of 530 rows, and `other` of 200."""
    root = tmp_path_factory.mktemp("sources")
    write_data(root)
    (root / "other").mkdir()
    shutil.copy(root / "train" / "part-1.parquet", root / "other")
    return root


def mixed(root: Path, **second: Any) -> dict[str, Any]:
    mix = [{"path": "train", "weight": 3}, {"path": "other", "weight": 1} | second]
    return {"root": str(root), "batch_size": 64, "eval_batch_size": 50, "labels": ["click"], "mix": mix}


@pytest.mark.slow
def test_a_mix_is_elastic_and_its_weights_are_part_of_the_run(pool: RankPool, sources: Path, tmp_path: Path) -> None:
    # 48 rows of the 530 and 16 of the 200: 12 steps an epoch, and the other source begins anew after 13
    path = run_file(tmp_path / "run", sources, "DIN", data=mixed(sources, repeat=True))
    reference = run_file(tmp_path / "reference", sources, "DIN", data=mixed(sources, repeat=True))
    assert pool.run(2, train, reference)[0].step == 24
    for ranks, steps in ((3, 5), (1, 15), (2, 24)):
        pool.run(ranks, train, path, [f"train.max_steps={steps}"])
    torch.testing.assert_close(losses(path), losses(reference), rtol=0, atol=1e-4)
    assert {record["step"] for record in records(path, "valid")} >= {12, 24}
    again = mixed(sources, repeat=True, weight=2)["mix"]
    with pytest.raises(UserError, match=r"\(saved -> wanted\): data\.train\.1\.weight 1\.0 -> 2\.0\. "):
        pool.run(1, train, path, [f"data.mix={again}"])


def test_items_are_counted_as_often_as_a_mix_has_them(pool: RankPool, sources: Path, tmp_path: Path) -> None:
    sections = {"objective": {"name": "retrieval", "negatives": "in_batch", "loss": "softmax", "log_q": True}}
    data = {**mixed(sources), "labels": None}
    path = run_file(tmp_path, sources, "DSSM", data={k: v for k, v in data.items() if v is not None}, **sections)
    shares = pool.run(2, positive_share, path)
    wanted = np.zeros(61)
    for split, weight in (("train", 0.75), ("other", 0.25)):
        items = pq.read_table(sources / split, columns=["item"])["item"].to_numpy()
        wanted += weight * np.bincount(items, minlength=61) / len(items)
    for share in shares:
        np.testing.assert_allclose(share, wanted)


def positive_share(path: Path) -> np.ndarray:
    from rechub_dist.distributed.runtime import runtime  # noqa: PLC0415
    from rechub_dist.training.trainer import Trainer  # noqa: PLC0415

    with runtime("cpu", 60) as rt:
        trainer = Trainer(config_of(path), rt)
        trainer.report.close()
        objective: Any = trainer.parts.train_module.objective
        return objective.negatives.positive_share.numpy()


def test_what_a_mix_cannot_do_is_told(pool: RankPool, sources: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, sources, "DIN", data=mixed(sources))
    with pytest.raises(UserError, match=r"data\.mix: the weight 0\.001 of source 1 gives it no row of a batch; raise"):
        pool.run(2, train, path, ["data.mix=[{path: train}, {path: other, weight: 0.001}]"])
    with pytest.raises(UserError, match="mix: at least one source must not repeat"):
        pool.run(1, train, path, ["data.mix=[{path: train, repeat: true}]"])
    with pytest.raises(UserError, match="mix needs order: epochs"):
        pool.run(1, train, path, ["data.order=sequential-partitions", "train.epochs=1"])


def told(path: Path, overrides: list[str]) -> str:
    """What a rank says on stderr in a run."""
    import contextlib  # noqa: PLC0415
    import io  # noqa: PLC0415

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        train(path, overrides)
    return said.getvalue()


def test_a_poor_layout_is_told_once_by_the_main_rank(pool: RankPool, tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    rows, folder = 2_200_000, tmp_path / "data" / "one"
    folder.mkdir()
    table = pa.table({"user": np.arange(rows) % 101, "click": (np.arange(rows) % 2).astype(np.int8)})
    pq.write_table(table, folder / "part.parquet", row_group_size=rows)
    model = {"features": ["user"]}
    data = {"train": "one", "valid": None, "test": None}
    data = {"root": str(tmp_path / "data"), "batch_size": 1024, "labels": ["click"], **data}
    path = run_file(tmp_path / "run", tmp_path / "data", "DeepFM", data=data, model=model)
    first, second = pool.run(2, told, path, ["train.max_steps=2"])
    assert second == ""
    assert first.count("warning") == 1
    assert "2 rank(s) decode each row 2.0 times, as it has 1 row groups of up to 2,200,000 rows" in first
    assert f"rechub-dist data rechunk {folder} --out FOLDER --row-group-rows 16384" in first
    assert "warning" not in pool.run(1, told, path, ["train.max_steps=3"])[0]
