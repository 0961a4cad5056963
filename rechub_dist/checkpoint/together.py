"""What all ranks do with a checkpoint together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rechub_dist.checkpoint.folder import Folder
from rechub_dist.checkpoint.load import blocks_of, consume, verify
from rechub_dist.checkpoint.manifest import CheckpointManifest, DamagedError
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.errors import one_line


def agree(rt: Runtime, work: Callable[[], None]) -> None:
    """Do this rank's share of a checkpoint; all ranks raise where any of them finds it damaged. Collective.

    Raises:
        DamagedError: the first rank's.
        UserError: a store that fails.
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


@contextmanager
def no_other() -> Iterator[None]:
    """Say what to do about damage in the block, where no other checkpoint is tried."""
    try:
        yield
    except DamagedError as error:
        raise DamagedError(f"{error}; put back a copy of it, or name another checkpoint") from error


def verify_together(rt: Runtime, folder: Folder, manifest: CheckpointManifest) -> None:
    """Compare all of a checkpoint with its checksums, each rank a share of it. Collective; raises as `agree`."""
    agree(rt, lambda: consume(verify(folder, manifest, blocks_of(manifest, rt.rank, rt.world_size))))


def reason_of(error: BaseException) -> str:
    """Why something could not be written, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)[:300] or type(error).__name__
