"""The live state of a run under canonical names, independent of sharding: what a checkpoint saves and loads.

`tables/<table>/weight`, `tables/<table>/{sum, rowwise_sum, exp_avg, exp_avg_sq, step}`, `dense/<name>`,
`dense_optim/<name>/<state>`, <name> being `objective/<name>` where it is learnt of the objective. Tables have their
logical width, without padding. In a run that averages its dense parameters `dense/<name>` is the average, which is what
others want, and `dense_optim/<name>/trained` the parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from rechub_dist.checkpoint.tensors import TABLE_STATES, Entry, Piece
from rechub_dist.embedding.layout import REPLICATED, Layout, PlacedTable
from rechub_dist.embedding.local import module_key
from rechub_dist.embedding.optim import Optimizers
from rechub_dist.embedding.sharding import sharded_weights


def _torch_names(algorithm: str) -> dict[str, str]:
    """Canonical name to the name in torch's optimizer, of a table's optimizer states."""
    return {name: "sum" if name == "rowwise_sum" else name for name in TABLE_STATES[algorithm]}


def _fused_names(algorithm: str) -> dict[str, str]:
    """Canonical name to TorchRec's name: the first state is `momentum1`, the others are named as in the kernel."""
    return {name: name if place else "momentum1" for place, name in enumerate(TABLE_STATES[algorithm])}


def weights_state(
    module: DistributedModelParallel, layout: Layout, averages: Mapping[str, Tensor] = MappingProxyType({})
) -> dict[str, Entry]:
    """The live tables, dense parameters (or `averages` of them) and buffers, by canonical name. Not collective."""
    state = _weights_state(module.module, layout, sharded_weights(module, layout))
    return state | {f"dense/{name}": Entry.whole(average) for name, average in averages.items()}


def local_weights_state(step: nn.Module, layout: Layout) -> dict[str, Entry]:
    """As `weights_state`, for an unsharded train module, all of whose tables are replicated."""
    return _weights_state(step, layout, {})


def _weights_state(train_module: Any, layout: Layout, sharded: dict[str, ShardedTensor]) -> dict[str, Entry]:
    state: dict[str, Entry] = {}
    for name, placed in layout.tables.items():
        replicated = placed.collection == REPLICATED
        weight = train_module.stage.replicated.local.weight(name).detach() if replicated else sharded[name]
        state[f"tables/{name}/weight"] = _table_entry(weight, placed)
    for name, value in train_module.dense_state().items():
        state[f"dense/{name}"] = Entry.whole(value.detach())
    return state


def train_state(module: DistributedModelParallel, layout: Layout, optimizers: Optimizers) -> dict[str, Entry]:
    """`weights_state` plus the states of all optimizers. Not collective."""
    sharded = sharded_weights(module, layout)
    state = _weights_state(module.module, layout, sharded)
    if optimizers.dense is not None:
        for name, parameter in optimizers.parameters.items():
            for key, value in optimizers.dense.state.get(parameter, {}).items():
                state[f"dense_optim/{name}/{key}"] = Entry.whole(value)
    for name, average in optimizers.averages.items():
        state[f"dense_optim/{name}/trained"] = state[f"dense/{name}"]
        state[f"dense/{name}"] = Entry.whole(average)
    fused: dict[str, Any] = {}
    for states in optimizers.fused.state_dict()["state"].values():
        fused.update(states)
    for name, placed in layout.tables.items():
        algorithm = placed.optimizer.name
        if placed.collection == REPLICATED:
            optimizer = optimizers.replicated.get(name)
            own: dict[str, Tensor] = {} if optimizer is None else next(iter(optimizer.state.values()), {})
            names = _torch_names(algorithm) if algorithm in TABLE_STATES else {key: key for key in own}
            found = {canonical: own[key] for canonical, key in names.items()}
        else:
            # Only the owner of a table-wise table knows its states.
            here = bool(sharded[name].local_shards())
            found = fused_states(fused, module_key(name), _fused_names(algorithm)) if here else {}
        for canonical, value in found.items():
            rowwise = canonical == "rowwise_sum" and not isinstance(value, ShardedTensor)
            state[f"tables/{name}/{canonical}"] = _table_entry(value.view(-1) if rowwise else value, placed)
    return state


def fused_states(fused: dict[str, Any], table: str, names: dict[str, str]) -> dict[str, Any]:
    """Select a table's optimizer states, by canonical name, from those of all tables.

    Raises:
        RuntimeError: the kernel has other states than `names`, so that a checkpoint would lose one.
    """
    there = {key.removeprefix(f"{table}."): value for key, value in fused.items() if key.rpartition(".")[0] == table}
    if set(there) != set(names.values()):
        raise RuntimeError(
            f"table {table!r}: its kernel keeps the states {sorted(there)}, but {sorted(names.values())} are known"
        )
    return {canonical: there[key] for canonical, key in names.items()}


def placement(layout: Layout) -> dict[str, dict[str, Any]]:
    """Rows, width, sharding and optimizer of each table, for the manifest."""
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
    """The entry of a table's weights or optimizer state, without padding columns; a row-wise state is [rows]."""
    width = placed.table.dim or 0
    if not isinstance(value, ShardedTensor):
        return Entry.whole(value[:, :width] if value.dim() == 2 else value)
    size = tuple(value.metadata().size)
    pieces = []
    for shard in value.local_shards():
        row, *column = shard.metadata.shard_offsets
        tensor = shard.tensor[:, : width - column[0]] if column else shard.tensor.view(-1, 1)
        pieces.append(Piece(row, column[0] if column else 0, tensor))
    dtype = pieces[0].values.dtype if pieces else value.dtype
    return Entry((size[0], width) if len(size) == 2 else size, dtype, tuple(pieces), replicated=False)
