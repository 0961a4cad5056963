"""What is planned for GPUs, which needs none: memory of devices and hosts, caches, and what does not fit."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from torch import nn
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding

from rechub_dist.assembly.cluster import unsharded_bytes
from rechub_dist.config import EmbeddingConfig, TableRule
from rechub_dist.embedded import Lookup
from rechub_dist.embedding.layout import Layout, make_layout
from rechub_dist.embedding.local import module_key
from rechub_dist.embedding.planning import Cluster, Kind, Planned, kind_of, make_plan
from rechub_dist.embedding.sharding import mark_optimizers
from rechub_dist.embedding.stage import EmbeddingStage
from rechub_dist.errors import UserError
from rechub_dist.features import SequenceFeature, SparseFeature, Table

GB = 1024**3
MB = 1024**2
BIG = Table("big", 4_000_000, dim=64)  # 0.95 GB of weights
SMALL = Table("small", 1000, dim=16)
ITEM = Table("item", 50_000, dim=16)
LOOKUPS = (
    Lookup("big", SparseFeature("big", BIG), BIG, "sum"),
    Lookup("small", SparseFeature("small", SMALL), SMALL, "sum"),
)
SEQUENCE = Lookup("item", SequenceFeature("item", ITEM, max_length=50), ITEM, None)
GPUS = Cluster(2, 2, "cuda", memory=16 * GB, host_memory=100 * GB, assumed="80% of its 20 GB")


class Step(nn.Module):
    """As much of a train step as is planned."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.stage = EmbeddingStage(layout, (), seed=0)
        self.model = nn.Linear(10, 5)


def layout_of(*lookups: Lookup, **config: Any) -> Layout:
    return make_layout(lookups or LOOKUPS, EmbeddingConfig(**config), device="cuda", world_size=2)


def planned(layout: Layout, cluster: Cluster = GPUS, kind: Kind = "sparse_dist", batch_size: int = 1000) -> Planned:
    step = Step(layout)
    mark_optimizers(step, layout)
    plan = make_plan(step, layout, cluster, batch_size, kind)
    assert plan is not None
    return plan


def of_table(plan: Planned, table: str) -> ParameterSharding:
    tables: dict[str, ParameterSharding] = {}
    for module in plan.sharding.plan.values():
        assert isinstance(module, EmbeddingModuleShardingPlan)
        tables.update(module)
    return tables[module_key(table)]


def told(plan: Planned) -> tuple[float, float]:
    """What a rank takes of its GPU and of its host, in GB."""
    found = re.fullmatch(r"tables: a rank uses (\S+) GB of the .*\)(?:, (\S+) GB of .*)?", plan.note)
    assert found is not None
    return float(found[1]), float(found[2] or 0)


def test_tables_in_host_memory_take_none_of_the_device() -> None:
    assert told(planned(layout_of()))[0] == pytest.approx(0.49, abs=0.02)  # half the rows of big, and one state a row
    device, host = told(planned(layout_of(kernel="fused_uvm")))
    assert device < 0.01
    assert host == pytest.approx(0.49, abs=0.02)


@pytest.mark.parametrize("factor", [0.05, 0.2, 0.9])
def test_the_cache_takes_its_share_of_the_device(factor: float) -> None:
    plan = planned(layout_of(kernel="fused_uvm_caching", cache_load_factor=factor))
    device, host = told(plan)
    assert host == pytest.approx(0.49, abs=0.02)
    assert device == pytest.approx(0.49 * factor, abs=0.05)  # and what tells which rows are cached
    params = of_table(plan, "big").cache_params
    assert params is not None
    assert params.load_factor == factor


def test_a_rule_sets_the_share_of_a_table() -> None:
    rules = (TableRule(tables="big", kernel="fused_uvm_caching", cache_load_factor=0.01),)
    plan = planned(layout_of(rules=rules))
    assert of_table(plan, "big").cache_params.load_factor == 0.01  # type: ignore[union-attr]
    assert of_table(plan, "small").cache_params is None
    rules = (*rules, TableRule(tables="small", cache_load_factor=0.5))
    with pytest.raises(UserError, match="table 'small', which has no cache; a cache needs kernel: fused_uvm_caching"):
        layout_of(rules=rules)


def test_kernels_are_told_of_the_prefetch_that_the_pipeline_does() -> None:
    found = layout_of(kernel="fused_uvm_caching")
    assert of_table(planned(found, kind="prefetch"), "big").cache_params.prefetch_pipeline is True  # type: ignore[union-attr]
    assert of_table(planned(found), "big").cache_params.prefetch_pipeline is None  # type: ignore[union-attr]


def test_batches_in_flight_have_room() -> None:
    found = layout_of(SEQUENCE, kernel="fused_uvm_caching")
    kinds: tuple[Kind, ...] = ("base", "sparse_dist", "prefetch")
    base, sparse_dist, prefetch = (told(planned(found, kind=kind, batch_size=100_000))[0] for kind in kinds)
    vectors, ids = 50_000 * 50 * 16 * 4 / GB, 50_000 * 50 * 8 / GB
    assert base > vectors + ids
    assert prefetch > sparse_dist + ids > base


@pytest.mark.parametrize(
    ("config", "cluster", "words"),
    [
        (
            {},
            {"memory": 300 * MB},
            [
                "embedding.memory_per_rank_gb: ",
                "2 ranks of 0.293 GB of GPU memory",
                "they need 0.9",
                "GB more than there is",
            ],
        ),
        (
            {"sharding": "table_wise"},
            {"memory": 700 * MB},
            ["2 ranks of 0.684 GB of GPU memory", "a shard of table 'big' needs 0.9", "kernel: fused_uvm_caching"],
        ),
        (
            {"kernel": "fused_uvm"},
            {"host_memory": 300 * MB},
            ["embedding.kernel: ", "2 ranks of 0.293 GB of host memory", "give the hosts more memory"],
        ),
        (
            {"kernel": "fused_uvm_caching"},
            {"memory": MB, "host_memory": 300 * MB},
            ["0.000977 GB of GPU memory and 0.293 GB of host memory", "of GPU memory, ", "of host memory, "],
        ),
    ],
)
def test_what_does_not_fit_is_told(config: dict[str, Any], cluster: dict[str, int], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        planned(layout_of(**config), replace(GPUS, **cluster))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_the_host_need_not_have_room_for_what_lies_on_gpus() -> None:
    assert planned(layout_of(), replace(GPUS, host_memory=MB)).note


def test_what_was_assumed_is_told() -> None:
    plan = planned(layout_of(kernel="fused_uvm"))
    assert re.fullmatch(
        r"tables: a rank uses \S+ GB of the 16 GB of GPU memory set aside for them \(80% of its 20 GB\), "
        r"\S+ GB of the 100 GB of host memory set aside",
        plan.note,
    )
    assert planned(layout_of(), replace(GPUS, device="cpu")).note == ""


def test_what_each_rank_holds_whole() -> None:
    assert unsharded_bytes(Step(layout_of())) == (10 * 5 + 5) * 4
    assert unsharded_bytes(Step(layout_of(replicate_below=1001))) == (10 * 5 + 5 + 1000 * 16) * 4


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ({}, ("sparse_dist", "sparse_dist", "base")),
        ({"kernel": "fused_uvm"}, ("sparse_dist", "sparse_dist", "base")),
        ({"kernel": "fused_uvm_caching"}, ("prefetch", "sparse_dist", "base")),
        ({"kernel": "fused_uvm_caching", "sharding": "replicated"}, ("base", "base", "base")),
        ({"rules": (TableRule(tables="item", kernel="fused_uvm_caching"),)}, ("prefetch", "sparse_dist", "base")),
        # a collection of single vectors of which one table alone is cached
        ({"rules": (TableRule(tables="other", kernel="fused_uvm_caching"),)}, ("sparse_dist", "sparse_dist", "base")),
    ],
)
def test_which_pipeline(config: dict[str, Any], kinds: tuple[Kind, ...]) -> None:
    lookups = [*LOOKUPS, SEQUENCE]
    if any(rule.tables == "other" for rule in config.get("rules", ())):
        other = Table("other", 500, dim=16)
        lookups.append(Lookup("other", SequenceFeature("other", other, max_length=3), other, None))
    found = layout_of(*lookups, **config)
    settings: tuple[Any, ...] = ("auto", "sparse_dist", "base")
    assert tuple(kind_of(setting, found, "cuda", skips=False) for setting in settings) == kinds
    assert kind_of("auto", found, "cuda", skips=True) == kinds[1]  # a batch left out would stay locked
    assert kind_of("auto", found, "cpu", skips=False) == "base"
