"""A plan that was saved, by which tables are placed instead of by a new one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrec.distributed.planner.types import Partitioner, PlannerError, PlannerErrorType, ShardingOption, Topology

from rechub_dist.embedding.layout import PlacedTable
from rechub_dist.errors import UserError

KEY = "embedding.plan"


class Pinned(Partitioner):
    """Gives the shards of each table the ranks that a plan has for them.

    Args:
        path: of the plan, as `rechub-dist plan --save` writes it and a checkpoint holds it.
        placed: the sharded tables, by their names in TorchRec.
        world_size: of the run.

    Raises:
        UserError: no plan, or one of another run: other tables, sizes, shardings, kernels or ranks.
    """

    def __init__(self, path: Path, placed: Mapping[str, PlacedTable], world_size: int) -> None:
        self._where = f"{KEY}: {path}"
        tables = self._read(path, world_size)
        names = {table.table.name for table in placed.values()}
        if unknown := sorted(set(tables) - names - _replicated(tables)) or sorted(names - set(tables)):
            has = "has a table {!r} that the run has not" if unknown[0] in tables else "has no table {!r}"
            raise self._other(has.format(unknown[0]))
        self._placed = placed
        self._shards: dict[str, list[tuple[int, int, int]]] = {}
        for key, one in placed.items():
            name, found = one.table.name, tables[one.table.name]
            for what, here in (("rows", one.table.rows), ("dim", one.table.dim), ("sharding", one.sharding),
                               ("kernel", one.kernel)):  # fmt: skip
                if found.get(what) != here:
                    raise self._other(f"table {name!r} has {what} {found.get(what)!r}, and in this run {here!r}")
            self._shards[key] = [(rank, rows, columns) for rank, rows, columns, *_ in found["shards"]]

    def _read(self, path: Path, world_size: int) -> dict[str, dict[str, Any]]:
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            ranks, tables = int(tree["world_size"]), dict(tree["tables"])
            known = [int(rank) for table in tables.values() for rank, _rows, _columns, *_ in table["shards"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._where}: no saved plan ({type(error).__name__}: {error}); make one: rechub-dist plan RUN.yaml "
                f"--world-size {world_size} --save FILE"
            ) from None
        if ranks != world_size:
            raise self._other(f"is for {ranks} rank(s), and the run has {world_size}")
        if not all(0 <= rank < world_size for rank in known):
            raise self._other("has a rank that the run has not")
        return tables

    def _other(self, why: str) -> UserError:
        return UserError(f"{self._where}: {why}; make it anew (rechub-dist plan RUN.yaml --save FILE), or leave it out")

    def partition(self, proposal: list[ShardingOption], storage_constraint: Topology) -> list[ShardingOption]:
        """Put the ranks into the options.

        Raises:
            PlannerError: a rank's memory does not hold its shards.
            UserError: shards of other sizes.
        """
        room = [device.storage for device in storage_constraint.devices]
        for option in proposal:
            pinned = self._shards[option.name]
            if [(rows, columns) for _, rows, columns in pinned] != [tuple(shard.size) for shard in option.shards]:
                name = self._placed[option.name].table.name
                raise self._other(f"table {name!r} has shards of other sizes than in this run")
            for shard, (rank, *_) in zip(option.shards, pinned, strict=True):
                assert shard.storage is not None
                shard.rank = rank
                room[rank] = room[rank] - shard.storage
        if any(left.hbm < 0 or left.ddr < 0 for left in room):
            raise PlannerError("the pinned plan does not fit", error_type=PlannerErrorType.PARTITION)
        return proposal


def _replicated(tables: Mapping[str, Mapping[str, Any]]) -> set[str]:
    return {name for name, table in tables.items() if table.get("sharding") == "replicated"}
