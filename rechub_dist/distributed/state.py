"""The live state of a run under canonical names, whatever the sharding: what a checkpoint saves and loads in place.

`tables/<table>/weight`, `tables/<table>/{sum, rowwise_sum, exp_avg, exp_avg_sq, step}`, `dense/<name>`,
`dense_optim/<name>/<state>`. Tables have their logical width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from rechub_dist.checkpoint.tensors import Entry, Piece
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


def weights_state(module: DistributedModelParallel, layout: Layout) -> dict[str, Entry]:
    """Tables, and the dense parameters and buffers; live ones."""
    step = module.module
    state: dict[str, Entry] = {}
    sharded = sharded_weights(module, layout)
    for name, placed in layout.tables.items():
        replicated = placed.collection == REPLICATED
        weight = step.stage.replicated.local.weight(name).detach() if replicated else sharded[name]
        state[f"tables/{name}/weight"] = _table_entry(weight, placed)
    for name, value in step.model.state_dict().items():
        state[f"dense/{name}"] = Entry.whole(value.detach())
    return state


def train_state(module: DistributedModelParallel, layout: Layout, optimizers: Optimizers) -> dict[str, Entry]:
    """`weights_state` and the states of all optimizers."""
    state = weights_state(module, layout)
    if optimizers.dense is not None:
        for name, parameter in optimizers.parameters.items():
            for key, value in optimizers.dense.state[parameter].items():
                state[f"dense_optim/{name}/{key}"] = Entry.whole(value)
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
            rowwise = canonical == "rowwise_sum" and not isinstance(value, ShardedTensor)
            state[f"tables/{name}/{canonical}"] = _table_entry(value.view(-1) if rowwise else value, placed)
    return state


def placement(layout: Layout) -> dict[str, dict[str, Any]]:
    """How the tables lie, for the record."""
    return {
        name: {
            "rows": placed.table.rows,
            "dim": placed.table.dim,
            "sharding": placed.sharding,
            "optimizer": placed.optimizer.name,
        }
        for name, placed in layout.tables.items()
    }


def _table_entry(value: Any, placed: PlacedTable) -> Entry:
    """A table's weights or optimizer state, cut to the logical width; a row-wise state is [rows]."""
    width = placed.table.dim or 0
    if not isinstance(value, ShardedTensor):
        return Entry.whole(value[:, :width] if value.dim() == 2 else value)
    size = tuple(value.metadata().size)
    pieces = []
    for shard in value.local_shards():
        row, *column = shard.metadata.shard_offsets
        tensor = shard.tensor[:, : width - column[0]] if column else shard.tensor.view(-1, 1)
        pieces.append(Piece(row, column[0] if column else 0, tensor))
    return Entry((size[0], width) if len(size) == 2 else size, value.dtype, tuple(pieces), replicated=False)
