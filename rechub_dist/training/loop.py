"""The training loop, the same under every launcher."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from itertools import islice

import torch

from rechub_dist.assembly.parts import TrainModule
from rechub_dist.assembly.precision import tf32_products
from rechub_dist.checkpoint import Position
from rechub_dist.checkpoint.lease import Lease
from rechub_dist.config import RunConfig
from rechub_dist.data.passes import Pass, Passes
from rechub_dist.data.stored import StoredRows, Trace
from rechub_dist.distributed.process import Stop
from rechub_dist.distributed.runtime import Runtime, Stopped
from rechub_dist.distributed.watchdog import Watchdog
from rechub_dist.embedding.optim import Optimizers
from rechub_dist.embedding.rates import Plateaus
from rechub_dist.reporting.device_memory import peak_memory
from rechub_dist.reporting.profile import Profile
from rechub_dist.reporting.reporter import Reporter
from rechub_dist.reporting.step_times import StepTimes
from rechub_dist.seeds import seed_from
from rechub_dist.training.feed import Feed
from rechub_dist.training.meter import Meter
from rechub_dist.training.non_finite import NonFiniteGuard
from rechub_dist.training.pipeline import Pipeline
from rechub_dist.training.saves import Saves
from rechub_dist.training.schedule import Due, Schedule
from rechub_dist.training.validation import Validation


@dataclass
class Loop:
    """Trains a run from `position` on: passes over data, of segments between what is due, of steps.

    Attributes:
        position: of the last applied step.
        preempted: whether it has stopped as it was asked to.
        seconds: spent training.
        note: the last of it, for a line of progress.
    """

    config: RunConfig
    rt: Runtime
    train_module: TrainModule
    optimizers: Optimizers
    pipeline: Pipeline
    passes: Passes
    schedule: Schedule
    validation: Validation
    saves: Saves
    report: Reporter
    watchdog: Watchdog
    stop: Stop
    lease: Lease
    guard: NonFiniteGuard
    times: StepTimes
    profile: Profile | None
    trace: Trace | None
    position: Position
    preempted: bool = False
    seconds: float = 0.0
    note: str = ""

    def train(self) -> None:
        """Train to the end of the run, to a request to stop, or until no evaluation is better. Collective."""
        self.train_module.train()
        step = self.position.step
        if self.position.unevaluated and self._after(self.schedule.at(step, self.passes.current(step - 1))):
            return
        self.report.start("training", self.schedule.steps, step)
        while self.position.step < self.schedule.steps or self._wait():
            if not self._pass(self.passes.current(self.position.step)):
                return

    def _pass(self, current: Pass) -> bool:
        """Train to the end of a pass; returns whether the run goes on after it."""
        first = self.position.step
        with closing(current.reader.batches(current.number, first - current.first_step)) as batches:
            stored = StoredRows(current.reader, current.number)
            self.guard.begin(stored, current.first_step, first)
            feed = Feed(
                self.lease.guard(batches),
                self.train_module.objective,
                self.rt,
                self.stop.asked,
                self.train_module.sequences(),
                self.guard,
                self.watchdog,
            )
            for due in self.schedule.ahead(first):
                self._segment(feed, due.step, current, stored)
                if feed.stopped:
                    self.preempted = True
                    if self.position.step:  # a stop may come while the step before is saved
                        self.saves.keep(self.position)
                    return False
                if due.pass_ends or due.run_ends:
                    self._account(feed, current, first)
                if self._after(due):
                    return False
        return True

    def _segment(self, feed: Feed, end: int, current: Pass, stored: StoredRows) -> None:
        """Train to step `end`; the pipeline is empty afterwards."""
        began = time.monotonic()
        batches = islice(feed, end - self.position.step)
        meter = Meter(self.rt, self.passes, self.guard, feed, self.position.step)
        with tf32_products(self.config.train.tf32):
            while True:
                step = self.position.step
                rate = self.optimizers.set_step(step, self.position.plateaus)
                # Dropout is drawn from (seed, step, rank), so a resumed run draws what the uninterrupted one did.
                self._seed(seed_from(repr((self.config.seed, step, self.rt.rank))))
                try:
                    with self._profiled(step + 1):
                        # lookup, model, objective, backward, step: see `pipeline.train_step`
                        loss = self.pipeline.progress(batches, step)
                except StopIteration:
                    break
                meter.add(step, loss)
                if self.trace is not None:
                    self.trace.write(step + 1, stored.of(step - current.first_step))
                self.position = replace(self.position, step=step + 1)
                self.watchdog.stepped(step + 1)
                self._tell(meter, feed, current, rate, last=step + 1 == end)
        self.pipeline.release()
        self.seconds += time.monotonic() - began

    def _seed(self, seed: int) -> None:
        """Seed the generators that a step draws from.

        `torch.manual_seed` would seed those of every kind of device, and keep a stack trace for each that is not there,
        which takes more than a hundredth of a step.
        """
        torch.default_generator.manual_seed(seed)
        if self.rt.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _profiled(self, step: int) -> AbstractContextManager[None]:
        """The context of a step, under the profiler if that is due."""
        if self.profile is not None and self.profile.wants(step):
            return self.profile.step(step)
        return self.times.step(step)

    def _tell(self, meter: Meter, feed: Feed, current: Pass, rate: float, *, last: bool) -> None:
        """Records and progress after a step, `last` of its segment."""
        step = self.position.step
        due = step % self.config.train.log_every == 0
        if due or last:
            values, self.note = meter.take(step, rate)
            self.saves.tell()
            if due:
                factor = self.optimizers.rates.factors(step - 1, self.position.plateaus)[1]
                values["table_learning_rate"] = factor * self.config.embedding.optimizer.lr
                values |= self.train_module.objective.watched()
                self.report.record("train", step, current.number, values | peak_memory(self.rt.device))
        if (parts := self.times.take()) is not None:
            self.report.record("time", step, current.number, parts)
        if feed.new_skips:
            self.report.skipped("train", step, feed.new_skips)
            feed.new_skips = []
        self.report.advance(step, self.note)

    def _after(self, due: Due) -> bool:
        """Save and evaluate where they are due; True if the run is to end here."""
        self.position = replace(self.position, unevaluated=due.evaluate)
        if due.save:
            self.saves.keep(self.position)
        if not due.evaluate:
            return False
        try:
            found = self.validation.validate(self.position)
        except Stopped:
            self.preempted = True
            return True
        self.report.start("training", self.schedule.steps, due.step)
        patience = self.config.train.patience
        ends = patience is not None and found.evaluations_since_best >= patience
        plateaus = self.optimizers.rates.evaluated(found.plateaus, improved=found.evaluations_since_best == 0)
        self._tell_reductions(found.plateaus, plateaus)
        self.position = replace(found, stopped_early=ends, unevaluated=False, plateaus=plateaus)
        self.saves.amend(self.position)
        if ends:
            self.report.say(f"no better {self.validation.best_metric} for {patience} evaluations: stopping early")
        return ends

    def _tell_reductions(self, before: Plateaus, after: Plateaus) -> None:
        for section, state in after.items():
            if state["reductions"] > before.get(section, {}).get("reductions", 0):
                self.report.say(
                    f"no better {self.validation.best_metric}: {section}.schedule reduces the learning rate "
                    f"(reduction {state['reductions']})"
                )

    def _wait(self) -> bool:
        """Wait for more data where it may come; False if the run is to end here."""
        if not self.config.data.follow or self.position.step == self.config.train.max_steps:
            return False
        self.report.say(f"step {self.position.step}: waiting for more data")

        def asked_to_stop() -> bool:
            self.watchdog.mark("waiting for more data", slow=True)
            return self.stop.asked()

        if not self.passes.wait(asked_to_stop):
            self.preempted = bool(self.rt.all_reduce_sum(torch.tensor([int(self.stop.asked())])))
            return False
        self.report.say(f"more data: {self.passes.steps - self.position.step:,} steps")
        self.report.start("training", self.schedule.steps, self.position.step)
        return True

    def _account(self, feed: Feed, current: Pass, first: int) -> None:
        """Make sure that the rows of the pass's steps from `first` on are all accounted for, and say so."""
        step = self.position.step
        planned = self.passes.rows_before(step) - self.passes.rows_before(first)
        whole = (first, step) == (current.first_step, current.end)
        steps = f"steps {first + 1} to {step}"
        # Of a mix, and without a short last batch, a skipped piece need not have passed in full.
        exact = whole and self.config.data.mix is None and not self.config.data.drop_last
        feed.tally.check(planned, whole=exact, what=f"epoch {current.number}, {steps}")
        left_out = len(current.reader.manifest.left_out)
        self.report.record("rows", step, current.number, {**feed.tally.values(), "files_left_out": left_out})
        more = f", {left_out} file(s) left out" if left_out else ""
        self.report.say(f"epoch {current.number}: {feed.tally}{more}{'' if whole else f', in {steps}'}")
