"""Train, evaluate or predict on a Ray cluster: `rechub-dist ray train`, or run this file directly."""

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
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run file.")],
    set_: Overrides = None,
    num_workers: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 1,
    min_workers: Annotated[
        int | None,
        typer.Option(min=1, help="Fewest ranks to train with while nodes are missing; default: --num-workers."),
    ] = None,
    resize_seconds: Annotated[
        float, typer.Option(min=1, help="With --min-workers: seconds between checks for room for more ranks.")
    ] = 60.0,
    max_failures: MaxFailures = 3,
    evaluate: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Evaluate the run's best checkpoint on this data instead of training."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --evaluate or --predict: print one JSON object.")
    ] = False,
    predict: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Predict this data with the run's best checkpoint instead of training."),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="With --predict: new or empty folder or address for the Parquet output.")
    ] = None,
    keep: Annotated[list[str] | None, typer.Option(help="With --predict: input column to copy; repeatable.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="With --predict, recall models: number of items per row.")] = 100,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Take the output folders over from a running run, which then ends.")
    ] = False,
    cpus_per_worker: Cpus = 1,
    gpus_per_worker: Gpus = 0,
    placement: Placement = "PACK",
    address: Address = None,
    ship: Ship = False,
    runtime_env: RuntimeEnv = None,
) -> None:
    """Train, evaluate and save as RUN.yaml says on a Ray cluster, one worker per rank.

    Resumes if the output folder has a checkpoint, whichever launcher saved it. All nodes must reach that folder and the
    data under the same paths. On SIGTERM, Ctrl-C or `ray job stop` all ranks save and stop.

    Examples:

    rechub-dist ray train RUN.yaml --num-workers 2

    rechub-dist ray train RUN.yaml --address auto --num-workers 8 --min-workers 4 --placement SPREAD

    ray job submit --working-dir . -- rechub-dist ray train RUN.yaml --num-workers 8

    rechub-dist ray train runs/deepfm/config.yaml --num-workers 2 --evaluate data/test --json

    rechub-dist ray train runs/deepfm/config.yaml --num-workers 2 --predict data/test --out predictions --keep user_id
    """
    if predict is not None and (evaluate is not None or out is None):
        raise UserError("--predict: needs --out FOLDER, and cannot be combined with --evaluate")
    require_builds()
    config = load_for_cluster(run_file, set_ or [], gpus_per_worker)
    if evaluate is not None or predict is not None:
        # RUN.yaml locates the run; the rest of the configuration is that of the checkpoint.
        from rechub_dist.checkpoint.trained import trained_config  # noqa: PLC0415 - imports torch

        named = [*map(module_of, named_code(config.model_dump()).values())]  # trusted, since the run file names it
        trained = trained_config(config.checkpoint_folder, set_ or [], config.checkpoint_storage, named)
        kept = {"device": config.device, "distributed": config.distributed, "code": config.code}
        config = trained.anchored(Path.cwd()).model_copy(update=kept)
    from rechub_dist.launch.ray_ranks import Work  # noqa: PLC0415 - slow to import; --help should be fast
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
        print(
            f"error: the ranks failed more than --max-failures {max_failures} times: {error}",
            file=sys.stderr,
            flush=True,
        )
        raise typer.Exit(1) from error
    if found is None:
        print(
            "stopped before there was anything to save, resume with the same command",
            file=sys.stderr,
            flush=True,
        )
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
    """An absolute path or an address: ranks have another working directory."""
    return path if "://" in path else str(Path(path).absolute())


if __name__ == "__main__":
    sys.exit(run_app(app))
