"""A run's parts -> sharded over its ranks, as all of them have agreed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchrec.distributed.model_parallel import DistributedModelParallel

from rechub_dist.assembly.cluster import agreed_cluster
from rechub_dist.assembly.parts import Parts
from rechub_dist.config import CommunicationConfig
from rechub_dist.distributed.batchnorm import globalize
from rechub_dist.distributed.runtime import Runtime
from rechub_dist.embedding.planning import Cluster, Planned, kind_of, make_plan
from rechub_dist.embedding.sharding import mark_optimizers, shard
from rechub_dist.errors import UserError


@dataclass(frozen=True)
class Agreed:
    """The plan of all ranks, None where nothing is sharded, and the ranks that it was made for."""

    cluster: Cluster
    plan: Planned | None


def agree_on_plan(parts: Parts, rt: Runtime, *, trains: bool = True) -> Agreed:
    """Plan where a run's tables lie. Collective.

    The plan is the main rank's: one that each rank made for itself would be another on another host.

    Args:
        trains: whether the run's pipeline is to train it, for which kernels may have to be prepared, and which a plan
            that the run file names is for.

    Raises:
        UserError: the tables do not fit, the ranks are not of one run, or the run file names a plan of another run.
    """
    config = parts.config
    if trains:
        rt.together(lambda: refuse_exchange(config.embedding.communication, rt.device.type))
    cluster = agreed_cluster(parts, rt)
    mark_optimizers(parts.train_module, parts.layout)
    pipeline, pinned = (config.distributed.pipeline, config.embedding.plan) if trains else ("base", None)
    return Agreed(cluster, rt.from_main(lambda: planned(parts, cluster, pipeline, pinned)))


def shard_train_module(
    parts: Parts, rt: Runtime, *, trains: bool = True, agreed: Agreed | None = None
) -> DistributedModelParallel:
    """Shard a run's tables, make batch normalisation global, and put DDP around the rest. Collective.

    The tables are to be loaded then, or drawn (`draw_tables`); until then their weights are whatever was in memory.

    Args:
        trains: as of `agree_on_plan`.
        agreed: what that has returned, if it was called.

    Raises:
        UserError: as `agree_on_plan`.
    """
    config, layout = parts.config, parts.layout
    agreed = agreed or agree_on_plan(parts, rt, trains=trains)
    communication = config.embedding.communication if trains else None
    globalize(parts.train_module.model)
    sharding = None if agreed.plan is None else agreed.plan.sharding
    return shard(parts.train_module, layout, sharding, rt.group, rt.device, config.distributed.bucket_mb, communication)


def planned(
    parts: Parts, cluster: Cluster, pipeline: Literal["auto", "base", "sparse_dist"], pinned: Path | None = None
) -> Planned | None:
    """The plan of a run's tables, whose optimizers are marked; raises as `make_plan`. Not collective."""
    config, layout = parts.config, parts.layout
    kind = kind_of(pipeline, layout, cluster.device, skips=config.train.on_non_finite == "skip")
    return make_plan(parts.train_module, layout, cluster, config.data.batch_size, kind, pinned)


def refuse_exchange(communication: CommunicationConfig, device: str) -> None:
    """Raise UserError for a precision in which ranks on `device` cannot exchange vectors in training."""
    for key in ("forward", "backward"):
        if device == "cpu" and getattr(communication, key) == "bf16":
            raise UserError(f"embedding.communication.{key}: bf16 cannot be exchanged on CPU; use fp16 or fp32")
