"""`rechub-dist plan`: where tables would lie, and what would make them fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rechub_dist.assembly.estimate import estimate
from rechub_dist.data.run_file import load_run
from rechub_dist.embedding.planning import Cluster

GB = 1 << 30


def write_run(folder: Path, rows: int, **embedding: object) -> Path:
    names = [f"f{i}" for i in range(4)]
    tree = {
        "output_dir": str(folder / "out"),
        "data": {
            "root": "data",
            "dataset": {"features": {n: {"kind": "sparse", "rows": rows} for n in names}, "labels": {"click": {}}},
        },
        "model": {"name": "DCNv2", "features": names, "cross_num": 2, "hidden_units": [8]},
        "embedding": {"dim": 64, **embedding},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "rechub_dist", "plan", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_memory_adds_up(tmp_path: Path) -> None:
    rules = [{"tables": "f0", "sharding": "row_wise"}, {"tables": "f1", "sharding": "replicated"}]
    config = load_run(write_run(tmp_path, 1_000_000, rules=rules, row_wise_above=2_000_000))
    found = estimate(config, Cluster(4, 4, "cpu", 16 * GB))
    tables = {table.name: table for table in found.tables}
    assert {table.weight_bytes for table in found.tables} == {1_000_000 * 64 * 4}
    assert [(s.rank, s.rows, s.columns) for s in tables["f0"].shards] == [(r, 250_000, 64) for r in range(4)]
    assert [s.rank for s in tables["f1"].shards] == [0, 1, 2, 3]
    assert tables["f1"].sharding == "replicated"
    assert len(tables["f2"].shards) == len(tables["f3"].shards) == 1
    assert tables["f2"].shards[0].rank != tables["f3"].shards[0].rank
    ranks = found.of_ranks("host_bytes")
    assert sum(ranks) >= sum(table.weight_bytes for table in found.tables) + 3 * tables["f1"].weight_bytes
    assert not any(found.of_ranks("device_bytes"))


def test_fp16_halves_the_weights_alone(tmp_path: Path) -> None:
    def of(**embedding: object) -> list[float]:
        config = load_run(write_run(tmp_path, 1_000_000, dim=64, **embedding))
        return estimate(config, Cluster(2, 2, "cpu", 16 * GB)).of_ranks("host_bytes")

    adagrad = {"optimizer": {"name": "adagrad"}, "sharding": "row_wise"}
    for optimizer, states in (({"sharding": "row_wise"}, 0), (adagrad, 1)):
        for single, half in zip(of(**optimizer), of(**optimizer, precision="fp16"), strict=True):
            weights = 4 * 500_000 * 64 * 4
            assert single == pytest.approx(weights * (1 + states), rel=0.05)
            assert half == pytest.approx(weights * (0.5 + states), rel=0.05)


@pytest.mark.parametrize(
    ("rule", "times"),
    [({"optimizer": {"name": "adam"}}, 4), ({"optimizer": {"name": "rowwise_adagrad"}}, 2), ({"frozen": True}, 1)],
)
def test_a_replicated_table_has_a_gradient_and_states_unless_it_is_frozen(
    tmp_path: Path, rule: dict[str, object], times: int
) -> None:
    config = load_run(write_run(tmp_path, 1000, rules=[{"tables": "f1", "sharding": "replicated", **rule}]))
    [table] = [one for one in estimate(config, Cluster(2, 2, "cpu", 16 * GB)).tables if one.name == "f1"]
    assert [shard.host_bytes for shard in table.shards] == [times * table.weight_bytes] * 2


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    path, saved = str(write_run(tmp_path, 1_000_000)), str(tmp_path / "plan.json")
    done = plan(path, "--world-size", "4", "--device", "cuda", "--memory", "80GB", "--save", saved)
    assert done.returncode == 0, done.stderr
    assert "4 tables, 977 MB of weights, on 4 rank(s) of 1 host(s), cuda" in done.stdout.replace("\n", " ")
    assert done.stdout.count("█") >= 4
    tree = json.loads(Path(saved).read_text())
    assert set(tree["tables"]) == {"f0", "f1", "f2", "f3"}
    again = plan(path, "--world-size", "4", "--device", "cuda", "--memory", "80GB", "--against", saved)
    assert f"the same placement as {saved}" in again.stdout
    other = plan(path, "--world-size", "4", "--set", "embedding.row_wise_above=2000000", "--against", saved)
    assert "f0: sharding row_wise -> table_wise" in other.stdout
    assert "f0: 4 shard(s) on ranks 0-3 -> 1 on ranks" in other.stdout


@pytest.mark.slow
def test_what_would_fit_is_told(tmp_path: Path) -> None:
    path = str(write_run(tmp_path, 100_000_000))
    done = plan(path, "--world-size", "2", "--device", "cuda", "--memory", "40GB", "--host-memory", "500GB")
    assert (done.returncode, done.stdout) == (2, "")
    assert "do not fit 2 ranks" in done.stderr
    fits = "--set embedding.kernel=fused_uvm_caching; --world-size 4; --set embedding.precision=fp16"
    assert f"Would fit: {fits}" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--world-size", "6", "--local-world-size", "4"), "--world-size 6: is no multiple of the 4 ranks of a host"),
        (
            ("--set", "embedding.communication.forward=bf16"),
            "embedding.communication.forward: bf16 cannot be exchanged on CPU; use fp16 or fp32",
        ),
        (
            ("--set", "embedding.precision=bf16"),
            "embedding.precision: no kernel trains tables in bf16; use fp16 or fp32",
        ),
        (
            ("--set", "embedding.communication.backward=int8"),
            "embedding.communication.backward: TorchRec's codec for int8 fails under row_wise",
        ),
        (("--device", "tpu"), "--device tpu: must be cpu or cuda"),
        (("--memory", "lots"), "--memory is 'lots'"),
        (("--against", "none.json"), "--against none.json: no saved plan"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = plan(str(write_run(tmp_path, 1000)), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
