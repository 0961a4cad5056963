"""Two hosts: one dies, its cable is pulled, it comes back; what is trained on stays the same."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from faults.account import account, losses
from faults.hosts import Hosts, train_command
from rechub_dist.checkpoint import saved_steps
from rechub_tests.runs import output, run_file

STEPS = 188  # of two epochs


def slow_run(folder: Path, data: Path, **train: object) -> Path:
    """A run of a size to be hit: no dropout, so that it may go on with another number of ranks."""
    return run_file(
        folder,
        data,
        "DeepFM",
        model={"hidden_units": [768, 768], "dropout_rates": 0.0, "batch_norm": False},
        checkpoint={"every_steps": 10},
        train={"epochs": 2, "log_every": 1, "trace_rows": True, **train},
        distributed={"timeout_seconds": 60, "threads": 1, "stall_seconds": 6},
    )


def hosts_command(hosts: Hosts, path: Path, nnodes: str, *more: str) -> list[str]:
    return train_command(path, "--nnodes", nnodes, "--nproc", "1", "--rdzv", f"{hosts.address(0)}:29400", *more)


def wait_for_step(path: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (output(path) / "metrics.jsonl").exists() or step not in losses(output(path)):
        assert time.monotonic() < deadline, f"step {step} is not reached"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_host_dies_and_the_other_goes_on(hosts: Hosts, launch_data: Path, tmp_path: Path) -> None:
    path = slow_run(tmp_path, launch_data)
    first = hosts.run(0, hosts_command(hosts, path, "1:2"))
    hosts.run(1, hosts_command(hosts, path, "1:2"))
    first.wait_for("2 rank")
    wait_for_step(path, 15)
    hosts.kill(1)
    killed = time.monotonic()
    first.wait_for("resumed at step", killed)
    assert first.wait() == 0, first.text
    found = account(output(path))
    assert sorted(found.batches) == list(range(1, STEPS + 1))
    rows = [row for step, batch in found.batches.items() if step <= STEPS // 2 for row in batch]
    assert len(rows) == len(set(rows)) == 6000


@pytest.mark.slow
def test_sigterm_on_one_of_two_hosts_that_must_both_be_there(hosts: Hosts, launch_data: Path, tmp_path: Path) -> None:
    path = slow_run(tmp_path, launch_data)
    # As in a pod: were the exit code 0, the one that was not signalled would be taken for done.
    extra = {"RECHUB_PREEMPTED_EXIT_CODE": "75"}
    agents = [hosts.run(host, hosts_command(hosts, path, "2"), extra) for host in (0, 1)]
    wait_for_step(path, 12)
    agents[1].signal(signal.SIGTERM)
    assert [agent.wait(60) for agent in agents] == [75, 75], agents[0].text + agents[1].text
    saved = saved_steps(output(path) / "checkpoints")[-1]
    assert agents[0].saw(f"preempted at step {saved}, resume with the same command") is not None


@pytest.mark.slow
def test_a_mistake_is_not_restarted(hosts: Hosts, launch_data: Path, tmp_path: Path) -> None:
    path = slow_run(tmp_path, launch_data)
    agents = [hosts.run(host, hosts_command(hosts, path, "2", "--set", "model.nonsense=1")) for host in (0, 1)]
    assert [agent.wait(60) for agent in agents] == [2, 2], agents[0].text + agents[1].text
    told = agents[0].text + agents[1].text
    assert told.count("error: ") == 1
    assert "agent of " not in told


@pytest.mark.slow
def test_sigterm_on_both_hosts(hosts: Hosts, launch_data: Path, tmp_path: Path) -> None:
    path = slow_run(tmp_path, launch_data)
    agents = [hosts.run(host, hosts_command(hosts, path, "2")) for host in (0, 1)]
    wait_for_step(path, 12)
    for agent in agents:
        agent.signal(signal.SIGTERM)
    assert [agent.wait(60) for agent in agents] == [0, 0], agents[0].text + agents[1].text
    assert "resume with the same command" in agents[0].text
    saved = saved_steps(output(path) / "checkpoints")[-1]
    assert saved == max(losses(output(path)))
    assert agents[0].saw(f"preempted at step {saved}") is not None
