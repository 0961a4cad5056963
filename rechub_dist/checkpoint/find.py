"""From what a user names, a run or a checkpoint, to the checkpoint."""

from __future__ import annotations

from typing import Literal

from rechub_dist.checkpoint.folder import Folder, step_of, steps_in
from rechub_dist.checkpoint.load import read_manifest
from rechub_dist.checkpoint.manifest import CheckpointManifest
from rechub_dist.config import StorageConfig, parse_yaml
from rechub_dist.data.parquet.storage import join, read_bytes
from rechub_dist.errors import UserError, shown
from rechub_dist.typed import validated


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
    text = read_bytes(path, settings)
    if text is None:
        return None, settings
    tree = parse_yaml(text, path)
    checkpoint, data = tree.get("checkpoint") or {}, tree.get("data") or {}
    if not isinstance(checkpoint, dict) or not isinstance(data, dict):
        raise UserError(f"{path}: checkpoint and data are sections; write a mapping of keys to values")
    tree = checkpoint.get("storage") or data.get("storage") or {}
    known = validated(f"{path}: the settings of storage are not valid", StorageConfig, tree)
    folder = checkpoint.get("folder")
    if not isinstance(folder, str | None):
        raise UserError(f"{path}: checkpoint.folder: write a path or an address, got {shown(folder)}")
    return folder, known


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
