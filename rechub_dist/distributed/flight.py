"""The last exchanges of this rank, as torch's flight recorder has them: for one that hangs, to tell in which."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_FILE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")  # the older name means the same
_DUMPS = {"nccl": "_dump_nccl_trace", "gloo": "_dump_fr_trace"}  # each is there where torch is built with it
_TOLD = 5


def dump_to(folder: Path) -> None:
    """Have NCCL's watchdog write its record to `folder/nccl-rank-<r>` where an exchange takes too long.

    Called before process groups are made. What the environment says already stands.
    """
    if not any(name in os.environ for name in _FILE):
        os.environ[_FILE[0]] = str(folder.absolute() / "nccl-rank-")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def exchanges() -> list[tuple[str, bytes]]:
    """What the recorders of NCCL and Gloo hold, by backend, pickled; may wait for a device that hangs.

    Without stacks, which take seconds to be made readable.
    """
    c10d = torch._C._distributed_c10d
    there = {backend: getattr(c10d, name) for backend, name in _DUMPS.items() if hasattr(c10d, name)}
    return [(backend, dump(includeStackTraces=False)) for backend, dump in there.items()]


def unfinished(dump: bytes) -> list[str]:
    """A line for each of the oldest exchanges of a record that have not ended, else for the last that has."""
    entries = pickle.loads(dump).get("entries", [])  # of this very process
    waiting = [entry for entry in entries if not (entry.get("retired") or entry.get("state") == "completed")]
    if waiting:
        return [f"not ended: {_line(entry)}" for entry in waiting[:_TOLD]]
    return [f"ended last: {_line(entry)}" for entry in entries[-1:]]


def _line(entry: Mapping[str, Any]) -> str:
    age = time.time() - entry["time_created_ns"] / 1e9
    group = "/".join(str(name) for name in entry.get("process_group", ()) if name)
    return (
        f"{entry['profiling_name']} number {entry['collective_seq_id']} of group {group}, sizes "
        f"{entry.get('input_sizes')}, {entry.get('state')}, asked for {age:.0f} s ago"
    )
