"""Bundles: every model scores the same rows as the run that it was exported from, without what trained it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from rechub_dist.errors import UserError
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.check import check_bundle
from rechub_dist.inference.comparison import Comparison, refuse
from rechub_dist.inference.export import export_bundle
from rechub_dist.inference.from_checkpoint import open_run
from rechub_dist.inference.run import load
from rechub_dist.models import catalogue, family
from rechub_dist.reporting.records import read_records
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import each_model
from rechub_tests.runs import run_file, train, write_data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    return root


def exported(pool: RankPool, data: Path, folder: Path, model: str, tables: str = "fp32") -> Path:
    """A bundle of a run of two epochs."""
    pool.run(1, train, run_file(folder, data, model))
    export_bundle(str(folder / "out"), folder / "bundle", tables=tables)  # type: ignore[arg-type]
    return folder / "bundle"


@pytest.mark.parametrize("model", each_model(fast=("DIN", "DSSM")))
def test_a_bundle_scores_what_the_run_scores(pool: RankPool, data: Path, tmp_path: Path, model: str) -> None:
    folder = exported(pool, data, tmp_path, model)
    run, bundle = load(tmp_path / "out"), Bundle(folder, check=True)
    for split in ("train", "test"):  # with rows of no history, and of the longest
        found = check_bundle(run, bundle, str(data / split))
        assert found.rows == {"train": 530, "test": 70}[split]
        assert found.differences
        assert max(found.differences.values()) < 1e-5, found
    assert check_bundle(open_run(str(tmp_path / "out")), bundle, str(data / "test")) == found
    for name, (own, other) in found.metrics.items():
        np.testing.assert_allclose(own, other, rtol=0.01)
        if family(catalogue()[model]) != "recall":
            np.testing.assert_allclose(own, run.evaluate(data / "test")[name])
    if family(catalogue()[model]) == "recall":
        users = pq.read_table(data / "test")
        wanted, got = (one(users, 7).to_pylist() for one in (run.top_k, bundle.retrieve))
        for one, other in zip(wanted, got, strict=True):
            np.testing.assert_allclose(one["predicted_scores"], other["predicted_scores"], rtol=1e-4, atol=1e-5)
            if len(set(np.round(one["predicted_scores"], 4))) == 7:  # no ties
                assert one["predicted_items"] == other["predicted_items"]


@pytest.mark.slow
def test_tables_take_less_room_at_a_known_cost(pool: RankPool, data: Path, tmp_path: Path) -> None:
    dim = {"features": ["user", "item", "tags", "brands", "history", "age", "profile"], "embedding_dim": 15}
    pool.run(1, train, run_file(tmp_path, data, "DeepFM", model=dim))
    run, sizes = open_run(str(tmp_path / "out")), []
    for tables, most in (("fp32", 1e-6), ("fp16", 1e-3), ("int8", 2e-2), ("int4", 0.2)):
        out = tmp_path / tables

        def check(folder: Path) -> Comparison:
            return check_bundle(run, Bundle(folder), str(data / "test"))

        export_bundle(str(tmp_path / "out"), out, tables=tables, check=check)  # type: ignore[arg-type]
        bundle = Bundle(out, check=True)
        sizes.append(bundle.manifest.files["tables.safetensors"].size)
        found = check_bundle(run, bundle, str(data / "test"))
        assert bundle.manifest.checked == found.checked
        assert bundle.manifest.compared == found.metrics
        assert found.differences["predicted_click"] < most
        assert found.differences["predicted_click"] > 0
        own, other = found.metrics["auc"]
        assert found.cost == own - other
        refuse(found, tables, most, 1)  # type: ignore[arg-type]
        with pytest.raises(
            UserError, match=r"auc is 0\.\d{5} for the bundle and 0\.\d{5} for the run, and a loss of -1 is"
        ):
            refuse(found, tables, most, -1)  # type: ignore[arg-type]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0] / sizes[2], sizes[0] / sizes[3]) > (2, 3)
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    pq.write_table(pq.read_table(data / "test").drop_columns(["click", "buy", "stay"]), unlabelled / "part.parquet")
    found = check_bundle(run, bundle, str(unlabelled))
    assert (found.rows, found.metrics) == (70, {})
    with pytest.raises(UserError, match="--max-cost: the checked rows have no labels to measure it by"):
        refuse(found, "int4", max_cost=1)


def test_a_bundle_needs_nothing_that_trains(pool: RankPool, data: Path, tmp_path: Path) -> None:
    folder = exported(pool, data, tmp_path, "DIN")
    code = (
        "import sys, json, pyarrow.parquet as pq; from rechub_dist.inference.bundle.bundle import Bundle; "
        f"b = Bundle({str(folder)!r}); s = b.score(pq.read_table({str(data / 'test')!r})); "
        "print(json.dumps([s.num_rows, [n for n in ('torch', 'torchrec', 'fbgemm_gpu', 'ray') if n in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [70, []]


@pytest.mark.slow
def test_the_command(pool: RankPool, data: Path, tmp_path: Path) -> None:
    pool.run(1, train, run_file(tmp_path, data, "DCNv2"))
    line = [sys.executable, "-m", "rechub_dist", "export", str(tmp_path / "out"), "--out", str(tmp_path / "bundle")]
    refused = subprocess.run(
        [*line, "--tables", "int8", "--tolerance", "0"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "and 0 is allowed: there is no bundle; --tolerance allows more" in refused.stderr
    assert not [path for path in tmp_path.iterdir() if "bundle" in path.name]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "largest differences from the run's own on 90 rows: predicted_click " in done.stdout
    assert "auc on them: run 0." in done.stdout
    manifest = Bundle(tmp_path / "bundle").manifest
    assert manifest.checked["rows"] == 90
    records = {one["split"]: one for one in read_records(tmp_path / "out") if one["step"] == manifest.step}
    assert manifest.metrics["valid.auc"] == records["valid"]["auc"]
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert f"# DCNv2, step {manifest.step}\n" in card
    assert f"| auc | {records['valid']['auc']:.5g} |" in card
    run = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
    assert run["model"]["name"] == "DCNv2"
    assert "dataset" not in run["data"]


def test_damage_is_told(pool: RankPool, data: Path, tmp_path: Path) -> None:
    folder = exported(pool, data, tmp_path, "DeepFM")
    graph = folder / "score.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"score\.onnx is damaged: \d+ bytes instead of \d+; export the bundle again"):
        Bundle(folder)
    graph.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="it does not match its checksum"):
        Bundle(folder, check=True)
    graph.unlink()
    with pytest.raises(UserError, match=r"score\.onnx is missing"):
        Bundle(folder)
    with pytest.raises(UserError, match=r"is no bundle: it has no bundle\.json; rechub-dist export makes one"):
        Bundle(tmp_path)
