"""Train or evaluate on a Ray cluster. `python launch/ray_train.py --help`"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rechub_dist.cli import Overrides, run_app
from rechub_dist.errors import UserError

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
_EACH, _CLUSTER = "What each rank gets", "The cluster"


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
    max_failures: Annotated[
        int, typer.Option(min=-1, help="Times that ranks are started again after a failure; -1: without limit.")
    ] = 3,
    evaluate: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Evaluate the run's best checkpoint on this data instead of training."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Of an evaluation print one JSON object.")] = False,
    cpus_per_worker: Annotated[int, typer.Option(min=1, help="CPUs, and torch threads.", rich_help_panel=_EACH)] = 1,
    gpus_per_worker: Annotated[int, typer.Option(min=0, max=1, help="GPUs.", rich_help_panel=_EACH)] = 0,
    placement: Annotated[
        str, typer.Option(help="PACK, SPREAD, STRICT_PACK or STRICT_SPREAD, over nodes.", rich_help_panel=_EACH)
    ] = "PACK",
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT | auto",
            help="Of a running cluster; default: $RAY_ADDRESS, else one of this machine for this run.",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    ship: Annotated[
        bool, typer.Option("--ship", help="Send the package along; its nodes do not have it.", rich_help_panel=_CLUSTER)
    ] = False,
    runtime_env: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="Further settings of Ray's runtime_env.", rich_help_panel=_CLUSTER),
    ] = None,
) -> None:
    """Train, evaluate and save as RUN.yaml says on a Ray cluster, a worker a rank.

    It goes on by itself where the output folder holds a checkpoint, whichever launcher began; all nodes must reach that
    folder and the data by the same paths. SIGTERM, Ctrl-C and `ray job stop` make all ranks save and stop.

    Examples:

    python launch/ray_train.py RUN.yaml --num-workers 2

    python launch/ray_train.py RUN.yaml --address auto --num-workers 8 --min-workers 4 --placement SPREAD

    ray job submit --working-dir . -- python launch/ray_train.py RUN.yaml --num-workers 8

    python launch/ray_train.py runs/deepfm/config.yaml --num-workers 2 --evaluate data/test --json
    """
    from rechub_dist.config import load_run  # noqa: PLC0415 - Ray and torch take seconds to import; --help should not

    config = load_run(run_file, set_ or [])
    from ray_workers import FailedError, Work, Workers, connect, fit, in_job  # noqa: PLC0415

    from rechub_dist.report import show_summary  # noqa: PLC0415
    from rechub_dist.summary import show_training  # noqa: PLC0415

    workers = Workers(
        num_workers, min_workers, cpus_per_worker, gpus_per_worker, placement, max_failures, resize_seconds
    )
    if config.device == "cuda" and not gpus_per_worker:
        raise UserError("device: cuda needs --gpus-per-worker 1")
    if in_job() and not config.output_dir.is_absolute():
        raise UserError(
            f"output_dir: {config.output_dir} is relative, and a job's working folder goes with its cluster; use --set "
            "output_dir=/a/folder/that/all/nodes/reach"
        )
    config = config.anchored(Path.cwd())
    connect(address, workers, ship=ship, runtime_env=runtime_env)
    lack = workers.waits_for()
    if lack is not None:
        print(f"waiting for nodes: {lack}", file=sys.stderr, flush=True)
    console = Console()
    try:
        found = fit(Work(config, evaluate), workers)
    except FailedError as error:
        print(f"error: failed more often than --max-failures {max_failures}: {error}", file=sys.stderr, flush=True)
        raise typer.Exit(1) from error
    if found is None:
        print("stopped before training began, resume with the same command", file=sys.stderr, flush=True)
    elif evaluate is not None:
        if as_json:
            print(json.dumps(found))
        else:
            show_summary(console, f"{config.model.name} on {evaluate}", found)
    elif not found.preempted:
        show_training(console, config, found)


if __name__ == "__main__":
    sys.exit(run_app(app))
