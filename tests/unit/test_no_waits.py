"""No forward and backward pass makes the host wait for its device: the batch tells all that the host has to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from rechub_dist.assembly.parts import build
from rechub_dist.batch import Batch
from rechub_dist.config import StorageConfig
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.reader import ParquetReader
from rechub_dist.distributed.batchnorm import globalize
from rechub_dist.models import catalogue
from rechub_dist.objectives.retrieval import NEGATIVES
from rechub_tests.runs import config_of, run_file, write_data
from rechub_tests.waits import waits

REPLICATED = {"sharding": "replicated", "optimizer": {"name": "adam", "lr": 0.02}}
LOSSES = ("bce", "gbce", "softmax", "bpr", "bpr_max", "top1_max", "hinge")
NEGATIVES_FROM: tuple[dict[str, Any], ...] = (
    {"negatives": "in_batch", "loss": "softmax"},
    {"negatives": "in_batch_and_sampled", "loss": "softmax", "sampling": {"name": "popularity"}},
    {"negatives": "full", "loss": "softmax"},
    {"negatives": "sampled", "share_negatives": True, "loss": "softmax", "sampling": {"name": "popularity"}},
    *({"negatives": "in_batch", "loss": loss} for loss in LOSSES),
    *({"negatives": "sampled", "loss": loss} for loss in LOSSES),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("waits") / "data"
    write_data(found)
    return found


@pytest.fixture(params=[1, 2])
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """Ranks whose collectives do nothing: there is nothing in a tensor on `meta` to exchange."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


def check(path: Path, ranks: int) -> None:
    """Two steps of a run's train module on `meta`; in the second, nothing is copied from or to the host.

    TorchRec's collections, which a run shards, are taken as they are.
    """
    parts = build(config_of(path), device="cpu", world_size=ranks)
    objective, spec = parts.train_module.objective, parts.spec
    if (negatives := objective.negatives) is not None:
        negatives.set_counts(torch.ones(negatives.item.table.rows))
        weights = negatives.draw_weights(StorageConfig())
        if weights is not None:
            spec = replace(spec, cumulative={NEGATIVES: np.cumsum(weights)})
    manifest = Manifest.read(f"{parts.config.data.root}/train")
    batches = ParquetReader(manifest, spec, batch_size=64, world_size=ranks, prefetch=0).batches(0)
    train_module = parts.train_module.to("meta").train()
    globalize(train_module.model)
    for number in range(2):  # what is moved once is, in the first
        batch = next(batches)
        batch.weight_sums = objective.weight_sums(batch)
        objective.prepare(batch)
        batch.candidates = batch.candidates and batch.candidates * ranks
        batch = batch.to(torch.device("meta"))
        with waits() as found:
            train_module(batch)[0].backward()
        assert number == 0 or not found, found
    assert all(parameter.grad is not None for parameter in train_module.model.parameters())


@pytest.mark.parametrize("placement", ["sharded", "replicated"])
@pytest.mark.parametrize("model", catalogue())
def test_no_model_waits(root: Path, tmp_path: Path, ranks: int, model: str, placement: str) -> None:
    more = {"embedding": REPLICATED} if placement == "replicated" else {}
    check(run_file(tmp_path, root, model, **more), ranks)


@pytest.mark.parametrize(
    ("model", "settings"),
    [*(("SASRec", settings) for settings in NEGATIVES_FROM), *(("NARM", settings) for settings in NEGATIVES_FROM[:4])],
    ids=lambda found: found if isinstance(found, str) else f"{found['negatives']}-{found['loss']}",
)
def test_no_loss_of_retrieval_waits(
    root: Path, tmp_path: Path, ranks: int, model: str, settings: dict[str, Any]
) -> None:
    check(run_file(tmp_path, root, model, objective={"name": "retrieval", "num_negatives": 2, **settings}), ranks)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x.new_tensor([1.0]),
        lambda x: x[torch.arange(2)],
        lambda x: x.index_select(0, torch.arange(2)),
        lambda _: torch.ones(2).to("meta"),
    ],
)
def test_copies_are_seen(work: Callable[[Tensor], Any]) -> None:
    x = torch.empty(4, device="meta")
    with waits() as found:
        x + 1, x.sum(), torch.zeros(3, device=x.device), torch.ones(3).sum(), torch.tensor([2])  # no copies
    assert not found
    with waits() as found:
        work(x)
    assert sum(found.values()) == 1


def test_a_length_that_the_batch_does_not_know_raises(root: Path, tmp_path: Path) -> None:
    parts = build(config_of(run_file(tmp_path, root, "DIN")), device="cpu", world_size=1)
    batch = next(ParquetReader(Manifest.read(f"{root}/train"), parts.spec, batch_size=64, prefetch=0).batches(0))
    stage = parts.train_module.stage.to("meta")
    stage(batch.to(torch.device("meta")))
    with pytest.raises(RuntimeError, match="meta"):
        stage(replace(batch, longest={}).to(torch.device("meta")))


@pytest.mark.parametrize("work", [int, bool, torch.unique, Tensor.nonzero, Tensor.cpu, lambda x: x[x > 0]])
def test_numbers_of_the_device_raise(work: Callable[[Tensor], Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta|Meta"):
        work(torch.empty(1, device="meta"))


def test_batches_know_their_numbers(root: Path, tmp_path: Path) -> None:
    parts = build(config_of(run_file(tmp_path, root, "DIN")), device="cpu", world_size=1)
    batches = list(ParquetReader(Manifest.read(f"{root}/train"), parts.spec, batch_size=64, prefetch=0).batches(0))
    assert batches[-1].rows < 64
    for batch in (*batches, Batch.to(batches[0], torch.device("meta"))):
        for jagged in batch.jagged.values():
            assert jagged.length_per_key_or_none() is not None
    for batch in batches:
        for jagged in batch.jagged.values():
            by_key = jagged.lengths().view(len(jagged.keys()), -1)
            assert jagged.length_per_key_or_none() == by_key.sum(dim=1).tolist()
            assert [batch.longest[key] for key in jagged.keys()] == by_key.amax(dim=1).tolist()  # noqa: SIM118
