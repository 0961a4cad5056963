"""Metrics that a run file asks for: exact on any number of ranks, and refused before anything runs."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as sk

from rechub_dist.data.run_file import load_run
from rechub_dist.distributed.runtime import runtime
from rechub_dist.errors import UserError
from rechub_dist.evaluation.evaluate import evaluate_run
from rechub_dist.metrics import grouped as metrics_by_group
from rechub_dist.metrics.grouped import GroupedAUC
from rechub_dist.metrics.metric import Scored
from rechub_tests.ranks import RankPool
from rechub_tests.runs import output, records, reported_by, run_file, train, write_data


def rows_of(count: int, groups: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows with ties, groups of one label and weights of 0."""
    rng = np.random.default_rng(seed)
    p = rng.random(count).round(2).astype(np.float32)
    return {
        "key": (rng.pareto(1, count) * 3).astype(np.int64) % groups - groups // 2,
        "p": p,
        "y": (rng.random(count) < p).astype(np.float32),
        "w": (rng.integers(0, 3, count) * rng.random(count)).astype(np.float32),
    }


def reference(rows: dict[str, np.ndarray], *, weighted: bool) -> float:
    """Group by group, by scikit-learn."""
    total = count = 0.0
    for key in np.unique(rows["key"]):
        mine = rows["key"] == key
        p, y, w = (rows[name][mine].astype(np.float64) for name in ("p", "y", "w"))
        if w @ y > 0 and w @ (1 - y) > 0:
            share = w.sum() if weighted else 1.0
            total += share * sk.roc_auc_score(y, p, sample_weight=w)
            count += share
    return total / count


def grouped(rows: dict[str, np.ndarray], kind: str, cuts: list[int], how: dict[str, Any]) -> float:
    """The metric of rows of which rank r has those up to cut r, in batches of 100."""
    with runtime("cpu", 60) as rt:
        metric = GroupedAUC("user", **how)
        edges = [0, *cuts]
        message = None
        for start in range(edges[rt.rank], edges[rt.rank + 1], 100):
            own = {name: values[start : min(start + 100, edges[rt.rank + 1])] for name, values in rows.items()}
            keys = pa.array(own["key"])
            if kind == "string":
                keys = pa.array([f"user {key}" for key in own["key"]], pa.large_string())
            try:
                metric.update(Scored(own["p"], own["y"], own["w"], {"user": keys}))
            except UserError as error:
                message = str(error)
        rt.raise_together(message)
        metric.merge(rt)
        return metric.compute()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["string", "number"])
@pytest.mark.parametrize("weighted", [True, False])
def test_grouped_auc_is_exact(pool: RankPool, ranks: int, kind: str, weighted: bool) -> None:
    rows = rows_of(3000, 400)
    cuts = np.linspace(0, 3000, ranks + 1).astype(int)[1:].tolist()
    if ranks == 4:
        cuts[1] = cuts[0]  # a rank without rows
    found = pool.run(ranks, grouped, rows, kind, cuts, {"weighted": weighted})
    assert len(set(found)) == 1
    assert abs(found[0] - reference(rows, weighted=weighted)) < 1e-12


def in_rounds(rows: dict[str, np.ndarray], kind: str, cuts: list[int]) -> float:
    """As `grouped`, a few kB at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_by_group, "_AT_ONCE", 5000)
        return grouped(rows, kind, cuts, {})


@pytest.mark.parametrize("kind", ["string", "number"])
def test_some_groups_at_a_time(pool: RankPool, kind: str) -> None:
    rows = rows_of(3000, 400)
    for value in pool.run(3, in_rounds, rows, kind, [300, 2500, 3000]):
        assert abs(value - reference(rows, weighted=True)) < 1e-12


def test_groups_that_cannot_tell(pool: RankPool) -> None:
    rows = rows_of(300, 40)
    rows["y"][:] = 1
    assert math.isnan(pool.run(2, grouped, rows, "number", [200, 300], {})[0])
    rows = rows_of(300, 40)
    rows["p"][7] = np.nan
    assert all(math.isnan(value) for value in pool.run(2, grouped, rows, "number", [200, 300], {}))
    assert math.isnan(pool.run(2, grouped, rows, "number", [0, 0], {})[0])


def test_more_rows_than_a_rank_may_hold(pool: RankPool) -> None:
    """Before they are sent, and where all that is sent comes to one rank."""
    message = r"metric grouped_auc: the rows by key 'user' take \d MB on a rank, more than max_mb: 1; raise it"
    rows = rows_of(120_000, 40)
    with pytest.raises(UserError, match=message):
        pool.run(2, grouped, rows, "number", [100_000, 120_000], {"max_mb": 1})
    rows = rows_of(80_000, 1)
    with pytest.raises(UserError, match=message):
        pool.run(2, grouped, rows, "number", [40_000, 80_000], {"max_mb": 1})


def with_sessions(root: Path, kind: str) -> Path:
    """The small data with a column that no feature reads."""
    write_data(root)
    for part in root.glob("*/*.parquet"):
        table = pq.read_table(part)
        sessions = pa.array(np.arange(len(table)) % 7 - 3)
        if kind == "string":
            sessions = pa.array([f"session {i}" for i in sessions.to_pylist()]).dictionary_encode()
        pq.write_table(table.append_column("session", sessions), part, row_group_size=70)
    return root


CHOSEN = ["default", {"name": "grouped_auc", "group": "session"}, {"name": "f1", "threshold": 0.4}, "rmse"]


def evaluated(path: Path, overrides: list[str]) -> tuple[dict[str, float], np.ndarray]:
    config = load_run(path, overrides)
    found = evaluate_run(config, f"{config.data.root}/test")[1]
    return found.metrics, next(iter(found.predictions.values()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["string", "number"])
def test_a_run_by_a_grouped_auc(pool: RankPool, tmp_path: Path, kind: str) -> None:
    """The column is read in evaluation alone, and `default` is what it was without it."""
    root = with_sessions(tmp_path / "data", kind)
    section = {"epochs": 1, "eval_every": 4, "best_metric": "grouped_auc"}
    path = run_file(tmp_path / "run", root, "DeepFM", train=section, evaluation={"metrics": CHOSEN})
    summary = pool.run(2, train, path)[0]
    values = {record["step"]: record["grouped_auc"] for record in records(path, "valid")}
    assert summary.best_step == max(values, key=values.__getitem__)
    assert list(summary.test) == list(reported_by(load_run(path)))

    metrics, predictions = pool.run(1, evaluated, path, [])[0]
    table = pa.concat_tables([pq.read_table(part) for part in sorted((root / "test").glob("*.parquet"))])
    y = table["click"].to_numpy().astype(np.float32)
    keys = np.unique(table["session"].to_pylist(), return_inverse=True)[1]
    rows = {"key": keys, "p": predictions, "y": y, "w": np.ones(len(y), np.float32)}
    assert metrics["grouped_auc"] == pytest.approx(reference(rows, weighted=True), abs=1e-12)
    assert metrics["f1"] == pytest.approx(sk.f1_score(y, predictions >= 0.4))
    assert metrics["rmse"] == pytest.approx(sk.root_mean_squared_error(y, predictions))
    default, _ = pool.run(1, evaluated, path, ["evaluation.metrics=[default]"])[0]
    assert list(default) == ["auc", "log_loss", "normalized_entropy", "calibration"]
    assert default == {name: metrics[name] for name in default}
    for ranks in (2, 3):
        assert pool.run(ranks, evaluated, path, [])[0][0] == pytest.approx(metrics, rel=1e-6)


@pytest.mark.slow
def test_the_command_asks_for_more(tmp_path: Path) -> None:
    root = with_sessions(tmp_path / "data", "number")
    path = run_file(tmp_path / "run", root, "DeepFM", train={"max_steps": 2})
    command = [sys.executable, "-m", "rechub_dist"]
    subprocess.run([*command, "train", str(path)], check=True, capture_output=True)
    more = ["--metric", "precision", "--metric", "{name: grouped_auc, group: session, weighted: false}"]
    line = [*command, "evaluate", str(output(path)), "--data", f"{root}/test", "--json", "--nproc", "2", *more]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    for name in ("auc", "calibration", "precision", "grouped_auc"):
        assert f'"{name}"' in done.stdout
    wrong = subprocess.run([*line[:-4], "--metric", "grouped_acu"], check=False, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "no metric 'grouped_acu': did you mean 'grouped_auc'?" in wrong.stderr


def test_a_ranking_and_what_it_recommends(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    chosen = ["default", "map", "coverage", {"name": "popularity", "k": 61}]
    sections = {"evaluation": {"top_k": [3, 7], "metrics": chosen, "exclude_seen": False, "sampled_items": 5}}
    path = run_file(tmp_path, data_root, "SASRec", train={"max_steps": 3}, **sections)
    summary = pool.run(2, train, path)[0]
    assert list(summary.test) == list(reported_by(load_run(path)))
    assert "sampled_map@3" in summary.test
    assert "sampled_coverage@3" not in summary.test
    test = summary.test
    assert test["map@7"] == test["mrr@7"]
    assert 3 / 61 <= test["coverage@3"] <= test["coverage@7"] <= 1
    assert test["popularity@61"] == pytest.approx(1 / 61)  # all items are shown to all
    old = run_file(tmp_path / "old", data_root, "SASRec", train={"max_steps": 3}, evaluation={"top_k": [3, 7]})
    metrics = pool.run(1, _without_metrics, path, output(path))[0]
    assert metrics == pytest.approx({name: test[name] for name in metrics}, abs=1e-6)
    assert list(metrics) == [
        name for name in test if not name.startswith(("map", "coverage", "popularity", "sampled_map"))
    ]
    assert list(reported_by(load_run(old))) == [
        f"{name}@{k}" for k in (3, 7) for name in ("hit_rate", "recall", "ndcg", "mrr")
    ]


def _without_metrics(path: Path, folder: Path) -> dict[str, float]:
    config = load_run(path, ["evaluation.metrics=[default]"])
    assert config.output_dir == folder
    return evaluate_run(config, f"{config.data.root}/test")[1].metrics


@pytest.mark.parametrize(
    ("model", "metrics", "words"),
    [
        ("DeepFM", ["acu"], "evaluation.metrics: no metric 'acu': did you mean 'auc'?"),
        ("DeepFM", ["ndcg"], "ndcg is a metric of rankings, which recall models have, and this run has none"),
        ("SASRec", ["auc"], "auc is a metric of labels of type classification, and this run has none"),
        ("DeepFM", ["grouped_auc"], "grouped_auc needs group: write {name: grouped_auc, group: ...}"),
        ("DeepFM", [{"name": "f1", "treshold": 1}], "f1: unknown key 'treshold': did you mean 'threshold'?"),
        ("DeepFM", [{"name": "f1", "threshold": 2}], "f1.threshold: input should be less than or equal to 1, got 2"),
        ("DeepFM", ["f1", {"name": "f1", "threshold": 0.9}], "two metrics are reported as 'f1'; give one another name"),
        ("DeepFM", [{"name": "grouped_auc", "group": "usr"}], "there is no column 'usr'; did you mean 'user'?"),
        ("DeepFM", [{"name": "grouped_auc", "group": "age"}], "column 'age' is float, but a metric's group needs"),
        ("SASRec", [{"name": "recall", "threshold": 0.5}], "recall: unknown key 'threshold'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_step(
    pool: RankPool, data_root: Path, tmp_path: Path, model: str, metrics: list[Any], words: str
) -> None:
    path = run_file(tmp_path, data_root, model, evaluation={"metrics": metrics})
    with pytest.raises(UserError) as error:
        pool.run(2, train, path)
    assert words in str(error.value)
    assert not output(path).exists()


def test_names_of_ones_own(data_root: Path, tmp_path: Path) -> None:
    chosen = [{"name": "precision", "threshold": t, "as": f"precision_{t}"} for t in (0.5, 0.9)]
    path = run_file(tmp_path, data_root, "MMoE", evaluation={"metrics": [*chosen, "mae"]})
    assert reported_by(load_run(path)) == {
        "click/precision_0.5": "max",
        "click/precision_0.9": "max",
        "click/mae": "min",
        "stay/mae": "min",
    }


def test_a_combination_chooses_the_best(pool: RankPool, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_data(data)
    path = run_file(tmp_path, data, "SharedBottom")
    weights = {"click/auc": 1.0, "click/log_loss": -0.5}
    summary = pool.run(1, train, path, [f"evaluation.combined={weights}", "train.epochs=3"])[0]
    found = records(path, "valid")
    for record in found:
        assert record["combined"] == pytest.approx(record["click/auc"] - 0.5 * record["click/log_loss"])
    assert summary.best_step == max(found, key=lambda record: record["combined"])["step"]
    assert next(iter(summary.valid)) == "combined"
    with pytest.raises(UserError, match=r"evaluation.combined: no metric 'click/aux': did you mean 'click/auc'\?"):
        pool.run(1, train, run_file(tmp_path / "other", data, "SharedBottom"), ["evaluation.combined={click/aux: 1}"])
