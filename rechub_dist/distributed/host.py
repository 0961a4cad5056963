"""The resources that this host, or the container on it, gives to its processes."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rechub_dist.errors import UserError

_FILES = 64  # open files of a rank besides its connections
_CONNECTIONS = 8  # to each other rank: of each process group, and of the exchange of ids
SHARED = 512 << 20  # bytes of shared memory below which NCCL may fail between the ranks of a host

_PROC = Path("/proc/self/cgroup")
_SYS = Path("/sys/fs/cgroup")


def host_memory(proc: Path = _PROC, sys: Path = _SYS) -> int:
    """Bytes of memory: the machine's, or less where the control groups (v1 or v2) of this process say so.

    Args:
        proc: the file that lists the control groups of this process.
        sys: where their file systems are mounted.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_limits(proc, sys)])


def free_memory(proc: Path = _PROC, sys: Path = _SYS, machine: Path = Path("/proc/meminfo")) -> int:
    """Bytes that may still be used: what the machine has available, or less where control groups leave less.

    Files that the kernel may drop from memory count as free.

    Args:
        proc, sys: as for `host_memory`.
        machine: where the machine tells its memory.
    """
    found = host_memory(proc, sys)
    with suppress(OSError):
        known = dict(line.split(":", 1) for line in machine.read_text().splitlines() if ":" in line)
        if "MemAvailable" in known:
            found = min(found, int(known["MemAvailable"].split()[0]) << 10)
    for folder, limit, usage in _groups(proc, sys):
        for most in _number(folder / limit):
            for used in _number(folder / usage):
                found = min(found, most - used + _droppable(folder / "memory.stat"))
    return max(0, found)


def allow_open_files(world_size: int) -> None:
    """Raise this process's soft limit of open files to the hard limit.

    Raises:
        UserError: the hard limit is too low for a rank's connections to the others.
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
    """Warn on stderr if shared memory is too small for NCCL between a host's ranks; containers default to 64 MB."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return
    size = found.f_blocks * found.f_frsize
    if local_world_size > 1 and size < SHARED:
        print(
            f"warning: {folder} has {size >> 20} MB, through which NCCL moves data between the "
            f"{local_world_size} ranks of this host; give the container more (docker --shm-size 1g, "
            f"rechub-dist k8s render --shared-memory 1Gi)",
            file=sys.stderr,
            flush=True,
        )


def require_home() -> None:
    """Check that the user has a home folder, as libraries that keep files there (Ray) need.

    Raises:
        UserError: there is none.
    """
    try:
        Path.home()
    except RuntimeError as error:
        raise UserError(
            f"user {os.getuid()} has no entry in the passwd file, and HOME is not set: set HOME to a writable folder"
        ) from error


def _limits(proc: Path, sys: Path) -> Iterator[int]:
    """The limits, in bytes, of this process's groups and of their parents."""
    for folder, limit, _ in _groups(proc, sys):
        yield from _number(folder / limit)


def _groups(proc: Path, sys: Path) -> Iterator[tuple[Path, str, str]]:
    """This process's groups and their parents, with the names of the files of limit and usage."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, names = sys, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            mount, names = sys / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                yield folder, *names


def _droppable(file: Path) -> int:
    """Bytes of a group's memory.stat that are files which nobody has used of late."""
    with suppress(OSError):
        known = dict(line.split() for line in file.read_text().splitlines())
        return int(known.get("total_inactive_file", known.get("inactive_file", 0)))
    return 0


def _number(file: Path) -> Iterator[int]:
    try:
        text = file.read_text().strip()
    except OSError:  # not visible here: a container sees its own group as the root
        return
    if text.isdecimal():  # not "max"
        yield int(text)
