"""Where a run's tables would lie on ranks that need not be there: memory and load of each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from torchrec.distributed.planner.types import Shard

from rechub_dist.assembly.code import dense_optimizer, table_optimizers
from rechub_dist.assembly.parts import build
from rechub_dist.assembly.sharded import Agreed, planned, refuse_exchange
from rechub_dist.config import RunConfig
from rechub_dist.embedding.layout import REPLICATED, Layout
from rechub_dist.embedding.planning import Cluster, ids_of_a_row, sharded_tables
from rechub_dist.embedding.sharding import mark_optimizers


@dataclass(frozen=True)
class ShardEstimate:
    """A shard: its rank, rows and columns, bytes of device and host memory, and the planner's cost of a step in ms."""

    rank: int
    rows: int
    columns: int
    device_bytes: int
    host_bytes: int
    cost: float


@dataclass(frozen=True)
class TableEstimate:
    """A table and where it lies.

    Attributes:
        sharding, kernel: as resolved; a replicated table has no kernel.
        collection: which it is in (`PlacedTable`).
        features: how many features read it.
        ids: the most ids that they have together in a row, where that is known; else one each.
        weight_bytes: of all rows, at their stored width, once.
        shards: of a sharded table with its optimizer's state and buffers; a replicated one has one on each rank.
    """

    name: str
    rows: int
    dim: int
    sharding: str
    kernel: str
    collection: str
    features: int
    ids: float
    weight_bytes: int
    shards: tuple[ShardEstimate, ...]


@dataclass(frozen=True)
class Estimate:
    """The tables of a run on `cluster`."""

    cluster: Cluster
    tables: tuple[TableEstimate, ...]

    def of_ranks(self, what: Literal["device_bytes", "host_bytes", "cost"]) -> list[float]:
        """The sum over the shards of each rank."""
        found = [0.0] * self.cluster.world_size
        for table in self.tables:
            for shard in table.shards:
                found[shard.rank] += getattr(shard, what)
        return found

    def summary(self) -> str:
        """In a line: shardings, ranks, and the memory of the ranks with the least and the most."""
        kinds = Counter(table.sharding for table in self.tables)
        said = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        used = zip(self.of_ranks("device_bytes"), self.of_ranks("host_bytes"), strict=True)
        sizes = sorted({f"{sum(both) / 2**20:,.0f}": sum(both) for both in used}.items(), key=lambda size: size[1])
        memory = " to ".join(dict.fromkeys([sizes[0][0], sizes[-1][0]]))
        cost = self.of_ranks("cost")
        uneven = f"; the busiest has {max(cost) * len(cost) / sum(cost):.2f} times the mean load" if any(cost) else ""
        return f"{len(self.tables)} tables ({said}) on {len(cost)} rank(s), {memory} MiB a rank{uneven}"

    def as_tree(self) -> dict[str, Any]:
        """In JSON types, to be saved and compared."""
        return {
            "world_size": self.cluster.world_size,
            "local_world_size": self.cluster.local_world_size,
            "device": self.cluster.device,
            "tables": {
                table.name: {
                    "rows": table.rows,
                    "dim": table.dim,
                    "sharding": table.sharding,
                    "kernel": table.kernel,
                    "shards": [[s.rank, s.rows, s.columns, s.device_bytes, s.host_bytes] for s in table.shards],
                }
                for table in self.tables
            },
        }


def estimate(config: RunConfig, cluster: Cluster) -> Estimate:
    """Plan a run's tables as its ranks would do it on `cluster`, whatever plan the run file names. Local; no such
    hardware is needed.

    Raises:
        UserError: the run file is wrong, or the tables do not fit, with how much is missing.
    """
    refuse_exchange(config.embedding.communication, cluster.device)
    parts = build(config, device=cluster.device, world_size=cluster.world_size)
    dense_optimizer(config)
    table_optimizers(config)
    mark_optimizers(parts.train_module, parts.layout)
    return estimate_of(parts.layout, Agreed(cluster, planned(parts, cluster, config.distributed.pipeline)))


def estimate_of(layout: Layout, agreed: Agreed) -> Estimate:
    """What a plan comes to. Local."""
    cluster, chosen = agreed.cluster, {} if agreed.plan is None else agreed.plan.shards
    names = {placed.table.name: key for key, placed in sharded_tables(layout).items()}
    tables = []
    for name, placed in layout.tables.items():
        size = placed.weight_bytes
        if placed.collection == REPLICATED:
            rows, width = placed.table.rows, placed.table.stored_dim
            states = {"sgd": 0, "rowwise_adagrad": 0, "adagrad": 1, "momentum_sgd": 1}.get(placed.optimizer.name, 2)
            total = size if placed.frozen else size * (2 + states)  # weights, gradients, states
            device, host = (total, 0) if cluster.device == "cuda" else (0, total)
            shards = tuple(ShardEstimate(r, rows, width, device, host, 0.0) for r in range(cluster.world_size))
            kernel = ""
        else:
            shards = tuple(_shard(s) for s in chosen[names[name]])
            kernel = placed.kernel
        ids = sum(ids_of_a_row(layout, feature) for feature in placed.features)
        tables.append(
            TableEstimate(
                name, placed.table.rows, placed.table.dim or 0, placed.sharding, kernel, placed.collection,
                len(placed.features), ids, size, shards,
            )
        )  # fmt: skip
    return Estimate(cluster, tuple(tables))


def _shard(shard: Shard) -> ShardEstimate:
    assert shard.rank is not None
    assert shard.storage is not None
    rows, columns = shard.size
    cost = 0.0 if shard.perf is None else shard.perf.total
    return ShardEstimate(shard.rank, rows, columns, shard.storage.hbm, shard.storage.ddr, cost)
