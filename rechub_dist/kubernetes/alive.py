"""Whether this pod's ranks still take steps: `python -m rechub_dist.kubernetes.alive FOLDER --seconds 600`.

For a liveness probe, which cannot know the ranks that torchrun has given to its pod: they are read from the environment
of the processes in the container. A rank touches `rank-<n>` in FOLDER at each step.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def ranks() -> Iterator[tuple[int, float]]:
    """The ranks among the processes that may be looked at, and the time, in seconds since 1970, each began."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            environment = dict(
                item.split(b"=", 1) for item in (process / "environ").read_bytes().split(b"\0") if b"=" in item
            )
            if b"TORCHELASTIC_RUN_ID" in environment and environment.get(b"RANK", b"").isdigit():
                yield int(environment[b"RANK"]), process.stat().st_mtime


def stalled(folder: Path, seconds: float) -> list[int]:
    """The ranks whose file is older than `seconds`. One without a step since it began is starting, not stalled."""
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
    parser = argparse.ArgumentParser(prog="python -m rechub_dist.kubernetes.alive")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    arguments = parser.parse_args()
    found = stalled(arguments.folder, arguments.seconds)
    if found:
        sys.exit(f"no step for {arguments.seconds:g} s by rank {', '.join(map(str, found))}")


if __name__ == "__main__":
    main()
