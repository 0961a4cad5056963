"""Ray: the same losses as under our own launcher, workers that are killed, mistakes, jobs."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from faults.account import account, losses
from faults.hosts import ROOT, Command
from rechub_tests.ranks import RankPool
from rechub_tests.ray_runs import ENVIRONMENT, TwoNodes, main_worker, ray_command, submit_job
from rechub_tests.runs import output, run_file, train, write_data

pytest.importorskip("ray", reason="ray is not installed (the extra `ray`)")

BIG = {"hidden_units": [768, 768], "dropout_rates": 0.0, "batch_norm": False}
SECTIONS: dict[str, Any] = {
    "model": BIG,
    "checkpoint": {"every_steps": 10},
    "train": {"epochs": 1, "log_every": 1, "trace_rows": True},
}


@pytest.fixture(scope="session")
def reference(pool: RankPool, launch_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without Ray and without interruption."""
    path = run_file(tmp_path_factory.mktemp("reference"), launch_data, "DeepFM", **SECTIONS)
    pool.run(2, train, path)
    return path


def check_same(path: Path, reference: Path, tolerance: float = 1e-5) -> None:
    """Each row once, in the same batches, and the same losses."""
    found, wanted = account(output(path)), account(output(reference))
    assert found.compare(wanted) == (0, 0, 0)
    torch.testing.assert_close(losses(output(path)), losses(output(reference)), rtol=0, atol=tolerance)


@pytest.mark.slow
def test_a_killed_worker_of_two_nodes(two_nodes: TwoNodes, launch_data: Path, reference: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, launch_data, "DeepFM", **SECTIONS)
    options = ["--num-workers", "2", "--placement", "STRICT_SPREAD"]
    run = ray_command("train", str(path), *options, address=two_nodes.address)
    run.wait_for("step 20: saved")
    os.kill(main_worker(run), signal.SIGKILL)
    assert run.wait() == 0, run.text
    assert run.saw("resumed at step"), run.text
    check_same(path, reference)
    # what Ray was told: metrics, and where the checkpoint lies, whose bytes it does not copy
    (snapshot,) = (output(path) / "ray").glob("*/checkpoint_manager_snapshot.json")
    told = json.loads(snapshot.read_text())["latest_checkpoint_result"]
    assert told["metrics"]["step"] == 94
    note = snapshot.parent / told["checkpoint_dir_name"]
    assert [file.name for file in note.iterdir()] == ["checkpoint.json"]
    assert Path(json.loads((note / "checkpoint.json").read_text())["path"]) == max(
        (output(path) / "checkpoints").glob("step-*")
    )


def test_a_mistake_in_the_run_file_is_one_line(launch_data: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, launch_data, "DeepFM")
    run = ray_command("train", str(path), "--set", "train.epohcs=3")
    assert run.wait() == 2
    assert run.text == f"error: {path}: unknown key 'train.epohcs': did you mean 'epochs'?\n"


@pytest.mark.slow
def test_a_mistake_that_a_rank_finds_is_not_tried_again(two_nodes: TwoNodes, tmp_path: Path) -> None:
    write_data(tmp_path / "data", 600)
    bad = tmp_path / "data" / "train" / "part-2.parquet"
    table = pq.read_table(bad)
    items = pa.array([999] * len(table))
    pq.write_table(table.set_column(table.column_names.index("item"), "item", items), bad, row_group_size=70)
    path = run_file(tmp_path, tmp_path / "data", "DeepFM", model=BIG)
    run = ray_command("train", str(path), "--num-workers", "2", address=two_nodes.address)
    assert run.wait() == 2, run.text
    assert [line for line in run.text.splitlines() if line.startswith("error:")] == run.text.splitlines()[-1:]
    assert run.saw(r"^error: .*part-2.parquet.*'item'.*999"), run.text
    assert run.text.count("DeepFM: 8 tables") == 1, "it was tried again"


@pytest.mark.slow
def test_a_job_that_is_stopped_can_go_on(
    two_nodes: TwoNodes, launch_data: Path, reference: Path, tmp_path: Path
) -> None:
    # so many evaluations that it cannot end before it is stopped
    path = run_file(tmp_path, launch_data, "DeepFM", **SECTIONS)
    ray = [str(Path(sys.executable).parent / "ray"), "job"]
    where = ["--address", two_nodes.jobs]
    entry = ["python", "launch/ray_train.py", str(path), "--num-workers", "2", "--set", "train.eval_every=1"]
    # killed, it would leave to Ray what it had asked for, for three minutes
    time_to_end = ["--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}']
    named = ["--submission-id", tmp_path.name, "--working-dir", str(ROOT)]
    submit = [*ray, "submit", *where, *named, *time_to_end, "--", *entry]
    job = submit_job(submit, "step 20: saved")
    stop = Command([*ray, "stop", *where, tmp_path.name], ENVIRONMENT)
    assert stop.wait() == 0, stop.text
    assert stop.saw("was stopped"), stop.text
    job.wait()
    assert job.saw("preempted at step"), job.text
    run = Command([sys.executable, "-m", "rechub_dist", "train", str(path)])
    assert run.wait() == 0, run.text
    assert run.saw("resumed at step"), run.text
    check_same(path, reference, 1e-4)


@pytest.mark.slow
def test_a_node_that_is_to_go_is_no_failure(
    two_nodes: TwoNodes, launch_data: Path, reference: Path, tmp_path: Path
) -> None:
    """Ray says so some time before: all save and go on elsewhere, though no failure is allowed."""
    path = run_file(tmp_path, launch_data, "DeepFM", **SECTIONS)
    third = two_nodes.cluster.add_node(num_cpus=1, resources={"third": 1})
    two_nodes.cluster.wait_for_nodes()
    spread = ["--num-workers", "3", "--min-workers", "2", "--placement", "STRICT_SPREAD", "--max-failures", "0"]
    spread += ["--resize-seconds", "5"]  # Ray may begin with the two nodes that it has seen
    run = ray_command("train", str(path), *spread, "--set", "train.eval_every=1", address=two_nodes.address)
    run.wait_for(r"3 rank\(s\)")
    run.wait_for("step 20: saved")
    drain = ["drain-node", "--address", two_nodes.address, "--node-id", third.node_id, "--reason-message", "spot"]
    preempt = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", "120"]
    told = Command([str(Path(sys.executable).parent / "ray"), *drain, *preempt], ENVIRONMENT)
    assert told.wait() == 0, told.text
    assert run.wait() == 0, run.text
    assert run.saw("a node or worker is being stopped: resuming from step"), run.text
    assert run.saw(r"2 rank\(s\).*resumed at step"), run.text
    check_same(path, reference, 1e-4)


@pytest.mark.slow
def test_a_node_that_comes_is_taken_in(two_nodes: TwoNodes, launch_data: Path, reference: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path, launch_data, "DeepFM", **SECTIONS)
    elastic = ["--num-workers", "3", "--min-workers", "2", "--resize-seconds", "2"]
    slow = ["--set", "train.eval_every=3", "--set", "data.valid=train"]  # Ray takes ten seconds to see the node
    run = ray_command("train", str(path), *elastic, *slow, address=two_nodes.address)
    run.wait_for("step 10: saved")
    third = two_nodes.cluster.add_node(num_cpus=1)
    assert run.wait() == 0, run.text
    two_nodes.cluster.remove_node(third)
    assert run.saw(r"2 rank\(s\) on cpu"), run.text
    saved = re.search(r"preempted at step (\d+)", run.text)
    assert saved is not None, run.text
    assert run.saw(rf"3 rank\(s\) on cpu.*resumed at step {saved[1]}$"), run.text
    check_same(path, reference, 1e-4)


@pytest.mark.slow
def test_nodes_of_unlike_size(two_nodes: TwoNodes, launch_data: Path, reference: Path, tmp_path: Path) -> None:
    """Ray packs two ranks on to the larger one of three nodes."""
    larger = two_nodes.cluster.add_node(num_cpus=2)
    path = run_file(tmp_path, launch_data, "DeepFM", **SECTIONS)
    run = ray_command("train", str(path), "--num-workers", "4", address=two_nodes.address)
    assert run.wait() == 0, run.text
    two_nodes.cluster.remove_node(larger)
    assert run.saw(r"4 rank\(s\) on cpu"), run.text
    check_same(path, reference, 1e-4)


@pytest.mark.slow
def test_the_package_is_shipped(two_nodes: TwoNodes) -> None:
    code = (
        "import ray, sys; from rechub_dist.launch.ray_workers import Workers, connect; "
        f"connect({two_nodes.address!r}, Workers(1), ship=True, runtime_env=None); "
        "print(ray.get(ray.remote(lambda: __import__('sys').path).remote()))"
    )
    run = Command([sys.executable, "-c", code], ENVIRONMENT)
    assert run.wait() == 0, run.text
    (folder,) = {path for path in re.findall(r"'([^']+)'", run.text) if "/py_modules_files/" in path}
    for file in ("training/trainer.py", "launch/ray_ranks.py"):
        assert (Path(folder) / "rechub_dist" / file).read_text() == (ROOT / "rechub_dist" / file).read_text()


@pytest.mark.slow
def test_an_evaluation_is_the_same(two_nodes: TwoNodes, launch_data: Path, reference: Path) -> None:
    out, data = output(reference), str(launch_data / "test")
    evaluate = ["--evaluate", data, "--json", "--num-workers", "2"]
    run = ray_command("train", str(out / "config.yaml"), *evaluate, address=two_nodes.address)
    own = Command([sys.executable, "-m", "rechub_dist", "evaluate", str(out), "--data", data, "--json"])
    assert (run.wait(), own.wait()) == (0, 0), run.text + own.text
    found, wanted = (json.loads(re.findall(r"^\{.*\}$", c.text, re.MULTILINE)[0]) for c in (run, own))
    assert found == pytest.approx(wanted, abs=1e-6)
