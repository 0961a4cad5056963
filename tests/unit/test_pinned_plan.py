"""`embedding.plan`: shards lie where a saved plan has them, and a plan of another run is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rechub_dist.assembly.estimate import Estimate, estimate, estimate_of
from rechub_dist.assembly.parts import build
from rechub_dist.assembly.sharded import Agreed, planned
from rechub_dist.config import RunConfig
from rechub_dist.data.run_file import load_run
from rechub_dist.embedding.planning import Cluster
from rechub_dist.embedding.sharding import mark_optimizers
from rechub_dist.errors import UserError

GB = 1 << 30
TWO = Cluster(2, 2, "cpu", GB)
Tree = dict[str, Any]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    names = [f"f{i}" for i in range(4)]
    rules = [{"tables": "f0", "sharding": "row_wise"}, {"tables": "f1", "sharding": "replicated"}]
    rules.append({"tables": "f2", "sharding": "column_wise", "optimizer": {"name": "adagrad"}})  # type: ignore[dict-item]
    tree = {
        "output_dir": str(tmp_path / "out"),
        "data": {
            "root": "data",
            "dataset": {"features": {n: {"kind": "sparse", "rows": 1000} for n in names}, "labels": {"click": {}}},
        },
        "model": {"name": "DCNv2", "features": names, "cross_num": 2, "hidden_units": [8]},
        "embedding": {"dim": 64, "rules": rules},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_run(path)


def by_plan(config: RunConfig, tree: object, folder: Path, cluster: Cluster = TWO) -> Estimate:
    """Where tables lie when this plan is named."""
    path = folder / "plan.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    parts = build(config, device="cpu", world_size=cluster.world_size)
    mark_optimizers(parts.train_module, parts.layout)
    return estimate_of(parts.layout, Agreed(cluster, planned(parts, cluster, "base", path)))


def test_shards_lie_where_the_plan_has_them(config: RunConfig, tmp_path: Path) -> None:
    tree = estimate(config, TWO).as_tree()
    assert by_plan(config, tree, tmp_path).as_tree() == tree
    for rank in (0, 1):
        tree["tables"]["f3"]["shards"][0][0] = rank
        assert by_plan(config, tree, tmp_path).as_tree() == tree
    columns = tree["tables"]["f2"]["shards"]
    assert len(columns) == 2
    columns[0][0], columns[1][0] = 1, 0
    assert by_plan(config, tree, tmp_path).as_tree() == tree


def test_the_line_about_it(config: RunConfig) -> None:
    found = estimate(config, TWO).summary()
    said = r"4 tables \(1 row_wise, 1 replicated, 1 column_wise, 1 table_wise\) on 2 rank\(s\), \d+ to \d+ MiB a rank; "
    assert re.fullmatch(rf"{said}the busiest has 1\.\d\d times the mean load", found)


def changed(key: str, value: object) -> Callable[[Tree], object]:
    """A plan in which table f3 has another value."""

    def change(tree: Tree) -> object:
        tree["tables"]["f3"][key] = value
        return tree

    return change


MAKE = "make it anew (rechub-dist plan RUN.yaml --save FILE), or leave it out"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: "no JSON", "no saved plan (JSONDecodeError: "),
        (lambda _: [], "no saved plan (TypeError: "),
        (lambda tree: tree | {"tables": {"f3": 1}}, "no saved plan (TypeError: "),
        (lambda tree: tree | {"world_size": 4}, f"is for 4 rank(s), and the run has 2; {MAKE}"),
        (lambda tree: tree["tables"].pop("f3") and tree, f"has no table 'f3'; {MAKE}"),
        (lambda tree: tree["tables"].update(x=tree["tables"]["f3"]) or tree, "has a table 'x' that the run has not; "),
        (changed("rows", 2000), f"table 'f3' has rows 2000, and in this run 1000; {MAKE}"),
        (changed("dim", 8), "table 'f3' has dim 8, and in this run 64; "),
        (changed("sharding", "row_wise"), "table 'f3' has sharding 'row_wise', and in this run 'table_wise'; "),
        (changed("kernel", "fused_uvm"), "table 'f3' has kernel 'fused_uvm', and in this run 'fused'; "),
        (changed("shards", [[0, 500, 64, 0, 0]]), "table 'f3' has shards of other sizes than in this run; "),
        (changed("shards", [[2, 1000, 64, 0, 0]]), "has a rank that the run has not; "),
        (changed("shards", [[-1, 1000, 64, 0, 0]]), "has a rank that the run has not; "),
    ],
)
def test_a_plan_of_another_run_is_refused(
    config: RunConfig, tmp_path: Path, change: Callable[[Tree], object], message: str
) -> None:
    tree = change(estimate(config, TWO).as_tree())
    with pytest.raises(UserError) as refused:
        by_plan(config, tree, tmp_path)
    assert str(refused.value).startswith(f"embedding.plan: {tmp_path / 'plan.json'}: ")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_plan_that_does_not_fit_is_refused(config: RunConfig, tmp_path: Path) -> None:
    tree = estimate(config, TWO).as_tree()
    room = max(estimate(config, TWO).of_ranks("host_bytes"))
    for table in tree["tables"].values():
        if table["sharding"] == "table_wise":
            table["shards"][0][0] = 0
    small = Cluster(2, 2, "cpu", int(room * 0.55))
    with pytest.raises(UserError, match="do not fit 2 ranks"):
        by_plan(config, tree, tmp_path, small)
    with pytest.raises(UserError, match="no saved plan"):
        planned(build(config, device="cpu", world_size=2), TWO, "base", tmp_path / "none.json")
