"""The run file as the pods get it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from rechub_dist.config import RunConfig, read_run, resolve_dataset
from rechub_dist.errors import UserError
from rechub_dist.kubernetes.settings import Settings

RUNS, DATA = PurePosixPath("/runs"), PurePosixPath("/data")


def run_for_pods(path: Path, overrides: Iterable[str], settings: Settings) -> RunConfig:
    """The run that the pods are to train.

    A schema file beside the run file comes inline, as the pods do not have it; so does the number of threads, unless
    the run file has one.

    Raises:
        UserError: as `load_run`, and where data, output or device are not to be had in the pods.
    """
    config = read_run(path, overrides)
    if isinstance(config.data.dataset, str) and "://" not in config.data.dataset:
        config = resolve_dataset(config, base=path.parent)
    if not _is_address(config.data.root) and not (settings.data_claim and _is_below(config.data.root, DATA)):
        raise UserError(
            f"data.root: {config.data.root} is not in the pods; name a folder of a claim (--data-claim NAME --set "
            f"data.root={DATA}/...) or an address such as s3://bucket/folder"
        )
    if not _is_below(config.output_dir, RUNS):
        raise UserError(
            f"output_dir: {config.output_dir} cannot be written in the pods; use --set output_dir={RUNS}/NAME"
        )
    if settings.output_claim is None and not _is_address(config.checkpoint.folder):
        raise UserError(
            "checkpoints would end with the pods; give --output-claim NAME, or an object store: --set "
            "checkpoint.folder=s3://bucket/folder"
        )
    if config.device == "cuda" and not settings.gpus:
        raise UserError("device: cuda needs --gpus-per-worker")
    if config.device == "cpu" and settings.gpus:
        raise UserError("--gpus-per-worker: the run file has device: cpu")
    if config.distributed.threads is None:
        distributed = config.distributed.model_copy(update={"threads": settings.threads})
        config = config.model_copy(update={"distributed": distributed})
    return config


def as_yaml(config: RunConfig) -> str:
    """What the run file says, without the defaults."""
    tree: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)


def _is_address(path: str | None) -> bool:
    return path is not None and "://" in path


def _is_below(path: str | Path, folder: PurePosixPath) -> bool:
    pure = PurePosixPath(str(path))
    return folder in pure.parents and ".." not in pure.parts
