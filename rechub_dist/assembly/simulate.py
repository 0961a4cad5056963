"""How a run would do on many GPUs: a model of one step from the plan, the dense network and the hardware's rates.

Nothing of this is measured. What each rank looks up and exchanges follows from the plan, as in a real run; the times
are bytes and operations divided by rates, plus a latency for each message, and say which part bends the curve.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from rechub_dist.assembly.estimate import Estimate, TableEstimate, estimate
from rechub_dist.assembly.flow import ROWS, random_batch
from rechub_dist.assembly.parts import build
from rechub_dist.config import RunConfig
from rechub_dist.data.spec import WEIGHTED
from rechub_dist.embedded import Lookup
from rechub_dist.embedding.layout import POOLED, REPLICATED
from rechub_dist.embedding.planning import Cluster
from rechub_dist.features import SequenceFeature

_ID = 8  # bytes
_NUMBER = 4
_LENGTH = 4  # of each row and feature, beside its ids
# What a looked-up row costs in memory traffic, in times its size: read once forward; its gradient read, and the row
# read and written, backward.
_PASSES = 4


@dataclass(frozen=True)
class Hardware:
    """Rates that a rank reaches (not peak rates), and latencies.

    Attributes:
        tflops: of matrix products, 10^12 a second.
        memory: of the GPU's memory for scattered rows, 10^9 bytes a second.
        in_host, network: from a GPU to the others of its host and to other hosts, 10^9 bytes a second each way.
        latency: of a message between hosts, microseconds.
        fixed: of each step for launching kernels and all else that does not depend on its size, milliseconds.
        overlap: whether exchanges of ids and gradients go on while a rank computes; on CPU they do not.
    """

    tflops: float = 25.0
    memory: float = 1500.0
    in_host: float = 300.0
    network: float = 35.0
    latency: float = 20.0
    fixed: float = 3.0
    overlap: bool = True


@dataclass(frozen=True)
class Traffic:
    """Bytes of one step, each of the rank that has most.

    Attributes:
        ids: received by the exchange of ids, with the number that each row has.
        vectors: sent or received by the exchange of vectors and of their gradients.
        memory: read and written by lookups and table updates.
        gradients: of dense parameters and replicated tables, which are all-reduced; the same on all ranks.
    """

    ids: float
    vectors: float
    memory: float
    gradients: float


@dataclass(frozen=True)
class Step:
    """One step on `ranks` ranks, by part, in milliseconds; what is hidden behind another part is left out, and nothing
    is hidden without `Hardware.overlap`.

    Attributes:
        rows: of a rank's batch.
        dense: forward and backward of the network.
        lookup: reading and updating the tables.
        ids: the exchange of ids, as far as it takes longer than the step before, behind which it is hidden.
        vectors: the exchange of vectors and their gradients.
        gradients: the all-reduce, as far as it takes longer than the network's backward pass.
        fixed: what no size changes.
    """

    ranks: int
    rows: float
    dense: float
    lookup: float
    ids: float
    vectors: float
    gradients: float
    fixed: float

    @property
    def parts(self) -> dict[str, float]:
        """The parts by name, in milliseconds."""
        return {name: value for name, value in asdict(self).items() if name not in ("ranks", "rows")}

    @property
    def total(self) -> float:
        """Milliseconds of the step."""
        return sum(self.parts.values())

    @property
    def samples_per_second(self) -> float:
        """Rows of all ranks in a second."""
        return 1000 * self.rows * self.ranks / self.total


def simulate(config: RunConfig, clusters: Iterable[Cluster], hardware: Hardware, *, per_rank: bool) -> list[Step]:
    """One step on each of the clusters. Local; no such hardware is needed.

    Args:
        config: the run; its global batch is divided among the ranks.
        clusters: the ranks, in ascending number.
        hardware: what each rank has.
        per_rank: the batch size is that of each rank instead, so that the global batch grows with them.

    Raises:
        UserError: the run file is wrong, or the tables do not fit.
    """
    found, flops = [], None
    for cluster in clusters:
        rows = config.data.batch_size if per_rank else config.data.batch_size / cluster.world_size
        whole = math.ceil(rows * cluster.world_size)
        planned = estimate(_with_batch(config, whole), cluster)
        if flops is None:
            flops, dense = _network(config, cluster)
        found.append(_step(planned, rows, flops, traffic(planned, whole, dense), hardware))
    return found


def traffic(planned: Estimate, batch: int, dense: int) -> Traffic:
    """Bytes of a step with a global batch of `batch` rows and `dense` bytes of dense gradients.

    Ids are taken to be spread evenly over the rows of a table, and sequences to be as long as they may be.
    """
    world = planned.cluster.world_size
    ids, memory, sent = [0.0] * world, [0.0] * world, [0.0] * world
    received, gradients = 0.0, float(dense)
    away = (world - 1) / world  # the share that does not stay on a rank
    for table in planned.tables:
        if table.collection == REPLICATED:
            gradients += table.weight_bytes
            memory = [one + _PASSES * batch / world * table.ids * table.dim * _NUMBER for one in memory]
            continue
        for shard in table.shards:
            looked_up = batch * table.ids * shard.rows / table.rows
            ids[shard.rank] += (looked_up * _ID + batch * table.features * _LENGTH) * away
            memory[shard.rank] += _PASSES * looked_up * shard.columns * _NUMBER
            vectors = _vectors(table, batch, shard.rows) * shard.columns * _NUMBER * away
            sent[shard.rank] += vectors
            received += vectors / world
    return Traffic(max(ids), 2 * max(received, *sent), max(memory), gradients)


def _vectors(table: TableEstimate, batch: float, rows: int) -> float:
    """How many vectors, or partial sums of them, a shard of so many rows gives for a batch."""
    if table.collection in (POOLED, WEIGHTED):
        return batch * table.features  # each shard of rows has a part of every sum
    return batch * table.ids * rows / table.rows


def _network(config: RunConfig, cluster: Cluster) -> tuple[float, int]:
    """Operations of the dense network for a row, forward and backward, and bytes of its parameters."""
    model = build(config, device="cpu", world_size=cluster.world_size).train_module.model
    _, embedded = random_batch(model, _longest)
    with FlopCounterMode(display=False) as counter:
        output = model.train()(embedded)
        tensors = [one for one in (output.logits, output.user, output.item) if one is not None]
        sum(one.sum() for one in tensors).backward()
    bytes_ = sum(one.numel() * _NUMBER for one in model.parameters() if one.requires_grad)
    return counter.get_total_flops() / ROWS, bytes_


def _longest(lookup: Lookup) -> int:
    return lookup.feature.max_length if isinstance(lookup.feature, SequenceFeature) else 1


def _with_batch(config: RunConfig, rows: int) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"batch_size": rows})})


def _step(planned: Estimate, rows: float, flops: float, bytes_: Traffic, hardware: Hardware) -> Step:
    world, local = planned.cluster.world_size, planned.cluster.local_world_size or 1
    hosts = world // local
    dense = rows * flops / hardware.tflops / 1e9
    exchanges = len({(t.collection, t.sharding) for t in planned.tables if t.collection != REPLICATED})
    ids = _all_to_all(bytes_.ids, world, local, hardware) + 2 * exchanges * _messages(world, local, hardware)
    vectors = _all_to_all(bytes_.vectors, world, local, hardware) + 2 * exchanges * _messages(world, local, hardware)
    # Within the hosts, then of each GPU's part between them.
    in_host = 2 * bytes_.gradients * (local - 1) / local / hardware.in_host / 1e6
    between = 2 * bytes_.gradients / local * (hosts - 1) / hosts / hardware.network / 1e6
    reduce = in_host + between + (2 * math.log2(world) * hardware.latency / 1000 if world > 1 else 0.0)
    step = Step(
        ranks=world,
        rows=rows,
        dense=dense,
        lookup=bytes_.memory / hardware.memory / 1e6,
        ids=0.0,
        vectors=vectors,
        gradients=max(0.0, reduce - dense * 2 / 3) if hardware.overlap else reduce,
        fixed=hardware.fixed,
    )
    return replace(step, ids=max(0.0, ids - step.total) if hardware.overlap else ids)


def _all_to_all(bytes_: float, world: int, local: int, hardware: Hardware) -> float:
    """Milliseconds for a rank's bytes to all others; those within its host take another way at the same time."""
    if world == 1:
        return 0.0
    within = (local - 1) / (world - 1)
    return max(bytes_ * within / hardware.in_host, bytes_ * (1 - within) / hardware.network) / 1e6


def _messages(world: int, local: int, hardware: Hardware) -> float:
    """Milliseconds that an exchange takes whatever its size: one latency, and a twentieth for each further host."""
    if world == 1:
        return 0.0
    return hardware.latency / 1000 * (1 + (world // local - 1) / 20)


def as_tree(steps: Iterable[Step], hardware: Hardware) -> dict[str, Any]:
    """In JSON types."""
    return {"modelled": True, "hardware": asdict(hardware), "steps": list(_trees(steps))}


def _trees(steps: Iterable[Step]) -> Iterator[dict[str, Any]]:
    for step in steps:
        yield {**asdict(step), "total": step.total, "samples_per_second": step.samples_per_second}
