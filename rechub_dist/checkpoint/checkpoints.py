"""The checkpoints of a run: saved beside training, verified and loaded, kept or removed."""

from __future__ import annotations

import os
import secrets
import stat
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from rechub_dist import __version__
from rechub_dist.checkpoint.find import best_manifest
from rechub_dist.checkpoint.folder import Folder, step_folder, steps_in
from rechub_dist.checkpoint.lease import Lease
from rechub_dist.checkpoint.load import read_manifest, read_tensors
from rechub_dist.checkpoint.manifest import CheckpointManifest, DamagedError, SavedRun
from rechub_dist.checkpoint.position import Position, position_of
from rechub_dist.checkpoint.publish import Publisher
from rechub_dist.checkpoint.save import RankFile, chunks_of, merge, plan_file, stage
from rechub_dist.checkpoint.tensors import Tensors
from rechub_dist.checkpoint.together import agree, no_other, reason_of, verify_together
from rechub_dist.config import CheckpointConfig, RunConfig
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.errors import UserError
from rechub_dist.reporting.saves import Save

T = TypeVar("T")
# What a checkpoint's run, by its record, its step and where it lies, has other than this run.
Differing = Callable[[Mapping[str, Any], int, str], list[str]]

# A rank that has written its part waits for the slowest one. A dead one is noticed at once, by its closed connection.
_PATIENCE = timedelta(hours=6)


def open_checkpoints(config: RunConfig, rt: Runtime, lease: Lease | None = None) -> Checkpoints:
    """The checkpoints of a run; who saves there holds the folder's lease. Collective.

    Raises:
        UserError: their address cannot be used.
    """

    def opened() -> Folder:
        folder = Folder(config.checkpoint_folder, config.checkpoint_storage)
        _check_folder("output_dir", str(config.output_dir))
        if folder.local:
            _check_folder("checkpoint.folder", folder.address)
        return folder

    return Checkpoints(rt.together(opened), rt, config.checkpoint, lease)


def _check_folder(what: str, path: str) -> None:
    """Raise UserError for a path that is no folder's, nor can be one's."""
    try:
        reason = None if stat.S_ISDIR(os.stat(path).st_mode) else "it is there and is no folder"
    except FileNotFoundError:
        return
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise UserError(f"{what}: {path} cannot be written: {reason}; choose another one")


class Checkpoints:
    """The checkpoints of one folder. All methods but `news` are collective.

    A save copies this rank's share of the state to host memory and writes it in a thread, which talks to the other
    ranks' in a process group of its own. The manifest is written last: without it there is no checkpoint. The files of
    a save have names of their own, so that saving a step anew leaves the step's old checkpoint whole until then.
    """

    def __init__(self, folder: Folder, runtime: Runtime, config: CheckpointConfig, lease: Lease | None = None) -> None:
        self.folder = folder
        self._publisher = Publisher(folder, config, lease)
        self._rt = runtime
        self._config = config
        self._group: dist.ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._buffer: Tensor | None = None
        self._news: list[Save] = []
        self._last: Save | None = None
        self._position: Position | None = None  # of what is saved, is being saved, or was loaded
        self._id: str | None = None  # of the run, in all its checkpoints

    def prepare(self) -> None:
        """Make sure that the folder can be written.

        Raises:
            UserError: it cannot.
        """

        def probe() -> None:
            name = f".writable-{secrets.token_hex(8)}"  # nobody's file
            try:
                self.folder.write(name, [memoryview(b"")])
                self.folder.delete(name)
            except Exception as error:  # whatever the store's client raises
                where, why = self.folder.address, reason_of(error)
                raise UserError(f"checkpoint.folder: {where} cannot be written: {why}; choose another one") from error

        self._rt.from_main(probe)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return self._rt.from_main(lambda: steps_in(self.folder.files()))

    def has(self, position: Position) -> bool:
        """Whether this position is saved, or was loaded; an earlier save of it is waited for."""
        if position != self._position:
            return False
        self.wait()
        return self._last is None or self._last.error is None

    def save(self, state: Tensors, position: Position, run: dict[str, Any]) -> None:
        """Begin to save; then remove what retention does not keep. An earlier save is waited for.

        `run` is what is recorded beside the position: identity, config, tables. What comes of it `news` tells; a
        failure is none of training's, and leaves older checkpoints as they are.

        Raises:
            LostError: on all ranks, with nothing written: another attempt holds the folder.
        """
        self._began = time.monotonic()
        self.wait()
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._position = position
        token = self._rt.from_main(self._publisher.begin)
        self._id = self._id or token
        name = f"rank-{self._rt.rank:05d}-{token}.safetensors"
        file = plan_file(state, self._rt.rank, self._rt.world_size, name)
        staged = None
        if self._config.asynchronous:
            staged = self._buffer = stage(file, self._buffer)
        record = {
            "id": self._id,
            "position": asdict(position),
            **run,
            "world_size": self._rt.world_size,
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"rechub_dist": __version__, "torch": str(torch.__version__)},
        }
        self._blocked = time.monotonic() - self._began
        self._thread = threading.Thread(
            target=self._finish, args=(file, staged, record, position), name="rechub-dist-checkpoint", daemon=True
        )
        self._thread.start()
        if not self._config.asynchronous:
            self.wait()

    def amend(self, position: Position) -> None:
        """Record what an evaluation of the state that was saved last has found; then clean up as a save does.

        The manifest alone is written anew, when the save is complete. A failure is told by `news`: the checkpoint is as
        good as before, and a run that goes on from it evaluates once more. Not collective.
        """
        self._position = position
        if not self._rt.is_main:
            return
        before = self._thread
        self._thread = threading.Thread(
            target=self._amend, args=(before, position), name="rechub-dist-checkpoint", daemon=True
        )
        self._thread.start()
        if not self._config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait for the save that is under way, if any."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def news(self) -> list[Save]:
        """What has come of the saves that ended since the last call."""
        found = self._news[:]
        del self._news[: len(found)]
        return found

    def close(self, seconds: float) -> None:
        """Let a save that is under way end, if it does so in time: a rank may be gone."""
        if self._thread is not None:
            self._thread.join(timeout=seconds)

    def check_last(self) -> None:
        """Wait for the last save.

        Raises:
            UserError: there is no checkpoint of it, so that what was trained since the one before would be lost.
        """
        self.wait()
        error = None if self._last is None else self._last.error
        self._rt.raise_together(
            error and f"{error}; the last steps are not saved: mend that, and the same command does them again"
        )

    def check(self, differing: Differing) -> None:
        """Refuse, with nothing written, a folder whose newest good checkpoint is of another run.

        Raises:
            UserError: as `load`, as far as manifests tell.
        """
        damage = None
        for step in reversed(self.steps()):
            try:
                self._check_run(self._opened(step), differing)
                return
            except DamagedError as error:
                damage = damage or error
        if damage is not None:
            raise self._unreadable(str(damage))

    def load(self, state: Tensors, differing: Differing) -> Position | None:
        """Load the newest good checkpoint of the run in place; None if there is none at all.

        A damaged checkpoint is refused by name, on stderr, and the one before it is taken.

        Raises:
            UserError: the checkpoint is of another run (lists the keys that differ) or of a newer version, every one
                is damaged, or the store fails.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                manifest = self._opened(step)
                self._check_run(manifest, differing)
                self._fill(manifest, state)
                self._id = manifest.run.get("id")
                self._position = position_of(manifest.run)
                return self._position
            except DamagedError as error:
                damaged.append(str(error))
                if self._rt.is_main:
                    print(f"warning: {error}; trying the checkpoint before it", file=sys.stderr, flush=True)
        if damaged:
            raise self._unreadable(damaged[0])
        return None

    def _unreadable(self, damage: str) -> UserError:
        return UserError(
            f"{self.folder.address}: no checkpoint can be read: {damage}; put back a copy of it, or choose another "
            f"output_dir (or checkpoint.folder) to start anew"
        )

    def load_best(self, state: Tensors, vocabularies: dict[str, str]) -> int:
        """Load the best checkpoint in place, or the newest where none is best; returns its step.

        Args:
            state: what to load.
            vocabularies: what identifies those that ids come from now, by feature.

        Raises:
            UserError: there is none, it is damaged, or it was trained with ids from other vocabularies.
        """
        with no_other():
            manifest = self._opened()
        trained = manifest.run["identity"]["data"].get("vocabularies", {})
        other = [name for name, fingerprint in vocabularies.items() if trained.get(name) != fingerprint]
        if other:
            raise UserError(
                f"{self.folder.address}: the vocabulary of feature {other[0]!r} is not the one that the run was "
                "trained with, so its ids mean other values; put that file back, or train anew"
            )
        with no_other():
            self._fill(manifest, state)
        return manifest.step

    def load_weights(self, state: Tensors, step: int) -> None:
        """Load one step's checkpoint in place.

        Raises:
            UserError: it is damaged.
        """
        self._fill(self._opened(step), state)

    def _finish(self, file: RankFile, staged: Tensor | None, run: dict[str, Any], position: Position) -> None:
        """What the thread does: write, agree, publish, tell. Every rank comes to the same result."""
        step, size, seconds = position.step, 0, 0.0
        error = warning = None
        name = f"{step_folder(step)}/{file.name}"
        try:
            record = None
            total = torch.tensor([file.bytes])
            dist.all_reduce(total, group=self._group)
            try:
                self.folder.check_room(int(total))
                record = self.folder.write(name, chunks_of(file, staged))
            except Exception as failure:  # whatever the store's client raises
                error = f"{self.folder.path(name)}: {reason_of(failure)}"
            parts = self._gather((file.name, record, file.tensors, error))
            if parts is not None:
                error = next((part[3] for part in parts if part[3] is not None), None)
                files = {part[0]: part[1] for part in parts if part[1] is not None}
                size = sum(found.size for found in files.values())
                if error is None:
                    error = self._publisher.publish(
                        CheckpointManifest(step, cast(SavedRun, run), files, merge([part[2] for part in parts]))
                    )
                seconds = time.monotonic() - self._began
                warning = self._publisher.clean(position, self._id, saved=error is None)
            error, warning, size, seconds = self._from_main((error, warning, size, seconds))
        except RuntimeError as failure:  # of the process group: a rank is gone, as training will find out, too
            error = f"{self.folder.path(step_folder(step))}: the ranks lost touch: {reason_of(failure)}"
        if error is not None:
            error = f"the checkpoint of step {step} could not be saved: {error}"
        blocked = self._blocked if self._config.asynchronous else seconds
        self._last = Save(step, seconds, blocked, size, error, warning)
        self._news.append(self._last)

    def _amend(self, before: threading.Thread | None, position: Position) -> None:
        """What the thread of `amend` does, after that of the save."""
        if before is not None:
            before.join()
        if self._last is not None and (self._last.step != position.step or self._last.error is not None):
            return  # there is no checkpoint of it, as was told
        warning = self._publisher.amend(position, self._id)
        if warning is not None:
            self._news.append(Save(position.step, 0.0, 0.0, 0, error=warning))

    def _gather(self, part: T) -> list[T] | None:
        """All ranks' parts on the main rank, for the thread."""
        found: list[Any] | None = [None] * self._rt.world_size if self._rt.is_main else None
        dist.gather_object(part, found, dst=0, group=self._group)
        return found

    def _from_main(self, value: T) -> T:
        """The main rank's value on all ranks, for the thread."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _opened(self, step: int | None = None) -> CheckpointManifest:
        """A checkpoint's manifest, from the main rank; without a step that of the best, else the newest."""

        def read() -> CheckpointManifest | DamagedError:
            try:
                return best_manifest(self.folder) if step is None else read_manifest(self.folder, step)
            except DamagedError as error:
                return error

        found = self._rt.from_main(read)
        if isinstance(found, DamagedError):
            raise found
        return found

    def _fill(self, manifest: CheckpointManifest, state: Tensors) -> None:
        """Verify the checkpoint and load it."""
        verify_together(self._rt, self.folder, manifest)

        def read() -> None:
            where = self.folder.path(step_folder(manifest.step))
            for key, entry in state.items():
                saved = manifest.tensors.get(key)
                if saved is not None and saved.shape != entry.shape:
                    raise DamagedError(f"checkpoint {where} has {key} as {saved.shape} instead of {entry.shape}")
            read_tensors(self.folder, manifest, state.items())

        agree(self._rt, read)

    def _check_run(self, manifest: CheckpointManifest, differing: Differing) -> None:
        """Refuse a checkpoint of another run."""
        where = self.folder.path(step_folder(manifest.step))
        found = differing(manifest.run, manifest.step, where)
        if found:
            raise UserError(
                f"{self.folder.address} holds another run; these differ (saved -> wanted): {'; '.join(found)}. "
                f"Choose another output_dir"
            )
