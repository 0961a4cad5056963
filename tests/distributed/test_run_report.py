"""`rechub-dist report`: one page about runs."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rechub_dist.cli.main import app
from rechub_dist.errors import UserError
from rechub_dist.inference.report import differences, read_run, scores_of
from rechub_dist.inference.report_page import page
from rechub_dist.inference.run import load
from rechub_tests.ranks import RankPool
from rechub_tests.runs import output, run_file, train

VOID = {"meta", "line", "circle", "rect", "polyline", "br"}


class Checked(HTMLParser):
    """Every tag that is opened is closed, in order; nothing is fetched or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not any(name in ("src", "href") or name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag


@pytest.fixture(scope="module")
def runs(pool: RankPool, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    paths = {
        "one": run_file(folder / "one", data_root, "SharedBottom", train={"eval_every": 4}),
        "two": run_file(folder / "two", data_root, "SharedBottom", optimizer={"lr": 0.003}),
        "recall": run_file(folder / "recall", data_root, "DSSM", train={"epochs": 1}),
    }
    for path in paths.values():
        pool.run(1, train, path)
    return {name: output(path) for name, path in paths.items()}


def report(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, ["report", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_run(runs: dict[str, Path], data_root: Path) -> None:
    assert f"{runs['one'] / 'report.html'}: {runs['one']}" in report(runs["one"]).replace("\n", "")
    text = (runs["one"] / "report.html").read_text()
    Checked(text)
    found = read_run(runs["one"], scores=False)
    best = next(one for one in found.of("valid") if one["step"] == found.best_step)
    row = re.search(r"<tr><td>valid</td>(.*?)</tr>", text)
    assert row is not None
    assert f"{found.best_step:,} (best)" in row[1]
    assert f"{best['click/auc']:.4g}" in row[1]
    for title in ("training loss", "click/auc on valid", "samples per second", "click: calibration", "stay: scores"):
        assert title in text
    assert "SharedBottom in out" in text
    assert f"root: {data_root}" in text
    assert found.norms["user"].counts.sum() == 101
    report(runs["one"])  # its own page it writes again
    (runs["one"] / "report.html").write_text("somebody's")
    with pytest.raises(UserError, match=r"exists and is not a page of rechub-dist report"):
        report(runs["one"])
    (runs["one"] / "report.html").unlink()


def test_scores_are_those_of_the_run(runs: dict[str, Path], data_root: Path) -> None:
    found = read_run(runs["one"], data=str(data_root / "test"))
    assert found.scored_on == str(data_root / "test")
    metrics = load(runs["one"]).evaluate(data_root / "test")
    calibration = found.scores["click"].calibration
    assert calibration is not None
    predicted, observed, rows = calibration
    assert rows.sum() == metrics["rows"]
    assert (predicted @ rows) / (observed @ rows) == pytest.approx(metrics["click/calibration"])
    assert found.scores["click"].counts.sum() == metrics["rows"]
    assert found.scores["stay"].calibration is None


def test_several_runs_are_compared(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    report(runs["one"], runs["two"], "--out", out, "--no-scores")
    text = out.read_text()
    Checked(text)
    assert text.count('class="l1"') > 3
    assert "train.eval_every" in text.partition("<h2>Differences</h2>")[2]
    found = differences([read_run(runs[name], scores=False) for name in ("one", "two")])
    assert found == {"train.eval_every": ["4", "None"], "optimizer.lr": ["0.01", "0.003"]}


def test_a_recall_run_has_metrics_and_no_scores(runs: dict[str, Path]) -> None:
    found = read_run(runs["recall"])
    assert found.scores == {}
    assert found.notes == ("No rows are scored: DSSM ranks items, which have no probabilities to show",)
    text = page([found])
    Checked(text)
    assert "ndcg@10 on valid" in text


def test_what_is_not_there(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run's output folder: it has no config\.yaml"):
        report(tmp_path)
    with pytest.raises(UserError, match="compares at most 4"):
        report(*[runs["one"]] * 5)
    with pytest.raises(UserError, match="there is no such file or folder"):
        report(runs["one"], "--data", tmp_path / "gone", "--out", tmp_path / "page.html")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.yaml").write_text((runs["one"] / "config.yaml").read_text())
    (tmp_path / "bare" / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "epoch": 0, "split": "valid", "auc": None, "note": "<script>"}) + "\n"
    )
    found = read_run(tmp_path / "bare")
    assert len(found.notes) >= 1
    Checked(page([found]))


def test_scores_of_known_rows() -> None:
    generator = np.random.default_rng(0)
    p = generator.random(10_000)
    y = (generator.random(10_000) < p**2).astype(float)
    w = np.where(np.arange(10_000) < 5_000, 2.0, 1.0)
    found = scores_of([p, y, w], probability=True)
    assert found.counts.sum() == w.sum()
    assert found.counts[1].sum() == w @ y
    assert found.calibration is not None
    predicted, observed, rows = found.calibration
    np.testing.assert_allclose(rows, w.sum() / 20, rtol=0.002)
    np.testing.assert_allclose(observed, predicted**2, atol=0.06)
    one = scores_of([[3.0, 3.0], [1.0, 2.0], [1.0, 1.0]], probability=False)
    assert (one.counts.tolist()[0][0], one.calibration) == (2.0, None)
    assert scores_of(np.zeros((3, 0)), probability=True).calibration is None
