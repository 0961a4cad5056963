"""How the models do on a data set that nobody tuned for: all of a family with their defaults, beside two baselines.

    python benchmarks/leaderboard.py data/mine --family ranking [--model DeepFM ...] [--set train.epochs=5]

Each model is trained by the run file that `rechub-dist models NAME --run-file --data FOLDER` prints, so with the
defaults, one process and one thread; `--set` changes a key for all of them. Logistic regression (ids one-hot) and
histogram gradient boosting (ids as numbers; categories where a feature has at most 255) are scikit-learn's, with the
regression's penalty and the number of trees chosen on valid. The table has the AUC, or for a value to predict the
RMSE, of valid and of test, at what is best on valid; a family of several tasks is judged by their mean. Seconds are
those of one run, its start and its evaluations included. Writes leaderboard.json to --out, and leaderboard.png where
matplotlib is installed (the extra `bench`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, mean_squared_error, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler

from logistic_regression import design
from rechub_dist.assembly.first_run import run_on
from rechub_dist.assembly.parts import Parts, build
from rechub_dist.batch import Batch
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.storage import join
from rechub_dist.data.reader import ParquetReader
from rechub_dist.data.run_file import load_run
from rechub_dist.errors import UserError
from rechub_dist.models import catalogue, family
from rechub_dist.reporting.records import read_records

PENALTIES = (0.03, 0.3, 3.0)  # C, the inverse of the L2 penalty
MOST_CATEGORIES = 255


def columns(batch: Batch, parts: Parts) -> tuple[np.ndarray, list[bool]]:
    """The rows as trees read them: dense values and first ids, and which columns are categories."""
    found, categorical = [batch.dense.numpy()], [False] * batch.dense.shape[1]
    for name, feature in parts.layout.features.items():
        jagged = batch.feature(name)
        lengths = jagged.lengths()[: batch.rows].numpy()
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        ids = np.full(batch.rows, np.nan)
        ids[lengths > 0] = jagged.values().numpy()[offsets[lengths > 0]]
        found.append(ids[:, None])
        categorical.append(feature.table.rows <= MOST_CATEGORIES)
    return np.concatenate(found, axis=1), categorical


def read(parts: Parts, split: str) -> Batch:
    """A whole split."""
    manifest = Manifest.read(join(parts.config.data.root, split))
    [batch] = list(ParquetReader(manifest, parts.spec, batch_size=manifest.rows, shuffle=False).batches(0))
    return batch


def baselines(parts: Parts) -> dict[str, dict[str, float]]:
    """Metrics of the regression and of the trees, the mean over labels, and the seconds that they took."""
    batches = {split: read(parts, split) for split in ("train", "valid", "test")}
    designs = {split: design(batch, parts) for split, batch in batches.items()}
    plain = {split: columns(batch, parts) for split, batch in batches.items()}
    found: dict[str, dict[str, float]] = {}
    for name, fit, rows in (("linear model", _linear, designs), ("boosted trees", _trees, plain)):
        began = time.monotonic()
        judged = []
        for column, label in enumerate(parts.labels):
            wanted = {split: batch.labels[:, column].numpy() for split, batch in batches.items()}
            judged.append(fit(rows, wanted, label.type == "classification"))
        valid, test = np.mean(judged, axis=0)
        found[name] = {"valid": float(valid), "value": float(test), "seconds": time.monotonic() - began}
    return found


def _linear(rows: dict[str, Any], wanted: dict[str, np.ndarray], classes: bool) -> tuple[float, float]:
    """Metrics of valid and test with the penalty whose loss on valid is least."""
    loss = log_loss if classes else mean_squared_error
    best = (np.inf, (0.0, 0.0))
    for penalty in PENALTIES:
        linear = LogisticRegression(C=penalty, max_iter=200) if classes else Ridge(alpha=1 / penalty)
        model = make_pipeline(MaxAbsScaler(), linear).fit(rows["train"], wanted["train"])
        valid, test = (_scores(model, rows[split], classes) for split in ("valid", "test"))
        metrics = (_metric(wanted["valid"], valid, classes), _metric(wanted["test"], test, classes))
        best = min(best, (loss(wanted["valid"], valid), metrics))
    return best[1]


def _trees(rows: dict[str, Any], wanted: dict[str, np.ndarray], classes: bool) -> tuple[float, float]:
    """Metrics of valid and test with as many trees as valid asks for."""
    kind = HistGradientBoostingClassifier if classes else HistGradientBoostingRegressor
    trees = kind(max_iter=500, early_stopping=True, categorical_features=rows["train"][1], random_state=0)
    trees.fit(rows["train"][0], wanted["train"], X_val=rows["valid"][0], y_val=wanted["valid"])
    valid, test = (_scores(trees, rows[split][0], classes) for split in ("valid", "test"))
    return _metric(wanted["valid"], valid, classes), _metric(wanted["test"], test, classes)


def _scores(model: Any, rows: Any, classes: bool) -> np.ndarray:
    return model.predict_proba(rows)[:, 1] if classes else model.predict(rows)


def _metric(wanted: np.ndarray, scores: np.ndarray, classes: bool) -> float:
    return float(roc_auc_score(wanted, scores)) if classes else float(np.sqrt(mean_squared_error(wanted, scores)))


def train(run_file: Path, settings: list[str]) -> dict[str, Any]:
    """Train by the command; metrics of valid and test, steps and seconds."""
    began = time.monotonic()
    line = [sys.executable, "-m", "rechub_dist", "train", str(run_file)]
    for one in (*settings, "distributed.threads=1"):
        line += ["--set", one]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"{run_file}: {done.stderr[-2000:]}")
    out = Path(load_run(run_file, settings).output_dir)
    test = next((one for one in read_records(out) if one["split"] == "test"), None)
    if test is None:
        raise UserError(f"{run_file}: the run was stopped before its end, or the data set has no split test")
    evaluated = {one["step"]: one for one in read_records(out) if one["split"] == "valid"}
    valid, steps = _judged(evaluated[test["step"]]), max(evaluated)
    return {
        "valid": valid,
        "value": _judged(test),
        "metrics": test,
        "best_step": test["step"],
        "steps": steps,
        "seconds": time.monotonic() - began,
    }


def main(
    data: Annotated[str, typer.Argument(help="A prepared data set, split in train, valid and test.")],
    family_: Annotated[str, typer.Option("--family", help="ranking or multitask.")] = "ranking",
    model: Annotated[list[str] | None, typer.Option(help="Only this model; repeatable.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Labels; default: the first, or all.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE")] = None,
    out: Annotated[Path, typer.Option(help="Folder for runs and results.")] = Path("runs/leaderboard"),
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    with_baselines: Annotated[bool, typer.Option("--baselines/--no-baselines")] = True,
) -> None:
    """Train, compare, print, write."""
    torch.set_num_threads(1)
    console = Console()
    found: dict[str, dict[str, Any]] = {}
    out.mkdir(parents=True, exist_ok=True)
    chosen = [name for name, cls in catalogue().items() if family(cls) == family_ and name in (model or [name])]
    first: Path | None = None
    for name in chosen:
        try:
            text = run_on(data, name, str(out / name))
        except UserError as error:
            console.print(f"[dim]{name}: {error}")
            continue
        tree = yaml.safe_load(text)
        tree["data"]["labels"] = label or tree["data"]["labels"]
        if name == "ESMM" and len(tree["data"]["labels"]) != 2:
            continue
        run_file = out / f"{name}.yaml"
        run_file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        if "target_features" not in tree["model"]:
            first = first or run_file  # the baselines have no history
        runs = []
        for seed in range(seeds):
            settings = [*(set_ or []), f"output_dir={out / name}-{seed}-{int(time.time())}", f"seed={2024 + seed}"]
            runs.append(train(run_file, settings))
        got = runs[-1]
        found[name] = {**got, **{key: float(np.mean([run[key] for run in runs])) for key in ("valid", "value")}}
        if seeds > 1:
            found[name]["std"] = float(np.std([run["value"] for run in runs]))
        steps = f"best step {got['best_step']} of {got['steps']}"
        console.print(f"{name}: {found[name]['value']:.4f}, {steps}, {got['seconds']:.0f} s")
    if with_baselines and first is not None:
        found |= baselines(build(load_run(first), device="cpu", world_size=1))
    _show(found, data, console)
    (out / "leaderboard.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    _plot(found, data, out / "leaderboard.png")


def _judged(metrics: dict[str, Any]) -> float:
    """AUC or RMSE: of the label, or the mean over the tasks."""
    for name in ("auc", "rmse"):
        found = [value for key, value in metrics.items() if re.fullmatch(rf"(.*[/_.])?{name}", key)]
        if found:
            return float(np.mean(found))
    raise UserError(f"no auc or rmse among {', '.join(metrics)}")


def _show(found: dict[str, dict[str, Any]], data: str, console: Console) -> None:
    table = Table("model", "valid", "test", "std", "best step", "steps", "seconds", title=data)
    lower = any(key == "rmse" for one in found.values() for key in one.get("metrics", {}))
    for name, one in sorted(found.items(), key=lambda entry: entry[1]["value"], reverse=not lower):
        numbers = [f"{one[key]:.4g}" if key in one else "" for key in ("std", "best_step", "steps", "seconds")]
        table.add_row(name, f"{one['valid']:.4f}", f"{one['value']:.4f}", *numbers)
    console.print(table)


def _plot(found: dict[str, dict[str, Any]], data: str, path: Path) -> None:
    try:
        import matplotlib  # noqa: PLC0415
    except ImportError:
        print("no plot: it needs matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    ranked = sorted(found.items(), key=lambda entry: entry[1]["value"])
    figure, axes = pyplot.subplots(figsize=(7, 0.4 * len(ranked) + 1), layout="constrained")
    colors = ["tab:blue" if "metrics" in one else "tab:gray" for _, one in ranked]
    values = [one["value"] for _, one in ranked]
    axes.barh([name for name, _ in ranked], values, color=colors)
    axes.set_xlim(min(values) - 0.01, max(values) + 0.005)
    axes.set_title(f"{Path(data).name}: test")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    typer.run(main)
