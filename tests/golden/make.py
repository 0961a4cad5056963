"""Make the golden checkpoints of the format that this code writes: once, before a release changes the format.

    python tests/golden/make.py tests/golden/format-1

Each run is trained to its end; the checkpoints of some steps on the way are kept as a run leaves them that was killed
there, beside the run file as a user wrote it, and what the uninterrupted run went on to give. They are never made anew:
later versions of this package have to go on from them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from rechub_tests.runs import write_data

CITIES = ("Aachen", "Bonn", "Celle", "Dessau", "Erfurt", "Fulda", "Gera")
# name: run file, ranks, and the steps of which checkpoints are kept
RUNS: dict[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {
    "deepfm": (  # everything by default; strings by a vocabulary; a best checkpoint and a newer one
        {
            "data": {
                "batch_size": 64,
                "labels": ["click"],
                "features": {
                    "city": {"kind": "sparse", "rows": 8, "vocabulary": "_words/city.parquet"},
                },
            },
            "model": {
                "name": "DeepFM",
                "features": ["user", "item", "city", "tags", "user_x_tags", "age"],
                "hidden_units": [16, 8],
                "dropout_rates": 0.0,
                "embedding_dim": 4,
            },
            "train": {"epochs": 2},
        },
        1,
        (9, 14),
    ),
    "din": (  # two ranks, all kinds of placement
        {
            "data": {"batch_size": 64, "labels": ["click"]},
            "model": {
                "name": "DIN",
                "features": ["user", "brands", "profile"],
                "behavior_features": ["history", "history_shop"],
                "target_features": ["item", "shop"],
                "attention_units": [8],
                "hidden_units": [16],
            },
            "embedding": {
                "dim": 8,
                "rules": [
                    {"tables": "user", "sharding": "row_wise", "optimizer": {"name": "adagrad"}},
                    {"tables": "brands", "sharding": "replicated", "optimizer": {"name": "adam", "lr": 0.001}},
                ],
            },
            "train": {"epochs": 2},
        },
        2,
        (5,),
    ),
    "sasrec": (  # negatives are drawn; evaluation settings stand with the objective
        {
            "data": {"batch_size": 64},
            "model": {
                "name": "SASRec",
                "max_len": 6,
                "num_heads": 1,
                "num_layers": 1,
                "hidden_size": 8,
                "dropout_rate": 0.0,
            },
            "objective": {"name": "retrieval", "num_negatives": 2, "top_k": [5, 10], "sampled_items": 20},
            "train": {"epochs": 2},
        },
        1,
        (5,),
    ),
    "mmoe": (  # two tasks, schedules, a clipped gradient, a short last batch left out
        {
            "data": {"batch_size": 48, "labels": ["click", "stay"], "drop_last": True, "max_streams": 4},
            "model": {
                "name": "MMoE",
                "features": ["user", "item", "history", "age", "profile"],
                "expert_units": [8],
                "num_experts": 2,
                "num_tasks": 2,
                "task_types": ["classification", "regression"],
                "tower_units": [8],
            },
            "objective": {"name": "pointwise", "task_weights": {"stay": 0.5}},
            "embedding": {"optimizer": {"name": "sgd", "lr": 0.5}, "schedule": {"warmup_steps": 8}},
            "optimizer": {
                "name": "adamw",
                "lr": 0.01,
                "weight_decay": 0.01,
                "clip_norm": 1.0,
                "schedule": {"name": "cosine", "decay_steps": 40, "warmup_steps": 4},
            },
            "train": {"epochs": 2},
        },
        1,
        (5,),
    ),
    "dssm": (  # a mix of two sources, and negatives that are corrected for how often items occur
        {
            "data": {
                "batch_size": 64,
                "mix": [{"path": "train", "weight": 3}, {"path": "valid", "repeat": True}],
                "test": None,
            },
            "model": {
                "name": "DSSM",
                "user_features": ["user", "tags"],
                "item_features": ["item"],
                "hidden_units": [16, 8],
                "dropout_rates": 0.0,
                "embedding_dim": 8,
            },
            "train": {"epochs": 1},
        },
        1,
        (5,),
    ),
}


def main(folder: Path) -> None:
    """Make the folder of a format, which must not be there yet."""
    folder.mkdir(parents=True)
    write_data(folder / "data")
    _add_cities(folder / "data")
    for name, (written, ranks, steps) in RUNS.items():
        run = folder / name
        run.mkdir()
        tree = {"output_dir": f"{name}/out", **written, "data": {"root": "data", **written["data"]}}
        (run / "run.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        settings = [f"checkpoint.every_steps={steps[0]}", "checkpoint.keep_last=99", "train.log_every=1"]
        _train(folder, name, ranks, settings)
        if len(steps) > 1:  # those that come at no multiple of the first
            whole = (run / "out" / "metrics.jsonl").read_text()
            shutil.copytree(run / "out" / "checkpoints", run / "first")
            shutil.rmtree(run / "out")
            _train(folder, name, ranks, [f"checkpoint.every_steps={steps[1]}", *settings[1:]])
            assert _losses(whole) == _losses((run / "out" / "metrics.jsonl").read_text())
        _keep(run, steps)


def _add_cities(root: Path) -> None:
    rng = np.random.default_rng(1)
    for file in sorted(root.rglob("*.parquet")):
        table = pq.read_table(file)
        cities = pa.array([CITIES[i] for i in rng.integers(0, len(CITIES), table.num_rows)])
        pq.write_table(table.append_column("city", cities), file, row_group_size=70, compression="zstd")
    (root / "_words").mkdir()
    words = pa.table({"value": list(CITIES), "id": np.arange(1, len(CITIES) + 1)})
    pq.write_table(words, root / "_words" / "city.parquet")


def _train(folder: Path, name: str, ranks: int, settings: list[str]) -> None:
    line = [sys.executable, "-m", "rechub_dist", "train", f"{name}/run.yaml", "--nproc", str(ranks)]
    line += [part for setting in settings for part in ("--set", setting)]
    subprocess.run(line, cwd=folder, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _losses(text: str) -> list[float]:
    records = [json.loads(line) for line in text.splitlines()]
    return [record["loss"] for record in records if record["split"] == "train"]


def _keep(run: Path, steps: tuple[int, ...]) -> None:
    text = (run / "out" / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    valid = {record["step"]: record for record in records if record["split"] == "valid"}
    drop = ("step", "epoch", "split", "time", "seconds", "samples_per_second")
    metrics = {step: {k: v for k, v in record.items() if k not in drop} for step, record in valid.items()}
    (run / "expected.json").write_text(json.dumps({"losses": _losses(text), "valid": metrics}, indent=1) + "\n")
    for path in (run / "out").iterdir():
        if path.name not in ("config.yaml", "checkpoints"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (run / "out" / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) not in steps:
            shutil.rmtree(path)
    if (run / "first").exists():
        step = f"step-{steps[0]:010d}"
        shutil.rmtree(run / "out" / "checkpoints" / step, ignore_errors=True)
        shutil.move(run / "first" / step, run / "out" / "checkpoints" / step)
        shutil.rmtree(run / "first")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
