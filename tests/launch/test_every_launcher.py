"""One training on two hosts by torchrun, on two Ray nodes with a worker killed, and on one host: one output folder."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from faults.account import account, losses
from faults.hosts import Command, Hosts, possible, train_command
from rechub_tests.ranks import RankPool
from rechub_tests.ray_runs import TwoNodes, main_worker, ray_command
from rechub_tests.runs import output, run_file, train

pytest.importorskip("ray", reason="ray is not installed (the extra `ray`)")

BIG = {"hidden_units": [768, 768], "dropout_rates": 0.0, "batch_norm": False}


@pytest.mark.slow
@pytest.mark.skipif(not possible(), reason="network namespaces need root and iproute2")
def test_a_run_moves_from_launcher_to_launcher(
    pool: RankPool, two_nodes: TwoNodes, launch_data: Path, tmp_path: Path
) -> None:
    sections = {
        "model": BIG,
        "train": {"epochs": 2, "log_every": 1, "trace_rows": True},
        "checkpoint": {"every_steps": 10},
    }
    undisturbed = run_file(tmp_path / "undisturbed", launch_data, "DeepFM", **sections)
    pool.run(2, train, undisturbed)
    path = run_file(tmp_path / "moved", launch_data, "DeepFM", **sections)

    hosts = Hosts(2)
    try:
        options = ("--nnodes", "2", "--nproc", "1", "--rdzv", f"{hosts.address(0)}:29400")
        first, second = (hosts.run(host, train_command(path, *options)) for host in (0, 1))
        first.wait_for("step 40: saved")
        second.signal(signal.SIGTERM)
        assert (first.wait(), second.wait()) == (0, 0), first.text
        assert first.saw("preempted at step"), first.text
    finally:
        hosts.close()

    options = ["--num-workers", "2", "--placement", "STRICT_SPREAD"]
    run = ray_command("train", str(path), *options, address=two_nodes.address)
    run.wait_for("step 80: saved")
    os.kill(main_worker(run), signal.SIGKILL)
    killed = run.wait_for(r"resumed at step (8|9)")
    run.wait_for("step 120: saved", killed)
    run.signal(signal.SIGTERM)
    assert run.wait() == 0, run.text
    assert run.saw("preempted at step"), run.text

    last = Command([sys.executable, "-m", "rechub_dist", "train", str(path)])
    assert last.wait() == 0, last.text
    assert last.saw(r"1 rank\(s\).*resumed at step"), last.text

    found, wanted = account(output(path)), account(output(undisturbed))
    assert found.compare(wanted) == (0, 0, 0)
    assert len(found.batches) == 188
    print(f"rows lost, doubled, in another batch: {found.compare(wanted)}; steps repeated: {found.repeated}")
    here, there = losses(output(path)), losses(output(undisturbed))
    print(f"last loss {here[188]:.8f}, undisturbed {there[188]:.8f}")
    torch.testing.assert_close(here, there, rtol=0, atol=1e-4)
