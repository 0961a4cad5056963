"""LocalTables against a loop over rows; initial weights under any sharding; the learning rate's schedule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rechub_dist.config import ScheduleConfig
from rechub_dist.distributed.optim import schedule_factor
from rechub_dist.embedded import Jagged, Lookup
from rechub_dist.embedding.init import BLOCK, init_table
from rechub_dist.embedding.local import LocalTables
from rechub_dist.errors import UserError
from rechub_dist.features import SequenceFeature, SparseFeature, Table

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
    with pytest.raises(ValueError, match="'tags' has weights: give them with its ids"):
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


def test_schedules() -> None:
    warm = ScheduleConfig(warmup_steps=4)
    assert [schedule_factor(warm, step) for step in (0, 1, 3, 4, 100)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    linear = ScheduleConfig(name="linear", warmup_steps=2, decay_steps=10, final=0.2)
    assert [round(schedule_factor(linear, step), 6) for step in (1, 2, 7, 12, 50)] == [1.0, 1.0, 0.6, 0.2, 0.2]
    cosine = ScheduleConfig(name="cosine", decay_steps=10)
    assert [round(schedule_factor(cosine, step), 6) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]
    with pytest.raises(UserError, match="decay_steps"):
        schedule_factor(ScheduleConfig(name="cosine"), 0)
