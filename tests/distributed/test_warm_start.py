"""A run that begins with weights of another one, or with vectors from files, under any placement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch import Tensor

from rechub_dist.errors import UserError
from rechub_tests.ranks import RankPool
from rechub_tests.runs import SCHEMA, config_of, last_checkpoint, output, read_checkpoint, run_file, train

PLACEMENTS = [("table_wise", 2), ("row_wise", 3), ("column_wise", 2), ("replicated", 2)]
SGD = {"optimizer": {"name": "sgd", "lr": 0.05}}


@pytest.fixture(scope="module")
def source(pool: RankPool, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's file."""
    path = run_file(tmp_path_factory.mktemp("source"), data_root, "DeepFM", train={"epochs": 1})
    pool.run(2, train, path)
    return path


def initial(path: Path, folder: Path) -> Path:
    """What the ranks hold before the first step, saved."""
    from rechub_dist.data.run_file import load_run  # noqa: PLC0415
    from rechub_dist.distributed.runtime import runtime  # noqa: PLC0415
    from rechub_dist.training.trainer import Trainer  # noqa: PLC0415

    with runtime("cpu", 60) as rt:
        trainer = Trainer(load_run(path, [f"checkpoint.folder={folder}"]), rt)
        trainer.loop.saves.keep(trainer.position)
        trainer.checkpoints.check_last()
        trainer.report.close()
    return folder / "step-0000000000"


def weights(pool: RankPool, ranks: int, path: Path, folder: Path) -> dict[str, Tensor]:
    return read_checkpoint(pool.run(ranks, initial, path, folder)[0])


def schema(**rows: int) -> dict[str, Any]:
    """The data set's, with other numbers of rows for some tables."""
    tree: dict[str, Any] = yaml.safe_load(yaml.safe_dump(SCHEMA))
    for name, n in rows.items():
        (tree["tables"] if name in tree["tables"] else tree["features"])[name]["rows"] = n
    return tree


@pytest.mark.parametrize(("sharding", "ranks"), PLACEMENTS)
def test_tables_and_dense_parts_are_taken_by_name(
    pool: RankPool, data_root: Path, source: Path, tmp_path: Path, sharding: str, ranks: int
) -> None:
    embedding = {**SGD, "sharding": sharding}
    plain = run_file(
        tmp_path / "plain", data_root, "DeepFM", embedding=embedding, seed=8, data={"dataset": schema(user=150)}
    )
    section = {
        "from": str(output(source)),
        "tables": ["user", "*.linear"],
        "exclude": ["tags.linear"],
        "dense": ["*.weight"],
    }
    warm = run_file(
        tmp_path / "warm",
        data_root,
        "DeepFM",
        embedding=embedding,
        seed=8,
        data={"dataset": schema(user=150)},
        warm_start=section,
    )
    before = weights(pool, ranks, plain, tmp_path / "before")
    found = weights(pool, ranks, warm, tmp_path / "found")
    given = last_checkpoint(source)
    assert found.keys() == before.keys()
    for name, value in found.items():
        _, part, *_ = name.split("/")
        linear = name.startswith("tables/") and part.endswith(".linear") and part != "tags.linear"
        if name in ("tables/user/weight", "tables/user.linear/weight"):
            wanted = torch.cat([given[name], before[name][101:]])  # new rows are what they would have been
        elif linear or (name.startswith("dense/") and name.endswith(".weight")):
            wanted = given[name]
        else:
            wanted = before[name]
        assert torch.equal(value, wanted), name
    assert not torch.equal(found["tables/user/weight"][:101], before["tables/user/weight"][:101])


def test_renamed_parts_come_from_where_they_were(pool: RankPool, data_root: Path, source: Path, tmp_path: Path) -> None:
    buyer = {"kind": "sparse", "rows": 120, "column": "user", "init_std": 0.3}
    section = {
        "from": str(output(source) / "checkpoints"),
        "rename": {"user": "buyer"},
        "tables": ["buyer"],
        "dense": [],
    }
    model = {"features": ["buyer", "item", "age"]}
    path = run_file(tmp_path, data_root, "DeepFM", data={"features": {"buyer": buyer}}, model=model, warm_start=section)
    found = weights(pool, 2, path, tmp_path / "found")
    assert torch.equal(found["tables/buyer/weight"][:101], last_checkpoint(source)["tables/user/weight"])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"tables": ["usr"]}, r"warm_start.tables: 'usr' matches no table of this run: did you mean 'user'\?"),
        ({"dense": ["head.*"]}, r"warm_start.dense: 'head.\*' matches no dense parameter of this run: valid: .*mlp"),
        ({"exclude": ["shoppp"]}, r"warm_start.exclude: 'shoppp' matches nothing in this run"),
        ({"rename": {"usr": "item"}}, r"warm_start.rename: .* has no 'usr': did you mean 'user'\?"),
        ({"rename": {"user": "itme"}}, r"warm_start.rename: this run has no 'itme': did you mean 'item'\?"),
        ({"rename": {"user": "item"}, "tables": ["tags"]}, r"user -> item renames nothing that is loaded"),
        (
            {"rename": {"user": "tags"}},
            r"table 'tags' has 101 rows in the other run but 23 here; a table can grow but not shrink",
        ),
        ({"step": 4}, r"no checkpoint of step 4; available steps: \[9\]"),
        ({"from": "nowhere"}, r"nowhere.*: holds no checkpoint; name a run's output folder"),
    ],
)
def test_what_does_not_fit_is_refused(
    pool: RankPool, data_root: Path, source: Path, tmp_path: Path, section: dict[str, Any], message: str
) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", warm_start={"from": str(output(source)), **section})
    with pytest.raises(UserError, match=message):
        pool.run(2, train, path)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, r"warm_start: set another run \(from\) or files of vectors \(embeddings\)"),
        ({"embeddings": [], "tables": ["a"]}, r"set another run \(from\)"),
        ({"fron": "x"}, r"unknown key 'warm_start.fron': did you mean 'from'\?"),
        ({"from": "x", "rename": {"a.*": "b"}}, r"rename: a.\* -> b: both must end with \*, or neither"),
    ],
)
def test_contradictions_are_refused(data_root: Path, tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(run_file(tmp_path, data_root, "DeepFM", warm_start=section))


def test_another_width_is_refused(pool: RankPool, data_root: Path, source: Path, tmp_path: Path) -> None:
    section = {"from": str(output(source)), "dense": []}
    path = run_file(tmp_path, data_root, "DeepFM", model={"embedding_dim": 8}, warm_start=section)
    with pytest.raises(
        UserError, match=r"'user' is 101x6 in the other run but 101x8 here; make them equal, or add it to"
    ):
        pool.run(2, train, path)


def test_a_run_that_is_taken_up_ignores_it(pool: RankPool, data_root: Path, source: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, data_root, "DeepFM", train={"max_steps": 3}, warm_start={"from": str(output(source))})
    pool.run(2, train, path)
    first = last_checkpoint(path)
    again = run_file(tmp_path, data_root, "DeepFM", train={"max_steps": 3}, warm_start={"from": "gone"})
    pool.run(2, train, again)
    assert all(torch.equal(value, first[name]) for name, value in last_checkpoint(again).items())
    pool.run(1, train, output(path) / "config.yaml")  # its own record of `from` can be read again


def write_parquet(path: Path, ids: list[int], vectors: np.ndarray, group: int = 16) -> None:
    table = pa.table({"number": ids, "values": list(vectors)})
    pq.write_table(table, path, row_group_size=group)


@pytest.mark.parametrize(("sharding", "ranks"), PLACEMENTS)
def test_vectors_from_files(pool: RankPool, data_root: Path, tmp_path: Path, sharding: str, ranks: int) -> None:
    rng = np.random.default_rng(3)
    ids = rng.permutation(101)[:70]
    vectors = rng.normal(size=(70, 6)).astype(np.float32)
    write_parquet(tmp_path / "user.parquet", ids.tolist(), vectors)
    tags = rng.normal(size=(20, 6)).astype(np.float16)
    np.save(tmp_path / "tags.npy", tags)
    files = [
        {"table": "user", "file": str(tmp_path / "user.parquet"), "id": "number", "vector": "values"},
        {"table": "tags", "file": str(tmp_path / "tags.npy")},
    ]
    embedding = {**SGD, "sharding": sharding}
    plain = run_file(tmp_path / "plain", data_root, "DeepFM", embedding=embedding)
    warm = run_file(tmp_path / "warm", data_root, "DeepFM", embedding=embedding, warm_start={"embeddings": files})
    wanted = weights(pool, ranks, plain, tmp_path / "before")
    wanted["tables/user/weight"][torch.from_numpy(ids)] = torch.from_numpy(vectors)
    wanted["tables/tags/weight"][:20] = torch.from_numpy(tags).float()
    found = weights(pool, ranks, warm, tmp_path / "found")
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_bad_files_of_vectors_are_refused(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    good = rng.normal(size=(20, 6)).astype(np.float32)
    nan = good.copy()
    nan[7, 2] = np.nan
    cases: list[tuple[str, Any, str]] = [
        ("wide.npy", rng.normal(size=(20, 7)), "is 20 x 7, but the table is 101 x 6"),
        ("long.npy", rng.normal(size=(102, 6)), "is 102 x 6, but the table is 101 x 6"),
        (
            "whole.npy",
            np.zeros((20, 6), dtype=np.int64),
            r"has int64 \(20, 6\); floats \[rows, width\] in row order are needed",
        ),
        ("nan.npy", nan, "has non-finite vectors"),
        ("twice.parquet", ([1, 2, 3, *range(10, 26), 2], good), "id 2 is duplicated"),
        ("far.parquet", ([101, *range(19)], good), "id 101 is out of range: the table has 101"),
        ("short.parquet", (list(range(20)), good[:, :5]), "vectors that do not have the table's width, 6"),
    ]
    for name, content, message in cases:
        file = tmp_path / name
        if name.endswith(".npy"):
            np.save(file, content)
        else:
            write_parquet(file, *content)
        section = {"embeddings": [{"table": "user", "file": str(file), "id": "number", "vector": "values"}]}
        path = run_file(tmp_path / file.stem, data_root, "DeepFM", warm_start=section)
        with pytest.raises(UserError, match=message):
            pool.run(2, train, path)
    section = {"embeddings": [{"table": "user", "file": str(tmp_path / "far.parquet")}]}
    path = run_file(tmp_path / "columns", data_root, "DeepFM", warm_start=section)
    with pytest.raises(UserError, match="has no column 'id': valid: number, values"):
        pool.run(1, train, path)
    section["embeddings"][0]["table"] = "usr"
    path = run_file(tmp_path / "table", data_root, "DeepFM", warm_start=section)
    with pytest.raises(UserError, match=r"warm_start.embeddings: no table 'usr': did you mean 'user'\?"):
        pool.run(1, train, path)
