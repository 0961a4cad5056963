"""Shards the collections of a train module over ranks as planned (`planning`), and gives access to their weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingPlan

from rechub_dist.config import CommunicationConfig
from rechub_dist.embedding.init import Part, clear_padding, init_tables
from rechub_dist.embedding.layout import REPLICATED, Layout
from rechub_dist.embedding.local import module_key
from rechub_dist.embedding.optim import fused_optimizer, kernels
from rechub_dist.embedding.planning import sharded_tables, sharders

_SHARDED = ("stage.pooled.", "stage.unpooled.")


def mark_optimizers(train_module: nn.Module, layout: Layout) -> None:
    """Mark the collections' parameters with their fused optimizers, which kernels and planner read."""
    placed = sharded_tables(layout)
    for name, parameter in train_module.named_parameters():
        table = placed.get(name.rsplit(".", 2)[-2])
        if table is not None and name.startswith(_SHARDED):
            cls, arguments = fused_optimizer(table.optimizer)
            _apply_optimizer_in_backward(cls, [parameter], arguments)


def shard(
    train_module: Any,
    layout: Layout,
    plan: ShardingPlan | None,
    group: dist.ProcessGroup,
    device: torch.device,
    bucket_mb: int,
    communication: CommunicationConfig | None = None,
) -> DistributedModelParallel:
    """Shard the train module's collections and wrap the rest in DDP. Collective.

    The tables' weights are uninitialised, except for zeros in storage padding. `bucket_mb` is DDP's, in MiB.
    `communication` is the precision of what sharded tables exchange, if it is not fp32.
    """
    reduced = any(
        parameter.requires_grad for name, parameter in train_module.named_parameters() if not name.startswith(_SHARDED)
    )
    module = DistributedModelParallel(
        train_module,
        env=ShardingEnv.from_process_group(group),
        device=device,
        plan=plan or ShardingPlan({}),
        sharders=sharders(communication, device),
        init_data_parallel=reduced,
        data_parallel_wrapper=DefaultDataParallelWrapper(bucket_cap_mb=bucket_mb, static_graph=False),
    )
    if not reduced:  # which DDP refuses, and so does not move
        for child in (train_module.model, train_module.objective, train_module.stage.replicated):
            if child is not None:
                child.to(device)
    clear_padding(_parts(module, layout))
    return module


def draw_tables(module: DistributedModelParallel, layout: Layout, seed: int) -> None:
    """Fill this rank's shards with their initial weights, drawn from `seed`. Not collective."""
    init_tables(_parts(module, layout), seed)


def _parts(module: DistributedModelParallel, layout: Layout) -> list[Part]:
    return [
        Part(shard.tensor, layout.tables[name].table, *shard.metadata.shard_offsets)
        for name, shards in table_shards(module, layout).items()
        for shard in shards
    ]


def table_shards(module: DistributedModelParallel, layout: Layout) -> dict[str, list[Shard]]:
    """This rank's shards of the weights, by the table's name; live tensors. Flushes caches as `sharded_weights`."""
    return {name: weights.local_shards() for name, weights in sharded_weights(module, layout).items()}


def sharded_weights(module: DistributedModelParallel, layout: Layout) -> dict[str, ShardedTensor]:
    """The sharded tables' weights at their stored width, by the table's name; live tensors.

    Kernels' caches are written back and reset, so they may be read and written until the next lookup.
    """
    stage = module.module.stage
    state: dict[str, Any] = {}
    for collection in (*stage.pooled.values(), *stage.unpooled.values()):
        state.update({key.rsplit(".", 2)[-2]: value for key, value in collection.state_dict().items()})  # flushes
    for kernel in kernels(stage):
        kernel.reset_cache_states()
    return {name: state[module_key(name)] for name, placed in layout.tables.items() if placed.collection != REPLICATED}
