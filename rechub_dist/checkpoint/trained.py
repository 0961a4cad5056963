"""The configuration of a trained run, for evaluation and prediction."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rechub_dist.checkpoint.find import best_manifest, find_folder
from rechub_dist.checkpoint.folder import step_folder
from rechub_dist.checkpoint.manifest import MANIFEST, no_other
from rechub_dist.config import RunConfig, StorageConfig, stored_run
from rechub_dist.config.code import refuse_code
from rechub_dist.errors import UserError


def trained_config(
    address: str,
    overrides: Iterable[str] = (),
    settings: StorageConfig | None = None,
    allowed_code: Iterable[str] = (),
) -> RunConfig:
    """Return the configuration that the best checkpoint at an address was trained with.

    It comes from the checkpoint; a `config.yaml` there may have changed since, and only locates the checkpoints.
    `checkpoint.folder` and `output_dir` are set to where the checkpoints were found. All other paths are as in training
    (relative ones to the working directory), unless `overrides` such as `data.root=...` say that they moved.

    Args:
        address: a run's output folder or checkpoint folder; path or address.
        overrides: `section.key=value`.
        settings: storage settings of the checkpoints; default: those of config.yaml.
        allowed_code: modules that the checkpoint may refer to. They are searched in the folder of an override
            `code=...`, the working directory and among installed packages, never where the checkpoint says: to allow a
            module means to allow one's own.

    Raises:
        UserError: there is no checkpoint, the newest one is damaged, an override is invalid, or the checkpoint refers
            to code that is not allowed.
    """
    folder, step = find_folder(address, settings)
    if step is not None:
        raise UserError(
            f"{address}: is a single checkpoint; name the run's output folder, whose best checkpoint is used"
        )
    with no_other():
        manifest = best_manifest(folder)
    where = folder.path(f"{step_folder(manifest.step)}/{MANIFEST}")
    overrides = list(overrides)
    config = stored_run(manifest.run["config"], where, overrides)
    code = config.code if any(change.startswith("code=") for change in overrides) else None
    refuse_code(config.model_dump(), allowed_code, where, config.code if code is None else None)
    checkpoint = config.checkpoint.model_copy(update={"folder": folder.address, "storage": folder.settings})
    return config.model_copy(update={"output_dir": Path(address), "checkpoint": checkpoint, "code": code})
