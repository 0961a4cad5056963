"""LocalTables against a loop over rows; initial weights under any sharding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rechub_dist.embedded import Jagged, Lookup
from rechub_dist.embedding.init import BLOCK, Part, init_table, init_tables
from rechub_dist.embedding.local import LocalTables
from rechub_dist.features import SequenceFeature, SparseFeature, Table
from rechub_dist.seeds import seed_from

ITEM = Table("item", 11, dim=6)
tags = SparseFeature("tags", ITEM)
history = SequenceFeature("history", ITEM, max_length=9)
LOOKUPS = (
    Lookup("sum", tags, ITEM, "sum"),
    Lookup("mean", tags, ITEM, "mean"),
    Lookup("tags.linear", tags, ITEM.linear, "sum"),
    Lookup("history", history, ITEM, None),
)


@given(st.lists(st.lists(st.integers(0, 10), max_size=4), max_size=6))
def test_lookups_equal_a_loop(rows: list[list[int]]) -> None:
    tables = LocalTables(LOOKUPS, seed=3)
    torch.nn.init.normal_(tables.weight("item.linear"))
    ids = Jagged(
        torch.tensor([i for row in rows for i in row], dtype=torch.long),
        torch.tensor([len(r) for r in rows], dtype=torch.int32),
    )
    embedded = tables({"tags": ids, "history": ids})
    weight, linear = tables.weight("item")[:, :6], tables.weight("item.linear")[:, :1]
    sequence = embedded.sequences["history"]
    assert sequence.values.shape == (len(rows), max([1, *map(len, rows)]), 6)
    assert sequence.lengths.tolist() == [len(row) for row in rows]
    for b, row in enumerate(rows):
        total = sum((weight[i] for i in row), torch.zeros(6))
        torch.testing.assert_close(embedded.vectors["sum"][b], total)
        torch.testing.assert_close(embedded.vectors["mean"][b], total / max(1, len(row)))
        torch.testing.assert_close(embedded.vectors["tags.linear"][b], sum((linear[i] for i in row), torch.zeros(1)))
        for position, i in enumerate(row):
            assert torch.equal(sequence.values[b, position], weight[i])
        assert not sequence.values[b, len(row) :].any()


def test_weighted_ids() -> None:
    tags = SparseFeature("tags", ITEM, weights="share")
    tables = LocalTables((Lookup("sum", tags, ITEM, "sum"), Lookup("mean", tags, ITEM, "mean")), seed=3)
    rows = [([3, 5], [0.5, 2.0]), ([], []), ([7], [0.0]), ([1, 1, 2], [1.0, 0.25, 3.0])]
    ids = torch.tensor([i for row, _ in rows for i in row])
    lengths = torch.tensor([len(row) for row, _ in rows])
    shares = torch.tensor([share for _, row in rows for share in row])
    embedded = tables({"tags": Jagged(ids, lengths, shares)})
    weight = tables.weight("item")[:, :6]
    for b, (row, share) in enumerate(rows):
        total = sum((s * weight[i] for i, s in zip(row, share, strict=True)), torch.zeros(6))
        torch.testing.assert_close(embedded.vectors["sum"][b], total)
        torch.testing.assert_close(embedded.vectors["mean"][b], total / (sum(share) or 1))
    with pytest.raises(ValueError, match="'tags' has weights: pass them with its ids"):
        tables({"tags": Jagged(ids, lengths)})


def test_jagged_constructors() -> None:
    assert Jagged.single(torch.tensor([3, 5])).lengths.tolist() == [1, 1]
    padded = Jagged.padded(torch.tensor([[1, 2, 99], [99, 99, 99], [3, 4, 5]]), torch.tensor([2, 0, 3]))
    assert padded.values.tolist() == [1, 2, 3, 4, 5]
    assert padded.lengths.tolist() == [2, 0, 3]


def test_an_id_outside_the_table_is_an_error() -> None:
    tables = LocalTables(LOOKUPS[-1:])
    with pytest.raises(IndexError):
        tables({"history": Jagged.single(torch.tensor([11]))})


@given(
    rows=st.integers(1, 2 * BLOCK + 5),
    first=st.integers(0, 2 * BLOCK),
    column=st.integers(0, 7),
    seed=st.integers(0, 5),
)
def test_any_shard_starts_from_the_same_weights(rows: int, first: int, column: int, seed: int) -> None:
    table = Table("t", 3 * BLOCK, dim=6)
    whole = torch.full((3 * BLOCK, 8), math.nan)
    init_table(whole, table, seed)
    rows = min(rows, 3 * BLOCK - first)
    part = torch.full((rows, 8 - column), math.nan)
    init_table(part, table, seed, first, column)
    assert torch.equal(part, whole[first : first + rows, column:])


def drawn(table: Table, seed: int) -> torch.Tensor:
    """What tables have started from since the first version, in so many words."""
    if not table.init_std:
        return torch.zeros(table.rows, table.dim or 0)
    blocks = []
    for block in range(-(-table.rows // BLOCK)):
        generator = torch.Generator().manual_seed(seed_from(f"{seed}/{table.name}/{block}"))
        blocks.append(torch.randn(BLOCK, table.dim or 0, generator=generator).mul_(table.init_std))
    return torch.cat(blocks)[: table.rows]


@pytest.mark.parametrize("threads", [1, 3])
def test_initial_weights_are_those_of_all_versions(threads: int) -> None:
    """Bit for bit, in any number of threads and whatever a rank holds of a table."""
    tables = [
        Table("a", 3 * BLOCK + 17, dim=8, init_std=1 / 3),  # in place
        Table("b", 2 * BLOCK, dim=5),  # by way of a block, as padding lies between its rows
        Table("c", 30, dim=16, init_std=2.7),
        Table("zero", 2 * BLOCK, dim=4, init_std=0.0),
    ]
    parts = [Part(torch.full((table.rows, table.stored_dim), math.nan), table) for table in tables]
    parts.append(Part(torch.full((BLOCK + 3, 4), math.nan), tables[0], 2 * BLOCK - 5, 4))  # of two blocks and a half
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        init_tables(parts, seed=7)
    finally:
        torch.set_num_threads(before)
    for part in parts[:-1]:
        width = part.table.dim or 0
        assert torch.equal(part.out[:, :width].view(torch.int32), drawn(part.table, 7).view(torch.int32))
        assert not part.out[:, width:].any()
    assert torch.equal(parts[-1].out, parts[0].out[2 * BLOCK - 5 : 3 * BLOCK - 2, 4:])


def test_in_fp16_they_are_the_same_rounded() -> None:
    table = Table("t", BLOCK + 17, dim=8, init_std=1 / 3)
    weights = torch.full((table.rows, 8), math.nan, dtype=torch.float16)
    init_table(weights, table, seed=7)
    assert torch.equal(weights, drawn(table, 7).half())


def test_a_fault_of_one_thread_is_told() -> None:
    integers = Part(torch.zeros(2 * BLOCK, 4, dtype=torch.int64), Table("t", 2 * BLOCK, dim=4))
    with pytest.raises(NotImplementedError):
        init_tables([integers], seed=1)


def test_initial_weights() -> None:
    table = Table("t", 5000, dim=6, init_std=0.5)
    weights = torch.empty(5000, 8)
    init_table(weights, table, seed=1)
    assert not weights[:, 6:].any()
    assert weights[:, :6].std() == pytest.approx(0.5, rel=0.02)
    assert weights[:, :6].mean().abs() < 0.01
    other = torch.empty_like(weights)
    init_table(other, Table("u", 5000, dim=6, init_std=0.5), seed=1)
    assert not torch.equal(weights, other)
    init_table(other, table, seed=2)
    assert not torch.equal(weights, other)
    init_table(other, table.linear, seed=1)
    assert not other.any()
