"""Logistic regression on the features and labels of a run file: what a multi-task model has to beat.

    python benchmarks/logistic_regression.py configs/runs/mmoe_kuairand.yaml [--set data.root=...]

Ids are one-hot (several ids of a row share a weight of 1), dense values are scaled to at most 1. One regression a
label, its L2 penalty chosen on the valid split by log loss; AUC and normalised entropy on the test split. For a run
with the entire-space objective a conversion counts together with its click, as there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler

from rechub_dist.assembly.parts import Parts, build
from rechub_dist.batch import Batch
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.storage import join
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.run_file import load_run
from rechub_dist.metrics.binary import binary_metrics
from rechub_dist.objectives import EntireSpaceObjective

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0)  # C, the inverse of the L2 penalty


def design(batch: Batch, parts: Parts) -> sparse.csr_matrix:
    """The rows of a batch, one column an id or dense value."""
    blocks = [sparse.csr_matrix(batch.dense.numpy())]
    for name, feature in parts.layout.features.items():
        jagged = batch.feature(name)
        lengths = jagged.lengths()[: batch.rows].numpy()
        rows = np.repeat(np.arange(batch.rows), lengths)
        share = np.repeat(1 / np.maximum(lengths, 1), lengths)
        shape = (batch.rows, feature.table.rows)
        blocks.append(sparse.csr_matrix((share, (rows, jagged.values().numpy())), shape=shape))
    return sparse.hstack(blocks, format="csr")


def load(parts: Parts, split: str) -> tuple[sparse.csr_matrix, np.ndarray]:
    """A whole split: its design matrix and its targets [rows, labels]."""
    manifest = Manifest.read(join(parts.config.data.root, split))
    reader = ParquetReader(manifest, parts.spec, batch_size=manifest.rows, shuffle=False)
    [batch] = list(reader.batches(0))
    targets = batch.labels.numpy()
    if isinstance(parts.train_module.objective, EntireSpaceObjective):
        targets[:, 1:] *= targets[:, :1]
    return design(batch, parts), targets


def main(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE")] = None,
) -> None:
    """Fit and print."""
    torch.set_num_threads(1)
    parts = build(load_run(run_file, set_ or []), device="cpu", world_size=1)
    splits = {split: load(parts, split) for split in ("train", "valid", "test")}
    table = Table("label", "AUC", "normalised entropy", "C", title=f"logistic regression, {run_file.name}")
    for column, label in enumerate(parts.labels):
        best = (np.inf, 0.0, {"auc": 0.0, "normalized_entropy": 0.0})
        for penalty in PENALTIES:
            model = make_pipeline(MaxAbsScaler(), LogisticRegression(C=penalty, max_iter=500))
            model.fit(splits["train"][0], splits["train"][1][:, column])
            found = {}
            for split in ("valid", "test"):
                x, y = splits[split]
                found[split] = binary_metrics(model.predict_proba(x)[:, 1], y[:, column])
            best = min(best, (found["valid"]["log_loss"], penalty, found["test"]), key=lambda entry: entry[0])
        table.add_row(label.name, f"{best[2]['auc']:.4f}", f"{best[2]['normalized_entropy']:.4f}", f"{best[1]}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
