"""What this host, or the container on it, gives to its processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

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
