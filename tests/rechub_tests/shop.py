"""An import of a small shop: items in words, with columns of their own, some of them unknown; and runs over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from rechub_dist.data.importing.plan import plan_of
from rechub_dist.data.importing.run import import_data
from rechub_tests.runs import train

ITEMS, USERS, EVENTS = 50, 30, 900
KINDS = ("book", "lamp", "it's", "rare")
PLAN: dict[str, Any] = {
    "name": "shop", "log": {}, "tables": {"things": {"key": "thing"}}, "user": "user", "item": "thing", "time": "when",
    "min_count": 2, "split": {"by": "leave-last-out"}, "items": True, "now": True, "order": "stored",
    "histories": {"seen": {"column": "thing", "max_length": 8}},
    "features": {"user": {"kind": "sparse"}, "thing": {"kind": "sparse"}, "category": {"kind": "sparse"},
                 "price": {"kind": "dense"}, "seen": {"kind": "sequence"}},
}  # fmt: skip
DSSM = {
    "name": "DSSM", "user_features": ["user", "seen"], "item_features": ["thing", "category", "price"],
    "hidden_units": [16], "dropout_rates": 0.0, "embedding_dim": 8, "temperature": 0.1,
}  # fmt: skip
MIND = {
    "name": "MIND", "num_interests": 3, "routing_iterations": 2, "hidden_size": 8, "embedding_dim": 8,
    "history": "seen", "item": "thing", "max_length": 8,
}  # fmt: skip
SASREC = {"name": "SASRec", "max_len": 8, "num_heads": 1, "num_layers": 1, "hidden_size": 8, "dropout_rate": 0.0,
          "history": "seen", "item": "thing"}  # fmt: skip


def import_shop(root: Path) -> Path:
    """The prepared folder: 50 things, of which five are bought once or never and so are unknown."""
    rng = np.random.default_rng(3)
    bought = np.concatenate([rng.integers(0, ITEMS - 5, EVENTS), [ITEMS - 5, ITEMS - 4]])
    users = np.concatenate([rng.integers(0, USERS, EVENTS), [1, 2]])
    log = {
        "user": [f"u{i}" for i in users],
        "thing": [f"thing {i}" for i in bought],
        "when": np.arange(len(bought)),
    }
    things = {
        "thing": [f"thing {i}" for i in range(ITEMS)],
        "category": [KINDS[3] if i == 7 else KINDS[i % 3] for i in range(ITEMS)],
        "price": rng.random(ITEMS).astype(np.float32),
    }
    frames = {"log": pa.table(log), "tables.things": pa.table(things)}
    import_data(plan_of(PLAN, "plan"), root, memory=1 << 28, threads=1, frames=frames)
    return root


def trained(folder: Path, root: Path, model: dict[str, Any], **sections: Any) -> Path:
    """The output folder of a run of one epoch, in this process."""
    tree: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "seed": 7,
        "data": {"root": str(root), "batch_size": 64},
        "model": model,
        "objective": {"name": "retrieval", "num_negatives": 2},
        "embedding": {"dim": 8, "optimizer": {"name": "rowwise_adagrad", "lr": 0.1}},
        "train": {"epochs": 1},
        "monitor": {"profile_every": None},
        "distributed": {"timeout_seconds": 60, "threads": 1},
    } | sections
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    train(folder / "run.yaml")
    return folder / "out"
