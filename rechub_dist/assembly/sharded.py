"""A run's parts -> sharded over its ranks, as all of them have agreed."""

from __future__ import annotations

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


def shard_train_module(
    parts: Parts, rt: Runtime, *, trains: bool = True, notes: list[str] | None = None
) -> DistributedModelParallel:
    """Plan and shard a run's tables, make batch normalisation global, and put DDP around the rest. Collective.

    The tables are to be loaded then, or drawn (`draw_tables`); until then their weights are whatever was in memory.
    The plan is the main rank's: one that each rank made for itself would be another on another host.

    Args:
        trains: whether the run's pipeline is to train it, for which kernels may have to be prepared.
        notes: gets what the plan has assumed.

    Raises:
        UserError: the tables do not fit, or the ranks are not of one run.
    """
    config, layout = parts.config, parts.layout
    communication = config.embedding.communication if trains else None
    if communication is not None:
        rt.together(lambda: refuse_exchange(communication, rt.device.type))
    cluster = agreed_cluster(parts, rt)
    mark_optimizers(parts.train_module, layout)
    plan = rt.from_main(lambda: planned(parts, cluster, config.distributed.pipeline if trains else "base"))
    if notes is not None and plan is not None and plan.note:
        notes.append(plan.note)
    globalize(parts.train_module.model)
    sharding = None if plan is None else plan.sharding
    return shard(parts.train_module, layout, sharding, rt.group, rt.device, config.distributed.bucket_mb, communication)


def planned(parts: Parts, cluster: Cluster, pipeline: Literal["auto", "base", "sparse_dist"]) -> Planned | None:
    """The plan of a run's tables, whose optimizers are marked; raises as `make_plan`. Not collective."""
    config, layout = parts.config, parts.layout
    kind = kind_of(pipeline, layout, cluster.device, skips=config.train.on_non_finite == "skip")
    return make_plan(parts.train_module, layout, cluster, config.data.batch_size, kind)


def refuse_exchange(communication: CommunicationConfig, device: str) -> None:
    """Raise UserError for a precision in which ranks on `device` cannot exchange vectors in training."""
    for key in ("forward", "backward"):
        if device == "cpu" and getattr(communication, key) == "bf16":
            raise UserError(f"embedding.communication.{key}: bf16 cannot be exchanged on CPU; use fp16 or fp32")
