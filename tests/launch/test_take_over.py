"""Two commands on one folder: one is refused, or takes over from one that is silent, dead, or to end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from faults.account import losses
from faults.hosts import Command
from rechub_dist.checkpoint import saved_steps
from rechub_dist.distributed.process import LAUNCH, MISTAKE
from rechub_tests.runs import output, run_file

BIG = {"hidden_units": [768, 768], "dropout_rates": 0.0, "batch_norm": False}
pytestmark = pytest.mark.slow


def long_run(tmp_path: Path, data: Path, seconds: float) -> Path:
    sections = {"checkpoint": {"every_steps": 10}, "distributed": {"lease_seconds": seconds}}
    return run_file(tmp_path, data, "DeepFM", model=BIG, train={"epochs": 20, "log_every": 1}, **sections)


def command(path: Path, *more: str, ranks: int = 2) -> Command:
    base = [sys.executable, "-m", "rechub_dist", "train", str(path), *more]
    return Command([*base, "--nproc", str(ranks)] if ranks > 1 else base)


def wait_for_step(path: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (output(path) / "metrics.jsonl").exists() or max(losses(output(path)), default=0) < step:
        assert time.monotonic() < deadline, f"step {step} is not reached"
        time.sleep(0.02)


def end(run: Command) -> None:
    run.signal(signal.SIGTERM)
    assert run.wait() == 0, run.text


def test_a_second_command_is_refused(launch_data: Path, tmp_path: Path) -> None:
    path = long_run(tmp_path, launch_data, 12)
    run = command(path)
    wait_for_step(path, 12)
    before = (output(path) / "config.yaml").read_bytes()
    second = command(path, "--set", "train.log_every=3")
    assert second.wait() == MISTAKE, second.text
    (line,) = second.text.splitlines()
    assert f"output_dir: {output(path)} is in use by process {run.workers()[0]} on " in line
    assert "expires after 12 s" in line
    assert "--take-over" in line
    assert (output(path) / "config.yaml").read_bytes() == before
    end(run)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_slept_finds_its_folder_taken(launch_data: Path, tmp_path: Path, ranks: int) -> None:
    path = long_run(tmp_path, launch_data, 3)
    run = command(path, ranks=ranks)
    run.wait_for("step 10: saved")
    wait_for_step(path, 12)
    tree = run.tree()
    for pid in tree:
        os.kill(pid, signal.SIGSTOP)
    again = command(path, ranks=3 - ranks)
    again.wait_for("is held by process .* without a heartbeat now; this run begins at .* --take-over does not wait")
    at = again.wait_for("resumed at step")
    for pid in reversed(tree):
        os.kill(pid, signal.SIGCONT)
    assert run.wait() == MISTAKE, run.text
    assert run.saw("error: output_dir: .* was taken over by process .* ends without saving"), run.text
    assert run.saw("saved", at) is None, run.text
    assert again.code is None, again.text
    end(again)
    assert again.saw(rf"preempted at step {saved_steps(output(path) / 'checkpoints')[-1]}"), again.text


def test_after_sigkill_and_for_the_same_launch_nothing_is_waited_for(launch_data: Path, tmp_path: Path) -> None:
    path = long_run(tmp_path, launch_data, 10**6)  # a run that waited would not end
    run = command(path)
    wait_for_step(path, 12)
    run.kill()
    run.wait()
    again = command(path, "--max-restarts", "1")
    again.wait_for("resumed at step")
    os.kill(again.workers()[0], signal.SIGKILL)  # the agent's next attempt has another rank 0
    at = again.wait_for("restart 1 of 1")
    again.wait_for("resumed at step", at)
    again.kill()
    again.wait()
    for place in (output(path), output(path) / "checkpoints"):  # as if it had been on another host
        (lease,) = (place / ".lease").iterdir()
        lease.write_text(json.dumps(json.loads(lease.read_text()) | {"boot": "another", "launch": "job 7"}))
    third = Command([sys.executable, "-m", "rechub_dist", "train", str(path)], {LAUNCH: "job 7"})
    third.wait_for("resumed at step")
    end(third)


def test_take_over_ends_a_run_that_lives(launch_data: Path, tmp_path: Path) -> None:
    path = long_run(tmp_path, launch_data, 600)  # its next look at its lease would be after 50 s, but for its saves
    run = command(path)
    wait_for_step(path, 12)
    again = command(path, "--take-over")
    assert run.wait() == MISTAKE, run.text
    assert run.saw("error: .* was taken over by process"), run.text
    again.wait_for("resumed at step")
    end(again)
