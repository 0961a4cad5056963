"""A search for good values of a run's settings: what is drawn from where, and what came of each trial."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator
from rich.console import Console
from rich.table import Table

from rechub_dist.config import RunConfig, Section, changed, read_yaml
from rechub_dist.errors import UserError, nearest, one_line
from rechub_dist.metrics.direction import Direction, goodness, watched_metric

_OWN = ("output_dir", "checkpoint.folder", "train.best_metric", "train.best_mode")  # of the search
_TRIAL = "trial.json"


class Distribution(Section):
    """How the values of one key are drawn: one of these."""

    uniform: tuple[float, float] | None = Field(None, description="a number between both")
    loguniform: tuple[float, float] | None = Field(None, description="the same, evenly over orders of magnitude")
    randint: tuple[int, int] | None = Field(None, description="an integer between both, the ends included")
    choice: tuple[Any, ...] | None = Field(None, min_length=1, description="one of these values")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError(f"write one of {', '.join(type(self).model_fields)}")
        low, high = self.uniform or self.loguniform or self.randint or (0, 1)
        if low >= high:
            raise ValueError(f"the first end, {low:g}, must be below the second, {high:g}")
        if self.loguniform is not None and low <= 0:
            raise ValueError(f"loguniform: the ends must be above 0, got {low:g}")
        return self

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values to try a configuration with: all choices, both ends of a range."""
        if self.choice is not None:
            return self.choice
        return tuple(self.uniform or self.loguniform or self.randint or ())


def judged_by(config: RunConfig, metric: str | None, ranks: int) -> tuple[str, Direction]:
    """The metric that trials are compared by (default: the run's), and what makes it better.

    Raises:
        UserError: an evaluation of the run reports no such metric.
    """
    from rechub_dist.assembly.parts import build  # noqa: PLC0415 - imports torchrec

    reported = build(config, device="cpu", world_size=ranks).train_module.objective.metrics(config.evaluation)
    where = "train.best_metric" if metric is None else "--metric"
    return watched_metric(metric or config.train.best_metric, config.train.best_mode, reported, where)


def read_space(path: Path, config: RunConfig, ranks: int) -> dict[str, Distribution]:
    """What is drawn, by dotted key, from a YAML file such as `optimizer.lr: {loguniform: [1e-4, 1e-2]}`.

    Each choice, and both ends of each range, are tried with the run, as far as that goes without data.

    Raises:
        UserError: no such key or distribution, ends the wrong way round, values that the run cannot have, or with which
            an evaluation does not report `train.best_metric`.
    """
    space = {}
    for key, tree in read_yaml(path).items():
        where = f"{path}: {key}"
        if key in _OWN:
            raise UserError(f"{where}: the search sets it itself; leave it out")
        if not isinstance(tree, dict):
            raise UserError(f"{where}: write how it is drawn, {{choice: [1, 2]}} for one")
        for kind in tree:
            if kind not in Distribution.model_fields:
                raise UserError(f"{where}: unknown distribution {kind!r}: {nearest(kind, Distribution.model_fields)}")
        try:
            space[key] = Distribution.model_validate_json(json.dumps(tree))
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{where}: {one_line(first['msg']).removeprefix('Value error, ')}") from error
        for value in space[key].extremes:
            try:
                judged_by(changed(config, {key: value}, str(path)), None, ranks)
            except UserError as error:
                raise UserError(f"{where}: {value!r} does not fit: {error}") from error
    if not space:
        raise UserError(f"{path}: names no key of the run file to search over")
    return space


def trial_config(base: RunConfig, name: str, values: Mapping[str, Any]) -> RunConfig:
    """The run of one trial, in a folder of its own below the search's."""
    folder = base.checkpoint.folder
    own = {
        "output_dir": str(base.output_dir / "trials" / name),
        "checkpoint.folder": None if folder is None else f"{folder}/{name}",
    }
    return changed(base, {**values, **own}, f"trial {name}")


def note_trial(output: Path, values: Mapping[str, Any], state: str) -> None:
    """Keep what a trial tries and how it is, beside its run."""
    output.mkdir(parents=True, exist_ok=True)
    temporary = output / f".{_TRIAL}"
    temporary.write_text(json.dumps({"parameters": dict(values), "state": state}), encoding="utf-8")
    temporary.replace(output / _TRIAL)


def evaluations(output: Path, step: int = 2**62) -> list[dict[str, Any]]:
    """The records of the valid split of a run, up to a step."""
    path = output / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [record for record in _records(lines) if record["split"] == "valid" and record["step"] <= step]


def _records(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.endswith("}"):  # else it was cut short by a kill
            yield json.loads(line)


@dataclass(frozen=True)
class Trial:
    """What came of a trial.

    Attributes:
        state: running (or interrupted), stopped (as others were better), finished, or `failed: ` and why.
        evaluations: how many there were.
        best: the best value of the metric; None without any.
        step: at which it was reached.
    """

    name: str
    parameters: dict[str, Any]
    state: str
    evaluations: int
    best: float | None
    step: int | None


def read_trials(folder: Path, metric: str, mode: Direction) -> list[Trial]:
    """The trials of a search, the best first."""
    found = []
    for path in sorted((folder / "trials").glob(f"*/{_TRIAL}")):
        tree = json.loads(path.read_text(encoding="utf-8"))
        records = [record for record in evaluations(path.parent) if record.get(metric) is not None]
        best = max(records, key=lambda record: goodness(record[metric], mode), default=None)
        value, step = (None, None) if best is None else (best[metric], best["step"])
        found.append(Trial(path.parent.name, tree["parameters"], tree["state"], len(records), value, step))
    return sorted(found, key=lambda trial: math.inf if trial.best is None else -goodness(trial.best, mode))


def show_trials(console: Console, folder: Path, trials: Sequence[Trial], metric: str) -> None:
    """A table of the trials, and the same as results.csv in the search's folder."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.parameters))
    columns = ["trial", *keys, f"valid {metric}", "step", "evaluations", "state"]
    table = Table(title=f"{len(trials)} trials, the best first", title_justify="left")
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
        console.print(f"the best  {best / 'config.yaml'}", soft_wrap=True, highlight=False)
