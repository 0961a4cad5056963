"""Hyperparameter search on a Ray cluster: `rechub-dist ray tune`, or run this file directly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rechub_dist.builds import require_builds
from rechub_dist.cli.entry import Overrides, run_app
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

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run file.")],
    space: Annotated[Path, typer.Option(metavar="SPACE.yaml", help="Search space.")],
    set_: Overrides = None,
    trials: Annotated[int, typer.Option(min=1, help="Number of trials.")] = 20,
    metric: Annotated[
        str | None,
        typer.Option(help="Valid metric that ranks trials; default: train.best_metric, else the first reported."),
    ] = None,
    grace: Annotated[int, typer.Option(min=1, help="Evaluations before ASHA may stop a trial.")] = 1,
    reduction: Annotated[
        int, typer.Option(min=2, help="R: the best 1/R continue after grace, R grace, R R grace... evaluations.")
    ] = 3,
    draw_seed: Annotated[int, typer.Option(min=0, help="Seed of the sampled settings.")] = 0,
    num_workers: Annotated[int, typer.Option(min=1, help="Ranks per trial.")] = 1,
    concurrent: Annotated[
        int | None, typer.Option(min=1, help="Concurrent trials; default: as many as the cluster has room for.")
    ] = None,
    max_failures: MaxFailures = 3,
    cpus_per_worker: Cpus = 1,
    gpus_per_worker: Gpus = 0,
    placement: Placement = "PACK",
    address: Address = None,
    ship: Ship = False,
    runtime_env: RuntimeEnv = None,
) -> None:
    """Search hyperparameters: try settings sampled from SPACE.yaml, stop weak trials early (ASHA), list the results.

    Each trial is a run of its own below output_dir/trials, sharded over its ranks. The same command resumes an
    interrupted search, each trial from its last checkpoint.

    SPACE.yaml has a line for each key of the run file to vary:

    optimizer.lr: {loguniform: [1e-4, 1e-2]}

    model.embedding_dim: {choice: [8, 16, 32]}

    model.dropout_rates: {uniform: [0.0, 0.5]}

    Example: rechub-dist ray tune RUN.yaml --space SPACE.yaml --trials 50 --num-workers 2 --metric auc
    """
    require_builds()
    config = load_for_cluster(run_file, set_ or [], gpus_per_worker)
    if config.data.valid is None:
        raise UserError("data.valid: trials are compared on the valid split; set it")
    from rechub_dist.launch.ray_search import Search, search  # noqa: PLC0415 - slow to import; --help should be fast
    from rechub_dist.launch.ray_workers import Workers, connect  # noqa: PLC0415
    from rechub_dist.launching.search import judged_by, read_space, read_trials, show_trials  # noqa: PLC0415

    metric, mode = judged_by(config, metric, num_workers)
    config = config.model_copy(update={"train": config.train.model_copy(update={"best_metric": metric})})
    draws = read_space(space, config, num_workers)
    workers = Workers(
        num_workers, cpus=cpus_per_worker, gpus=gpus_per_worker, placement=placement, max_failures=max_failures
    )
    connect(address, workers, ship=ship, runtime_env=runtime_env, code=config.code)
    plan = Search(config, draws, metric, mode, trials, grace, reduction, draw_seed)
    done = search(plan, workers, concurrent)
    found = read_trials(config.output_dir, metric, plan.mode)
    show_trials(Console(), config.output_dir, found, metric)
    if done and not any(trial.evaluations for trial in found):
        raise UserError(f"no trial reached an evaluation; the first one: {found[0].state}")
    if not done:
        print("search interrupted; run the same command to resume", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_app(app))
