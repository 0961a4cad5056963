"""Collective operations on checkpoints."""

from __future__ import annotations

from collections.abc import Callable

from rechub_dist.checkpoint.folder import Folder
from rechub_dist.checkpoint.load import blocks_of, consume, verify
from rechub_dist.checkpoint.manifest import CheckpointManifest, DamagedError
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.errors import one_line


def agree(rt: Runtime, work: Callable[[], None]) -> None:
    """Run `work` on this rank's share of a checkpoint; if any rank finds it damaged, all raise.

    Collective: call on every rank.

    Raises:
        DamagedError: that of the lowest rank, on all ranks.
        UserError: the store fails.
    """
    found: list[str] = []

    def guarded() -> None:
        try:
            work()
        except DamagedError as error:
            found.append(str(error))

    rt.together(guarded)
    damage = rt.gather_list(found)
    if damage:
        raise DamagedError(damage[0])


def verify_together(rt: Runtime, folder: Folder, manifest: CheckpointManifest) -> None:
    """Verify all checksums of a checkpoint, a share per rank. Collective: call on every rank; raises as `agree`."""
    agree(rt, lambda: consume(verify(folder, manifest, blocks_of(manifest, rt.rank, rt.world_size))))


def reason_of(error: BaseException) -> str:
    """The reason of a failed write, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)[:300] or type(error).__name__
