"""The order of rows, draws and hashes of ids are those of their version: checkpoints hold a position in them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rechub_dist.data.columns.cross import cross
from rechub_dist.data.columns.hashing import hash_ids
from rechub_dist.data.columns.strings import hash_strings
from rechub_dist.data.negatives import Draw, catalogue_share, draw_ids
from rechub_dist.data.order.epoch import ORDER_VERSION, RowOrder
from rechub_dist.data.order.mix import Mix, MixOrder
from rechub_dist.features import CrossFeature, NegativeFeature, SparseFeature, Table

FOLDER = Path(__file__).parents[1] / "golden"


def _many(groups: int, low: int, high: int) -> list[int]:
    """Row groups of mixed sizes, by an arithmetic of their own."""
    return [low + (i * i * 7 + 3 * i) % (high - low + 1) for i in range(groups)]


LAYOUTS: dict[str, list[int]] = {
    "even": [50] * 24,
    "uneven": _many(31, 0, 60),
    "one": [333],
    "few": [70, 70, 60],
    "many": [40] * 300,  # beyond 32 per stream: with phases
    "large": [4000] * 9,  # row groups that are much of the bound on open rows
    "wide": _many(200, 5, 30),  # more streams than start at once
    "wider": [20] * 260,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {"batch_size": 64},
    "seed": {"batch_size": 64, "seed": 2024},
    "large-batch": {"batch_size": 500, "seed": 7},
    "stored": {"batch_size": 64, "shuffle": False},
    "drop-last": {"batch_size": 48, "drop_last": True, "seed": 3},
    "few-streams": {"batch_size": 33, "max_streams": 4, "seed": 3},
    "one-stream": {"batch_size": 32, "max_streams": 1},
    "many-streams": {"batch_size": 64, "max_streams": 256, "seed": 5},
    "tight": {"batch_size": 64, "shuffle_rows": 400, "seed": 5},
    "tighter": {"batch_size": 64, "shuffle_rows": 20_000, "seed": 5},
    "streams": {"batch_size": 50, "shuffle": False, "streams": 6},
}
MIXES = {
    "mix": Mix((20, 4), (3.0, 1.0), (False, True)),
    "mix-three": Mix((10, 8, 6), (1.0, 1.0, 0.5), (True, False, False)),
}


def rows_of(order: RowOrder | MixOrder, epoch: int) -> str:
    """A hash of the (row group, row) pairs of an epoch, batch after batch."""
    found, one = hashlib.sha256(), order.epoch(epoch)

    @cache
    def window(index: int) -> tuple[int, Any]:
        place, permuted = one.window(index), one.permutation(index)
        local = np.arange(place.stop - place.start) if permuted is None else permuted
        return place.group, place.start + local

    for step in range(order.steps):
        share = one.share(step)
        found.update(np.array([step, share.rows, share.position, share.total], "<i8").tobytes())
        for piece in share.slices:
            group, rows = window(piece.window)
            found.update(np.array([group, *rows[piece.start : piece.stop]], "<i8").tobytes())
    return found.hexdigest()[:16]


# Streams that reach their next windows at about the same time: row groups, least rows, their spread, its stride; batch
# size and bound on open rows. Of the first two a threshold in what counts as such a time changes the order.
CROWDED = [
    (138, 747, 725, 37, 32, 14_342),
    (168, 717, 644, 16, 256, 27_532),
    (130, 1000, 500, 7, 64, 115_200),
    (200, 3000, 1, 1, 64, 230_000),
    *((64, 100 + 40 * i, 30 + i, 5 + i, 1 << i % 9, (150 + 40 * i) << 2 + i % 5) for i in range(20)),
]


def windows(groups: int, least: int, spread: int, stride: int, batch_size: int, shuffle_rows: int) -> str:
    """A hash of the windows of one of `CROWDED`."""
    counts = [least + i * stride % spread for i in range(groups)]
    return _hash(*RowOrder(counts, batch_size, shuffle_rows=shuffle_rows).epoch(0).all_windows())


def _hash(*arrays: Any) -> str:
    return hashlib.sha256(b"".join(np.asarray(array, "<i8").tobytes() for array in arrays)).hexdigest()[:16]


def draws() -> dict[str, str]:
    """What rows draw, and what ids are hashed to."""
    table = Table("item", 61)
    like, lengths = np.array([1, 3, 0, 2]), np.array([2, 0, 1, 3])
    held = [(np.array([3, 60, 7, 1, 2, 3]), lengths)]
    draw = Draw(seed=2024, epoch=3, position=128, first=5, total=64)
    plain = NegativeFeature("negatives", table, "item", count=4, exclude=("history",))
    weighted = NegativeFeature("negatives", table, "item", count=4, uniform=False)
    cumulative = np.cumsum(np.arange(1.0, 62.0))
    words = ["", "a", "b", "aa", "Zürich", "x" * 300]
    ids = np.array([-1, 0, 1, 2, 2**40, -(2**62)])
    crossed = CrossFeature("a_x_b", (SparseFeature("a", table), SparseFeature("b", table)), 101)
    one, several = np.array([5, 9, 11]), (np.array([1, 2, 3, 4]), np.array([2, 0, 2]))
    return {
        "uniform": _hash(*draw_ids(plain, like, held, None, draw)),
        "weighted": _hash(*draw_ids(weighted, like, [], cumulative, draw)),
        "catalogue": _hash(*catalogue_share(61, draw, 7)),
        "integers": _hash(hash_ids(ids, "item", 61), hash_ids(ids, "user", 10**6)),
        "strings": _hash(hash_strings(pa.array(words))),
        "cross": _hash(cross(crossed, [(one, None), (one + 1, None)])[0]),
        "cross-lists": _hash(*cross(crossed, [(one, None), several])),
    }


def current() -> dict[str, str]:
    """All hashes of this code, by name."""
    found = {}
    for layout, counts in LAYOUTS.items():
        for setting, values in SETTINGS.items():
            order = RowOrder(counts, **values)
            found[f"{layout}/{setting}"] = " ".join(rows_of(order, epoch) for epoch in (0, 3))
    for layout, values in (
        ("even", {"shuffle_rows": 600}),
        ("many", {"max_streams": 8}),
    ):  # just beyond the bounds from which streams get phases
        found[f"{layout}/bound"] = rows_of(RowOrder(LAYOUTS[layout], 64, **values), 0)
    found |= {f"windows/{number}": windows(*case) for number, case in enumerate(CROWDED)}
    for name, mix in MIXES.items():
        for drop_last in (False, True):
            mixed = MixOrder(_many(24, 10, 60), 64, mix, seed=11, drop_last=drop_last)
            found[f"{name}/{'drop-last' if drop_last else 'all'}"] = " ".join(rows_of(mixed, e) for e in (0, 1, 5))
    return found | {f"draws/{name}": value for name, value in draws().items()}


def test_the_order_is_that_of_its_version() -> None:
    file = FOLDER / f"order-{ORDER_VERSION}.json"
    advice = f"raise ORDER_VERSION, and write the new order's hashes: python {sys.argv[0]} (see this file)"
    assert file.exists(), advice
    wanted: dict[str, str] = json.loads(file.read_text())
    found = current()
    assert found.keys() == wanted.keys()
    differing = [name for name in wanted if wanted[name] != found[name]]
    assert not differing, f"another order than that of version {ORDER_VERSION}: {differing}; {advice}"


def test_versions_have_orders_of_their_own() -> None:
    hashes = [path.read_text() for path in FOLDER.glob("order-*.json")]
    assert hashes
    assert len(set(hashes)) == len(hashes)


def write(make: Callable[[], dict[str, str]] = current) -> None:
    """Write the hashes of a new version; those of an old one are never written anew."""
    with (FOLDER / f"order-{ORDER_VERSION}.json").open("x") as file:
        file.write(json.dumps(make(), indent=1) + "\n")


if __name__ == "__main__":
    write()
