"""A run in plain torch: whole global batches in one process, without torchrec, ranks or our optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rechub_dist.assembly.parts import build
from rechub_dist.batch import Batch
from rechub_dist.config import StorageConfig
from rechub_dist.data.counts import count_positives
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.reader import ParquetReader
from rechub_dist.embedded import Embedded, Jagged
from rechub_dist.embedding.local import LocalTables
from rechub_dist.embedding.stage import split_dense
from rechub_tests.runs import config_of


class PlainRun:
    """What a run file describes, with its initial weights, and the batches that it trains on."""

    def __init__(self, path: Path) -> None:
        self.config = config_of(path)
        self.parts = build(self.config, device="cpu", world_size=1)
        self.model, self.objective = self.parts.train_module.model, self.parts.train_module.objective
        self.tables = LocalTables(self.parts.layout.lookups, self.config.seed)
        self.placed = {name: table.optimizer for name, table in self.parts.layout.tables.items()}

    def batches(self) -> Iterator[Batch]:
        """Those of all epochs."""
        config, objective = self.config, self.objective
        manifest = Manifest.read(f"{config.data.root}/{config.data.train}")
        spec = self.parts.spec
        if (negatives := objective.negatives) is not None:
            if negatives.needs_counts:
                negatives.set_counts(count_positives(manifest, negatives.item.feature, negatives.learned_history))
            drawn = negatives.draw_weights(StorageConfig())
            spec = replace(spec, cumulative={} if drawn is None else {"negatives": np.cumsum(drawn)})
        reader = ParquetReader(manifest, spec, batch_size=config.data.batch_size, seed=config.seed)
        for epoch in range(config.train.epochs):
            yield from reader.batches(epoch)

    def loss(self, batch: Batch, look_up: Callable[..., Embedded] | None = None) -> Tensor:
        """Of a whole global batch, float []."""
        embedded = (look_up or self.tables)(self.ids(batch), split_dense(batch.dense, self.parts.spec.dense))
        batch.weight_sums = self.objective.weight_sums(batch)
        return self.objective(self.model(embedded), embedded, batch)

    def ids(self, batch: Batch) -> dict[str, Jagged]:
        """Of all features."""
        return {
            name: Jagged(batch.feature(name).values(), batch.feature(name).lengths(), batch.id_weights.get(name))
            for name in self.parts.layout.features
        }

    def looked_up(self, batch: Batch) -> dict[str, Tensor]:
        """By table, bool [rows]: which rows the batch reads."""
        found = {name: torch.zeros(len(self.tables.weight(name)), dtype=torch.bool) for name in self.placed}
        ids = self.ids(batch)
        for lookup in self.parts.layout.lookups:
            found[lookup.table.name][ids[lookup.feature.name].values] = True
        return found

    def train(self, update: Callable[[int, Batch], None]) -> list[float]:
        """The losses of all steps; `update` changes the weights, given their gradients, the step from 0 and the batch.

        It may leave gradients as they are: they are cleared.
        """
        found = []
        for step, batch in enumerate(self.batches()):
            self.model.zero_grad()
            self.objective.zero_grad()
            self.tables.zero_grad()
            loss = self.loss(batch)
            loss.backward()
            update(step, batch)
            found.append(loss.item())
        return found

    def weights(self) -> dict[str, Tensor]:
        """All trained weights, by their canonical names."""
        tables = {
            f"tables/{name}/weight": self.tables.weight(name).detach()[:, : placed.table.dim]
            for name, placed in self.parts.layout.tables.items()
        }
        return tables | {f"dense/{name}": value.detach() for name, value in self.model.named_parameters()}


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def rowwise_adagrad_(weight: nn.Parameter, state: Tensor, lr: float, eps: float = 1e-8) -> None:
    """Row-wise Adagrad from its definition: one accumulator a row, the mean of the squared gradient."""
    assert weight.grad is not None
    state += weight.grad.square().mean(dim=1)
    weight -= lr * weight.grad / (state.sqrt() + eps)[:, None]


def assert_same_weights(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """As wholes: adaptive steps blow a rounding error up where a row's gradient is next to nothing."""
    for name, weight in wanted.items():
        assert (found[name] - weight).norm() <= tolerance * weight.norm(), name
