"""A run on a rank: what it is made of, from the configuration to what is said in the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from rechub_dist.assembly.code import dense_optimizer, table_optimizers
from rechub_dist.assembly.estimate import estimate_of
from rechub_dist.assembly.identity import identity, other_than
from rechub_dist.assembly.parts import Parts, build, unheeded
from rechub_dist.assembly.precision import check_precision
from rechub_dist.assembly.readers import check_items, check_kinds, open_passes, optional_reader, warning_of, with_draws
from rechub_dist.assembly.sharded import agree_on_plan, shard_train_module
from rechub_dist.checkpoint import Position, open_checkpoints
from rechub_dist.checkpoint.lease import Lease
from rechub_dist.checkpoint.state import train_state, weights_state
from rechub_dist.checkpoint.warm_start import warm_start
from rechub_dist.config import RunConfig
from rechub_dist.data.passes import Passes
from rechub_dist.data.stored import Trace
from rechub_dist.distributed.external_control import ExternalControl
from rechub_dist.distributed.flight import dump_to
from rechub_dist.distributed.process import Stop, settled_objects
from rechub_dist.distributed.runtime import Runtime, Stopped, device_type, environment, runtime
from rechub_dist.distributed.watchdog import Watchdog
from rechub_dist.embedding.optim import Optimizers
from rechub_dist.embedding.rates import Rates
from rechub_dist.embedding.sharding import draw_tables
from rechub_dist.errors import UserError
from rechub_dist.metrics.direction import watched_metric
from rechub_dist.reporting.health import Health
from rechub_dist.reporting.logs import log_to
from rechub_dist.reporting.metrics import Metrics
from rechub_dist.reporting.profile import Profile
from rechub_dist.reporting.records import read_records
from rechub_dist.reporting.reporter import Reporter
from rechub_dist.reporting.step_times import StepTimes
from rechub_dist.reporting.summary import Summary
from rechub_dist.training.advice import Course, advice, too_short
from rechub_dist.training.loop import Loop
from rechub_dist.training.non_finite import NonFiniteGuard
from rechub_dist.training.output import make_output, refuse_foreign, written
from rechub_dist.training.pipeline import make_pipeline
from rechub_dist.training.saves import Saves
from rechub_dist.training.schedule import Schedule, steps_of
from rechub_dist.training.validation import Validation


def run(config: RunConfig, control: ExternalControl | None = None, *, take_over: bool = False) -> Summary:
    """Train as `config` says on this rank; called on every rank.

    `control` is how a process that runs this in one of its threads asks it to stop, and reads along. `take_over` takes
    the folders from another run that holds them, which then ends.

    Raises:
        UserError: on all ranks together, whichever rank has found the fault.
    """
    device = device_type(config.device)
    if device == "cuda":
        dump_to(config.output_dir / "logs")
    with runtime(device, config.distributed.timeout_seconds, config.distributed.threads) as rt:
        lease = Lease(config, rt, take_over=take_over)
        try:
            trainer = Trainer(config, rt, control, lease)
            try:
                return trainer.fit()
            finally:
                trainer.checkpoints.close(config.distributed.timeout_seconds)
                trainer.report.close()
        finally:
            lease.release()


class Trainer:
    """A run on this rank: built and checked before the first exchange of data, then trained by `fit`.

    It takes the `lease` before it writes anything; without one, whoever builds it answers for the folders.
    """

    def __init__(
        self, config: RunConfig, rt: Runtime, control: ExternalControl | None = None, lease: Lease | None = None
    ) -> None:
        self.config = config
        self.rt = rt
        rt.together(lambda: check_precision(config.train, rt.device))
        parts = rt.together(lambda: build(config, device=rt.device.type, world_size=rt.world_size))
        make_dense = rt.together(lambda: dense_optimizer(config))
        make_table = rt.together(lambda: table_optimizers(config))
        self.parts: Parts = with_draws(parts, rt)
        objective, watched = self.parts.train_module.objective, (config.train.best_metric, config.train.best_mode)
        self._best_by = rt.together(lambda: watched_metric(*watched, objective.metrics(config.evaluation)))
        self.passes: Passes = open_passes(config, self.parts, rt)
        valid, test = (optional_reader(config, self.parts, rt, split) for split in ("valid", "test"))
        self.valid_reader, self.test_reader = valid, test
        for reader in (valid, test):
            if reader is not None and self.passes.steps:
                trained = self.passes.current(0).reader
                rt.together(lambda seen=reader, trained=trained: check_kinds(trained, seen, self.parts.spec))  # type: ignore[misc]
        self._rates = rt.together(lambda: self._known_rates(validates=valid is not None))
        if valid or test:
            check_items(self.parts, rt)
        self._lease = lease or Lease(config, rt)
        self.checkpoints = open_checkpoints(config, rt, self._lease)
        self.checkpoints.check(self._differing)
        rt.from_main(lambda: refuse_foreign(config.output_dir))
        if lease is not None:
            lease.take()  # nothing is written before; and which checkpoint is the newest is known only now
        rt.together(lambda: make_output(config, rt))
        logs, json_lines = config.output_dir / "logs", config.monitor.json_lines
        rt.together(lambda: written(lambda: log_to(logs, rt.rank, json_lines=json_lines)))
        self._begun_with: list[str] = []
        agreed = agree_on_plan(self.parts, rt)
        self.module = shard_train_module(self.parts, rt, agreed=agreed)
        self._placed = estimate_of(self.parts.layout, agreed)
        pinned = config.embedding.plan
        self._begun_with.append(f"placement: {self._placed.summary()}" + (f"; by {pinned}" if pinned else ""))
        if agreed.plan is not None and agreed.plan.note:
            self._begun_with.append(agreed.plan.note)
        self.optimizers = rt.together(
            lambda: Optimizers(
                self.module,
                self.parts.layout,
                config.optimizer,
                self._rates,
                make_dense,
                make_table,
                rt.group,
                clip_tables=config.embedding.clip_norm,
                average=config.train.ema,
            )
        )
        self.checkpoints.prepare()
        begins_at = self._resume()
        self.report = self._reporter(control, begins_at)
        self._stop = Stop() if control is None else control.stop
        self._lease.stopping = self._stop.asked
        self.loop = self._loop(begins_at)

    @property
    def position(self) -> Position:
        """Of the last applied step."""
        return self.loop.position

    def _loop(self, begins_at: Position) -> Loop:
        config, rt, parts, report, stop = self.config, self.rt, self.parts, self.report, self._stop
        stall = config.distributed.stall_seconds or 0.8 * config.distributed.timeout_seconds
        watchdog = Watchdog(rt, config.output_dir / "logs", stall)
        train_module, module, optimizers, passes = parts.train_module, self.module, self.optimizers, self.passes
        watched = (train_module.model, train_module.objective)
        guard = NonFiniteGuard(config.train, config.output_dir / "non_finite", rt, watched)
        trace = None
        if config.train.trace_rows:
            attempt = rt.from_main(time.time_ns)
            trace = rt.together(lambda: written(lambda: Trace(config.output_dir / "rows", attempt, rt.rank)))
        reader = self.valid_reader
        return Loop(
            config,
            rt,
            train_module,
            optimizers,
            make_pipeline(config.distributed.pipeline, module, optimizers, rt.device, guard, config.train.accumulate),
            passes,
            Schedule(config, passes, validates=reader is not None),
            Validation(parts, module, optimizers, passes, reader, rt, report, watchdog, stop, self._best_by),
            Saves(
                self.checkpoints,
                parts,
                module,
                optimizers,
                passes,
                rt,
                report,
                watchdog,
                self._identity,
                self._placed.as_tree(),
            ),
            report,
            watchdog,
            stop,
            self._lease,
            guard,
            StepTimes(config.monitor.profile_every),
            Profile(config.monitor.profile_steps, config.output_dir / "profile", rt.rank, report.say)
            if config.monitor.profile_steps
            else None,
            trace,
            begins_at,
        )

    def _known_rates(self, *, validates: bool) -> Rates:
        """The run's learning rates; raises UserError for what its schedules need and do not have."""
        config, train = self.config, self.config.train
        schedules = {"optimizer": config.optimizer.schedule, "embedding": config.embedding.schedule}
        for section, schedule in schedules.items():
            if schedule.name == "plateau" and not validates:
                raise UserError(f"{section}.schedule: plateau follows evaluations; name a split in data.valid")
        known = train.max_steps if config.data.follow else steps_of(train, self.passes)
        changes = {change.step: change.factor for change in train.lr_changes}
        return Rates(config.optimizer.schedule, config.embedding.schedule, changes, known)

    def fit(self) -> Summary:
        """Train to the end, or to a signal; evaluate; keep checkpoints. Collective."""
        loop, start, began = self.loop, self.position, time.monotonic()
        health = Health(self.config.output_dir / "health", self.rt.rank, loop.watchdog.is_healthy)
        with self._stop.listening():  # also while the last checkpoint is written
            with loop.watchdog, health:
                loop.preempted = not self._all_listen()
                self.report.say(self._headline())
                for line in self._begun_with:
                    self.report.say(line)
                self._warn()
                if not loop.preempted and not start.stopped_early and self._has_more(start):
                    with settled_objects():
                        loop.train()
                if loop.profile is not None:
                    loop.profile.finish()
                test = {} if loop.preempted else self._final()
            self.checkpoints.wait()
            loop.saves.tell()
            self.checkpoints.check_last()
        end = self.position
        rows = self.passes.rows_before(end.step) - self.passes.rows_before(start.step)
        rate = rows / loop.seconds if rows else None
        if loop.preempted:
            self.report.say(f"preempted at step {end.step}, resume with the same command")
            return Summary(end.step, end.best_step, True, {}, {}, rate)
        self.report.say(f"finished at step {end.step} after {time.monotonic() - began:.1f} s")
        self._advise()
        return Summary(end.step, end.best_step, False, end.best_metrics, test, rate)

    def _advise(self) -> None:
        """Say what the run's records say about its settings."""
        end = self.position
        if self.rt.is_main and self.config.data.order == "epochs" and not self.config.data.follow:
            found = [one for one in read_records(self.config.output_dir) if one["split"] == "valid"]
            epoch_steps = self.passes.current(0).end
            course = Course(end.step, epoch_steps, end.best_step, end.stopped_early, found, self._best_by[0])
            for line in advice(course):
                self.report.say(line)

    def _all_listen(self) -> bool:
        """Whether all ranks handle signals from here on, and none has been asked to stop already."""
        try:
            return not self.rt.all_reduce_sum(torch.tensor([int(self._stop.asked())])).item()
        except RuntimeError:
            if self._stop.asked():  # and so was the rank that is missing, before it could listen
                return False
            raise

    def _has_more(self, start: Position) -> bool:
        return start.step < self.loop.schedule.steps or self.config.data.follow or start.unevaluated

    def _final(self) -> dict[str, float]:
        """Metrics of the best weights on the test split."""
        if self.test_reader is None:
            return {}
        step, best = self.position.step, self.position.best_step
        if best is not None and best != step:
            if best in self.checkpoints.steps():
                served = weights_state(self.module, self.parts.layout, self.optimizers.averages)
                self.checkpoints.load_weights(served, best)
                step = best
            else:
                self.report.say(f"warning: the best weights, of step {best}, could not be saved; testing the last ones")
        try:
            with self.optimizers.averaged():
                self.loop.validation.calibrate()
            return self.loop.validation.evaluate(self.test_reader, "test", step).metrics
        except Stopped:
            self.loop.preempted = True
            return {}

    def _reporter(self, control: ExternalControl | None, begins_at: Position) -> Reporter:
        config, rt = self.config.monitor, self.rt
        metrics = None
        if config.metrics_port is not None:
            port = config.metrics_port and config.metrics_port + environment()[2]
            metrics = rt.together(lambda: Metrics(port, rt.rank, rt.world_size, config.metrics_address))
        begin = partial(
            Reporter,
            self.config.output_dir,
            quiet=not rt.is_main,
            start_step=begins_at.step,
            json_lines=config.json_lines,
            metrics=metrics,
            records=None if control is None else control.records,
        )
        return rt.together(lambda: written(begin))

    def _resume(self) -> Position:
        state = train_state(self.module, self.parts.layout, self.optimizers)
        position = self.checkpoints.load(state, self._differing)
        if position is None:  # only then: what a checkpoint overwrites need not be drawn
            draw_tables(self.module, self.parts.layout, self.config.seed)
            self.optimizers.start()
        if position is None and self.config.warm_start is not None:
            self._begun_with += warm_start(self.config.warm_start, self.config.checkpoint_storage, state, self.rt)
            self.optimizers.start_from_averages()
        position = position or Position()
        metric, direction = self._best_by
        if position.best_step is None or position.best_mode == direction:
            return position
        # As of runs from before metrics knew their direction: "best" was then the step of the highest error.
        self._begun_with.append(
            f"warning: step {position.best_step} was chosen as the best by the mode {position.best_mode}; {metric} is "
            f"now judged by {direction}, so the best step is looked for anew from step {position.step} on"
        )
        return replace(
            position, best_step=None, best_metrics={}, evaluations_since_best=0, stopped_early=False, unevaluated=True
        )

    def _identity(self, step: int) -> dict[str, Any]:
        """The run's identity when it has done `step` steps."""
        negatives = self.parts.train_module.objective.negatives
        # What negatives are drawn by depends on all of the data.
        counted = negatives is not None and negatives.needs_counts
        computed = self.passes.current(step).reader.reading.computed if self.passes.steps else ()
        data = self.passes.identity(self.passes.steps if counted else step)
        return identity(self.parts, data, computed, rates=self._rates, step=step)

    def _differing(self, run: Mapping[str, Any], step: int, where: str) -> list[str]:
        """What the run of a checkpoint has other than this one, as far as it has come."""
        return other_than(run, self._identity(step), where, self.config.code)

    def _headline(self) -> str:
        layout, config = self.parts.layout, self.config
        rows = sum(placed.table.rows for placed in layout.tables.values())
        weights = sum(placed.table.rows * (placed.table.dim or 0) for placed in layout.tables.values())
        halves = sum(p.table.rows * (p.table.dim or 0) for p in layout.tables.values() if p.precision == "fp16")
        dense = sum(parameter.numel() for parameter in self.optimizers.parameters.values())
        frozen = sum(p.numel() for p in self.optimizers.parameters.values() if not p.requires_grad)
        frozen += sum(placed.table.rows * (placed.table.dim or 0) for placed in layout.tables.values() if placed.frozen)
        parameters = f"{dense:,} dense parameters" + (f", {frozen:,} values frozen" if frozen else "")
        resumed = f", resumed at step {self.position.step}" if self.position.step else ""
        return (
            f"{config.model.name}: {len(layout.tables)} tables of {rows:,} rows ({weights:,} weights"
            f"{f', {halves:,} in fp16' if halves else ''}), {parameters}; "
            f"{self.rt.world_size} rank(s) on {self.rt.device.type}; {self.passes.rows:,} rows, "
            f"{self.loop.schedule.steps:,} steps of {config.data.batch_size:,}{resumed}"
        )

    def _warn(self) -> None:
        """Say what is bad about how the data lies, which files are left out and what is placed otherwise, once."""
        for note in (*self.parts.layout.notes, *unheeded(self.parts)):
            self.report.say(note)
        for change in self.config.train.lr_changes:
            self.report.say(f"from step {change.step} on, all learning rates are times {change.factor:g}")
        step = self.position.step
        train = self.passes.current(step).reader if self.passes.steps else None
        for split, reader in (("train", train), ("valid", self.valid_reader), ("test", self.test_reader)):
            if reader is not None:
                self.report.skipped(split, step, reader.manifest.left_out)
        if self.rt.is_main and self.passes.steps:
            warning = warning_of(self.config, self.passes.current(self.position.step).reader)
            if warning is not None:
                self.report.say(f"warning: {warning}")
        steps = self.loop.schedule.steps
        if steps and not self.config.data.follow and not self.config.train.max_steps:
            short = too_short(steps, self.config.data.batch_size, self.passes.rows)
            if short is not None:
                self.report.say(short)
