"""The barest TorchRec loop of the same mathematics, placement and optimizers, on batches that lie in memory.

It is what the trainer would reach if reading and bookkeeping cost nothing. Dense parts are those of `handwritten`, as
one writes them, and DeepFM's is here. Its batch normalisation (DIN's Dice) has each rank's statistics, ours the global
batch's, which an exchange a layer costs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    PoolingType,
)
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from handwritten import multitask, ranking, recall, sequence
from handwritten.common import HIDDEN, HISTORY, OTHERS, STATE, TARGET, WIDTH, Written
from rechub_dist.distributed.runtime import keep_freed_memory
from rechub_dist.embedded import Embedded, Sequence
from speed.shapes import CATEGORIES, DENSE_LR, TABLE_LR, Shape, pieces
from speed.turns import Seat, serve

LINEAR = 4  # the kernels want widths of a multiple of 4, so a first-order weight takes 4
NEGATIVES = "negatives"  # as many as the history has items


@dataclass
class Rows:
    """A rank's part of a batch: dense [B, n], ids by collection, labels [B, T], the target items [B]."""

    dense: Tensor
    pooled: KeyedJaggedTensor | None
    unpooled: KeyedJaggedTensor | None
    labels: Tensor
    items: Tensor


class Net(nn.Module):
    """Tables, the model by hand, and its loss; `bags` and `lists` are (table, rows, width, features)."""

    bags: tuple[str, ...] = ()  # features that are looked up pooled, in the order of the ids
    lists: tuple[str, ...] = ()  # and those whose vectors stay apart

    def tables(self, bags: list[EmbeddingBagConfig], lists: list[EmbeddingConfig] | None = None) -> None:
        """Make the collections, of which each has its features in the order of its ids."""
        meta = torch.device("meta")
        self.bags = tuple(dict.fromkeys(name for table in bags for name in table.feature_names))
        self.lists = tuple(name for table in lists or [] for name in table.feature_names)
        self.ebc = EmbeddingBagCollection(device=meta, tables=bags) if bags else None
        self.ec = EmbeddingCollection(device=meta, tables=lists) if lists else None

    def forward(self, rows: Rows) -> Tensor:
        raise NotImplementedError


def _bag(name: str, rows: int, width: int, *features: str, **more: Any) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=f"t_{name}",
        embedding_dim=width,
        num_embeddings=rows,
        feature_names=list(features or (name.removesuffix("_linear"),)),
        **more,
    )


def _list(name: str, rows: int, width: int, *features: str) -> EmbeddingConfig:
    return EmbeddingConfig(name=f"t_{name}", embedding_dim=width, num_embeddings=rows, feature_names=list(features))


class DeepFM(Net):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.names, dense = shape.data.names, shape.data.dense
        rows = shape.data.vocabulary
        self.tables([_bag(name, rows, WIDTH) for name in self.names] +
                    [_bag(f"{name}_linear", rows, LINEAR) for name in self.names])  # fmt: skip
        self.linear = nn.Linear(dense, 1, bias=False)
        hidden = itertools.pairwise([len(self.names) * WIDTH + dense, *HIDDEN])
        layers = [layer for a, b in hidden for layer in (nn.Linear(a, b), nn.ReLU())]
        self.mlp = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 1))

    def forward(self, rows: Rows) -> Tensor:
        fields = len(self.names)
        found = self.ebc(rows.pooled).to_dict()  # on CPU this is faster than KeyedTensor.regroup
        x = torch.cat([*(found[f"{name}@t_{name}"] for name in self.names), rows.dense], dim=1)
        first = torch.cat([found[f"{name}@t_{name}_linear"] for name in self.names], dim=1)
        vectors = x[:, : fields * WIDTH].unflatten(1, (fields, WIDTH))
        pairs = 0.5 * (vectors.sum(1).square() - vectors.square().sum(1)).sum(1)
        linear = first.view(-1, fields, LINEAR)[:, :, 0].sum(1) + self.linear(rows.dense).squeeze(1)
        logits = linear + pairs + self.mlp(x).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, rows.labels[:, 0])


class Flat(Net):
    """A model of `handwritten` that reads all fields."""

    written: type[Written]

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tables([_bag(name, shape.data.vocabulary, WIDTH) for name in shape.data.names])
        self.model = self.written()

    def forward(self, rows: Rows) -> Tensor:
        [logits] = self.model(Embedded(vectors=self.ebc(rows.pooled).to_dict(), dense={"dense": rows.dense}))
        return F.binary_cross_entropy_with_logits(logits, rows.labels)


class DCNv2(Flat):
    written = ranking.DCNv2


class MMoE(Flat):
    written = multitask.MMoE


class DIN(Net):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        sizes = (shape.data.vocabulary, CATEGORIES)
        pairs = zip(TARGET, HISTORY, sizes, strict=True)
        self.tables(
            [_bag(name, shape.data.vocabulary, WIDTH) for name in OTHERS],
            [_list(target, size, WIDTH, target, history) for target, history, size in pairs],
        )
        self.model = sequence.DIN()

    def forward(self, rows: Rows) -> Tensor:
        vectors, found = self.ebc(rows.pooled).to_dict(), self.ec(rows.unpooled)
        vectors |= {name: found[name].values() for name in TARGET}  # one id a row
        sequences = {name: _padded(found[name].values(), found[name].lengths()) for name in HISTORY}
        [logits] = self.model(Embedded(vectors=vectors, sequences=sequences))
        return F.binary_cross_entropy_with_logits(logits, rows.labels)


class SASRec(Net):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tables([], [_list(TARGET[0], shape.data.vocabulary, STATE, TARGET[0], HISTORY[0], NEGATIVES)])
        self.model = recall.SASRec()

    def forward(self, rows: Rows) -> Tensor:
        found = self.ec(rows.unpooled)
        items = found[HISTORY[0]]
        history = _padded(items.values(), items.lengths())
        embedded = Embedded(vectors={TARGET[0]: found[TARGET[0]].values()}, sequences={HISTORY[0]: history})
        states, following = (side[history.mask] for side in self.model(embedded))
        positive, negative = (states * following).sum(1), (states * found[NEGATIVES].values()).sum(1)
        return (F.softplus(-positive) + F.softplus(negative)).mean()


class DSSM(Net):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        rows = shape.data.vocabulary
        item = _bag(TARGET[0], rows, WIDTH, TARGET[0], HISTORY[0], pooling=PoolingType.MEAN)
        self.tables([*(_bag(name, rows, WIDTH) for name in OTHERS), item])
        self.model = recall.DSSM()

    def forward(self, rows: Rows) -> Tensor:
        user, item = self.model(Embedded(vectors=self.ebc(rows.pooled).to_dict()))
        ids = [torch.empty_like(rows.items) for _ in range(dist.get_world_size())]
        dist.all_gather(ids, rows.items)
        candidates, place = torch.unique(torch.cat(ids), return_inverse=True)
        first = torch.zeros_like(candidates).index_copy_(0, place, torch.arange(len(place)))
        vectors = cast(Tensor, _Gathered.apply(item))[first]  # an item that several rows have counts once
        return F.cross_entropy(user @ vectors.T, torch.searchsorted(candidates, rows.items))


class _Gathered(torch.autograd.Function):
    """All ranks' rows, and back the sum of the gradients that all have of this rank's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.size = len(rows)
        found = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(found, rows)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total[dist.get_rank() * ctx.size :][: ctx.size]


def _padded(values: Tensor, lengths: Tensor) -> Sequence:
    offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
    padded = torch.ops.fbgemm.jagged_2d_to_dense(values, offsets, max(1, int(lengths.max())))
    return Sequence(padded, lengths)


def loop(pipe: Connection, seat: Seat, shape: Shape, cache: Path, batches: int) -> None:
    """Forward, backward, step, over `batches` batches that lie in memory, again and again."""
    keep_freed_memory()  # the allocator's setting that rechub_dist makes for itself, so that the loops are compared
    seat.join()
    torch.set_num_threads(seat.threads)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net: Net = globals()[shape.net](shape)
    sharders: list[Any] = [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()]
    parts = [part for part in (net.ebc, net.ec) if part is not None]
    for part in parts:
        _apply_optimizer_in_backward(RowWiseAdagrad, part.parameters(), {"lr": TABLE_LR, "eps": 1e-8})
    constraint = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])
    tables = [*(net.ebc.embedding_bag_configs() if net.ebc else []), *(net.ec.embedding_configs() if net.ec else [])]
    plan = EmbeddingShardingPlanner(
        topology=Topology(world_size=seat.ranks, local_world_size=seat.ranks, compute_device="cpu"),
        batch_size=shape.batch // seat.ranks,
        constraints={table.name: constraint for table in tables},
    ).plan(net, sharders)
    module = DistributedModelParallel(net, device=torch.device("cpu"), plan=plan, sharders=sharders)
    module.train()
    dense = [value for name, value in net.named_parameters() if not name.startswith(("ebc.", "ec."))]
    optimizer = torch.optim.Adam(dense, lr=DENSE_LR)
    size = shape.batch // seat.ranks
    which = range(seat.rank, batches * seat.ranks, seat.ranks)
    feed = itertools.cycle([_rows(net, shape, piece) for piece in pieces(shape.data.prepare(cache), size, which)])

    def train(steps: int) -> None:
        for rows in itertools.islice(feed, steps):
            optimizer.zero_grad()
            module(rows).backward()
            optimizer.step()

    serve(pipe, train)
    dist.destroy_process_group()


def _rows(net: Net, shape: Shape, piece: pa.Table) -> Rows:
    size = piece.num_rows
    dense = np.stack([piece[name].to_numpy() for name in shape.data.dense_names], 1) if shape.data.dense else None
    names = [name for name in piece.column_names if name.startswith("label")]
    labels = np.stack([piece[name].to_numpy() for name in names], 1).astype(np.float32)
    columns: dict[str, tuple[Tensor, Tensor]] = {}
    for name in {*net.bags, *net.lists} - {NEGATIVES}:
        column = piece[name].combine_chunks()
        if pa.types.is_list(column.type):
            values, lengths = column.flatten().to_numpy(), np.diff(column.offsets.to_numpy())
        else:
            values, lengths = column.to_numpy(), np.ones(size)
        columns[name] = torch.from_numpy(values.astype(np.int64)), torch.from_numpy(lengths.astype(np.int32))
    if NEGATIVES in net.lists:
        lengths = columns[HISTORY[0]][1]
        columns[NEGATIVES] = torch.randint(shape.data.vocabulary, (int(lengths.sum()),)), lengths

    def keyed(keys: tuple[str, ...]) -> KeyedJaggedTensor | None:
        if not keys:
            return None
        ids, counts = zip(*(columns[name] for name in keys), strict=True)
        return KeyedJaggedTensor(list(keys), torch.cat(ids), lengths=torch.cat(counts))

    items = columns[TARGET[0]][0] if TARGET[0] in columns else torch.empty(0, dtype=torch.int64)
    given = torch.empty(size, 0) if dense is None else torch.from_numpy(dense.astype(np.float32))
    return Rows(given, keyed(net.bags), keyed(net.lists), torch.from_numpy(labels), items)
