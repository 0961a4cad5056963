"""Options that `ray train` and `ray tune` share. Imports nothing slow: --help should not wait for Ray."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from rechub_dist.config import RunConfig
from rechub_dist.data.run_file import load_run
from rechub_dist.distributed.host import require_home
from rechub_dist.errors import UserError

_EACH, _CLUSTER = "What each rank gets", "The cluster"

MaxFailures = Annotated[
    int, typer.Option(min=-1, help="Times that ranks are started again after a failure; -1: without limit.")
]
Cpus = Annotated[int, typer.Option(min=1, help="CPUs, and torch threads.", rich_help_panel=_EACH)]
Gpus = Annotated[int, typer.Option(min=0, max=1, help="GPUs.", rich_help_panel=_EACH)]
Placement = Annotated[
    str, typer.Option(help="PACK, SPREAD, STRICT_PACK or STRICT_SPREAD, over nodes.", rich_help_panel=_EACH)
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT | auto",
        help="Of a running cluster; default: $RAY_ADDRESS, else one of this machine, for this command alone.",
        rich_help_panel=_CLUSTER,
    ),
]
Ship = Annotated[
    bool, typer.Option("--ship", help="Send the package along: the nodes do not have it.", rich_help_panel=_CLUSTER)
]
RuntimeEnv = Annotated[
    Path | None,
    typer.Option(metavar="FILE.yaml", help="Further settings of Ray's runtime_env.", rich_help_panel=_CLUSTER),
]


def in_job() -> bool:
    """Whether this is the driver of a job that was submitted, whose working folder travels with it."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def load_for_cluster(run_file: Path, overrides: Iterable[str], gpus: int) -> RunConfig:
    """The run with absolute paths, as its processes work elsewhere.

    Raises:
        UserError: as `load_run`; a user without a home; CUDA without GPUs; output that would go with the working folder
            of a submitted job.
    """
    require_home()  # Ray looks for it as it is imported
    config = load_run(run_file, overrides)
    if config.device == "cuda" and not gpus:
        raise UserError("device: cuda needs --gpus-per-worker 1")
    if in_job() and not config.output_dir.is_absolute():
        raise UserError(
            f"output_dir: {config.output_dir} is relative, and a job's working folder goes with its cluster; use --set "
            "output_dir=/a/folder/that/all/nodes/reach"
        )
    return config.anchored(Path.cwd())
