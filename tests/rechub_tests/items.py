"""A file of items beside the small data set, and a run file whose items have further features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rechub_tests.runs import run_file

ITEMS = 61


def write_items(root: Path, items: np.ndarray) -> None:
    (root / "items").mkdir(exist_ok=True)
    columns = {"item": items, "shop": items % 17, "age": (items / ITEMS).astype(np.float32)}
    pq.write_table(pa.table(columns), root / "items" / "part-0.parquet", row_group_size=20)


def several_features(folder: Path, root: Path) -> Path:
    model = {
        "user_features": ["user", "history", "profile"],
        "item_features": ["item", "shop", "age"],
        "hidden_units": [16],
        "dropout_rates": 0.0,
        "embedding_dim": 8,
        "temperature": 0.1,
    }
    return run_file(folder, root, "DSSM", model=model, embedding={"sharding": "row_wise", "dim": 8})
