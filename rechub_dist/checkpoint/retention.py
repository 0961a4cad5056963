"""Retention: which checkpoints of a run are kept, and how the others are deleted without touching other files."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from rechub_dist.checkpoint.folder import Folder, step_folder, step_of, steps_in
from rechub_dist.checkpoint.load import read_manifest
from rechub_dist.checkpoint.manifest import MANIFEST, DamagedError
from rechub_dist.checkpoint.position import Position
from rechub_dist.config import CheckpointConfig

# Files that a save writes before its manifest names them; the token is random.
_WRITTEN = re.compile(r"rank-\d{5,}-[0-9a-f]{8}\.safetensors|manifest\.json\.tmp")


def clean(folder: Folder, config: CheckpointConfig, position: Position, run: str | None, *, saved: bool) -> None:
    """Delete checkpoints that are not kept, and partial files of failed or killed saves. Call on one rank only.

    Only files that this run's manifests name, or that are named like a save's files, are deleted. Checkpoints of later
    steps stay: they were found damaged when the run was resumed.

    Args:
        folder: the checkpoint folder.
        config: which checkpoints are kept.
        position: position of the save that just ended.
        run: the `id` in this run's checkpoints.
        saved: whether that save succeeded; if not, all checkpoints stay.
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
    """The files of a step's checkpoint; None unless its manifest shows that it belongs to this run."""
    try:
        found = read_manifest(folder, step)
    except DamagedError:
        return None
    # None: written before checkpoints had an id
    return list(found.files) if found.run.get("id") in (None, run) else None


def _leftovers(files: Iterable[str], whole: Collection[str]) -> dict[str, list[str]]:
    """Partial files of saves by step folder, for step folders not in `whole`."""
    found: dict[str, list[str]] = {}
    for path in files:
        folder, _, name = path.partition("/")
        if step_of(folder) is not None and folder not in whole and _WRITTEN.fullmatch(name):
            found.setdefault(folder, []).append(name)
    return found
