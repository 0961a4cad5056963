"""Export a checkpoint as one safetensors file, and load that file into a model and its tables in one process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from rechub_dist.checkpoint.folder import Folder, step_folder
from rechub_dist.checkpoint.load import read_rows
from rechub_dist.checkpoint.manifest import CheckpointManifest, SavedTensor
from rechub_dist.checkpoint.tensors import DTYPES, framed
from rechub_dist.data.parquet.outputs import check_file, whole_file
from rechub_dist.data.parquet.overlap import refuse_overlap
from rechub_dist.embedding.local import LocalTables
from rechub_dist.errors import UserError, nearest

_WHAT = "a consolidated checkpoint"


def check_target(folder: Folder, manifest: CheckpointManifest, out: Path) -> None:
    """Check, before the work, that `consolidate` may write `out`.

    Raises:
        UserError: it is inside the checkpoint that is read, is a folder, or is another kind of file.
    """
    refuse_overlap(str(out), [folder.path(step_folder(manifest.step))])
    check_file(out, _is_consolidated, _WHAT)


def _is_consolidated(path: Path) -> bool:
    """Whether a file was written by `consolidate`."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {"step", "model", "config"} <= (file.metadata() or {}).keys()
    except (OSError, SafetensorError):
        return False


def consolidate(folder: Folder, manifest: CheckpointManifest, out: Path, *, optimizer: bool = False) -> Iterator[int]:
    """Write the weights, and with `optimizer` the optimizer states, to one file under their canonical names.

    Yields the size in bytes of each block written; at most one block of 64 MiB is in memory. The file appears when it
    is complete, and only replaces an earlier consolidated checkpoint. Its metadata has `step`, `model` and `config`
    (YAML).

    Raises:
        UserError: the file cannot or may not be written (`check_target`).
        DamagedError: the checkpoint cannot be read.
    """
    chosen = {
        name: saved
        for name, saved in manifest.tensors.items()
        if optimizer or name.startswith("dense/") or name.endswith("/weight")
    }
    # Largest element types first, so that every tensor is aligned to its element size.
    names = sorted(chosen, key=lambda name: -DTYPES[chosen[name].dtype].itemsize)
    run = manifest.run
    metadata = {"format": "pt", "step": str(manifest.step), "model": run["identity"]["model"]["name"]}
    header: dict[str, object] = {"__metadata__": {**metadata, "config": run["config"]}}
    offset = 0
    for name in names:
        end = offset + _bytes(chosen[name])
        header[name] = {"dtype": chosen[name].dtype, "shape": chosen[name].shape, "data_offsets": [offset, end]}
        offset = end
    check_target(folder, manifest, out)
    with whole_file(out, _is_consolidated, _WHAT) as partial, partial.open("wb") as file:
        file.write(framed(header))
        for name in names:
            for block in read_rows(folder, manifest, name):
                file.write(block.view(-1).view(torch.uint8).numpy().data)
                yield block.numel() * block.dtype.itemsize


@torch.no_grad()
def load_consolidated(path: str | Path, model: nn.Module, tables: LocalTables) -> None:
    """Load a consolidated checkpoint into a model and its tables, tensor by tensor.

    Raises:
        UserError: a table or parameter is missing from the file, or has another shape there.
    """
    targets = {f"dense/{name}": value for name, value in model.state_dict().items()}
    for name, table in tables.specs.items():
        targets[f"tables/{name}/weight"] = tables.weight(name)[:, : table.dim]
    with safe_open(str(path), framework="pt") as file:
        names = set(file.keys())
        for name, target in targets.items():
            if name not in names:
                raise UserError(f"{path}: has no {name}: {nearest(name, names)}")
            value = file.get_tensor(name)
            if value.shape != target.shape:
                raise UserError(
                    f"{path}: {name} has shape {list(value.shape)}, but {list(target.shape)} is needed; build the "
                    f"model as the run did"
                )
            target.copy_(value)


def _bytes(saved: SavedTensor) -> int:
    return math.prod(saved.shape) * DTYPES[saved.dtype].itemsize
