"""What this host, or the container on it, gives to its processes."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

from rechub_dist.errors import UserError

_FILES = 64  # that a rank has open besides its connections
_CONNECTIONS = 8  # to each other rank: of each process group, and of the exchange of ids
_SHARED = 512 << 20  # bytes of shared memory below which NCCL may fail between the ranks of a host

_PROC = Path("/proc/self/cgroup")
_SYS = Path("/sys/fs/cgroup")


def host_memory(proc: Path = _PROC, sys: Path = _SYS) -> int:
    """Bytes of memory that there are: the machine's, or what the control groups (v1 and v2) of this process allow.

    Args:
        proc: the file that names the control groups of this process.
        sys: where their file systems are mounted.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_limits(proc, sys)])


def allow_open_files(world_size: int) -> None:
    """Let this rank open as many files as it may; Linux gives less at first.

    Raises:
        UserError: not enough for its connections to the other ranks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = _FILES + _CONNECTIONS * (world_size - 1)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"a process may open {hard} files here, and a rank of {world_size} needs {needed}: raise the limit "
            f"(ulimit -Hn 65536, LimitNOFILE=, docker run --ulimit nofile=65536)"
        )


def warn_of_little_shared_memory(local_world_size: int, folder: str = "/dev/shm") -> None:
    """Say so where NCCL has little room for what the ranks of a host exchange; a container has 64 MB unless told."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return
    size = found.f_blocks * found.f_frsize
    if local_world_size > 1 and size < _SHARED:
        print(
            f"warning: {folder} has {size >> 20} MB, by which NCCL moves data between the {local_world_size} ranks of "
            f"this host; give the container more (docker --shm-size 1g, rechub-dist k8s render --shared-memory 1Gi)",
            file=sys.stderr,
            flush=True,
        )


def require_home() -> None:
    """For libraries that keep files in the user's home, as Ray does.

    Raises:
        UserError: there is none.
    """
    try:
        Path.home()
    except RuntimeError as error:
        raise UserError(
            f"user {os.getuid()} has no entry in the passwd file, and HOME is not set: set HOME to a folder that it "
            f"can write"
        ) from error


def _limits(proc: Path, sys: Path) -> Iterator[int]:
    """The limits of this process's groups and of those that they are in."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, name = sys, "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = sys / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                yield from _limit(folder / name)


def _limit(file: Path) -> Iterator[int]:
    try:
        text = file.read_text().strip()
    except OSError:  # no such group here: a container sees its own as the root
        return
    if text.isdecimal():  # not "max"
        yield int(text)
