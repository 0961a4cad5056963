"""Describe a checkpoint, and compare two; in one process, block by block."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rechub_dist.checkpoint.folder import Folder, step_folder, steps_in
from rechub_dist.checkpoint.load import read_manifest, read_rows
from rechub_dist.checkpoint.manifest import CheckpointManifest, DamagedError, NewerError
from rechub_dist.config.versions import with_current_keys

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorSummary:
    """One tensor of a checkpoint: `pieces` is the number saved by the ranks, `norm` is Euclidean."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: int
    sharding: str | None
    norm: float


def list_checkpoints(folder: Folder) -> list[dict[str, Any]]:
    """One dict per checkpoint, oldest first: step, path, best, bytes, world_size, saved_at, metrics.

    An unreadable checkpoint has step, path, best and the reason: `damage`, or `newer` if a newer version wrote it.
    """
    steps = steps_in(folder.files())
    found: list[dict[str, Any]] = []
    best = None
    for step in steps:
        path = folder.path(step_folder(step))
        try:
            manifest = read_manifest(folder, step)
        except DamagedError as error:
            found.append({"step": step, "path": path, "damage": str(error)})
            continue
        except NewerError as error:
            found.append({"step": step, "path": path, "newer": str(error)})
            continue
        position = manifest.run["position"]
        best = position["best_step"]
        found.append(
            {
                "step": step,
                "path": path,
                "bytes": manifest.bytes,
                "world_size": manifest.run["world_size"],
                "saved_at": manifest.run["saved_at"],
                "metrics": position["best_metrics"] if best == step else {},
            }
        )
    return [{**line, "best": line["step"] == best} for line in found]


def inspect_checkpoint(folder: Folder, manifest: CheckpointManifest) -> dict[str, Any]:
    """Describe a checkpoint as a dict: position, data settings, model, versions, files, tables, plan and tensors."""
    tables = manifest.run["tables"]
    tensors = []
    for name, saved in manifest.tensors.items():
        table = name.split("/", 1)[1].rpartition("/")[0] if name.startswith("tables/") else None
        sharding = tables[table]["sharding"] if table in tables else None
        squares = sum(float(block.double().square().sum()) for block in read_rows(folder, manifest, name))
        summary = TensorSummary(name, saved.dtype, saved.shape, len(saved.pieces), sharding, math.sqrt(squares))
        tensors.append(asdict(summary))
    run = manifest.run
    try:
        data = with_current_keys(run["identity"])["data"]
    except ValueError as error:
        raise DamagedError(f"{folder.path(step_folder(manifest.step))}: {error}") from error
    return {
        "path": folder.path(step_folder(manifest.step)),
        "step": manifest.step,
        "position": run["position"],
        "data": {
            key: data.get(key) for key in ("batch_size", "order", "shuffle", "shuffle_rows", "max_streams", "drop_last")
        },
        "model": run["identity"]["model"].get("name"),
        "seed": run["identity"]["seed"],
        "world_size": run["world_size"],
        "saved_at": run["saved_at"],
        "versions": run["versions"],
        "bytes": manifest.bytes,
        "files": {name: record.size for name, record in manifest.files.items()},
        "tables": tables,
        "plan": run.get("plan"),  # None where a version before there was one has saved it
        "tensors": tensors,
    }


def diff_checkpoints(
    first: tuple[Folder, CheckpointManifest], second: tuple[Folder, CheckpointManifest]
) -> list[dict[str, Any]]:
    """The tensors that differ, one dict each: `name` and `difference` (missing on one side, shape or type, `values`).

    For `values` also `elements`, the number of bitwise different elements, and `largest`, the largest absolute
    difference.
    """
    (folder, manifest), (other_folder, other) = first, second
    found: list[dict[str, Any]] = []
    for name in sorted({*manifest.tensors, *other.tensors}):
        a, b = manifest.tensors.get(name), other.tensors.get(name)
        if a is None or b is None:
            found.append({"name": name, "difference": f"only in the {'second' if a is None else 'first'}"})
            continue
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            found.append({"name": name, "difference": f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"})
            continue
        differing, largest = 0, 0.0
        for left, right in zip(read_rows(folder, manifest, name), read_rows(other_folder, other, name), strict=True):
            bits = _BITS[left.dtype.itemsize]
            unequal = left.view(bits) != right.view(bits)
            differing += int(unequal.sum())
            if unequal.any():
                largest = max(largest, float((left.double() - right.double())[unequal].abs().max()))
        if differing:
            found.append({"name": name, "difference": "values", "elements": differing, "largest": largest})
    return found
