"""Ranks on hosts that are not alike train as one rank does, or are refused before the first step."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest

from rechub_dist.assembly import cluster
from rechub_dist.errors import UserError
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import slow
from rechub_tests.runs import losses, run_file, train


def train_on_hosts(path: Path, sizes: tuple[int, ...], memory_gb: tuple[float, ...] = ()) -> None:
    """Train as the rank of a host, given the hosts' numbers of ranks and, maybe, what memory they have."""
    rank = int(os.environ["RANK"])
    host = next(i for i in range(len(sizes)) if rank < sum(sizes[: i + 1]))
    before, memory = dict(os.environ), cluster.host_memory
    os.environ["LOCAL_WORLD_SIZE"] = str(sizes[host])
    os.environ["LOCAL_RANK"] = str(rank - sum(sizes[:host]))
    if memory_gb:
        cluster.host_memory = lambda: int(memory_gb[host] * 2**30)
    try:
        train(path)
    finally:
        os.environ.clear()
        os.environ.update(before)
        cluster.host_memory = memory


@pytest.fixture(scope="module")
def alone(pool: RankPool, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    path = run_file(tmp_path_factory.mktemp("alone"), data_root, "DIN")
    pool.run(1, train, path)
    return losses(path)


@pytest.mark.parametrize("sizes", [(2, 1), slow((1, 2)), slow((3, 1)), slow((2, 2))])
def test_unlike_numbers_of_ranks(
    pool: RankPool, data_root: Path, tmp_path: Path, alone: list[float], sizes: tuple[int, ...]
) -> None:
    path = run_file(tmp_path, data_root, "DIN")
    pool.run(sum(sizes), train_on_hosts, path, sizes)
    assert losses(path) == pytest.approx(alone, abs=1e-6)


@pytest.mark.slow
def test_ten_ranks_as_ray_packs_them(data_root: Path, tmp_path: Path, alone: list[float]) -> None:
    path, sizes = run_file(tmp_path, data_root, "DIN"), (3, 3, 3, 1)
    with closing(RankPool(sum(sizes))) as ranks:
        ranks.run(sum(sizes), train_on_hosts, path, sizes)
    assert losses(path) == pytest.approx(alone, abs=1e-6)


def test_unlike_memory(pool: RankPool, data_root: Path, tmp_path: Path, alone: list[float]) -> None:
    path = run_file(tmp_path, data_root, "DIN")
    pool.run(2, train_on_hosts, path, (1, 1), (64.0, 1.0))
    assert losses(path) == pytest.approx(alone, abs=1e-6)
    path = run_file(tmp_path / "small", data_root, "DIN")
    with pytest.raises(UserError, match=r"do not fit 2 ranks of 8e-06 GB"):
        pool.run(2, train_on_hosts, path, (1, 1), (64.0, 1e-5))


def test_a_table_over_the_ranks_of_a_host_needs_like_hosts(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    rule = {"tables": "user", "sharding": "table_row_wise"}
    path = run_file(tmp_path, data_root, "DeepFM", embedding={"rules": [rule]})
    with pytest.raises(UserError, match="table 'user': table_row_wise shards a table over the ranks of one host"):
        pool.run(3, train_on_hosts, path, (2, 1))


def train_own(paths: list[Path]) -> None:
    train(paths[int(os.environ["RANK"])])


def test_hosts_with_other_run_files_are_refused(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    paths = []
    for name, rate in (("a", 0.01), ("b", 0.02)):
        paths.append(run_file(tmp_path / name, data_root, "DeepFM", optimizer={"lr": rate}))
    with pytest.raises(UserError, match=r"rank 1 on host .* and rank 0 on host .* differ in run file"):
        pool.run(2, train_own, paths)
