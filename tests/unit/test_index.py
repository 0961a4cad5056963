"""Indexes of vectors: what they are measured to find, and what does not fit or is cut off."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rechub_dist.errors import UserError
from rechub_dist.inference.bundle.index import open_index
from rechub_dist.inference.bundle.search import exact
from rechub_dist.inference.index import Wanted, make_index

ROOT = Path(__file__).parents[2]


def written_vectors(folder: Path, count: int, width: int = 16) -> np.ndarray:
    """A folder as `vectors --of items` writes it."""
    vectors = np.random.default_rng(1).standard_normal((count, width)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
    folder.mkdir()
    table = pa.table({"item": [f"i{n}" for n in range(count)], "vector": column})
    pq.write_table(table, folder / "part-00000.parquet", row_group_size=1000)
    (folder / "_SUCCESS").touch()
    return vectors


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf", "pq"])
def test_an_index_says_what_it_is(tmp_path: Path, kind: str) -> None:
    vectors = written_vectors(tmp_path / "vectors", 3000)
    made = make_index(str(tmp_path / "vectors"), tmp_path / "index", Wanted(kind, aim=0.95, k=10))  # type: ignore[arg-type]
    told = json.loads((tmp_path / "index" / "index.json").read_text())
    assert (told["kind"], told["size"], told["dim"], told["metric"]) == (kind, 3000, 16, "inner_product")
    assert told["measured"]["recall"] == made.measured.recall >= (1.0 if kind == "flat" else 0.9)
    assert set(told["measured"]["milliseconds"]) == {"1", "64"} == set(told["measured"]["exact_milliseconds"])
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        "_rechub_dist.json", "index.faiss", "index.json", "items.parquet",
    ]  # fmt: skip
    assert len(vectors) == pq.read_table(tmp_path / "index" / "items.parquet").num_rows


@pytest.mark.parametrize(
    ("kind", "parameters", "message"),
    [
        ("flat", {"links": 3}, "--links: is not of an index of kind flat, but of hnsw"),
        ("ivf", {"lists": 5000}, "--lists 5000: there are 200 vectors; give fewer"),
        ("pq", {}, "--kind pq: learns its codes from 1,000 vectors, and there are 200; use flat"),
    ],
)
def test_parameters_that_do_not_fit(tmp_path: Path, kind: str, parameters: dict[str, int], message: str) -> None:
    written_vectors(tmp_path / "vectors", 200)
    with pytest.raises(UserError, match=message):
        make_index(str(tmp_path / "vectors"), tmp_path / "index", Wanted(kind, parameters))  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["vectors"]


def test_vectors_that_are_not_whole_or_not_finite(tmp_path: Path) -> None:
    written_vectors(tmp_path / "vectors", 50)
    (tmp_path / "vectors" / "_SUCCESS").unlink()
    with pytest.raises(UserError, match=r"neither a bundle nor a whole folder of vectors \(it has no _SUCCESS\)"):
        make_index(str(tmp_path / "vectors"), tmp_path / "index", Wanted("flat"))
    shutil.rmtree(tmp_path / "vectors")
    vectors = written_vectors(tmp_path / "vectors", 50)
    vectors[7, 3] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 16)
    pq.write_table(pa.table({"item": np.arange(50), "vector": column}), tmp_path / "vectors" / "part-00000.parquet")
    with pytest.raises(UserError, match="the vector of item 7 is not finite"):
        make_index(str(tmp_path / "vectors"), tmp_path / "index", Wanted("flat"))


def test_a_killed_command_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    written_vectors(tmp_path / "vectors", 200_000)
    line = [sys.executable, "-m", "rechub_dist", "index", str(tmp_path / "vectors"), "--out", str(tmp_path / "index")]
    with subprocess.Popen(line, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        while not (tmp_path / ".index.writing" / "items.parquet").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "index").exists()
    shutil.rmtree(tmp_path / "vectors")
    written_vectors(tmp_path / "vectors", 500)
    make_index(str(tmp_path / "vectors"), tmp_path / "index", Wanted("flat"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "vectors"]


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf", "pq"])
@pytest.mark.parametrize("share", [0.5, 0.02])
def test_an_index_finds_what_passes_a_filter(tmp_path: Path, kind: str, share: float) -> None:
    vectors = written_vectors(tmp_path / "vectors", 3000)
    make_index(str(tmp_path / "vectors"), tmp_path / "index", Wanted(kind, aim=0.95, k=10))  # type: ignore[arg-type]
    rng = np.random.default_rng(2)
    among, queries = np.flatnonzero(rng.random(3000) < share), rng.standard_normal((50, 16)).astype(np.float32)
    found, scores = open_index(tmp_path / "index").search(queries, 10, among)
    assert set(found.reshape(-1).tolist()) <= {*among.tolist(), -1}
    wanted, _ = exact(queries[:, None], np.ones((50, 1), np.bool_), vectors, 10, None, among)
    assert np.mean([len(set(a) & set(b)) for a, b in zip(found.tolist(), wanted.tolist(), strict=True)]) > 9
    there = found >= 0
    products = np.take_along_axis(queries @ vectors.T, np.maximum(found, 0), axis=1)
    np.testing.assert_allclose(scores[there], products[there], atol=1e-2 if kind == "pq" else 1e-4)
