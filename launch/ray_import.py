"""Import tables on a Ray cluster: `rechub-dist ray import`, or run this file directly."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from rechub_dist.cli.entry import run_app
from rechub_dist.cli.importing import memory_bytes, report
from rechub_dist.distributed.host import host_memory, require_home
from rechub_dist.errors import UserError
from rechub_dist.launch.ray_options import Address, RuntimeEnv, Ship, in_job

if TYPE_CHECKING:
    from rechub_dist.data.importing.plan import Plan, Source

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.yaml", help="The plan, as for `data import`.")],
    out: Annotated[Path, typer.Option(help="The folder to write, under a path that all nodes reach.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the plan; repeatable."),
    ] = None,
    grow: Annotated[
        Path | None, typer.Option(help="An earlier import: its values keep their ids, new ones get ids after them.")
    ] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder that all nodes reach, for what tasks exchange, removed afterwards: about twice the size of "
            "the data as Parquet. Default: beside --out."
        ),
    ] = None,
    scratch_dir: Annotated[
        Path | None,
        typer.Option(help="Folder on a local disk of each node for tasks' databases. Default: in --work-dir."),
    ] = None,
    parts: Annotated[
        int | None,
        typer.Option(min=1, help="How many parts the users are cut into; default: one for 256 MB of the log."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory for a task's database, such as 2GB; default: half of the CPUs' share of their node."),
    ] = None,
    driver_memory: Annotated[
        str | None, typer.Option(help="Memory for the driver's database; default: a quarter of this machine's.")
    ] = None,
    cpus_per_task: Annotated[int, typer.Option(min=1, help="CPUs that a task reserves, and its threads.")] = 1,
    retries: Annotated[
        int, typer.Option(min=-1, help="How often a task runs again whose worker has died; -1: unlimited.")
    ] = 3,
    address: Address = None,
    ship: Ship = False,
    runtime_env: RuntimeEnv = None,
) -> None:
    """Import by a plan, as `data import` does, what one machine cannot hold: the same rows in the same order.

    The log's files are read by a task each (Parquet by row groups); then each task has the users of a part. All nodes
    must reach the plan's files, --out and --work-dir under the same paths. See docs/import_scale.md.

    Examples:

    rechub-dist ray import plan.yaml --out /shared/data/mine --address auto

    ray job submit --working-dir . -- rechub-dist ray import plan.yaml --out /shared/data/mine --cpus-per-task 2
    """
    require_home()
    from rechub_dist.data.importing.plan import read_plan  # noqa: PLC0415 - slow to import; --help should be fast
    from rechub_dist.data.importing.run import earlier_facts  # noqa: PLC0415

    for option, path in (("--out", out), ("--work-dir", work_dir), ("--scratch-dir", scratch_dir)):
        if path is not None and in_job() and not path.is_absolute():
            raise UserError(
                f"{option}: {path} is relative, and a job's working directory is deleted with its cluster; name a "
                "folder that all nodes reach"
            )
    read = _absolute(read_plan(plan, set_ or []))
    driver = host_memory() // 4 if driver_memory is None else memory_bytes(driver_memory)
    of_task = None if memory is None else memory_bytes(memory)
    from rechub_dist.data.importing.in_parts import import_in_parts  # noqa: PLC0415
    from rechub_dist.launch.ray_parts import cluster_task_memory, runner  # noqa: PLC0415
    from rechub_dist.launch.ray_workers import Workers, connect  # noqa: PLC0415

    connect(address, Workers(1, cpus=cpus_per_task), ship=ship, runtime_env=runtime_env)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        line = bar.add_task("look at the files", total=None)
        run = runner(retries, lambda what, done, total: bar.update(line, description=what, completed=done, total=total))
        found = import_in_parts(
            read,
            out.absolute(),
            run,
            memory=driver,
            task_memory=of_task or cluster_task_memory(cpus_per_task),
            threads=cpus_per_task,
            parts=parts,
            work=work_dir and work_dir.absolute(),
            scratch=scratch_dir and scratch_dir.absolute(),
            grow=grow,
        )
    report(out, found, {} if grow is None else earlier_facts(grow))


def _absolute(plan: Plan) -> Plan:
    """The plan with absolute paths, since Ray's workers have another working directory.

    Raises:
        UserError: a relative path becomes a value of the data.
    """
    tables = {name: table.model_copy(update=_paths(table, f"tables.{name}")) for name, table in plan.tables.items()}
    log = plan.log.model_copy(update=_paths(plan.log, "log"))
    return plan.model_copy(update={"log": log, "tables": tables})


def _paths(source: Source, where: str) -> dict[str, tuple[str, ...]]:
    if source.path is None:
        raise UserError(f"{where}.path: no file is named; write path into the plan")
    relative = next((path for path in source.path if "://" not in path and not Path(path).is_absolute()), None)
    if relative is not None and source.file_column is not None:
        raise UserError(
            f"{where}.path: {relative} is relative, and {where}.file_column makes a value of it; write absolute paths"
        )
    return {"path": tuple(path if "://" in path else os.path.abspath(path) for path in source.path)}


if __name__ == "__main__":
    sys.exit(run_app(app))
