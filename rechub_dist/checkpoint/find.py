"""From what a user names, a run or a checkpoint, to the checkpoint."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import BaseModel, ValidationError

from rechub_dist.checkpoint.folder import Folder, step_of, steps_in
from rechub_dist.checkpoint.load import read_manifest
from rechub_dist.checkpoint.manifest import CheckpointManifest
from rechub_dist.config import StorageConfig, parse_yaml
from rechub_dist.data.parquet.storage import join, read_text
from rechub_dist.errors import UserError


class _Data(BaseModel):
    storage: StorageConfig | None = None


class _Checkpoint(_Data):
    folder: str | None = None


class _Stored(BaseModel):
    """What is needed of an output folder's config.yaml; keys of other versions are of no matter."""

    checkpoint: _Checkpoint | None = None
    data: _Data | None = None


def find_folder(address: str, settings: StorageConfig | None) -> tuple[Folder, int | None]:
    """The folder of checkpoints of a run, itself or one of its checkpoints; in the last case the step, too.

    Without settings of the storage those are taken that the run's config.yaml has, if there is one.

    Raises:
        UserError: there is no checkpoint.
    """
    base, mark, options = address.partition("?") if "://" in address else (address, "", "")
    parent, _, last = base.rstrip("/").rpartition("/")
    step = step_of(last)
    if step is not None:
        return Folder(f"{parent or '.'}{mark}{options}", settings or StorageConfig()), step
    folder = Folder(address, settings or StorageConfig())
    if steps_in(folder.files()):
        return folder, None
    named, known = _named(address, folder.settings)
    for place in dict.fromkeys([named or join(address, "checkpoints"), join(address, "checkpoints")]):
        folder = Folder(place, settings or known)
        if steps_in(folder.files()):
            return folder, None
    raise UserError(
        f"{address}: holds no checkpoint; name a run's output folder, its folder of checkpoints or one of these"
    )


def _named(address: str, settings: StorageConfig) -> tuple[str | None, StorageConfig]:
    """The folder of checkpoints that an output folder's config.yaml names, and its storage's settings."""
    path = join(address, "config.yaml")
    text = read_text(path, settings)
    if text is None:
        return None, settings
    try:
        found = _Stored.model_validate_json(json.dumps(parse_yaml(text, path), default=str))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: {where}: {first['msg']}; mend it, or name the folder of checkpoints itself"
        ) from error
    checkpoint, data = found.checkpoint or _Checkpoint(), found.data or _Data()
    return checkpoint.folder, checkpoint.storage or data.storage or settings


def find_checkpoint(
    address: str, settings: StorageConfig | None, wanted: Literal["best", "newest"] | int = "best"
) -> tuple[Folder, CheckpointManifest]:
    """The checkpoint that is meant by an address, and `wanted` where that leaves a choice; files are there in full.

    Raises:
        UserError: there is none.
        DamagedError: it is damaged.
    """
    folder, step = find_folder(address, settings)
    if step is not None:
        return folder, read_manifest(folder, step)
    if wanted == "best":
        return folder, best_manifest(folder)
    steps = steps_in(folder.files())
    step = steps[-1] if wanted == "newest" else wanted
    if step not in steps:
        raise UserError(f"{folder.address}: no checkpoint of step {step}; there are those of {steps}")
    return folder, read_manifest(folder, step)


def best_manifest(folder: Folder) -> CheckpointManifest:
    """The best checkpoint of a run, or the newest where none is best or that one is gone.

    Raises:
        UserError: there is none.
        DamagedError: its manifest, or the newest one's, which knows the best, is damaged.
    """
    steps = steps_in(folder.files())
    if not steps:
        raise UserError(f"{folder.address}: holds no checkpoint; train the run first")
    newest = read_manifest(folder, steps[-1])
    best = newest.run["position"]["best_step"]
    return read_manifest(folder, best) if best in steps else newest
