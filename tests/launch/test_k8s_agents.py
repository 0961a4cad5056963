"""What a Job's pods run, on two hosts that the pods' names stand for."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from faults.hosts import Command, Hosts
from rechub_dist.checkpoint import saved_steps
from rechub_tests.manifests import render, trainer_pod
from rechub_tests.runs import output, run_file

NAME = "deepfm-0.deepfm"


def start(hosts: Hosts, host: int, path: Path, *more: str) -> Command:
    """A pod's container, but for where the run file lies and which program is Python."""
    (container,) = trainer_pod(render("job", "--workers", "2"))["spec"]["containers"]
    arguments = [str(path) if word == "/run/run.yaml" else word for word in container["args"]]
    values = {item["name"]: item["value"] for item in container["env"] if item["name"].startswith("RECHUB_P")}
    return hosts.run(host, [sys.executable, "-m", "rechub_dist", *arguments, *more], values)


@pytest.fixture
def path(launch_data: Path, tmp_path: Path) -> Path:
    model = {"hidden_units": [768, 768], "dropout_rates": 0.0, "batch_norm": False}
    return run_file(tmp_path, launch_data, "DeepFM", model=model, checkpoint={"every_steps": 10})


@pytest.mark.slow
def test_a_pod_that_is_evicted_and_one_that_waits(hosts: Hosts, path: Path) -> None:
    second = start(hosts, 1, path)  # the first one has no node yet, and no name
    second.wait_for(f"waiting for the rendezvous store at {NAME}:29400")
    hosts.name(NAME, 0)
    first = start(hosts, 0, path)
    first.wait_for("step 20: saved")
    second.signal(signal.SIGTERM)
    assert [first.wait(), second.wait()] == [75, 75], first.text + second.text
    saved = saved_steps(output(path) / "checkpoints")[-1]
    again = [start(hosts, host, path) for host in (1, 0)]
    again[1].wait_for(f"resumed at step {saved}")
    assert [pod.wait() for pod in again] == [0, 0], again[0].text + again[1].text


@pytest.mark.slow
def test_a_mistake_ends_the_job(hosts: Hosts, path: Path) -> None:
    hosts.name(NAME, 0)
    pods = [start(hosts, host, path, "--set", "model.hidden_units=[0]") for host in (1, 0)]
    assert [pod.wait() for pod in pods] == [2, 2], pods[0].text + pods[1].text
    assert not any("restart" in pod.text for pod in pods)
