"""What is trained: the data sets, the run files, as a user would write them, and which loop by hand each is beside."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from handwritten.common import (
    BLOCKS,
    CROSSES,
    DENSE,
    EXPERTS,
    HEADS,
    HIDDEN,
    HISTORY,
    IDS,
    LENGTH,
    OTHERS,
    STATE,
    TARGET,
    TASKS,
    TEMPERATURE,
    TOWER,
    UNITS,
    VECTOR,
    WIDTH,
)
from rechub_dist.data.prepare.synthetic import synthesize
from rechub_dist.data.prepare.writer import ROW_GROUP, ShardWriter, prepared_folder, write_schema
from rechub_dist.features import Feature, FeatureSchema, Label, SequenceFeature, SparseFeature, Table

TABLE_LR, DENSE_LR = 0.02, 1e-3
RANKS = 2
Tree = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """A data set: `dense` and `sparse` features with tables of `vocabulary` rows each, ids by a power law; 8 in 10
    rows train. With `histories` it is that of `handwritten` with a target item, its category, and histories of both.
    """

    rows: int
    dense: int = len(DENSE)
    sparse: int = len(IDS)
    vocabulary: int = 100_000
    labels: int = 1
    histories: bool = False

    def prepare(self, cache: Path) -> Path:
        """The prepared folder, made at first use."""
        kind = "histories" if self.histories else "flat"
        sizes = f"{self.dense}-{self.sparse}x{self.vocabulary}-{self.labels}-{self.rows}"
        folder = cache / f"{kind}-{sizes}"
        if not (folder / "dataset.yaml").exists():
            cache.mkdir(parents=True, exist_ok=True)
            if self.histories:
                _histories(folder, self.rows, self.vocabulary)
            else:
                sizes_of = {"dense": self.dense, "sparse": self.sparse, "vocabulary": self.vocabulary}
                synthesize(folder, self.rows, labels=self.labels, **sizes_of)
        return folder

    @property
    def names(self) -> list[str]:
        """The sparse features."""
        return [f"sparse_{i}" for i in range(self.sparse)]

    @property
    def dense_names(self) -> list[str]:
        """The dense features."""
        return [f"dense_{i}" for i in range(self.dense)]


CATEGORIES = 1000  # rows of the categories' table


def _histories(folder: Path, rows: int, vocabulary: int) -> None:
    """Six fields, a target of two attributes and histories of 0 to LENGTH items (uniform), labels at random."""
    sizes = {"item": vocabulary, "category": CATEGORIES}
    tables = {name: Table(name, size) for name, size in sizes.items()}
    features: list[Feature] = [SparseFeature(name, Table(name, vocabulary)) for name in OTHERS]
    features += [SparseFeature(name, tables[name]) for name in TARGET]
    features += [SequenceFeature(name, tables[of], max_length=LENGTH) for name, of in zip(HISTORY, TARGET, strict=True)]
    rng = np.random.default_rng(0)

    def drawn(size: int, count: int) -> pa.Array:
        return pa.array((size * rng.random(count) ** 3).astype(np.int32))

    def pieces(count: int) -> Iterator[pa.Table]:
        for start in range(0, count, ROW_GROUP):
            n = min(ROW_GROUP, count - start)
            offsets = pa.array(np.concatenate([[0], np.cumsum(rng.integers(0, LENGTH + 1, n))]).astype(np.int32))
            total = offsets[-1].as_py()
            columns = {name: drawn(vocabulary, n) for name in OTHERS}
            columns |= {name: drawn(size, n) for name, size in sizes.items()}
            for name, of in zip(HISTORY, TARGET, strict=True):
                columns[name] = pa.ListArray.from_arrays(offsets, drawn(sizes[of], total))
            yield pa.table(columns | {"label": pa.array(rng.integers(0, 2, n).astype(np.int8))})

    tenth = rows // 10
    with prepared_folder(folder, "histories") as work:
        for split, size in (("train", rows - 2 * tenth), ("valid", tenth), ("test", tenth)):
            schema = next(pieces(1)).schema
            with ShardWriter(work, split, schema) as writer:
                for piece in pieces(size):
                    writer.write(piece)
        write_schema(work, "histories", FeatureSchema(tuple(features), (Label("label"),)))


def pieces(folder: Path, size: int, which: range) -> Iterator[pa.Table]:
    """Pieces of `size` rows of the train split, as stored, of which there are as many as there are."""
    table = pq.read_table(folder / "train").combine_chunks()
    last = table.num_rows // size
    for index in which:
        yield table.slice(index % last * size, size).combine_chunks()


@dataclass(frozen=True)
class Shape:
    """A model on a data set.

    Attributes:
        model: the section of the run file.
        batch: rows of a global batch.
        net: name of the loop by hand, a class of `speed.bare`.
        width: of the tables where the model sets none.
        more: further sections of the run file.
    """

    name: str
    data: Data
    model: Tree
    batch: int
    net: str
    width: int | None = None
    more: Tree = field(default_factory=dict)

    def run(self, cache: Path, out: Path, *, threads: int = 1, **changes: Any) -> Tree:
        """The run file; `changes` are by dotted keys, with two underscores for each dot."""
        tree: Tree = {
            "output_dir": str(out),
            "device": "cpu",
            "data": {"root": str(self.data.prepare(cache)), "valid": None, "test": None, "batch_size": self.batch},
            "model": self.model,
            "embedding": {"sharding": "table_wise", "optimizer": {"name": "rowwise_adagrad", "lr": TABLE_LR}},
            "optimizer": {"name": "adam", "lr": DENSE_LR},
            "train": {"epochs": 1_000_000, "log_every": 50},
            "checkpoint": {"every_steps": 1_000_000_000},
            # a contestant that is stopped while others have their turn has not stalled
            "distributed": {"threads": threads, "timeout_seconds": 3600, "stall_seconds": 3600},
        }
        if self.width is not None:
            tree["embedding"]["dim"] = self.width
        tree = copy.deepcopy(tree | self.more)
        for key, value in changes.items():
            *parents, leaf = key.split("__")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        return tree

    def small(self) -> Shape:
        """In sizes that only show that it works."""
        data = replace(self.data, rows=20_000, vocabulary=min(self.data.vocabulary, 2000))
        return replace(self, data=data, batch=256)


def deepfm(vocabulary: int = 100_000, sparse: int = len(IDS), rows: int = 1_024_000) -> Shape:
    """DeepFM of Criteo's shape: 13 dense and 26 sparse features, width 16, layers of 256 and 128, batches of 4096."""
    data = Data(rows, sparse=sparse, vocabulary=vocabulary)
    model = {
        "name": "DeepFM",
        "features": data.names + data.dense_names,
        "hidden_units": HIDDEN,
        "dropout_rates": 0.0,
        "embedding_dim": WIDTH,
    }
    return Shape(f"DeepFM, {sparse} x {vocabulary:,} rows", data, model, 4096, "DeepFM")


def model(name: str) -> Shape:
    """One of `models`."""
    return next(one for one in models() if one.name == name)


def models() -> list[Shape]:
    """What is beside loops by hand, in the sizes of `handwritten`."""
    flat, three = Data(512_000), Data(512_000, labels=TASKS)
    histories = Data(128_000, dense=0, sparse=len(OTHERS), histories=True)
    features = IDS + DENSE
    return [
        Shape(
            "DIN",
            histories,
            {
                "name": "DIN",
                "features": OTHERS,
                "behavior_features": HISTORY,
                "target_features": TARGET,
                "attention_units": UNITS,
                "hidden_units": HIDDEN,
            },
            2048,
            "DIN",
            WIDTH,
        ),
        Shape(
            "SASRec",
            histories,
            {
                "name": "SASRec",
                "max_len": LENGTH,
                "num_heads": HEADS,
                "num_layers": BLOCKS,
                "hidden_size": STATE,
                "dropout_rate": 0.0,
                "history": HISTORY[0],
                "item": TARGET[0],
            },
            512,
            "SASRec",
        ),
        Shape(
            "MMoE",
            three,
            {
                "name": "MMoE",
                "features": features,
                "expert_units": HIDDEN,
                "num_experts": EXPERTS,
                "num_tasks": TASKS,
                "tower_units": TOWER,
            },
            4096,
            "MMoE",
            WIDTH,
        ),
        Shape(
            "DCNv2",
            flat,
            {"name": "DCNv2", "features": features, "cross_num": CROSSES, "hidden_units": HIDDEN},
            4096,
            "DCNv2",
            WIDTH,
        ),
        Shape(
            "DSSM, in-batch negatives",
            histories,
            {
                "name": "DSSM",
                "user_features": [*OTHERS, HISTORY[0]],
                "item_features": [TARGET[0]],
                "hidden_units": HIDDEN,
                "dropout_rates": 0.0,
                "embedding_dim": VECTOR,
                "temperature": TEMPERATURE,
            },
            2048,
            "DSSM",
            WIDTH,
            # without the correction for popular items, which the loop by hand has not, either
            {"objective": {"name": "retrieval", "negatives": "in_batch", "log_q": False}},
        ),
    ]
