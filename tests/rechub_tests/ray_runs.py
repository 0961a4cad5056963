"""A Ray cluster of two nodes on this machine, and the commands of launch/ on it."""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

from faults.hosts import ROOT, Command

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # jobs say `python`
    "OMP_NUM_THREADS": "1",
    # Ray puts off new ranks for so long when a node has gone
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}


class TwoNodes:
    """A head and another node, a CPU each, and the address where jobs are submitted."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster  # noqa: PLC0415 - Ray may be missing

        os.environ.update(ENVIRONMENT)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.jobs = f"http://127.0.0.1:{port}"
        head: dict[str, Any] = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": port}
        self.cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
        self.second = self.cluster.add_node(num_cpus=1)

    @property
    def address(self) -> str:
        """For --address."""
        return self.cluster.address

    def close(self) -> None:
        """End all of it."""
        self.cluster.shutdown()


def ray_command(name: str, *arguments: str, address: str | None = None) -> Command:
    """Start `rechub-dist ray <name>`; None: in a cluster of its own."""
    where = [] if address is None else ["--address", address]
    return Command([sys.executable, "-m", "rechub_dist", "ray", name, *arguments, *where], ENVIRONMENT)


def submit_job(submit: list[str], until: str) -> Command:
    """Submit a job and wait for a line of it; a cluster's agent for jobs may come some time after its nodes."""
    for _ in range(12):
        job = Command(submit, ENVIRONMENT)
        try:
            job.wait_for(until)
        except RuntimeError as error:
            if "No available agent to submit job" not in str(error):
                raise
            time.sleep(5)
        else:
            return job
    raise TimeoutError(f"no agent took the job: {shlex.join(submit)}")


def main_worker(command: Command) -> int:
    """The process of rank 0, whose lines are the only ones, in the latest attempt."""
    return int(re.findall(r"\(RayTrainWorker pid=(\d+)", command.text)[-1])
