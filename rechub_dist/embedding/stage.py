"""The embedding stage, the only owner of tables. Its collections are sharded by `embedding.sharding`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from rechub_dist.batch import Batch
from rechub_dist.data.spec import WEIGHTED
from rechub_dist.embedded import Embedded, Jagged, Sequence, rows_of, to_padded
from rechub_dist.embedding.layout import POOLED, REPLICATED, Layout
from rechub_dist.embedding.local import LocalTables, module_key, pool
from rechub_dist.features import DenseFeature
from rechub_dist.reporting.step_times import REPLICATED_LOOKUP


class EmbeddingStage(nn.Module):
    """Batch -> Embedded, through the tables that `layout` places.

    The collections are built on the meta device; sharding allocates their weights. Pooled collections only sum, since
    TorchRec's mean corrupts neighbouring features under row-wise sharding: `assemble` divides.
    """

    def __init__(self, layout: Layout, dense: tuple[DenseFeature, ...], seed: int) -> None:
        super().__init__()
        self.layout = layout
        meta = torch.device("meta")
        names: dict[str, dict[tuple[str, str], str]] = {}
        self.pooled = nn.ModuleDict()
        self.unpooled = nn.ModuleDict()
        self.replicated: Replicated | None = None
        for collection in layout.collections:
            placed = layout.tables_in(collection)
            if collection == REPLICATED:
                local = LocalTables(layout.lookups_in(collection), seed)
                for p in placed:
                    local.weight(p.table.name).requires_grad_(not p.frozen)
                self.replicated = Replicated(local)
                continue
            bag = collection in (POOLED, WEIGHTED)
            configs = [
                (EmbeddingBagConfig if bag else EmbeddingConfig)(
                    name=module_key(p.table.name),
                    embedding_dim=p.table.stored_dim,
                    num_embeddings=p.table.rows,
                    feature_names=list(p.features),
                    init_fn=_leave,
                    data_type=DataType.FP16 if p.precision == "fp16" else DataType.FP32,
                    **({"pooling": PoolingType.SUM} if bag else {}),
                )
                for p in placed
            ]
            names[collection] = {
                (p.table.name, feature): key
                for p, keys in zip(placed, get_embedding_names_by_table(configs), strict=True)
                for feature, key in zip(p.features, keys, strict=True)
            }
            if bag:
                self.pooled[collection] = EmbeddingBagCollection(
                    tables=configs, is_weighted=collection == WEIGHTED, device=meta
                )
            else:
                self.unpooled[collection] = EmbeddingCollection(tables=configs, device=meta)
        self.assemble = Assemble(layout, names, dense)

    def forward(self, batch: Batch) -> Embedded:
        """The vectors and dense features of the batch's real rows. Collective once it is sharded."""
        # Wiring only: it is traced symbolically, so that the id exchange of a batch can overlap the step before.
        pooled = {name: collection(batch.jagged[name]) for name, collection in self.pooled.items()}
        unpooled = {name: collection(batch.jagged[name]) for name, collection in self.unpooled.items()}
        replicated = None if self.replicated is None else self.replicated(batch)
        return self.assemble(batch, pooled, unpooled, replicated)


def _leave(weight: Tensor) -> None:
    """No initial weights from TorchRec: `embedding.sharding` draws them."""


class Replicated(nn.Module):
    """The lookups in replicated tables, which are local.

    Attributes:
        looked_up: for the tables that are in it, bool [rows]: gets the rows that training has looked up.
    """

    def __init__(self, local: LocalTables) -> None:
        super().__init__()
        self.local = local
        self.looked_up: dict[str, Tensor] = {}
        self.features = tuple(dict.fromkeys(lookup.feature.name for lookup in local.lookups))

    def forward(self, batch: Batch) -> Embedded:
        """The vectors of the real rows. Padding rows have no ids, so only their lengths are cut off."""
        jagged = batch.jagged[REPLICATED]
        ids = {}
        for name in self.features:
            values = jagged[name]
            lengths = values.lengths()[: batch.rows]
            ids[name] = Jagged(values.values(), lengths, batch.id_weights.get(name), batch.longest.get(name))
        if self.training and self.looked_up:
            for lookup in self.local.lookups:
                if (rows := self.looked_up.get(lookup.table.name)) is not None:
                    rows.index_fill_(0, ids[lookup.feature.name].values.long(), value=True)
        with record_function(REPLICATED_LOOKUP):
            return self.local(ids)


class Assemble(nn.Module):
    """Outputs of the collections -> Embedded: real rows, logical widths, means, padded sequences."""

    def __init__(
        self, layout: Layout, names: dict[str, dict[tuple[str, str], str]], dense: tuple[DenseFeature, ...]
    ) -> None:
        super().__init__()
        self.dense = dense
        self.dropouts = {
            lookup.name: dropout for lookup in layout.lookups if (dropout := layout.tables[lookup.table.name].dropout)
        }
        self.lookups = [
            (lookup, collection, names[collection][lookup.table.name, lookup.feature.name])
            for lookup in layout.lookups
            if (collection := layout.tables[lookup.table.name].collection) != REPLICATED
        ]
        self.widths: dict[str, dict[str, int]] = {}
        for lookup, collection, key in self.lookups:
            self.widths.setdefault(collection, {})[key] = lookup.dim

    def forward(
        self,
        batch: Batch,
        pooled: Mapping[str, KeyedTensor],
        unpooled: Mapping[str, Mapping[str, JaggedTensor]],
        replicated: Embedded | None,
    ) -> Embedded:
        """The batch as the model sees it: padding rows, which come last, are cut off."""
        embedded = replicated or Embedded()
        vectors: dict[str, Mapping[str, Tensor]] = {
            name: _columns(keyed, self.widths[name], batch.rows) for name, keyed in pooled.items()
        }
        for name, found in unpooled.items():
            vectors[name] = {key: jagged.values() for key, jagged in found.items()}
        for lookup, collection, key in self.lookups:
            values = vectors[collection][key]
            if collection in pooled and lookup.pooling == "sum":
                embedded.vectors[lookup.name] = values
                continue
            lengths = batch.jagged[collection][lookup.feature.name].lengths()[: batch.rows]
            weights = batch.id_weights.get(lookup.feature.name)
            if collection in pooled:
                total = values
            else:
                values = values[:, : lookup.dim]
                if lookup.pooling is None:
                    embedded.sequences[lookup.name] = _padded(values, lengths, batch.longest.get(lookup.feature.name))
                    continue
                scaled = values if weights is None else values * weights[:, None]
                total = values.new_zeros(batch.rows, lookup.dim).index_add(0, rows_of(lengths, len(values)), scaled)
            embedded.vectors[lookup.name] = pool(total, lengths, weights, lookup.pooling or "sum")
        if self.training:
            for name, dropout in self.dropouts.items():
                _drop(embedded, name, dropout)
        embedded.dense.update(split_dense(batch.dense, self.dense))
        return embedded


def _columns(keyed: KeyedTensor, widths: Mapping[str, int], rows: int) -> dict[str, Tensor]:
    """The first `rows` rows and `widths[key]` columns of each key: views, which one split makes, forward and backward.

    By key, since sharding changes their order. Kernels store some tables wider than they are.
    """
    sizes: list[int] = []
    place = {}
    for key, stored in zip(keyed.keys(), keyed.length_per_key(), strict=True):
        place[key] = len(sizes)
        width = widths[key]
        sizes += [width, stored - width] if width < stored else [stored]
    values = keyed.values()
    if len(values) > rows:  # else the backward pass would copy the whole
        values = values[:rows]
    parts = values.split(sizes, dim=1)
    return {key: parts[place[key]] for key in widths}


def _padded(values: Tensor, lengths: Tensor, longest: int | None) -> Sequence:
    """As `to_padded`, by FBGEMM, in half the time."""
    if longest is None:
        return to_padded(values, lengths)
    offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
    padded = torch.ops.fbgemm.jagged_2d_to_dense(values, offsets, max(1, longest))
    return Sequence(padded, lengths.long(), len(values))


def _drop(embedded: Embedded, name: str, dropout: float) -> None:
    """Dropout of what a lookup has read."""
    if (sequence := embedded.sequences.get(name)) is not None:
        embedded.sequences[name] = sequence._replace(values=F.dropout(sequence.values, dropout))
    else:
        embedded.vectors[name] = F.dropout(embedded.vectors[name], dropout)


def split_dense(dense: Tensor, features: tuple[DenseFeature, ...]) -> dict[str, Tensor]:
    """Dense features by name, float32 [B, dim] each, from their concatenation [B, sum of dims]; views."""
    parts = dense.split([feature.dim for feature in features], dim=1) if features else ()
    return {feature.name: part for feature, part in zip(features, parts, strict=True)}
