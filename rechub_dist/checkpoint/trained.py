"""The configuration of a run that was trained, for those who use its weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rechub_dist.checkpoint.find import best_manifest, find_folder
from rechub_dist.checkpoint.folder import step_folder
from rechub_dist.checkpoint.manifest import MANIFEST
from rechub_dist.checkpoint.together import no_other
from rechub_dist.config import RunConfig, StorageConfig, stored_run
from rechub_dist.config.code import refuse_code
from rechub_dist.errors import UserError


def trained_config(
    address: str,
    overrides: Iterable[str] = (),
    settings: StorageConfig | None = None,
    allowed_code: Iterable[str] = (),
) -> RunConfig:
    """The configuration that the best checkpoint at an address was trained with, from the checkpoint itself.

    A `config.yaml` there may be of another time: it only says where the checkpoints are. `checkpoint.folder` and
    `output_dir` of what is returned are where these were found, whatever they were in training. All other paths are as
    in training (relative ones to the working directory), unless `overrides` (`data.root=...`) say what has moved.

    Args:
        address: a run's output folder or its folder of checkpoints; path or address.
        overrides: `section.key=value`.
        settings: of the checkpoints' storage; default: what config.yaml says.
        allowed_code: modules that may be imported where the checkpoint names them. They are looked for where
            `overrides` say (`code=...`), in the working directory and among what is installed, not where the checkpoint
            says: whoever allows a module means their own.

    Raises:
        UserError: there is no checkpoint, the newest one is damaged, or the overrides do not fit; it
            names code that is not allowed.
    """
    folder, step = find_folder(address, settings)
    if step is not None:
        raise UserError(f"{address}: is one checkpoint; name the run's output folder, of which the best one is taken")
    with no_other():
        manifest = best_manifest(folder)
    where = folder.path(f"{step_folder(manifest.step)}/{MANIFEST}")
    overrides = list(overrides)
    config = stored_run(manifest.run["config"], where, overrides)
    code = config.code if any(change.startswith("code=") for change in overrides) else None
    refuse_code(config.model_dump(), allowed_code, where, config.code if code is None else None)
    checkpoint = config.checkpoint.model_copy(update={"folder": folder.address, "storage": folder.settings})
    return config.model_copy(update={"output_dir": Path(address), "checkpoint": checkpoint, "code": code})
