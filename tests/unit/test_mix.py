from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_reader import SPEC, Row, rows_of, write

from rechub_dist.data.order.mix import Mix, MixOrder, quotas
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.reader import ParquetReader

Layout = list[list[int]]  # of each source, the row groups' sizes


def mix_of(layout: Layout, weights: tuple[float, ...], repeat: tuple[bool, ...]) -> Mix:
    return Mix(tuple(map(len, layout)), weights, repeat)


def united(folder: Path, layout: Layout) -> Manifest:
    """A file a source; `row` numbers the rows over all."""
    return write(folder, layout)


def source_of(layout: Layout, row: int) -> int:
    return int(np.searchsorted(np.cumsum([sum(counts) for counts in layout]), row, side="right"))


def read(
    manifest: Manifest, epoch: int, start: int = 0, stop: int | None = None, world: int = 1, **arguments: Any
) -> list[list[Row]]:
    ranks = []
    for rank in range(world):
        reader = ParquetReader(manifest, SPEC, rank=rank, world_size=world, **arguments)
        batches = reader.batches(epoch, start)
        ranks.append([rows_of(next(batches)) for _ in range(start, reader.steps if stop is None else stop)])
        batches.close()
    return [[row for batch in batches for row in batch] for batches in zip(*ranks, strict=True)]


@given(batch_size=st.integers(1, 5000), weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_quotas_add_up_and_are_within_one_row_of_the_weights(batch_size: int, weights: list[float]) -> None:
    found = quotas(batch_size, weights)
    assert sum(found) == batch_size
    for quota, weight in zip(found, weights, strict=True):
        assert abs(quota - batch_size * weight / sum(weights)) < 1


def test_quotas_go_by_the_largest_remainder() -> None:
    assert quotas(4, [3, 1]) == [3, 1]
    assert quotas(10, [1, 1, 1]) == [4, 3, 3]
    assert quotas(10, [0.7, 0.24, 0.06]) == [7, 2, 1]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=st.lists(
        st.lists(st.integers(0, 25), min_size=1, max_size=4).filter(lambda counts: sum(counts) > 0),
        min_size=1,
        max_size=3,
    ),
    batch_size=st.integers(12, 40),
    shuffle=st.booleans(),
    shuffle_rows=st.sampled_from((1, 60, 1000)),
    data=st.data(),
)
def test_batches_are_the_same_for_all_ranks_and_restarts_and_each_row_comes_once_a_pass(
    *, tmp_path_factory: pytest.TempPathFactory, layout: Layout, data: st.DataObject, **arguments: Any
) -> None:
    sources = len(layout)
    weights = data.draw(st.tuples(*[st.sampled_from((1.0, 2.0, 3.5))] * sources))
    repeat = data.draw(st.tuples(*[st.booleans()] * sources).filter(lambda repeat: not all(repeat)))
    manifest = united(tmp_path_factory.mktemp("data"), layout)
    arguments["mix"] = mix = mix_of(layout, weights, repeat)
    wanted = quotas(arguments["batch_size"], weights)
    rows = [sum(counts) for counts in layout]
    steps = min(-(-n // q) for n, q, again in zip(rows, wanted, repeat, strict=True) if not again)

    epochs = 3
    batches = [batch for epoch in range(epochs) for batch in read(manifest, epoch, prefetch=0, **arguments)]
    assert len(batches) == epochs * steps
    given_rows: list[list[int]] = [[] for _ in layout]
    for g, batch in enumerate(batches):
        found = [[row[0] for row in batch if source_of(layout, row[0]) == s] for s in range(sources)]
        assert [row for part in found for row in part] == [row[0] for row in batch]
        for s, part in enumerate(found):
            left = rows[s] - g % -(-rows[s] // wanted[s]) * wanted[s]
            assert len(part) == min(wanted[s], left)
            given_rows[s] += part
    for s, taken in enumerate(given_rows):
        for start in range(0, len(taken), rows[s]):  # each pass of the source
            part = taken[start : start + rows[s]]
            assert max(Counter(part).values()) == 1
    order = MixOrder(manifest.counts, arguments["batch_size"], mix)
    for epoch, step in ((0, 0), (0, steps), (1, steps // 2), (2, steps)):
        assert order.rows_before(epoch, step) == sum(map(len, batches[: epoch * steps + step]))

    # the same from any number of ranks, one after the other taking it up
    for epoch in range(epochs):
        done = 0
        while done < steps:
            stop = data.draw(st.integers(done + 1, steps))
            world, prefetch = data.draw(st.sampled_from((1, 2, 3, 5))), data.draw(st.sampled_from((0, 2)))
            found_batches = read(manifest, epoch, done, stop, world, prefetch=prefetch, **arguments)
            assert found_batches == batches[epoch * steps + done : epoch * steps + stop]
            done = stop


def test_windows_know_their_steps_and_what_follows() -> None:
    order = MixOrder([30] * 16 + [8, 8, 9], 24, Mix((16, 3), (2, 1), (False, True)))
    for number in range(3):
        epoch = order.epoch(number)
        used: dict[int, list[int]] = {}
        for step in range(order.steps):
            for piece in epoch.share(step).slices:
                used.setdefault(piece.window, []).append(step)
        for index, steps in used.items():
            window = epoch.window(index)
            # a pass of the second source may have begun before the epoch, and end after it
            assert (max(0, window.first_step), min(order.steps - 1, window.last_step)) == (min(steps), max(steps))
            after = epoch.following(index)
            if after is not None:
                assert min(used[after]) in (max(steps), max(steps) + 1)
                assert epoch.window(after).stream == window.stream


def test_a_pass_of_a_source_is_shuffled_by_itself(tmp_path: Path) -> None:
    layout = [[40, 40], [40, 40]]
    manifest = united(tmp_path, layout)
    batches = read(manifest, 0, batch_size=20, mix=mix_of(layout, (1, 1), (False, False)))
    first, second = ([row[0] % 80 for batch in batches for row in batch if row[0] // 80 == s] for s in (0, 1))
    assert sorted(first) == sorted(second) == list(range(80))
    assert first != second
    assert first != sorted(first)


def test_open_windows_are_those_of_the_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a source that is repeated many times opens one pass after the other, and a rank opens what it needs
    layout = [[30] * 16, [8, 8]]
    manifest = united(tmp_path, layout)
    reader = ParquetReader(manifest, SPEC, batch_size=24, prefetch=0, mix=mix_of(layout, (2, 1), (False, True)))
    assert [order.streams for order in reader.order.sources] == [16, 2]
    most = 0
    from rechub_dist.data.reader import _Source  # noqa: PLC0415

    source = _Source(reader, reader.order.epoch(1))
    for _ in source.batches(0):
        while source.open_ahead():
            pass
        most = max(most, len(source._windows))
    assert 18 <= most <= 18 + 18 // 4 + 1
    opened: list[int] = []
    plain = _Source._read

    def read_window(self: Any, *arguments: Any) -> Any:
        opened.append(1)
        return plain(self, *arguments)

    monkeypatch.setattr(_Source, "_read", read_window)
    next(reader.batches(1, reader.steps - 1))
    assert len(opened) <= 18  # one of each stream


@pytest.mark.parametrize(
    ("weights", "repeat", "drop_last", "message"),
    [
        ((1000, 1), (False, False), False, "the weight 1 of source 1 gives it no row"),
        ((1, 1), (True, True), False, "all sources are repeated"),
        ((1, 9), (False, True), True, "source 1 has 7 rows, but gives 9 to a batch"),
    ],
)
def test_refuses_impossible_mixes(
    weights: tuple[float, ...], repeat: tuple[bool, ...], drop_last: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MixOrder([20, 7], 10, Mix((1, 1), weights, repeat), drop_last=drop_last)
