"""Imports on a Ray cluster: the same data as on one machine, whatever becomes of workers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from faults.hosts import Command
from rechub_tests.import_cases import run_import
from rechub_tests.import_parts import assert_same, events, everything
from rechub_tests.ray_runs import ray_command

pytest.importorskip("ray", reason="ray is not installed (the extra `ray`)")
ENDS = "--parts", "3", "--memory", "256MB", "--driver-memory", "256MB"


def write_case(folder: Path, rows: int) -> tuple[dict[str, Any], Path]:
    """A log in several files with its tables, and a plan that says nearly all that a plan can say."""
    plan = everything(events(folder, rows))
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return plan, path


def workers(command: Command) -> list[int]:
    """The processes below the command's that run an import's task."""
    children: dict[int, list[int]] = {}
    names: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                names[int(entry.name)] = (entry / "cmdline").read_text()
            except OSError:
                continue
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, below = [], [command.pid]
    while below:
        pid = below.pop()
        below += children.get(pid, [])
        if "ray::import: " in names.get(pid, ""):
            found.append(pid)
    return found


@pytest.mark.slow
def test_the_data_are_those_of_one_machine_though_a_worker_is_killed(tmp_path: Path) -> None:
    plan, path = write_case(tmp_path, 60_000)
    run_import(plan, tmp_path / "one")
    work = tmp_path / "work"
    run = ray_command("import", str(path), "--out", str(tmp_path / "many"), "--work-dir", str(work), *ENDS)
    killed = 0
    deadline = time.monotonic() + 240
    while killed < 2 and time.monotonic() < deadline and run.code is None:
        for pid in workers(run)[:1]:
            os.kill(pid, signal.SIGKILL)
            killed += 1
            time.sleep(3)
        time.sleep(0.05)
    assert run.wait() == 0, run.text
    assert killed, run.text  # a fast import is over before the second blow
    assert_same(tmp_path / "one", tmp_path / "many")
    assert run.saw(r"60,000 rows of the log"), run.text
    assert [*work.iterdir()] == []  # what tasks exchanged is gone
    assert not [name for name in tmp_path.iterdir() if name.name.startswith(".")]


@pytest.mark.slow
def test_a_mistake_found_by_a_task_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    _, path = write_case(tmp_path, 3000)
    with (tmp_path / "log" / "part-2.csv").open("a") as file:
        file.write("u1,i1,soon,4.0,tag,a|b\n")
    before = {*tmp_path.iterdir()}
    run = ray_command("import", str(path), "--out", str(tmp_path / "many"), *ENDS)
    assert run.wait() == 2, run.text
    assert run.saw(r"^error: log: .*part-2.csv: line \d+: column 'when' is 'soon', not of type integer"), run.text
    assert {*tmp_path.iterdir()} == before
