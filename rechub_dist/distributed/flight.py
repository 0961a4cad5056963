"""This rank's last collectives from torch's flight recorder, to tell in which one a rank hangs."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_FILE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")  # the older name means the same
_DUMPS = {"nccl": "_dump_nccl_trace", "gloo": "_dump_fr_trace"}  # present if torch was built with the backend
_TOLD = 5


def dump_to(folder: Path) -> None:
    """Have NCCL's watchdog write its record to `folder/nccl-rank-<r>` when a collective times out.

    To be called before process groups are created. Settings that are already in the environment take precedence.
    """
    if not any(name in os.environ for name in _FILE):
        os.environ[_FILE[0]] = str(folder.absolute() / "nccl-rank-")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def exchanges() -> list[tuple[str, bytes]]:
    """(backend, pickled record) of each flight recorder, NCCL's and Gloo's; may block on a device that hangs.

    Without stacks, which take seconds to symbolise.
    """
    c10d = torch._C._distributed_c10d
    there = {backend: getattr(c10d, name) for backend, name in _DUMPS.items() if hasattr(c10d, name)}
    return [(backend, dump(includeStackTraces=False)) for backend, dump in there.items()]


def unfinished(dump: bytes) -> list[str]:
    """A line for each of the oldest collectives of a record that have not ended (5 at most), else for the last one."""
    entries = pickle.loads(dump).get("entries", [])  # trusted: this process wrote it
    waiting = [entry for entry in entries if not (entry.get("retired") or entry.get("state") == "completed")]
    if waiting:
        return [f"not ended: {_line(entry)}" for entry in waiting[:_TOLD]]
    return [f"ended last: {_line(entry)}" for entry in entries[-1:]]


def _line(entry: Mapping[str, Any]) -> str:
    age = time.time() - entry["time_created_ns"] / 1e9
    group = "/".join(str(name) for name in entry.get("process_group", ()) if name)
    return (
        f"{entry['profiling_name']} number {entry['collective_seq_id']} of group {group}, sizes "
        f"{entry.get('input_sizes')}, {entry.get('state')}, issued {age:.0f} s ago"
    )
