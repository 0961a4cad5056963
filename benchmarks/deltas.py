"""What a delta of 1% of a table's rows takes, beside an export in full, in one process and one run.

    python benchmarks/deltas.py
    python benchmarks/deltas.py --rows 10000000 --dim 64

The model is a DeepFM over one feature, trained for two steps whose batches are 1% of the rows each, and exported after
both. Reported are the sizes, and the processor time and elapsed time of each of: the export in full; comparing it with
what was before and writing the delta, which `export --since` does after that; opening the export as a server does when
its folder was replaced, with checksums; opening the bundle before with the delta, as a server does that has that bundle
open; and folding both. The figures are medians of the rounds. The scores of both ways must be the same.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
import yaml
from rich.console import Console
from rich.table import Table as Screen


def main(
    rows: Annotated[int, typer.Option(help="Of the table.")] = 1_000_000,
    dim: Annotated[int, typer.Option(help="Width of a row.")] = 64,
    rounds: Annotated[int, typer.Option(help="Of which the medians are reported.")] = 5,
) -> None:
    """Measure, and print a table."""
    from rechub_dist.data.parquet.outputs import whole_folder  # noqa: PLC0415 - torch is slow to import
    from rechub_dist.inference.bundle.bundle import Bundle  # noqa: PLC0415
    from rechub_dist.inference.bundle.deltas import read_state  # noqa: PLC0415
    from rechub_dist.inference.deltas import compare, fold, write_delta  # noqa: PLC0415
    from rechub_dist.inference.export import export_bundle  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="rechub-deltas-") as name:
        root = Path(name)
        before, after, delta = root / "before", root / "after", root / "delta"
        _train(root, rows, dim, steps=1)
        export_bundle(str(root / "run"), before)
        _train(root, rows, dim, steps=2)

        def write() -> None:
            shutil.rmtree(delta, ignore_errors=True)
            with whole_folder(delta, "delta") as work:
                write_delta(compare(read_state(before), after), work)

        former = Bundle(before, threads=1, check=True)
        measured = {
            "export in full": _measured(rounds, lambda: export_bundle(str(root / "run"), after)),
            "compare, and write the delta": _measured(rounds, write),
            "open the export": _measured(rounds, lambda: Bundle(after, threads=1, check=True)),
            "open the delta": _measured(rounds, lambda: Bundle(before, [delta], threads=1, check=True, former=former)),
            "fold": _measured(rounds, lambda: fold(read_state(before, [delta]), root / "folded")),
        }
        users = {"user": np.arange(0, rows, 7)}
        one, other = Bundle(after).score(users), Bundle(before, [delta]).score(users)
        assert all(np.array_equal(one[column], other[column]) for column in one), "the scores differ"
        screen = Screen("", "processor s", "elapsed s", title=f"{rows:,} x {dim}, of which 1% changed")
        for what, (spent, elapsed) in measured.items():
            screen.add_row(what, f"{spent:.2f}", f"{elapsed:.2f}")
        Console().print(screen, f"export: {_size(after) / 1e6:,.1f} MB, delta: {_size(delta) / 1e6:,.1f} MB")


def _train(root: Path, rows: int, dim: int, steps: int) -> None:
    """Train for so many steps, each on other rows."""
    from rechub_dist.data.run_file import load_run  # noqa: PLC0415
    from rechub_dist.training.trainer import run  # noqa: PLC0415

    batch, rng = rows // 100, np.random.default_rng(0)
    if not (root / "data").exists():
        (root / "data" / "train").mkdir(parents=True)
        table = {"user": rng.permutation(rows)[: 4 * batch], "click": rng.integers(0, 2, 4 * batch).astype(np.int8)}
        pq.write_table(pa.table(table), root / "data" / "train" / "part.parquet")
        schema = {"name": "wide", "features": {"user": {"kind": "sparse", "rows": rows}}, "labels": {"click": {}}}
        (root / "data" / "dataset.yaml").write_text(yaml.safe_dump(schema))
    tree: dict[str, Any] = {
        "output_dir": str(root / "run"),
        "data": {"root": str(root / "data"), "batch_size": batch, "valid": None, "test": None},
        "model": {
            "name": "DeepFM",
            "features": ["user"],
            "hidden_units": [64],
            "dropout_rates": 0.0,
            "embedding_dim": dim,
        },
        "train": {"epochs": 1, "max_steps": steps},
        "monitor": {"profile_every": None},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(tree))
    run(load_run(root / "run.yaml"))


def _measured(rounds: int, work: Callable[[], object]) -> tuple[float, float]:
    """The medians of processor and elapsed seconds."""
    found = []
    for _ in range(rounds):
        spent, began = time.process_time(), time.monotonic()
        work()
        found.append((time.process_time() - spent, time.monotonic() - began))
    return statistics.median(one for one, _ in found), statistics.median(one for _, one in found)


def _size(folder: Path) -> int:
    return sum(os.path.getsize(path) for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    typer.run(main)
