"""What two ranks tell machines while they train: metrics, signs of life, logs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rechub_tests.runs import done_steps, output, records, run_file, start, wait_for, write_data

PARTS = {"data", "embedding", "dense", "communication"}


@pytest.fixture
def training(tmp_path: Path) -> Iterator[tuple[Path, int, subprocess.Popen[str]]]:
    """A run of two ranks that goes on until it is stopped, and the port of its metrics."""
    root = tmp_path / "data"
    write_data(root)
    port = free_ports()
    monitor = {"metrics_port": port, "profile_every": 11}
    path = run_file(tmp_path, root, "DeepFM", train={"epochs": 10**6, "eval_every": 9}, monitor=monitor)
    process = start(path, 2)
    yield path, port, process
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_ports() -> int:
    """A port that is free, as is the next one."""
    while True:
        with socket.socket() as first, socket.socket() as second, suppress(OSError):
            first.bind(("", 0))
            port = int(first.getsockname()[1])
            second.bind(("", port + 1))
            return port


def scrape(port: int) -> dict[tuple[str, ...], float]:
    """Samples by name, rank and further labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, *(sample.labels[name] for name in sorted(sample.labels, key="rank".__ne__))] = (
                sample.value
            )
    return found


@pytest.mark.slow
def test_what_a_run_tells(training: tuple[Path, int, subprocess.Popen[str]]) -> None:
    path, port, process = training
    wait_for(process, lambda: done_steps(path) > 30)
    for rank in ("0", "1"):
        found = scrape(port + int(rank))
        assert found["rechub_step", rank] >= 30
        assert found["rechub_world_size", rank] == 2
        assert 0 < found["rechub_loss", rank] < 2
        assert found["rechub_samples_per_second", rank] > 0
        assert found["rechub_learning_rate", rank] == 0.01
        assert found["process_resident_memory_bytes",] > 1e8
        assert found["rechub_checkpoint_step", rank] >= 9
        assert 0 <= found["rechub_checkpoint_age_seconds", rank] < 60
        assert 0 < found["rechub_evaluation", rank, "auc", "valid"] < 1
        seconds = {part: found["rechub_step_seconds", rank, part] for part in PARTS}
        assert all(value >= 0 for value in seconds.values())
        assert min(seconds["dense"], seconds["embedding"], seconds["communication"]) > 0
    times = records(path, "time")
    assert [record["step"] for record in times[:2]] == [10, 21]
    assert set(times[0]) >= PARTS

    folder = output(path) / "health"
    wait_for(process, lambda: (folder / "rank-0").exists() and (folder / "rank-1").exists())
    probe = [sys.executable, "-m", "rechub_dist.launching.kubernetes.alive", str(folder), "--seconds", "6"]
    assert subprocess.run(probe, check=False).returncode == 0

    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert "profiler_start" not in text
    for rank in (0, 1):
        lines = [json.loads(line) for line in (output(path) / "logs" / f"rank-{rank}.jsonl").read_text().splitlines()]
        assert {(line["rank"], line["host"]) for line in lines} == {(rank, socket.gethostname())}
        told = [line["message"] for line in lines if line["logger"] == "rechub_dist"]
        assert any("step 9 valid: auc" in message for message in told)
        assert any("preempted at step" in message for message in told)


@pytest.mark.slow
def test_a_frozen_rank_shows_no_life(training: tuple[Path, int, subprocess.Popen[str]]) -> None:
    path, _, process = training
    folder = output(path) / "health"
    wait_for(process, lambda: done_steps(path) > 3 and (folder / "rank-1").exists())
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    frozen = next(
        child for child in children if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes() + b"\0"
    )
    os.kill(int(frozen), signal.SIGSTOP)
    probe = [sys.executable, "-m", "rechub_dist.launching.kubernetes.alive", str(folder), "--seconds", "6"]
    deadline = time.monotonic() + 60
    while not (found := subprocess.run(probe, capture_output=True, text=True, check=False)).returncode:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert found.stderr == "no heartbeat for 6 s from rank 1\n"


@pytest.mark.slow
def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = run_file(tmp_path, tmp_path / "data", "DeepFM", monitor={"metrics_port": port})
        process = start(path, 1)
        text, _ = process.communicate()
    assert process.returncode == 2
    assert text.count("error:") == 1
    assert f"monitor.metrics_port: rank 0 cannot listen on port {port}" in text


@pytest.mark.slow
def test_lines_for_collectors(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    path = run_file(tmp_path, tmp_path / "data", "DeepFM", train={"max_steps": 3}, monitor={"json_lines": True})
    command = [sys.executable, "-m", "rechub_dist", "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert any("finished at step 3" in line["message"] for line in lines)
    assert {(line["level"], line["rank"]) for line in lines} == {("INFO", 0)}
