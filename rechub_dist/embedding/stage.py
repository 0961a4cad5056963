"""The embedding stage: the only owner of tables. Its collections are sharded by `distributed.sharding`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedTensor

from rechub_dist.batch import Batch
from rechub_dist.embedded import Embedded, Jagged, Lookup
from rechub_dist.embedding.layout import POOLED, REPLICATED, Layout
from rechub_dist.embedding.local import LocalTables, mean_of, module_key, rows_of, to_padded
from rechub_dist.features import DenseFeature


class EmbeddingStage(nn.Module):
    """Batch -> Embedded, by the tables that `layout` places.

    The collections are built without memory; sharding gives them their weights. Only sums are asked of the pooled
    collection, since a mean there corrupts its neighbours under row-wise sharding: `assemble` divides.
    """

    def __init__(self, layout: Layout, dense: tuple[DenseFeature, ...], seed: int) -> None:
        super().__init__()
        self.layout = layout
        meta = torch.device("meta")
        names: dict[str, dict[tuple[str, str], str]] = {}
        self.pooled: EmbeddingBagCollection | None = None
        self.unpooled = nn.ModuleDict()
        self.replicated: Replicated | None = None
        for collection in layout.collections:
            placed = layout.tables_in(collection)
            if collection == REPLICATED:
                self.replicated = Replicated(LocalTables(layout.lookups_in(collection), seed))
                continue
            bag = collection == POOLED
            configs = [
                (EmbeddingBagConfig if bag else EmbeddingConfig)(
                    name=module_key(p.table.name),
                    embedding_dim=p.table.stored_dim,
                    num_embeddings=p.table.rows,
                    feature_names=list(p.features),
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
                self.pooled = EmbeddingBagCollection(tables=configs, device=meta)
            else:
                self.unpooled[collection] = EmbeddingCollection(tables=configs, device=meta)
        self.assemble = Assemble(layout, names, dense)

    def forward(self, batch: Batch) -> Embedded:
        """The vectors of the batch's real rows."""
        # Wiring only: this is traced symbolically, so that the id exchange of a batch can overlap the step before.
        pooled = None if self.pooled is None else self.pooled(batch.jagged[POOLED])
        unpooled = {name: collection(batch.jagged[name]) for name, collection in self.unpooled.items()}
        replicated = None if self.replicated is None else self.replicated(batch)
        return self.assemble(batch, pooled, unpooled, replicated)


class Replicated(nn.Module):
    """The replicated tables' lookups."""

    def __init__(self, local: LocalTables) -> None:
        super().__init__()
        self.local = local
        self.features = tuple(dict.fromkeys(lookup.feature.name for lookup in local.lookups))

    def forward(self, batch: Batch) -> Embedded:
        """Padding rows hold no ids, so cutting their lengths off is enough."""
        jagged = batch.jagged[REPLICATED]
        ids = {}
        for name in self.features:
            values = jagged[name]
            ids[name] = Jagged(values.values(), values.lengths()[: batch.rows])
        return self.local(ids)


class Assemble(nn.Module):
    """Collections' outputs -> Embedded: real rows, logical widths, means, padded sequences."""

    def __init__(
        self, layout: Layout, names: dict[str, dict[tuple[str, str], str]], dense: tuple[DenseFeature, ...]
    ) -> None:
        super().__init__()
        self.dense = {feature.name: feature.dim for feature in dense}
        self.lookups = [
            (lookup, collection, names[collection][lookup.table.name, lookup.feature.name])
            for lookup in layout.lookups
            if (collection := layout.tables[lookup.table.name].collection) != REPLICATED
        ]

    def forward(
        self,
        batch: Batch,
        pooled: KeyedTensor | None,
        unpooled: Mapping[str, Mapping[str, JaggedTensor]],
        replicated: Embedded | None,
    ) -> Embedded:
        """Padding rows come last and are cut off, so that a model sees real rows only."""
        embedded = replicated or Embedded()
        # By key: the columns' order changes under sharding.
        sums = {} if pooled is None else pooled.to_dict()
        vectors = {name: dict(jagged) for name, jagged in unpooled.items()}
        for lookup, collection, key in self.lookups:
            if collection == POOLED:
                value = sums[key][: batch.rows, : lookup.dim]
                if lookup.pooling == "mean":
                    value = mean_of(value, self._lengths(batch, lookup, collection))
                embedded.vectors[lookup.name] = value
            else:
                self._from_unpooled(embedded, batch, lookup, vectors[collection][key], collection)
        start = 0
        for name, dim in self.dense.items():
            embedded.dense[name] = batch.dense[:, start : start + dim]
            start += dim
        return embedded

    def _from_unpooled(
        self, embedded: Embedded, batch: Batch, lookup: Lookup, jagged: JaggedTensor, collection: str
    ) -> None:
        values, lengths = jagged.values()[:, : lookup.dim], self._lengths(batch, lookup, collection)
        if lookup.pooling is None:
            embedded.sequences[lookup.name] = to_padded(values, lengths)
            return
        total = values.new_zeros(batch.rows, lookup.dim).index_add(0, rows_of(lengths, len(values)), values)
        embedded.vectors[lookup.name] = mean_of(total, lengths) if lookup.pooling == "mean" else total

    def _lengths(self, batch: Batch, lookup: Lookup, collection: str) -> Tensor:
        return batch.jagged[collection][lookup.feature.name].lengths()[: batch.rows]
