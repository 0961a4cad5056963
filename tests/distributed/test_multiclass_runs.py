"""Runs with a label of several classes: trained, resumed, measured, predicted, exported and served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as sk
from test_bundle_formats import check_repository
from test_losses import check, resumed_to_the_bit
from test_predict import predict
from typer.testing import CliRunner

from rechub_dist.checkpoint.trained import trained_config
from rechub_dist.cli.main import app
from rechub_dist.errors import UserError
from rechub_dist.evaluation.evaluate import evaluate_run
from rechub_dist.inference.bundle.bundle import Bundle
from rechub_dist.inference.comparison import as_array
from rechub_dist.inference.export import export_bundle
from rechub_dist.inference.predict import Prediction
from rechub_dist.inference.run import load
from rechub_dist.inference.server.shadow import difference
from rechub_tests.ranks import RankPool
from rechub_tests.representatives import slow
from rechub_tests.runs import SCHEMA, config_of, losses, output, records, run_file, train, write_data
from rechub_tests.serving import ARROW, serving

C = 17
LABELS: dict[str, Any] = {**SCHEMA["labels"], "store": {"column": "shop", "type": "multiclass", "classes": C}}  # type: ignore[dict-item]
DATASET = {**SCHEMA, "labels": LABELS, "weight": "importance"}
NO_CURVE = r"evaluation\.calibration: store is a label of several classes.*use temperature"
WEIGHTS = [1.0 + c % 3 for c in range(C)]
# Smooth activations, so that a rounding error does not turn a unit on or off.
SMOOTH: dict[str, dict[str, Any]] = {
    "SharedBottom": {"activation": "tanh"},
    "MMoE": {"expert_activation": "tanh", "tower_activation": "tanh", "task_types": None},
    "PLE": {"activation": "tanh"},
    "DCN": {"activation": "tanh", "features": ["item", "user", "age"]},  # an item says its store
    "DIN": {"activation": "sigmoid"},
}
OBJECTIVE = {"name": "pointwise", "label_losses": {
    "store": {"loss": "softmax", "loss_arguments": {"class_weights": WEIGHTS, "label_smoothing": 0.1}}
}}  # fmt: skip
WEIGHTED = {"name": "pointwise", "task_weighting": "uncertainty"}


def file_of(folder: Path, root: Path, model: str, **sections: Any) -> Path:
    """A run file; of a model of several tasks with a label of each type."""
    several = model in ("SharedBottom", "MMoE", "PLE")
    names = ["click", "store", "stay"] if several else ["store"]
    own: dict[str, Any] = {"task_types": ["classification", "multiclass", "regression"]} if several else {}
    if several and model != "PLE":
        own["num_tasks"] = 3
    data = {"dataset": DATASET, "labels": names, "batch_size": 52}
    return run_file(folder, root, model, **{"data": data, "model": {**own, **SMOOTH[model]}, **sections})


@pytest.mark.parametrize(
    ("model", "sharding", "objective"),
    [
        ("SharedBottom", "row_wise", OBJECTIVE),
        slow("DCN", "table_wise", {"name": "pointwise", "loss": "softmax"}),
        ("DIN", "row_wise", OBJECTIVE),
        slow("MMoE", "table_wise", WEIGHTED),
        slow("PLE", "row_wise", OBJECTIVE),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ranks", [slow(1), slow(2), 3])
def test_equals_plain_torch(
    pool: RankPool,
    data_root: Path,
    tmp_path: Path,
    model: str,
    sharding: str,
    objective: dict[str, Any],
    ranks: int,
) -> None:
    path = file_of(tmp_path, data_root, model, embedding={"sharding": sharding}, objective=objective)
    check(pool, path, ranks)
    found = losses(path)
    assert np.mean(found[-5:]) < np.mean(found[:5])  # it does learn


@pytest.mark.parametrize("objective", [OBJECTIVE, slow({"name": "pointwise", "task_weighting": "gradnorm"})])
def test_resumed_to_the_bit(pool: RankPool, data_root: Path, tmp_path: Path, objective: dict[str, Any]) -> None:
    whole, halved = (
        file_of(tmp_path / part, data_root, "SharedBottom", objective=objective) for part in ("whole", "halved")
    )
    resumed_to_the_bit(pool, whole, halved)


@pytest.mark.slow
def test_another_number_of_classes_is_another_run(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = file_of(tmp_path, data_root, "DCN", train={"max_steps": 2})
    pool.run(1, train, path)
    other = {**DATASET, "labels": {**LABELS, "store": {**LABELS["store"], "classes": C + 1}}}
    path = file_of(tmp_path, data_root, "DCN", data={"dataset": other, "labels": ["store"], "batch_size": 52})
    with pytest.raises(UserError, match="classes 17 -> 18"):
        pool.run(1, train, path)


def evaluation(path: Path, data: str) -> dict[str, float]:
    """What every rank does."""
    return evaluate_run(config_of(path), data)[1].metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("data")
    write_data(found)
    return found


@pytest.fixture(scope="module")
def trained(pool: RankPool, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file of a trained SharedBottom of three labels, watched by a metric of several classes."""
    path = file_of(
        tmp_path_factory.mktemp("run"), root, "SharedBottom",
        evaluation={"metrics": ["default", "macro_auc", {"name": "accuracy", "k": 3, "as": "top3"}]},
    )  # fmt: skip
    pool.run(2, train, path, ["train.best_metric=store/macro_auc"])
    return path


@pytest.mark.slow
def test_measured_alike_on_any_number_of_ranks(pool: RankPool, root: Path, trained: Path) -> None:
    data = str(root / "test")
    alone, together = pool.run(1, evaluation, trained, data)[0], pool.run(3, evaluation, trained, data)
    assert together[0] == together[1] == together[2]
    assert together[0] == pytest.approx(alone, rel=1e-6)
    rows = pq.read_table(data)
    p = as_array(load(output(trained)).predict(rows)["predicted_store"]).astype(np.float64)
    y, w = rows["shop"].to_numpy(), rows["importance"].to_numpy()
    kept = w > 0  # scikit-learn wants probabilities that sum to 1, of rows that count
    assert alone["store/accuracy"] == pytest.approx(sk.accuracy_score(y, p.argmax(1), sample_weight=w))
    shares = p[kept] / p[kept].sum(axis=1, keepdims=True)
    loss = sk.log_loss(y[kept], shares, sample_weight=w[kept], labels=range(C))
    assert alone["store/log_loss"] == pytest.approx(loss, rel=1e-5)
    top3 = sk.top_k_accuracy_score(y, p, k=3, sample_weight=w, labels=range(C))
    assert alone["store/top3"] == pytest.approx(top3)
    aucs = [sk.roc_auc_score(y == c, p[:, c], sample_weight=w) for c in range(C) if w[y == c].sum() > 0]
    assert alone["store/macro_auc"] == pytest.approx(np.mean(aucs), rel=1e-6)
    assert {"click/auc", "stay/mse"} <= alone.keys()


@pytest.mark.slow
def test_metrics_without_a_label_of_two_classes(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = file_of(tmp_path, data_root, "DCN", train={"epochs": 6, "histograms": True})
    summaries = pool.run(3, train, path)
    assert list(summaries[0].test) == ["log_loss", "normalized_entropy", "accuracy"]
    assert summaries[0].test["normalized_entropy"] < 1
    [record] = records(path, "test")
    assert record["log_loss"] == summaries[0].test["log_loss"]


@pytest.mark.parametrize("ranks", [1, 3])
def test_predictions_are_lists(pool: RankPool, root: Path, trained: Path, tmp_path: Path, ranks: int) -> None:
    pool.run(ranks, predict, trained, Prediction(str(root / "test"), str(tmp_path / "predicted")))
    table = pq.read_table(tmp_path / "predicted").sort_by([("source_file", "ascending"), ("source_row", "ascending")])
    assert table["predicted_store"].type == pa.list_(pa.float32(), C)
    found = as_array(table["predicted_store"])
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    run = load(output(trained))
    np.testing.assert_allclose(found, as_array(run.predict(root / "test")["predicted_store"]), atol=1e-6)
    frame = run.predict(pq.read_table(root / "test").to_pandas())
    np.testing.assert_allclose(np.stack(frame["predicted_store"].to_list()), found, atol=1e-6)


@pytest.fixture(scope="module")
def bundle(trained: Path) -> Path:
    """A bundle in every form, which was compared with the run's own scores."""
    out = trained.parent / "bundle"
    result = CliRunner().invoke(
        app, ["export", str(output(trained)), "--out", str(out), "--format", "onnx,torch,whole,triton"]
    )
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.slow
def test_a_bundle_says_what_predict_says(root: Path, trained: Path, bundle: Path) -> None:
    rows = pq.read_table(root / "test")
    wanted = load(output(trained)).predict(rows)
    onnx, torch_ = (Bundle(bundle, engine=engine) for engine in ("onnx", "torch"))  # type: ignore[arg-type]
    assert set(onnx.manifest.checked) == {"rows", "predicted_click", "predicted_store", "predicted_stay"}
    assert onnx.manifest.checked["rows"] == 90
    assert "store/macro_auc" in onnx.manifest.compared
    for one in (onnx, torch_):
        found = one.score(rows)
        assert found.schema.field("predicted_store").type == pa.list_(pa.float32(), C)
        for name in wanted.column_names:
            np.testing.assert_allclose(as_array(found[name]), as_array(wanted[name]), rtol=0, atol=1e-5)
        assert as_array(one.score(rows.slice(0, 0))["predicted_store"]).shape == (0, C)
    record = onnx.manifest.whole["score"]
    session = onnxruntime.InferenceSession(str(bundle / record.file))
    whole = dict(zip(record.outputs, session.run(None, onnx.whole_inputs(rows)), strict=True))
    np.testing.assert_allclose(whole["predicted_store"], as_array(wanted["predicted_store"]), rtol=0, atol=1e-5)
    [repository] = (bundle / "model_repository").iterdir()
    check_repository(repository)
    user = {name: rows[name].slice(0, 1) for name in onnx.columns if name != "tags"}
    candidates = onnx.score_candidates(pa.table(user), rows.select(["tags"]))
    assert as_array(candidates["predicted_store"]).shape == (rows.num_rows, C)
    assert "store: {type: multiclass, column: shop, classes: 17}" in (bundle / "dataset.yaml").read_text()


@pytest.mark.slow
def test_answers_of_a_server_are_lists(root: Path, bundle: Path, tmp_path: Path) -> None:
    found = Bundle(bundle)
    rows = pq.read_table(root / "test").select(list(found.columns)).slice(0, 5)
    wanted = found.score(rows)
    with serving(tmp_path / "log", str(bundle)) as server, server.client() as client:
        answer = client.post("/score", json={"rows": rows.to_pylist()})
        assert answer.status_code == 200, answer.text
        np.testing.assert_allclose(
            answer.json()["columns"]["predicted_store"], as_array(wanted["predicted_store"]), 1e-5
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
        answer = client.post("/score", content=sink.getvalue().to_pybytes(), headers={"Content-Type": ARROW})
        assert answer.status_code == 200, answer.text
        assert pa.ipc.open_stream(answer.content).read_all().schema.field("predicted_store").type.list_size == C


def test_a_shadow_is_compared_class_by_class() -> None:
    def table(first: float) -> pa.Table:
        lists = pa.FixedSizeListArray.from_arrays(pa.array([first, 0.5, 0.2, 0.3], pa.float32()), 2)
        return pa.table({"predicted_store": lists, "predicted_click": pa.array([0.5, 0.5], pa.float32())})

    assert difference(table(0.5), table(0.25)) == pytest.approx(0.25)
    assert difference(table(0.5), table(0.5)) == 0


def test_a_curve_is_refused_before_the_first_step(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    path = file_of(tmp_path, data_root, "SharedBottom", evaluation={"calibration": "isotonic"})
    with pytest.raises(UserError, match=NO_CURVE):
        pool.run(2, train, path)
    assert not list((tmp_path / "out").glob("checkpoints/step-*"))


def test_a_temperature_is_the_same_everywhere(pool: RankPool, root: Path, tmp_path: Path) -> None:
    """Fitted where it is evaluated, on any number of ranks, predicted and exported."""
    path = file_of(tmp_path, root, "DCN")
    pool.run(1, train, path, ["train.epochs=1", "optimizer.lr=0.02", "embedding.optimizer.lr=0.2"])
    out, settings = str(output(path)), ["evaluation.calibration=temperature"]
    plain, calibrated = (load(out, settings=given).predict(root / "valid") for given in ([], settings))
    p, q = (as_array(table["predicted_store"]).astype(np.float64) for table in (plain, calibrated))
    assert np.abs(p - q).max() > 1e-3
    np.testing.assert_allclose(q.sum(axis=1), 1, atol=1e-6)
    assert (np.diff(np.take_along_axis(q, p.argsort(axis=1), axis=1), axis=1) >= 0).all()
    rows = pq.read_table(root / "valid")
    label, weights = rows["shop"].to_numpy(), rows["importance"].to_numpy().astype(np.float64)

    def loss(scale: float) -> float:
        powers = p**scale
        return float(weights @ -np.log(powers[np.arange(len(label)), label] / powers.sum(axis=1)))

    best = min(np.geomspace(0.05, 50, 2001), key=loss)
    wanted = p**best / (p**best).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(q, wanted, atol=5e-3)
    one, two = (pool.run(ranks, measured, out, str(root / "test"), settings)[-1] for ranks in (1, 2))
    assert two == pytest.approx(one, abs=1e-6)
    assert one["log_loss"] != pytest.approx(measured(out, str(root / "test"), [])["log_loss"], abs=1e-4)
    export_bundle(out, tmp_path / "bundle", overrides=settings)
    found = as_array(Bundle(tmp_path / "bundle").score(rows)["predicted_store"])
    np.testing.assert_allclose(found, q, atol=1e-5)
    with pytest.raises(UserError, match=NO_CURVE):
        export_bundle(out, tmp_path / "none", overrides=["evaluation.calibration=isotonic"])
    assert not (tmp_path / "none").exists()


def measured(out: str, data: str, settings: list[str]) -> dict[str, float]:
    return evaluate_run(trained_config(out, settings), data)[1].metrics


def test_a_value_that_is_no_class_ends_the_run_with_its_file(pool: RankPool, data_root: Path, tmp_path: Path) -> None:
    dataset = {**DATASET, "labels": {**LABELS, "store": {**LABELS["store"], "classes": 9}}}
    path = file_of(tmp_path, data_root, "DCN", data={"dataset": dataset, "labels": ["store"], "batch_size": 52})
    message = r"part-0.parquet .*column 'shop': label 16 in .* a label of 9 classes must be an integer from 0 to 8"
    with pytest.raises(UserError, match=message):
        pool.run(2, train, path)
