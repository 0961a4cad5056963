"""The command `rechub-dist plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from rechub_dist.cli.entry import Overrides
from rechub_dist.cli.importing import memory_bytes
from rechub_dist.distributed.process import quiet_libraries
from rechub_dist.errors import UserError

if TYPE_CHECKING:
    from rechub_dist.assembly.estimate import Estimate, TableEstimate
    from rechub_dist.config import RunConfig
    from rechub_dist.embedding.planning import Cluster

_BAR = 40  # characters of the longest bar
_MOST_RANKS = 32  # that are listed one by one


def plan(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run file; its schema must be readable.")],
    world_size: Annotated[int, typer.Option(min=1, max=100_000, help="Ranks in all.")] = 1,
    local_world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks of a host; default: all, at most 8.")
    ] = None,
    memory: Annotated[
        str, typer.Option(help="Memory of each rank: of its GPU, or without one its share of the host's.")
    ] = "16GB",
    host_memory: Annotated[str, typer.Option(help="With GPUs: each rank's share of the host's memory.")] = "64GB",
    device: Annotated[str, typer.Option(help="cpu or cuda; neither needs to be here.")] = "cpu",
    set_: Overrides = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan as JSON.")] = None,
    against: Annotated[Path | None, typer.Option(help="A saved plan: say what differs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show where the tables of a run would lie on ranks that need not be here: sharding, memory and load of each.

    The plan is made by the code that a run uses. A fifth of the memory is left for everything else.

    Example: rechub-dist plan run.yaml --world-size 16 --local-world-size 8 --memory 80GB --device cuda
    """
    from rechub_dist.assembly.estimate import estimate  # noqa: PLC0415 - torch is slow to import
    from rechub_dist.data.run_file import load_run  # noqa: PLC0415
    from rechub_dist.embedding.planning import Cluster, memory_for_tables  # noqa: PLC0415

    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: must be cpu or cuda")
    local = local_world_size or min(world_size, 8)
    if world_size % local:
        raise UserError(
            f"--world-size {world_size}: is no multiple of the {local} ranks of a host (--local-world-size)"
        )
    quiet_libraries()
    config = load_run(run_file, set_ or [])
    given = config.embedding.memory_per_rank_gb
    room = memory_for_tables(memory_bytes(memory)) if given is None else int(given * 1024**3)
    cluster = Cluster(
        world_size, local, "cuda" if device == "cuda" else "cpu", room,
        host_memory=memory_for_tables(memory_bytes(host_memory)), assumed=f"80% of {memory}",
    )  # fmt: skip
    try:
        found = estimate(config, cluster)
    except UserError as error:
        if "do not fit" not in str(error):
            raise
        fits = _what_fits(config, cluster)
        raise UserError(f"{error}. " + (f"Would fit: {'; '.join(fits)}" if fits else "No simple change fits")) from None
    tree = found.as_tree()
    if save is not None:
        save.write_text(json.dumps(tree, indent=1), encoding="utf-8")
    if as_json:
        print(json.dumps(tree))
    else:
        _show(Console(), found)
    if against is not None:
        _compare(tree, against)


def _what_fits(config: RunConfig, cluster: Cluster) -> list[str]:
    """Single changes with which the tables would fit."""
    from dataclasses import replace  # noqa: PLC0415

    from rechub_dist.assembly.estimate import estimate  # noqa: PLC0415
    from rechub_dist.config import changed  # noqa: PLC0415

    tries: list[tuple[str, RunConfig, Cluster]] = []
    changes: list[dict[str, Any]] = [{"embedding.sharding": "row_wise"}]
    if cluster.device == "cuda":
        changes.append({"embedding.kernel": "fused_uvm_caching"})
    for values in changes:
        text = " ".join(f"--set {key}={value}" for key, value in values.items())
        tries.append((text, changed(config, values, "--set"), cluster))
    for factor in (2, 4, 8, 16):
        more = cluster.world_size * factor
        tries.append((f"--world-size {more}", config, replace(cluster, world_size=more)))
    if config.embedding.precision == "fp32":  # last, as it changes what is learnt
        values = {"embedding.precision": "fp16"}
        tries.append(("--set embedding.precision=fp16", changed(config, values, "--set"), cluster))
    found: list[str] = []
    for text, other, ranks in tries:
        if text.startswith("--world-size") and any(one.startswith("--world-size") for one in found):
            continue
        try:
            estimate(other, ranks)
        except UserError:
            continue
        found.append(text)
    return found


def _show(console: Console, found: Estimate) -> None:
    name = Column("table", overflow="fold")
    table = Table(name, "rows", "width", "sharding", "kernel", "weights", "ranks", "largest shard", box=None)
    for one in sorted(found.tables, key=lambda each: -each.weight_bytes):
        largest = max(shard.device_bytes + shard.host_bytes for shard in one.shards)
        table.add_row(
            one.name, f"{one.rows:,}", str(one.dim), one.sharding, one.kernel, _size(one.weight_bytes), _ranks(one),
            _size(largest),
        )  # fmt: skip
    console.print(table)
    cluster = found.cluster
    hosts = cluster.world_size // (cluster.local_world_size or 1)
    weights = sum(one.weight_bytes for one in found.tables)
    console.print(
        f"{len(found.tables)} tables, {_size(weights)} of weights, on {cluster.world_size} rank(s) of {hosts} host(s), "
        f"{cluster.device}; with optimizer states and buffers:",
        highlight=False,
    )
    where = "GPU memory" if cluster.device == "cuda" else "memory"
    _bars(console, where, found.of_ranks("device_bytes" if cluster.device == "cuda" else "host_bytes"), cluster.memory)
    if cluster.device == "cuda" and any(found.of_ranks("host_bytes")):
        _bars(console, "host memory", found.of_ranks("host_bytes"), cluster.host_memory)
    cost = found.of_ranks("cost")
    if max(cost) > 0:
        even = sum(cost) / len(cost)
        console.print(
            f"load by the planner's estimate: the busiest rank has {max(cost) / even:.2f} times the mean",
            highlight=False,
        )


def _bars(console: Console, what: str, values: list[float], room: int) -> None:
    """A bar a rank, of the room that there is; of many ranks the fullest and the emptiest."""
    order = sorted(range(len(values)), key=lambda rank: -values[rank])
    shown = range(len(values)) if len(values) <= _MOST_RANKS else sorted([*order[:5], *order[-5:]])
    console.print(f"{what} for tables, of {_size(room)} a rank" + ("" if len(shown) == len(values) else ", extremes"))
    for rank in shown:
        share = values[rank] / room
        bar = "█" * max(1, round(share * _BAR)) if values[rank] else ""
        console.print(f"  rank {rank:>4} {bar:<{_BAR}} {_size(values[rank]):>9} {share:6.1%}", highlight=False)


def _compare(tree: dict[str, Any], path: Path) -> None:
    try:
        other = json.loads(path.read_text(encoding="utf-8"))["tables"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--against {path}: no saved plan ({error}); make one with --save") from None
    tables = tree["tables"]
    lines = [f"{name}: only in {path}" for name in other.keys() - tables.keys()]
    lines += [f"{name}: not in {path}" for name in tables.keys() - other.keys()]
    for name in tables.keys() & other.keys():
        for key, value in tables[name].items():
            if key != "shards" and other[name].get(key) != value:
                lines.append(f"{name}: {key} {other[name].get(key)} -> {value}")
        here, there = ([tuple(shard[:3]) for shard in one["shards"]] for one in (tables[name], other[name]))
        if here != there:
            lines.append(f"{name}: {len(there)} shard(s) on ranks {_of(there)} -> {len(here)} on ranks {_of(here)}")
    print("\n".join(sorted(lines)) if lines else f"the same placement as {path}")


def _of(shards: list[tuple[int, ...]]) -> str:
    return _span(sorted({shard[0] for shard in shards}))


def _ranks(table: TableEstimate) -> str:
    return _span(sorted({shard.rank for shard in table.shards}))


def _span(ranks: list[int]) -> str:
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks[:6])) + (", ..." if len(ranks) > 6 else "")


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TB"
