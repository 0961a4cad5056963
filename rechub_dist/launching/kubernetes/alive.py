"""Liveness probe of a pod: `python -m rechub_dist.launching.kubernetes.alive FOLDER --seconds 600`.

A probe cannot know which ranks its pod runs, so they are read from the environment of the processes in the pod. A rank
touches `rank-<n>` in FOLDER every five seconds while it makes progress.
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
    """Yield the (rank, start time in seconds since 1970) of each readable rank process in this pod."""
    booted = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(encoding="ascii"), re.MULTILINE)
    assert booted is not None
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            variables = (process / "environ").read_bytes().split(b"\0")
            environment = dict(variable.split(b"=", 1) for variable in variables if b"=" in variable)
            if b"TORCHELASTIC_RUN_ID" in environment and environment.get(b"RANK", b"").isdigit():
                # the command name, in parentheses, may contain anything; the start time is the 20th field after it
                ticks = int(
                    (process / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
                )
                yield int(environment[b"RANK"]), int(booted[1]) + ticks / os.sysconf("SC_CLK_TCK")


def stalled(folder: Path, seconds: float) -> list[int]:
    """The ranks whose file was last touched over `seconds` ago. A rank that has not touched it yet is starting."""
    now = time.time()
    found = set()
    for rank, began in ranks():
        with contextlib.suppress(FileNotFoundError):
            touched = (folder / f"rank-{rank}").stat().st_mtime
            if touched >= began and now - touched > seconds:
                found.add(rank)
    return sorted(found)


def main() -> None:
    """Exit with code 1 and a line on stderr if a rank is stalled."""
    parser = argparse.ArgumentParser(prog="python -m rechub_dist.launching.kubernetes.alive")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    arguments = parser.parse_args()
    found = stalled(arguments.folder, arguments.seconds)
    if found:
        sys.exit(f"no heartbeat for {arguments.seconds:g} s from rank {', '.join(map(str, found))}")


if __name__ == "__main__":
    main()
