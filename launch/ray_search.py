"""Hyperparameter search: Ray Tune samples, schedules and stops trials, each a training run by Ray Train."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import BasicVariantGenerator

from rechub_dist.assembly.identity import differences
from rechub_dist.config import RunConfig
from rechub_dist.config.versions import with_current_keys
from rechub_dist.distributed.process import stop_signals
from rechub_dist.errors import UserError
from rechub_dist.launch.ray_ranks import GOODNESS, Work
from rechub_dist.launch.ray_workers import Workers, fit
from rechub_dist.launching.search import Distribution, note_trial, trial_config
from rechub_dist.metrics.direction import Direction

_LONGEST = 10**6  # evaluations; ASHA requires a maximum


@dataclass(frozen=True)
class Search:
    """A search.

    Attributes:
        config: the base run, with `metric` as train.best_metric; its output folder is that of the search.
        space: what to sample, by dotted key.
        metric: valid metric that ranks trials.
        mode: its direction.
        trials: number of trials.
        grace: evaluations before ASHA may stop a trial.
        reduction: ASHA's reduction factor: the best 1/reduction continue.
        seed: of the sampled settings.
    """

    config: RunConfig
    space: dict[str, Distribution]
    metric: str
    mode: Direction
    trials: int
    grace: int
    reduction: int
    seed: int

    def identity(self) -> dict[str, Any]:
        """What must be unchanged to resume an interrupted search, as JSON-compatible values."""
        run = _compared(self.config.model_dump(mode="json"))
        space = {key: draw.model_dump(mode="json", exclude_none=True) for key, draw in self.space.items()}
        own = {name: getattr(self, name) for name in ("metric", "mode", "trials", "grace", "reduction", "seed")}
        return {"run": run, "space": space, **own}


def search(plan: Search, workers: Workers, concurrent: int | None) -> bool:
    """Run or resume the trials; returns whether all of them ended.

    Raises:
        UserError: the output folder holds another search.
    """
    folder = plan.config.output_dir
    known = folder / "search.json"
    identity = json.loads(json.dumps(plan.identity()))
    storage = folder / "tune"
    trainable = tune.with_resources(
        # A trial only waits for its ranks, which reserve CPUs themselves; but it must request something.
        tune.with_parameters(trial, plan=plan, workers=workers),
        tune.PlacementGroupFactory([{"CPU": 0, "memory": 1}]),
    )
    if known.exists():
        saved = json.loads(known.read_text(encoding="utf-8"))
        found = differences(saved | {"run": _compared(with_current_keys(saved["run"]))}, identity)
        if found:
            raise UserError(
                f"output_dir: {folder} holds another search; these differ (then -> now): {'; '.join(found)}. Choose "
                "another output_dir, or delete that folder"
            )
    if known.exists() and tune.Tuner.can_restore(str(storage)):
        tuner = tune.Tuner.restore(str(storage), trainable, resume_unfinished=True, restart_errored=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps(identity), encoding="utf-8")
        tuner = _tuner(plan, trainable, concurrent or _room(workers))
    # Tune saves its state on Ctrl-C only; a job is stopped with SIGTERM, and a closing terminal sends SIGHUP.
    for number in set(stop_signals()) - {signal.SIGINT}:
        signal.signal(number, lambda _number, _frame: os.kill(os.getpid(), signal.SIGINT))
    results = tuner.fit()
    return all(result.error is not None or (result.metrics or {}).get("done") for result in results)


def _compared(run: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's configuration that must be unchanged; metric and mode are compared separately, resolved."""
    train = {key: value for key, value in run["train"].items() if key not in ("best_metric", "best_mode")}
    return {key: value for key, value in run.items() if key != "output_dir"} | {"train": train}


def _tuner(plan: Search, trainable: Any, concurrent: int) -> tune.Tuner:
    asha = ASHAScheduler(
        time_attr="evaluations", max_t=_LONGEST, grace_period=plan.grace, reduction_factor=plan.reduction
    )
    return tune.Tuner(
        trainable,
        param_space={key: _domain(draw) for key, draw in plan.space.items()},
        tune_config=tune.TuneConfig(
            metric=GOODNESS,
            mode="max",
            num_samples=plan.trials,
            scheduler=asha,
            search_alg=BasicVariantGenerator(random_state=plan.seed, max_concurrent=concurrent),
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(plan.config.output_dir), verbose=1),
    )


def _domain(draw: Distribution) -> Any:
    """Convert to Tune's search domain."""
    if draw.uniform is not None:
        return tune.uniform(*draw.uniform)
    if draw.loguniform is not None:
        return tune.loguniform(*draw.loguniform)
    if draw.randint is not None:
        return tune.randint(draw.randint[0], draw.randint[1] + 1)
    return tune.choice(list(draw.choice or ()))


def _room(workers: Workers) -> int:
    """The number of trials that the cluster has room for, at least 1."""
    there, each = ray.cluster_resources(), {"CPU": workers.cpus, "GPU": workers.gpus}
    rooms = [there.get(name, 0) // (workers.most * amount) for name, amount in each.items() if amount]
    return max(1, int(min(rooms)))


def trial(values: dict[str, Any], *, plan: Search, workers: Workers) -> None:
    """Run one trial: start its ranks, and wait for them."""
    name = tune.get_context().get_trial_id()
    config = trial_config(plan.config, name, values)
    note_trial(config.output_dir, values, "stopped")  # replaced when the trial ends
    try:
        fit(Work(config, splits=("valid",), judged_by=(plan.metric, plan.mode)), workers, (TuneReportCallback(),))
    except Exception as error:
        note_trial(config.output_dir, values, f"failed: {error}")
        raise
    note_trial(config.output_dir, values, "finished")
