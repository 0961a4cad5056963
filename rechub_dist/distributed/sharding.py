"""A training step's collections -> sharded over ranks: the planner fitted with the layout's constraints, then DMP."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan, ShardingType

from rechub_dist.build import Parts
from rechub_dist.distributed.batchnorm import globalize
from rechub_dist.distributed.cluster import Cluster, agreed_cluster
from rechub_dist.distributed.optim import fused_optimizer, kernels
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.embedding.init import init_table
from rechub_dist.embedding.layout import REPLICATED, Layout, PlacedTable
from rechub_dist.embedding.local import module_key
from rechub_dist.errors import UserError

_SHARDING_TYPES = [
    ShardingType.TABLE_WISE.value,
    ShardingType.ROW_WISE.value,
    ShardingType.COLUMN_WISE.value,
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
]


class _PooledSharder(EmbeddingBagCollectionSharder):
    # On CPU torchrec offers fewer sharding types than its kernels support; the layout chooses among these.
    def sharding_types(self, compute_device_type: str) -> list[str]:  # noqa: ARG002
        return _SHARDING_TYPES


class _UnpooledSharder(EmbeddingCollectionSharder):
    def sharding_types(self, compute_device_type: str) -> list[str]:  # noqa: ARG002
        return _SHARDING_TYPES[:3]


def mark_optimizers(step: nn.Module, layout: Layout) -> None:
    """Mark the collections' parameters with their fused optimizers, for their kernels and for the planner."""
    placed = _sharded(layout)
    for name, parameter in step.named_parameters():
        table = placed.get(name.rsplit(".", 2)[-2])
        if table is not None and name.startswith(("stage.pooled.", "stage.unpooled.")):
            cls, arguments = fused_optimizer(table.optimizer)
            _apply_optimizer_in_backward(cls, [parameter], arguments)


def make_plan(step: nn.Module, layout: Layout, cluster: Cluster, batch_size: int) -> ShardingPlan | None:
    """Which rank holds which shard, from what all ranks have agreed on; None where nothing is sharded.

    The optimizers are marked already, so that the planner counts their states.

    Raises:
        UserError: the tables do not fit, or one is to be sharded over the ranks of a host where hosts are unlike.
    """
    placed = _sharded(layout)
    if not placed:
        return None
    for table in placed.values():
        if cluster.local_world_size is None and table.sharding in ("table_row_wise", "table_column_wise"):
            raise UserError(
                f"table {table.table.name!r}: {table.sharding} shards a table over the ranks of one host, and the "
                f"hosts of this run have unlike numbers of ranks; give each the same, or use row_wise or column_wise"
            )
    planner = EmbeddingShardingPlanner(
        topology=TopologyFactory.create_topology(
            TrainerConfig(
                world_size=cluster.world_size,
                local_world_size=cluster.local_world_size or 1,
                hbm_cap_bytes=cluster.memory if cluster.device == "cuda" else 0,
                ddr_cap_bytes=None if cluster.device == "cuda" else cluster.memory,
            ),
            kernel_config=KernelConfig(compute_device=cluster.device),
        ),
        batch_size=max(1, batch_size // cluster.world_size),
        constraints={name: _constraint(table, cluster.world_size) for name, table in placed.items()},
        storage_reservation=FixedPercentageStorageReservation(0.0),
        debug=False,
    )
    try:
        return planner.plan(step, _sharders())
    except PlannerError as error:
        rows = sum(p.table.rows * p.table.stored_dim for p in placed.values()) * 4 / 1024**3
        raise UserError(
            f"embedding.memory_per_rank_gb: the sharded tables ({rows:.3g} GB of weights, with optimizer states and "
            f"buffers more) do not fit {cluster.world_size} ranks of {cluster.memory / 1024**3:.3g} GB under the given "
            f"shardings; give more memory or ranks, shard the largest tables row_wise, or use a smaller embedding.dim"
        ) from error


def shard(
    step: nn.Module,
    layout: Layout,
    plan: ShardingPlan | None,
    group: dist.ProcessGroup,
    device: torch.device,
    seed: int,
    bucket_mb: int,
) -> DistributedModelParallel:
    """Shard the step's collections, put DDP around the rest, and fill the tables with their initial weights."""
    module = DistributedModelParallel(
        step,
        env=ShardingEnv.from_process_group(group),
        device=device,
        plan=plan or ShardingPlan({}),
        sharders=_sharders(),
        data_parallel_wrapper=DefaultDataParallelWrapper(bucket_cap_mb=bucket_mb, static_graph=False),
    )
    for name, shards in table_shards(module, layout).items():
        for part in shards:
            row, column = part.metadata.shard_offsets
            init_table(part.tensor, layout.tables[name].table, seed, row, column)
    return module


def table_shards(module: DistributedModelParallel, layout: Layout) -> dict[str, list[Shard]]:
    """The parts of the sharded tables' weights that this rank holds, by canonical name; live tensors."""
    return {name: weights.local_shards() for name, weights in sharded_weights(module, layout).items()}


def sharded_weights(module: DistributedModelParallel, layout: Layout) -> dict[str, ShardedTensor]:
    """The sharded tables' weights at their stored width, by canonical name.

    They may be read and written, until the next lookup: what a kernel caches of them is written back and forgotten.
    """
    stage = module.module.stage
    state: dict[str, Any] = {}
    for collection in (*stage.pooled.values(), *stage.unpooled.values()):
        state.update({key.rsplit(".", 2)[-2]: value for key, value in collection.state_dict().items()})  # flushes
    for kernel in kernels(stage):
        kernel.reset_cache_states()
    return {name: state[module_key(name)] for name, placed in layout.tables.items() if placed.collection != REPLICATED}


def _sharded(layout: Layout) -> dict[str, PlacedTable]:
    """The sharded tables by their names in TorchRec."""
    return {module_key(p.table.name): p for p in layout.tables.values() if p.collection != REPLICATED}


def _sharders() -> list[ModuleSharder[nn.Module]]:
    return [_PooledSharder(), _UnpooledSharder()]


def _constraint(placed: PlacedTable, world_size: int) -> ParameterConstraints:
    constraint = ParameterConstraints(sharding_types=[placed.sharding], compute_kernels=[placed.kernel])
    if placed.sharding in ("column_wise", "table_column_wise"):
        # As many column shards as ranks, where multiples of 4 allow it.
        width = placed.table.stored_dim
        shards = max(s for s in range(1, world_size + 1) if width % (4 * s) == 0)
        constraint.min_partition = width // shards
    return constraint


def shard_step(parts: Parts, rt: Runtime) -> DistributedModelParallel:
    """Plan and shard a run's tables, make batch normalisation global, and put DDP around the rest. Collective.

    The plan is the main rank's: one that each rank made for itself would be another on another host.

    Raises:
        UserError: the tables do not fit, or the ranks are not of one run.
    """
    config = parts.config
    cluster = agreed_cluster(parts, rt)
    mark_optimizers(parts.step, parts.layout)
    plan = rt.from_main(lambda: make_plan(parts.step, parts.layout, cluster, config.data.batch_size))
    globalize(parts.step.model)
    return shard(parts.step, parts.layout, plan, rt.group, rt.device, config.seed, config.distributed.bucket_mb)
