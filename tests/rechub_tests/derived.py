"""A data set whose features come from derived columns, which its files hold or not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from rechub_dist.data.columns.derive import derive
from rechub_dist.schema import parse_schema

GENRES = ("drama", "crime", "war", "sci-fi", "docu")
SCHEMA: dict[str, Any] = {
    "name": "derived",
    "derive": {
        "genres": {"kind": "split", "column": "genre_text"},
        "taste": {"kind": "key_values", "column": "taste_text", "weights": "taste_weights"},
        "hour": {"kind": "hour", "column": "time", "utc_offset": 8},
        "weekday": {"kind": "weekday", "column": "time"},
        "age": {"kind": "age", "column": "released", "now": "time"},
        "age_bucket": {"kind": "bucket", "column": "age", "boundaries": [0, 100, 1000, 10000]},
        "relative": {"kind": "ratio", "column": "price", "over": "usual"},
        "liked": {"kind": "overlap", "left": "genres", "right": "taste"},
        "liking": {"kind": "lookup", "keys": "genres", "of": "taste", "values": "taste_weights", "combine": "mean"},
    },
    "tables": {"genre": {"rows": 50, "init_std": 0.3}},
    "features": {
        "user": {"kind": "sparse", "rows": 40, "init_std": 0.3},
        "genres": {"kind": "sparse", "table": "genre", "hash": True, "pooling": "mean"},
        "taste": {"kind": "sparse", "table": "genre", "hash": True, "weights": "taste_weights"},
        "hour": {"kind": "sparse", "rows": 24, "missing": "drop"},
        "weekday": {"kind": "sparse", "rows": 8, "missing": "unknown", "unknown_id": 7},
        "age_bucket": {"kind": "sparse", "rows": 5, "missing": "drop"},
        "age": {"kind": "dense", "missing": "fill", "transform": "log", "mean": 2.5, "std": 3},
        "relative": {"kind": "dense", "missing": "fill", "fill": 1},
        "liked": {"kind": "dense"},
        "liking": {"kind": "dense"},
        "price": {"kind": "dense", "missing": "fill"},
    },
    "labels": {"click": {}},
}
FEATURES = list(SCHEMA["features"])
DERIVED = parse_schema(SCHEMA).derived


def raw_rows(rows: int, seed: int = 0) -> pa.Table:
    """Rows without the derived columns, with nulls in all that these are made of."""
    draw = random.Random(seed)

    def some(make: Callable[[], Any]) -> list[Any]:
        return [None if draw.random() < 0.1 else make() for _ in range(rows)]

    return pa.table(
        {
            "user": np.arange(rows) * 7 % 40,
            "genre_text": some(lambda: "|".join(draw.sample(GENRES, draw.randint(0, 3)))),
            "taste_text": some(lambda: ",".join(f"{g}:{draw.randint(1, 9) / 4}" for g in draw.sample(GENRES, 2))),
            "time": some(lambda: draw.randint(0, 2 * 10**9)),
            "released": some(lambda: draw.randint(0, 2 * 10**9)),
            "price": some(lambda: draw.random() * 100),
            "usual": some(lambda: float(draw.randint(0, 3))),
            "click": [draw.randint(0, 1) for _ in range(rows)],
        }
    )


def held_rows(table: pa.Table) -> pa.Table:
    """The same rows with their derived columns, and without what those are made of."""
    held = derive(table, DERIVED, "held")
    return held.drop_columns(["genre_text", "taste_text", "time", "released", "usual"])


def write_derived(root: Path, *, held: bool, rows: int = 530) -> Path:
    """A data set of three splits, the files of which hold the derived columns or what these are made of."""
    for seed, (split, count) in enumerate((("train", rows), ("valid", 90), ("test", 70))):
        table = raw_rows(count, seed)
        (root / split).mkdir(parents=True)
        for part, offset in enumerate(range(0, count, 200)):
            piece = table.slice(offset, 200)
            path = root / split / f"part-{part}.parquet"
            pq.write_table(held_rows(piece) if held else piece, path, row_group_size=70)
    (root / "dataset.yaml").write_text(yaml.safe_dump(SCHEMA, sort_keys=False))
    return root
