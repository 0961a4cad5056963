"""From what a user names, a run or a checkpoint, to the checkpoint."""

from __future__ import annotations

from typing import Literal

from rechub_dist.checkpoint.folder import Folder, step_of, steps_in
from rechub_dist.checkpoint.load import read_manifest
from rechub_dist.checkpoint.manifest import Manifest
from rechub_dist.config import StorageConfig, parse_yaml
from rechub_dist.data.storage import join, read_text
from rechub_dist.errors import UserError


def find_folder(address: str, settings: StorageConfig) -> tuple[Folder, int | None]:
    """The folder of checkpoints of a run, itself or one of its checkpoints; in the last case the step, too.

    Raises:
        UserError: there is no checkpoint.
    """
    base, mark, options = address.partition("?") if "://" in address else (address, "", "")
    parent, _, last = base.rstrip("/").rpartition("/")
    step = step_of(last)
    if step is not None:
        return Folder(f"{parent or '.'}{mark}{options}", settings), step
    folder = Folder(address, settings)
    if steps_in(folder.files()):
        return folder, None
    text = read_text(join(address, "config.yaml"), settings)
    if text is not None:
        named = (parse_yaml(text, join(address, "config.yaml")).get("checkpoint") or {}).get("folder")
        folder = Folder(named or join(address, "checkpoints"), settings)
        if steps_in(folder.files()):
            return folder, None
    raise UserError(
        f"{folder.address}: holds no checkpoint; name a run's output folder, its folder of checkpoints or one of these"
    )


def find_checkpoint(
    address: str, settings: StorageConfig, wanted: Literal["best", "newest"] | int = "best"
) -> tuple[Folder, Manifest]:
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


def best_manifest(folder: Folder) -> Manifest:
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
