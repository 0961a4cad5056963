"""Rows as they come: words, nulls and values that nobody knows, in every kind of feature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

ITEMS, SHOPS, CITIES = 500, 40, 300
UNKNOWN = {"out_of_range": "unknown", "missing": "unknown"}
SCHEMA: dict[str, Any] = {
    "name": "raw",
    "derive": {
        "genres": {"kind": "split", "column": "genre_text"},
        "hour": {"kind": "hour", "column": "time", "utc_offset": 8},
    },
    "tables": {"item": {"rows": ITEMS + 1, "init_std": 0.3}, "shop": {"rows": SHOPS, "init_std": 0.3}},
    "features": {
        "user": {"kind": "sparse", "rows": 400, "init_std": 0.3, **UNKNOWN},
        "item": {"kind": "sparse", "table": "item", "vocabulary": "_items.parquet", **UNKNOWN},
        "shop": {"kind": "sparse", "table": "shop", "hash": True, "missing": "unknown"},
        "city": {"kind": "sparse", "rows": 97, "hash": True, "missing": "drop", "init_std": 0.3},
        "tags": {"kind": "sparse", "rows": 23, "pooling": "mean", "init_std": 0.3, **UNKNOWN},
        "genres": {"kind": "sparse", "rows": 31, "hash": True, "init_std": 0.3},
        "hour": {"kind": "sparse", "rows": 24, "missing": "drop", "init_std": 0.3},
        "history": {"kind": "sequence", "table": "item", "max_length": 6, "vocabulary": "_items.parquet", **UNKNOWN},
        "history_shop": {"kind": "sequence", "table": "shop", "max_length": 6, "hash": True, "missing": "unknown"},
        "gap": {
            "kind": "time_gap", "times": "history_time", "now": "time", "boundaries": [60, 3600, 86400],
            "max_length": 6,
        },
        "brands": {
            "kind": "sparse", "rows": 13, "weights": "brand_weights", "pooling": "mean", "init_std": 0.3,
            "out_of_range": "unknown",
        },
        "user_x_tags": {"kind": "cross", "inputs": ["user", "tags"], "buckets": 67, "init_std": 0.3},
        "city_x_genres": {"kind": "cross", "inputs": ["city", "genres"], "buckets": 211, "init_std": 0.3},
        "age": {"kind": "dense", "missing": "fill", "fill": 0.5, "transform": "log", "mean": 0.2, "std": 0.7},
        "profile": {"kind": "dense", "dim": 3, "missing": "fill"},
    },
    "labels": {"click": {}, "buy": {}, "stay": {"type": "regression"}},
}  # fmt: skip
PLAIN = (
    "user", "tags", "brands", "city", "genres", "hour", "user_x_tags", "city_x_genres", "age", "profile",
)  # fmt: skip


def write_raw(root: Path, rows: dict[str, int]) -> Path:
    """A data set with so many rows in each split."""
    root.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate(rows.items()):
        (root / split).mkdir()
        pq.write_table(raw_rows(count, seed), root / split / "part.parquet", row_group_size=1 + count // 3)
    ids = np.random.default_rng(0).permutation(ITEMS) + 1  # 0 is that of unknown items
    words = [f"item {i}" for i in range(ITEMS)]
    pq.write_table(pa.table({"value": words, "id": ids}), root / "_items.parquet")
    (root / "dataset.yaml").write_text(yaml.safe_dump(SCHEMA, sort_keys=False))
    return root


def raw_rows(rows: int, seed: int) -> pa.Table:
    """Rows with a tenth of nulls in all that may be missing, and a tenth of values that no vocabulary has."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 9, rows)  # histories of none, and of more than the longest
    history, now = rng.integers(0, ITEMS, lengths.sum()), rng.integers(10**9, 2 * 10**9, rows)
    brands = rng.integers(0, 3, rows)
    user, item = rng.integers(0, 440, rows), rng.integers(0, ITEMS + 50, rows)
    genres = rng.integers(0, 4, rows)
    told = words("genre", rng.integers(0, 9, 3 * rows)).to_pylist()
    no_history = rng.random(rows) < 0.1
    table = {
        "user": nulls(user, rng),
        "item": nulls(words("item", item), rng),
        "shop": nulls(words("shop", item % 60), rng),
        "city": nulls(words("city", rng.integers(0, CITIES, rows)), rng),
        "tags": ragged(nulls(rng.integers(-3, 30, 4 * rows), rng), rng.integers(0, 5, rows), rng.random(rows) < 0.1),
        "genre_text": nulls(["|".join(told[3 * i : 3 * i + n]) for i, n in enumerate(genres)], rng),
        "history": ragged(nulls(words("item", history + (history % 10 == 0) * ITEMS), rng), lengths, no_history),
        "history_shop": ragged(nulls(words("shop", history % 60), rng), lengths, no_history),
        "history_time": ragged(np.repeat(now, lengths) - rng.integers(0, 10**6, lengths.sum()), lengths, no_history),
        "time": now,
        "brands": ragged(rng.integers(0, 15, brands.sum()), brands, None),
        "brand_weights": ragged(rng.random(brands.sum()), brands, None),
        "age": nulls(np.abs(rng.normal(size=rows)).astype(np.float32) * 9, rng),
        "profile": nulls(rng.normal(size=(rows, 3)).round(3).tolist(), rng),
        "click": ((user * 7 + item) % 3 == 0).astype(np.int8),
        "buy": ((user + item) % 2 == 0).astype(np.int8),
        "stay": rng.normal(size=rows).astype(np.float32),
    }
    return pa.table(table)


def words(kind: str, numbers: NDArray[Any]) -> pa.Array:
    return pa.array([f"{kind} {n}" for n in numbers.tolist()])


def nulls(values: Any, rng: np.random.Generator) -> pa.Array:
    """The values, a tenth of which are not there."""
    whole = values if isinstance(values, pa.Array) else pa.array(values)
    return whole.take(pa.array(np.arange(len(whole)), mask=rng.random(len(whole)) < 0.1))


def ragged(values: Any, lengths: NDArray[Any], missing: NDArray[np.bool_] | None) -> pa.Array:
    """Lists of these lengths; null where they are missing."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    whole = values if isinstance(values, pa.Array) else pa.array(values)
    mask = None if missing is None else pa.array(missing)
    return pa.ListArray.from_arrays(pa.array(offsets), whole.slice(0, int(offsets[-1])), mask=mask)
