"""Which checkpoints of a run are kept, and how the others go without anything else going."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from rechub_dist.checkpoint.folder import Folder, step_folder, step_of, steps_in
from rechub_dist.checkpoint.load import read_manifest
from rechub_dist.checkpoint.manifest import MANIFEST, DamagedError
from rechub_dist.checkpoint.position import Position
from rechub_dist.config import CheckpointConfig

# What a save writes before there is a manifest that names it; the token is drawn.
_WRITTEN = re.compile(r"rank-\d{5,}-[0-9a-f]{8}\.safetensors|manifest\.json\.tmp")


def clean(folder: Folder, config: CheckpointConfig, position: Position, run: str | None, *, saved: bool) -> None:
    """Remove what retention does not keep, and leftovers of saves that failed or were killed; one process for all.

    Only files that manifests of this run name, or whose names are as saves give them, are removed. Checkpoints of later
    steps stay: they were found to be damaged when the run was taken up.

    Args:
        folder: of the run's checkpoints.
        config: what is kept.
        position: of the save that has just ended.
        run: what the run's checkpoints have as `id`.
        saved: whether that save is good; else all checkpoints stay.
    """
    files = folder.files()
    complete = steps_in(files)
    steps = [step for step in complete if step <= position.step]
    keep = {*steps[-config.keep_last :], position.best_step}
    if config.keep_every:
        keep |= {step for step in steps if step % config.keep_every == 0}
    for step in steps if saved else []:
        if step not in keep and (known := _ours(folder, step, run)) is not None:
            folder.remove(step_folder(step), [MANIFEST, *known])
    named = _ours(folder, position.step, run) if position.step in complete else []
    whole = {step_folder(step) for step in complete if step != position.step or named is None}
    for name, names in _leftovers(files, whole).items():
        if left := set(names) - set(named or []):
            folder.remove(name, left)


def _ours(folder: Folder, step: int, run: str | None) -> list[str] | None:
    """The files of a checkpoint of this run; None where its manifest does not show that it is one."""
    try:
        found = read_manifest(folder, step)
    except DamagedError:
        return None
    # None: from before checkpoints said of which run they are
    return list(found.files) if found.run.get("id") in (None, run) else None


def _leftovers(files: Iterable[str], whole: Collection[str]) -> dict[str, list[str]]:
    """The names by folder of files that saves write, in the folders of steps that are not `whole`."""
    found: dict[str, list[str]] = {}
    for path in files:
        folder, _, name = path.partition("/")
        if step_of(folder) is not None and folder not in whole and _WRITTEN.fullmatch(name):
            found.setdefault(folder, []).append(name)
    return found
