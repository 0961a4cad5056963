"""Whether the ranks of this pod still get on: `python -m rechub_dist.launching.kubernetes.alive FOLDER --seconds 600`.

For a liveness probe, which cannot know the ranks that its pod has been given: they are read from the environment
of the processes in the pod. A rank touches `rank-<n>` in FOLDER every five seconds while it gets on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def ranks() -> Iterator[tuple[int, float]]:
    """The ranks among the processes that may be looked at, and when each began, in seconds since 1970."""
    booted = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(encoding="ascii"), re.MULTILINE)
    assert booted is not None
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            variables = (process / "environ").read_bytes().split(b"\0")
            environment = dict(variable.split(b"=", 1) for variable in variables if b"=" in variable)
            if b"TORCHELASTIC_RUN_ID" in environment and environment.get(b"RANK", b"").isdigit():
                # the command's name, in parentheses, may hold anything; the start is the 20th field behind it
                ticks = int(
                    (process / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
                )
                yield int(environment[b"RANK"]), int(booted[1]) + ticks / os.sysconf("SC_CLK_TCK")


def stalled(folder: Path, seconds: float) -> list[int]:
    """The ranks whose file is older than `seconds`. One without a touch since it began is starting, not stalled."""
    now = time.time()
    found = set()
    for rank, began in ranks():
        with contextlib.suppress(FileNotFoundError):
            touched = (folder / f"rank-{rank}").stat().st_mtime
            if touched >= began and now - touched > seconds:
                found.add(rank)
    return sorted(found)


def main() -> None:
    """Exit code 1 and a line on stderr where a rank is stalled."""
    parser = argparse.ArgumentParser(prog="python -m rechub_dist.launching.kubernetes.alive")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    arguments = parser.parse_args()
    found = stalled(arguments.folder, arguments.seconds)
    if found:
        sys.exit(f"no sign of life for {arguments.seconds:g} s by rank {', '.join(map(str, found))}")


if __name__ == "__main__":
    main()
