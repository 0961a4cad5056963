"""The ranks of a run, as all of them have agreed on it before anything is planned or exchanged."""

from __future__ import annotations

import hashlib
import json
import socket
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import nn

from rechub_dist import __version__
from rechub_dist.assembly.code import fingerprints
from rechub_dist.assembly.parts import Parts
from rechub_dist.distributed.host import host_memory
from rechub_dist.distributed.runtime import Runtime, environment
from rechub_dist.embedding.planning import Cluster, memory_for_tables
from rechub_dist.errors import UserError

_SHARE = 0.8  # of memory, for sharded tables
_COPIES = 5  # of a parameter that each rank holds: itself, its gradient, that in DDP's buckets, and Adam's two moments
_PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")


def agreed_cluster(parts: Parts, rt: Runtime) -> Cluster:
    """What all ranks can go by: the least memory of any, and the number of ranks a host where all have the same.

    Collective.

    Raises:
        UserError: the ranks are not of one run: other versions of what computes, another configuration, or tables or
            parameters of other shapes. Training would go on, each rank with its own mathematics.
    """
    rank, world, local_rank, local_world = environment()
    memory, assumed = _memory(parts, rt)
    own: dict[str, Any] = {
        "host": socket.gethostname(),
        "place": (rank, local_rank, local_world),
        "memory": memory,
        "assumed": assumed,
        "host_memory": memory_for_tables(host_memory(), rt.local_world_size),
        "facts": _facts(parts),
    }
    ranks = rt.gather_list([own])
    _refuse_unlike(ranks)
    regular = all(found["place"] == (number, number % local_world, local_world) for number, found in enumerate(ranks))
    uniform = regular and world % local_world == 0
    device: Literal["cpu", "cuda"] = "cuda" if rt.device.type == "cuda" else "cpu"
    least = min(ranks, key=lambda found: found["memory"])
    return Cluster(
        world,
        local_world if uniform else None,
        device,
        least["memory"],
        host_memory=min(found["host_memory"] for found in ranks),
        assumed=least["assumed"],
    )


def _facts(parts: Parts) -> dict[str, str]:
    """What must be the same on all ranks, by name: as it is, or a digest of it."""
    config = parts.config.model_dump(mode="json")
    mathematics = {key: config[key] for key in ("seed", "model", "objective", "embedding", "optimizer", "train")}
    for placement in ("memory_per_rank_gb", "plan"):
        mathematics["embedding"].pop(placement)
    tables = {name: asdict(placed) for name, placed in parts.layout.tables.items()}
    shapes = {name: list(value.shape) for name, value in parts.train_module.model.state_dict().items()}
    schema = {"schema": config["data"]["dataset"], "batch_size": parts.config.data.batch_size}
    found = {"rechub_dist": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {
        "run file": _digest(mathematics),
        "data set's schema": _digest(schema),
        "tables": _digest(tables),
        "model's parameters": _digest(shapes),
        **{f"the code of {name}": digest for name, digest in fingerprints(parts.config).items()},
    }


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _refuse_unlike(ranks: list[dict[str, Any]]) -> None:
    first = ranks[0]
    for number, found in enumerate(ranks):
        for name in dict.fromkeys([*first["facts"], *found["facts"]]):
            here, there = first["facts"].get(name, "none"), found["facts"].get(name, "none")
            if here != there:
                raise UserError(
                    f"rank {number} on host {found['host']} and rank 0 on host {first['host']} differ in {name} "
                    f"({there} and {here}): all ranks of a run need the same"
                )


def _memory(parts: Parts, rt: Runtime) -> tuple[int, str]:
    """What this rank may give to sharded tables, and why so much: of its device, or an equal share of its host."""
    given = parts.config.embedding.memory_per_rank_gb
    if given is not None:
        return int(given * 1024**3), "embedding.memory_per_rank_gb"
    if rt.device.type != "cuda":
        return memory_for_tables(host_memory(), rt.local_world_size), ""
    total = torch.cuda.get_device_properties(rt.device).total_memory
    rest = _COPIES * unsharded_bytes(parts.train_module)
    assumed = f"{_SHARE:.0%} of its {total / 1024**3:.3g} GB"
    if rest:
        assumed += f" less {rest / 1024**3:.2g} GB for what each rank holds: dense parameters, replicated tables"
    return max(0, memory_for_tables(total) - rest), assumed


def unsharded_bytes(train_module: nn.Module) -> int:
    """Of the parameters that each rank holds whole."""
    sharded = ("stage.pooled.", "stage.unpooled.")
    return sum(
        p.numel() * p.element_size() for name, p in train_module.named_parameters() if not name.startswith(sharded)
    )
