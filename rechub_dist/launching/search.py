"""Hyperparameter search: the search space, and the results of trials."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table

from rechub_dist.config import RunConfig, Section, changed, read_yaml
from rechub_dist.config.secrets import refuse_secret_value
from rechub_dist.errors import UserError, nearest, shown
from rechub_dist.metrics.direction import Direction, goodness, watched_metric
from rechub_dist.reporting.records import read_records
from rechub_dist.typed import validated

_OWN = ("output_dir", "checkpoint.folder", "train.best_metric", "train.best_mode")  # set by the search itself
_TRIAL = "trial.json"


class Distribution(Section):
    """How the values of one key are sampled; exactly one field is set."""

    uniform: tuple[float, float] | None = Field(None, description="a number between both ends")
    loguniform: tuple[float, float] | None = Field(None, description="a number between both ends, log-uniformly")
    randint: tuple[int, int] | None = Field(None, description="an integer between both ends, inclusive")
    choice: tuple[Any, ...] | None = Field(None, min_length=1, description="one of these values")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError(f"set exactly one of {', '.join(type(self).model_fields)}")
        low, high = self.uniform or self.loguniform or self.randint or (0, 1)
        if low >= high:
            raise ValueError(f"the lower end, {low:g}, must be below the upper end, {high:g}")
        if self.loguniform is not None and low <= 0:
            raise ValueError(f"loguniform: the ends must be above 0, got {low:g}")
        return self

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values to validate a configuration with: all choices, or both ends of a range."""
        if self.choice is not None:
            return self.choice
        return tuple(self.uniform or self.loguniform or self.randint or ())


def judged_by(config: RunConfig, metric: str | None, ranks: int) -> tuple[str, Direction]:
    """The metric that trials are compared by (default: `train.best_metric`), and its direction.

    Raises:
        UserError: the run does not report this metric.
    """
    from rechub_dist.assembly.parts import build  # noqa: PLC0415 - imports torchrec

    reported = build(config, device="cpu", world_size=ranks).train_module.objective.metrics(config.evaluation)
    where = "train.best_metric" if metric is None else "--metric"
    return watched_metric(metric or config.train.best_metric, config.train.best_mode, reported, where)


def read_space(path: Path, config: RunConfig, ranks: int) -> dict[str, Distribution]:
    """Read a search space, {dotted key: draw}, from YAML such as `optimizer.lr: {loguniform: [1e-4, 1e-2]}`.

    Each choice, and both ends of each range, are validated with the run, as far as possible without data.

    Raises:
        UserError: an unknown key or kind of draw, an empty range, or a value that the run does not accept or with which
            it does not report `train.best_metric`.
    """
    space = {}
    for key, tree in read_yaml(path).items():
        where = f"{path}: {key}"
        if key in _OWN:
            raise UserError(f"{where}: set by the search itself; remove it")
        if not isinstance(tree, dict):
            raise UserError(f"{where}: write how it is sampled, such as {{choice: [1, 2]}}")
        for kind in tree:
            if kind not in Distribution.model_fields:
                raise UserError(
                    f"{where}: unknown distribution {shown(kind)}: {nearest(kind, Distribution.model_fields)}"
                )
        space[key] = validated(where, Distribution, tree)
        for value in space[key].extremes:
            refuse_secret_value(key, value, str(path))
            try:
                judged_by(changed(config, {key: value}, str(path)), None, ranks)
            except UserError as error:
                raise UserError(f"{where}: {shown(value)} is not valid: {error}") from error
    if not space:
        raise UserError(f"{path}: empty; add at least one key of the run file to search over")
    return space


def trial_config(base: RunConfig, name: str, values: Mapping[str, Any]) -> RunConfig:
    """The configuration of one trial, with a folder of its own below the search's."""
    folder = base.checkpoint.folder
    own = {
        "output_dir": str(base.output_dir / "trials" / name),
        "checkpoint.folder": None if folder is None else f"{folder}/{name}",
    }
    return changed(base, {**values, **own}, f"trial {name}")


def note_trial(output: Path, values: Mapping[str, Any], state: str) -> None:
    """Write a trial's settings and state to its output folder."""
    output.mkdir(parents=True, exist_ok=True)
    temporary = output / f".{_TRIAL}"
    temporary.write_text(json.dumps({"parameters": dict(values), "state": state}), encoding="utf-8")
    temporary.replace(output / _TRIAL)


def evaluations(output: Path, step: int = 2**62) -> list[dict[str, Any]]:
    """The `valid` records of an output folder, up to `step`."""
    return [record for record in read_records(output) if record["split"] == "valid" and record["step"] <= step]


@dataclass(frozen=True)
class Trial:
    """The result of a trial.

    Attributes:
        state: `stopped` (running, interrupted or stopped early), `finished`, or `failed: ` and the reason.
        evaluations: number of evaluations.
        best: best value of the metric; None without evaluations.
        step: step of the best value.
    """

    name: str
    parameters: dict[str, Any]
    state: str
    evaluations: int
    best: float | None
    step: int | None


def read_trials(folder: Path, metric: str, mode: Direction) -> list[Trial]:
    """The trials of a search, best first."""
    found = []
    for path in sorted((folder / "trials").glob(f"*/{_TRIAL}")):
        tree = json.loads(path.read_text(encoding="utf-8"))
        records = [record for record in evaluations(path.parent) if record.get(metric) is not None]
        best = max(records, key=lambda record: goodness(record[metric], mode), default=None)
        value, step = (None, None) if best is None else (best[metric], best["step"])
        found.append(Trial(path.parent.name, tree["parameters"], tree["state"], len(records), value, step))
    return sorted(found, key=lambda trial: math.inf if trial.best is None else -goodness(trial.best, mode))


def show_trials(console: Console, folder: Path, trials: Sequence[Trial], metric: str) -> None:
    """Print a table of the trials, and write it to results.csv in the search's folder."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.parameters))
    columns = ["trial", *keys, f"valid {metric}", "step", "evaluations", "state"]
    table = Table(title=f"{len(trials)} trials, best first", title_justify="left")
    for column in columns:
        table.add_column(column.rpartition(".")[2].replace(" ", "\n"), overflow="fold", no_wrap=column == "trial")
    with (folder / "results.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for trial in trials:
            values = [trial.parameters.get(key) for key in keys]
            row = [trial.name, *values, trial.best, trial.step, trial.evaluations, trial.state]
            writer.writerow("" if value is None else value for value in row)
            table.add_row(*(f"{value:.5g}" if isinstance(value, float) else str(value) for value in row))
    console.print(table)
    console.print(f"results   {folder / 'results.csv'}", soft_wrap=True, highlight=False)
    console.print(f"curves    tensorboard --logdir {folder / 'trials'}", soft_wrap=True, highlight=False)
    if trials and trials[0].best is not None:
        best = folder / "trials" / trials[0].name
        console.print(f"best      {best / 'config.yaml'}", soft_wrap=True, highlight=False)
