"""What each worker of Ray Train does: one rank's training or evaluation, and what it and the driver tell each other."""

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

GOODNESS = "goodness"  # a name that no metric has: those are `<split>/...`
_WORST = -1e30  # a number, as Ray Tune compares no others
_LOOK_SECONDS = 0.5  # between two looks at what is to be reported
_GRACE_SECONDS = 60.0  # for a checkpoint before Ray changes the number of ranks, and for the last report


class Work(NamedTuple):
    """What the ranks are to do: train, unless they are to `evaluate` on data or to `predict`.

    `splits`: which records Ray is told of. `judged_by`: the metric of the valid split by which a search compares this
    training with others, and what makes it better; it is told as `GOODNESS`, the higher, the better. `take_over`: the
    folders from a run that holds them.
    """

    config: RunConfig
    evaluate: str | None = None
    predict: Prediction | None = None
    splits: tuple[str, ...] = ("train", "valid", "test", "checkpoint")
    judged_by: tuple[str, Direction] | None = None
    take_over: bool = False

    @property
    def training(self) -> bool:
        """Whether there is something to save."""
        return self.evaluate is None and self.predict is None


class Desk:
    """Where driver and ranks leave word for each other; it lives where the driver does."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._training = False
        self._begun = False
        self._mistake: str | None = None

    async def ask_to_stop(self) -> bool:
        """The driver: all ranks are to save and stop. Returns whether they have anything to save."""
        self._asked.set()
        return self._training

    async def asked(self) -> None:
        """A rank: returns when it is to stop."""
        await self._asked.wait()

    async def begin(self, training: bool) -> str | None:
        """A rank: it begins, unless a mistake of the user's, which is returned, has ended the attempt before."""
        self._training, self._begun = training, True
        return self._mistake

    async def begun(self) -> bool:
        """The driver: whether a rank has begun."""
        return self._begun

    async def tell(self, mistake: str) -> None:
        """A rank: a user's mistake, which no restart mends."""
        self._mistake = self._mistake or mistake

    async def mistake(self) -> str | None:
        """The driver: what was told."""
        return self._mistake


def work(job: dict[str, Any]) -> Any:
    """What each worker does, in a thread of its own."""
    quiet_libraries()
    from rechub_dist.evaluation.evaluate import evaluate_run  # noqa: PLC0415 - takes seconds
    from rechub_dist.inference.predict import predict_run  # noqa: PLC0415 - takes seconds
    from rechub_dist.training.trainer import run  # noqa: PLC0415 - takes seconds, and a driver can do without

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
    attendant.join(_GRACE_SECONDS)  # one whose report fails leaves the others waiting
    return summary


def _listen(control: ExternalControl, desk: Any) -> None:
    """Beside the training: stop it when the driver says so. A job that is stopped has few seconds."""
    with suppress(RayActorError):  # the driver is gone, and Ray ends the ranks
        ray.get(desk.asked.remote())
        control.stop.ask()


def _attend(control: ExternalControl, work: Work) -> None:
    """Beside the training: tell Ray what the main rank records, and the training that its node is to go.

    Ray's reports and its news of preemption are collective: all ranks' attendants do the same rounds.
    """
    main = ray.train.get_context().get_world_rank() == 0
    reports = _Reports(work)
    with suppress(RayActorError):  # the driver is gone, and Ray ends the ranks
        while not _round(control, reports, main):
            control.ended.wait(_LOOK_SECONDS)


def _round(control: ExternalControl, reports: _Reports, main: bool) -> bool:
    """One round of the attendants; returns whether it is the last."""
    ended = control.ended.is_set()
    found = reports.take(control) if main else None
    due, over = broadcast_from_rank_zero((found is not None, ended))
    if due:
        _report(*(found or ({}, None)))
    if ray.train.get_preemption_info() is not None:
        control.stop.ask()
    return bool(over)


class _Reports:
    """Makes one report of all records since the last: Ray takes about one a second, and more would pile up."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._latest: dict[str, Any] = {}

    def take(self, control: ExternalControl) -> tuple[dict[str, Any], str | None] | None:
        """The latest metrics of each split, and the path of a new checkpoint; None if there is nothing new."""
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
                    value = record.get(metric)  # one that is no number is worse than all others
                    self._latest[GOODNESS] = _WORST if value is None else goodness(value, direction)
            if split == "checkpoint":
                checkpoint = f"{self._work.config.checkpoint_folder}/{step_folder(place['step'])}"
                self._latest["checkpoint"] = checkpoint
        return (dict(self._latest), checkpoint) if new else None


def _report(metrics: dict[str, Any], checkpoint: str | None) -> None:
    """A report to Ray; of a checkpoint it gets a note of where it lies, not its bytes."""
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
    """Tells the ranks of each other in the environment, as torchrun does."""

    share_cuda_visible_devices = True  # so that LOCAL_RANK counts the devices

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:  # noqa: ARG002
        address, port = worker_group.execute_single(0, _free_address)
        worker_group.execute(_prepare, address, port)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:  # noqa: ARG002
        with suppress(RayActorError, RayTaskError):  # a worker is gone: there is nothing to save
            worker_group.execute(_save_and_stop)


def _free_address() -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def _prepare(address: str, port: int) -> None:
    """In the main thread of each worker, before the training."""
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
    hosts = "1" if world == local_world else "2"  # or more: it is about the network interface
    os.environ.update(environment(Launch(local_world, hosts, f"{address}:{port}")))
    external_control().stop_on_signals()


def _save_and_stop() -> None:
    """In the main thread of each worker, when Ray is to end it: at a change of their number, all may have work."""
    external_control().stop.ask()
    external_control().ended.wait(_GRACE_SECONDS)
