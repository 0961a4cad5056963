"""The main rank's changes to a checkpoint folder: publish a checkpoint, amend it, remove old ones."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import cast

from rechub_dist.checkpoint.coverage import check_coverage
from rechub_dist.checkpoint.folder import Folder, step_folder
from rechub_dist.checkpoint.lease import Lease
from rechub_dist.checkpoint.load import read_manifest
from rechub_dist.checkpoint.manifest import MANIFEST, CheckpointManifest, SavedRun, render
from rechub_dist.checkpoint.position import Position
from rechub_dist.checkpoint.retention import clean
from rechub_dist.checkpoint.together import reason_of
from rechub_dist.config import CheckpointConfig


class Publisher:
    """Changes the visible state of a folder while its lease is held. Main rank only; not collective.

    All methods but `begin` run in a thread beside training and raise nothing: they return an error message, or None.
    """

    def __init__(self, folder: Folder, config: CheckpointConfig, lease: Lease | None) -> None:
        self._folder = folder
        self._config = config
        self._lease = lease

    def begin(self) -> str:
        """Draw the token in the file names of a save.

        Raises:
            LostError: another process holds the folder.
        """
        if self._lease is not None:
            self._lease.check()
        return secrets.token_hex(4)

    def publish(self, manifest: CheckpointManifest) -> str | None:
        """Write the manifest, once all files are written: it makes the checkpoint visible."""
        folder = step_folder(manifest.step)
        try:
            check_coverage(manifest, self._folder.path(folder))
            self._fence()
            for name, record in manifest.files.items():
                if self._folder.size(f"{folder}/{name}") != record.size:
                    return (
                        f"{self._folder.path(f'{folder}/{name}')}: the main rank does not see this file as it was "
                        f"written; choose a folder that all hosts share"
                    )
            self._folder.replace(f"{folder}/{MANIFEST}", render(manifest))
        except Exception as failure:  # whatever the store's client raises
            return f"{self._folder.path(f'{folder}/{MANIFEST}')}: {reason_of(failure)}"
        return None

    def amend(self, position: Position, run_id: str | None) -> str | None:
        """Record another position of the same step in its manifest, then apply retention."""
        try:
            saved = read_manifest(self._folder, position.step)
            run = cast(SavedRun, {**saved.run, "position": position.saved()})
            self._fence()
            self._folder.replace(f"{step_folder(position.step)}/{MANIFEST}", render(replace(saved, run=run)))
            return self.clean(position, run_id, saved=True)
        except Exception as failure:  # whatever the store's client raises
            where = self._folder.path(step_folder(position.step))
            return f"{where}: the evaluation result cannot be recorded: {reason_of(failure)}"

    def clean(self, position: Position, run_id: str | None, *, saved: bool) -> str | None:
        """Apply retention."""
        try:
            self._fence()
            clean(self._folder, self._config, position, run_id, saved=saved)
        except Exception as failure:  # whatever the store's client raises
            return f"{self._folder.address}: old checkpoints cannot be removed: {reason_of(failure)}"
        return None

    def _fence(self) -> None:
        if self._lease is not None:
            self._lease.fence()
