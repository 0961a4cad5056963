"""Training and evaluation by Ray Train, a worker a rank; what ray_train.py and ray_tune.py have in common.

A rank runs the same `run(config)` as under every other launcher, in a thread of its worker's process. Ray restarts
ranks and counts them; process groups, data and checkpoints are ours.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import ray
import ray.train

import colorama  # isort: skip - Ray brings it along
from ray.exceptions import RayActorError, RayTaskError
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, ScalingConfig, UserCallback
from ray.train.backend import Backend
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import rechub_dist
from rechub_dist.checkpoint.folder import step_folder
from rechub_dist.config import RunConfig, read_yaml
from rechub_dist.distributed.hosted import Hosted, hosted
from rechub_dist.distributed.process import Stop, quiet_libraries
from rechub_dist.errors import UserError, one_line
from rechub_dist.tuning import evaluations

PLACEMENTS: Final = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
_LOOK_SECONDS = 0.5  # between two looks at what is to be reported, and at whether to stop
_GRACE_SECONDS = 60.0  # for a checkpoint before Ray changes the number of ranks


class FailedError(Exception):
    """Ranks failed more often than they may be started again."""


@dataclass(frozen=True)
class Workers:
    """How many ranks, and what each is given.

    Attributes:
        most: ranks to train on.
        least: ranks to go on with when the cluster has no room for more.
        cpus: CPUs reserved for each; also its torch threads, unless the run file says otherwise.
        gpus: GPUs for each, 0 or 1.
        placement: strategy of Ray's placement group.
        max_failures: how often ranks are started again after a failure; -1: without limit.
        resize_seconds: between two looks whether there is room for more ranks, where `least` are enough.

    Raises:
        UserError: numbers that contradict each other, or no such strategy.
    """

    most: int
    least: int | None = None
    cpus: int = 1
    gpus: int = 0
    placement: str = "PACK"
    max_failures: int = 3
    resize_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.least is not None and self.least > self.most:
            raise UserError(f"--min-workers {self.least} is more than --num-workers {self.most}")
        if self.placement not in PLACEMENTS:
            raise UserError(f"--placement {self.placement}: {', '.join(PLACEMENTS)}")

    def scaling(self) -> ScalingConfig:
        """The same in Ray's words."""
        resources = {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}
        return ScalingConfig(
            num_workers=self.most if self.least is None else (self.least, self.most),
            use_gpu=self.gpus > 0,
            resources_per_worker=resources,
            placement_strategy=self.placement,
            elastic_resize_monitor_interval_s=self.resize_seconds,
        )

    def waits_for(self) -> str | None:
        """What the cluster lacks now for the fewest ranks, as a clause; None if it has room."""
        there, ranks = ray.cluster_resources(), self.least or self.most
        for name, each in (("CPU", self.cpus), ("GPU", self.gpus)):
            if ranks * each > there.get(name, 0):
                return f"{ranks} rank(s) need {ranks * each} {name}, the cluster has {there.get(name, 0):g}"
        nodes = sum(node["Alive"] for node in ray.nodes())
        if self.placement == "STRICT_SPREAD" and ranks > nodes:
            return f"{ranks} rank(s) need as many nodes (STRICT_SPREAD), the cluster has {nodes}"
        return None


class Work(NamedTuple):
    """What the ranks are to do: train, or, with `data`, evaluate on that. `splits`: which records Ray is told of."""

    config: RunConfig
    data: str | None = None
    splits: tuple[str, ...] = ("train", "valid", "test", "checkpoint")


class Desk:
    """Where driver and ranks leave word for each other; it lives where the driver does."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._begun = False
        self._mistake: str | None = None

    async def ask_to_stop(self) -> bool:
        """The driver: all ranks are to save and stop. Returns whether they have begun."""
        self._asked.set()
        return self._begun

    async def asked(self) -> None:
        """A rank: returns when it is to stop."""
        await self._asked.wait()

    async def begin(self) -> str | None:
        """A rank: it begins, unless a mistake of the user's, which is returned, has ended the attempt before."""
        self._begun = True
        return self._mistake

    async def tell(self, mistake: str) -> None:
        """A rank: a user's mistake, which no restart mends."""
        self._mistake = self._mistake or mistake

    async def mistake(self) -> str | None:
        """The driver: what was told."""
        return self._mistake


def connect(address: str | None, workers: Workers, *, ship: bool, runtime_env: Path | None) -> None:
    """Join a cluster: that of `address`, else of $RAY_ADDRESS, else one of this machine for this run alone.

    `ship` sends this package along, to a cluster that does not have it; `runtime_env` names a YAML file of Ray's
    further settings of that kind.

    Raises:
        UserError: nothing answers there, or Ray refuses the runtime environment.
    """
    # Told to the controller: how soon it sees that workers have ended.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    environment: dict[str, Any] = {} if runtime_env is None else read_yaml(runtime_env)
    if ship:
        package = str(Path(rechub_dist.__file__).parent)
        environment["py_modules"] = [*environment.get("py_modules", []), package]
    local: dict[str, Any] = {}
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        # Said either way: an old token in the home folder would be taken for this cluster's.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        cores = max(os.cpu_count() or 1, workers.most * workers.cpus)
        local = {"num_cpus": cores}
    colorama.init()  # no colours in the lines of workers where they are not for a terminal
    try:
        ray.init(address or "local", runtime_env=environment or None, logging_level="WARNING", **local)
    except ConnectionError as error:
        raise UserError(f"--address {address}: no Ray cluster answers: {one_line(error)}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"Ray refuses the settings: {one_line(error)}") from error


def fit(work: Work, workers: Workers, callbacks: tuple[UserCallback, ...] = ()) -> Any:
    """Have the ranks do the work; returns what rank 0 does, None where the run was stopped before they began.

    In the main thread SIGTERM and Ctrl-C make all ranks save and stop.

    Raises:
        UserError: a rank's, at once and without a restart.
        FailedError: too many failures.
    """
    lack = workers.waits_for()
    if lack is not None:
        print(f"waiting for nodes: {lack}", file=sys.stderr, flush=True)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    desk = ray.remote(Desk).options(num_cpus=0, scheduling_strategy=here).remote()
    job = {"work": _with_threads(work, workers), "desk": desk}
    stop = Stop()
    with stop.listening():
        while True:
            found = _attempt(_trainer(job, work.config, workers, callbacks), desk, stop)
            # Ranks that have saved as their node was to go, or as one got SIGTERM, have not failed to Ray.
            if work.data is not None or found is None or not found.preempted or stop.asked():
                return found
            print(f"a node or worker is to go: going on from step {found.step}", file=sys.stderr, flush=True)


def _trainer(job: dict[str, Any], config: RunConfig, workers: Workers, callbacks: tuple[UserCallback, ...]) -> Any:
    return TorchTrainer(
        _rank,
        train_loop_config=job,
        torch_config=_OwnGroups(),
        scaling_config=workers.scaling(),
        run_config=ray.train.RunConfig(
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}",
            storage_path=str(config.output_dir / "ray"),
            failure_config=FailureConfig(max_failures=workers.max_failures),
            # of pointers to ours: these Ray may remove
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=list(callbacks),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


def _attempt(trainer: Any, desk: Any, stop: Stop) -> Any:
    """What rank 0 returns; None where `stop` was asked before the ranks began."""
    ended: list[ray.train.Result | Exception] = []

    def call() -> None:
        try:
            ended.append(trainer.fit())
        except Exception as error:
            ended.append(error)

    # In a thread: in the main one Ray takes Ctrl-C for its own, and ends ranks that have not saved.
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    told = False
    while thread.is_alive():
        thread.join(_LOOK_SECONDS / 5)
        if stop.asked() and not told:
            told = True
            if not ray.get(desk.ask_to_stop.remote()):
                return None
    mistake = ray.get(desk.mistake.remote())
    if mistake is not None:
        raise UserError(mistake)
    if isinstance(ended[0], Exception):
        raise FailedError(_told(ended[0])) from ended[0]
    return ended[0].return_value


def _with_threads(work: Work, workers: Workers) -> Work:
    """Torch's threads by what is reserved: a process counts the cores of its node, not those it may use."""
    distributed = work.config.distributed
    if distributed.threads is not None:
        return work
    changed = distributed.model_copy(update={"threads": workers.cpus})
    return work._replace(config=work.config.model_copy(update={"distributed": changed}))


def _told(error: Exception) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _rank(job: dict[str, Any]) -> Any:
    """What each worker does, in a thread of its own."""
    quiet_libraries()
    from rechub_dist.evaluate import evaluate_run  # noqa: PLC0415 - takes seconds
    from rechub_dist.trainer import run  # noqa: PLC0415 - takes seconds, and a driver can do without

    work, desk, host = job["work"], job["desk"], hosted()
    if ray.get(desk.begin.remote()) is not None:
        return None
    host.ended.clear()
    try:
        if work.data is not None:
            step, found = evaluate_run(work.config, work.data)
            return {"step": step, **found.counts, **found.metrics}
        attendant = threading.Thread(target=_attend, args=(host, work), name="rechub-dist-attendant", daemon=True)
        attendant.start()
        threading.Thread(target=_listen, args=(host, desk), name="rechub-dist-listener", daemon=True).start()
        summary = run(work.config, host)
    except UserError as error:
        ray.get(desk.tell.remote(str(error)))
        return None
    finally:
        host.ended.set()
    attendant.join()
    return summary


def _listen(host: Hosted, desk: Any) -> None:
    """Beside the training: stop it when the driver says so. A job that is stopped has few seconds."""
    with suppress(RayActorError):  # the driver is gone, and Ray ends the ranks
        ray.get(desk.asked.remote())
        host.stop.ask()


def _attend(host: Hosted, work: Work) -> None:
    """Beside the training: tell Ray what the main rank records, and the training that its node is to go.

    Ray's reports and its news of preemption are collective: all ranks' attendants do the same rounds.
    """
    main = ray.train.get_context().get_world_rank() == 0
    reports = _Reports(work)
    with suppress(RayActorError):  # the driver is gone, and Ray ends the ranks
        while not _round(host, reports, main):
            host.ended.wait(_LOOK_SECONDS)


def _round(host: Hosted, reports: _Reports, main: bool) -> bool:
    """One round of the attendants; returns whether it is the last."""
    ended = host.ended.is_set()
    found = reports.take(host) if main else None
    due, over = broadcast_from_rank_zero((found is not None, ended))
    if due:
        _report(*(found or ({}, None)))
    if ray.train.get_preemption_info() is not None:
        host.stop.ask()
    return bool(over)


class _Reports:
    """Makes one report of all records since the last: Ray takes about one a second, and more would pile up."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._latest: dict[str, Any] = {}

    def take(self, host: Hosted) -> tuple[dict[str, Any], str | None] | None:
        """The latest metrics of each split, and the path of a new checkpoint; None if there is nothing new."""
        checkpoint, new = None, False
        while not host.records.empty():
            record = host.records.get()
            split, place = record.pop("split"), {"step": record.pop("step"), "epoch": record.pop("epoch")}
            if split not in self._work.splits:
                continue
            new = True
            self._latest |= place | {f"{split}/{name}": value for name, value in record.items() if value is not None}
            if split == "valid":
                self._latest["evaluations"] = len(evaluations(self._work.config.output_dir, place["step"]))
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


class _OwnGroups(TorchConfig):
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
    from rechub_dist.distributed.launcher import Launch, environment  # noqa: PLC0415 - imports torch

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
    hosted().stop_on_sigterm()


def _save_and_stop() -> None:
    """In the main thread of each worker, when Ray is to end it: at a change of their number, all may have work."""
    hosted().stop.ask()
    hosted().ended.wait(_GRACE_SECONDS)


# The workers do not have this file, and the package may not be where it is.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
