"""Train, evaluate or predict on a Ray cluster. `rechub-dist ray train`, or this file"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rechub_dist.builds import require_builds
from rechub_dist.cli.entry import Overrides, run_app
from rechub_dist.config.code import module_of, named_code
from rechub_dist.distributed.process import preempted_exit_code
from rechub_dist.errors import UserError
from rechub_dist.launch.ray_options import (
    Address,
    Cpus,
    Gpus,
    MaxFailures,
    Placement,
    RuntimeEnv,
    Ship,
    load_for_cluster,
)
from rechub_dist.reporting.strict_json import dumps

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml")],
    set_: Overrides = None,
    num_workers: Annotated[int, typer.Option(min=1, help="Ranks.")] = 1,
    min_workers: Annotated[
        int | None,
        typer.Option(min=1, help="Go on with so few while nodes are missing; default: wait for all."),
    ] = None,
    resize_seconds: Annotated[
        float, typer.Option(min=1, help="With --min-workers: between two looks for room for more ranks.")
    ] = 60.0,
    max_failures: MaxFailures = 3,
    evaluate: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Evaluate the run's best checkpoint on this data instead of training."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Of an evaluation print one JSON object.")] = False,
    predict: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Predict each row of this data by the run's best checkpoint instead."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="With --predict: a new folder or address for Parquet files.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="With --predict: a column to copy; many times.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="With --predict: items a row, of a recall model.")] = 100,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Take the folders from a run that holds them; that one ends.")
    ] = False,
    cpus_per_worker: Cpus = 1,
    gpus_per_worker: Gpus = 0,
    placement: Placement = "PACK",
    address: Address = None,
    ship: Ship = False,
    runtime_env: RuntimeEnv = None,
) -> None:
    """Train, evaluate and save as RUN.yaml says on a Ray cluster, a worker a rank.

    It goes on by itself where the output folder holds a checkpoint, whichever launcher began; all nodes must reach that
    folder and the data by the same paths. SIGTERM, Ctrl-C and `ray job stop` make all ranks save and stop.

    Examples:

    rechub-dist ray train RUN.yaml --num-workers 2

    rechub-dist ray train RUN.yaml --address auto --num-workers 8 --min-workers 4 --placement SPREAD

    ray job submit --working-dir . -- rechub-dist ray train RUN.yaml --num-workers 8

    rechub-dist ray train runs/deepfm/config.yaml --num-workers 2 --evaluate data/test --json

    rechub-dist ray train runs/deepfm/config.yaml --num-workers 2 --predict data/test --out predictions --keep user
    """
    if predict is not None and (evaluate is not None or out is None):
        raise UserError("--predict: needs --out FOLDER, and goes without --evaluate")
    require_builds()
    config = load_for_cluster(run_file, set_ or [], gpus_per_worker)
    if evaluate is not None or predict is not None:
        # RUN.yaml says where the run is; what it was trained with, its checkpoint knows better.
        from rechub_dist.checkpoint.trained import trained_config  # noqa: PLC0415 - imports torch

        named = [*map(module_of, named_code(config.model_dump()).values())]  # by the run file, whose word counts
        trained = trained_config(config.checkpoint_folder, set_ or [], config.checkpoint_storage, named)
        kept = {"device": config.device, "distributed": config.distributed, "code": config.code}
        config = trained.anchored(Path.cwd()).model_copy(update=kept)
    from rechub_dist.launch.ray_ranks import Work  # noqa: PLC0415 - slow to import; --help is not
    from rechub_dist.launch.ray_workers import FailedError, Workers, connect, fit  # noqa: PLC0415
    from rechub_dist.reporting.reporter import show_summary  # noqa: PLC0415
    from rechub_dist.reporting.summary import show_training  # noqa: PLC0415

    workers = Workers(
        num_workers, min_workers, cpus_per_worker, gpus_per_worker, placement, max_failures, resize_seconds
    )
    connect(address, workers, ship=ship, runtime_env=runtime_env, code=config.code)
    task = Work(config, evaluate and _absolute(evaluate), take_over=take_over)
    if predict is not None and out is not None:
        from rechub_dist.inference.predict import Prediction  # noqa: PLC0415 - imports torch

        task = task._replace(predict=Prediction(_absolute(predict), _absolute(out), tuple(keep or ()), top_k))
    try:
        found = fit(task, workers)
    except FailedError as error:
        print(f"error: failed more often than --max-failures {max_failures}: {error}", file=sys.stderr, flush=True)
        raise typer.Exit(1) from error
    if found is None:
        print("stopped with nothing to save, resume with the same command", file=sys.stderr, flush=True)
    elif not task.training:
        if as_json:
            print(dumps(found))
        else:
            show_summary(Console(), f"{config.model.name} on {evaluate or predict}", found)
    elif found.preempted:
        raise typer.Exit(preempted_exit_code())
    else:
        show_training(Console(), config, found)


def _absolute(path: str) -> str:
    """As the ranks, which work elsewhere, must have it."""
    return path if "://" in path else str(Path(path).absolute())


if __name__ == "__main__":
    sys.exit(run_app(app))
