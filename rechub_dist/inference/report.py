"""What a run has left in its output folder, and what its scores are like: all that its report shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rechub_dist.assembly.readers import evaluation_reader, optional_reader
from rechub_dist.checkpoint.find import find_folder
from rechub_dist.checkpoint.inspect import list_checkpoints
from rechub_dist.config.data import StorageConfig
from rechub_dist.config.strict_yaml import read_yaml
from rechub_dist.errors import UserError
from rechub_dist.evaluation.evaluate import evaluate
from rechub_dist.inference.run import load
from rechub_dist.reporting.records import read_records

BINS: Final = 20
_KEPT: Final = {"scalars": 1, "histograms": 1, "images": 1, "audio": 1, "tensors": 1}  # of each tag: the last

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """The scores of one label's rows.

    Attributes:
        edges: of bins of the probability or value, [B + 1].
        counts: rows by bin; of a probability by class, [2, B] (negatives, positives), else [1, B].
        calibration: of a probability, by bins of as many rows: mean prediction, mean label, rows; [3, <= B].
    """

    edges: Floats
    counts: Floats
    calibration: Floats | None


@dataclass(frozen=True)
class Histogram:
    """A histogram that the run wrote last: `counts`, [B], of the bins that end at `limits`, [B], in step `step`."""

    step: int
    limits: Floats
    counts: Floats


@dataclass(frozen=True)
class RunReport:
    """A run.

    Attributes:
        folder: its output folder.
        config: its configuration, as in its config.yaml.
        records: its records, in their order.
        best_step: of its best checkpoint, if one is marked.
        notes: what is missing, a line each.
        norms: norms of table rows, by table.
        scored_on: the data that `scores` are of.
        scores: by label.
    """

    folder: Path
    config: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]
    best_step: int | None
    notes: tuple[str, ...] = ()
    norms: Mapping[str, Histogram] = field(default_factory=dict)
    scored_on: str | None = None
    scores: Mapping[str, Scores] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the folder; runs that are compared have different ones, or their paths do."""
        return self.folder.name or str(self.folder)

    def of(self, split: str) -> list[Mapping[str, Any]]:
        """The records of a split."""
        return [one for one in self.records if one["split"] == split]


def read_run(
    folder: Path, *, scores: bool = True, data: str | None = None, allowed_code: Iterable[str] = ()
) -> RunReport:
    """A run's report.

    Args:
        folder: its output folder.
        scores: whether its best weights score rows for it.
        data: these rows; default: its valid split. Where that cannot be read or scored, the report says so.
        allowed_code: modules of the run's own classes, which may be imported.

    Raises:
        UserError: the folder is no run's, or `data` does not fit it.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: is no run's output folder: it has no config.yaml")
    config = read_yaml(path)
    notes = []
    records = tuple(read_records(folder))
    if not records:
        notes.append("There is no metrics.jsonl: no curves and no speed.")
    best = None
    try:
        found, _ = find_folder(str(folder), StorageConfig())
        best = next((one["step"] for one in list_checkpoints(found) if one["best"]), None)
    except UserError as error:
        notes.append(f"Its checkpoints cannot be read: {error}")
    norms = _norms(folder / "tensorboard")
    found_scores: dict[str, Scores] = {}
    if scores:
        try:
            data, found_scores = _scores(folder, data, allowed_code)
        except UserError as error:
            if data is not None:
                raise
            notes.append(f"No rows are scored: {error}")
    return RunReport(folder, config, records, best, tuple(notes), norms, data, found_scores)


def differences(runs: Iterable[RunReport]) -> dict[str, list[str]]:
    """The keys in which the runs' configurations differ: for each, its value in every run, empty where it has none."""
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    found = {key: [one.get(key, "") for one in flat] for key in keys if key != "output_dir"}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def _flat(tree: Any, path: str = "") -> dict[str, str]:
    if isinstance(tree, Mapping) and tree:
        return {k: v for name, one in tree.items() for k, v in _flat(one, f"{path}.{name}" if path else name).items()}
    return {path: str(tree)}


def _norms(folder: Path) -> dict[str, Histogram]:
    """The norms of table rows that the run's TensorBoard files hold."""
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import (  # noqa: PLC0415 - slow to import
        EventAccumulator,
    )

    events = EventAccumulator(str(folder), size_guidance=_KEPT)
    with contextlib.redirect_stderr(None):
        events.Reload()
    found = {}
    for name in events.Tags()["histograms"]:
        if name.startswith("row_norms/"):
            last = events.Histograms(name)[-1]
            value = last.histogram_value
            limits, counts = (np.asarray(x, dtype=np.float64) for x in (value.bucket_limit, value.bucket))
            limits = np.minimum(limits, value.max)  # the last is open
            found[name.removeprefix("row_norms/")] = Histogram(last.step, limits, counts)
    return found


def _scores(folder: Path, data: str | None, allowed_code: Iterable[str]) -> tuple[str, dict[str, Scores]]:
    run = load(folder, allowed_code=allowed_code)
    objective = run.parts.train_module.objective
    if objective.tasks is None or objective.ranking is not None:
        raise UserError(f"{run.config.model.name} ranks items, which have no probabilities to show")
    if data is None:
        reader = optional_reader(run.config, run.parts, run.runtime, "valid")
        if reader is None:
            raise UserError(
                f"{run.config.data.root} has no valid split that can be read from here; name rows by --data"
            )
    else:
        reader = evaluation_reader(run.config, run.parts, run.runtime, data)
    found = evaluate(run.parts, reader, run.runtime)
    kinds = objective.tasks.scored
    scores = {name: scores_of(rows, probability=kinds[name] == "classification") for name, rows in found.scored.items()}
    return reader.manifest.path, scores


def scores_of(rows: Any, *, probability: bool) -> Scores:
    """The scores of rows: their predictions, labels and weights, [3, N]."""
    p, y, w = np.asarray(rows, dtype=np.float64)
    low, high = (0.0, 1.0) if probability or not len(p) else (float(p.min()), float(p.max()))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    kinds = (y < 0.5, y >= 0.5) if probability else (np.ones(len(p), bool),)
    counts = np.stack([np.histogram(p[kind], edges, weights=w[kind])[0] for kind in kinds])
    if not probability or not w.sum():
        return Scores(edges, counts, None)
    order = np.argsort(p, kind="stable")
    done = np.cumsum(w[order])
    place = np.minimum((done - w[order] / 2) / done[-1] * BINS, BINS - 1).astype(int)
    size = np.bincount(place, w[order], BINS)
    mean, observed = (np.bincount(place, (w * x)[order], BINS) for x in (p, y))
    there = size > 0
    return Scores(edges, counts, np.stack([mean[there] / size[there], observed[there] / size[there], size[there]]))
