"""Batch prediction over ranks, held against the model computed row by row with plain tables."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from rechub_dist.assembly.parts import Parts
from rechub_dist.batch import Batch
from rechub_dist.cli.main import app
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.parquet.outputs import claim
from rechub_dist.data.reader import ParquetReader
from rechub_dist.embedded import Embedded, Jagged
from rechub_dist.embedding.local import LocalTables
from rechub_dist.errors import UserError
from rechub_dist.inference.predict import Prediction, predict_run
from rechub_dist.models import RecallModel
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import slow
from rechub_tests.runs import config_of, labels, last_weights, output, run_file, train, write_data

ITEMS, ROWS = 61, 70


def predict(path: Path, wanted: Prediction) -> tuple[int, int]:
    """What every rank does."""
    return predict_run(config_of(path), wanted)


def trained(pool: RankPool, root: Path, folder: Path, model: str, **sections: Any) -> Path:
    path = run_file(folder, root, model, train={"epochs": 1}, **sections)
    pool.run(2, train, path, ["data.valid=null", "data.test=null"])
    return path


def without(root: Path, folder: Path, *columns: str) -> str:
    """The test split without some of its columns, in files of several row groups."""
    folder.mkdir()
    table = pq.read_table(root / "test").drop_columns(list(columns))
    for number, first in enumerate((0, 40)):
        pq.write_table(table.slice(first, 40), folder / f"{number}.parquet", row_group_size=15)
    return str(folder)


def by_hand(path: Path) -> tuple[Parts, LocalTables, Batch, Embedded]:
    """The run's parts with its last weights, and the test split's 70 rows in the stored order."""
    config = config_of(path)
    parts, tables = last_weights(path)
    manifest = Manifest.read(f"{config.data.root}/test")
    spec = parts.spec
    [batch] = ParquetReader(manifest, spec, batch_size=ROWS, shuffle=False, prefetch=0).batches(0)
    given = {
        name: Jagged(batch.feature(name).values(), batch.feature(name).lengths(), batch.id_weights.get(name))
        for name in parts.layout.features
    }
    widths = [f.dim for f in spec.dense]
    dense = dict(zip([f.name for f in spec.dense], batch.dense.split(widths, 1), strict=True))
    return parts, tables, batch, tables(given, dense)


def in_order(out: Path) -> dict[str, list[Any]]:
    """The predictions in the order of the stored rows, each of which is there once."""
    table = pq.read_table(out).sort_by([("source_file", "ascending"), ("source_row", "ascending")]).to_pydict()
    assert table["source_row"] == [*range(40), *range(ROWS - 40)]
    return table


@pytest.mark.parametrize("model", ["DeepFM", "DIN", "ESMM", "MMoE"])
@pytest.mark.parametrize("ranks", [slow(1), 3])
def test_probabilities_and_values(pool: RankPool, data_root: Path, tmp_path: Path, model: str, ranks: int) -> None:
    path = trained(pool, data_root, tmp_path, model, embedding={"sharding": "row_wise"})
    data = without(data_root, tmp_path / "data", "click", "buy", "stay")
    wanted = Prediction(data, str(tmp_path / "predicted"), keep=("user", "tags"))
    assert pool.run(ranks, predict, path, wanted) == [(9, ROWS)] * ranks
    parts, _, _, embedded = by_hand(path)
    logits = parts.train_module.model(embedded).logits
    assert logits is not None
    expected = logits.sigmoid()
    if model == "ESMM":
        expected[:, 1] *= expected[:, 0]
    found = in_order(tmp_path / "predicted")
    for t, name in enumerate(labels(model) or []):
        values = logits[:, t] if name == "stay" else expected[:, t]
        torch.testing.assert_close(torch.tensor(found[f"predicted_{name}"]), values, atol=1e-6, rtol=1e-5)
    stored = pq.read_table(data).to_pydict()
    assert (found["user"], found["tags"]) == (stored["user"], stored["tags"])
    assert set(np.unique(found["source_file"])) == {f"{data}/0.parquet", f"{data}/1.parquet"}
    assert (tmp_path / "predicted" / "_SUCCESS").exists()


@pytest.mark.parametrize(("model", "ranks", "exclude"), [("DSSM", 3, True), ("MIND", 2, False), ("SASRec", 1, True)])
def test_the_best_items(pool: RankPool, tmp_path: Path, model: str, ranks: int, exclude: bool) -> None:
    root = tmp_path / "root"
    write_data(root)
    objective = {"exclude_seen": exclude}
    path = trained(pool, root, tmp_path, model, objective=objective)
    data = without(root, tmp_path / "data", "item", "shop", "click")
    wanted = Prediction(data, str(tmp_path / "predicted"), top_k=5)
    assert pool.run(ranks, predict, path, wanted)[0][1] == ROWS
    parts, tables, batch, embedded = by_hand(path)
    network = parts.train_module.model
    assert isinstance(network, RecallModel)
    none = Jagged(torch.empty(0, dtype=torch.int64), torch.zeros(ITEMS, dtype=torch.int32), torch.empty(0))
    every = dict.fromkeys(parts.layout.features, none) | {"item": Jagged.single(torch.arange(ITEMS))}
    zeros = {f.name: torch.zeros(ITEMS, f.dim) for f in parts.spec.dense}
    vectors = network.item(tables(every, zeros))
    user, mask = network.user(embedded)
    history = batch.feature("history").to_dense()
    found = in_order(tmp_path / "predicted")
    for row in range(ROWS):
        scores = (user[row][mask[row]] @ vectors.T).amax(dim=0) if mask[row].any() else torch.empty(0)
        wrong = set(history[row].tolist()) if exclude else set()
        others = [(float(score), item) for item, score in enumerate(scores) if item not in wrong]
        best = sorted((score for score, _ in others), reverse=True)[:5]
        np.testing.assert_allclose(found["predicted_scores"][row], best, rtol=1e-4, atol=1e-6)
        items = found["predicted_items"][row]  # in any order where scores are equal
        assert len(set(items)) == len(items)
        score_of = {item: score for score, item in others}
        np.testing.assert_allclose([score_of[item] for item in items], best, rtol=1e-4, atol=1e-6)


def test_items_in_the_words_of_their_vocabulary(pool: RankPool, tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_data(root)
    words = pa.table({"value": [f"item {i}" for i in range(ITEMS)], "id": np.arange(ITEMS)})
    pq.write_table(words, tmp_path / "words.parquet")
    for part in root.glob("*/*.parquet"):
        table = pq.read_table(part)
        place = table.schema.get_field_index("item")
        named = pa.array([f"item {i}" for i in table["item"].to_pylist()])
        pq.write_table(table.set_column(place, "item", named), part, row_group_size=70)
    features = {"item": {"kind": "sparse", "table": "item", "vocabulary": str(tmp_path / "words.parquet")}}
    path = trained(pool, root, tmp_path, "DSSM", data={"root": str(root), "batch_size": 64, "features": features})
    pool.run(2, predict, path, Prediction(f"{root}/test", str(tmp_path / "predicted"), top_k=3))
    found = pq.read_table(tmp_path / "predicted")["predicted_items"].to_pylist()
    assert {len(items) for items in found} == {3}
    assert all(item.startswith("item ") for items in found for item in items)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": ("usr",)}, "--keep usr: .*no such column; did you mean 'user'"),
        ({"keep": ("predicted_click",)}, "no such column"),
        ({"data": "/nowhere"}, "/nowhere"),
    ],
)
def test_mistakes(pool: RankPool, data_root: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = trained(pool, data_root, tmp_path, "DeepFM")
    wanted = {"data": f"{data_root}/test", "out": str(tmp_path / "predicted"), **change}
    with pytest.raises(UserError, match=message):
        pool.run(2, predict, path, Prediction(**wanted))
    assert not list(tmp_path.glob("predicted/*"))


def test_the_command(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = trained(pool, data_root, tmp_path, "DeepFM")
    command = ["predict", str(output(path)), "--data", f"{data_root}/test", "--out", str(tmp_path / "predicted")]
    done = CliRunner().invoke(app, [*command, "--keep", "click"])
    assert done.exit_code == 0, done.output
    assert pq.read_table(tmp_path / "predicted").column_names == [
        "source_file",
        "source_row",
        "click",
        "predicted_click",
    ]
    shutil.rmtree(tmp_path / "predicted")
    # as eight ranks leave it that were cut off
    claim(str(tmp_path / "predicted"), "predictions", [f"part-{rank:05d}.parquet" for rank in range(8)])
    (tmp_path / "predicted" / "part-00007.parquet").write_bytes(b"half")
    assert CliRunner().invoke(app, command).exit_code == 0
    assert pq.read_table(tmp_path / "predicted").num_rows == ROWS
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, UserError)
    assert "already holds _SUCCESS" in str(again.exception)
