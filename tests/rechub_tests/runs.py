"""A small data set with every kind of feature, run files over it, and what a finished run left behind."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch import Tensor

from rechub_dist.assembly.examples import example_parameters
from rechub_dist.assembly.parts import Parts, build
from rechub_dist.checkpoint.folder import Folder
from rechub_dist.checkpoint.load import blocks_of, consume, read_manifest, read_rows, verify
from rechub_dist.config import RunConfig, StorageConfig
from rechub_dist.data.run_file import load_run
from rechub_dist.distributed.runtime import runtime
from rechub_dist.embedding.local import LocalTables
from rechub_dist.models import catalogue, family
from rechub_dist.training.trainer import Summary, Trainer, run

ROWS = 530  # not a multiple of any batch size here
SCHEMA = {
    "name": "small",
    "tables": {"item": {"rows": 61, "init_std": 0.3}, "shop": {"rows": 17, "init_std": 0.3}},
    "features": {
        "user": {"kind": "sparse", "rows": 101, "init_std": 0.3},
        "item": {"kind": "sparse", "table": "item"},
        "shop": {"kind": "sparse", "table": "shop"},
        "tags": {"kind": "sparse", "rows": 23, "pooling": "mean", "init_std": 0.3},
        "history": {"kind": "sequence", "table": "item", "max_length": 6},
        "history_shop": {"kind": "sequence", "table": "shop", "max_length": 6},
        "gap": {
            "kind": "time_gap",
            "times": "history_time",
            "now": "time",
            "boundaries": [2, 4, 6, 9],
            "max_length": 6,
        },
        "brands": {"kind": "sparse", "rows": 13, "weights": "brand_weights", "pooling": "mean", "init_std": 0.3},
        "user_x_tags": {"kind": "cross", "inputs": ["user", "tags"], "buckets": 67},
        "age": {"kind": "dense"},
        "profile": {"kind": "dense", "dim": 3},
    },
    "labels": {"click": {}, "buy": {}, "stay": {"type": "regression"}},
}
# The least that a checkpoint has to record of its run.
RECORD: dict[str, Any] = {
    "identity": {"seed": 0, "model": {"name": "none"}, "data": {}},
    "config": "{}",
    "tables": {},
}
PLAIN = ("user", "tags", "brands", "age", "profile")
BEHAVIORS, TARGETS = ("history", "history_shop"), ("item", "shop")
# What some models can do besides what their constructors require.
MORE: dict[str, dict[str, Any]] = {
    "WideDeep": {"wide_features": ["user", "user_x_tags", "age"]},
    "DeepFM": {"features": ["user", "item", "tags", "brands", "history", "age", "profile"], "embedding_dim": 6},
    "DCNv2": {"low_rank": 4, "num_experts": 3},
    "BST": {"time_gaps": "gap", "hidden_units": [16]},
    "SASRec": {"num_layers": 1},
    # Here no pair comes to lie at the hinge's kink, where a rounding error changes the run.
    "FacebookDSSM": {"margin": 0.5},
}


def parameters(model: str) -> dict[str, Any]:
    """A small instance of any model: what it requires, batch norm where it has any, and no dropout."""
    cls = catalogue()[model]
    found = example_parameters(cls, PLAIN, BEHAVIORS, TARGETS)
    for name in inspect.signature(cls.__init__).parameters:
        if name.startswith("dropout_rate"):
            found[name] = 0.0
        if name == "batch_norm":
            found[name] = True
    if "task_types" in found:
        found["task_types"] = ["classification", "regression"]
    return found | MORE.get(model, {})


def labels(model: str) -> list[str] | None:
    """The labels that fit the model's tasks."""
    if model == "ESMM":
        return ["click", "buy"]
    if model == "FacebookDSSM":
        return ["click", "stay"]
    return {"ranking": ["click"], "multitask": ["click", "stay"], "recall": None}[family(catalogue()[model])]


def write_data(root: Path, rows_of_train: int = ROWS) -> None:
    """Rows with empty, short and long histories; labels that depend on the ids."""
    rng = np.random.default_rng(0)
    for split, rows in (("train", rows_of_train), ("valid", 90), ("test", 70)):
        lengths = rng.integers(0, 9, rows)
        histories = [rng.integers(0, 61, n) for n in lengths]
        brands = [rng.integers(0, 13, n) for n in rng.integers(0, 3, rows)]
        user, item = rng.integers(0, 101, rows), rng.integers(0, 61, rows)
        table = pa.table(
            {
                "user": user,
                "item": item,
                "shop": item % 17,
                "tags": [rng.integers(0, 23, n).tolist() for n in rng.integers(0, 4, rows)],
                "history": [h.tolist() for h in histories],
                "history_shop": [(h % 17).tolist() for h in histories],
                "history_time": [np.sort(rng.integers(0, 12, n)).tolist() for n in lengths],
                "time": rng.integers(11, 15, rows),
                "brands": [b.tolist() for b in brands],
                "brand_weights": [rng.random(len(b)).tolist() for b in brands],
                "age": rng.normal(size=rows).astype(np.float32),
                "profile": pa.FixedSizeListArray.from_arrays(rng.normal(size=rows * 3).astype(np.float32), 3),
                "click": ((user * 7 + item) % 3 == 0).astype(np.int8),
                "buy": ((user + item) % 2 == 0).astype(np.int8),
                "stay": rng.normal(size=rows).astype(np.float32),
                "importance": rng.integers(0, 4, rows).astype(np.float32),
            }
        )
        folder = root / split
        folder.mkdir(parents=True)
        for part, offset in enumerate(range(0, rows, 200)):
            pq.write_table(table.slice(offset, 200), folder / f"part-{part}.parquet", row_group_size=70)
    (root / "dataset.yaml").write_text(yaml.safe_dump(SCHEMA, sort_keys=False))


def run_file(folder: Path, root: Path, model: str, /, **sections: Any) -> Path:
    """Write a run file for `model`; `sections` are merged over the defaults."""
    tree: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "seed": 7,
        "data": {"root": str(root), "batch_size": 64, "eval_batch_size": 50},
        "model": {"name": model, **parameters(model)},
        "embedding": {"optimizer": {"name": "rowwise_adagrad", "lr": 0.05}},
        "optimizer": {"name": "adam", "lr": 0.01},
        "train": {"epochs": 2, "log_every": 1},
        "monitor": {"profile_every": None},
        "distributed": {"timeout_seconds": 60, "threads": 1},
    }
    if labels(model):
        tree["data"]["labels"] = labels(model)
    if family(catalogue()[model]) == "recall":
        tree["objective"] = {"name": "retrieval", "num_negatives": 2}
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def train(path: Path, overrides: list[str] | None = None) -> Summary:
    """What every rank does."""
    return run(load_run(path, overrides or []))


def start(path: Path, ranks: int) -> subprocess.Popen[str]:
    """The command as a user gives it, in a process group of its own."""
    command = [sys.executable, "-m", "rechub_dist", "train", str(path), "--nproc", str(ranks)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Wait for something that a run does; it must not end before."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


def done_steps(path: Path) -> int:
    """The training steps that a run with log_every 1 has recorded so far."""
    metrics = output(path) / "metrics.jsonl"
    return metrics.read_text().count('"train"') if metrics.exists() else 0


def records(path: Path, split: str) -> list[dict[str, Any]]:
    """The records of a split in the run's metrics.jsonl."""
    lines = (output(path) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def losses(path: Path) -> list[float]:
    """The training loss of every step."""
    found = records(path, "train")
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    return [record["loss"] for record in found]


def output(path: Path) -> Path:
    """The run's output folder."""
    return config_of(path).output_dir


def config_of(path: Path) -> RunConfig:
    """The run's configuration."""
    return load_run(path)


def reported_by(config: RunConfig) -> dict[str, str]:
    """The metrics that an evaluation of a run is to report, and what makes each better."""
    return dict(build(config, device="cpu", world_size=1).train_module.objective.metrics(config.evaluation))


def position(path: Path) -> tuple[int, str]:
    """The step at which a run would go on, and what it says meanwhile."""
    told = io.StringIO()
    with runtime("cpu", 60) as rt, contextlib.redirect_stderr(told):
        trainer = Trainer(config_of(path), rt)
        trainer.report.close()
        return trainer.position.step, told.getvalue()


def last_weights(path: Path) -> tuple[Parts, LocalTables]:
    """A run's parts and plain tables with its last weights, for one process."""
    parts = build(config_of(path), device="cpu", world_size=1)
    tables, model = LocalTables(parts.layout.lookups, 0), parts.train_module.model.eval()
    state = last_checkpoint(path)
    for name, placed in parts.layout.tables.items():
        tables.weight(name).data[:, : placed.table.dim] = state[f"tables/{name}/weight"]
    model.load_state_dict({key: state[f"dense/{key}"] for key in model.state_dict()})
    return parts, tables


def last_checkpoint(path: Path) -> dict[str, Tensor]:
    """The newest checkpoint of a run, whole, by canonical name."""
    return read_checkpoint(max((output(path) / "checkpoints").glob("step-*")))


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors, whole, read by one process without a process group."""
    store = Folder(str(folder.parent), StorageConfig())
    manifest = read_manifest(store, int(folder.name.removeprefix("step-")))
    consume(verify(store, manifest, blocks_of(manifest)))
    return {
        key: torch.cat(list(read_rows(store, manifest, key))).view(saved.shape)
        for key, saved in manifest.tensors.items()
    }
