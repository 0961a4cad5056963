"""Options shared by `ray train` and `ray tune`. Imports nothing slow: --help should not wait for Ray."""

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

_EACH, _CLUSTER = "Resources per rank", "Cluster"

MaxFailures = Annotated[int, typer.Option(min=-1, help="Restarts of the ranks after failures; -1: unlimited.")]
Cpus = Annotated[int, typer.Option(min=1, help="CPUs, also the number of torch threads.", rich_help_panel=_EACH)]
Gpus = Annotated[int, typer.Option(min=0, max=1, help="GPUs: 0 or 1.", rich_help_panel=_EACH)]
Placement = Annotated[
    str,
    typer.Option(
        help="Placement of ranks on nodes: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD.", rich_help_panel=_EACH
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT | auto",
        help="Address of a running cluster; default: $RAY_ADDRESS, else a temporary cluster on this machine.",
        rich_help_panel=_CLUSTER,
    ),
]
Ship = Annotated[
    bool, typer.Option("--ship", help="Upload this package to nodes that lack it.", rich_help_panel=_CLUSTER)
]
RuntimeEnv = Annotated[
    Path | None,
    typer.Option(metavar="FILE.yaml", help="More settings for Ray's runtime_env.", rich_help_panel=_CLUSTER),
]


def in_job() -> bool:
    """Whether this is the driver of a submitted job, whose working directory is uploaded with it."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def load_for_cluster(run_file: Path, overrides: Iterable[str], gpus: int) -> RunConfig:
    """Load a run with absolute paths, since Ray's workers have another working directory.

    Raises:
        UserError: as `load_run`; the user has no home folder; `device: cuda` without GPUs; a relative `output_dir` in a
            submitted job, whose working directory is deleted with the cluster.
    """
    require_home()  # which importing Ray looks for
    config = load_run(run_file, overrides)
    if config.device == "cuda" and not gpus:
        raise UserError("device: cuda needs --gpus-per-worker 1")
    if in_job() and not config.output_dir.is_absolute():
        raise UserError(
            f"output_dir: {config.output_dir} is relative, and a job's working directory is deleted with its cluster; "
            "use --set output_dir=/a/folder/that/all/nodes/reach"
        )
    return config.anchored(Path.cwd())
