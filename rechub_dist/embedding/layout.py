"""Lookups -> tables and collections: the placement and optimizer of each table, from the configuration alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Final, Literal

from rechub_dist.config import EmbeddingConfig, Sharding, TableOptimizerConfig, TableRule
from rechub_dist.data.spec import WEIGHTED
from rechub_dist.embedded import Lookup
from rechub_dist.embedding.local import tables_of
from rechub_dist.errors import UserError
from rechub_dist.features import CrossFeature, LookupFeature, NegativeFeature, SparseFeature, Table

REPLICATED: Final = "replicated"
POOLED: Final = "pooled"
CACHED: Final = "fused_uvm_caching"  # the kernel with tables in host memory and a cache on the GPU
_CUDA_ONLY: Final = ("lazy_adam", "partial_rowwise_adam")
_FUSED: Final = ("rowwise_adagrad", "adagrad", "sgd", *_CUDA_ONLY)
# Of frozen tables: the one without state, whose updates are zero.
_NONE: Final = TableOptimizerConfig(name="sgd").model_copy(update={"lr": 0.0})


@dataclass(frozen=True)
class PlacedTable:
    """A table, its placement and its optimizer.

    Attributes:
        collection: `replicated`, `pooled` (an EmbeddingBagCollection), `weighted` (the one with weights of ids, for
            tables that some weighted feature reads) or `d<width>` (the EmbeddingCollection of that stored width, for
            tables that some lookup reads unpooled).
        features: names of the features that read it, in lookup order.
        cache_load_factor: the share of its rows that fits the cache on the GPU; None where it has no cache.
        frozen: whether it keeps its weights; its optimizer is one of learning rate zero then.
        dropout: of its vectors in training.
        precision: of its weights; the states of its optimizer and what is looked up are fp32.
    """

    table: Table
    collection: str
    sharding: Sharding
    kernel: str
    optimizer: TableOptimizerConfig
    features: tuple[str, ...]
    cache_load_factor: float | None = None
    frozen: bool = False
    dropout: float = 0.0
    precision: Literal["fp32", "fp16"] = "fp32"

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights, once, at the width in which they are stored."""
        return self.table.rows * self.table.stored_dim * (2 if self.precision == "fp16" else 4)

    @property
    def decays(self) -> bool:
        """Whether its optimizer decays the rows that are looked up, and those alone."""
        return self.optimizer.weight_decay > 0 and self.optimizer.name != "adam"


@dataclass(frozen=True)
class Layout:
    """The placement of everything that is looked up.

    Attributes:
        lookups: all different lookups, in the given order.
        tables: by name.
        features: by name, the id features that are looked up, and the inputs of crosses.
        notes: deviations from the configured placement, and why.
    """

    lookups: tuple[Lookup, ...]
    tables: dict[str, PlacedTable]
    features: dict[str, LookupFeature]
    notes: tuple[str, ...] = ()

    @property
    def collections(self) -> dict[str, tuple[str, ...]]:
        """The features of each collection, in the key order of its KeyedJaggedTensor."""
        found: dict[str, dict[str, None]] = {}
        for placed in self.tables.values():
            found.setdefault(placed.collection, {}).update(dict.fromkeys(placed.features))
        return {name: tuple(features) for name, features in found.items()}

    def tables_in(self, collection: str) -> list[PlacedTable]:
        """The tables of one collection."""
        return [placed for placed in self.tables.values() if placed.collection == collection]

    def lookups_in(self, collection: str) -> tuple[Lookup, ...]:
        """The lookups on the tables of one collection."""
        return tuple(lk for lk in self.lookups if self.tables[lk.table.name].collection == collection)


def make_layout(lookups: Iterable[Lookup], config: EmbeddingConfig, *, device: str, world_size: int) -> Layout:
    """Place every table.

    Placement and optimizer follow from `config`; `world_size` and `device` only decide whether they are possible. A
    row-wise table with too few rows for the ranks becomes table-wise, which is mathematically the same, so that a host
    that joins an elastic run does not end it.

    Raises:
        UserError: contradicting lookups, a rule that matches nothing, or a combination of placement, kernel, optimizer
            and device that the kernels get wrong or do not support.
    """
    unique = tuple(dict.fromkeys(replace(lookup, table=_initialised(lookup.table, config)) for lookup in lookups))
    try:
        specs = tables_of(unique)
    except ValueError as error:
        raise UserError(str(error)) from error
    for rule in config.rules:
        if not any(fnmatchcase(name, rule.tables) for name in specs):
            raise UserError(f"embedding.rules: {rule.tables!r} matches no table; the tables are {', '.join(specs)}")
    features: dict[str, LookupFeature] = {}
    for lookup in unique:
        if isinstance(lookup.feature, NegativeFeature) and lookup.table.rows == 1:
            raise UserError(
                f"feature {lookup.feature.name!r}: table {lookup.table.name!r} has one id; drawing negatives "
                "needs at least two; give it more rows, or choose in_batch negatives"
            )
        inputs = lookup.feature.inputs if isinstance(lookup.feature, CrossFeature) else ()
        for feature in (lookup.feature, *inputs):
            if features.setdefault(feature.name, feature) != feature:
                raise UserError(
                    f"feature {feature.name!r} is used with different settings; give it the same ones everywhere"
                )
    tables, notes = {}, []
    for name, table in specs.items():
        readers = [lookup for lookup in unique if lookup.table.name == name]
        placed = _place(table, readers, config, device)
        if _too_few_rows(placed, world_size):
            notes.append(
                f"table {name!r}: {table.rows} rows cannot be sharded {placed.sharding} over {world_size} ranks, one "
                f"would have none: it is table_wise instead"
            )
            placed = replace(placed, sharding="table_wise")
        _refuse(placed, device)
        tables[name] = placed
    whole = [name for name, placed in tables.items() if placed.collection == REPLICATED]
    if config.precision == "fp16" and whole:
        more = f" and {len(whole) - 5} more" if whole[5:] else ""
        replicated = ", ".join(whole[:5]) + more
        notes.append(f"embedding.precision: fp16 is of sharded tables; replicated ones are in fp32: {replicated}")
    return Layout(unique, tables, features, tuple(notes))


def _rule(table: Table, config: EmbeddingConfig) -> TableRule | None:
    return next((rule for rule in config.rules if fnmatchcase(table.name, rule.tables)), None)


def _initialised(table: Table, config: EmbeddingConfig) -> Table:
    rule = _rule(table, config)
    return table if rule is None or rule.init_std is None else replace(table, init_std=rule.init_std)


def _place(table: Table, readers: Sequence[Lookup], config: EmbeddingConfig, device: str) -> PlacedTable:
    rule = _rule(table, config)
    frozen = rule is not None and rule.frozen
    optimizer = _NONE if frozen else (rule and rule.optimizer) or config.optimizer
    sharding: Sharding
    if rule and rule.sharding:
        sharding = rule.sharding
    elif table.rows < config.replicate_below:
        sharding = REPLICATED
    elif config.sharding == "auto":
        sharding = "row_wise" if table.rows >= config.row_wise_above else "table_wise"
    else:
        sharding = config.sharding
    if sharding == REPLICATED:
        collection = REPLICATED
    elif any(lookup.pooling is None for lookup in readers) or (optimizer.weight_decay and device == "cpu"):
        # On CPU the kernels of pooled tables leave weight decay out without a word; those of unpooled ones do not.
        collection = f"d{table.stored_dim}"
    else:
        weighted = any(isinstance(lk.feature, SparseFeature) and lk.feature.weights for lk in readers)
        collection = WEIGHTED if weighted else POOLED
    precision = (rule and rule.precision) or config.precision
    if sharding == REPLICATED and precision == "fp16":
        if rule and rule.precision:
            raise UserError(
                f"embedding.rules: precision: fp16 is given for table {table.name!r}, which is replicated and so in "
                f"fp32; leave it out, or shard the table"
            )
        precision = "fp32"
    kernel = (rule and rule.kernel) or config.kernel
    factor = rule.cache_load_factor if rule else None
    if factor is not None and (kernel != CACHED or sharding == REPLICATED):
        raise UserError(
            f"embedding.rules: cache_load_factor is given for table {table.name!r}, which has no cache; a cache "
            f"needs kernel: {CACHED} and a sharding other than replicated"
        )
    return PlacedTable(
        table=table,
        collection=collection,
        sharding=sharding,
        kernel=kernel,
        optimizer=optimizer,
        features=tuple(dict.fromkeys(lookup.feature.name for lookup in readers)),
        cache_load_factor=(factor or config.cache_load_factor) if kernel == CACHED else None,
        frozen=frozen,
        dropout=config.dropout if rule is None or rule.dropout is None else rule.dropout,
        precision=precision,
    )


def _too_few_rows(placed: PlacedTable, world_size: int) -> bool:
    """Whether a rank would have no row of a row-wise table, which crashes the kernels."""
    rows = placed.table.rows
    row_wise = placed.sharding in ("row_wise", "table_row_wise")
    return row_wise and -(-rows // world_size) * (world_size - 1) >= rows


def _refuse(placed: PlacedTable, device: str) -> None:
    """Raise UserError for what the kernels get wrong or do not support, before anything is built."""
    name, sharding, optimizer = placed.table.name, placed.sharding, placed.optimizer.name
    if sharding == REPLICATED:
        if optimizer in _CUDA_ONLY:
            raise UserError(f"table {name!r}: {optimizer} needs a sharded table on CUDA; use adam for a replicated one")
        return
    if optimizer not in _FUSED and optimizer != "adam":
        raise UserError(
            f"table {name!r}: there is no fused kernel of {optimizer} for sharded tables; use {', '.join(_FUSED)}, or "
            f"replicate the table (sharding: replicated)"
        )
    if optimizer == "adam":
        raise UserError(
            f"table {name!r}: adam updates every row at each step, which sharded tables do not support; use "
            f"rowwise_adagrad, or replicate the table (sharding: replicated)"
        )
    if placed.decays and optimizer not in ("rowwise_adagrad", *_CUDA_ONLY):
        raise UserError(
            f"table {name!r}: the fused kernels of {optimizer} have no weight decay; use rowwise_adagrad, or replicate "
            f"the table (sharding: replicated)"
        )
    if placed.decays and optimizer in _CUDA_ONLY and placed.optimizer.decay == "l2":
        raise UserError(f"table {name!r}: {optimizer} decays weights apart from gradients only; set decay: decoupled")
    if optimizer in _CUDA_ONLY and device != "cuda":
        raise UserError(
            f"table {name!r}: fused Adam ({optimizer}) is not available on CPU; use rowwise_adagrad, adagrad or sgd, "
            f"or replicate the table (sharding: replicated) and use adam"
        )
    if placed.kernel != "fused" and device != "cuda":
        raise UserError(f"table {name!r}: kernel {placed.kernel} needs CUDA; use kernel: fused on CPU")
    if sharding in ("column_wise", "table_column_wise") and optimizer in ("rowwise_adagrad", "partial_rowwise_adam"):
        raise UserError(
            f"table {name!r}: {optimizer} on a {sharding} table keeps a state per column shard, which is a "
            f"different algorithm; use adagrad or sgd, or shard it row_wise or table_wise"
        )
    if placed.collection not in (POOLED, WEIGHTED) and sharding in ("table_row_wise", "table_column_wise"):
        raise UserError(
            f"table {name!r}: {sharding} is not supported for a table that is read unpooled; use table_wise, row_wise "
            f"or column_wise"
        )
