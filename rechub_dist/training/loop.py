"""The only training loop, the same under every launcher."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rechub_dist.assembly.identity import identity, other_than
from rechub_dist.assembly.parts import Parts, build
from rechub_dist.assembly.precision import check_precision, tf32_products
from rechub_dist.assembly.readers import check_items, check_kinds, open_passes, optional_reader, warning_of, with_draws
from rechub_dist.assembly.sharded import shard_step
from rechub_dist.checkpoint import Position, open_checkpoints
from rechub_dist.checkpoint.lease import Lease
from rechub_dist.checkpoint.state import placement, train_state, weights_state
from rechub_dist.checkpoint.warm_start import warm_start
from rechub_dist.config import RunConfig
from rechub_dist.data.passes import Pass, Passes
from rechub_dist.data.stored import StoredRows, Trace
from rechub_dist.distributed.flight import dump_to
from rechub_dist.distributed.hosted import Hosted
from rechub_dist.distributed.process import Stop
from rechub_dist.distributed.runtime import Runtime, Stopped, device_type, environment, runtime
from rechub_dist.distributed.watchdog import Watchdog
from rechub_dist.embedding.optim import Optimizers
from rechub_dist.embedding.sharding import draw_tables
from rechub_dist.errors import UserError
from rechub_dist.metrics.direction import watched_metric
from rechub_dist.objectives import RetrievalObjective
from rechub_dist.reporting.device_memory import peak_memory
from rechub_dist.reporting.health import Health
from rechub_dist.reporting.logs import log_to
from rechub_dist.reporting.metrics import Metrics
from rechub_dist.reporting.reporter import Reporter
from rechub_dist.reporting.step_times import StepTimes
from rechub_dist.reporting.summary import Summary
from rechub_dist.seeds import seed_from
from rechub_dist.training.non_finite import LossCheck
from rechub_dist.training.pipeline import Feed, Pipeline, make_pipeline
from rechub_dist.training.validation import Validation


def run(config: RunConfig, hosted: Hosted | None = None, *, take_over: bool = False) -> Summary:
    """Train as `config` says on this rank; called on every rank.

    `hosted` is how a process that runs this in one of its threads asks it to stop, and reads along. `take_over` takes
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
            trainer = Trainer(config, rt, hosted, lease)
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
        self, config: RunConfig, rt: Runtime, hosted: Hosted | None = None, lease: Lease | None = None
    ) -> None:
        self.config = config
        self.rt = rt
        rt.together(lambda: check_precision(config.train, rt.device))
        parts = rt.together(lambda: build(config, device=rt.device.type, world_size=rt.world_size))
        self.parts: Parts = with_draws(parts, rt)
        reported = self.parts.step.objective.metrics(config.evaluation)
        self._best_by = rt.together(lambda: watched_metric(config.train.best_metric, config.train.best_mode, reported))
        self.passes: Passes = open_passes(config, self.parts, rt)
        self.valid_reader = optional_reader(config, self.parts, rt, "valid")
        self.test_reader = optional_reader(config, self.parts, rt, "test")
        for reader in (self.valid_reader, self.test_reader):
            if reader is not None and self.passes.steps:
                trained = self.passes.at(0).reader
                rt.together(lambda seen=reader, trained=trained: check_kinds(trained, seen, self.parts.spec))  # type: ignore[misc]
        if self.valid_reader or self.test_reader:
            check_items(self.parts, rt)
        self._lease = lease or Lease(config, rt)
        self.checkpoints = open_checkpoints(config, rt, self._lease)
        self.checkpoints.check(self._differing)
        rt.from_main(lambda: _refuse_foreign(config.output_dir))
        if lease is not None:
            lease.take()  # nothing is written before; and which checkpoint is the newest is known only now
        rt.together(lambda: _make_output(config, rt))
        log_to(config.output_dir / "logs", rt.rank, json_lines=config.monitor.json_lines)
        self._begun_with: list[str] = []
        self.module = shard_step(self.parts, rt, notes=self._begun_with)
        self.optimizers = rt.together(
            lambda: Optimizers(self.module, self.parts.layout, config.optimizer, config.embedding.schedule)
        )
        self.checkpoints.prepare()
        self.position = self._resume()
        self.report = self._reporter(hosted)
        self._times = StepTimes(config.monitor.profile_every)
        self._stop = Stop() if hosted is None else hosted.stop
        self._lease.stopping = self._stop.asked
        stall = config.distributed.stall_seconds or 0.8 * config.distributed.timeout_seconds
        self._watchdog = Watchdog(rt, config.output_dir / "logs", stall)
        self._validation = Validation(
            self.parts, self.module, self.passes, rt, self.report, self._watchdog, self._stop, self._best_by
        )
        watched = (self.parts.step.model, self.parts.step.objective)
        self._losses = LossCheck(config.train, config.output_dir / "non_finite", rt, watched)
        self._trace = self._open_trace() if config.train.trace_rows else None
        self._saved = self.position
        self._busy = 0.0  # seconds of training
        self._note = ""
        self._preempted = False

    @property
    def total_steps(self) -> int:
        """Steps of the run, as far as they are known."""
        return min(self.passes.steps, self.config.train.max_steps or self.passes.steps)

    def fit(self) -> Summary:
        """Train to the end, or to a signal; evaluate; keep checkpoints."""
        start, began = self.position, time.monotonic()
        health = Health(self.config.output_dir / "health", self.rt.rank, self._watchdog.gets_on)
        with self._stop.listening():  # also while the last checkpoint is written
            with self._watchdog, health:
                self._preempted = not self._all_listen()
                self.report.say(self._headline())
                for line in self._begun_with:
                    self.report.say(line)
                self._warn()
                if not self._preempted and not start.stopped_early and self._has_more(start):
                    self._train()
                test = {} if self._preempted else self._final()
            self.checkpoints.wait()
            self._tell_saves()
            self.checkpoints.check_last()
        rows = self._rows_between(start.step, self.position.step)
        rate = rows / self._busy if rows else None
        if self._preempted:
            self.report.say(f"preempted at step {self.position.step}, resume with the same command")
            return Summary(self.position.step, self.position.best_step, True, {}, {}, rate)
        self.report.say(f"finished at step {self.position.step} after {time.monotonic() - began:.1f} s")
        return Summary(self.position.step, self.position.best_step, False, self.position.best_metrics, test, rate)

    def _all_listen(self) -> bool:
        """Whether all ranks handle signals from here on, and none has been asked to stop already."""
        try:
            return not self.rt.add_up(torch.tensor([int(self._stop.asked())])).item()
        except RuntimeError:
            if self._stop.asked():  # and so was the rank that is missing, before it could listen
                return False
            raise

    def _has_more(self, start: Position) -> bool:
        return start.step < self.total_steps or self.config.data.follow or start.unevaluated

    @property
    def _sequences(self) -> tuple[str, ...]:
        """The features that the model computes as padded sequences."""
        found = (lookup.feature.name for lookup in self.parts.step.model.lookups() if lookup.pooling is None)
        return tuple(dict.fromkeys(found))

    def _train(self) -> None:
        """Segments of steps between evaluations, checkpoints and ends of passes."""
        model, optimizers = self.parts.step, self.optimizers
        losses = self._losses
        pipeline = make_pipeline(self.config.distributed.pipeline, self.module, optimizers, self.rt.device, losses)
        model.train()
        if self.position.unevaluated and self._after(self.position.step, self.passes.at(self.position.step - 1)):
            return
        self.report.start("training", self.total_steps, self.position.step)
        while self.position.step < self.total_steps or self._wait():
            here, first = self.passes.at(self.position.step), self.position.step
            with closing(here.reader.batches(here.number, first - here.first_step)) as batches:
                stored = StoredRows(here.reader, here.number)
                losses.begin(stored, here.first_step, first)
                feed = Feed(
                    self._lease.guard(batches),
                    model.objective,
                    self.rt,
                    self._stop.asked,
                    self._sequences,
                    losses,
                    self._watchdog,
                )
                for end in self._boundaries(here):
                    with tf32_products(self.config.train.tf32):
                        self._segment(pipeline, feed, end, here, stored)
                    if feed.stopped:
                        if self.position != self._saved:  # it may have come while that was saved
                            self._save()
                        self._preempted = True
                        return
                    if end in (here.end, self.total_steps):
                        self._account(feed, here, first)
                    if self._after(end, here):
                        return

    def _wait(self) -> bool:
        """Wait for more data where it may come; False if the run is to end here."""
        if not self.config.data.follow or self.position.step == self.config.train.max_steps:
            return False
        self.report.say(f"step {self.position.step}: waiting for more data")

        def asked_to_stop() -> bool:
            self._watchdog.mark("waiting for more data", slow=True)
            return self._stop.asked()

        if not self.passes.wait(asked_to_stop):
            asked = torch.tensor([int(self._stop.asked())])
            self._preempted = bool(self.rt.add_up(asked))
            return False
        self.report.say(f"more data: {self.passes.steps - self.position.step:,} steps")
        self.report.start("training", self.total_steps, self.position.step)
        return True

    def _account(self, feed: Feed, here: Pass, first: int) -> None:
        """Make sure that the rows of the pass's steps from `first` on are all accounted for, and say so."""
        step, planned = self.position.step, self._rows_between(first, self.position.step)
        whole = (first, step) == (here.first_step, here.end)
        steps = f"steps {first + 1} to {step}"
        # Of a mix, and without a short last batch, a skipped piece need not have passed in full.
        exact = whole and self.config.data.mix is None and not self.config.data.drop_last
        feed.tally.check(planned, whole=exact, what=f"epoch {here.number}, {steps}")
        left_out = len(here.reader.manifest.left_out)
        self.report.record("rows", step, here.number, {**feed.tally.values(), "files_left_out": left_out})
        more = f", {left_out} file(s) left out" if left_out else ""
        self.report.say(f"epoch {here.number}: {feed.tally}{more}{'' if whole else f', in {steps}'}")

    def _boundaries(self, here: Pass) -> Iterator[int]:
        """The steps of this pass at which something happens besides training, its end included."""
        end = min(here.end, self.total_steps)
        every = [self.config.train.eval_every, self.config.checkpoint.every_steps]
        while self.position.step < end:
            yield min([end, *((self.position.step // n + 1) * n for n in every if n)])

    def _segment(self, pipeline: Pipeline, feed: Feed, end: int, here: Pass, stored: StoredRows) -> None:
        """Train to step `end`; the pipeline is empty afterwards."""
        config, first = self.config, self.position.step
        batches = islice(feed, end - first)
        losses: list[Tensor] = []
        began = mark = time.monotonic()
        marked = first
        while True:
            step = self.position.step
            rate = self.optimizers.set_step(step)
            # Dropout is drawn from (seed, step, rank), so a resumed run draws what the uninterrupted one did.
            torch.manual_seed(seed_from(repr((config.seed, step, self.rt.rank))))
            try:
                with self._times.step(step + 1):
                    loss = pipeline.progress(batches, step)
            except StopIteration:
                break
            if loss is not None:
                losses.append(loss)
                self._losses.note(step, loss)
            if self._trace is not None:
                self._trace.write(step + 1, stored.of(step - here.first_step))
            step += 1
            self._watchdog.stepped(step)
            self.position = replace(self.position, step=step)
            if step % config.train.log_every == 0 or step == end:
                values = {"loss": self._global_mean(losses, marked)}
                now = time.monotonic()
                values["samples_per_second"] = self._rows_between(marked, step) / max(1e-9, now - mark)
                values["learning_rate"] = rate
                if (padded := feed.padded_share()) is not None:
                    values["padded_share"] = padded
                mark, marked, losses = now, step, []
                self._tell_saves()
                if step % config.train.log_every == 0:
                    values |= peak_memory(self.rt.device)
                    self.report.record("train", step, self.passes.at(step - 1).number, values)
                self._note = f"loss {values['loss']:.4f}, {values['samples_per_second']:,.0f} samples/s"
                if padded is not None:
                    self._note += f", {padded:.0%} padding"
            if (parts := self._times.take()) is not None:
                self.report.record("time", step, here.number, parts)
            if feed.new_skips:
                self.report.skipped("train", step, feed.new_skips)
                feed.new_skips = []
            self.report.advance(step, self._note)
        pipeline.release()
        self._busy += time.monotonic() - began

    def _after(self, step: int, here: Pass) -> bool:
        """Evaluate and save where they are due; True if the run is to end here."""
        train, last = self.config.train, step == self.total_steps
        pass_end = step == here.end
        epochs = here.number + 1
        due = step % train.eval_every == 0 if train.eval_every else pass_end and epochs % train.eval_epochs == 0
        evaluate = self.valid_reader is not None and (due or last)
        every = self.config.checkpoint.every_steps
        # Before the evaluation: one that fails costs no step.
        self.position = replace(self.position, unevaluated=evaluate)
        if (evaluate or last or (step % every == 0 if every else pass_end)) and self.position != self._saved:
            self._save()
        if self.valid_reader is None or not evaluate:
            return False
        try:
            found = self._validation.validate(self.valid_reader, self.position)
        except Stopped:
            self._preempted = True
            return True
        self.report.start("training", self.total_steps, step)
        stop = train.patience is not None and found.evaluations_since_best >= train.patience
        self.position = self._saved = replace(found, stopped_early=stop, unevaluated=False)
        self.checkpoints.amend(self.position)
        if stop:
            self.report.say(
                f"no better {self._validation.best_metric} for {train.patience} evaluations: stopping early"
            )
        return stop

    def _final(self) -> dict[str, float]:
        """Metrics of the best weights on the test split."""
        if self.test_reader is None:
            return {}
        step, best = self.position.step, self.position.best_step
        if best is not None and best != step:
            if best in self.checkpoints.steps():
                self.checkpoints.load_weights(weights_state(self.module, self.parts.layout), best)
                step = best
            else:
                self.report.say(f"warning: the best weights, of step {best}, could not be saved; testing the last ones")
        try:
            return self._validation.evaluate(self.test_reader, "test", step).metrics
        except Stopped:
            self._preempted = True
            return {}

    def _save(self) -> None:
        """Begin to save; training waits until the state is copied."""
        self._watchdog.mark("saving a checkpoint", slow=True)
        state = train_state(self.module, self.parts.layout, self.optimizers)
        run = {
            "identity": self._identity(self.position.step),
            "config": self.config.dump(),
            "tables": placement(self.parts.layout),
        }
        self.checkpoints.save(state, self.position, run)
        if self.rt.is_main and not (self.config.output_dir / "config.yaml").exists():
            with suppress(OSError):  # somebody has removed the folder
                _write_config(self.config)
        self._saved = self.position
        self._tell_saves()

    def _reporter(self, hosted: Hosted | None) -> Reporter:
        config, rt = self.config.monitor, self.rt
        metrics = None
        if config.metrics_port is not None:
            port = config.metrics_port and config.metrics_port + environment()[2]
            metrics = rt.together(lambda: Metrics(port, rt.rank, rt.world_size))
        return Reporter(
            self.config.output_dir,
            quiet=not rt.is_main,
            start_step=self.position.step,
            json_lines=config.json_lines,
            metrics=metrics,
            records=None if hosted is None else hosted.records,
        )

    def _open_trace(self) -> Trace:
        return Trace(self.config.output_dir / "rows", self.rt.from_main(time.time_ns), self.rt.rank)

    def _tell_saves(self) -> None:
        """Report the saves that have ended."""
        for save in self.checkpoints.news():
            self.report.saved(save, self.passes.at(save.step - 1).number if save.step else 0)

    def _resume(self) -> Position:
        state = train_state(self.module, self.parts.layout, self.optimizers)
        position = self.checkpoints.load(state, self._differing)
        if position is None:  # only then: what a checkpoint overwrites need not be drawn
            draw_tables(self.module, self.parts.layout, self.config.seed)
        if position is None and self.config.warm_start is not None:
            self._begun_with += warm_start(self.config.warm_start, self.config.checkpoint_storage, state, self.rt)
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
        objective = self.parts.step.objective
        # What negatives are drawn by depends on all of the data.
        counted = isinstance(objective, RetrievalObjective) and objective.needs_counts
        return identity(self.parts, self.passes.identity(self.passes.steps if counted else step))

    def _differing(self, run: dict[str, Any], step: int, where: str) -> list[str]:
        """What the run of a checkpoint has other than this one, as far as it has come."""
        return other_than(run, self._identity(step), where)

    def _rows_between(self, first: int, last: int) -> int:
        """Rows of the global batches of steps first .. last - 1."""
        return self.passes.rows_before(last) - self.passes.rows_before(first)

    def _global_mean(self, losses: list[Tensor], first: int) -> float:
        """The mean loss of the (0-based) steps from `first` on, of those that were not skipped."""
        if not losses:
            return math.nan
        total = torch.stack(losses).double().cpu()
        dist.all_reduce(total, group=self.rt.control)
        self._losses.check(first, total)
        return float(total.mean())

    def _headline(self) -> str:
        layout, config = self.parts.layout, self.config
        rows = sum(placed.table.rows for placed in layout.tables.values())
        weights = sum(placed.table.rows * (placed.table.dim or 0) for placed in layout.tables.values())
        dense = sum(parameter.numel() for parameter in self.optimizers.parameters.values())
        resumed = f", resumed at step {self.position.step}" if self.position.step else ""
        return (
            f"{config.model.name}: {len(layout.tables)} tables of {rows:,} rows ({weights:,} weights), {dense:,} dense "
            f"parameters; {self.rt.world_size} rank(s) on {self.rt.device.type}; {self.passes.rows:,} rows, "
            f"{self.total_steps:,} steps of {config.data.batch_size:,}{resumed}"
        )

    def _warn(self) -> None:
        """Say what is bad about how the data lies, which files are left out and what is placed otherwise, once."""
        for note in self.parts.layout.notes:
            self.report.say(note)
        step = self.position.step
        train = self.passes.at(step).reader if self.passes.steps else None
        for split, reader in (("train", train), ("valid", self.valid_reader), ("test", self.test_reader)):
            if reader is not None:
                self.report.skipped(split, step, reader.manifest.left_out)
        if self.rt.is_main and self.passes.steps:
            warning = warning_of(self.config, self.passes.at(self.position.step).reader)
            if warning is not None:
                self.report.say(f"warning: {warning}")


_OURS = ("config.yaml", "metrics.jsonl")  # what a run overwrites, or cuts off, in its output folder
_MARK = "# The configuration of the run in this folder, written by rechub_dist; it can be launched again."


def _is_ours(folder: Path) -> bool:
    """Whether these files are a run's: the mark says so; earlier versions wrote both of them, and checkpoints."""
    config = folder / "config.yaml"
    if config.exists() and config.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
        return True
    return all((folder / name).exists() for name in _OURS) or any((folder / "checkpoints").glob("step-*"))


def _refuse_foreign(folder: Path) -> None:
    """Refuse to overwrite, in an output folder, what no run has written."""
    there = next((folder / name for name in _OURS if (folder / name).exists()), None)
    if there is not None and not _is_ours(folder):
        raise UserError(
            f"output_dir: {there} is there already, and not from a run: it would be overwritten; choose another "
            f"folder, or move that file"
        )


def _make_output(config: RunConfig, rt: Runtime) -> None:
    """The output folder with config.yaml in it, and proof that this rank can write there."""
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        probe = config.output_dir / f".writable-{secrets.token_hex(8)}"  # nobody's file
        probe.write_text("")
        probe.unlink()
        if rt.is_main:
            _write_config(config)
    except OSError as error:
        raise UserError(
            f"output_dir: {config.output_dir} cannot be written: {error.strerror}; choose another folder"
        ) from error


def _write_config(config: RunConfig) -> None:
    config.output_dir.mkdir(parents=True, exist_ok=True)
    temporary = config.output_dir / ".config.yaml.tmp"
    temporary.write_text(f"{_MARK}\n{config.dump()}", encoding="utf-8")
    temporary.replace(config.output_dir / "config.yaml")
