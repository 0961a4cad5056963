"""What `train.py` compares: four ways to train DeepFM, each of which trains as many steps as it is told, when told.

A contestant is a function that sets itself up, sends None down its pipe, and from then on answers each number of steps
that it receives with a `Turn`, when it has trained them; 0 ends it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from torch import Tensor, nn

DENSE, SPARSE, VOCABULARY, DIM, HIDDEN, BATCH, RANKS = 13, 26, 100_000, 16, [256, 128], 4096, 2
TABLE_LR, DENSE_LR = 0.02, 1e-3
NAMES = [f"sparse_{i}" for i in range(SPARSE)]
DENSE_NAMES = [f"dense_{i}" for i in range(DENSE)]


@dataclass(frozen=True)
class Place:
    """Where the data is, where files may be written, the ranks' port, and how many batches to hold in memory."""

    data: Path
    scratch: Path
    port: int
    batches: int


@dataclass(frozen=True)
class Turn:
    """CPU seconds of a turn, and seconds of it spent waiting for data."""

    cpu: float
    waited: float = 0.0


# A: rechub_dist


def rechub_dist(pipe: Connection, rank: int, place: Place) -> None:
    """The product's own trainer; nothing is put into it but the gate around its reader."""
    from rechub_dist.data.passes import Epochs  # noqa: PLC0415
    from rechub_dist.data.run_file import load_run  # noqa: PLC0415 - each contestant loads what it needs
    from rechub_dist.distributed.runtime import runtime  # noqa: PLC0415
    from rechub_dist.training.trainer import Trainer  # noqa: PLC0415

    _join(rank, place)
    config = load_run(_run_file(place, rank))
    with runtime("cpu", config.distributed.timeout_seconds, config.distributed.threads) as rt:
        trainer = Trainer(config, rt)
        passes = trainer.passes
        assert isinstance(passes, Epochs)
        passes.reader = _Gate(passes.reader, pipe)  # type: ignore[assignment]
        trainer.fit()


class _Gate:
    """A reader whose batches wait for the parent at the end of a turn; it also measures how long `next` takes."""

    def __init__(self, reader: Any, pipe: Connection) -> None:
        self._reader, self._pipe = reader, pipe
        self._left = 0
        self._began: float | None = None
        self._waited = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Any]:
        with contextlib.closing(self._reader.batches(epoch, start_step)) as batches:
            while True:
                if not self._left:
                    told = None if self._began is None else Turn(time.process_time() - self._began, self._waited)
                    self._pipe.send(told)
                    self._left = _steps(self._pipe)
                    self._began, self._waited = time.process_time(), 0.0
                asked = time.perf_counter()
                batch = next(batches, None)
                self._waited += time.perf_counter() - asked
                if batch is None:
                    return
                self._left -= 1
                yield batch


def _run_file(place: Place, rank: int) -> Path:
    """The run file, as a user would write it."""
    run = {
        "output_dir": str(place.scratch / "run"),
        "data": {"root": str(place.data), "valid": None, "test": None, "batch_size": BATCH},
        "model": {
            "name": "DeepFM",
            "features": NAMES + DENSE_NAMES,
            "hidden_units": HIDDEN,
            "dropout_rates": 0.0,
            "embedding_dim": DIM,
        },
        "embedding": {"sharding": "table_wise", "optimizer": {"name": "rowwise_adagrad", "lr": TABLE_LR}},
        "optimizer": {"name": "adam", "lr": DENSE_LR},
        "train": {"epochs": 1_000_000, "log_every": 50},
        "checkpoint": {"every_steps": 1_000_000_000},
    }
    file = place.scratch / f"run{rank}.yaml"
    file.write_text(yaml.safe_dump(run), encoding="utf-8")
    return file


# B: TorchRec


def torchrec_loop(pipe: Connection, rank: int, place: Place) -> None:
    """Forward, backward, step."""
    import torch.distributed as dist  # noqa: PLC0415
    from torch.distributed.optim import _apply_optimizer_in_backward  # noqa: PLC0415
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor  # noqa: PLC0415
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder  # noqa: PLC0415
    from torchrec.distributed.model_parallel import DistributedModelParallel  # noqa: PLC0415
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology  # noqa: PLC0415
    from torchrec.distributed.planner.types import ParameterConstraints  # noqa: PLC0415
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad  # noqa: PLC0415

    from rechub_dist.distributed.runtime import keep_freed_memory  # noqa: PLC0415

    keep_freed_memory()  # the allocator's setting that rechub_dist makes for itself, so that the loops are compared

    # the kernels want widths of a multiple of 4, so a first-order weight takes 4
    tables = [
        EmbeddingBagConfig(name=f"{name}{suffix}", embedding_dim=dim, num_embeddings=VOCABULARY, feature_names=[name])
        for suffix, dim in (("", DIM), ("_linear", 4))
        for name in NAMES
    ]

    class DeepFM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ebc = EmbeddingBagCollection(device=torch.device("meta"), tables=tables)
            self.linear = nn.Linear(DENSE, 1, bias=False)
            hidden = itertools.pairwise([SPARSE * DIM + DENSE, *HIDDEN])
            layers = [layer for a, b in hidden for layer in (nn.Linear(a, b), nn.ReLU())]
            self.mlp = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 1))

        def forward(self, dense: Tensor, ids: KeyedJaggedTensor, labels: Tensor) -> Tensor:
            looked_up = self.ebc(ids).to_dict()  # on CPU this is faster than KeyedTensor.regroup
            x = torch.cat([*(looked_up[f"{name}@{name}"] for name in NAMES), dense], dim=1)
            first = torch.cat([looked_up[f"{name}@{name}_linear"] for name in NAMES], dim=1)
            fields = x[:, : SPARSE * DIM].unflatten(1, (SPARSE, DIM))
            pairs = 0.5 * (fields.sum(1).square() - fields.square().sum(1)).sum(1)
            linear = first.view(-1, SPARSE, 4)[:, :, 0].sum(1) + self.linear(dense).squeeze(1)
            logits = linear + pairs + self.mlp(x).squeeze(1)
            return nn.functional.binary_cross_entropy_with_logits(logits, labels)

    _join(rank, place)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DeepFM()
    _apply_optimizer_in_backward(RowWiseAdagrad, model.ebc.parameters(), {"lr": TABLE_LR, "eps": 1e-8})
    sharders: list[Any] = [EmbeddingBagCollectionSharder()]
    constraint = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])
    plan = EmbeddingShardingPlanner(
        topology=Topology(world_size=RANKS, local_world_size=RANKS, compute_device="cpu"),
        batch_size=BATCH // RANKS,
        constraints={table.name: constraint for table in tables},
    ).plan(model, sharders)
    module = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    optimizer = torch.optim.Adam([*model.linear.parameters(), *model.mlp.parameters()], lr=DENSE_LR)

    size = BATCH // RANKS
    batches = []
    for ids, dense, labels in _rows(place, size, range(rank, place.batches * RANKS, RANKS)):
        lengths = torch.ones(SPARSE * size, dtype=torch.int32)
        jagged = KeyedJaggedTensor(NAMES, torch.from_numpy(ids.reshape(-1)), lengths=lengths)
        batches.append((torch.from_numpy(dense.T.copy()), jagged, torch.from_numpy(labels)))
    feed = itertools.cycle(batches)

    def train(steps: int) -> None:
        for dense, ids, labels in itertools.islice(feed, steps):
            optimizer.zero_grad()
            module(dense, ids, labels).backward()
            optimizer.step()

    _serve(pipe, train)
    dist.destroy_process_group()


# C and D: torch-rechub


def torch_rechub(pipe: Connection, place: Place, *, loader: bool) -> None:
    """Its model and trainer, fed by its own loader or from memory."""
    from torch_rechub.basic.features import DenseFeature, SparseFeature  # noqa: PLC0415
    from torch_rechub.models.ranking import DeepFM  # noqa: PLC0415
    from torch_rechub.trainers import CTRTrainer  # noqa: PLC0415
    from torch_rechub.utils.data import DataGenerator  # noqa: PLC0415

    torch.set_num_threads(RANKS)
    torch.manual_seed(0)
    sparse = [SparseFeature(name, vocab_size=VOCABULARY, embed_dim=DIM) for name in NAMES]
    dense = [DenseFeature(name) for name in DENSE_NAMES]
    model = DeepFM(sparse + dense, sparse, mlp_params={"dims": HIDDEN, "dropout": 0.0, "activation": "relu"})
    trainer = CTRTrainer(model, optimizer_params={"lr": DENSE_LR}, n_epoch=1, model_path=str(place.scratch))
    feed: Iterator[Any]
    if loader:
        ids, values, labels = next(_rows(place, place.batches * BATCH, range(1)))
        x = dict(zip(NAMES + DENSE_NAMES, [*ids, *values], strict=True))
        own, *_ = DataGenerator(x, labels).generate_dataloader(x, labels, x, labels, batch_size=BATCH)
        feed = itertools.chain.from_iterable(itertools.repeat(own))
    else:
        batches = []
        for ids, values, labels in _rows(place, BATCH, range(place.batches)):
            columns = zip(NAMES + DENSE_NAMES, [*ids, *values], strict=True)
            batches.append(({name: torch.from_numpy(v) for name, v in columns}, torch.from_numpy(labels)))
        feed = itertools.cycle(batches)
    _serve(pipe, lambda steps: trainer.train_one_epoch(itertools.islice(feed, steps)))


# What they share


def _serve(pipe: Connection, train: Callable[[int], object]) -> None:
    """Train as many steps as the parent asks for, again and again."""
    pipe.send(None)
    while steps := pipe.recv():
        began = time.process_time()
        train(steps)
        pipe.send(Turn(time.process_time() - began))


def _steps(pipe: Connection) -> int:
    if not (steps := pipe.recv()):
        raise SystemExit
    return int(steps)


def _join(rank: int, place: Place) -> None:
    """What torchrun would set."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(place.port))


def _rows(place: Place, size: int, which: range) -> Iterator[tuple[Any, Any, Any]]:
    """Pieces of `size` rows of the train split: ids int64 [26, size], dense float32 [13, size], labels float32."""
    table = pq.read_table(place.data / "train")
    arrays = {name: table.column(name).to_numpy() for name in table.column_names}
    for index in which:
        piece = slice(index * size, (index + 1) * size)
        ids = np.stack([arrays[name][piece] for name in NAMES]).astype(np.int64)
        dense = np.stack([arrays[name][piece] for name in DENSE_NAMES]).astype(np.float32)
        yield ids, dense, arrays["label"][piece].astype(np.float32)
