"""The live state of a run under canonical names, whatever the sharding: what a checkpoint saves and loads in place.

`tables/<table>/weight`, `tables/<table>/{sum, rowwise_sum, exp_avg, exp_avg_sq, step}`, `dense/<name>`,
`dense_optim/<name>/<state>`. Tables have their logical width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import (
    Shard,
    ShardedTensor,
    ShardedTensorMetadata,
)
from torch.distributed._shard.sharding_spec import ShardMetadata
from torchrec.distributed.model_parallel import DistributedModelParallel

from rechub_dist.distributed.optim import Optimizers
from rechub_dist.distributed.sharding import sharded_weights
from rechub_dist.embedding.layout import REPLICATED, Layout, PlacedTable
from rechub_dist.embedding.local import module_key

# The optimizer's states by canonical name: those of torch's optimizer, and of the fused kernel.
_TORCH_STATES = {
    "adagrad": {"sum": "sum"},
    "rowwise_adagrad": {"rowwise_sum": "sum"},
    "adam": {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "step": "step"},
}
_FUSED_STATES = {
    "adagrad": {"sum": "momentum1"},
    "rowwise_adagrad": {"rowwise_sum": "momentum1"},
    "lazy_adam": {"exp_avg": "momentum1", "exp_avg_sq": "momentum2"},
}


class State:
    """Tensors and ShardedTensors by canonical name.

    They are the live ones, so that loading into them is all there is to it; but a sharded tensor must be contiguous,
    so where the stored width is not the logical one `entries` holds a copy, which `commit` writes back.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.entries: dict[str, Any] = {}
        self._group = group
        self._copies: list[tuple[Tensor, Tensor]] = []

    def commit(self) -> None:
        """Write what was loaded into copies back into the live tensors."""
        for live, copy in self._copies:
            live.copy_(copy)

    def add_table(self, key: str, value: Any, placed: PlacedTable) -> None:
        """A table's weights or optimizer state, cut to the logical width; a row-wise state is [rows]."""
        if not isinstance(value, ShardedTensor):
            if value.dim() == 2:
                rowwise = key.endswith("/rowwise_sum")
                value = value.view(-1) if rowwise else value[:, : placed.table.dim]
            self.entries[key] = value
            return
        metadata = value.metadata()
        width = placed.table.dim or 0
        if len(metadata.size) == 1 or width == placed.table.stored_dim:
            self.entries[key] = value
            return

        def cut(shard: ShardMetadata) -> ShardMetadata:
            (row, column), (rows, columns) = shard.shard_offsets, shard.shard_sizes
            return ShardMetadata([row, column], [rows, min(columns, width - column)], str(shard.placement))

        local = []
        for shard in value.local_shards():
            live = shard.tensor[:, : width - shard.metadata.shard_offsets[1]]
            copy = live.contiguous()
            self._copies.append((live, copy))
            local.append(Shard(copy, cut(shard.metadata)))
        self.entries[key] = ShardedTensor._init_from_local_shards_and_global_metadata(
            local,
            ShardedTensorMetadata(
                [cut(shard) for shard in metadata.shards_metadata],
                torch.Size([metadata.size[0], width]),
                metadata.tensor_properties,
            ),
            process_group=self._group,
        )


def weights_state(module: DistributedModelParallel, layout: Layout, group: dist.ProcessGroup) -> State:
    """Tables, and the dense parameters and buffers."""
    step = module.module
    state = State(group)
    sharded = sharded_weights(module, layout)
    for name, placed in layout.tables.items():
        replicated = placed.collection == REPLICATED
        weight = step.stage.replicated.local.weight(name).detach() if replicated else sharded[name]
        state.add_table(f"tables/{name}/weight", weight, placed)
    for name, value in step.model.state_dict().items():
        state.entries[f"dense/{name}"] = value.detach()
    return state


def train_state(
    module: DistributedModelParallel, layout: Layout, optimizers: Optimizers, group: dist.ProcessGroup
) -> State:
    """`weights_state` and the states of all optimizers."""
    state = weights_state(module, layout, group)
    if optimizers.dense is not None:
        for name, parameter in optimizers.parameters.items():
            for key, value in optimizers.dense.state[parameter].items():
                state.entries[f"dense_optim/{name}/{key}"] = value
    fused: dict[str, Any] = {}
    for states in optimizers.fused.state_dict()["state"].values():
        fused.update(states)
    for name, placed in layout.tables.items():
        algorithm = placed.optimizer.name
        if placed.collection == REPLICATED:
            own: dict[str, Tensor] = next(iter(optimizers.replicated[name].state.values()), {})
            found = {canonical: own[key] for canonical, key in _TORCH_STATES.get(algorithm, {}).items()}
        else:
            # A table-wise table's state is known to its owner alone.
            keys = {
                canonical: f"{module_key(name)}.{key}" for canonical, key in _FUSED_STATES.get(algorithm, {}).items()
            }
            found = {canonical: fused[key] for canonical, key in keys.items() if key in fused}
        for canonical, value in found.items():
            state.add_table(f"tables/{name}/{canonical}", value, placed)
    return state
