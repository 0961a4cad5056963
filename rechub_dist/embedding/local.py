"""Embedding tables in plain torch: a notebook's embedding stage, and the replicated tables of a sharded run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rechub_dist.embedded import Embedded, Jagged, Lookup, rows_of, to_padded
from rechub_dist.embedding.init import init_table
from rechub_dist.features import Pooling, SparseFeature, Table


class LocalTables(nn.Module):
    """All tables that `lookups` read, unsharded, in this process.

    ```python
    model = DeepFM(features, [64, 32], 0.0, embedding_dim=16)
    tables = LocalTables(model.lookups())
    embedded = tables({"user_id": Jagged.single(ids)}, dense={"age": age})
    logits = model(embedded).logits
    ```

    Args:
        lookups: those of the model (and its objective).
        seed: of the initial weights, which are those of a sharded run with the same seed.

    Raises:
        ValueError: contradicting lookups (`tables_of`).
    """

    def __init__(self, lookups: Iterable[Lookup], seed: int = 0) -> None:
        super().__init__()
        self.lookups = tuple(lookups)
        self.specs = tables_of(self.lookups)
        self.tables = nn.ModuleDict()
        for name, table in self.specs.items():
            weight = nn.Parameter(torch.empty(table.rows, table.stored_dim))
            init_table(weight.data, table, seed)
            self.tables[module_key(name)] = _Table(weight)

    def weight(self, table: str) -> nn.Parameter:
        """The weights of a table, float32 [rows, stored_dim], zero beyond its `dim`. Raises KeyError if it has none."""
        module = self.tables[module_key(table)]
        assert isinstance(module, _Table)
        return module.weight

    def forward(self, ids: Mapping[str, Jagged], dense: Mapping[str, Tensor] | None = None) -> Embedded:
        """Look up `ids`, by feature name, of B rows each; `dense`, float32 [B, dim] each, is passed through.

        Raises:
            IndexError: an id is outside its table.
            KeyError: `ids` lacks a feature of a lookup.
            ValueError: a weighted feature comes without weights.
        """
        embedded = Embedded(dense=dict(dense or {}))
        for lookup in self.lookups:
            jagged = ids[lookup.feature.name]
            if isinstance(lookup.feature, SparseFeature) and lookup.feature.weights and jagged.weights is None:
                raise ValueError(f"feature {lookup.feature.name!r} has weights: pass them with its ids")
            weight = self.weight(lookup.table.name)
            if lookup.pooling is None:
                vectors = F.embedding(jagged.values, weight)[:, : lookup.dim]
                embedded.sequences[lookup.name] = to_padded(vectors, jagged.lengths, jagged.longest)
            else:
                lengths = jagged.lengths.long()
                start = lengths.cumsum(0) - lengths
                weights = jagged.weights
                pooled = F.embedding_bag(jagged.values, weight, start, mode="sum", per_sample_weights=weights)
                embedded.vectors[lookup.name] = pool(pooled[:, : lookup.dim], lengths, weights, lookup.pooling)
        return embedded


class _Table(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def module_key(table: str) -> str:
    """The name of a table's submodule.

    It has no dot, as torch requires, and the slash, which no table's name has, keeps it apart from attributes that
    modules already have (`type`, `keys`).
    """
    return "table/" + table.replace(".", "/")


def tables_of(lookups: Iterable[Lookup]) -> dict[str, Table]:
    """The tables that the lookups read, by name.

    Raises:
        ValueError: different lookups share a name, or lookups disagree about a table.
    """
    tables: dict[str, Table] = {}
    by_name: dict[str, Lookup] = {}
    for lookup in lookups:
        if by_name.setdefault(lookup.name, lookup) != lookup:
            raise ValueError(_clash(lookup, by_name[lookup.name]))
        known = tables.setdefault(lookup.table.name, lookup.table)
        if (known.rows, known.dim) != (lookup.table.rows, lookup.table.dim):
            raise ValueError(
                f"table {known.name!r} is looked up with {known.rows} rows of width {known.dim} and with "
                f"{lookup.table.rows} rows of width {lookup.table.dim}"
            )
        _ = lookup.dim
        if lookup.feature.table.rows != lookup.table.rows:
            raise ValueError(
                f"feature {lookup.feature.name!r} has ids below {lookup.feature.table.rows}, but its lookup "
                f"{lookup.name!r} reads table {lookup.table.name!r} of {lookup.table.rows} rows"
            )
    return tables


def _clash(one: Lookup, other: Lookup) -> str:
    """The message about two different lookups of one name."""
    text = f"two different lookups are named {one.name!r}"
    own = next((lookup.feature for lookup in (one, other) if lookup.feature.name == one.name), None)
    if own is not None and one.feature.name != other.feature.name:
        of = next(lookup.feature.name for lookup in (one, other) if lookup.feature is not own)
        return f"{text}: feature {own.name!r} has the name of the first-order weights of {of!r}; rename it"
    parts = ("feature", "table", "pooling")
    different = [
        f"{part} {getattr(one, part)!r} and {getattr(other, part)!r}"
        for part in parts
        if getattr(one, part) != getattr(other, part)
    ]
    return f"{text}: {different[0]}"


def pool(total: Tensor, lengths: Tensor, weights: Tensor | None, pooling: Pooling) -> Tensor:
    """The pooled vectors, float [B, D], from the rows' (weighted) sums `total`, float [B, D].

    A mean divides them by the lengths, int [B], or by the sums of `weights`, float [sum of lengths]; it is zero for a
    row without ids, or whose weights are all zero.
    """
    if pooling == "sum":
        return total
    if weights is None:
        return total / lengths.clamp(min=1)[:, None].to(total.dtype)
    divisor = total.new_zeros(len(lengths)).index_add(0, rows_of(lengths, len(weights)), weights.to(total.dtype))
    return total / divisor.masked_fill(~(divisor > 0), 1)[:, None]
