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
from rechub_dist.inference.export import export_bundle
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


@pytest.mark.parametrize("model", each_model())
def test_a_bundle_scores_what_the_run_scores(pool: RankPool, data: Path, tmp_path: Path, model: str) -> None:
    folder = exported(pool, data, tmp_path, model)
    run, bundle = load(tmp_path / "out"), Bundle(folder, check=True)
    for split in ("train", "test"):  # with rows of no history, and of the longest
        found = check_bundle(run, bundle, str(data / split))
        rows = found.pop("rows")
        assert rows == {"train": 530, "test": 70}[split]
        assert found
        assert max(found.values()) < 1e-5, found
    if family(catalogue()[model]) == "recall":
        users = pq.read_table(data / "test")
        wanted, got = (one(users, 7).to_pylist() for one in (run.top_k, bundle.retrieve))
        for one, other in zip(wanted, got, strict=True):
            np.testing.assert_allclose(one["predicted_scores"], other["predicted_scores"], rtol=1e-4, atol=1e-5)
            if len(set(np.round(one["predicted_scores"], 4))) == 7:  # no ties
                assert one["predicted_items"] == other["predicted_items"]


def test_tables_take_less_room_at_a_known_cost(pool: RankPool, data: Path, tmp_path: Path) -> None:
    pool.run(1, train, run_file(tmp_path, data, "DeepFM"))
    run = load(tmp_path / "out")
    for tables, most in (("fp16", 1e-3), ("int8", 2e-2)):
        export_bundle(str(tmp_path / "out"), tmp_path / tables, tables=tables)  # type: ignore[arg-type]
        found = check_bundle(run, Bundle(tmp_path / tables), str(data / "test"))
        assert 0 < found["predicted_click"] < most


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
