"""Find the checkpoint that a user refers to by a run's folder or by the checkpoint itself."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from rechub_dist.checkpoint.folder import Folder, step_of, steps_in
from rechub_dist.checkpoint.load import read_manifest
from rechub_dist.checkpoint.manifest import CheckpointManifest
from rechub_dist.config import StorageConfig, stored_tree
from rechub_dist.data.parquet.storage import join, read_bytes
from rechub_dist.errors import UserError
from rechub_dist.typed import validated


class _Data(BaseModel):
    storage: StorageConfig | None = None


class _Checkpoint(_Data):
    folder: str | None = None


class _Stored(BaseModel):
    """What is needed of an output folder's config.yaml; keys of other versions are of no matter."""

    checkpoint: _Checkpoint | None = None
    data: _Data | None = None


def find_folder(address: str, settings: StorageConfig | None) -> tuple[Folder, int | None]:
    """Find the checkpoint folder, given an output folder, a checkpoint folder or a single checkpoint.

    Without `settings`, the storage settings of the run's config.yaml are used, if it exists.

    Returns:
        The folder, and the step if the address is a single checkpoint, else None.

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
        f"{address}: holds no checkpoint; name a run's output folder, checkpoint folder or a single checkpoint"
    )


def _named(address: str, settings: StorageConfig) -> tuple[str | None, StorageConfig]:
    """The checkpoint folder that an output folder's config.yaml names, None by default, and its storage settings."""
    path = join(address, "config.yaml")
    text = read_bytes(path, settings)
    if text is None:
        return None, settings
    tree = stored_tree(text, path)
    try:
        found = validated(path, _Stored, tree)
    except UserError as error:
        raise UserError(f"{error}; correct it, or name the folder of checkpoints itself") from error
    checkpoint, data = found.checkpoint or _Checkpoint(), found.data or _Data()
    return checkpoint.folder, checkpoint.storage or data.storage or settings


def find_checkpoint(
    address: str, settings: StorageConfig | None, wanted: Literal["best", "newest"] | int = "best"
) -> tuple[Folder, CheckpointManifest]:
    """Find the checkpoint at an address, and `wanted` of a run's checkpoints; checks that all files have full size.

    Raises:
        UserError: there is no such checkpoint.
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
        raise UserError(f"{folder.address}: no checkpoint of step {step}; available steps: {steps}")
    return folder, read_manifest(folder, step)


def best_manifest(folder: Folder) -> CheckpointManifest:
    """The manifest of a run's best checkpoint, or of the newest if none is marked best or that one is missing.

    Raises:
        UserError: there is no checkpoint.
        DamagedError: its manifest, or that of the newest checkpoint, which records the best step, is damaged.
    """
    steps = steps_in(folder.files())
    if not steps:
        raise UserError(f"{folder.address}: holds no checkpoint; train the run first")
    newest = read_manifest(folder, steps[-1])
    best = newest.run["position"]["best_step"]
    return read_manifest(folder, best) if best in steps else newest
