"""Run training on Ray Train, one worker per rank; shared by `ray train` and `ray tune`.

A rank runs the same `run(config)` as under every other launcher, in a thread of its worker's process. Ray only starts,
counts and restarts ranks; process groups, data and checkpoints are ours.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ray
import ray.train

import colorama  # isort: skip - Ray brings it along
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import rechub_dist
from rechub_dist.config import RunConfig, read_yaml
from rechub_dist.distributed.process import Stop
from rechub_dist.errors import UserError, one_line
from rechub_dist.launch.ray_options import in_job
from rechub_dist.launch.ray_ranks import Desk, OwnGroups, Work, work

PLACEMENTS: Final = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
_LOOK_SECONDS = 0.1  # between checks whether to stop
_SILENT_SECONDS = 30.0  # without a started rank, until `_WAITING` is printed


_WAITING: Final = (
    "waiting for Ray to start ranks: the cluster has no room for them yet, or still reserves it for a killed run, for "
    "up to three minutes"
)


class FailedError(Exception):
    """The ranks failed more often than `max_failures`."""


@dataclass(frozen=True)
class Workers:
    """The number of ranks, and the resources of each.

    Attributes:
        most: number of ranks.
        least: fewest ranks to train with if the cluster has no room for more; None: `most`.
        cpus: CPUs reserved per rank; also its torch threads, unless the run file sets them.
        gpus: GPUs per rank, 0 or 1.
        placement: strategy of Ray's placement group.
        max_failures: restarts of the ranks after failures; -1: unlimited.
        resize_seconds: with `least`, seconds between checks for room for more ranks.

    Raises:
        UserError: `least` is above `most`, or the strategy is unknown.
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
            raise UserError(f"--placement {self.placement}: must be one of {', '.join(PLACEMENTS)}")

    def scaling(self) -> ScalingConfig:
        """Convert to Ray's `ScalingConfig`."""
        resources = {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}
        return ScalingConfig(
            num_workers=self.most if self.least is None else (self.least, self.most),
            use_gpu=self.gpus > 0,
            resources_per_worker=resources,
            placement_strategy=self.placement,
            elastic_resize_monitor_interval_s=self.resize_seconds,
        )

    def waits_for(self) -> str | None:
        """What the cluster lacks for the fewest ranks, as a clause; None if it has room."""
        there, ranks = ray.cluster_resources(), self.least or self.most
        for name, each in (("CPU", self.cpus), ("GPU", self.gpus)):
            if ranks * each > there.get(name, 0):
                return f"{ranks} rank(s) need {ranks * each} {name}, the cluster has {there.get(name, 0):g}"
        nodes = sum(node["Alive"] for node in ray.nodes())
        if self.placement == "STRICT_SPREAD" and ranks > nodes:
            return f"{ranks} rank(s) need as many nodes (STRICT_SPREAD), the cluster has {nodes}"
        return None


def connect(
    address: str | None, workers: Workers, *, ship: bool, runtime_env: Path | None, code: Path | None = None
) -> None:
    """Connect to the cluster at `address`, else $RAY_ADDRESS, else start a temporary one on this machine.

    Args:
        address: of the cluster.
        workers: determine the number of CPUs of a temporary cluster.
        ship: upload this package to a cluster that lacks it.
        runtime_env: YAML file with more settings for Ray's runtime environment.
        code: folder whose Python files are uploaded as Ray's `working_dir`, which is on the ranks' path, unless a
            submitted job or `runtime_env` sets one.

    Raises:
        UserError: no cluster answers, or Ray refuses the runtime environment.
    """
    # How soon Ray's controller notices that workers have ended.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    environment: dict[str, Any] = {} if runtime_env is None else read_yaml(runtime_env)
    if ship:
        package = str(Path(rechub_dist.__file__).parent)
        environment["py_modules"] = [*environment.get("py_modules", []), package]
    if code is not None and "working_dir" not in environment and not in_job():
        environment["working_dir"] = str(code)
        # Exclude data and runs. Ray matches folders without their slash, and the top one as ".": `*` would exclude all.
        environment["excludes"] = [*environment.get("excludes", []), "?*.*", ".?*", "!*.py"]
    local: dict[str, Any] = {}
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        _make_token()
        cores = max(os.cpu_count() or 1, workers.most * workers.cpus)
        local = {"num_cpus": cores}
    colorama.init()  # no colours in workers' lines if they do not go to a terminal
    try:
        ray.init(address or "local", runtime_env=environment or None, logging_level="WARNING", **local)
    except ConnectionError as error:
        raise UserError(f"--address {address}: no Ray cluster answers: {one_line(error)}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"Ray refuses the settings: {one_line(error)}") from error


def _make_token() -> None:
    """Have Ray ask whoever reaches this machine's cluster for a token of this run alone, in the environment.

    Ray asks for one by default (RAY_AUTH_MODE), and would take that of a former cluster from the home folder, or leave
    one there.
    """
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it tells of the default at each start
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def fit(work: Work, workers: Workers, callbacks: tuple[UserCallback, ...] = ()) -> Any:
    """Run `work` on the ranks; returns rank 0's result, or None if it was stopped before there was anything to save.

    In the main thread, SIGTERM and Ctrl-C make all ranks save and stop.

    Raises:
        UserError: that of a rank, without a restart.
        FailedError: too many failures.
    """
    lack = workers.waits_for()
    if lack is not None:
        print(f"waiting for nodes: {lack}", file=sys.stderr, flush=True)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    desk = ray.remote(Desk).options(num_cpus=0, scheduling_strategy=here).remote()
    job = {"work": _with_threads(work, workers), "desk": desk, "launch": secrets.token_hex(8)}
    stop = Stop()
    with stop.listening():
        while True:
            found = _attempt(_trainer(job, work.config, workers, callbacks), desk, stop)
            # To Ray, ranks that saved because a node is going or one got SIGTERM have finished, not failed.
            if not work.training or found is None or not found.preempted or stop.asked():
                return found
            print(f"a node or worker is being stopped: resuming from step {found.step}", file=sys.stderr, flush=True)


def _trainer(job: dict[str, Any], config: RunConfig, workers: Workers, callbacks: tuple[UserCallback, ...]) -> Any:
    return TorchTrainer(
        work,
        train_loop_config=job,
        torch_config=OwnGroups(),
        scaling_config=workers.scaling(),
        run_config=ray.train.RunConfig(
            name=f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}",
            storage_path=str(config.output_dir / "ray"),
            failure_config=FailureConfig(max_failures=workers.max_failures),
            # only pointers to our checkpoints, which Ray may delete
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=list(callbacks),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


def _attempt(trainer: Any, desk: Any, stop: Stop) -> Any:
    """Rank 0's result; None if `stop` was requested before there was anything to save."""
    ended: list[ray.train.Result | Exception] = []

    def call() -> None:
        try:
            ended.append(trainer.fit())
        except Exception as error:
            ended.append(error)

    # In a thread: in the main thread Ray handles Ctrl-C itself, and ends ranks that have not saved.
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    told, silent_until = False, time.monotonic() + _SILENT_SECONDS
    while thread.is_alive():
        thread.join(_LOOK_SECONDS)
        if time.monotonic() > silent_until:
            silent_until = math.inf
            if not ray.get(desk.begun.remote()):
                print(_WAITING, file=sys.stderr, flush=True)
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
    """Set torch's threads to the reserved CPUs: torch itself would count the cores of the node."""
    distributed = work.config.distributed
    if distributed.threads is not None:
        return work
    changed = distributed.model_copy(update={"threads": workers.cpus})
    return work._replace(config=work.config.model_copy(update={"distributed": changed}))


def _told(error: Exception) -> str:
    """The last non-empty line of the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
