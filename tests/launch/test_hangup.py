"""SIGHUP: it saves and stops a run as SIGTERM does, also where the terminal is gone; nohup keeps it from that."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults.account import losses
from faults.hosts import Command, train_command
from rechub_dist.checkpoint import saved_steps
from rechub_tests.runs import output, run_file

BIG = {"hidden_units": [768, 768], "dropout_rates": 0.0, "batch_norm": False}


def long_run(tmp_path: Path, data: Path) -> Path:
    return run_file(tmp_path, data, "DeepFM", model=BIG, train={"epochs": 9, "log_every": 1})


def wait_for_step(path: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (output(path) / "metrics.jsonl").exists() or step not in losses(output(path)):
        assert time.monotonic() < deadline, f"step {step} is not reached"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_saves_and_stops(launch_data: Path, tmp_path: Path, ranks: int) -> None:
    path = long_run(tmp_path, launch_data)
    command = [sys.executable, "-m", "rechub_dist", "train", str(path)]
    run = Command(command if ranks == 1 else train_command(path, "--nproc", "2"))
    wait_for_step(path, 5)
    run.signal(signal.SIGHUP)
    assert run.wait() == 0, run.text
    step = saved_steps(output(path) / "checkpoints")[-1]
    assert run.saw(f"preempted at step {step}, resume with"), run.text


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_outlives_its_terminal_until_it_has_saved(launch_data: Path, tmp_path: Path, ranks: int) -> None:
    path = long_run(tmp_path, launch_data)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        os.execv(sys.executable, [sys.executable, "-m", "rechub_dist", "train", str(path), "--nproc", str(ranks)])
    try:
        wait_for_step(path, 5)
        done = max(losses(output(path)))
        os.close(terminal)  # the kernel sends SIGHUP, and whatever is printed from here on is an error
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    assert os.waitstatus_to_exitcode(status) == 0
    step = saved_steps(output(path) / "checkpoints")[-1]
    assert done <= step < 9 * 94
    said = (output(path) / "logs" / "rank-0.jsonl").read_text()
    assert f"preempted at step {step}, resume with" in said


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_nohup_keeps_it_running(launch_data: Path, tmp_path: Path, ranks: int) -> None:
    path = long_run(tmp_path, launch_data)
    command = [sys.executable, "-m", "rechub_dist", "train", str(path)]
    run = Command(["nohup", *(command if ranks == 1 else train_command(path, "--nproc", "2"))])
    wait_for_step(path, 5)
    for pid in run.tree():
        os.kill(pid, signal.SIGHUP)
    wait_for_step(path, max(losses(output(path))) + 5)
    assert run.code is None, run.text
    run.signal(signal.SIGTERM)
    assert run.wait() == 0, run.text
    assert run.saw("preempted at step"), run.text


def test_signals_of_a_process_that_ignores_hangups() -> None:
    code = "from rechub_dist.distributed.process import stop_signals; print([int(n) for n in stop_signals()])"
    for before, wanted in (([], {15, 2, 1}), (["nohup"], {15, 2})):
        done = subprocess.run([*before, sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert {int(number) for number in re.findall(r"\d+", done.stdout)} == wanted
