"""The checkpoints of a run: saved in the background, verified, loaded, and removed by retention."""

from __future__ import annotations

import os
import secrets
import stat
import sys
import threading
import time
from collections.abc import Callable, Mapping
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
from rechub_dist.checkpoint.manifest import (
    CheckpointManifest,
    DamagedError,
    FileRecord,
    SavedRun,
    SavedTensor,
    no_other,
)
from rechub_dist.checkpoint.position import Position, position_of
from rechub_dist.checkpoint.publish import Publisher
from rechub_dist.checkpoint.save import Hold, HostCopy, RankFile, chunks_of, merge, plan_file, stage
from rechub_dist.checkpoint.tensors import Tensors
from rechub_dist.checkpoint.together import agree, reason_of, verify_together
from rechub_dist.config import CheckpointConfig, RunConfig
from rechub_dist.distributed.host import free_memory
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.errors import UserError, shortened
from rechub_dist.reporting.saves import Save

T = TypeVar("T")
# What a rank tells of its part: the file's name and record, its tensors, an error.
_Part = tuple[str, FileRecord | None, dict[str, SavedTensor], str | None]
_TOLD = 4  # differences between two runs that one line tells
# (record of the checkpoint's run, its step, its path) -> how that run differs from this one, one line per key.
Differing = Callable[[Mapping[str, Any], int, str], list[str]]

# A rank that has written its part waits for the slowest one. A dead rank is detected at once by its closed connection.
_PATIENCE = timedelta(hours=6)


def open_checkpoints(config: RunConfig, rt: Runtime, lease: Lease | None = None) -> Checkpoints:
    """Open the checkpoint folder of a run; saving requires its lease. Collective: call on every rank.

    Raises:
        UserError: the address is invalid, or a file.
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
        reason = None if stat.S_ISDIR(os.stat(path).st_mode) else "it is not a folder"
    except FileNotFoundError:
        return
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise UserError(f"{what}: {path} cannot be written: {reason}; choose another folder")


class Checkpoints:
    """The checkpoints in one folder. Collective, call on every rank: all methods but `amend`, `news`, `wait`, `close`.

    A save copies this rank's share of the state to host memory and writes it in a thread, which communicates with the
    other ranks' threads in a process group of its own. What does not fit into the memory for the copy is written first,
    from the live tensors, and training waits for that. The manifest is written last: without it there is no checkpoint.
    Each save uses new file names, so saving a step again keeps its old checkpoint intact until the new one is complete.
    """

    def __init__(self, folder: Folder, runtime: Runtime, config: CheckpointConfig, lease: Lease | None = None) -> None:
        self.folder = folder
        self._publisher = Publisher(folder, config, lease)
        self._rt = runtime
        self._config = config
        self._group: dist.ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._buffer: Tensor | None = None
        self._memory: int | None = None  # bytes for the copy, once it is known
        self._news: list[Save] = []
        self._last: Save | None = None
        self._position: Position | None = None  # of what is saved, is being saved, or was loaded
        self._id: str | None = None  # of the run, the same in all its checkpoints

    def prepare(self) -> None:
        """Check that the folder is writable. Collective: call on every rank.

        Raises:
            UserError: it is not.
        """

        def probe() -> None:
            name = f".writable-{secrets.token_hex(8)}"  # a new name
            try:
                self.folder.write(name, [memoryview(b"")])
                self.folder.delete(name)
            except Exception as error:  # whatever the store's client raises
                where, why = self.folder.address, reason_of(error)
                raise UserError(
                    f"checkpoint.folder: {where} cannot be written: {why}; choose another folder"
                ) from error

        self._rt.from_main(probe)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first. Collective: call on every rank."""
        return self._rt.from_main(lambda: steps_in(self.folder.files()))

    def has(self, position: Position) -> bool:
        """Whether this position is saved, or was loaded; an earlier save of it is waited for."""
        if position != self._position:
            return False
        self.wait()
        return self._last is None or self._last.error is None

    def save(self, state: Tensors, position: Position, run: dict[str, Any]) -> None:
        """Start a save, after which retention removes old checkpoints. Waits for the previous save.

        Collective: call on every rank. `news` returns the result. A failure does not stop training, and leaves older
        checkpoints unchanged.

        Args:
            state: the tensors to save.
            position: the training position.
            run: recorded beside the position: identity, config, tables.

        Raises:
            LostError: on all ranks, with nothing written: another process holds the folder.
        """
        began = time.monotonic()
        self.wait()
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._position = position
        if self._memory is None:
            self._memory = self._memory_for_copy()
        token = self._rt.from_main(self._publisher.begin)
        self._id = self._id or token
        name = f"rank-{self._rt.rank:05d}-{token}.safetensors"
        file = plan_file(state, self._rt.rank, self._rt.world_size, name)
        copy, hold = stage(file, self._memory, self._buffer), Hold(began)
        self._buffer = copy.staged
        if not copy.live:
            hold.end()
        record = {
            "id": self._id,
            "position": position.saved(),
            **run,
            "world_size": self._rt.world_size,
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"rechub_dist": __version__, "torch": str(torch.__version__)},
        }
        self._thread = threading.Thread(
            target=self._finish,
            args=(file, copy, hold, record, position),
            name="rechub-dist-checkpoint",
            daemon=True,
        )
        self._thread.start()
        hold.wait()
        if not self._config.asynchronous:
            self.wait()

    def amend(self, position: Position) -> None:
        """Record the result of evaluating the state saved last, then apply retention. Not collective.

        Only the manifest is rewritten, once the save is complete. `news` reports a failure: the checkpoint stays
        intact, and a run that resumes from it evaluates again.
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
        """Wait for the save in progress, if any. Not collective."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def news(self) -> list[Save]:
        """The results of saves that ended since the last call. Not collective."""
        found = self._news[:]
        del self._news[: len(found)]
        return found

    def close(self, seconds: float) -> None:
        """Wait for the save in progress, at most `seconds`, since a rank may have died. Not collective."""
        if self._thread is not None:
            self._thread.join(timeout=seconds)

    def check_last(self) -> None:
        """Wait for the last save. Collective: call on every rank.

        Raises:
            UserError: it failed, so that the steps since the checkpoint before it are not saved.
        """
        self.wait()
        error = None if self._last is None else self._last.error
        self._rt.raise_together(
            error and f"{error}; the last steps are not saved: fix that and run the same command again"
        )

    def check(self, differing: Differing) -> None:
        """Refuse a folder whose newest intact checkpoint belongs to another run. Reads manifests only, writes nothing.

        Collective: call on every rank.

        Raises:
            UserError: as `load`.
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
        """Load the newest intact checkpoint into `state`; returns its position, None if there is no checkpoint.

        Collective: call on every rank. A damaged checkpoint is named on stderr, and the one before it is tried.

        Raises:
            UserError: the checkpoint belongs to another run (lists the keys that differ) or to a newer version, all
                checkpoints are damaged, or the store fails.
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
            f"{self.folder.address}: no checkpoint can be read: {damage}; restore it from a copy, or choose another "
            f"output_dir (or checkpoint.folder) to start from scratch"
        )

    def load_best(self, state: Tensors, vocabularies: dict[str, str], step: int | None = None) -> int:
        """Load the best checkpoint, or the newest if none is marked best, into `state`; returns its step.

        Collective: call on every rank.

        Args:
            state: the tensors to fill.
            vocabularies: fingerprints of the current vocabularies, by feature.
            step: of another checkpoint.

        Raises:
            UserError: there is no checkpoint, it is damaged, or it was trained with other vocabularies.
        """
        with no_other():
            manifest = self._opened(step)
        trained = manifest.run["identity"]["data"].get("vocabularies", {})
        other = [name for name, fingerprint in vocabularies.items() if trained.get(name) != fingerprint]
        if other:
            raise UserError(
                f"{self.folder.address}: the vocabulary of feature {other[0]!r} is not the one that the run was "
                "trained with, so its ids have other meanings; restore that file, or train again"
            )
        with no_other():
            self._fill(manifest, state)
        return manifest.step

    def load_weights(self, state: Tensors, step: int) -> None:
        """Load the weights of one step's checkpoint into `state`. Collective: call on every rank.

        Raises:
            UserError: it is damaged.
        """
        self._fill(self._opened(step), state)

    def _memory_for_copy(self) -> int:
        """Bytes of host memory that this rank's copy may take."""
        if not self._config.asynchronous:
            return 0
        if self._config.copy_gb is not None:
            return int(self._config.copy_gb * (1 << 30))
        return free_memory() // 2 // self._rt.local_world_size

    def _finish(
        self,
        file: RankFile,
        copy: HostCopy,
        hold: Hold,
        run: dict[str, Any],
        position: Position,
    ) -> None:
        """The save thread: write, agree, publish and report; all ranks get the same result."""
        step, size, seconds = position.step, 0, 0.0
        error = warning = None
        name = f"{step_folder(step)}/{file.name}"
        try:
            record = None
            total = torch.tensor([file.bytes])
            dist.all_reduce(total, group=self._group)
            try:
                self.folder.check_room(int(total))
                record = self.folder.write(name, chunks_of(file, copy, hold))
            except Exception as failure:  # whatever the store's client raises
                error = f"{self.folder.path(name)}: {reason_of(failure)}"
            hold.end()
            parts = self._gather((file.name, record, file.tensors, error))
            if parts is not None:
                error, size = self._publish(step, run, parts)
                seconds = time.monotonic() - hold.began
                warning = self._publisher.clean(position, self._id, saved=error is None)
            error, warning, size, seconds = self._from_main((error, warning, size, seconds))
        except RuntimeError as failure:  # from the process group: a rank has died, as training will notice, too
            error = f"{self.folder.path(step_folder(step))}: lost contact with another rank: {reason_of(failure)}"
        finally:
            hold.end()
        if error is not None:
            error = f"the checkpoint of step {step} could not be saved: {error}"
        self._last = Save(step, seconds, hold.seconds if self._config.asynchronous else seconds, size, error, warning)
        self._news.append(self._last)

    def _publish(self, step: int, run: dict[str, Any], parts: list[_Part]) -> tuple[str | None, int]:
        """Make the checkpoint of all ranks' parts visible. Main rank; returns an error, or None, and its bytes."""
        files = {name: record for name, record, _, _ in parts if record is not None}
        error = next((error for _, _, _, error in parts if error is not None), None)
        if error is None:
            try:
                manifest = CheckpointManifest(step, cast(SavedRun, run), files, merge([part[2] for part in parts]))
                error = self._publisher.publish(manifest)
            except Exception as failure:  # a fault of ours, of which the other ranks must hear all the same
                error = f"{self.folder.path(step_folder(step))}: {reason_of(failure)}"
        return error, sum(found.size for found in files.values())

    def _amend(self, before: threading.Thread | None, position: Position) -> None:
        """The thread of `amend`, which first waits for that of the save."""
        if before is not None:
            before.join()
        if self._last is not None and (self._last.step != position.step or self._last.error is not None):
            return  # the save failed, as already reported
        warning = self._publisher.amend(position, self._id)
        if warning is not None:
            self._news.append(Save(position.step, 0.0, 0.0, 0, error=warning))

    def _gather(self, part: T) -> list[T] | None:
        """Gather all ranks' parts on the main rank, in the thread's process group."""
        found: list[Any] | None = [None] * self._rt.world_size if self._rt.is_main else None
        dist.gather_object(part, found, dst=0, group=self._group)
        return found

    def _from_main(self, value: T) -> T:
        """Broadcast the main rank's value, in the thread's process group."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _opened(self, step: int | None = None) -> CheckpointManifest:
        """A checkpoint's manifest, read by the main rank; without a step, that of the best, else the newest."""

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
        """Verify the checkpoint and load it into `state`."""
        verify_together(self._rt, self.folder, manifest)

        def read() -> None:
            where = self.folder.path(step_folder(manifest.step))
            for key, entry in state.items():
                saved = manifest.tensors.get(key)
                if saved is not None and saved.shape != entry.shape:
                    raise DamagedError(
                        f"checkpoint {where} has {key} with shape {saved.shape} instead of {entry.shape}"
                    )
            read_tensors(self.folder, manifest, state.items())

        agree(self._rt, read)

    def _check_run(self, manifest: CheckpointManifest, differing: Differing) -> None:
        """Refuse a checkpoint of another run."""
        where = self.folder.path(step_folder(manifest.step))
        found = [shortened(line, 100) for line in differing(manifest.run, manifest.step, where)]
        if found:
            more = f"; and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
            raise UserError(
                f"{self.folder.address} holds another run; these differ (saved -> wanted): "
                f"{'; '.join(found[:_TOLD])}{more}. Choose another output_dir"
            )
