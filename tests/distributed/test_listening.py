"""What a run on one host needs for itself alone does not listen to others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from rechub_tests.listening import listening, others_reach
from rechub_tests.runs import done_steps, output, run_file, wait_for, write_data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that goes on until it is stopped, with metrics on any free port."""
    folder = tmp_path_factory.mktemp("endless")
    write_data(folder / "data")
    return run_file(folder, folder / "data", "DeepFM", train={"epochs": 10**6}, monitor={"metrics_port": 0})


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command, killed in the end; no environment variable says where to listen."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rechub_dist", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if not name.endswith("SOCKET_IFNAME")},
    )
    yield process
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# A rendezvous is of no use to a single host: what is given is not opened.
@pytest.mark.parametrize(
    "options",
    [
        "",
        "--nproc 2",
        "--nproc 1",
        "--nproc 2 --rdzv 0.0.0.0:29417",
    ],
)
def test_training_listens_on_loopback(options: str, endless: Path) -> None:
    before, seen = done_steps(endless), set()

    def trains() -> bool:
        seen.update(listening(process.pid))
        return done_steps(endless) > before + 2

    with started("train", str(endless), *options.split()) as process:
        wait_for(process, trains)
        assert len(seen) >= 2  # of metrics and of gloo: sockets are found
        assert others_reach(seen) == set()
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate()
        assert process.returncode == 0, text


def test_evaluation_listens_on_loopback(endless: Path) -> None:
    seen = set()
    data = str(endless.parent / "data" / "test")
    with started("evaluate", str(output(endless)), "--data", data, "--nproc", "2", "--json") as process:
        while process.poll() is None:
            seen |= listening(process.pid)
            time.sleep(0.002)
        assert process.returncode == 0, process.communicate()[0]
    assert seen
    assert others_reach(seen) == set()


def test_metrics_listen_where_they_are_asked_to(endless: Path) -> None:
    before = done_steps(endless)
    with started("train", str(endless), "--set", "monitor.metrics_address=0.0.0.0") as process:
        wait_for(process, lambda: done_steps(endless) > before + 2)
        ((address, _),) = others_reach(listening(process.pid))
    assert address == "0.0.0.0"
