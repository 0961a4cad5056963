"""Which rank holds which shard: TorchRec's planner, given the layout's constraints and the available memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    PlannerErrorType,
    Shard,
    ShardingOption,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import CacheParams, ModuleSharder, PipelineType, ShardingPlan, ShardingType
from torchrec.modules.embedding_configs import DataType

from rechub_dist.config import CommunicationConfig
from rechub_dist.data.spec import WEIGHTED
from rechub_dist.embedding.layout import CACHED, POOLED, REPLICATED, Layout, PlacedTable
from rechub_dist.embedding.local import module_key
from rechub_dist.embedding.pinned import Pinned
from rechub_dist.errors import UserError
from rechub_dist.features import NegativeFeature, SequenceFeature, TimeGapFeature

_SHARE = 0.8  # of memory, for sharded tables
Kind = Literal["base", "sparse_dist", "prefetch"]
_SHARDING_TYPES = [
    ShardingType.TABLE_WISE.value,
    ShardingType.ROW_WISE.value,
    ShardingType.COLUMN_WISE.value,
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
]


@dataclass(frozen=True)
class Cluster:
    """The ranks that a plan is made for; equal on all of them.

    Attributes:
        local_world_size: ranks per host; None where hosts differ in it.
        memory: bytes per rank for sharded tables: of its GPU, or of host memory without one.
        host_memory: with GPUs, bytes of host memory per rank for tables that are kept there.
        assumed: how `memory` was determined, in words.
    """

    world_size: int
    local_world_size: int | None
    device: Literal["cpu", "cuda"]
    memory: int
    host_memory: int = 0
    assumed: str = ""


def memory_for_tables(total: int, ranks: int = 1) -> int:
    """Bytes per rank for sharded tables, where `ranks` ranks share `total` bytes.

    A fifth is left for everything else: activations, batches in flight, libraries.
    """
    return int(_SHARE * total / ranks)


def kind_of(setting: Literal["auto", "base", "sparse_dist"], layout: Layout, device: str, *, skips: bool) -> Kind:
    """The pipeline that `distributed.pipeline` resolves to, the same on all ranks; kernels are built for it.

    A model without sharded tables has no id exchange to overlap: `base`.

    Args:
        skips: whether steps may be skipped (`train.on_non_finite: skip`).
    """
    sharded = [placed for placed in layout.tables.values() if placed.collection != REPLICATED]
    if not sharded or setting == "base" or (setting == "auto" and device != "cuda"):
        return "base"
    cached = [placed for placed in sharded if placed.kernel == CACHED]
    # TorchRec prefetches for all tables of an unpooled collection, or for none.
    unpooled = {placed.collection for placed in cached} - {POOLED, WEIGHTED}
    mixed = any(placed.collection in unpooled and placed.kernel != CACHED for placed in sharded)
    return "prefetch" if setting == "auto" and cached and not mixed and not skips else "sparse_dist"


class _PooledSharder(EmbeddingBagCollectionSharder):
    # On CPU TorchRec offers fewer sharding types than its kernels support; the layout chooses among these.
    def sharding_types(self, compute_device_type: str) -> list[str]:  # noqa: ARG002
        return _SHARDING_TYPES


class _UnpooledSharder(EmbeddingCollectionSharder):
    def sharding_types(self, compute_device_type: str) -> list[str]:  # noqa: ARG002
        return _SHARDING_TYPES[:3]


# Numbers of an optimizer's state for each weight, as TorchRec counts them; a row-wise one is next to nothing.
_STATES = {"adagrad": 1, "lazy_adam": 2, "partial_rowwise_adam": 1}


class _Enumerator(EmbeddingEnumerator):
    """Counts optimizer states in fp32 beside weights in fp16; TorchRec takes them for as small as the weights."""

    halves: dict[str, PlacedTable]

    def populate_estimates(self, sharding_options: list[ShardingOption]) -> None:
        super().populate_estimates(sharding_options)
        for option in sharding_options:
            if (placed := self.halves.get(option.name)) is None:
                continue
            on_device = self._compute_device == "cuda" and placed.kernel == "fused"
            for shard in option.shards:
                assert shard.storage is not None
                more = shard.size[0] * shard.size[1] * _STATES.get(placed.optimizer.name, 0) * 2
                if on_device:
                    shard.storage.hbm += more
                else:
                    shard.storage.ddr += more


# How many batches' ids and vectors are in GPU memory at once.
_IN_FLIGHT = {
    "base": PipelineType.NONE,
    "sparse_dist": PipelineType.TRAIN_SPARSE_DIST,
    "prefetch": PipelineType.TRAIN_PREFETCH_SPARSE_DIST,
}
_SHORTAGES = (PlannerErrorType.INSUFFICIENT_STORAGE, PlannerErrorType.STRICT_CONSTRAINTS, PlannerErrorType.PARTITION)
_GB = 1024**3


@dataclass(frozen=True)
class Planned:
    """A sharding plan, which the main rank sends to the others, and a note about it for the user, if any.

    `shards` are those of each table by its name in TorchRec, with their memory and cost.
    """

    sharding: ShardingPlan
    note: str
    shards: dict[str, tuple[Shard, ...]]


def make_plan(
    train_module: nn.Module,
    layout: Layout,
    cluster: Cluster,
    batch_size: int,
    kind: Kind,
    pinned: Path | None = None,
) -> Planned | None:
    """The sharding plan for global batches of `batch_size` rows; None where nothing is sharded. Not collective.

    The optimizers must be marked (`mark_optimizers`), so that the planner counts their states. On GPUs it also counts
    the batches that the pipeline `kind` has in flight. Ranks are those of the saved plan `pinned`, if there is one.

    Raises:
        UserError: the tables do not fit, one is to be sharded within hosts that differ in their number of ranks, or the
            saved plan is of other tables or ranks.
    """
    placed = sharded_tables(layout)
    if not placed:
        return None
    for table in placed.values():
        if cluster.local_world_size is None and table.sharding in ("table_row_wise", "table_column_wise"):
            raise UserError(
                f"table {table.table.name!r}: {table.sharding} shards a table over the ranks of one host, and the "
                f"hosts of this run have different numbers of ranks; give each the same, or use row_wise or column_wise"
            )
    cuda = cluster.device == "cuda"
    topology = TopologyFactory.create_topology(
        TrainerConfig(
            world_size=cluster.world_size,
            local_world_size=cluster.local_world_size or 1,
            hbm_cap_bytes=cluster.memory if cuda else 0,
            ddr_cap_bytes=cluster.host_memory if cuda else cluster.memory,
        ),
        kernel_config=KernelConfig(compute_device=cluster.device),
    )
    batch_size = max(1, batch_size // cluster.world_size)
    constraints = {name: _constraint(table, cluster, layout, kind) for name, table in placed.items()}
    enumerator = _enumerator(topology, constraints, batch_size, kind)
    enumerator.halves = {name: table for name, table in placed.items() if table.precision == "fp16"}
    chosen: list[ShardingOption] = []

    def remember(plan: list[ShardingOption]) -> list[ShardingOption]:
        chosen.extend(plan)
        return plan

    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        enumerator=enumerator,
        constraints=constraints,
        partitioner=None if pinned is None else Pinned(pinned, placed, cluster.world_size),
        storage_reservation=FixedPercentageStorageReservation(0.0),  # `cluster.memory` is for tables alone
        callbacks=[remember],
        debug=False,
    )
    try:
        plan = planner.plan(train_module, sharders())
    except PlannerError as error:
        if error.error_type not in _SHORTAGES:
            raise
        raise UserError(_shortage(enumerator.enumerate(train_module, sharders()), cluster, placed)) from error
    shards = {option.name: tuple(option.shards) for option in chosen}  # not the options: these hold the modules
    return Planned(plan, _note(chosen, cluster) if cuda else "", shards)


def sharded_tables(layout: Layout) -> dict[str, PlacedTable]:
    """The sharded tables by their names in TorchRec (`module_key`)."""
    return {module_key(p.table.name): p for p in layout.tables.values() if p.collection != REPLICATED}


def sharders(
    communication: CommunicationConfig | None = None, device: torch.device | None = None
) -> list[ModuleSharder[nn.Module]]:
    """The sharders of both kinds of collections, whose exchange on `device` has the precision of `communication`."""
    codecs = None
    if communication is not None:
        precisions = QCommsConfig(
            forward_precision=CommType(communication.forward),
            backward_precision=CommType(communication.backward),
            backward_loss_scale=communication.gradient_scale if communication.backward == "fp16" else None,
        )
        codecs = get_qcomm_codecs_registry(precisions, device=device)  # None for fp32
    return [_PooledSharder(qcomm_codecs_registry=codecs), _UnpooledSharder(qcomm_codecs_registry=codecs)]


def _constraint(placed: PlacedTable, cluster: Cluster, layout: Layout, kind: Kind) -> ParameterConstraints:
    constraint = ParameterConstraints(sharding_types=[placed.sharding], compute_kernels=[placed.kernel])
    if placed.precision == "fp16":
        constraint.output_dtype = DataType.FP32  # otherwise vectors are taken for as small as weights
    if placed.sharding in ("column_wise", "table_column_wise"):
        # As many column shards as ranks, where multiples of 4 allow it.
        width = placed.table.stored_dim
        shards = max(s for s in range(1, cluster.world_size + 1) if width % (4 * s) == 0)
        constraint.min_partition = width // shards
    if placed.kernel == CACHED:
        constraint.cache_params = CacheParams(
            load_factor=placed.cache_load_factor, prefetch_pipeline=True if kind == "prefetch" else None
        )
    if cluster.device == "cuda":  # on CPU, plans stay those of earlier versions
        constraint.pooling_factors = [ids_of_a_row(layout, name) for name in placed.features]
    return constraint


def ids_of_a_row(layout: Layout, name: str) -> float:
    """Upper bound on the ids of a row, where known (else 1): batches in flight need room for as many."""
    feature = layout.features[name]
    if isinstance(feature, SequenceFeature | TimeGapFeature):
        return float(feature.max_length)
    if isinstance(feature, NegativeFeature):
        return feature.count * ids_of_a_row(layout, feature.like)
    return 1.0


def _enumerator(
    topology: Topology, constraints: dict[str, ParameterConstraints], batch_size: int, kind: Kind
) -> _Enumerator:
    estimators = None
    if topology.compute_device == "cuda":
        storage = EmbeddingStorageEstimator(
            topology, constraints, pipeline_type=_IN_FLIGHT[kind], run_embedding_at_peak_memory=True
        )
        estimators = [EmbeddingPerfEstimator(topology, constraints), storage]
    return _Enumerator(topology, batch_size, constraints, estimator=estimators)


def _note(plan: Sequence[ShardingOption], cluster: Cluster) -> str:
    """The memory that a plan for GPUs uses, and what it has assumed."""
    device, host = [0] * cluster.world_size, [0] * cluster.world_size
    for option in plan:
        for shard in option.shards:
            device[shard.rank] += shard.storage.hbm
            host[shard.rank] += shard.storage.ddr
    text = f"tables: a rank uses {_gb(max(device))} of the {_gb(cluster.memory)} of GPU memory set aside for them"
    text += f" ({cluster.assumed})"
    if any(host):
        text += f", {_gb(max(host))} of the {_gb(cluster.host_memory)} of host memory set aside"
    return text


def _shortage(options: Sequence[ShardingOption], cluster: Cluster, placed: dict[str, PlacedTable]) -> str:
    """The message about which memory is too small for the tables, and by how much."""
    weights = sum(p.weight_bytes for p in placed.values())
    cuda, ranks = cluster.device == "cuda", cluster.world_size
    there = {"hbm": cluster.memory, "ddr": cluster.host_memory} if cuda else {"ddr": cluster.memory}
    words = {"hbm": "of GPU memory", "ddr": "of host memory" if cuda else "of memory"}
    short = {}
    for tier, room in there.items():
        shards = [(getattr(shard.storage, tier), option.name) for option in options for shard in option.shards]
        total, (largest, name) = sum(size for size, _ in shards), max(shards)
        if total > ranks * room:
            short[tier] = f"they need {_gb(total)} {words[tier]}, {_gb(total - ranks * room)} more than there is"
        elif largest > room:
            needs = f"needs {_gb(largest)} {words[tier]}, {_gb(largest - room)} more than there is"
            short[tier] = f"a shard of table {placed[name].table.name!r} {needs}"
    sizes = " and ".join(f"{_gb(there[tier])} {words[tier] if cuda else ''}".strip() for tier in short or there)
    why = "; ".join(short.values()) or "in total they would, but no placement was found"
    host = list(short) == ["ddr"] and cuda
    fixes = "give the hosts more memory, or add some" if host else "give more memory or ranks"
    fixes += ", shard the largest tables row_wise"
    if cuda and not host:
        fixes += f", keep them in host memory (kernel: {CACHED}; a smaller cache_load_factor)"
    return (
        f"embedding.{'kernel' if host else 'memory_per_rank_gb'}: the sharded tables ({_gb(weights)} of weights, with "
        f"optimizer states and buffers more) do not fit {ranks} ranks of {sizes} under the given shardings: {why}; "
        f"{fixes}, or lower embedding.dim or embedding.precision"
    )


def _gb(size: float) -> str:
    return f"{size / _GB:.3g} GB"
