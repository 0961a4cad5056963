"""The barest TorchRec loop of DeepFM, on batches that lie in (pinned) memory: no reading, no bookkeeping."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from on_gpu.common import DENSE, DENSE_LR, DIM, HIDDEN, SPARSE, TABLE_LR, Sampler, Setting
from rechub_dist.batch import Batch

LINEAR = 4  # the kernels want widths of a multiple of 4, so a first-order weight takes 4


class DeepFM(nn.Module):
    """Loss, and the same without its graph, as TorchRec's pipeline wants them."""

    def __init__(self, tables: list[EmbeddingBagConfig]) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(device=torch.device("meta"), tables=tables)
        self.linear = nn.Linear(len(DENSE), 1, bias=False)
        sizes = itertools.pairwise([len(SPARSE) * DIM + len(DENSE), *HIDDEN])
        layers = [layer for a, b in sizes for layer in (nn.Linear(a, b), nn.ReLU())]
        self.mlp = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 1))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        found = self.ebc(batch.jagged["pooled"])
        x = torch.cat([found[f"{name}@{name}"] for name in SPARSE], dim=1)
        first = torch.cat([found[f"{name}@{name}_linear"] for name in SPARSE], dim=1)
        fields = x.unflatten(1, (len(SPARSE), DIM))
        pairs = 0.5 * (fields.sum(1).square() - fields.square().sum(1)).sum(1)
        linear = first.view(-1, len(SPARSE), LINEAR)[:, :, 0].sum(1) + self.linear(batch.dense).squeeze(1)
        logits = linear + pairs + self.mlp(torch.cat([x, batch.dense], dim=1)).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels[:, 0])
        return loss, loss.detach()


def bare(setting: Setting) -> None:
    """Samples/s by batch size, of a plain loop and of TorchRec's pipeline."""
    dist.init_process_group(
        "nccl" if setting.device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    try:
        for size in setting.batches:
            for how in ("plain", "pipeline"):
                with setting.guarded("bare", batch=size, how=how):
                    _measure(setting, size, how)
    finally:
        dist.destroy_process_group()


def _measure(setting: Setting, size: int, how: str) -> None:
    step = _loop(setting, size, how)
    warm, steps = (3, 3) if setting.small else (20, 50)
    for _ in range(warm):
        step()
    rates = []
    with Sampler(setting.device) as sampler:
        for _ in range(4):
            setting.wait()
            began = time.perf_counter()
            for _ in range(steps):
                step()
            setting.wait()
            rates.append(steps * size / (time.perf_counter() - began))
    spread = [round(min(rates)), round(max(rates))]
    middle = round(statistics.median(rates))
    setting.tell("bare", batch=size, how=how, samples_per_s=middle, spread=spread, **sampler.told())


def _loop(setting: Setting, size: int, how: str) -> Callable[[], Any]:
    """A function that trains on the next batch."""
    device = torch.device(setting.device)
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(
            name=f"{name}{suffix}", embedding_dim=width, num_embeddings=setting.vocabulary, feature_names=[name]
        )
        for suffix, width in (("", DIM), ("_linear", LINEAR))
        for name in SPARSE
    ]
    model = DeepFM(tables)
    _apply_optimizer_in_backward(RowWiseAdagrad, model.ebc.parameters(), {"lr": TABLE_LR, "eps": 1e-8})
    sharders: list[Any] = [EmbeddingBagCollectionSharder()]
    constraint = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=1, local_world_size=1, compute_device=setting.device),
        batch_size=size,
        constraints={table.name: constraint for table in tables},
    )
    module = DistributedModelParallel(model, device=device, plan=planner.plan(model, sharders), sharders=sharders)
    module.train()
    optimizer = torch.optim.Adam([*model.linear.parameters(), *model.mlp.parameters()], lr=DENSE_LR)
    feed = itertools.cycle([_batch(setting, size) for _ in range(8)])
    if how == "pipeline":
        pipeline = TrainPipelineSparseDist(module, optimizer, device, execute_all_batches=True)
        return lambda: pipeline.progress(feed)

    def step() -> None:
        batch = next(feed)
        if device.type == "cuda":
            batch = batch.to(device, non_blocking=True)
        optimizer.zero_grad()
        module(batch)[0].backward()
        optimizer.step()

    return step


def _batch(setting: Setting, size: int) -> Batch:
    ids = (torch.rand(len(SPARSE) * size).pow(4) * setting.vocabulary).long().clamp(max=setting.vocabulary - 1)
    jagged = KeyedJaggedTensor(SPARSE, ids, lengths=torch.ones(len(SPARSE) * size, dtype=torch.int32))
    labels = torch.randint(2, (size, 1)).float()
    batch = Batch(size, torch.randn(size, len(DENSE)), {"pooled": jagged}, labels)
    return batch.pin_memory() if setting.device == "cuda" else batch
