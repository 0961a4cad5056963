"""The liveness probe beside a process that is a rank."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

RANK = "987654"  # no other process here has it


@pytest.fixture
def rank() -> Iterator[None]:
    """A process that is rank 987654, and is older than the clock's resolution."""
    environment = {**os.environ, "RANK": RANK, "TORCHELASTIC_RUN_ID": "test"}
    process = subprocess.Popen(["sleep", "60"], env=environment)
    time.sleep(1.5)
    yield
    process.kill()
    process.wait()


def probe(folder: Path, seconds: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "rechub_dist.launching.kubernetes.alive", str(folder), "--seconds", seconds]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("rank")
def test_a_rank_that_takes_no_step_any_more(tmp_path: Path) -> None:
    assert probe(tmp_path, "0.1").returncode == 0  # no step yet: it is starting
    file = tmp_path / f"rank-{RANK}"
    file.touch()
    os.utime(file, (1, 1))
    assert probe(tmp_path, "0.1").returncode == 0  # a step of the run before: it is starting again
    file.touch()
    time.sleep(0.2)
    done = probe(tmp_path, "0.1")
    assert (done.returncode, done.stderr) == (1, f"no heartbeat for 0.1 s from rank {RANK}\n")
    assert probe(tmp_path, "600").returncode == 0


def test_ranks_of_other_pods_do_not_count(tmp_path: Path) -> None:
    (tmp_path / f"rank-{RANK}").touch()
    time.sleep(0.2)
    assert probe(tmp_path, "0.1").returncode == 0
