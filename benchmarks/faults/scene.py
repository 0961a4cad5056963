"""A run that a fault befalls: its files, its commands, its hosts, and how long it took to go on."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from faults.account import losses
from faults.hosts import Command, Hosts, train_command
from rechub_dist.checkpoint import saved_steps
from rechub_dist.checkpoint.folder import Folder, step_folder, steps_in
from rechub_dist.checkpoint.load import blocks_of, consume, read_manifest, verify
from rechub_dist.checkpoint.manifest import MANIFEST
from rechub_dist.config import StorageConfig

STALL = 6
LEASE = 12
TOLD = r"agent of |watchdog: |launch: the agent|preempted at|error:|warning:"
RESUMED = r"resumed at step"


class Times(NamedTuple):
    """Seconds from the fault until it is told, and until training goes on.

    Attributes:
        told: None where there was no fault.
        resumed: None where training did not stop.
        resized: it went on on another number of ranks.
    """

    told: float | None
    resumed: float | None
    resized: bool = False


class Scene:
    """One run with a fault: its files, its commands, its hosts."""

    def __init__(self, folder: Path, data: Path, dice: random.Random, *, batch_norm: bool = False) -> None:
        self.folder = folder
        self.data = data
        self.dice = dice
        self.hosts: Hosts | None = None
        self.running: list[Command] = []
        self.output = folder / "out"
        folder.mkdir()
        tree = {
            "output_dir": str(self.output),
            "seed": 7,
            "data": {"root": str(data), "batch_size": 256},
            "model": {
                "name": "DeepFM",
                "features": [f"dense_{i}" for i in range(4)] + [f"sparse_{i}" for i in range(8)],
                "hidden_units": [1024, 1024],
                "dropout_rates": 0.0,
                "embedding_dim": 8,
                "batch_norm": batch_norm,
            },
            # Low rates: on another number of ranks sums are rounded differently, which grows from step to step.
            "embedding": {"optimizer": {"name": "rowwise_adagrad", "lr": 0.01}},
            "optimizer": {"name": "adam", "lr": 1e-4},
            "train": {"epochs": 2, "log_every": 1, "trace_rows": True},
            "checkpoint": {"every_steps": 25},
            "distributed": {"timeout_seconds": 60, "threads": 1, "stall_seconds": STALL, "lease_seconds": LEASE},
        }
        self.run_file = folder / "run.yaml"
        self.run_file.write_text(yaml.safe_dump(tree, sort_keys=False))

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.output / "checkpoints"

    def start(self, *options: str) -> Command:
        """The command on one host, with two ranks."""
        command = Command(train_command(self.run_file, "--nproc", "2", *options), {"RECHUB_OUTER_PAUSE": "1"})
        self.running.append(command)
        return command

    def start_on(self, host: int, nnodes: str, *options: str) -> Command:
        """The command on one of several hosts, with one rank each."""
        assert self.hosts is not None
        rendezvous = options if "--rdzv" in options else ("--rdzv", f"{self.hosts.address(0)}:29400", *options)
        command = train_command(self.run_file, "--nproc", "1", "--nnodes", nnodes, *rendezvous)
        return self.hosts.run(host, command, {"RECHUB_OUTER_PAUSE": "1"})

    def reach(self, step: int, run: Command) -> None:
        """Wait until a step is done."""
        while not (self.output / "metrics.jsonl").exists() or max(losses(self.output), default=0) < step:
            if run.code is not None:
                raise RuntimeError(f"ended with {run.code} before step {step}:\n{run.text}")
            time.sleep(0.05)

    def finish(self, run: Command) -> None:
        """Wait for a run's good end."""
        if run.wait(600) != 0:
            raise RuntimeError(f"exit code {run.code}:\n{run.text}")

    def saving(self, run: Command) -> int:
        """Wait until a checkpoint is being written; returns its step."""
        while run.code is None:
            for folder in self.checkpoints.glob("step-*"):
                if not (folder / MANIFEST).exists() and next(folder.glob("rank-*"), None) is not None:
                    return int(folder.name.removeprefix("step-"))
            time.sleep(0.001)
        raise RuntimeError(f"ended with {run.code} before a save:\n{run.text}")

    def verify(self) -> None:
        """Compare the newest checkpoint with its checksums."""
        folder = Folder(str(self.checkpoints), StorageConfig())
        manifest = read_manifest(folder, steps_in(folder.files())[-1])
        consume(verify(folder, manifest, blocks_of(manifest)))

    def again(self, run: Command, at: float, *options: str, code: int = 0) -> Times:
        """The run has ended, or is to end, by a fault at `at` and with `code`: give the command again, to the end.

        If it was to save, there must be a checkpoint of where it has stopped, and no part of another one.
        """
        if run.wait() != code:
            raise RuntimeError(f"exit code {run.code}:\n{run.text}")
        told = run.saw(TOLD, at) or time.monotonic()
        if code == 0:
            self.verify()
            folders = sorted(folder.name for folder in self.checkpoints.glob("step-*"))
            if folders != [step_folder(step) for step in saved_steps(self.checkpoints)]:
                raise RuntimeError(f"half a checkpoint is left: {folders}")
            if run.saw(f"preempted at step {saved_steps(self.checkpoints)[-1]}, resume with") is None:
                raise RuntimeError(f"stopped elsewhere than where it has saved:\n{run.text}")
        again = self.start(*options)
        resumed = again.wait_for(RESUMED)
        if again.saw("is held by") is not None:
            raise RuntimeError(f"waited for a process that has ended here:\n{again.text}")
        self.finish(again)
        return Times(told - at, resumed - at)

    def goes_on(self, run: Command, at: float, *, resized: bool = False) -> Times:
        """The run is to go on by itself after a fault at `at`, to the end."""
        told, resumed = run.wait_for(TOLD, at), run.wait_for(RESUMED, at)
        self.finish(run)
        return Times(told - at, resumed - at, resized)

    def close(self) -> None:
        """End what is left."""
        for command in self.running:
            command.kill()
        if self.hosts is not None:
            self.hosts.close()


Fault = Callable[[Scene], Times]
