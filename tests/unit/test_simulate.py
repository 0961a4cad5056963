"""`rechub-dist simulate`: a model of a step on many GPUs. Its bytes: tests/distributed/test_simulated_bytes.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rechub_dist.assembly.simulate import Hardware, Step, simulate
from rechub_dist.cli.main import app
from rechub_dist.config import RunConfig, changed
from rechub_dist.data.run_file import load_run
from rechub_dist.embedding.planning import Cluster
from rechub_dist.errors import UserError

TABLES = ", ".join(f"s{i}: {{kind: sparse, rows: 100000}}" for i in range(4))
RUN = f"""
output_dir: out
data:
  root: nowhere
  batch_size: 8192
  dataset: {{features: {{{TABLES}, d: {{kind: dense}}}}, labels: {{click: {{}}}}}}
model: {{name: DeepFM, features: [s0, s1, s2, s3, d], hidden_units: [256, 128], dropout_rates: 0.0, embedding_dim: 32}}
"""


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    (tmp_path / "run.yaml").write_text(RUN)
    return load_run(tmp_path / "run.yaml")


def steps(run: RunConfig, *ranks: int, per_rank: bool = False, **rates: float) -> list[Step]:
    clusters = [Cluster(count, min(count, 8), "cuda", 1 << 34, host_memory=1 << 34) for count in ranks]
    return simulate(run, clusters, Hardware(**rates), per_rank=per_rank)


def test_one_rank_exchanges_nothing(run: RunConfig) -> None:
    [one] = steps(run, 1, fixed=0.0)
    assert (one.rows, one.ids, one.vectors, one.gradients, one.fixed) == (8192, 0, 0, 0, 0)
    # DeepFM's products: 129 x 256, 256 x 128 and 128 x 1, two operations each, thrice: forward, and two backward.
    products = 129 * 256 + 256 * 128 + 128
    assert one.dense == pytest.approx(8192 * 2 * 3 * products / 25e9, rel=0.3)  # but not the gradient of the input
    assert one.lookup == pytest.approx(8192 * 4 * 36 * 4 * 4 / 1500e6, rel=0.1)  # 32 wide, and linear weights of 4
    assert one.samples_per_second == pytest.approx(8192 / one.total * 1000)


def test_a_batch_is_divided_or_each_ranks(run: RunConfig) -> None:
    assert [step.rows for step in steps(run, 1, 8, 64)] == [8192, 1024, 128]
    assert [step.rows for step in steps(run, 1, 8, per_rank=True)] == [8192, 8192]
    one, eight = steps(run, 1, 8, per_rank=True)
    assert eight.dense == one.dense


def test_each_rate_moves_its_part(run: RunConfig) -> None:
    slow, fast = (steps(run, 16, per_rank=True, network=rate, latency=0.0)[0] for rate in (1.0, 2.0))
    assert fast.vectors == pytest.approx(slow.vectors / 2)
    assert (fast.dense, fast.lookup) == (slow.dense, slow.lookup)
    slow, fast = (steps(run, 8, tflops=rate)[0] for rate in (1.0, 2.0))
    assert fast.dense == pytest.approx(slow.dense / 2)
    slow, fast = (steps(run, 8, memory=rate)[0] for rate in (1.0, 2.0))
    assert fast.lookup == pytest.approx(slow.lookup / 2)
    none, some = (steps(run, 1024, latency=rate)[0] for rate in (0.0, 50.0))
    assert some.vectors > none.vectors


def test_what_is_replicated_is_reduced(run: RunConfig) -> None:
    placed = ("table_wise", "replicated")
    sharded, replicated = (steps(changed(run, {"embedding.sharding": one}, "--set"), 16)[0] for one in placed)
    assert replicated.vectors == 0
    assert replicated.gradients > 3 * sharded.gradients


def test_hidden_exchanges_are_left_out(run: RunConfig) -> None:
    hidden, seen = (steps(run, 16, fixed=fixed, latency=500.0)[0] for fixed in (100.0, 0.0))
    assert hidden.ids == 0
    assert seen.total < hidden.total
    [apart] = steps(run, 16, fixed=100.0, latency=500.0, overlap=False)
    assert apart.ids > 0
    assert apart.gradients > hidden.gradients
    assert (apart.dense, apart.lookup, apart.vectors) == (hidden.dense, hidden.lookup, hidden.vectors)


def test_the_command(run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "run.yaml")
    app(["simulate", file, "--ranks", "8,64", "--network", "1"], standalone_mode=False)
    told = capsys.readouterr().out
    assert "MODELLED, never measured" in told
    assert "what bends the curve: vectors" in told
    assert "1 GB/s between hosts" in told
    app(["simulate", file, "--ranks", "64,8", "--json", "--per-rank"], standalone_mode=False)
    tree = json.loads(capsys.readouterr().out)
    assert tree["modelled"] is True
    assert [step["ranks"] for step in tree["steps"]] == [8, 64]
    assert steps(run, 8, per_rank=True)[0].total == pytest.approx(tree["steps"][0]["total"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ranks", "8,x"], "--ranks 8,x: write numbers of GPUs such as 8,64,512"),
        (["--ranks", "0"], "--ranks 0: write numbers"),
        (["--ranks", "12"], "--ranks 12: is no multiple of the 8 GPUs of a host"),
        (["--ranks", "1", "--memory", "1MB"], "do not fit"),
    ],
)
@pytest.mark.usefixtures("run")
def test_mistakes(tmp_path: Path, options: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        app(["simulate", str(tmp_path / "run.yaml"), *options], standalone_mode=False)
