"""The workers of Ray Train: a rank's training, evaluation or prediction, and its communication with the driver."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
import ray.train
from ray.exceptions import RayActorError, RayTaskError
from ray.train import Checkpoint
from ray.train.backend import Backend
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig

from rechub_dist.checkpoint.folder import step_folder
from rechub_dist.config import RunConfig
from rechub_dist.distributed.external_control import ExternalControl, external_control
from rechub_dist.distributed.process import LAUNCH, quiet_libraries
from rechub_dist.errors import UserError
from rechub_dist.launching.search import evaluations
from rechub_dist.metrics.direction import Direction, goodness

if TYPE_CHECKING:  # it takes seconds
    from rechub_dist.inference.predict import Prediction

GOODNESS = "goodness"  # no metric has this name: they are `<split>/...`
_WORST = -1e30  # finite, since Ray Tune cannot compare NaN or infinity
_LOOK_SECONDS = 0.5  # between checks for records to report
_GRACE_SECONDS = 60.0  # for a checkpoint before Ray changes the number of ranks, and for the last report


class Work(NamedTuple):
    """The work of the ranks: train, unless `evaluate` or `predict` is set.

    Attributes:
        config: the run.
        evaluate: data to evaluate on.
        predict: what to predict.
        splits: which records are reported to Ray.
        judged_by: the valid metric by which a search compares trials, and its direction; reported as `GOODNESS`, where
            higher is better.
        take_over: whether to take the output folders over from a running run.
    """

    config: RunConfig
    evaluate: str | None = None
    predict: Prediction | None = None
    splits: tuple[str, ...] = ("train", "valid", "test", "checkpoint")
    judged_by: tuple[str, Direction] | None = None
    take_over: bool = False

    @property
    def training(self) -> bool:
        """Whether this is training, which saves checkpoints."""
        return self.evaluate is None and self.predict is None


class Desk:
    """Ray actor for messages between driver and ranks, on the driver's node."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._training = False
        self._begun = False
        self._mistake: str | None = None

    async def ask_to_stop(self) -> bool:
        """Driver: ask all ranks to save and stop. Returns whether they have anything to save."""
        self._asked.set()
        return self._training

    async def asked(self) -> None:
        """Rank: wait until asked to stop."""
        await self._asked.wait()

    async def begin(self, training: bool) -> str | None:
        """Rank: announce that it begins. Returns the user's mistake that ended an earlier attempt, if any."""
        self._training, self._begun = training, True
        return self._mistake

    async def begun(self) -> bool:
        """Driver: whether any rank has begun."""
        return self._begun

    async def tell(self, mistake: str) -> None:
        """Rank: report a user's mistake, which a restart cannot fix."""
        self._mistake = self._mistake or mistake

    async def mistake(self) -> str | None:
        """Driver: the first reported mistake, if any."""
        return self._mistake


def work(job: dict[str, Any]) -> Any:
    """Entry point of each worker, in a thread of its own; returns the result, None after a user's mistake."""
    quiet_libraries()
    from rechub_dist.evaluation.evaluate import evaluate_run  # noqa: PLC0415 - takes seconds
    from rechub_dist.inference.predict import predict_run  # noqa: PLC0415 - takes seconds
    from rechub_dist.training.trainer import run  # noqa: PLC0415 - takes seconds, and the driver does not need it

    task, desk, control = job["work"], job["desk"], external_control()
    if ray.get(desk.begin.remote(task.training)) is not None:
        return None
    control.ended.clear()
    try:
        if task.evaluate is not None:
            step, found = evaluate_run(task.config, task.evaluate)
            return {"step": step, **found.counts, **found.metrics}
        if task.predict is not None:
            step, rows = predict_run(task.config, task.predict)
            return {"step": step, "rows": rows, "predictions": task.predict.out}
        attendant = threading.Thread(target=_attend, args=(control, task), name="rechub-dist-attendant", daemon=True)
        attendant.start()
        threading.Thread(target=_listen, args=(control, desk), name="rechub-dist-listener", daemon=True).start()
        os.environ[LAUNCH] = job["launch"]
        summary = run(task.config, control, take_over=task.take_over)
    except UserError as error:
        ray.get(desk.tell.remote(str(error)))
        return None
    finally:
        control.ended.set()
    attendant.join(_GRACE_SECONDS)  # if one rank's report fails, the others would wait forever
    return summary


def _listen(control: ExternalControl, desk: Any) -> None:
    """Thread that stops training when the driver asks; quickly, since a stopped job has only seconds."""
    with suppress(RayActorError):  # the driver has ended, and Ray ends the ranks
        ray.get(desk.asked.remote())
        control.stop.ask()


def _attend(control: ExternalControl, work: Work) -> None:
    """Thread that reports the main rank's records to Ray, and stops training if its node is about to go.

    Ray's reports and preemption info are collective: the threads of all ranks do the same rounds.
    """
    main = ray.train.get_context().get_world_rank() == 0
    reports = _Reports(work)
    with suppress(RayActorError):  # the driver has ended, and Ray ends the ranks
        while not _round(control, reports, main):
            control.ended.wait(_LOOK_SECONDS)


def _round(control: ExternalControl, reports: _Reports, main: bool) -> bool:
    """One round of `_attend`; returns whether it was the last. Collective."""
    ended = control.ended.is_set()
    found = reports.take(control) if main else None
    due, over = broadcast_from_rank_zero((found is not None, ended))
    if due:
        _report(*(found or ({}, None)))
    if ray.train.get_preemption_info() is not None:
        control.stop.ask()
    return bool(over)


class _Reports:
    """Combines all records since the last report into one, since Ray accepts only about one per second."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._latest: dict[str, Any] = {}

    def take(self, control: ExternalControl) -> tuple[dict[str, Any], str | None] | None:
        """The latest metrics of each split, and the path of a new checkpoint if any; None if nothing is new."""
        checkpoint, new = None, False
        while not control.records.empty():
            record = control.records.get()
            split, place = record.pop("split"), {"step": record.pop("step"), "epoch": record.pop("epoch")}
            if split not in self._work.splits:
                continue
            new = True
            self._latest |= place | {f"{split}/{name}": value for name, value in record.items() if value is not None}
            if split == "valid":
                self._latest["evaluations"] = len(evaluations(self._work.config.output_dir, place["step"]))
                if self._work.judged_by is not None:
                    metric, direction = self._work.judged_by
                    value = record.get(metric)  # NaN is worse than all numbers
                    self._latest[GOODNESS] = _WORST if value is None else goodness(value, direction)
            if split == "checkpoint":
                checkpoint = f"{self._work.config.checkpoint_folder}/{step_folder(place['step'])}"
                self._latest["checkpoint"] = checkpoint
        return (dict(self._latest), checkpoint) if new else None


def _report(metrics: dict[str, Any], checkpoint: str | None) -> None:
    """Report to Ray. For a checkpoint, Ray gets a note of its location, not its content."""
    if checkpoint is None:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoint.json").write_text(json.dumps({"path": checkpoint}), encoding="utf-8")
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


class OwnGroups(TorchConfig):
    """Leaves process groups to `rechub_dist.distributed.runtime`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Environment


class _Environment(Backend):
    """Sets the environment variables of the ranks, as torchrun does."""

    share_cuda_visible_devices = True  # so that LOCAL_RANK indexes the devices

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:  # noqa: ARG002
        address, port = worker_group.execute_single(0, _free_address)
        worker_group.execute(_prepare, address, port)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:  # noqa: ARG002
        with suppress(RayActorError, RayTaskError):  # a worker has died: nothing to save
            worker_group.execute(_save_and_stop)


def _free_address() -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def _prepare(address: str, port: int) -> None:
    """Set up a worker, in its main thread, before training."""
    from rechub_dist.launching.launcher import Launch, environment  # noqa: PLC0415 - imports torch

    context = ray.train.get_context()
    world, local_world = context.get_world_size(), context.get_local_world_size()
    os.environ.update(
        RANK=str(context.get_world_rank()),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(local_world),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    hosts = "1" if world == local_world else "2"  # or more: the network interface depends on whether there are several
    os.environ.update(environment(Launch(local_world, hosts, f"{address}:{port}")))
    external_control().stop_on_signals()


def _save_and_stop() -> None:
    """Save and stop, in each worker's main thread, before Ray ends it, for example to change the number of ranks."""
    external_control().stop.ask()
    external_control().ended.wait(_GRACE_SECONDS)
