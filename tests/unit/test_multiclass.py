"""Labels of several classes: their values, loss, metrics, and which models can have them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import yaml
from sklearn import metrics as sk

from rechub_dist.assembly.parts import Parts, build
from rechub_dist.batch import Batch
from rechub_dist.config import EvaluationConfig, MetricConfig, PointwiseConfig
from rechub_dist.config.evaluation import DEFAULT
from rechub_dist.data.columns.extremes import check_extremes
from rechub_dist.data.columns.fit import check_schema
from rechub_dist.data.columns.values import read_label
from rechub_dist.data.parquet.manifest import Manifest
from rechub_dist.data.prepare.writer import schema_text
from rechub_dist.data.run_file import load_run
from rechub_dist.data.spec import BatchSpec
from rechub_dist.distributed.runtime import Runtime, runtime
from rechub_dist.embedded import Embedded, Output, Sequence
from rechub_dist.errors import UserError
from rechub_dist.features import Label
from rechub_dist.metrics.catalogue import KnownMetrics
from rechub_dist.metrics.metric import Scored
from rechub_dist.models import catalogue, family
from rechub_dist.objectives import PointwiseObjective, TaskObjective
from rechub_dist.objectives.label_losses import Softmax
from rechub_dist.schema import parse_schema
from rechub_tests.runs import SCHEMA, run_file

C = 5
RATING = Label("rating", type="multiclass", classes=C)
CLICK, STAY = Label("click"), Label("stay", type="regression")
ABLE = {"BST", "DCN", "DCNv2", "DIEN", "DIN", "EDCN", "SharedBottom", "MMoE", "PLE"}


@pytest.fixture(scope="module")
def one() -> Iterator[Runtime]:
    """One rank."""
    with runtime("cpu", 60) as rt:
        yield rt


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set's schema with a label of several classes."""
    schema = {**SCHEMA, "labels": {**SCHEMA["labels"], "rating": {"type": "multiclass", "classes": C}}}  # type: ignore[dict-item]
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(schema))
    return tmp_path


def parts_of(folder: Path, model: str, names: list[str], /, **sections: Any) -> Parts:
    """A run's parts."""
    kinds = {"click": "classification", "buy": "classification", "stay": "regression", "rating": "multiclass"}
    own = {"task_types": [kinds[name] for name in names], **({} if model == "PLE" else {"num_tasks": len(names)})}
    tasks = own if family(catalogue()[model]) == "multitask" and model != "ESMM" else {}
    sections["model"] = {**tasks, **sections.get("model", {})}
    path = run_file(folder, folder, model, data={"labels": names}, **sections)
    return build(load_run(path), device="cpu", world_size=1)


# ---- values


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "multiclass"}, "dataset.labels.rating: type: multiclass needs classes"),
        ({"type": "multiclass", "classes": 1}, "dataset.labels.rating: classes is 1, must be at least 2"),
        ({"type": "multiclass", "classes": 10**9}, "dataset.labels.rating: classes is 1000000000, must be at least 2"),
        ({"type": "multiclass", "classes": 2.5}, "dataset.labels.rating.classes: .*integer"),
        ({"type": "regression", "classes": 5}, "classes are those of type: multiclass, and .* is of type regression"),
        ({"classes": 5}, "classes are those of type: multiclass, and .* is of type classification"),
    ],
)
def test_a_mistake_in_the_schema_is_one_line(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse_schema({**SCHEMA, "labels": {"rating": spec}})
    assert "\n" not in str(error.value)


def test_a_schema_is_written_as_it_was_read() -> None:
    schema = parse_schema({**SCHEMA, "labels": {"rating": {"type": "multiclass", "classes": C}}})
    assert parse_schema(yaml.safe_load(schema_text("small", schema))).labels == schema.labels == (RATING,)


@pytest.mark.parametrize(
    ("values", "told"),
    [([0, 4, 5, 6], "5 in 2"), ([-1, 0], "-1 in 1"), ([0.0, 1.5], "1.5 in 1"), ([math.inf, 1.0], "inf in 1")],
)
def test_a_value_that_is_no_class_is_told_with_its_file(tmp_path: Path, values: list[float], told: str) -> None:
    message = rf"column 'rating': label {told} row\(s\); a label of 5 classes must be an integer from 0 to 4"
    with pytest.raises(UserError, match=rf"a.parquet: {message}"):
        read_label(pa.array(values), RATING, "a.parquet")
    pq.write_table(pa.table({"rating": values}), tmp_path / "a.parquet", row_group_size=1)
    with pytest.raises(UserError, match=r"a.parquet \(by its statistics, each value once\): column 'rating': label"):
        check_extremes(Manifest.read(str(tmp_path)).files, BatchSpec(labels=(RATING,)))


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint64(), pa.float32(), pa.decimal128(5, 1)])
def test_classes_of_any_numeric_type(kind: pa.DataType) -> None:
    assert read_label(pa.array([0, 4, 2], kind), RATING, "a").tolist() == [0, 4, 2]
    with pytest.raises(UserError, match=r"1 label\(s\) are missing"):
        read_label(pa.array([0, None], kind), RATING, "a")


def test_strings_are_refused_with_the_fix() -> None:
    message = "label 'rating' needs an integer from 0 to 4; write the number of each value's class into the files"
    with pytest.raises(UserError, match=f"a: column 'rating' is string, but {message}"):
        check_schema(pa.schema({"rating": pa.string()}), BatchSpec(labels=(RATING,)), "a")


# ---- loss and predictions


def test_softmax_is_the_formula() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(7, C, dtype=torch.float64), torch.tensor([0.0, 1, 2, 3, 4, 4, 0])
    log_p, y = logits.log_softmax(dim=1), labels.long()
    assert torch.equal(Softmax()(logits, labels), F.cross_entropy(logits, y, reduction="none"))
    weights, e = [2.0, 1.0, 0.5, 1.0, 3.0], 0.1
    w = torch.tensor(weights, dtype=torch.float64)
    own = -w[y] * log_p.gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(Softmax(class_weights=weights)(logits, labels), own)
    smoothed = (1 - e) * own - e / C * (w * log_p).sum(dim=1)
    torch.testing.assert_close(Softmax(class_weights=weights, label_smoothing=e)(logits, labels), smoothed)
    assert Softmax()(logits[:0], labels[:0]).shape == (0,)
    extreme = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = Softmax()(extreme, torch.tensor([1.0]))
    loss.backward()
    assert loss.isfinite().all()
    assert extreme.grad is not None
    assert extreme.grad.isfinite().all()


def test_each_label_has_its_own_columns() -> None:
    torch.manual_seed(0)
    objective = PointwiseObjective(PointwiseConfig(task_weights={"rating": 0.5}), (CLICK, RATING, STAY))
    logits, labels = torch.randn(6, 1 + C + 1), torch.tensor([[1.0, 3.0, 0.2]] * 6)
    output = Output(logits=logits)
    expected = (
        F.binary_cross_entropy_with_logits(logits[:, 0], labels[:, 0], reduction="none")
        + 0.5 * F.cross_entropy(logits[:, 1:6], labels[:, 1].long(), reduction="none")
        + (logits[:, 6] - labels[:, 2]) ** 2
    )
    torch.testing.assert_close(objective.losses(output, labels), expected)
    found = objective.predictions(output)
    torch.testing.assert_close(found["rating"], logits[:, 1:6].softmax(dim=1))
    torch.testing.assert_close(found["rating"].sum(dim=1), torch.ones(6))
    assert found["rating"].dtype == torch.float32
    assert torch.equal(found["click"], logits[:, 0].sigmoid())
    assert torch.equal(found["stay"], logits[:, 6])


def test_a_group_loss_beside_it_compares_the_logits_of_the_labels_of_two_classes() -> None:
    torch.manual_seed(0)
    batch = Batch(
        dense=torch.empty(8, 0), jagged={}, labels=torch.randint(0, 2, (8, 2)).float(), rows=8,
        keys={"shop": pa.array([0, 0, 0, 0, 1, 1, 1, 1])},
    )  # fmt: skip
    logits = torch.randn(8, 1 + C)
    config = PointwiseConfig.model_validate({"group_loss": {"loss": "pairwise", "group": "shop"}})
    both = PointwiseObjective(config, (RATING, CLICK))
    alone = PointwiseObjective(config, (CLICK,))
    batch.weight_sums = torch.tensor([8.0], dtype=torch.float64)
    swapped = Batch(**{**vars(batch), "labels": batch.labels[:, [1]]})
    with_rating = both.parts(Output(logits=torch.cat([logits[:, 1:], logits[:, :1]], dim=1)), batch)
    assert torch.equal(with_rating[1:], alone.parts(Output(logits=logits[:, :1]), swapped))


def test_class_weights_lie_where_the_objective_does(folder: Path) -> None:
    own = {"loss": "softmax", "loss_arguments": {"class_weights": [1, 2, 3, 4, 5]}}
    objective = parts_of(folder, "DCN", ["rating"], objective={"name": "pointwise", **own}).objective
    assert [value.tolist() for value in objective.buffers()] == [[1, 2, 3, 4, 5]]
    assert objective.state_dict() == objective.learned() == {}


class _OwnObjective(TaskObjective):
    def losses(self, output: Output, labels: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def predictions(self, output: Output) -> dict[str, torch.Tensor]:
        assert output.logits is not None
        return {"rating": output.logits}


def test_predictions_of_an_own_objective_have_a_column_a_class() -> None:
    objective = _OwnObjective((RATING,), {})
    batch = Batch(dense=torch.empty(3, 0), jagged={}, labels=torch.zeros(3, 1), rows=3)
    assert objective.scores(Output(logits=torch.ones(3, C)), batch)["rating"].predictions.shape == (3, C)
    with pytest.raises(UserError, match=r"its prediction of rating: returns a tensor \[3, 4\] .* \[B, 5\]"):
        objective.scores(Output(logits=torch.ones(3, 4)), batch)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            {"loss": "softmax", "loss_arguments": {"class_weights": [1, 2]}},
            r"class_weights: 2 weights for label 'rating'",
        ),
        (
            {"loss": "softmax", "loss_arguments": {"class_weights": [1, 2, 3, 0, 1]}},
            r"class_weights.3: .*greater than 0",
        ),
        ({"loss": "softmax", "loss_arguments": {"classes": 5}}, "unknown key 'objective.loss_arguments.classes'"),
        ({"loss": "focal"}, r"focal is a loss of labels of type classification, got rating \(multiclass\)"),
        ({"label_losses": {"rating": {"loss": "huber"}}}, r"of type regression, got rating \(multiclass\)"),
        ({"group_loss": {"loss": "listwise", "group": "shop"}}, "objective.group_loss: .* no label is of type class"),
    ],
)
def test_a_mistake_in_the_objective_is_one_line(folder: Path, objective: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parts_of(folder, "DCN", ["rating"], objective={"name": "pointwise", **objective})
    assert "\n" not in str(error.value)


def test_softmax_is_no_loss_of_other_labels(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"softmax is a loss of labels of type multiclass, got click \(classification\)"
    ):
        parts_of(folder, "DCN", ["click"], objective={"name": "pointwise", "loss": "softmax"})


# ---- models


@pytest.mark.parametrize("model", [name for name, cls in catalogue().items() if family(cls) != "recall"])
def test_each_model_has_an_output_a_class_or_is_refused(folder: Path, model: str) -> None:
    several = family(catalogue()[model]) == "multitask"
    names = ["click", "rating"] if several else ["rating"]
    if model not in ABLE:
        with pytest.raises(UserError) as error:
            parts_of(folder, model, names)
        assert "\n" not in str(error.value)
        if model != "ESMM":  # whose labels are all of type classification
            assert f"'rating' has 5 classes, and {model} gives one number for a label; choose DCN" not in str(
                error.value
            )
            able = str(error.value).partition("choose ")[2].partition(", or a model")[0]
            assert set(able.split(", ")) == ABLE
        return
    found = parts_of(folder, model, names)
    assert found.model.label_outputs == ((1, C) if several else (C,))
    assert "outputs" not in found.config.model.parameters
    embedded = Embedded()
    for lookup in found.model.lookups():
        if lookup.pooling is None:
            embedded.sequences[lookup.name] = Sequence(torch.randn(4, 3, lookup.dim), torch.tensor([3, 1, 2, 3]), 9)
        else:
            embedded.vectors[lookup.name] = torch.randn(4, lookup.dim)
    embedded.dense |= {feature.name: torch.randn(4, feature.dim) for feature in found.model.dense_features()}
    logits = found.model(embedded).logits
    assert logits is not None
    assert logits.shape == (4, C + several)
    assert len({round(float(value), 6) for value in logits[0]}) == C + several


@pytest.mark.parametrize(
    ("model", "names", "sections", "message"),
    [
        ("DCN", ["rating"], {"model": {"outputs": [4]}}, r"model.outputs: DCN has \[4\] outputs, .* rating need \[5\]"),
        ("DCN", ["click"], {"model": {"outputs": [5]}}, r"model.outputs: DCN has \[5\] outputs, .* click need \[1\]"),
        ("DCN", ["rating"], {"model": {"outputs": [0]}}, r"outputs are \[0\]: each must be at least 1"),
        ("DCN", ["rating"], {"model": {"outputs": [5, 1]}}, "give one number for each label, 1"),
        ("DCN", ["rating"], {"model": {"outputs": "5"}}, "model.outputs: should be"),
        (
            "SharedBottom",
            ["click", "rating"],
            {"model": {"task_types": ["classification", "classification"]}},
            "model.task_types: classification for label 'rating', which is of type multiclass",
        ),
        (
            "SharedBottom",
            ["click", "buy"],
            {"model": {"task_types": ["classification", "multiclass"]}},
            "model.task_types: multiclass for label 'buy', which is of type classification",
        ),
    ],
)  # fmt: skip
def test_outputs_that_do_not_fit(
    folder: Path, model: str, names: list[str], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        parts_of(folder, model, names, **sections)
    assert "\n" not in str(error.value)


def test_types_may_be_left_to_the_labels(folder: Path) -> None:
    found = parts_of(folder, "MMoE", ["stay", "rating"], model={"task_types": None, "num_tasks": 2})
    assert found.model.label_outputs == (1, C)


# ---- metrics


def scored(rows: int = 700) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities, classes that follow them, and weights."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(C), rows).astype(np.float32)
    y = np.array([rng.choice(C, p=row / row.sum()) for row in p.astype(np.float64)], np.float32)
    return p, y, rng.random(rows).astype(np.float32)


def measured(one: Runtime, *wanted: dict[str, Any], rows: int = 700) -> dict[str, float]:
    """The values of metrics that get the rows in batches, of which one is empty."""
    found = KnownMetrics().of_label([MetricConfig(**item) for item in wanted], "multiclass", C)
    for part in zip(*(np.split(column, [0, 100, 650]) for column in scored(rows)), strict=True):
        for metric in found.values():
            metric.update(Scored(*part))
    for metric in found.values():
        metric.merge(one)
    return {name: metric.compute() for name, metric in found.items()}


def test_metrics_against_sklearn(one: Runtime) -> None:
    top = {"name": "accuracy", "k": 2, "as": "top2"}
    found = measured(one, {"name": DEFAULT}, {"name": "macro_auc"}, top)
    assert list(found) == ["log_loss", "normalized_entropy", "accuracy", "macro_auc", "top2"]
    p, y, w = (column.astype(np.float64) for column in scored())
    p = p / p.sum(axis=1, keepdims=True)
    assert found["log_loss"] == pytest.approx(sk.log_loss(y, p, sample_weight=w), rel=1e-6)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, p.argmax(axis=1), sample_weight=w), rel=1e-9)
    assert found["top2"] == pytest.approx(sk.top_k_accuracy_score(y, p, k=2, sample_weight=w), rel=1e-9)
    of_each = [sk.roc_auc_score(y == c, p[:, c], sample_weight=w) for c in range(C)]
    assert found["macro_auc"] == pytest.approx(np.mean(of_each), rel=1e-6)
    shares = np.bincount(y.astype(int), w) / w.sum()
    base = sk.log_loss(y, np.tile(shares, (len(y), 1)), sample_weight=w)
    assert found["normalized_entropy"] == pytest.approx(found["log_loss"] / base, rel=1e-9)


def test_what_rows_cannot_tell_is_nan(one: Runtime) -> None:
    wanted = [MetricConfig(name=name) for name in (DEFAULT, "macro_auc")]
    for metric in KnownMetrics().of_label(wanted, "multiclass", C).values():
        metric.merge(one)
        assert math.isnan(metric.compute())
    for metric in KnownMetrics().of_label(wanted, "multiclass", C).values():
        p = np.full((2, C), 0.2)
        p[1, 3] = math.nan
        metric.update(Scored(p, np.array([0.0, 1.0]), np.ones(2)))
        metric.merge(one)
        assert math.isnan(metric.compute())
    of_one_class = KnownMetrics().of_label(wanted, "multiclass", C)
    for metric in of_one_class.values():
        metric.update(Scored(np.full((2, C), 0.2), np.full(2, 3.0), np.ones(2)))
        metric.merge(one)
    values = {name: metric.compute() for name, metric in of_one_class.items()}
    assert values["log_loss"] == pytest.approx(math.log(C))
    assert values["accuracy"] == 0  # of equally probable classes the first comes first
    assert math.isnan(values["normalized_entropy"])
    assert math.isnan(values["macro_auc"])


def test_the_base_rate_has_an_entropy_of_one_and_certainty_a_finite_loss(one: Runtime) -> None:
    found = KnownMetrics().of_label([MetricConfig(name=DEFAULT)], "multiclass", 3)
    for metric in found.values():
        metric.update(Scored(np.tile([0.5, 0.25, 0.25], (4, 1)), np.array([0.0, 0, 1, 2]), np.ones(4)))
        metric.merge(one)
    assert found["normalized_entropy"].compute() == pytest.approx(1)
    wrong = KnownMetrics().of_label([MetricConfig(name="log_loss")], "multiclass", 2)["log_loss"]
    wrong.update(Scored(np.array([[1, 0]], np.float32), np.array([1.0], np.float32), np.ones(1, np.float32)))
    wrong.merge(one)
    assert wrong.compute() == pytest.approx(-math.log(np.finfo(np.float32).eps))


def test_a_class_that_is_none_is_an_error() -> None:
    metric = KnownMetrics().of_label([MetricConfig(name="accuracy")], "multiclass", 2)["accuracy"]
    with pytest.raises(ValueError, match=r"a label is 2\.0: labels must be integers from 0 to 1"):
        metric.update(Scored(np.ones((1, 2)), np.array([2.0]), np.ones(1)))


def test_reported_by_the_label_s_type(folder: Path) -> None:
    objective = parts_of(folder, "SharedBottom", ["click", "rating"]).objective
    found = objective.metrics(EvaluationConfig())
    assert {name: found[name] for name in list(found)[-3:]} == {
        "rating/log_loss": "min",
        "rating/normalized_entropy": "min",
        "rating/accuracy": "max",
    }
    assert "mean/auc" not in found
    alone = parts_of(folder, "DCN", ["rating"]).objective.metrics(EvaluationConfig(metrics=("macro_auc", "default")))
    assert alone == {"macro_auc": "max", "log_loss": "min", "normalized_entropy": "min", "accuracy": "max"}


@pytest.mark.parametrize(
    ("names", "evaluation", "message"),
    [
        (["rating"], {"metrics": ["auc"]}, "auc is a metric of labels of type classification, and this run has none"),
        (["rating"], {"metrics": ["mse"]}, "mse is a metric of labels of type classification or regression, and this"),
        (["click"], {"metrics": ["accuracy"]}, "accuracy is a metric of labels of type multiclass, and this run"),
        (["rating"], {"metrics": [{"name": "accuracy", "classes": 3}]}, "accuracy: its classes are those of the label"),
        (["rating"], {"metrics": [{"name": "accuracy", "k": 0}]}, "accuracy.k: .*greater"),
        (["rating"], {"metrics": ["acuracy"]}, "no metric 'acuracy': did you mean 'accuracy'"),
        (["rating"], {"calibration": "isotonic"}, "calibration: rating is a label of several .*use temperature"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured(folder: Path, names: list[str], evaluation: dict[str, Any], message: str) -> None:
    parts = parts_of(folder, "DCN", names, evaluation=evaluation)
    with pytest.raises(UserError, match=message) as error:
        parts.objective.metrics(parts.config.evaluation)
    assert "\n" not in str(error.value)
